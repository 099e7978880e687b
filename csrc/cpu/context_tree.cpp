// Context tree on the CPU: children of spans, one level's choice, and the layout of the retained nodes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"

namespace sharedllm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many elements a thread costs more to wake than it saves.
constexpr int64_t kGrain = 32768;

constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();

// Beyond 2^53 a count of tokens is no longer exact in float64.
constexpr double kLargestOffset = 9007199254740992.0;

Tensor empty_int64(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return allocate(like, sizes, ScalarType::Long);
}

void check_spans(const char* name, const int64_t* spans, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = spans[2 * i], length = spans[2 * i + 1];
    check(start >= 0 && length >= 0, name, "[", i, "]: expected start >= 0 and length >= 0, got (", start, ", ", length,
          ")");
    check(start <= kLargest - length, name, "[", i, "]: expected start + length of at most ", kLargest, ", got ", start,
          " + ", length);
  }
}

Tensor split(Tensor spans, std::optional<Tensor> offset) {
  check_tensor("spans", spans, {-1, 2}, ScalarType::Long);
  const int64_t n = spans.size(0);
  spans = dense(spans);
  const int64_t* span = spans.const_data_ptr<int64_t>();
  check_spans("spans", span, n);
  const double* noise = nullptr;
  if (offset) {
    const ScalarType dtype = offset->scalar_type();
    check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
              dtype == ScalarType::Double,
          "offset: expected dtype Float, BFloat16, Half or Double, got ", dtype_text(dtype));
    check_tensor("offset", *offset, {n}, dtype);
    offset = dense_as(*offset, ScalarType::Double);
    noise = offset->const_data_ptr<double>();
    for (int64_t i = 0; i < n; ++i) {
      check(std::abs(noise[i]) <= kLargestOffset, "offset[", i, "]: expected a finite number of tokens, got ",
            noise[i]);
    }
  }
  Tensor children = empty_int64(spans, {n, 2, 2});
  int64_t* out = children.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, n, kGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = span[2 * i], length = span[2 * i + 1];
      int64_t left = length / 2;
      if (noise) left = static_cast<int64_t>(std::floor(static_cast<double>(length) / 2 - noise[i]));
      left = std::min(std::max<int64_t>(left, length > 1), std::max<int64_t>(length - 1, 0));
      out[4 * i] = start;
      out[4 * i + 1] = left;
      out[4 * i + 2] = start + left;
      out[4 * i + 3] = length - left;
    }
  });
  return children;
}

std::tuple<Tensor, Tensor> select(Tensor children, std::optional<Tensor> choice) {
  check_tensor("children", children, {-1, 2, 2}, ScalarType::Long);
  const int64_t n = children.size(0);
  children = dense(children);
  const int64_t* in = children.const_data_ptr<int64_t>();
  const int64_t* wanted = nullptr;
  if (choice) {
    check_tensor("choice", *choice, {n}, ScalarType::Long);
    choice = dense(*choice);
    wanted = choice->const_data_ptr<int64_t>();
  }
  Tensor picked = empty_int64(children, {n, 2}), retained = empty_int64(children, {n, 2});
  int64_t* pick = picked.mutable_data_ptr<int64_t>();
  int64_t* keep = retained.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, n, kGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t* child = in + 4 * i;
      const bool left = (wanted && wanted[i] == 0 && child[1] > 0) || child[3] == 0;
      const int64_t* first = child + (left ? 0 : 2);
      const int64_t* second = child + (left ? 2 : 0);
      pick[2 * i] = first[0];
      pick[2 * i + 1] = first[1];
      keep[2 * i] = second[0];
      keep[2 * i + 1] = second[1];
    }
  });
  return {picked, retained};
}

// Nodes of a chunk that are sorted by insertion: quadratic, but the fastest for a tree's few.
constexpr int64_t kFewNodes = 64;

// Order of the nodes by start; an empty node comes before the node that starts at the same token. Stable.
std::vector<int64_t> token_order(const int64_t* node, int64_t chunks, int64_t nodes_per_chunk) {
  const int64_t count = chunks * nodes_per_chunk;
  const auto before = [node](int64_t a, int64_t b) {
    const int64_t start = node[2 * a], other = node[2 * b];
    return start < other || (start == other && node[2 * a + 1] == 0 && node[2 * b + 1] > 0);
  };
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  // chunks are in token order, so sorting inside each is usually enough
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = chunk * nodes_per_chunk, last = first + nodes_per_chunk;
    if (nodes_per_chunk > kFewNodes) {
      std::stable_sort(order.begin() + first, order.begin() + last, before);
      continue;
    }
    for (int64_t i = first + 1; i < last; ++i) {
      const int64_t moved = order[i];
      int64_t at = i;
      for (; at > first && before(moved, order[at - 1]); --at) order[at] = order[at - 1];
      order[at] = moved;
    }
  }
  if (!std::is_sorted(order.begin(), order.end(), before)) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), before);
  }
  return order;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layout(Tensor nodes, Tensor chunk_index, int64_t slots_per_node,
                                                          int64_t num_tokens, int64_t num_slots) {
  check_tensor("nodes", nodes, {-1, -1, 2}, ScalarType::Long);
  const int64_t chunks = nodes.size(0), m = nodes.size(1), count = chunks * m;
  check(m >= 1, "nodes: expected at least 1 node for each chunk, got shape ", shape_text(nodes.sizes()));
  check_tensor("chunk_index", chunk_index, {chunks}, ScalarType::Long);
  check(slots_per_node >= 1, "slots_per_node: expected at least 1, got ", slots_per_node);
  check(num_tokens >= 0, "num_tokens: expected at least 0, got ", num_tokens);
  check(num_slots >= 0, "num_slots: expected at least 0, got ", num_slots);
  nodes = dense(nodes);
  chunk_index = dense(chunk_index);
  const int64_t* node = nodes.const_data_ptr<int64_t>();
  const int64_t* chunk_at = chunk_index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    check(node[2 * i] >= 0 && node[2 * i + 1] >= 0, "nodes[", i / m, ", ", i % m,
          "]: expected start >= 0 and length >= 0, got (", node[2 * i], ", ", node[2 * i + 1], ")");
  }
  // a slot's position is one in its node plus the chunk's index
  check_range("chunk_index", chunk_at, chunks, 0, kLargest - num_tokens);

  // the caller's numbers are compared with the nodes before memory of their size is asked for
  Tensor cu_nodes = empty_int64(nodes, {count + 1}), cu_slots = empty_int64(nodes, {chunks + 1});
  int64_t* cu_node = cu_nodes.mutable_data_ptr<int64_t>();
  int64_t* cu_slot = cu_slots.mutable_data_ptr<int64_t>();
  const std::vector<int64_t> order = token_order(node, chunks, m);
  cu_node[0] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = order[i], start = node[2 * at], length = node[2 * at + 1];
    check(length == 0 || start == cu_node[i], "nodes[", at / m, ", ", at % m,
          "]: expected nodes that cover each token once: start ", cu_node[i], ", got ", start);
    check(length <= num_tokens - cu_node[i], "nodes[", at / m, ", ", at % m,
          "]: expected an end of at most num_tokens = ", num_tokens, ", got ", start, " + ", length);
    cu_node[i + 1] = cu_node[i] + length;
  }
  check(cu_node[count] == num_tokens, "nodes: expected to cover num_tokens = ", num_tokens, ", got ", cu_node[count]);

  std::vector<int64_t> first_slot(count + 1);
  for (int64_t i = 0; i < count; ++i) first_slot[i + 1] = first_slot[i] + std::min(node[2 * i + 1], slots_per_node);
  check(first_slot[count] <= num_slots, "num_slots: expected at least the ", first_slot[count], " kept tokens, got ",
        num_slots);
  for (int64_t chunk = 0; chunk <= chunks; ++chunk) cu_slot[chunk] = first_slot[chunk * m];

  Tensor positions = empty_int64(nodes, {num_tokens});
  Tensor keep_index = empty_int64(nodes, {num_slots}), keep_position = empty_int64(nodes, {num_slots});
  int64_t* position = positions.mutable_data_ptr<int64_t>();
  int64_t* kept_token = keep_index.mutable_data_ptr<int64_t>();
  int64_t* kept_position = keep_position.mutable_data_ptr<int64_t>();

  const int64_t tokens_per_node = count ? std::max<int64_t>((num_tokens + num_slots) / count, 1) : 1;
  const int64_t* slot_of = first_slot.data();
  torch::stable::parallel_for(
      0, count, std::max<int64_t>(kGrain / tokens_per_node, 1), [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t start = node[2 * i], length = node[2 * i + 1], kept = slot_of[i + 1] - slot_of[i];
          std::iota(position + (length ? start : 0), position + (length ? start : 0) + length, int64_t{0});
          const int64_t chunk = chunk_at[i / m];
          int64_t* token_out = kept_token + slot_of[i];
          int64_t* position_out = kept_position + slot_of[i];
          // floor(j * length / kept) without a division for each slot
          const int64_t step = kept ? length / kept : 0, rest = kept ? length % kept : 0;
          int64_t inside = 0, fraction = 0;
          for (int64_t j = 0; j < kept; ++j) {
            token_out[j] = start + inside;
            position_out[j] = inside + chunk;
            inside += step;
            fraction += rest;
            if (fraction >= kept) {
              fraction -= kept;
              ++inside;
            }
          }
        }
      });
  std::fill(kept_token + first_slot[count], kept_token + num_slots, int64_t{-1});
  std::fill(kept_position + first_slot[count], kept_position + num_slots, int64_t{0});
  return {positions, cu_nodes, keep_index, keep_position, cu_slots};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sharedllm, CPU, m) {
  m.impl("context_tree_split", TORCH_BOX(&split));
  m.impl("context_tree_select", TORCH_BOX(&select));
  m.impl("context_tree_layout", TORCH_BOX(&layout));
}

}  // namespace sharedllm

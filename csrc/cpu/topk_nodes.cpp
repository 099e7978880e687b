// Top-k node retrieval on the CPU: cosine similarity in one pass over the nodes, then a partial selection in each
// group.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/vector.h"

namespace sharedllm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Four accumulators of 16 lanes hide the latency of the fused multiply-add.
constexpr int64_t kStep = 4 * kLanes;

// Dot product with `query` and squared norm of one row, each element read once.
template <class T>
SHAREDLLM_INLINE void dot_and_square(const float* query, const T* row, int64_t size, float* dot, float* square) {
  Float16 dots[4] = {}, squares[4] = {};
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    for (int64_t j = 0; j < 4; ++j) {
      const Float16 x = load16(row + i + j * kLanes);
      dots[j] += x * load16(query + i + j * kLanes);
      squares[j] += x * x;
    }
  }
  for (; i + kLanes <= size; i += kLanes) {
    const Float16 x = load16(row + i);
    dots[0] += x * load16(query + i);
    squares[0] += x * x;
  }
  if (i < size) {
    const Float16 x = load_upto16(row + i, size - i);
    dots[1] += x * load_upto16(query + i, size - i);
    squares[1] += x * x;
  }
  *dot = sum16((dots[0] + dots[1]) + (dots[2] + dots[3]));
  *square = sum16((squares[0] + squares[1]) + (squares[2] + squares[3]));
}

struct Similarity {
  const float* queries;      // [Q, d]
  const float* query_norms;  // [Q], at least eps
  const void* nodes;         // [N, d], rows `stride` elements apart
  int64_t stride, size;
  const int64_t* cu_groups;    // [G + 1]
  const int64_t* group_query;  // [G]
  int64_t groups;
  const uint8_t* valid;  // [N] or null; any byte but 0 is true
  float eps;
  float* score;  // [N]
};

template <class T>
SHAREDLLM_INLINE void similarity_rows(const Similarity& p, int64_t begin, int64_t end) {
  int64_t group = std::upper_bound(p.cu_groups, p.cu_groups + p.groups + 1, begin) - p.cu_groups - 1;
  for (int64_t row = begin; row < end; ++row) {
    while (p.cu_groups[group + 1] <= row) ++group;
    if (p.valid && !p.valid[row]) continue;
    const int64_t query = p.group_query[group];
    float dot, square;
    dot_and_square(p.queries + query * p.size, static_cast<const T*>(p.nodes) + row * p.stride, p.size, &dot, &square);
    const float norm = std::sqrt(square);
    p.score[row] = dot / (p.query_norms[query] * (norm < p.eps ? p.eps : norm));
  }
}

SHAREDLLM_FOR_EACH_ISA(similarity_float32, (const Similarity& p, int64_t begin, int64_t end), (p, begin, end),
                       similarity_rows<float>(p, begin, end))
SHAREDLLM_FOR_EACH_ISA(similarity_bfloat16, (const Similarity& p, int64_t begin, int64_t end), (p, begin, end),
                       similarity_rows<uint16_t>(p, begin, end))

// A 64-bit sort key that ascends from the best to the worst: similarity descending (NaN with -inf), then the index.
uint64_t rank_key(float score, uint32_t index) {
  if (std::isnan(score)) score = -std::numeric_limits<float>::infinity();
  score += 0.0f;  // -0 equals +0
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  const uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~rising) << 32 | index;
}

void select_groups(const Similarity& p, int64_t k, int64_t begin, int64_t end, int64_t* indices, float* similarity) {
  std::vector<uint64_t> keys;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = p.cu_groups[group], last = p.cu_groups[group + 1];
    int64_t found = 0;
    int64_t* index_out = indices + group * k;
    float* score_out = similarity + group * k;
    if (k == 1) {
      uint64_t best = 0;
      for (int64_t row = first; row < last; ++row) {
        if (p.valid && !p.valid[row]) continue;
        const uint64_t key = rank_key(p.score[row], static_cast<uint32_t>(row - first));
        if (!found || key < best) best = key;
        found = 1;
      }
      if (found) index_out[0] = first + static_cast<uint32_t>(best);
    } else if (k > 1) {
      keys.clear();
      for (int64_t row = first; row < last; ++row) {
        if (!p.valid || p.valid[row]) keys.push_back(rank_key(p.score[row], static_cast<uint32_t>(row - first)));
      }
      found = std::min<int64_t>(k, keys.size());
      if (found < static_cast<int64_t>(keys.size())) std::nth_element(keys.begin(), keys.begin() + found, keys.end());
      std::sort(keys.begin(), keys.begin() + found);
      for (int64_t j = 0; j < found; ++j) index_out[j] = first + static_cast<uint32_t>(keys[j]);
    }
    for (int64_t j = 0; j < found; ++j) score_out[j] = p.score[index_out[j]];
    std::fill(index_out + found, index_out + k, int64_t{-1});
    std::fill(score_out + found, score_out + k, -std::numeric_limits<float>::infinity());
  }
}

std::tuple<Tensor, Tensor> topk_nodes(Tensor queries, Tensor nodes, Tensor cu_groups, Tensor group_query, int64_t k,
                                      std::optional<Tensor> valid, double eps) {
  check(nodes.is_cpu(), "nodes: expected a tensor on cpu, got one on another kind of device");
  check_float32_or_bfloat16("nodes", nodes);
  check_shape("nodes", nodes, {-1, -1});
  const int64_t count = nodes.size(0), size = nodes.size(1);
  check_tensor("queries", queries, {-1, size}, nodes.scalar_type());
  check_tensor("cu_groups", cu_groups, {-1}, ScalarType::Long);
  const int64_t groups = cu_groups.numel() - 1;
  check(groups >= 0, "cu_groups: expected at least 1 element, got 0");
  check_tensor("group_query", group_query, {groups}, ScalarType::Long);
  check(k >= 0, "k: expected at least 0, got ", k);
  check_lower_bound(eps);
  check(count <= std::numeric_limits<uint32_t>::max(), "nodes: expected at most 4294967295 rows, got ", count);
  if (valid) {
    check_tensor("valid", *valid, {count}, ScalarType::Bool);
    valid = dense(*valid);
  }
  cu_groups = dense(cu_groups);
  group_query = dense(group_query);
  if ((size > 1 && nodes.stride(1) != 1) || !is_aligned(nodes)) nodes = dense(nodes);
  const int64_t num_queries = queries.size(0);
  queries = dense_as(queries, ScalarType::Float);

  Similarity p{};
  p.cu_groups = cu_groups.const_data_ptr<int64_t>();
  p.group_query = group_query.const_data_ptr<int64_t>();
  p.groups = groups;
  check_cumulative("cu_groups", p.cu_groups, groups + 1, count);
  check_range("group_query", p.group_query, groups, 0, num_queries);

  p.queries = queries.const_data_ptr<float>();
  p.nodes = nodes.const_data_ptr();
  p.stride = nodes.stride(0);
  p.size = size;
  p.valid = valid ? static_cast<const uint8_t*>(valid->const_data_ptr()) : nullptr;
  p.eps = static_cast<float>(eps);
  std::vector<float> norms(num_queries), scores(count);
  for (int64_t i = 0; i < num_queries; ++i) {
    float dot, square;
    dot_and_square(p.queries, p.queries + i * size, size, &dot, &square);
    const float norm = std::sqrt(square);
    norms[i] = norm < p.eps ? p.eps : norm;
  }
  p.query_norms = norms.data();
  p.score = scores.data();

  Tensor indices = allocate(nodes, {groups, k}, ScalarType::Long);
  Tensor similarity = allocate(nodes, {groups, k}, ScalarType::Float);
  int64_t* index_out = indices.mutable_data_ptr<int64_t>();
  float* score_out = similarity.mutable_data_ptr<float>();
  const bool narrow = nodes.scalar_type() == ScalarType::BFloat16;
  // 64K elements keep a core busy for longer than it takes to wake it
  torch::stable::parallel_for(0, count, std::max<int64_t>(65536 / std::max<int64_t>(size, 1), 1),
                              [&](int64_t begin, int64_t end) {
                                narrow ? similarity_bfloat16(p, begin, end) : similarity_float32(p, begin, end);
                              });
  const int64_t rows_per_group = groups ? count / groups + 1 : 1;
  torch::stable::parallel_for(0, groups, std::max<int64_t>(16384 / rows_per_group, 1), [&](int64_t begin, int64_t end) {
    select_groups(p, k, begin, end, index_out, score_out);
  });
  return {indices, similarity};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sharedllm, CPU, m) { m.impl("topk_nodes", TORCH_BOX(&topk_nodes)); }

}  // namespace sharedllm

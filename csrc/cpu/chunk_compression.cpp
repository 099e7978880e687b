// Chunk compression on the CPU: rotary embedding, selection, chunk-index rotation and packing in one pass over the
// tokens.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>

#include "common/checks.h"
#include "common/memory.h"
#include "common/vector.h"

namespace sharedllm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of `heads` heads of contiguous elements; strides in elements.
struct Rows {
  const void* data = nullptr;
  int64_t count = 0, row_stride = 0, head_stride = 0;

  template <class T>
  const T* row(int64_t i) const {
    return static_cast<const T*>(data) + i * row_stride;
  }
};

struct Rotary {
  const float* cos;  // [P, half]
  const float* sin;  // [P, half]
  int64_t half;
};

// What both directions share; bfloat16 elements are handled as uint16_t.
struct Problem {
  Rotary table;
  int64_t heads, size;           // Hkv, D
  int64_t q_heads;               // Hq
  int64_t tokens, slots;         // T, S
  const int64_t* q_positions;    // [Tq] or null
  const int64_t* positions;      // [T] or null
  const int64_t* keep_index;     // [S]
  const int64_t* keep_position;  // [S]
  const int64_t* slot_of_token;  // [T], -1 where a token is not kept
};

struct Forward : Problem {
  Rows q, k, v;
  void *q_rotated, *k_rotated, *memory_k, *memory_v;  // dense
};

struct Backward : Problem {
  Rows grad_q_rotated, grad_k_rotated, grad_memory_k, grad_memory_v;
  void *grad_q, *grad_k, *grad_v;  // dense
};

// to = from rotated at `position`, or back; `to` is dense.
template <class T>
SHAREDLLM_INLINE void rotate_heads(T* to, const T* from, int64_t from_stride, int64_t heads, int64_t size,
                                   const Rotary& table, int64_t position, bool back) {
  const int64_t half = table.half;
  const float *cos = table.cos + position * half, *sin = table.sin + position * half;
  const float sign = back ? -1.0f : 1.0f;
  for (int64_t head = 0; head < heads; ++head, to += size, from += from_stride) {
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t count = half - i;
      const Float16 c = load_upto16(cos + i, count), s = load_upto16(sin + i, count) * sign;
      const Float16 low = load_upto16(from + i, count), high = load_upto16(from + half + i, count);
      store_upto16(to + i, low * c - high * s, count);
      store_upto16(to + half + i, high * c + low * s, count);
    }
    if (size > 2 * half) std::memcpy(to + 2 * half, from + 2 * half, (size - 2 * half) * sizeof(T));
  }
}

// to = a rotated back from position_a + b rotated back from position_b, added in float32; `to` is dense.
template <class T>
SHAREDLLM_INLINE void rotate_back_sum(T* to, const T* a, int64_t a_stride, int64_t position_a, const T* b,
                                      int64_t b_stride, int64_t position_b, int64_t heads, int64_t size,
                                      const Rotary& table) {
  const int64_t half = table.half;
  const float *cos_a = table.cos + position_a * half, *sin_a = table.sin + position_a * half;
  const float *cos_b = table.cos + position_b * half, *sin_b = table.sin + position_b * half;
  for (int64_t head = 0; head < heads; ++head, to += size, a += a_stride, b += b_stride) {
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t count = half - i;
      const Float16 ca = load_upto16(cos_a + i, count), sa = load_upto16(sin_a + i, count);
      const Float16 cb = load_upto16(cos_b + i, count), sb = load_upto16(sin_b + i, count);
      const Float16 low_a = load_upto16(a + i, count), high_a = load_upto16(a + half + i, count);
      const Float16 low_b = load_upto16(b + i, count), high_b = load_upto16(b + half + i, count);
      store_upto16(to + i, (low_a * ca + high_a * sa) + (low_b * cb + high_b * sb), count);
      store_upto16(to + half + i, (high_a * ca - low_a * sa) + (high_b * cb - low_b * sb), count);
    }
    for (int64_t i = 2 * half; i < size; i += kLanes) {
      store_upto16(to + i, load_upto16(a + i, size - i) + load_upto16(b + i, size - i), size - i);
    }
  }
}

template <class T>
SHAREDLLM_INLINE void copy_heads(T* to, const T* from, int64_t from_stride, int64_t heads, int64_t size) {
  if (from_stride == size) {
    std::memcpy(to, from, heads * size * sizeof(T));
    return;
  }
  for (int64_t head = 0; head < heads; ++head)
    std::memcpy(to + head * size, from + head * from_stride, size * sizeof(T));
}

// Part `part` of `parts` of all the work: its share of the query rows, of the tokens and of the slots.
template <class T>
SHAREDLLM_INLINE void forward_part(const Forward& p, int64_t part, int64_t parts) {
  const int64_t row = p.heads * p.size, q_row = p.q_heads * p.size;
  for (int64_t i = p.q.count * part / parts, end = p.q.count * (part + 1) / parts; i < end; ++i) {
    rotate_heads(static_cast<T*>(p.q_rotated) + i * q_row, p.q.row<T>(i), p.q.head_stride, p.q_heads, p.size, p.table,
                 p.q_positions[i], false);
  }
  T *memory_k = static_cast<T*>(p.memory_k), *memory_v = static_cast<T*>(p.memory_v);
  if (p.positions) {
    for (int64_t i = p.tokens * part / parts, end = p.tokens * (part + 1) / parts; i < end; ++i) {
      const T* k = p.k.row<T>(i);
      rotate_heads(static_cast<T*>(p.k_rotated) + i * row, k, p.k.head_stride, p.heads, p.size, p.table, p.positions[i],
                   false);
      if (const int64_t slot = p.slot_of_token[i]; slot >= 0) {
        rotate_heads(memory_k + slot * row, k, p.k.head_stride, p.heads, p.size, p.table, p.keep_position[slot], false);
      }
    }
  }
  for (int64_t i = p.slots * part / parts, end = p.slots * (part + 1) / parts; i < end; ++i) {
    const int64_t token = p.keep_index[i];
    if (token < 0) {
      std::memset(memory_k + i * row, 0, row * sizeof(T));
      std::memset(memory_v + i * row, 0, row * sizeof(T));
      continue;
    }
    copy_heads(memory_v + i * row, p.v.row<T>(token), p.v.head_stride, p.heads, p.size);
    if (!p.positions) {
      rotate_heads(memory_k + i * row, p.k.row<T>(token), p.k.head_stride, p.heads, p.size, p.table, p.keep_position[i],
                   false);
    }
  }
}

template <class T>
SHAREDLLM_INLINE void backward_part(const Backward& p, int64_t part, int64_t parts) {
  const int64_t row = p.heads * p.size, q_row = p.q_heads * p.size;
  const Rows &q = p.grad_q_rotated, &k = p.grad_k_rotated, &memory_k = p.grad_memory_k, &memory_v = p.grad_memory_v;
  for (int64_t i = q.count * part / parts, end = q.count * (part + 1) / parts; i < end; ++i) {
    rotate_heads(static_cast<T*>(p.grad_q) + i * q_row, q.row<T>(i), q.head_stride, p.q_heads, p.size, p.table,
                 p.q_positions[i], true);
  }
  for (int64_t i = p.tokens * part / parts, end = p.tokens * (part + 1) / parts; i < end; ++i) {
    T *grad_k = static_cast<T*>(p.grad_k) + i * row, *grad_v = static_cast<T*>(p.grad_v) + i * row;
    const int64_t slot = p.slot_of_token[i];
    if (slot >= 0) {
      copy_heads(grad_v, memory_v.row<T>(slot), memory_v.head_stride, p.heads, p.size);
    } else {
      std::memset(grad_v, 0, row * sizeof(T));
    }
    if (p.positions && slot >= 0) {
      rotate_back_sum(grad_k, k.row<T>(i), k.head_stride, p.positions[i], memory_k.row<T>(slot), memory_k.head_stride,
                      p.keep_position[slot], p.heads, p.size, p.table);
    } else if (p.positions) {
      rotate_heads(grad_k, k.row<T>(i), k.head_stride, p.heads, p.size, p.table, p.positions[i], true);
    } else if (slot >= 0) {
      rotate_heads(grad_k, memory_k.row<T>(slot), memory_k.head_stride, p.heads, p.size, p.table, p.keep_position[slot],
                   true);
    } else {
      std::memset(grad_k, 0, row * sizeof(T));
    }
  }
}

SHAREDLLM_FOR_EACH_ISA(forward_float32, (const Forward& p, int64_t part, int64_t parts), (p, part, parts),
                       forward_part<float>(p, part, parts))
SHAREDLLM_FOR_EACH_ISA(forward_bfloat16, (const Forward& p, int64_t part, int64_t parts), (p, part, parts),
                       forward_part<uint16_t>(p, part, parts))
SHAREDLLM_FOR_EACH_ISA(backward_float32, (const Backward& p, int64_t part, int64_t parts), (p, part, parts),
                       backward_part<float>(p, part, parts))
SHAREDLLM_FOR_EACH_ISA(backward_bfloat16, (const Backward& p, int64_t part, int64_t parts), (p, part, parts),
                       backward_part<uint16_t>(p, part, parts))

// Rows with contiguous elements; a tensor without them is replaced by its contiguous copy.
Rows rows_of(Tensor& tensor) {
  if ((tensor.size(2) > 1 && tensor.stride(2) != 1) || !is_aligned(tensor)) tensor = dense(tensor);
  return {tensor.const_data_ptr(), tensor.size(0), tensor.stride(0), tensor.stride(1)};
}

// Contiguous int64 [count] with values in [low, high).
const int64_t* indices_of(const char* name, Tensor& tensor, int64_t count, int64_t low, int64_t high) {
  check_tensor(name, tensor, {count}, ScalarType::Long);
  tensor = dense(tensor);
  const int64_t* values = tensor.const_data_ptr<int64_t>();
  check_range(name, values, tensor.size(0), low, high);
  return values;
}

// Owns the contiguous copies that a Problem points into.
struct Indices {
  Tensor cos, sin, keep_index, keep_position;
  std::optional<Tensor> q_positions, positions;
  std::optional<Tensor> slot_of_token;

  void fill(Problem& p, int64_t num_queries) {
    check_tensor("cos", cos, {-1, -1}, ScalarType::Float);
    const int64_t rows = cos.size(0), half = cos.size(1);
    check_tensor("sin", sin, {rows, half}, ScalarType::Float);
    check_rotary_columns(half, p.size);
    cos = dense(cos);
    sin = dense(sin);
    p.table = {cos.const_data_ptr<float>(), sin.const_data_ptr<float>(), half};
    p.q_positions = q_positions ? indices_of("q_positions", *q_positions, num_queries, 0, rows) : nullptr;
    p.positions = positions ? indices_of("positions", *positions, p.tokens, 0, rows) : nullptr;
    p.keep_index = indices_of("keep_index", keep_index, -1, -1, p.tokens);
    p.slots = keep_index.size(0);
    p.keep_position = indices_of("keep_position", keep_position, p.slots, 0, rows);
    slot_of_token = allocate(keep_index, {p.tokens});
    int64_t* const slot_of = slot_of_token->mutable_data_ptr<int64_t>();
    std::fill(slot_of, slot_of + p.tokens, int64_t{-1});
    for (int64_t i = 0; i < p.slots; ++i) {
      const int64_t token = p.keep_index[i];
      if (token < 0) continue;
      check(slot_of[token] < 0, "keep_index[", i, "]: expected a token that no other slot keeps, got ", token,
            " again (slot ", slot_of[token], ")");
      slot_of[token] = i;
    }
    p.slot_of_token = slot_of;
  }
};

// Uninitialised rows in `like`'s dtype.
Tensor output(const Tensor& like, std::initializer_list<int64_t> sizes) {
  Tensor tensor = allocate(like, sizes);
  prefer_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}

// A few parts for each thread even out rows of different cost; a part has at least 32K elements.
template <class F>
void run_parts(int64_t elements, const F& part) {
  // nothing to write, perhaps no addresses, and sizes whose product is not a number of elements
  if (elements == 0) return;
  const int64_t parts = std::clamp<int64_t>(elements / 32768, 1, 4 * torch::stable::get_num_threads());
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) part(i, parts);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(std::optional<Tensor> q, Tensor k, Tensor v, Tensor cos, Tensor sin,
                                                   std::optional<Tensor> q_positions, std::optional<Tensor> positions,
                                                   Tensor keep_index, Tensor keep_position) {
  check(k.is_cpu(), "k: expected a tensor on cpu, got one on another kind of device");
  check_float32_or_bfloat16("k", k);
  check_shape("k", k, {-1, -1, -1});
  const ScalarType dtype = k.scalar_type();
  Forward p{};
  p.tokens = k.size(0);
  p.heads = k.size(1);
  p.size = k.size(2);
  check_tensor("v", v, {p.tokens, p.heads, p.size}, dtype);
  check(q.has_value() == q_positions.has_value(), "q_positions: expected a tensor exactly when q is given, got ",
        q_positions ? "one without q" : "none");
  if (q) {
    check_tensor("q", *q, {-1, -1, p.size}, dtype);
    p.q_heads = q->size(1);
    p.q = rows_of(*q);
  }
  p.k = rows_of(k);
  p.v = rows_of(v);
  Indices indices{cos, sin, keep_index, keep_position, q_positions, positions, std::nullopt};
  indices.fill(p, p.q.count);

  Tensor q_rotated = output(k, {0}), k_rotated = output(k, {0});
  if (q) q_rotated = output(k, {p.q.count, p.q_heads, p.size});
  if (positions) k_rotated = output(k, {p.tokens, p.heads, p.size});
  Tensor memory_k = output(k, {p.slots, p.heads, p.size});
  Tensor memory_v = output(k, {p.slots, p.heads, p.size});
  p.q_rotated = q_rotated.mutable_data_ptr();
  p.k_rotated = k_rotated.mutable_data_ptr();
  p.memory_k = memory_k.mutable_data_ptr();
  p.memory_v = memory_v.mutable_data_ptr();
  const int64_t elements = q_rotated.numel() + k_rotated.numel() + 2 * memory_k.numel();
  run_parts(elements, [&](int64_t part, int64_t parts) {
    dtype == ScalarType::Float ? forward_float32(p, part, parts) : forward_bfloat16(p, part, parts);
  });
  return {q_rotated, k_rotated, memory_k, memory_v};
}

std::tuple<Tensor, Tensor, Tensor> backward(std::optional<Tensor> grad_q_rotated, std::optional<Tensor> grad_k_rotated,
                                            Tensor grad_memory_k, Tensor grad_memory_v, Tensor cos, Tensor sin,
                                            std::optional<Tensor> q_positions, std::optional<Tensor> positions,
                                            Tensor keep_index, Tensor keep_position, int64_t num_tokens) {
  check(grad_memory_k.is_cpu(), "grad_memory_k: expected a tensor on cpu, got one on another kind of device");
  check_float32_or_bfloat16("grad_memory_k", grad_memory_k);
  check_shape("grad_memory_k", grad_memory_k, {-1, -1, -1});
  check(num_tokens >= 0, "num_tokens: expected at least 0, got ", num_tokens);
  const ScalarType dtype = grad_memory_k.scalar_type();
  Backward p{};
  p.tokens = num_tokens;
  p.heads = grad_memory_k.size(1);
  p.size = grad_memory_k.size(2);
  check_tensor("grad_memory_v", grad_memory_v, {grad_memory_k.size(0), p.heads, p.size}, dtype);
  check_shape("keep_index", keep_index, {grad_memory_k.size(0)});
  // a gradient that did not arrive makes its positions useless, as in the reference
  if (!grad_q_rotated || !q_positions) grad_q_rotated = q_positions = std::nullopt;
  if (!grad_k_rotated || !positions) grad_k_rotated = positions = std::nullopt;
  if (grad_q_rotated) {
    check_tensor("grad_q_rotated", *grad_q_rotated, {-1, -1, p.size}, dtype);
    p.q_heads = grad_q_rotated->size(1);
    p.grad_q_rotated = rows_of(*grad_q_rotated);
  }
  if (grad_k_rotated) {
    check_tensor("grad_k_rotated", *grad_k_rotated, {num_tokens, p.heads, p.size}, dtype);
    p.grad_k_rotated = rows_of(*grad_k_rotated);
  }
  p.grad_memory_k = rows_of(grad_memory_k);
  p.grad_memory_v = rows_of(grad_memory_v);
  Indices indices{cos, sin, keep_index, keep_position, q_positions, positions, std::nullopt};
  indices.fill(p, p.grad_q_rotated.count);

  Tensor grad_q = output(grad_memory_k, {0});
  if (grad_q_rotated) grad_q = output(grad_memory_k, {p.grad_q_rotated.count, p.q_heads, p.size});
  Tensor grad_k = output(grad_memory_k, {p.tokens, p.heads, p.size});
  Tensor grad_v = output(grad_memory_k, {p.tokens, p.heads, p.size});
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr();
  run_parts(grad_q.numel() + 2 * grad_k.numel(), [&](int64_t part, int64_t parts) {
    dtype == ScalarType::Float ? backward_float32(p, part, parts) : backward_bfloat16(p, part, parts);
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sharedllm, CPU, m) {
  m.impl("chunk_compression", TORCH_BOX(&forward));
  m.impl("chunk_compression_backward", TORCH_BOX(&backward));
}

}  // namespace sharedllm

// Node vectors' attention on the CPU: a node's last token over the node's keys and values, rotated on the way.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "common/checks.h"
#include "common/simd.h"
#include "common/tasks.h"

namespace sharedllm::nodes {

struct Problem {
  const void *q, *k, *v;  // [N, Hq, D], [T, Hkv, D], [T, Hkv, D]; unit stride in D, the other strides in elements
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;
  const int64_t* spans;    // [N, 2]
  const float *cos, *sin;  // [P, R/2]
  int64_t half, nodes, kv_heads, groups, size;
  float scale;
  void* out;  // [N, Hq, D]
};

namespace generic {
using S = Generic;
#include "node_vectors_kernel.inl"
}  // namespace generic

#if defined(__x86_64__)
SHAREDLLM_BEGIN_TARGET(SHAREDLLM_AVX2)
namespace avx2 {
using S = Avx2;
#include "node_vectors_kernel.inl"
}  // namespace avx2
SHAREDLLM_END_TARGET

SHAREDLLM_BEGIN_TARGET(SHAREDLLM_AVX512)
namespace avx512 {
using S = Avx512;
#include "node_vectors_kernel.inl"
}  // namespace avx512
SHAREDLLM_END_TARGET
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// 2^levels leaves to a root: more would be a mistake.
constexpr int64_t kMaxLevels = 20;

template <class T>
void run(const Problem& p) {
  auto kernel = &generic::run_nodes<T>;
#if defined(__x86_64__)
  switch (fastest_isa()) {
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      kernel = &avx512::run_nodes<T>;
      break;
    case Isa::kAvx2:
      kernel = &avx2::run_nodes<T>;
      break;
    default:
      break;
  }
#endif
  // nodes differ in length: several at a time, so that no thread is left with the long ones; a node's heads stay
  // together, as they share its tables
  const int64_t step = p.kv_heads * std::max<int64_t>(1, p.nodes / 256);
  const int64_t total = p.nodes * p.kv_heads;
  run_tasks(ceil_div(total, step), [&](std::atomic<int64_t>& next) {
    for (int64_t i; (i = step * next++) < total;) kernel(p, i, std::min(i + step, total));
  });
}

// q: [N, Hq, D]; longest: tokens that a span may hold.
void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, Tensor* spans, Tensor* cos, Tensor* sin,
                  double scale, int64_t longest) {
  const ScalarType dtype = q.scalar_type();
  const int64_t heads = q.size(q.dim() - 2), size = q.size(q.dim() - 1);
  check_tensor("k", k, {-1, -1, size}, dtype);
  check_tensor("v", v, {k.size(0), k.size(1), size}, dtype);
  check(k.size(1) > 0 && heads % k.size(1) == 0, "q: expected a number of heads divisible by k's ", k.size(1), ", got ",
        heads);
  check_tensor("spans", *spans, {q.size(0), 2}, ScalarType::Long);
  check_tensor("cos", *cos, {-1, -1}, ScalarType::Float);
  check_tensor("sin", *sin, {cos->size(0), cos->size(1)}, ScalarType::Float);
  check_rotary_columns(cos->size(1), size);
  check_scale(scale);
  for (Tensor* x : {spans, cos, sin}) *x = dense(*x);
  const int64_t *span = spans->const_data_ptr<int64_t>(), tokens = k.size(0);
  for (int64_t i = 0; i < q.size(0); ++i) {
    const int64_t start = span[2 * i], length = span[2 * i + 1];
    check(start >= 0 && length >= 0 && length <= longest && start <= tokens - length, "spans[", i,
          "]: expected start >= 0, 0 <= length <= ", longest, " and start + length <= ", tokens, ", got (", start, ", ",
          length, ")");
  }
}

// Inputs are checked, and the elements of a head are contiguous.
Tensor attend_all(const Tensor& q, const Tensor& k, const Tensor& v, const int64_t* spans, const Tensor& cos,
                  const Tensor& sin, double scale) {
  Tensor out = allocate(q, {q.size(0), q.size(1), q.size(2)});
  if (out.numel() == 0) return out;
  const Problem p{q.const_data_ptr(),
                  k.const_data_ptr(),
                  v.const_data_ptr(),
                  q.stride(0),
                  q.stride(1),
                  k.stride(0),
                  k.stride(1),
                  v.stride(0),
                  v.stride(1),
                  spans,
                  cos.const_data_ptr<float>(),
                  sin.const_data_ptr<float>(),
                  cos.size(1),
                  q.size(0),
                  k.size(1),
                  q.size(1) / k.size(1),
                  q.size(2),
                  static_cast<float>(scale),
                  out.mutable_data_ptr()};
  if (q.scalar_type() == ScalarType::Float) {
    run<float>(p);
  } else {
    run<bf16>(p);
  }
  return out;
}

Tensor node_vectors(Tensor q, Tensor k, Tensor v, Tensor spans, Tensor cos, Tensor sin, double scale) {
  check(q.is_cpu(), "q: expected a tensor on cpu, got one on another kind of device");
  check_float32_or_bfloat16("q", q);
  check_shape("q", q, {-1, -1, -1});
  check_inputs(q, k, v, &spans, &cos, &sin, scale, cos.size(0));
  return attend_all(dense_heads(q), dense_heads(k), dense_heads(v), spans.const_data_ptr<int64_t>(), cos, sin, scale);
}

Tensor tree_node_vectors(Tensor q, Tensor k, Tensor v, Tensor spans, Tensor cos, Tensor sin, int64_t levels,
                         double scale) {
  check(q.is_cpu(), "q: expected a tensor on cpu, got one on another kind of device");
  check_float32_or_bfloat16("q", q);
  check(levels >= 1 && levels <= kMaxLevels, "levels: expected 1 to ", kMaxLevels, ", got ", levels);
  check_shape("q", q, {-1, int64_t{1} << levels, -1, -1});
  // the halves of a root must fit into the tables; tables without columns may have any number of rows
  constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();
  check_inputs(q, k, v, &spans, &cos, &sin, scale, cos.size(0) > kLargest / 2 ? kLargest : 2 * cos.size(0));
  const int64_t n = q.size(0), leaves = q.size(1), rows = 2 * leaves - 2;
  if (q.numel() == 0) return allocate(q, {n, rows, q.size(2), q.size(3)});
  q = dense(q);
  const int64_t bytes = q.size(2) * q.size(3) * static_cast<int64_t>(q.element_size());
  Tensor queries = allocate(q, {n * rows, q.size(2), q.size(3)});
  const auto* from = static_cast<const char*>(q.const_data_ptr());
  auto* to = static_cast<char*>(queries.mutable_data_ptr());
  std::vector<int64_t> nodes(2 * n * rows);
  const int64_t* span = spans.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    // level by level: the parent of a row is known before the row
    for (int64_t level = 1, row = 0; level <= levels; ++level) {
      for (int64_t node = 0; node < int64_t{1} << level; ++node, ++row) {
        const int64_t* parent =
            level == 1 ? span + 2 * i : &nodes[2 * (i * rows + (int64_t{1} << (level - 1)) - 2 + node / 2)];
        const int64_t left = parent[1] / 2;
        int64_t* child = &nodes[2 * (i * rows + row)];
        child[0] = node % 2 ? parent[0] + left : parent[0];
        child[1] = node % 2 ? parent[1] - left : left;
        // a node's last token is its last leaf's
        const int64_t leaf = ((node + 1) << (levels - level)) - 1;
        std::memcpy(to + (i * rows + row) * bytes, from + (i * leaves + leaf) * bytes, bytes);
      }
    }
  }
  const Tensor out = attend_all(queries, dense_heads(k), dense_heads(v), nodes.data(), cos, sin, scale);
  return torch::stable::reshape(out, {n, rows, q.size(2), q.size(3)});
}

STABLE_TORCH_LIBRARY_IMPL(sharedllm, CPU, m) {
  m.impl("node_vectors", TORCH_BOX(&node_vectors));
  m.impl("tree_node_vectors", TORCH_BOX(&tree_node_vectors));
}

}  // namespace
}  // namespace sharedllm::nodes

// Injected attention on the CPU: argument checks, allocation, and the choice of the kernel's instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/checks.h"
#include "common/simd.h"
#include "common/tasks.h"
#include "injected_attention_kernel.h"
#include "injected_attention_rows.h"

namespace sharedllm::injected {

namespace generic {
using S = Generic;
#include "common/product.inl"
#include "injected_attention_kernel.inl"
}  // namespace generic

#if defined(__x86_64__)
SHAREDLLM_BEGIN_TARGET(SHAREDLLM_AVX2)
namespace avx2 {
using S = Avx2;
#include "common/product.inl"
#include "injected_attention_kernel.inl"
}  // namespace avx2
SHAREDLLM_END_TARGET

SHAREDLLM_BEGIN_TARGET(SHAREDLLM_AVX512)
namespace avx512 {
using S = Avx512;
#include "common/product.inl"
#include "injected_attention_kernel.inl"
}  // namespace avx512
SHAREDLLM_END_TARGET

SHAREDLLM_BEGIN_TARGET(SHAREDLLM_AVX512_BF16)
namespace avx512_bf16 {
using S = Avx512Bf16;
#include "common/product.inl"
#include "injected_attention_kernel.inl"
}  // namespace avx512_bf16
SHAREDLLM_END_TARGET
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
void run(const Forward& p) {
  switch (fastest_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Bf16:
      return avx512_bf16::forward<T>(p);
    case Isa::kAvx512:
      return avx512::forward<T>(p);
    case Isa::kAvx2:
      return avx2::forward<T>(p);
#endif
    default:
      return generic::forward<T>(p);
  }
}

template <class T>
void run(const Backward& p) {
  switch (fastest_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Bf16:
      return avx512_bf16::backward<T>(p);
    case Isa::kAvx512:
      return avx512::backward<T>(p);
    case Isa::kAvx2:
      return avx2::backward<T>(p);
#endif
    default:
      return generic::backward<T>(p);
  }
}

View view(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }

// The arguments that both passes share, made dense and kept alive.
struct Arguments {
  Tensor q, k, v, cu_q, slot_range, q_position, cos, sin;
  MergedRows merged = {};

  Problem check_and_describe(double scale) {
    check(q.is_cpu(), "q: expected a tensor on cpu, got one on another kind of device");
    check_float32_or_bfloat16("q", q);
    check_shape("q", q, {-1, -1, -1});
    const ScalarType dtype = q.scalar_type();
    check_tensor("k", k, {-1, -1, q.size(2)}, dtype);
    check_tensor("v", v, {k.size(0), k.size(1), k.size(2)}, dtype);
    check(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "q: expected a number of heads divisible by k's ", k.size(1),
          ", got ", q.size(1));
    check_tensor("q_position", q_position, {-1}, ScalarType::Long);
    const int64_t rows = q_position.size(0);
    check_tensor("cu_q", cu_q, {rows + 1}, ScalarType::Long);
    check_tensor("slot_range", slot_range, {rows, 2}, ScalarType::Long);
    check_tensor("cos", cos, {-1, -1}, ScalarType::Float);
    check_tensor("sin", sin, {cos.size(0), cos.size(1)}, ScalarType::Float);
    check_rotary_columns(cos.size(1), q.size(2));
    check_scale(scale);
    for (Tensor* x : {&q, &k, &v}) *x = dense_heads(*x);
    for (Tensor* x : {&cu_q, &slot_range, &q_position, &cos, &sin}) *x = dense(*x);

    Problem p;
    p.q = view(q);
    p.k = view(k);
    p.v = view(v);
    p.cos = cos.const_data_ptr<float>();
    p.sin = sin.const_data_ptr<float>();
    p.half = cos.size(1);
    p.queries = q.size(0);
    p.slots = k.size(0);
    p.q_heads = q.size(1);
    p.kv_heads = k.size(1);
    p.groups = p.q_heads / p.kv_heads;
    p.size = q.size(2);
    p.scale = static_cast<float>(scale);
    const auto* const bounds = cu_q.const_data_ptr<int64_t>();
    const auto* const ranges = slot_range.const_data_ptr<int64_t>();
    const auto* const positions = q_position.const_data_ptr<int64_t>();
    check_cumulative("cu_q", bounds, rows + 1, p.queries);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t begin = ranges[2 * row], end = ranges[2 * row + 1];
      check(0 <= begin && begin <= end && end <= p.slots, "slot_range[", row,
            "]: expected 0 <= begin <= end <= ", p.slots, ", got (", begin, ", ", end, ")");
    }
    check_range("q_position", positions, rows, 0, cos.size(0));
    merged = MergedRows(bounds, ranges, positions, rows);
    p.cu_q = merged.cu_q();
    p.slot_range = merged.slot_range();
    p.run = merged.run();
    p.runs = merged.runs();
    p.rows = merged.rows();
    return p;
  }
};

std::tuple<Tensor, Tensor> injected_attention(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor slot_range,
                                              Tensor q_position, Tensor cos, Tensor sin, double scale) {
  Arguments arguments{q, k, v, cu_q, slot_range, q_position, cos, sin};
  Forward p{arguments.check_and_describe(scale), nullptr, nullptr};
  Tensor out = allocate(q, {p.queries, p.q_heads, p.size});
  Tensor lse = allocate(q, {p.queries, p.q_heads}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  if (q.scalar_type() == ScalarType::Float) {
    run<float>(p);
  } else {
    run<bf16>(p);
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> injected_attention_backward(Tensor grad_out, std::optional<Tensor> grad_lse,
                                                               Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                                               Tensor cu_q, Tensor slot_range, Tensor q_position,
                                                               Tensor cos, Tensor sin, double scale,
                                                               bool need_grad_kv) {
  Arguments arguments{q, k, v, cu_q, slot_range, q_position, cos, sin};
  Backward p{arguments.check_and_describe(scale), {}, {}, nullptr, nullptr, nullptr, nullptr, nullptr};
  const ScalarType dtype = q.scalar_type();
  check_tensor("grad_out", grad_out, {p.queries, p.q_heads, p.size}, dtype);
  check_tensor("out", out, {p.queries, p.q_heads, p.size}, dtype);
  check_tensor("lse", lse, {p.queries, p.q_heads}, ScalarType::Float);
  grad_out = dense_heads(grad_out);
  out = dense_heads(out);
  lse = dense(lse);
  p.grad_out = view(grad_out);
  p.out = view(out);
  p.lse = lse.const_data_ptr<float>();
  if (grad_lse) {
    check_tensor("grad_lse", *grad_lse, {p.queries, p.q_heads}, ScalarType::Float);
    grad_lse = dense(*grad_lse);
    p.grad_lse = grad_lse->const_data_ptr<float>();
  }
  Tensor grad_q = allocate(q, {p.queries, p.q_heads, p.size});
  p.grad_q = grad_q.mutable_data_ptr();
  Tensor grad_k, grad_v;
  if (need_grad_kv) {
    grad_k = allocate(k, {p.slots, p.kv_heads, p.size});
    grad_v = allocate(k, {p.slots, p.kv_heads, p.size});
    p.grad_k = grad_k.mutable_data_ptr();
    p.grad_v = grad_v.mutable_data_ptr();
  } else {
    grad_k = allocate(k, {0});
    grad_v = allocate(k, {0});
  }
  if (dtype == ScalarType::Float) {
    run<float>(p);
  } else {
    run<bf16>(p);
  }
  return {grad_q, grad_k, grad_v};
}

STABLE_TORCH_LIBRARY_IMPL(sharedllm, CPU, m) {
  m.impl("injected_attention", TORCH_BOX(&injected_attention));
  m.impl("injected_attention_backward", TORCH_BOX(&injected_attention_backward));
}

}  // namespace
}  // namespace sharedllm::injected

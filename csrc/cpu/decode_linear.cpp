// Fused linear for a few rows on the CPU: argument checks, allocation, and the choice of the kernel's instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/simd.h"
#include "common/tasks.h"
#include "decode_linear_kernel.h"

namespace sharedllm::linear {

namespace generic {
using S = Generic;
#include "decode_linear_kernel.inl"
}  // namespace generic

#if defined(__x86_64__)
SHAREDLLM_BEGIN_TARGET(SHAREDLLM_AVX2)
namespace avx2 {
using S = Avx2;
#include "decode_linear_kernel.inl"
}  // namespace avx2
SHAREDLLM_END_TARGET

SHAREDLLM_BEGIN_TARGET(SHAREDLLM_AVX512)
namespace avx512 {
using S = Avx512;
#include "decode_linear_kernel.inl"
}  // namespace avx512
SHAREDLLM_END_TARGET
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
void run(const Linear& p) {
  switch (fastest_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return avx512::run<T>(p);
    case Isa::kAvx2:
      return avx2::run<T>(p);
#endif
    default:
      return generic::run<T>(p);
  }
}

// Names as in sharedllm_ext.ops.decode_linear.
const char* const kWeights[] = {"weights[0]", "weights[1]", "weights[2]"};
const char* const kBiases[] = {"biases[0]", "biases[1]", "biases[2]"};

Tensor decode_linear(Tensor x, Tensor weight, std::optional<Tensor> weight2, std::optional<Tensor> weight3,
                     std::optional<Tensor> bias, std::optional<Tensor> bias2, std::optional<Tensor> bias3,
                     std::optional<Tensor> norm_weight, double eps, std::optional<Tensor> residual, bool gated,
                     bool overlap, std::optional<Tensor> prefetch, int64_t prefetch_bytes) {
  // these two are for a device's caches
  static_cast<void>(overlap);
  static_cast<void>(prefetch_bytes);
  static_cast<void>(prefetch);
  check(x.is_cpu(), "x: expected a tensor on cpu, got one on another kind of device");
  check_float32_or_bfloat16("x", x);
  check_shape("x", x, {-1, -1});
  const ScalarType dtype = x.scalar_type();
  check(weight2 || !weight3, "weight3: expected none without weight2, got one");
  check(weight2 || !bias2, "bias2: expected none without weight2, got one");
  check(weight3 || !bias3, "bias3: expected none without weight3, got one");
  check_eps(eps);

  x = dense(x);
  std::vector<Tensor> weights = {weight};
  std::vector<std::optional<Tensor>> biases = {bias};
  if (weight2) {
    weights.push_back(*weight2);
    biases.push_back(bias2);
  }
  if (weight3) {
    weights.push_back(*weight3);
    biases.push_back(bias3);
  }
  Linear p{};
  p.rows = x.size(0);
  p.size = x.size(1);
  for (size_t i = 0; i < weights.size(); ++i) {
    check_tensor(kWeights[i], weights[i], {-1, p.size}, dtype);
    weights[i] = dense(weights[i]);
    const int64_t rows = weights[i].size(0);
    if (biases[i]) {
      check_tensor(kBiases[i], *biases[i], {rows}, dtype);
      biases[i] = dense(*biases[i]);
    }
    p.matrices.push_back(
        {weights[i].const_data_ptr(), biases[i] ? biases[i]->const_data_ptr() : nullptr, rows, p.columns});
    p.columns += rows;
  }
  p.gated = gated;
  if (gated) {
    check(weights.size() == 2, "weights: expected 2 matrices with gated, got ", weights.size());
    check_tensor("weights[1]", weights[1], {weights[0].size(0), p.size}, dtype);
    check(!residual, "residual: expected None with gated, got a tensor");
    p.columns = weights[0].size(0);
  }
  if (norm_weight) {
    check_tensor("norm_weight", *norm_weight, {p.size}, dtype);
    norm_weight = dense(*norm_weight);
    p.norm = norm_weight->const_data_ptr();
  }
  p.eps = static_cast<float>(eps);
  if (residual) {
    check_tensor("residual", *residual, {p.rows, p.columns}, dtype);
    residual = dense(*residual);
    p.residual = residual->const_data_ptr();
  }
  p.x = x.const_data_ptr();
  Tensor out = allocate(x, {p.rows, p.columns});
  p.out = out.mutable_data_ptr();
  if (p.rows == 0 || p.columns == 0) return out;
  if (dtype == ScalarType::Float) {
    run<float>(p);
  } else {
    run<bf16>(p);
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(sharedllm, CPU, m) { m.impl("decode_linear", TORCH_BOX(&decode_linear)); }

}  // namespace
}  // namespace sharedllm::linear

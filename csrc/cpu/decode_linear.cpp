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

template <class T, class W>
void run(const Linear& p) {
  switch (fastest_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return avx512::run<T, W>(p);
    case Isa::kAvx2:
      return avx2::run<T, W>(p);
#endif
    default:
      return generic::run<T, W>(p);
  }
}

// Names as in sharedllm_ext.ops.decode_linear.
const char* const kWeights[] = {"weights[0]", "weights[1]", "weights[2]"};
const char* const kCodes[] = {"codes[0]", "codes[1]", "codes[2]"};
const char* const kScales[] = {"scales[0]", "scales[1]", "scales[2]"};
const char* const kBiases[] = {"biases[0]", "biases[1]", "biases[2]"};

// What the calls of both operators hold; with scales the weights are codes of 8 bits.
struct Arguments {
  Tensor x, weight;
  std::optional<Tensor> weight2, weight3, scale, scale2, scale3, bias, bias2, bias3, norm_weight;
  double eps;
  std::optional<Tensor> residual;
  bool gated;
};

Tensor compute(const Arguments& given) {
  Tensor x = given.x;
  const auto& [_, weight, weight2, weight3, scale, scale2, scale3, bias, bias2, bias3, norm, eps, added, gated] = given;
  std::optional<Tensor> norm_weight = norm, residual = added;
  const bool coded = scale.has_value();
  check(x.is_cpu(), "x: expected a tensor on cpu, got one on another kind of device");
  check_float32_or_bfloat16("x", x);
  check_shape("x", x, {-1, -1});
  const ScalarType dtype = x.scalar_type();
  check(weight2 || !weight3, "weight3: expected none without weight2, got one");
  check(weight2 || !bias2, "bias2: expected none without weight2, got one");
  check(weight3 || !bias3, "bias3: expected none without weight3, got one");
  check(weight2 || !scale2, "scale2: expected none without weight2, got one");
  check(weight3 || !scale3, "scale3: expected none without weight3, got one");
  check_eps(eps);

  x = dense(x);
  std::vector<Tensor> weights = {weight};
  std::vector<std::optional<Tensor>> scales = {scale}, biases = {bias};
  if (weight2) {
    weights.push_back(*weight2);
    scales.push_back(scale2);
    biases.push_back(bias2);
  }
  if (weight3) {
    weights.push_back(*weight3);
    scales.push_back(scale3);
    biases.push_back(bias3);
  }
  const char* const* const names = coded ? kCodes : kWeights;
  const ScalarType weight_dtype = coded ? ScalarType::Float8_e4m3fn : dtype;
  Linear p{};
  p.rows = x.size(0);
  p.size = x.size(1);
  for (size_t i = 0; i < weights.size(); ++i) {
    check_tensor(names[i], weights[i], {-1, p.size}, weight_dtype);
    weights[i] = dense(weights[i]);
    const int64_t rows = weights[i].size(0);
    if (coded) {
      check(scales[i].has_value(), kScales[i], ": expected one with ", names[i], ", got none");
      check_tensor(kScales[i], *scales[i], {rows, 1}, ScalarType::Float);
      scales[i] = dense(*scales[i]);
    }
    if (biases[i]) {
      check_tensor(kBiases[i], *biases[i], {rows}, dtype);
      biases[i] = dense(*biases[i]);
    }
    p.matrices.push_back({weights[i].const_data_ptr(), coded ? scales[i]->const_data_ptr<float>() : nullptr,
                          biases[i] ? biases[i]->const_data_ptr() : nullptr, rows, p.columns});
    p.columns += rows;
  }
  p.gated = gated;
  if (gated) {
    check(weights.size() == 2, coded ? "codes" : "weights", ": expected 2 matrices with gated, got ", weights.size());
    check_tensor(names[1], weights[1], {weights[0].size(0), p.size}, weight_dtype);
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
    coded ? run<float, e4m3>(p) : run<float, float>(p);
  } else {
    coded ? run<bf16, e4m3>(p) : run<bf16, bf16>(p);
  }
  return out;
}

// The last three arguments of both operators are for a device's caches.
Tensor decode_linear(Tensor x, Tensor weight, std::optional<Tensor> weight2, std::optional<Tensor> weight3,
                     std::optional<Tensor> bias, std::optional<Tensor> bias2, std::optional<Tensor> bias3,
                     std::optional<Tensor> norm_weight, double eps, std::optional<Tensor> residual, bool gated, bool,
                     std::optional<Tensor>, int64_t) {
  return compute({x, weight, weight2, weight3, std::nullopt, std::nullopt, std::nullopt, bias, bias2, bias3,
                  norm_weight, eps, residual, gated});
}

Tensor decode_linear_fp8(Tensor x, Tensor weight, std::optional<Tensor> weight2, std::optional<Tensor> weight3,
                         Tensor scale, std::optional<Tensor> scale2, std::optional<Tensor> scale3,
                         std::optional<Tensor> bias, std::optional<Tensor> bias2, std::optional<Tensor> bias3,
                         std::optional<Tensor> norm_weight, double eps, std::optional<Tensor> residual, bool gated,
                         bool, std::optional<Tensor>, int64_t) {
  return compute(
      {x, weight, weight2, weight3, scale, scale2, scale3, bias, bias2, bias3, norm_weight, eps, residual, gated});
}

STABLE_TORCH_LIBRARY_IMPL(sharedllm, CPU, m) {
  m.impl("decode_linear", TORCH_BOX(&decode_linear));
  m.impl("decode_linear_fp8", TORCH_BOX(&decode_linear_fp8));
}

}  // namespace
}  // namespace sharedllm::linear

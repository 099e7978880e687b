// Fused linear for a few rows on CUDA: checks, allocation and launch. No value is read from the device.
#include "kernels/decode_linear.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "ops/common/cuda_checks.h"
#include "ops/common/prefetch.h"

namespace sharedllm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One, two or three of a kind, the first ones that are given.
using Several = std::optional<Tensor>[kDecodeLinearMatrices];

// With scales the weights are codes of 8 bits.
Tensor run(Tensor x, Several& weights, const Several* scales, Several& biases, std::optional<Tensor> norm_weight,
           double eps, std::optional<Tensor> residual, bool gated, bool overlap, std::optional<Tensor> prefetch,
           int64_t prefetch_bytes) {
  check(x.is_cuda(), "x: expected a tensor on cuda, got one on another kind of device");
  const int32_t device = x.get_device_index();
  const ScalarType dtype = x.scalar_type();
  DecodeLinearParams p{};
  p.type = float_type("x", x);
  check_shape("x", x, {-1, -1});
  p.rows = x.size(0);
  p.inner = x.size(1);
  check_eps(eps);
  const torch::stable::accelerator::DeviceGuard guard(device);
  x = with_dense_rows(x);

  const char* const names[kDecodeLinearMatrices] = {"weight", "weight2", "weight3"};
  const char* const scale_names[kDecodeLinearMatrices] = {"scale", "scale2", "scale3"};
  const char* const bias_names[kDecodeLinearMatrices] = {"bias", "bias2", "bias3"};
  check(scales == nullptr || p.type != FloatType::kFloat32, "x: expected dtype BFloat16 or Half, got Float");
  std::optional<Tensor> dense_scales[kDecodeLinearMatrices];
  bool copied = false;
  for (int i = 0; i < kDecodeLinearMatrices; ++i) {
    if (!weights[i]) {
      check(!biases[i], bias_names[i], ": expected none without ", names[i], ", got one");
      check(scales == nullptr || !(*scales)[i], scale_names[i], ": expected none without ", names[i], ", got one");
      continue;
    }
    check_cuda_tensor(names[i], *weights[i], {-1, p.inner}, scales == nullptr ? dtype : ScalarType::Float8_e4m3fn,
                      device);
    const void* const given = weights[i]->const_data_ptr();
    weights[i] = with_dense_rows(*weights[i]);
    p.weight[i] = weights[i]->const_data_ptr();
    copied |= p.weight[i] != given;
    p.weight_stride[i] = weights[i]->size(0) > 1 ? weights[i]->stride(0) : p.inner;
    p.outputs[i] = weights[i]->size(0);
    check(p.outputs[i] <= INT64_MAX - p.num_outputs, names[i], ": expected at most ", INT64_MAX - p.num_outputs,
          " rows, got ", p.outputs[i]);
    p.num_outputs += p.outputs[i];
    if (scales != nullptr) {
      check((*scales)[i].has_value(), scale_names[i], ": expected one with ", names[i], ", got none");
      check_cuda_tensor(scale_names[i], *(*scales)[i], {p.outputs[i], 1}, ScalarType::Float, device);
      dense_scales[i] = dense(*(*scales)[i]);
      p.scale[i] = dense_scales[i]->const_data_ptr<float>();
    }
    if (biases[i]) {
      check_cuda_tensor(bias_names[i], *biases[i], {p.outputs[i]}, dtype, device);
      biases[i] = dense(*biases[i]);
      p.bias[i] = biases[i]->const_data_ptr();
    }
  }
  check(!weights[2] || weights[1], "weight3: expected none without weight2, got one");
  if (gated) {
    check(weights[1] && !weights[2], "weight2: expected exactly two matrices with gated, got ", 1 + !!weights[2] * 2);
    check(p.outputs[0] == p.outputs[1], "weight2: expected ", p.outputs[0], " rows as weight, got ", p.outputs[1]);
    check(!residual, "residual: expected none with gated, got one");
    p.num_outputs = p.outputs[0];
  }
  if (norm_weight) {
    check_cuda_tensor("norm_weight", *norm_weight, {p.inner}, dtype, device);
    const void* const given = norm_weight->const_data_ptr();
    norm_weight = dense(*norm_weight);
    p.norm_weight = norm_weight->const_data_ptr();
    copied |= p.norm_weight != given;
  }
  if (residual) {
    check_cuda_tensor("residual", *residual, {p.rows, p.num_outputs}, dtype, device);
    residual = with_dense_rows(*residual);
    p.residual = residual->const_data_ptr();
    p.residual_stride = p.rows > 1 ? residual->stride(0) : p.num_outputs;
  }
  Tensor out = allocate(x, {p.rows, p.num_outputs});
  p.x = x.const_data_ptr();
  p.x_stride = p.rows > 1 ? x.stride(0) : p.inner;
  p.out = out.mutable_data_ptr();
  p.eps = static_cast<float>(eps);
  p.gated = gated;
  // what the kernel reads before it waits must not be a copy made by the previous kernel
  p.overlap = overlap && !copied;
  describe_prefetch(prefetch, prefetch_bytes, &p.prefetch, &p.prefetch_bytes);
  const auto launch = scales == nullptr ? &launch_decode_linear : &launch_decode_linear_fp8;
  const cudaError_t status = launch(p, current_stream(device));
  check(status != cudaErrorInvalidValue, "x: expected rows that fit into shared memory, got ", p.inner, " elements");
  check_launch(scales == nullptr ? "decode_linear" : "decode_linear_fp8", status);
  return out;
}

Tensor decode_linear(Tensor x, Tensor weight, std::optional<Tensor> weight2, std::optional<Tensor> weight3,
                     std::optional<Tensor> bias, std::optional<Tensor> bias2, std::optional<Tensor> bias3,
                     std::optional<Tensor> norm_weight, double eps, std::optional<Tensor> residual, bool gated,
                     bool overlap, std::optional<Tensor> prefetch, int64_t prefetch_bytes) {
  Several weights = {weight, weight2, weight3}, biases = {bias, bias2, bias3};
  return run(x, weights, nullptr, biases, norm_weight, eps, residual, gated, overlap, prefetch, prefetch_bytes);
}

Tensor decode_linear_fp8(Tensor x, Tensor weight, std::optional<Tensor> weight2, std::optional<Tensor> weight3,
                         Tensor scale, std::optional<Tensor> scale2, std::optional<Tensor> scale3,
                         std::optional<Tensor> bias, std::optional<Tensor> bias2, std::optional<Tensor> bias3,
                         std::optional<Tensor> norm_weight, double eps, std::optional<Tensor> residual, bool gated,
                         bool overlap, std::optional<Tensor> prefetch, int64_t prefetch_bytes) {
  Several weights = {weight, weight2, weight3}, biases = {bias, bias2, bias3};
  const Several scales = {scale, scale2, scale3};
  return run(x, weights, &scales, biases, norm_weight, eps, residual, gated, overlap, prefetch, prefetch_bytes);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sharedllm, CUDA, m) {
  m.impl("decode_linear", TORCH_BOX(&decode_linear));
  m.impl("decode_linear_fp8", TORCH_BOX(&decode_linear_fp8));
}

}  // namespace sharedllm

// Norms, gated activation and rows of 8-bit floating point on CUDA: checks, allocation and launch.
#include "kernels/fused_layer.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "ops/common/cuda_checks.h"

namespace sharedllm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Results of a call: sum and scale are absent in most.
struct Results {
  std::optional<Tensor> sum;
  Tensor out;
  std::optional<Tensor> scale;
};

struct Names {
  const char* call;
  const char* x;
  const char* y;
};

Results run(const Names& names, RowFunction function, bool codes, Tensor x, std::optional<Tensor> y,
            std::optional<Tensor> weight, double eps) {
  check(x.is_cuda(), names.x, ": expected a tensor on cuda, got one on another kind of device");
  const int32_t device = x.get_device_index();
  FusedLayerParams p{};
  p.type = float_type(names.x, x);
  check_shape(names.x, x, {-1, -1});
  p.rows = x.size(0);
  p.width = x.size(1);
  if (y) check_cuda_tensor(names.y, *y, {p.rows, p.width}, x.scalar_type(), device);
  if (weight) check_cuda_tensor("weight", *weight, {p.width}, x.scalar_type(), device);
  check_eps(eps);

  const torch::stable::accelerator::DeviceGuard guard(device);
  x = with_dense_rows(x);
  p.x = x.const_data_ptr();
  p.x_stride = p.rows > 1 ? x.stride(0) : p.width;
  if (y) {
    y = with_dense_rows(*y);
    p.y = y->const_data_ptr();
    p.y_stride = p.rows > 1 ? y->stride(0) : p.width;
  }
  if (weight) {
    weight = dense(*weight);
    p.weight = weight->const_data_ptr();
  }
  Results results{std::nullopt, allocate(x, {p.rows, p.width}, codes ? ScalarType::Float8_e4m3fn : x.scalar_type()),
                  std::nullopt};
  p.out = results.out.mutable_data_ptr();
  if (function == RowFunction::kRmsNorm && y) {
    results.sum = allocate(x, {p.rows, p.width});
    p.sum = results.sum->mutable_data_ptr();
  }
  if (codes) {
    results.scale = allocate(x, {p.rows, 1}, ScalarType::Float);
    p.scale = results.scale->mutable_data_ptr<float>();
  }
  p.eps = static_cast<float>(eps);
  // nothing to write, and perhaps no addresses
  if (p.rows > 0 && (codes || p.width > 0)) {
    check_launch(names.call, launch_fused_layer(function, p, current_stream(device)));
  }
  return results;
}

Tensor silu_product(Tensor gate, Tensor up) {
  return run({"silu_product", "gate", "up"}, RowFunction::kSiluProduct, false, gate, up, std::nullopt, 0.0).out;
}

std::tuple<Tensor, Tensor> silu_product_fp8(Tensor gate, Tensor up) {
  const Results results =
      run({"silu_product_fp8", "gate", "up"}, RowFunction::kSiluProduct, true, gate, up, std::nullopt, 0.0);
  return {results.out, *results.scale};
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  return run({"rms_norm", "x", nullptr}, RowFunction::kRmsNorm, false, x, std::nullopt, weight, eps).out;
}

std::tuple<Tensor, Tensor> rms_norm_fp8(Tensor x, Tensor weight, double eps) {
  const Results results =
      run({"rms_norm_fp8", "x", nullptr}, RowFunction::kRmsNorm, true, x, std::nullopt, weight, eps);
  return {results.out, *results.scale};
}

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps) {
  const Results results =
      run({"add_rms_norm", "x", "residual"}, RowFunction::kRmsNorm, false, x, residual, weight, eps);
  return {*results.sum, results.out};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_fp8(Tensor x, Tensor residual, Tensor weight, double eps) {
  const Results results =
      run({"add_rms_norm_fp8", "x", "residual"}, RowFunction::kRmsNorm, true, x, residual, weight, eps);
  return {*results.sum, results.out, *results.scale};
}

std::tuple<Tensor, Tensor> quantize_rows_fp8(Tensor x) {
  const Results results =
      run({"quantize_rows_fp8", "x", nullptr}, RowFunction::kCopy, true, x, std::nullopt, std::nullopt, 0.0);
  return {results.out, *results.scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sharedllm, CUDA, m) {
  m.impl("silu_product", TORCH_BOX(&silu_product));
  m.impl("silu_product_fp8", TORCH_BOX(&silu_product_fp8));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_fp8", TORCH_BOX(&rms_norm_fp8));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm_fp8", TORCH_BOX(&add_rms_norm_fp8));
  m.impl("quantize_rows_fp8", TORCH_BOX(&quantize_rows_fp8));
}

}  // namespace sharedllm

// 8-bit memory on CUDA: checks, allocation and launch.
#include "kernels/memory_quantization.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "kernels/injected_attention/generic/forward.h"
#include "ops/common/cuda_checks.h"

namespace sharedllm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> quantize_memory(Tensor x) {
  check(x.is_cuda(), "x: expected a tensor on cuda, got one on another kind of device");
  MemoryQuantizationParams p{};
  p.type = float_type("x", x);
  check_shape("x", x, {-1, -1, -1});
  check(x.size(2) % 8 == 0 && x.size(2) <= kGenericMaxHeadSize,
        "x: expected a head size that is a multiple of 8 and at most ", kGenericMaxHeadSize, " (on CUDA), got ",
        x.size(2));
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  x = with_aligned_rows(x);
  Tensor codes = allocate(x, {x.size(0), x.size(1), x.size(2)}, ScalarType::Char);
  Tensor scale = allocate(x, {x.size(0), x.size(1)}, ScalarType::Float);
  p.input = x.const_data_ptr();
  p.codes = codes.mutable_data_ptr<int8_t>();
  p.scale = scale.mutable_data_ptr<float>();
  head_strides(x, p.stride);
  p.scale_stride[0] = x.size(1);
  p.scale_stride[1] = 1;
  p.num_slots = x.size(0);
  p.heads = narrow_size("x", x.size(1));
  p.head_size = static_cast<int32_t>(x.size(2));
  if (p.num_slots > 0 && p.heads > 0) {
    check_launch("quantize_memory", launch_quantize_memory(p, current_stream(device)));
  }
  return {codes, scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sharedllm, CUDA, m) { m.impl("quantize_memory", TORCH_BOX(&quantize_memory)); }

}  // namespace sharedllm

// Checks and conversions of the CUDA host operators: every failure names the tensor, what was expected and what came.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>

#include "common/checks.h"
#include "kernels/common/float_type.h"

namespace sharedllm {

inline void check_cuda_tensor(const char* name, const torch::stable::Tensor& tensor,
                              std::initializer_list<int64_t> shape, torch::headeronly::ScalarType dtype,
                              int32_t device) {
  check(tensor.is_cuda(), name, ": expected a tensor on cuda:", device, ", got one on another kind of device");
  check(tensor.get_device_index() == device, name, ": expected device cuda:", device,
        ", got cuda:", tensor.get_device_index());
  check(tensor.scalar_type() == dtype, name, ": expected dtype ", dtype_text(dtype), ", got ",
        dtype_text(tensor.scalar_type()));
  check_shape(name, tensor, shape);
}

// Kernels count heads and their elements in 32 bits.
inline int32_t narrow_size(const char* name, int64_t size) {
  check(size <= INT32_MAX, name, ": expected sizes of at most ", INT32_MAX, ", got ", size);
  return static_cast<int32_t>(size);
}

// The tensor itself if the elements of a row are contiguous, else a copy.
inline torch::stable::Tensor with_dense_rows(const torch::stable::Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return (tensor.size(last) <= 1 || tensor.stride(last) == 1) && is_aligned(tensor) ? tensor
                                                                                    : sharedllm::contiguous(tensor);
}

// The tensor itself if its rows are dense and 16-byte aligned at every index, else a copy (rows of whole 16-byte
// units).
inline torch::stable::Tensor with_aligned_rows(const torch::stable::Tensor& tensor) {
  const int64_t last = tensor.dim() - 1, unit = 16 / static_cast<int64_t>(tensor.element_size());
  const auto aligned_base = [](const torch::stable::Tensor& x) {
    return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  };
  bool aligned = aligned_base(tensor) && (tensor.size(last) == 1 || tensor.stride(last) == 1);
  for (int64_t i = 0; i < last; ++i) {
    // TMA takes no stride of 0 (a broadcast tensor)
    aligned = aligned && (tensor.size(i) <= 1 || (tensor.stride(i) > 0 && tensor.stride(i) % unit == 0));
  }
  if (aligned) return tensor;
  const torch::stable::Tensor dense = sharedllm::contiguous(tensor);
  // which may still be the tensor itself, at an unaligned address
  if (aligned_base(dense)) return dense;
  return make_tensor(dense.sizes(), dense.scalar_type(), [&] { return torch::stable::clone(dense); });
}

inline FloatType float_type(const char* name, const torch::stable::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return FloatType::kFloat32;
    case torch::headeronly::ScalarType::BFloat16:
      return FloatType::kBFloat16;
    case torch::headeronly::ScalarType::Half:
      return FloatType::kFloat16;
    default:
      fail(name, ": expected dtype Float, BFloat16 or Half, got ", dtype_text(tensor.scalar_type()));
  }
}

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* name, cudaError_t status) {
  if (status == cudaSuccess) return;
  std::ostringstream text;
  text << name << ": expected the CUDA kernels to start, got " << cudaGetErrorName(status) << ": "
       << cudaGetErrorString(status);
  throw std::runtime_error(text.str());
}

// Strides of [slots, heads, columns] between slots and between heads. The stride of a dimension of one element says
// nothing: that of a dense tensor is always valid.
inline void head_strides(const torch::stable::Tensor& x, int64_t (&strides)[2]) {
  strides[1] = x.size(1) > 1 ? x.stride(1) : x.size(2);
  strides[0] = x.size(0) > 1 ? x.stride(0) : x.size(1) * x.size(2);
}

}  // namespace sharedllm

#include <cuda_runtime.h>

#include "kernels/common/tensor_map.h"

namespace sharedllm {
namespace {

using EncodeFunction = decltype(&cuTensorMapEncodeTiled);

// Looked up at run time: the library must load on machines without a driver, so it cannot link against libcuda.
EncodeFunction find_encode_function() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
  if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<EncodeFunction>(function);
}

}  // namespace

cudaError_t encode_tensor_map(CUtensorMap* map, FloatType type, const void* base, int rank, const int64_t* sizes,
                              const int64_t* strides, const int32_t* box) {
  static const EncodeFunction encode = find_encode_function();
  if (encode == nullptr) return cudaErrorNotSupported;
  if (rank < 3 || rank > 4) return cudaErrorInvalidValue;
  const int element_bytes = type == FloatType::kFloat32 ? 4 : 2;
  cuuint64_t size[4], stride_bytes[3];
  cuuint32_t box_size[4], element_stride[4];
  for (int i = 0; i < rank; ++i) {
    size[i] = sizes[i] > 0 ? sizes[i] : 1;
    box_size[i] = box[i];
    element_stride[i] = 1;
  }
  for (int i = 1; i < rank; ++i) {
    // torch leaves the stride of a dimension of size 1 undefined, and the driver wants a valid one
    const int64_t stride = size[i] > 1 ? strides[i - 1] : 8;
    stride_bytes[i - 1] = static_cast<cuuint64_t>(stride * element_bytes);
  }
  const CUtensorMapDataType element = type == FloatType::kFloat32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                      : type == FloatType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                     : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = encode(map, element, rank, const_cast<void*>(base), size, stride_bytes, box_size,
                                 element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace sharedllm

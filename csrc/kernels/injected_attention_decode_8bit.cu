// Injected attention from an 8-bit memory: choice of the instance.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/injected_attention_decode_8bit.h"

namespace sharedllm {
namespace {

template <class T, int kHeadSize>
cudaError_t launch(const InjectedAttention8BitParams& p, cudaStream_t stream) {
  int device = 0, major = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  if (major >= 9) {
    status = launch_injected_attention_decode_8bit_bulk<T, kHeadSize>(p, stream);
    if (status != cudaErrorNotSupported) return status;
  }
  return launch_injected_attention_decode_8bit_portable<T, kHeadSize>(p, stream);
}

template <class T>
cudaError_t launch(const InjectedAttention8BitParams& p, cudaStream_t stream) {
  switch (p.attention.head_size) {
    case 64:
      return launch<T, 64>(p, stream);
    case 96:
      return launch<T, 96>(p, stream);
    case 128:
      return launch<T, 128>(p, stream);
    case 256:
      return launch<T, 256>(p, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace

cudaError_t launch_injected_attention_decode_8bit(const InjectedAttention8BitParams& p, cudaStream_t stream) {
  if (p.attention.num_queries == 0 || p.attention.num_rows == 0) return cudaSuccess;
  switch (p.attention.type) {
    case FloatType::kBFloat16:
      return launch<__nv_bfloat16>(p, stream);
    case FloatType::kFloat16:
      return launch<__half>(p, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace sharedllm

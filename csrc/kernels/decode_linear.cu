// Matrix products of a few rows: choice of the instance.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/decode_linear.h"

namespace sharedllm {

template <>
cudaError_t launch_decode_linear_of<float>(const DecodeLinearParams& params, cudaStream_t stream);
template <>
cudaError_t launch_decode_linear_of<__nv_bfloat16>(const DecodeLinearParams& params, cudaStream_t stream);
template <>
cudaError_t launch_decode_linear_of<__half>(const DecodeLinearParams& params, cudaStream_t stream);

cudaError_t launch_decode_linear(const DecodeLinearParams& params, cudaStream_t stream) {
  switch (params.type) {
    case FloatType::kFloat32:
      return launch_decode_linear_of<float>(params, stream);
    case FloatType::kBFloat16:
      return launch_decode_linear_of<__nv_bfloat16>(params, stream);
    case FloatType::kFloat16:
      return launch_decode_linear_of<__half>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace sharedllm

// Fused linear for a few rows: choice of the kernel instance.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/common/with_float_type.h"
#include "kernels/decode_linear.h"

namespace sharedllm {

cudaError_t launch_decode_linear(const DecodeLinearParams& params, cudaStream_t stream) {
  return with_float_type(params.type,
                         [&](auto number) { return launch_decode_linear_of<decltype(number)>(params, stream); });
}

cudaError_t launch_decode_linear_fp8(const DecodeLinearParams& params, cudaStream_t stream) {
  switch (params.type) {
    case FloatType::kBFloat16:
      return launch_decode_linear_fp8_of<__nv_bfloat16>(params, stream);
    case FloatType::kFloat16:
      return launch_decode_linear_fp8_of<__half>(params, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace sharedllm

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

}  // namespace sharedllm

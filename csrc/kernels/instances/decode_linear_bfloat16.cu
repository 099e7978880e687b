#include "kernels/decode_linear.cuh"

namespace sharedllm {

template <>
cudaError_t launch_decode_linear_of<__nv_bfloat16>(const DecodeLinearParams& params, cudaStream_t stream) {
  return decode_linear::launch_all<__nv_bfloat16>(params, stream);
}

}  // namespace sharedllm

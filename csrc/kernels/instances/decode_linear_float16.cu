#include "kernels/decode_linear.cuh"

namespace sharedllm {

template <>
cudaError_t launch_decode_linear_of<__half>(const DecodeLinearParams& params, cudaStream_t stream) {
  return decode_linear::launch_all<__half>(params, stream);
}

}  // namespace sharedllm

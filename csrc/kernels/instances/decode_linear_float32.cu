#include "kernels/decode_linear.cuh"

namespace sharedllm {

template <>
cudaError_t launch_decode_linear_of<float>(const DecodeLinearParams& params, cudaStream_t stream) {
  return decode_linear::launch_all<float>(params, stream);
}

}  // namespace sharedllm

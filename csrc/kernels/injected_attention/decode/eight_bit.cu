// Injected attention from an 8-bit memory: choice of the kernel instance.
#include "kernels/common/instances.h"
#include "kernels/injected_attention/decode/eight_bit.h"

namespace sharedllm {

cudaError_t launch_injected_attention_decode_8bit(const InjectedAttention8BitParams& p, cudaStream_t stream) {
  if (p.attention.num_queries == 0 || p.attention.num_rows == 0) return cudaSuccess;
  int major = 0;
  const cudaError_t status = current_attribute(cudaDevAttrComputeCapabilityMajor, &major);
  if (status != cudaSuccess) return status;
  return with_instance(p.attention.type, p.attention.columns, [&](auto number, auto size) {
    using T = decltype(number);
    cudaError_t launched = cudaErrorNotSupported;
    if (major >= 9) launched = launch_injected_attention_decode_8bit_bulk<T, size()>(p, stream);
    if (launched != cudaErrorNotSupported) return launched;
    return launch_injected_attention_decode_8bit_portable<T, size()>(p, stream);
  });
}

}  // namespace sharedllm

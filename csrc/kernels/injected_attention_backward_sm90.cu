#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/injected_attention_backward_sm90.h"

namespace sharedllm {

// defined in instances/
template <class T, int kHeadSize>
cudaError_t launch_query_gradient(const InjectedAttentionBackwardParams& params, cudaStream_t stream);

namespace {

template <class T>
cudaError_t launch(const InjectedAttentionBackwardParams& params, cudaStream_t stream) {
  if (params.grad_k != nullptr || params.grad_v != nullptr) return cudaErrorNotSupported;
  switch (params.forward.head_size) {
    case 64:
      return launch_query_gradient<T, 64>(params, stream);
    case 96:
      return launch_query_gradient<T, 96>(params, stream);
    case 128:
      return launch_query_gradient<T, 128>(params, stream);
    case 256:
      return launch_query_gradient<T, 256>(params, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace

cudaError_t launch_injected_attention_backward_sm90(const InjectedAttentionBackwardParams& params,
                                                    cudaStream_t stream) {
  if (params.forward.num_queries == 0 || params.forward.num_rows == 0) return cudaSuccess;
  switch (params.forward.type) {
    case FloatType::kBFloat16:
      return launch<__nv_bfloat16>(params, stream);
    case FloatType::kFloat16:
      return launch<__half>(params, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace sharedllm

#include "kernels/injected_attention_backward_sm90.cuh"
#include "kernels/injected_attention_query_gradient_sm90.cuh"

template cudaError_t sharedllm::launch_query_gradient<__half, 96>(const sharedllm::InjectedAttentionBackwardParams&,
                                                                  cudaStream_t);
template cudaError_t sharedllm::launch_backward<__half, 96>(const sharedllm::InjectedAttentionBackwardParams&,
                                                            cudaStream_t);

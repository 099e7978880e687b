#include "kernels/injected_attention_query_gradient_sm90.cuh"

template cudaError_t sharedllm::launch_query_gradient<__half, 256>(const sharedllm::InjectedAttentionBackwardParams&,
                                                                   cudaStream_t);

#include "kernels/injected_attention_sm90.cuh"

template cudaError_t sharedllm::launch_injected_attention_sm90_instance<__half, 256>(
    const sharedllm::InjectedAttentionSm90Params&, cudaStream_t);

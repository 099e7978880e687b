#include "kernels/injected_attention_backward_portable.cuh"

template cudaError_t sharedllm::launch_injected_attention_backward_portable_instance<__half, 64>(
    const InjectedAttentionBackwardParams&, cudaStream_t);

#include "kernels/injected_attention_decode.cuh"

template cudaError_t sharedllm::launch_injected_attention_decode_bulk<__half, 256>(
    const sharedllm::InjectedAttentionParams&, cudaStream_t);

#include "kernels/injected_attention_decode.cuh"

template cudaError_t sharedllm::launch_injected_attention_decode_portable<__half, 64>(
    const sharedllm::InjectedAttentionParams&, cudaStream_t);

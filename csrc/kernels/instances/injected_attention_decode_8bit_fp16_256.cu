#include "kernels/injected_attention_decode_8bit.cuh"

template cudaError_t sharedllm::launch_injected_attention_decode_8bit_bulk<__half, 256>(
    const sharedllm::InjectedAttention8BitParams&, cudaStream_t);
template cudaError_t sharedllm::launch_injected_attention_decode_8bit_portable<__half, 256>(
    const sharedllm::InjectedAttention8BitParams&, cudaStream_t);

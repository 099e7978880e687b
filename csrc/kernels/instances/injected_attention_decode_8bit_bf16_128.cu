#include "kernels/injected_attention_decode_8bit.cuh"

template cudaError_t sharedllm::launch_injected_attention_decode_8bit_bulk<__nv_bfloat16, 128>(
    const sharedllm::InjectedAttention8BitParams&, cudaStream_t);
template cudaError_t sharedllm::launch_injected_attention_decode_8bit_portable<__nv_bfloat16, 128>(
    const sharedllm::InjectedAttention8BitParams&, cudaStream_t);

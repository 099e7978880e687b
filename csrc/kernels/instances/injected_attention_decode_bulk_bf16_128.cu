#include "kernels/injected_attention_decode.cuh"

template cudaError_t sharedllm::launch_injected_attention_decode_bulk<__nv_bfloat16, 128>(
    const sharedllm::InjectedAttentionParams&, cudaStream_t);

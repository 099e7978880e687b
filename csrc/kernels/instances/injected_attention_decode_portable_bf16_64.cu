#include "kernels/injected_attention_decode.cuh"

template cudaError_t sharedllm::launch_injected_attention_decode_portable<__nv_bfloat16, 64>(
    const sharedllm::InjectedAttentionParams&, cudaStream_t);

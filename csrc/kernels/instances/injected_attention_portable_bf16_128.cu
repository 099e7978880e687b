#include "kernels/injected_attention_portable.cuh"

template cudaError_t sharedllm::launch_injected_attention_portable_instance<__nv_bfloat16, 128>(
    const sharedllm::InjectedAttentionParams&, cudaStream_t);

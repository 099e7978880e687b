#include "kernels/injected_attention_chained_sm90.cuh"

template cudaError_t sharedllm::launch_injected_attention_bulk_sm90_instance<__nv_bfloat16, 64>(
    const sharedllm::InjectedAttentionSm90Params&, cudaStream_t);

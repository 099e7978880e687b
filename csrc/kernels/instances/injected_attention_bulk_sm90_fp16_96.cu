#include "kernels/injected_attention_chained_sm90.cuh"

template cudaError_t sharedllm::launch_injected_attention_bulk_sm90_instance<__half, 96>(
    const sharedllm::InjectedAttentionSm90Params&, cudaStream_t);

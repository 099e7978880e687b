// Injected attention on Hopper: launch of the prefill path.
#pragma once

#include "kernels/injected_attention.h"

namespace sharedllm {

// Slots of a row are split where the tiles alone would leave multiprocessors idle; sets params->splits for the current
// device from what the host knows (T, B, S).
cudaError_t plan_injected_attention_sm90(InjectedAttentionParams* params);

// Needs compute capability 9.0, bfloat16 or float16, D of 64, 96, 128 or 256, pointers aligned to 16 bytes and strides
// to 8 elements, T > 0; partial results where params.splits > 1. cudaErrorNotSupported for anything else.
cudaError_t launch_injected_attention_sm90(const InjectedAttentionParams& params, cudaStream_t stream);

// One element type and head size; defined in kernels/instances.
template <class T, int kHeadSize>
cudaError_t launch_injected_attention_sm90_instance(const InjectedAttentionParams& params, cudaStream_t stream);

}  // namespace sharedllm

// Injected attention on compute capability 8.0 and later (mma.sync, cp.async), also split-KV: plan and launch.
#pragma once

#include "kernels/injected_attention/params.h"

namespace sharedllm {

// Splits a row's slots where the tiles alone would leave SMs idle; sets params->splits for the current device from what
// the host knows (T, B, S).
cudaError_t plan_injected_attention_portable(InjectedAttentionParams* params);

// Needs compute capability 8.0, bfloat16 or float16, columns of 64, 96, 128 or 256, pointers aligned to 16 bytes and
// strides to 8 elements; partial results where params.splits > 1. Otherwise cudaErrorNotSupported.
cudaError_t launch_injected_attention_portable(const InjectedAttentionParams& params, cudaStream_t stream);

// One element type and head size, a kernel instance.
template <class T, int kHeadSize>
cudaError_t launch_injected_attention_portable_instance(const InjectedAttentionParams& params, cudaStream_t stream);

}  // namespace sharedllm

// Injected attention in float32, for every head size and stride, without tensor cores.
#pragma once

#include "kernels/injected_attention/params.h"

namespace sharedllm {

constexpr int kGenericMaxHeadSize = 256;

// Needs float32; any D up to kGenericMaxHeadSize, any Hq / Hkv, any strides whose last is 1; params.splits is ignored.
// Otherwise cudaErrorNotSupported.
cudaError_t launch_injected_attention_generic(const InjectedAttentionParams& params, cudaStream_t stream);

}  // namespace sharedllm

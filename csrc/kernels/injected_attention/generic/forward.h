// Injected attention for every element type, head size and stride: float32 arithmetic without tensor cores.
#pragma once

#include "kernels/injected_attention/params.h"

namespace sharedllm {

constexpr int kGenericMaxHeadSize = 256;

// Any element type, any D up to kGenericMaxHeadSize, any Hq / Hkv, any strides whose last is 1; params.splits is
// ignored. cudaErrorNotSupported for a larger D.
cudaError_t launch_injected_attention_generic(const InjectedAttentionParams& params, cudaStream_t stream);

}  // namespace sharedllm

// Backward of injected attention in float32, for every head size and stride.
#pragma once

#include "kernels/injected_attention/params.h"

namespace sharedllm {

// Takes what launch_injected_attention_generic takes. Needs no workspace; grad_k and grad_v may each be null. The same
// bits in every run.
cudaError_t launch_injected_attention_backward_generic(const InjectedAttentionBackwardParams& params,
                                                       cudaStream_t stream);

}  // namespace sharedllm

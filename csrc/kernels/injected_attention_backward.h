// Backward of injected attention on the GPU: kernels that run before and after every path's own.
#pragma once

#include "kernels/injected_attention.h"

namespace sharedllm {

// Order of the launches, all on one stream: prepare, the path's kernels, and finish if the path summed into
// grad_q_float and left it at that. Both take any float16 or bfloat16 problem with D a multiple of 8 up to 256,
// pointers aligned to 16 bytes and q_stride a multiple of 8 elements; anything else is cudaErrorNotSupported.

// Reads q, out, grad_out, lse, grad_lse; writes q_rotated, delta, lse_log2, and zeros into grad_q_float unless null.
cudaError_t launch_injected_attention_backward_prepare(const InjectedAttentionBackwardParams& params,
                                                       cudaStream_t stream);

// grad_q from grad_q_float, the sum of dS k over the slots: times scale, rotated back, rounded once.
cudaError_t launch_injected_attention_backward_finish(const InjectedAttentionBackwardParams& params,
                                                      cudaStream_t stream);

// The same for sums in the layout of QuerySums.
cudaError_t launch_injected_attention_backward_finish_packed(const InjectedAttentionBackwardParams& params,
                                                             cudaStream_t stream);

// grad_k and grad_v from the shares of kv_splits > 1 parts, in their order: the same bits every time.
cudaError_t launch_injected_attention_backward_sum_parts(const InjectedAttentionBackwardParams& params,
                                                         cudaStream_t stream);

}  // namespace sharedllm

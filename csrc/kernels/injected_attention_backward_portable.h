// Backward of injected attention with warp-level matrix products, compute capability 8.0 and later.
#pragma once

#include "kernels/injected_attention_backward.h"

namespace sharedllm {

// Sets params->kv_splits for the current device from what the host knows (T, S, the heads): how many blocks share the
// queries of one tile of slots. Only for wanted grad_k and grad_v.
cudaError_t plan_injected_attention_backward_portable(InjectedAttentionBackwardParams* params);

// After launch_injected_attention_backward_prepare on the same stream. Needs bfloat16 or float16, D of 64, 96, 128 or
// 256, pointers aligned to 16 bytes, strides multiples of 8 elements; cudaErrorNotSupported for anything else. grad_k
// and grad_v are both wanted or both null.
//
// grad_k null: writes grad_q.
// grad_k wanted, grad_q_float null: writes all three by separate kernels, with the same bits in every run.
// grad_k wanted, grad_q_float given: adds to grad_q_float in any order; launch_injected_attention_backward_finish makes
// grad_q of it. grad_k and grad_v have the same bits in every run.
// kv_splits > 1 needs partial_grad_k and partial_grad_v.
cudaError_t launch_injected_attention_backward_portable(const InjectedAttentionBackwardParams& params,
                                                        cudaStream_t stream);

// One element type and head size; defined in kernels/instances.
template <class T, int kHeadSize>
cudaError_t launch_injected_attention_backward_portable_instance(const InjectedAttentionBackwardParams& params,
                                                                 cudaStream_t stream);

}  // namespace sharedllm

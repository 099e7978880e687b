// Backward of injected attention on Hopper GPUs (TMA, WGMMA): plan and launch. No torch header here or in what this
// includes.
#pragma once

#include "kernels/injected_attention/backward.h"

namespace sharedllm {

// Sets params->kv_splits and params->tail_shares for the current device from what the host knows (T, S, the heads): how
// many blocks share the queries of one tile of slots. Only if grad_k and grad_v are wanted.
cudaError_t plan_injected_attention_backward_sm90(InjectedAttentionBackwardParams* params);

// After launch_injected_attention_backward_prepare on the same stream. Needs bfloat16 or float16, columns of 64, 96,
// 128 or 256, pointers aligned to 16 bytes, and strides of k and v (with turns_keys also of q) that are multiples of 8
// elements. grad_k and grad_v are both wanted or both null. Otherwise cudaErrorNotSupported.
// turns_keys, for all three gradients: one batch row, all of whose columns are rotated (2 * rotary_half == D), or no
// rotation.
// grad_q alone, and grad_k and grad_v, are written as vectors of `columns` elements, the last of them zeros; grad_q of
// all three as vectors of D.
// grad_k null: writes grad_q, with the same bits in every run; grad_q_float is not used.
// grad_k wanted: writes all three, grad_q from sums in grad_q_float (in a layout of its own), added in any order.
// grad_k and grad_v have the same bits in every run. Not supported: D of 256, more than 64 query heads per key/value
// head. kv_splits > 1 or tail_shares > 0 need partial_grad_k and partial_grad_v.
cudaError_t launch_injected_attention_backward_sm90(const InjectedAttentionBackwardParams& params, cudaStream_t stream);

}  // namespace sharedllm

// Backward of the injected attention on Hopper GPUs. No torch header here or in what this includes.
#pragma once

#include "kernels/injected_attention_backward.h"

namespace sharedllm {

// Sets params->kv_splits for the current device from what the host knows (T, S, the heads): how many blocks share the
// queries of one tile of slots (kv_splits, tail_shares). Only for wanted grad_k and grad_v.
cudaError_t plan_injected_attention_backward_sm90(InjectedAttentionBackwardParams* params);

// After launch_injected_attention_backward_prepare on the same stream. Needs bfloat16 or float16, D of 64, 96, 128 or
// 256, pointers aligned to 16 bytes, strides of k and v, with turns_keys of q as well, multiples of 8 elements, grad_k
// and grad_v both wanted or both null; cudaErrorNotSupported for anything else.
//
// turns_keys, for all three gradients: one batch row all of whose columns turn (2 * rotary_half == D), or no rotation.
//
// grad_k null: writes grad_q, with the same bits in every run; grad_q_float is not used.
// grad_k wanted: writes all three, grad_q from sums in grad_q_float (in an order of its own), added in any order.
// grad_k and grad_v have the same bits in every run. Not supported: D of 256, more than 64 query heads to a key/value
// head. kv_splits > 1 or tail_shares > 0 need partial_grad_k and partial_grad_v.
cudaError_t launch_injected_attention_backward_sm90(const InjectedAttentionBackwardParams& params, cudaStream_t stream);

}  // namespace sharedllm

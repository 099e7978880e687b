// Backward of injected attention with warp-level matmuls (mma.sync), compute capability 8.0 and later.
#pragma once

#include "kernels/injected_attention/backward.h"

namespace sharedllm {

// Sets params->kv_splits for the current device from what the host knows (T, S, the heads): how many blocks share the
// queries of one tile of slots. Only if grad_k and grad_v are wanted.
cudaError_t plan_injected_attention_backward_portable(InjectedAttentionBackwardParams* params);

// Needs bfloat16 or float16, D of 64, 96, 128 or 256 and no less than columns, pointers aligned to 16 bytes, strides
// multiples of 8 elements; otherwise cudaErrorNotSupported. grad_k and grad_v are both wanted or both null. On the same
// stream:
// - grad_k null: this launch alone. Writes grad_q and needs no workspace, so neither prepare nor q_rotated, delta and
//   lse_log2. The same bits in every run.
// - grad_k wanted, grad_q_float given: prepare, this, finish. grad_k and grad_v have the same bits in every run; grad_q
//   is a float32 sum in any order, rounded once.
// - grad_k wanted, grad_q_float null: prepare, this. All three gradients have the same bits in every run, grad_q those
//   of a call without grad_k, in about 1.15 times the time.
// kv_splits > 1 needs partial_grad_k and partial_grad_v, [kv_splits, S, Hkv, D] float32 each; they need no zeros. A
// query or grad_out that is not finite spoils grad_k and grad_v of all slots that share a tile with slots of its row.
cudaError_t launch_injected_attention_backward_portable(const InjectedAttentionBackwardParams& params,
                                                        cudaStream_t stream);

// One element type and head size, a kernel instance.
template <class T, int kHeadSize>
cudaError_t launch_injected_attention_backward_portable_instance(const InjectedAttentionBackwardParams& params,
                                                                 cudaStream_t stream);

}  // namespace sharedllm

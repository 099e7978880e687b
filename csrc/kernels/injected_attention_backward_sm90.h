// Backward of the injected attention on Hopper GPUs. No torch header here or in what this includes.
#pragma once

#include "kernels/injected_attention.h"

namespace sharedllm {

// Preconditions: bfloat16 or float16; D 64, 96, 128 or 256; q_rotated, k, v, grad_out aligned to 16 bytes and the
// strides of k and v to 8 elements; launch_injected_attention_backward_prepare ran before on the same stream.
//
// Without grad_k and grad_v: writes grad_q, rotated back; grad_q_float is not used.
cudaError_t launch_injected_attention_backward_sm90(const InjectedAttentionBackwardParams& params, cudaStream_t stream);

}  // namespace sharedllm

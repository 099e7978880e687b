// Split-KV: merges the partial results of split slots by their log-sum-exp.
#pragma once

#include "kernels/injected_attention/params.h"

namespace sharedllm {

// Writes out and lse from the params.splits parts in partial_out and partial_lse, weighted by their exponentials; 0 and
// -inf where every part has -inf. Reads partial_out only where partial_lse is above -inf. Any element type; D a
// multiple of 4, columns too, out and partial_out aligned to 16 bytes. The same bits in every run.
cudaError_t launch_injected_attention_combine(const InjectedAttentionParams& params, cudaStream_t stream);

}  // namespace sharedllm

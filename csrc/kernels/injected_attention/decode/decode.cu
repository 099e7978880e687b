// Injected attention for a few queries per row: plan, workspace, choice of the kernel instance.
#include <algorithm>

#include "kernels/common/instances.h"
#include "kernels/injected_attention/decode/decode.h"

namespace sharedllm {
int32_t decode_tile_rows(const InjectedAttentionParams& p) {
  const int64_t group = p.q_heads / p.kv_heads;
  const int64_t packed = (p.num_queries + p.num_rows - 1) / p.num_rows * group;  // of an average row
  return packed <= 8 ? 8 : packed <= 16 ? 16 : packed <= 32 ? 32 : 64;
}

cudaError_t plan_injected_attention_decode(InjectedAttentionParams* params, bool portable) {
  InjectedAttentionParams& p = *params;
  p.splits = 1;
  if (p.num_queries == 0 || p.num_rows == 0) return cudaSuccess;
  int multiprocessors = 0, major = 0, shared_bytes = 0;
  cudaError_t status = current_attribute(cudaDevAttrMultiProcessorCount, &multiprocessors);
  if (status != cudaSuccess) return status;
  status = current_attribute(cudaDevAttrComputeCapabilityMajor, &major);
  if (status != cudaSuccess) return status;
  status = current_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &shared_bytes);
  if (status != cudaSuccess) return status;
  // a block with bulk copies takes nearly all shared memory, a portable one between 35 and 100 KB
  const bool bulk = major >= 9 && !portable && p.head_size == p.columns && p.columns % 64 == 0;
  // with three stages (from 220 KB on) one block per SM streams long memories faster: 183.5 against 187.1 us for 537
  // MB, but 36.7 against 34.8 us for 67 MB
  constexpr int64_t kLarge = int64_t{128} << 20;
  const bool deep = shared_bytes >= 220 * 1024 && decode_tile_rows(p) == 8 && p.columns != 96 &&
                    4 * p.num_slots * p.kv_heads * p.head_size > kLarge;
  const int blocks = !bulk && !deep && shared_bytes >= 160 * 1024 ? 2 : 1;
  // one worker for each block that can be resident; the heads of a worker read neighbouring memory at the same time
  p.splits = std::max(1, multiprocessors * blocks / p.kv_heads);
  return cudaSuccess;
}

int64_t injected_attention_decode_workspace_rows(const InjectedAttentionParams& p) {
  if (p.splits <= 1 || p.num_queries == 0 || p.num_rows == 0) return 0;
  return int64_t{2} * p.splits * p.kv_heads * decode_tile_rows(p);
}

cudaError_t launch_injected_attention_decode(const InjectedAttentionParams& p, cudaStream_t stream, bool portable) {
  if (p.num_queries == 0 || p.num_rows == 0) return cudaSuccess;
  int major = 0;
  const cudaError_t status = current_attribute(cudaDevAttrComputeCapabilityMajor, &major);
  if (status != cudaSuccess) return status;
  return with_instance(p.type, p.columns, [&](auto number, auto size) {
    using T = decltype(number);
    cudaError_t launched = cudaErrorNotSupported;
    if (major >= 9 && !portable) launched = launch_injected_attention_decode_bulk<T, size()>(p, stream);
    if (launched != cudaErrorNotSupported) return launched;
    return launch_injected_attention_decode_portable<T, size()>(p, stream);
  });
}

}  // namespace sharedllm

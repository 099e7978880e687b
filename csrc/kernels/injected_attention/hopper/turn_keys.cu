// Rotates keys back (transposed RoPE) by the position of the only batch row: (R q) k = q (R^T k). For short memories,
// where rotating all queries costs more.
#include "kernels/common/instances.h"
#include "kernels/common/overlap.cuh"
#include "kernels/common/scalar.cuh"
#include "kernels/injected_attention/hopper/forward.h"
#include "kernels/injected_attention/query_rotation.cuh"

namespace sharedllm {
namespace {

constexpr int kThreads = 256;

// 16 bytes per thread: more blocks of little work end sooner than fewer that have all loads in flight.
template <class T, int kHeadSize>
__global__ void __launch_bounds__(kThreads)
    turn_keys(const __grid_constant__ InjectedAttentionParams p, float factor, uint4* turned) {
  let_next_kernel_start();
  constexpr uint32_t kChunks = kHeadSize / 8;
  const uint32_t at = blockIdx.x * kThreads + threadIdx.x, vector = at / kChunks, heads = p.kv_heads;
  if (vector >= static_cast<uint32_t>(p.num_slots) * heads) return;
  const uint32_t slot = vector / heads, head = vector - slot * heads;
  RotaryRow rotary{nullptr, nullptr, p.rotary_half};
  if (rotary.half > 0) {
    const int64_t row = clamp_index(__ldg(p.q_position), 0, p.num_positions - 1) * rotary.half;
    rotary.cos = p.cos + row;
    rotary.sin = p.sin + row;
  }
  const T* const from = static_cast<const T*>(p.k) + slot * p.k_stride[0] + head * p.k_stride[1];
  turned[at] = rotated_chunk<T, true>(from, at - vector * kChunks, rotary, factor);
}

}  // namespace

cudaError_t launch_injected_attention_turn_keys(const InjectedAttentionParams& p, float factor, void* turned,
                                                cudaStream_t stream) {
  const int64_t chunks = p.num_slots * p.kv_heads * (p.head_size / 8), blocks = (chunks + kThreads - 1) / kThreads;
  if (p.num_rows != 1 || p.num_slots > kMostBulkSlots || chunks > INT32_MAX) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  return with_instance(p.type, p.columns, [&](auto number, auto size) {
    turn_keys<decltype(number), size()>
        <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, factor, static_cast<uint4*>(turned));
    return cudaGetLastError();
  });
}

}  // namespace sharedllm

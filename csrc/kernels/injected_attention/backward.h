// Backward of injected attention on the GPU: kernels that run before and after those of every path.
#pragma once

#include "kernels/injected_attention/params.h"

namespace sharedllm {

// Slots of a tile, in the kernel for all three gradients.
constexpr int kBackwardSlots = 128;
// Pieces of a tail; as kernel arguments, all together have to stay below 4 KB.
constexpr int kMostPieces = 320;

// Stream-K for the last wave. One block each takes the tiles of slots of all key/value heads but the last `tiles`. The
// last wave's tiles are concatenated and split evenly over the SMs, and also at tile boundaries. A piece of a tile sums
// over its part of the queries.
struct SlotTileTail {
  int64_t whole = 0;
  int32_t tiles = 0, shares = 0;
  int32_t tile_units = 1, share_units = 1;  // tiles * tile_units == shares * share_units, without a common divisor

  __host__ __device__ explicit SlotTileTail(const InjectedAttentionBackwardParams& p) {
    const int64_t all =
        (p.forward.num_slots + kBackwardSlots - 1) / kBackwardSlots * static_cast<int64_t>(p.forward.kv_heads);
    whole = all;
    if (p.tail_shares <= 0) return;
    shares = p.tail_shares;
    tiles = static_cast<int32_t>(all % shares);
    whole -= tiles;
    int32_t divisor = shares, rest = tiles;
    while (rest != 0) {
      const int32_t next = divisor % rest;
      divisor = rest;
      rest = next;
    }
    tile_units = shares / divisor;
    share_units = tiles / divisor;
  }
  // Pieces of the tiles before a tile: one for each tile, and one more for every cut inside it.
  __host__ __device__ int32_t first_piece(int32_t tile) const {
    if (tile == 0) return 0;
    const int32_t cuts = (tile * tile_units + share_units - 1) / share_units - 1;  // before the tile's begin
    return tile + cuts - (tile - 1) / share_units;                                 // except those at a tile's end
  }
  __host__ __device__ int32_t pieces() const { return tiles == 0 ? 0 : first_piece(tiles); }
};

// Elements of partial_grad_k, and of partial_grad_v, that a planned problem needs.
inline int64_t injected_attention_backward_partial_elements(const InjectedAttentionBackwardParams& p) {
  const InjectedAttentionParams& f = p.forward;
  if (p.kv_splits > 1) return int64_t{p.kv_splits} * f.num_slots * f.kv_heads * f.columns;
  return static_cast<int64_t>(SlotTileTail(p).pieces()) * kBackwardSlots * f.columns;
}

// Order of the launches, all on one stream: prepare, the path's kernels, and finish if the path left its sums in
// grad_q_float. Both take any float16 or bfloat16 problem with D a multiple of 8 up to 256, pointers aligned to 16
// bytes and q_stride a multiple of 8 elements; otherwise cudaErrorNotSupported.

// Reads q, out, grad_out, lse, grad_lse; writes delta, lse_log2, and, where these are not null, q_rotated and zeros
// into grad_q_float.
cudaError_t launch_injected_attention_backward_prepare(const InjectedAttentionBackwardParams& params,
                                                       cudaStream_t stream);

// grad_q from grad_q_float, the sum of dS k over the slots: times scale, rotated back, rounded once. Needs D of
// columns.
cudaError_t launch_injected_attention_backward_finish(const InjectedAttentionBackwardParams& params,
                                                      cudaStream_t stream);

// The same for sums in the layout of QuerySums, and for any D.
cudaError_t launch_injected_attention_backward_finish_packed(const InjectedAttentionBackwardParams& params,
                                                             cudaStream_t stream);

// grad_k and grad_v, [S, Hkv, columns], from the shares of kv_splits > 1 parts, or those of a tail's tiles from its
// pieces, in their order: the same bits in every run.
cudaError_t launch_injected_attention_backward_sum_parts(const InjectedAttentionBackwardParams& params,
                                                         cudaStream_t stream);

}  // namespace sharedllm

// GQA tiles of a ragged (varlen) batch: which queries and slots a tile covers. The lengths are on the device, so each
// tile finds its row by itself.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common/scalar.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/injected_attention/params.h"

namespace sharedllm {

// Packed rows of one key/value head: a batch row's queries times the G = Hq / Hkv query heads that share it (GQA),
// query-major. Packed row r of a batch row is query q_begin + r / G, head kv_head * G + r % G.
struct RowTile {
  int64_t row;         // batch row, -1 if there is no such tile
  int64_t tile;        // tile inside the batch row
  int64_t q_begin;     // first query of the batch row
  int64_t q_count;     // its queries
  int64_t slot_begin;  // first slot of its memory
  int64_t slot_count;
  int64_t position;  // rotary position of its queries
};

__device__ __forceinline__ void load_row(const InjectedAttentionParams& p, int64_t row, RowTile* found) {
  found->row = row;
  found->q_begin = clamp_index(p.cu_q[row], 0, p.num_queries);
  found->q_count = clamp_index(p.cu_q[row + 1], found->q_begin, p.num_queries) - found->q_begin;
  found->slot_begin = clamp_index(p.slot_range[2 * row], 0, p.num_slots);
  found->slot_count = clamp_index(p.slot_range[2 * row + 1], found->slot_begin, p.num_slots) - found->slot_begin;
  found->position = clamp_index(p.q_position[row], 0, p.num_positions - 1);
}

// Tile `index` among the tiles of all batch rows, `tile_rows` packed rows each. Every lane of one warp takes part and
// gets the result. Upper bound of the number of tiles: T * G / tile_rows + B.
__device__ __forceinline__ RowTile find_row_tile(const InjectedAttentionParams& p, int64_t index, int tile_rows) {
  RowTile found{};
  found.row = -1;
  const int lane = threadIdx.x % 32;
  const int64_t group = p.q_heads / p.kv_heads;
  int64_t before = 0;
  for (int64_t base = 0; base < p.num_rows; base += 32) {
    int64_t tiles = 0;
    if (base + lane < p.num_rows) {
      const int64_t begin = clamp_index(p.cu_q[base + lane], 0, p.num_queries);
      const int64_t end = clamp_index(p.cu_q[base + lane + 1], begin, p.num_queries);
      tiles = ((end - begin) * group + tile_rows - 1) / tile_rows;
    }
    int64_t through = tiles;  // tiles of the rows up to this lane's
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int64_t other = __shfl_up_sync(kFullWarp, through, offset);
      if (lane >= offset) through += other;
    }
    const unsigned holds = __ballot_sync(kFullWarp, before + through > index);
    if (holds) {
      const int owner = __ffs(holds) - 1;
      load_row(p, base + owner, &found);
      found.tile = index - before - __shfl_sync(kFullWarp, through - tiles, owner);
      return found;
    }
    before += __shfl_sync(kFullWarp, through, 31);
  }
  return found;
}

}  // namespace sharedllm

// Which slots a worker reads: the rows of the batch, their units of work, and the walk over a worker's share.
#pragma once

#include <cstdint>

#include "kernels/common/warp.cuh"
#include "kernels/injected_attention/params.h"

namespace sharedllm {
namespace decode {

// A batch row, clamped into the tensors, which have fewer than 2^31 tokens, slots and positions.
struct RowSpan {
  int32_t q_begin, q_count, slot_begin, slot_count, position;
};
__device__ __forceinline__ RowSpan load_span(const InjectedAttentionParams& p, int32_t row) {
  const int64_t q_begin = p.cu_q[row], q_end = p.cu_q[row + 1];
  const int64_t* const slots = p.slot_range + 2 * static_cast<int64_t>(row);
  const int64_t slots_begin = slots[0], slots_end = slots[1], position = p.q_position[row];
  const auto clamp = [](int64_t x, int32_t low, int64_t high) {
    return x < low ? low : static_cast<int32_t>(x > high ? high : x);
  };
  RowSpan span;
  span.q_begin = clamp(q_begin, 0, p.num_queries);
  span.q_count = clamp(q_end, span.q_begin, p.num_queries) - span.q_begin;
  span.slot_begin = clamp(slots_begin, 0, p.num_slots);
  span.slot_count = clamp(slots_end, span.slot_begin, p.num_slots) - span.slot_begin;
  span.position = clamp(position, 0, p.num_positions - 1);
  return span;
}

// The work of a batch row: its tiles of packed rows times its blocks of slots. A row without slots counts as one block,
// so that its zeros are written.
template <int kRows>
__device__ __forceinline__ uint32_t tiles_of(const RowSpan& span, uint32_t group) {
  return (span.q_count * group + kRows - 1) / kRows;
}
template <int kSlots>
__device__ __forceinline__ uint32_t blocks_of(const RowSpan& span) {
  const uint32_t blocks = (static_cast<uint32_t>(span.slot_count) + kSlots - 1) / kSlots;
  return blocks > 0 ? blocks : 1;
}

// Where a unit of work (a block of slots of a tile; ordered by rows, then tiles, then blocks) or a tile is.
struct Place {
  RowSpan span;
  int32_t row;            // -1: there is no such unit
  uint64_t units_before;  // of the rows before
  uint64_t tiles_before;
};

struct PlaceScan {
  uint64_t units[32], tiles[32];  // of each warp's rows
  Place found;
};

// Finds the row of a unit, or of a tile. All threads of the block take part; `target(units of all rows)` says which one
// to find.
template <int kRows, int kSlots, int kThreads, bool kByTile, class Target>
__device__ __forceinline__ Place find_place_by_block(const InjectedAttentionParams& p, uint32_t group, PlaceScan& scan,
                                                     const Target& target) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  // each thread takes neighbouring rows
  const int32_t rows = static_cast<int32_t>(p.num_rows), each = (rows + kThreads - 1) / kThreads;
  const int32_t first = min(thread * each, rows), end = min(first + each, rows);
  uint64_t units = 0;
  uint32_t tiles = 0;
#pragma unroll 4
  for (int32_t row = first; row < end; ++row) {
    const RowSpan span = load_span(p, row);
    const uint32_t row_tiles = tiles_of<kRows>(span, group);
    units += static_cast<uint64_t>(row_tiles) * blocks_of<kSlots>(span);
    tiles += row_tiles;
  }
  uint64_t units_through = units;
  uint32_t tiles_through = tiles;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t other_units = __shfl_up_sync(kFullWarp, units_through, offset);
    const uint32_t other_tiles = __shfl_up_sync(kFullWarp, tiles_through, offset);
    if (lane >= offset) {
      units_through += other_units;
      tiles_through += other_tiles;
    }
  }
  if (lane == 31) {
    scan.units[warp] = units_through;
    scan.tiles[warp] = tiles_through;
  }
  if (thread == 0) scan.found.row = -1;
  __syncthreads();
  uint64_t units_before = units_through - units, tiles_before = tiles_through - tiles, total = 0;
#pragma unroll 1
  for (int other = 0; other < kThreads / 32; ++other) {
    if (other < warp) {
      units_before += scan.units[other];
      tiles_before += scan.tiles[other];
    }
    total += scan.units[other];
  }
  const uint64_t wanted = target(total);
  const uint64_t before = kByTile ? tiles_before : units_before, inside = kByTile ? tiles : units;
  if (before <= wanted && wanted < before + inside) {
#pragma unroll 1
    for (int32_t row = first; row < end; ++row) {
      const RowSpan span = load_span(p, row);
      const uint32_t row_tiles = tiles_of<kRows>(span, group);
      const uint64_t row_units = static_cast<uint64_t>(row_tiles) * blocks_of<kSlots>(span);
      if (wanted < (kByTile ? tiles_before + row_tiles : units_before + row_units)) {
        scan.found = {span, row, units_before, tiles_before};
        break;
      }
      units_before += row_units;
      tiles_before += row_tiles;
    }
  }
  __syncthreads();
  return scan.found;
}

// The same for at most 32 rows: each warp on its own, because nothing should wait before the first loads.
template <int kRows, int kSlots, bool kByTile, class Target>
__device__ __forceinline__ Place find_place_by_warp(const InjectedAttentionParams& p, uint32_t group,
                                                    const Target& target) {
  const int lane = threadIdx.x % 32;
  RowSpan span{};
  uint64_t units = 0;
  uint32_t tiles = 0;
  if (lane < p.num_rows) {
    span = load_span(p, lane);
    tiles = tiles_of<kRows>(span, group);
    units = static_cast<uint64_t>(tiles) * blocks_of<kSlots>(span);
  }
  uint64_t units_through = units;
  uint32_t tiles_through = tiles;
#pragma unroll 1
  for (int offset = 1; offset < p.num_rows; offset *= 2) {
    const uint64_t other_units = __shfl_up_sync(kFullWarp, units_through, offset);
    const uint32_t other_tiles = __shfl_up_sync(kFullWarp, tiles_through, offset);
    if (lane >= offset) {
      units_through += other_units;
      tiles_through += other_tiles;
    }
  }
  // lanes past the last row have incomplete sums if the loop ended early
  const uint64_t wanted = target(__shfl_sync(kFullWarp, units_through, static_cast<int>(p.num_rows) - 1));
  const uint64_t through = kByTile ? tiles_through : units_through, inside = kByTile ? tiles : units;
  const unsigned holds = __ballot_sync(kFullWarp, through - inside <= wanted && wanted < through);
  const int owner = holds ? __ffs(holds) - 1 : 0;
  Place place;
  place.row = holds ? owner : -1;
  place.span.q_begin = __shfl_sync(kFullWarp, span.q_begin, owner);
  place.span.q_count = __shfl_sync(kFullWarp, span.q_count, owner);
  place.span.slot_begin = __shfl_sync(kFullWarp, span.slot_begin, owner);
  place.span.slot_count = __shfl_sync(kFullWarp, span.slot_count, owner);
  place.span.position = __shfl_sync(kFullWarp, span.position, owner);
  place.units_before = __shfl_sync(kFullWarp, units_through - units, owner);
  place.tiles_before = __shfl_sync(kFullWarp, tiles_through - tiles, owner);
  return place;
}

template <int kRows, int kSlots, int kThreads, bool kByTile, class Target>
__device__ __forceinline__ Place find_place(const InjectedAttentionParams& p, uint32_t group, PlaceScan& scan,
                                            const Target& target) {
  return p.num_rows <= 32 ? find_place_by_warp<kRows, kSlots, kByTile>(p, group, target)
                          : find_place_by_block<kRows, kSlots, kThreads, kByTile>(p, group, scan, target);
}

// Worker w has units [w * share, (w + 1) * share); the last ones may have none.
__device__ __forceinline__ uint64_t worker_share(uint64_t units, uint32_t workers) {
  return (units + workers - 1) / workers;
}

// Walks the segments of a worker: the blocks [first, first + count) of one tile of one batch row.
template <int kRows, int kSlots>
struct Walk {
  RowSpan span;
  int32_t row;
  uint32_t tile, tiles, blocks, first, count;
  uint64_t left;

  __device__ __forceinline__ void begin(const Place& place, uint32_t group, uint64_t unit, uint64_t units) {
    left = units;
    if (left == 0) return;
    span = place.span;
    row = place.row;
    tiles = tiles_of<kRows>(span, group);
    blocks = blocks_of<kSlots>(span);
    const uint64_t inside = unit - place.units_before;
    tile = static_cast<uint32_t>(inside / blocks);
    first = static_cast<uint32_t>(inside - static_cast<uint64_t>(tile) * blocks);
    count = 0;
  }

  __device__ __forceinline__ bool next(const InjectedAttentionParams& p, uint32_t group) {
    if (left == 0) return false;
    first += count;
    if (first == blocks) {
      first = 0;
      if (++tile == tiles) {
        tile = 0;
        do {
          // no unit is left after the last row
          if (++row >= p.num_rows) return false;
          span = load_span(p, row);
          tiles = tiles_of<kRows>(span, group);
        } while (tiles == 0);
        blocks = blocks_of<kSlots>(span);
      }
    }
    const uint32_t rest = blocks - first;
    count = left < rest ? static_cast<uint32_t>(left) : rest;
    left -= count;
    return true;
  }
};

}  // namespace decode
}  // namespace sharedllm

// Injected attention for a few queries per row (decoding, split-KV). The slots of all rows are cut into blocks and
// divided evenly among workers; a worker walks its blocks, whatever rows they belong to (stream-K). A producer warp
// loads keys and values by TMA, consumer warps compute. Rows that several workers share are merged by a second kernel,
// launched by PDL. Scores are computed transposed (slots x packed rows), so that eight packed rows fill an mma.sync.
// docs/kernels/injected_attention_decode.md has the derivation.
#pragma once

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "kernels/common/global_memory.cuh"
#include "kernels/common/hopper.cuh"
#include "kernels/common/instances.h"
#include "kernels/common/mma.cuh"
#include "kernels/common/overlap.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/common/tensor_map.h"
#include "kernels/common/vector_load.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/injected_attention/decode/decode.h"
#include "kernels/injected_attention/rows.cuh"

namespace sharedllm {
namespace decode {

// What the workspace holds before a result is there. Arithmetic never produces this NaN.
constexpr uint32_t kAbsent = 0xffffffffu;

// ---- which slots a worker reads ----

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

// ---- tiles in shared memory ----

// Rows of kRowBytes follow each other; the 16-byte chunks are permuted as by TMA's 128-byte swizzle.
__host__ __device__ constexpr uint32_t swizzle(uint32_t offset) { return offset ^ ((offset >> 3) & 0x70); }

// Address of the 16 bytes at row `row`, byte 32 * step + 16 * half. The tile is aligned to 1024 bytes.
template <int kRowBytes>
struct TileRow {
  static constexpr bool kPowerOfTwo = (kRowBytes & (kRowBytes - 1)) == 0;
  uint32_t tile, offset;
  __device__ __forceinline__ TileRow(uint32_t tile, int row, int half)
      : tile(tile), offset(row * kRowBytes + half * 16) {
    if (kPowerOfTwo) offset = swizzle(offset);
  }
  __device__ __forceinline__ uint32_t at(int step) const {
    // the swizzle is linear in the bits, and a power of two keeps row and step in different ones
    return tile + (kPowerOfTwo ? offset ^ swizzle(32 * step) : swizzle(offset + 32 * step));
  }
};

// ---- the kernel ----

// Warps of a block: kSlotWarps x kRowWarps; a warp takes kSlots / kSlotWarps slots of a block and 8 * kRowTiles rows.
// kBulk: a producer warp and TMA, else cp.async. Element: type of queries and results; Code: of keys and values, the
// same or int8 with a scale for each slot and head.
template <class Element, class Code, int kHeadSize_, int kSlots_, int kSlotWarps_, int kRowWarps_, int kRowTiles_,
          int kStages_, bool kBulk_>
struct Config {
  using T = Element;
  static constexpr bool kEightBit = sizeof(Code) == 1;
  using Operand = std::conditional_t<kEightBit, __half, T>;  // of the matmuls
  static constexpr int kHeadSize = kHeadSize_, kSlots = kSlots_, kStages = kStages_;
  static constexpr int kSlotWarps = kSlotWarps_, kRowWarps = kRowWarps_, kRowTiles = kRowTiles_;
  static constexpr bool kBulk = kBulk_;
  static constexpr int kWarpRows = 8 * kRowTiles, kRows = kWarpRows * kRowWarps;
  static constexpr int kSlotTiles = kSlots / (16 * kSlotWarps);  // of a warp
  static constexpr int kWarps = kSlotWarps * kRowWarps, kConsumers = 32 * kWarps;
  static constexpr int kThreads = kConsumers + (kBulk ? 32 : 0);
  static constexpr int kSteps = kHeadSize / 16;
  static constexpr int kRowBytes = kHeadSize * sizeof(Code);
  static constexpr int kTileBytes = kSlots * kRowBytes;
  static constexpr int kScaleBytes = kEightBit ? kSlots * 4 : 0;  // of a tile
  static constexpr int kQueryRowBytes = 2 * kHeadSize, kQueryBytes = kRows * kQueryRowBytes;
  // columns of the accumulators that the warps of a block sum at a time
  static constexpr int kMergeColumns = kBulk && kWarps <= 4 && kHeadSize <= 128 ? kHeadSize
                                       : kHeadSize == 96                        ? 48
                                       : kWarps > 8                             ? 32
                                                                                : 64;
  static constexpr int kMergePitch = kMergeColumns + 4;  // no bank conflicts: 2 * pitch = 8 modulo 32
  static constexpr int kMergeBytes = kWarps * 8 * kMergePitch * 4;
  static constexpr int kRingBytes = 2 * kStages * kTileBytes;
  // the queries' memory is reused for the sums, when all scores are computed
  static constexpr int kScaleOffset = kRingBytes + (kQueryBytes > kMergeBytes ? kQueryBytes : kMergeBytes);
  static constexpr int kStatisticsOffset = kScaleOffset + 2 * kStages * kScaleBytes;
  static constexpr int kRowScaleOffset = kStatisticsOffset + 2 * kSlotWarps * kRows * 4;
  static constexpr int kBarrierOffset = kRowScaleOffset + (kEightBit ? kRows * 4 : 0);
  static constexpr int kSharedBytes = kBarrierOffset + (4 * kStages + 2) * 8;
  // The merging kernel can wait for each result instead of for the end of this kernel.
  static constexpr bool kMayAwait = kBulk && kRows == 8;
  static_assert(kSlots % (16 * kSlotWarps) == 0 && kHeadSize % 32 == 0 && kTileBytes % 1024 == 0);
  static_assert(kHeadSize % kMergeColumns == 0 && kMergeColumns % 16 == 0, "all columns are summed, in whole tiles");
  static_assert(kSharedBytes + sizeof(PlaceScan) <= 227 * 1024);
  // Weights of 8-bit values carry the value's scale and are rounded to half: raised by 2^7, so that 2^kGrowth times
  // that still fits and small ones keep their bits.
  static constexpr float kWeightShift = kEightBit ? 7.0f : 0.0f;
};

struct BulkMaps {
  CUtensorMap key, value;
};
struct Scales {
  const float* key;         // [S, Hkv]
  const float* value;       // [S, Hkv]
  int64_t key_stride[2];    // between slots, between heads
  int64_t value_stride[2];  // likewise
};
struct Nothing {};

// Two of four signed bytes (the selector names them in its first and third digit) as halves: 1024 + 128 + x has the
// byte x + 128 as its low bits.
template <uint32_t kSelector>
__device__ __forceinline__ uint32_t bytes_to_halves(uint32_t flipped) {
  const uint32_t raised = __byte_perm(flipped, 0x64646464u, kSelector);
  const __half2 offset = __half2half2(__ushort_as_half(0x6480));
  const __half2 x = __hsub2(*reinterpret_cast<const __half2*>(&raised), offset);
  return *reinterpret_cast<const uint32_t*>(&x);
}

template <int kThreads>
__device__ __forceinline__ void sync_consumers() {
  __syncwarp();
  named_barrier_sync<1, kThreads>();
}

// State of a warp's rows: accumulators transposed (columns x rows), running maximum and sum of weights. A thread holds
// rows 2 * (lane % 4) and the next of each tile of 8; until the end, the sums are those of its own slots.
template <class C>
struct WarpState {
  float o[C::kSteps][C::kRowTiles][4];
  float maximum[C::kRowTiles][2], sum[C::kRowTiles][2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
      for (int m = 0; m < C::kSteps; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[m][n][i] = 0;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        maximum[n][i] = -kInfinity;
        sum[n][i] = 0;
      }
    }
  }
};

// Column of accumulator i of step m in a lane. 8-bit values arrive as pairs of columns, which share the rows of a
// matmul.
template <class C>
__device__ __forceinline__ int column_of(int m, int i, int lane) {
  return 16 * m + (C::kEightBit ? lane / 4 * 2 + i / 2 : lane / 4 + i / 2 * 8);
}

// The queries as operand B, eight rows per tile: in registers where they fit beside the accumulators.
template <class C>
struct Queries {
  static constexpr bool kInRegisters = C::kRowTiles * C::kHeadSize <= 128;
  uint32_t tile;
  int first_row;  // the warp's
  uint32_t held[kInRegisters ? C::kRowTiles : 1][kInRegisters ? C::kSteps : 1][2];

  // two steps at a time
  __device__ __forceinline__ void fetch(int n, int step, uint32_t (&b)[4]) const {
    const int lane = threadIdx.x % 32;
    load_block(b, TileRow<C::kQueryRowBytes>(tile, first_row + n * 8 + lane % 8, lane / 8 % 2).at(step + lane / 16));
  }
  __device__ __forceinline__ Queries(uint32_t tile, int first_row) : tile(tile), first_row(first_row) {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
        for (int step = 0; step < C::kSteps; step += 2) {
          uint32_t b[4];
          fetch(n, step, b);
          held[n][step][0] = b[0], held[n][step][1] = b[1];
          held[n][step + 1][0] = b[2], held[n][step + 1][1] = b[3];
        }
      }
    }
  }
  __device__ __forceinline__ void get(int n, int step, uint32_t (&b)[4]) const {
    if constexpr (kInRegisters) {
      b[0] = held[n][step][0], b[1] = held[n][step][1];
      b[2] = held[n][step + 1][0], b[3] = held[n][step + 1][1];
    } else {
      fetch(n, step, b);
    }
  }
};

template <class C>
using Scores = float[C::kSlotTiles][C::kRowTiles][4];

// First slot of the warp in a block.
template <class C>
__device__ __forceinline__ int warp_slot() {
  return threadIdx.x / 32 % C::kSlotWarps * (16 * C::kSlotTiles);
}

// Scores of the warp's slots in the block of keys at `keys`.
template <class C>
__device__ __forceinline__ void multiply_keys(uint32_t keys, const Queries<C>& queries, Scores<C>& s) {
  const int lane = threadIdx.x % 32;
  // two sums, for even and odd steps, where one alone would be a long chain of dependent matmuls
  constexpr int kChains = C::kSlotTiles * C::kRowTiles < 3 ? 2 : 1;
#pragma unroll
  for (int t = 0; t < C::kSlotTiles; ++t) {
    const TileRow<C::kRowBytes> row(keys, warp_slot<C>() + t * 16 + lane % 16, lane / 16);
    float sums[kChains][C::kRowTiles][4];
#pragma unroll
    for (int c = 0; c < kChains; ++c) {
#pragma unroll
      for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[c][n][i] = 0;
      }
    }
#pragma unroll
    for (int step = 0; step < C::kSteps; step += 2) {
      uint32_t a[2][4];
      if constexpr (C::kEightBit) {
        // a register's matrix holds 16 columns; the queries' columns are in the order that results from this
        uint32_t codes[4];
        load_block(codes, row.at(step / 2));
#pragma unroll
        for (int j = 0; j < 4; ++j) codes[j] ^= 0x80808080u;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          a[j][0] = bytes_to_halves<0x7170>(codes[2 * j]), a[j][1] = bytes_to_halves<0x7170>(codes[2 * j + 1]);
          a[j][2] = bytes_to_halves<0x7372>(codes[2 * j]), a[j][3] = bytes_to_halves<0x7372>(codes[2 * j + 1]);
        }
      } else {
        load_block(a[0], row.at(step));
        load_block(a[1], row.at(step + 1));
      }
#pragma unroll
      for (int n = 0; n < C::kRowTiles; ++n) {
        uint32_t b[4];
        queries.get(n, step, b);
        multiply_add<typename C::Operand>(sums[0][n], a[0], b[0], b[1]);
        multiply_add<typename C::Operand>(sums[kChains - 1][n], a[1], b[2], b[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[t][n][i] = kChains == 2 ? sums[0][n][i] + sums[kChains - 1][n][i] : sums[0][n][i];
    }
  }
}

// Slots from `valid` on are not the row's.
template <class C>
__device__ __forceinline__ void mask_scores(int valid, Scores<C>& s) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < C::kSlotTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool outside = warp_slot<C>() + t * 16 + lane / 4 + i / 2 * 8 >= valid;
#pragma unroll
      for (int n = 0; n < C::kRowTiles; ++n) {
        if (outside) s[t][n][i] = -kInfinity;
      }
    }
  }
}

// What the scores of 8-bit keys still lack: the slots' scales, the rows' factors and the softmax's scale in base 2.
template <class C>
__device__ __forceinline__ void scale_scores(const float* key_scales, const float (&row_scale)[C::kRowTiles][2],
                                             Scores<C>& s) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < C::kSlotTiles; ++t) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float scale = key_scales[warp_slot<C>() + t * 16 + lane / 4 + 8 * j];
#pragma unroll
      for (int n = 0; n < C::kRowTiles; ++n) {
        s[t][n][2 * j] *= scale * row_scale[n][0];
        s[t][n][2 * j + 1] *= scale * row_scale[n][1];
      }
    }
  }
}

// Turns scores into weights in place; raises the running maximum and rescales the accumulators if necessary. 8-bit:
// `value_scales` are part of the weights, and of the maximum, which is that of the matmul's operand.
template <class C>
__device__ __forceinline__ void weigh(Scores<C>& s, WarpState<C>& state, float scale_log2,
                                      const float (&value_scales)[C::kSlotTiles][2]) {
  // below this a scale no longer moves the maximum: the sums of the weights without it would grow beyond float32
  constexpr float kSmallest = -60.0f;
  float bias[C::kSlotTiles][2];
  if constexpr (C::kEightBit) {
#pragma unroll
    for (int t = 0; t < C::kSlotTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 2; ++j) bias[t][j] = fmaxf(__log2f(value_scales[t][j]), kSmallest);
    }
  }
  float best[C::kRowTiles][2];
  bool grows = false;
#pragma unroll
  for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      best[n][i] = -kInfinity;
#pragma unroll
      for (int t = 0; t < C::kSlotTiles; ++t) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          best[n][i] = fmaxf(best[n][i], C::kEightBit ? s[t][n][2 * j + i] + bias[t][j] : s[t][n][2 * j + i]);
        }
      }
      // false for two infinities of the same sign, whose difference is NaN
      grows |= (best[n][i] - state.maximum[n][i]) * scale_log2 > kGrowth;
    }
  }
  if (__any_sync(kFullWarp, grows)) {
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float highest = best[n][i];
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) {
          highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, offset));
        }
        highest = fmaxf(highest, state.maximum[n][i]);
        // 1 where nothing grows, also for a maximum that stays -inf
        const float factor =
            highest > state.maximum[n][i] ? exp2_fast((state.maximum[n][i] - highest) * scale_log2) : 1.0f;
        state.maximum[n][i] = highest;
        state.sum[n][i] *= factor;
#pragma unroll
        for (int m = 0; m < C::kSteps; ++m) {
          state.o[m][n][i] *= factor;
          state.o[m][n][2 + i] *= factor;
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // a row that has seen only -inf keeps weights of 0
      const float base =
          state.maximum[n][i] == -kInfinity ? 0.0f : fmaf(state.maximum[n][i], scale_log2, -C::kWeightShift);
#pragma unroll
      for (int t = 0; t < C::kSlotTiles; ++t) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float weight = exp2_fast(fmaf(s[t][n][2 * j + i], scale_log2, -base));
          state.sum[n][i] += weight;
          s[t][n][2 * j + i] = C::kEightBit ? weight * value_scales[t][j] : weight;
        }
      }
    }
  }
}

// Adds the weighted values of the warp's slots to the accumulators. Values from slot `valid` on count as zeros,
// whatever they hold: a weight of 0 does not silence a NaN.
template <class C>
__device__ __forceinline__ void multiply_values(uint32_t values, int valid, const Scores<C>& s, WarpState<C>& state) {
  using T = typename C::Operand;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < C::kSlotTiles; ++t) {
    uint32_t weights[C::kRowTiles][2];
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        weights[n][j] = transpose_matrix(pack_pair(T{}, s[t][n][2 * j], s[t][n][2 * j + 1]));
      }
    }
    if constexpr (C::kEightBit) {
      const TileRow<C::kRowBytes> row(values, warp_slot<C>() + t * 16 + lane % 16, lane / 16);
#pragma unroll
      for (int m = 0; m < C::kSteps; m += 2) {
        uint32_t codes[4];
        load_block_transposed(codes, row.at(m / 2));
#pragma unroll
        for (int j = 0; j < 4; ++j) codes[j] ^= 0x80808080u;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t a[4];
          a[0] = bytes_to_halves<0x7270>(codes[2 * j]), a[1] = bytes_to_halves<0x7371>(codes[2 * j]);
          a[2] = bytes_to_halves<0x7270>(codes[2 * j + 1]), a[3] = bytes_to_halves<0x7371>(codes[2 * j + 1]);
#pragma unroll
          for (int n = 0; n < C::kRowTiles; ++n) multiply_add<T>(state.o[m + j][n], a, weights[n][0], weights[n][1]);
        }
      }
    } else {
      const TileRow<C::kRowBytes> row(values, warp_slot<C>() + t * 16 + lane % 8 + lane / 16 * 8, lane / 8 % 2);
      uint32_t keep[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int slot = warp_slot<C>() + t * 16 + j * 8 + lane % 4 * 2;
        keep[j] = slot + 1 < valid ? 0xffffffffu : slot < valid ? 0xffffu : 0u;
      }
#pragma unroll
      for (int m = 0; m < C::kSteps; ++m) {
        uint32_t a[4];
        load_block_transposed(a, row.at(m));
        a[0] &= keep[0], a[1] &= keep[0];
        a[2] &= keep[1], a[3] &= keep[1];
#pragma unroll
        for (int n = 0; n < C::kRowTiles; ++n) multiply_add<T>(state.o[m][n], a, weights[n][0], weights[n][1]);
      }
    }
  }
}

// The power of 2 by which a row's queries are divided for matmuls with 8-bit keys: in float16 they then keep all bits
// of float16 and bfloat16. 0 for rows too small to be divided.
__device__ __forceinline__ float query_divisor(float largest) {
  return __uint_as_float(__float_as_uint(largest) & 0x7f800000u);
}

// Queries of a tile to shared memory, rotated in float32 and rounded once, rows past the batch row's end as zeros; the
// consumers take part. A thread rotates pairs (i, i + R/2), then takes the columns past R. 8-bit: divided by
// query_divisor() of the row's largest, which goes to row_largest.
template <class C>
__device__ __forceinline__ void load_queries(const InjectedAttentionParams& p, const RowSpan& span, uint32_t tile,
                                             uint32_t group, int head, uint8_t* queries, float factor,
                                             float* row_largest, uint64_t* issued = nullptr) {
  using T = typename C::T;
  constexpr int kPairs = C::kHeadSize / 2, kItems = C::kRows * kPairs / C::kConsumers;
  constexpr int kTogether = kItems % 4 == 0 ? 4 : kItems % 3 == 0 ? 3 : 2;
  static_assert(C::kRows * kPairs % (kTogether * C::kConsumers) == 0);
  const int64_t table_row = static_cast<int64_t>(span.position) * p.rotary_half;
  const float *const cos = p.cos + table_row, *const sin = p.sin + table_row;
  const uint32_t packed_rows = span.q_count * group;
  struct Raw {
    T low, high;
    float c, s;
  };
  const auto fetch = [&](int r, int pair, Raw& raw) {
    // no branch around the loads, so that those of several items are in flight together
    const uint32_t packed = tile * C::kRows + r, safe = min(packed, packed_rows - 1), query = safe / group;
    const T* const from = static_cast<const T*>(p.q) + (span.q_begin + query) * p.q_stride[0] +
                          (head * group + (safe - query * group)) * p.q_stride[1];
    const bool turns = pair < p.rotary_half;
    raw.low = from[turns ? pair : 2 * pair];
    raw.high = from[turns ? pair + p.rotary_half : 2 * pair + 1];
    raw.c = 1, raw.s = 0;
    if (p.rotary_half > 0) {
      const int at = turns ? pair : 0;
      raw.c = cos[at], raw.s = sin[at];
    }
  };
  const auto turn = [&](int r, int pair, const Raw& raw, float (&x)[2]) {
    const float low = to_float(raw.low), high = to_float(raw.high);
    const bool turns = pair < p.rotary_half, inside = tile * C::kRows + r < packed_rows;
    // a pair that is not rotated may be infinite, and 0 times that is NaN
    const float first = turns ? low * raw.c - high * raw.s : low, second = turns ? high * raw.c + low * raw.s : high;
    x[0] = inside ? first * factor : 0.0f;
    x[1] = inside ? second * factor : 0.0f;
  };
  const auto rotated = [&](int r, int pair, float (&x)[2]) {
    Raw raw;
    fetch(r, pair, raw);
    turn(r, pair, raw, x);
  };
  if constexpr (C::kEightBit) {
    for (int r = threadIdx.x; r < C::kRows; r += C::kConsumers) row_largest[r] = 0;
    sync_consumers<C::kConsumers>();
#pragma unroll 4
    for (int item = threadIdx.x; item < C::kRows * kPairs; item += C::kConsumers) {
      float x[2];
      rotated(item / kPairs, item % kPairs, x);
      // positive floats are ordered like their bits, and NaN is above all
      atomicMax(reinterpret_cast<unsigned*>(row_largest + item / kPairs),
                max(__float_as_uint(fabsf(x[0])), __float_as_uint(fabsf(x[1]))));
    }
    sync_consumers<C::kConsumers>();
  }
  // several items at a time: their loads are in flight together
#pragma unroll 1
  for (int first = 0; first < kItems; first += kTogether) {
    float x[kTogether][2];
    Raw raw[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int item = (first + j) * C::kConsumers + threadIdx.x;
      fetch(item / kPairs, item % kPairs, raw[j]);
    }
    if (issued && first == 0) {
      __syncwarp();
      if (threadIdx.x % 32 == 0) barrier_arrive(issued);
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int item = (first + j) * C::kConsumers + threadIdx.x;
      turn(item / kPairs, item % kPairs, raw[j], x[j]);
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int item = (first + j) * C::kConsumers + threadIdx.x, r = item / kPairs, pair = item % kPairs;
      const bool turns = pair < p.rotary_half;
      const float divisor = C::kEightBit ? query_divisor(row_largest[r]) : 1.0f;
      const float inverse = divisor == 0.0f ? 0.0f : 1.0f / divisor;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int column = turns ? pair + i * p.rotary_half : 2 * pair + i;
        if constexpr (C::kEightBit) {
          // a register of 8-bit keys holds columns 4c .. 4c + 3, which are the operand's 2c, 2c + 1, 2c + 8, 2c + 9
          const int inside = column % 16;
          column += inside / 4 * 2 + inside % 2 + inside / 2 % 2 * 8 - inside;
          x[j][i] *= inverse;
        }
        *reinterpret_cast<typename C::Operand*>(queries + swizzle(r * C::kQueryRowBytes + column * 2 / 16 * 16) +
                                                column * 2 % 16) = static_cast<typename C::Operand>(x[j][i]);
      }
    }
  }
}

// Epilogue: merges the warps' results of a segment. A whole tile goes to out and lse, otherwise to the workspace, with
// zeros where no slot had a weight.
template <class C>
__device__ __forceinline__ void finish_segment(const InjectedAttentionParams& p,
                                               const Walk<C::kRows, C::kSlots>& segment, uint32_t group, int head,
                                               int worker, float scale_log2, WarpState<C>& state, float* merge,
                                               float* statistics) {
  using T = typename C::T;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int slot_warp = warp % C::kSlotWarps, row_warp = warp / C::kSlotWarps;
  float *const maxima = statistics, *const sums = statistics + C::kSlotWarps * C::kRows;
#pragma unroll
  for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = state.sum[n][i];
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
      if (lane < 4) {
        const int at = slot_warp * C::kRows + row_warp * C::kWarpRows + n * 8 + 2 * lane + i;
        maxima[at] = state.maximum[n][i];
        sums[at] = sum;
      }
    }
  }
  sync_consumers<C::kConsumers>();

  const auto maximum_of = [&](int row) {
    float maximum = maxima[row];
#pragma unroll
    for (int w = 1; w < C::kSlotWarps; ++w) maximum = fmaxf(maximum, maxima[w * C::kRows + row]);
    return maximum;
  };
  const auto factor_of = [&](float own, float maximum) {
    return own == -kInfinity ? 0.0f : exp2_fast((own - maximum) * scale_log2);
  };
  const auto total_of = [&](int row, float maximum) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < C::kSlotWarps; ++w) {
      total += sums[w * C::kRows + row] * factor_of(maxima[w * C::kRows + row], maximum);
    }
    return total;
  };

  const uint32_t first_packed = segment.tile * C::kRows, packed_rows = segment.span.q_count * group - first_packed;
  const bool whole = segment.count == segment.blocks;
  const int64_t workspace_row =
      (static_cast<int64_t>(2 * worker + (segment.first == 0 ? 1 : 0)) * p.kv_heads + head) * C::kRows;
  const auto token_and_head = [&](int r) -> int64_t {
    const uint32_t packed = first_packed + r, query = packed / group;
    return static_cast<int64_t>(segment.span.q_begin + query) * p.q_heads + (head * group + (packed - query * group));
  };

  constexpr int kRounds = C::kHeadSize / C::kMergeColumns, kVectors = C::kMergeColumns / 4;
#pragma unroll
  for (int n = 0; n < C::kRowTiles; ++n) {
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      factor[i] = factor_of(state.maximum[n][i], maximum_of(row_warp * C::kWarpRows + n * 8 + lane % 4 * 2 + i));
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      float* const own = merge + warp * (8 * C::kMergePitch);
#pragma unroll
      for (int m = 0; m < C::kMergeColumns / 16; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          own[(lane % 4 * 2 + i % 2) * C::kMergePitch + column_of<C>(m, i, lane)] =
              state.o[round * (C::kMergeColumns / 16) + m][n][i] * factor[i % 2];
        }
      }
      sync_consumers<C::kConsumers>();
#pragma unroll 1
      for (int item = thread; item < C::kRowWarps * 8 * kVectors; item += C::kConsumers) {
        const int vector = item % kVectors, row8 = item / kVectors % 8, rows = item / (8 * kVectors);
        const int r = rows * C::kWarpRows + n * 8 + row8;
        if (r >= packed_rows) continue;
        float4 sum{};
#pragma unroll
        for (int w = 0; w < C::kSlotWarps; ++w) {
          const float4 x = *reinterpret_cast<const float4*>(
              merge + ((rows * C::kSlotWarps + w) * 8 + row8) * C::kMergePitch + 4 * vector);
          sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        const float maximum = maximum_of(r), total = total_of(r, maximum);
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
        sum.x *= inverse, sum.y *= inverse, sum.z *= inverse, sum.w *= inverse;
        // only -inf, or no slot
        const float lse = total == 0.0f ? -kInfinity : maximum * scale_log2 - C::kWeightShift + log2f(total);
        const int column = round * C::kMergeColumns + 4 * vector;
        if (whole) {
          const int64_t at = token_and_head(r);
          *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + at * C::kHeadSize + column) =
              make_uint2(pack_pair(T{}, sum.x, sum.y), pack_pair(T{}, sum.z, sum.w));
          if (column == 0) p.lse[at] = lse * kLn2;
        } else {
          *reinterpret_cast<float4*>(p.partial_out + (workspace_row + r) * C::kHeadSize + column) = sum;
          if (column == 0) p.partial_lse[workspace_row + r] = lse;
        }
      }
      sync_consumers<C::kConsumers>();
    }
  }
}

// Marks what a worker may write to the workspace as absent, then lets the merging kernel start, which therefore never
// sees the results of an earlier call. Lanes from `first_lane` of one warp take part.
template <class C>
__device__ __forceinline__ void mark_absent(const InjectedAttentionParams& p, uint32_t group, int head, int worker,
                                            int first_lane, uint64_t* marked) {
  const int lane = threadIdx.x % 32;
  const uint32_t rows = min(static_cast<uint32_t>(C::kRows), static_cast<uint32_t>(p.num_queries) * group);
  const float absent = __uint_as_float(kAbsent);
  for (int part = 0; part < 2; ++part) {
    const int64_t first_row = (static_cast<int64_t>(2 * worker + part) * p.kv_heads + head) * C::kRows;
    float4* const out = reinterpret_cast<float4*>(p.partial_out + first_row * C::kHeadSize);
    for (uint32_t i = lane - first_lane; i < rows * (C::kHeadSize / 4); i += 32 - first_lane) {
      out[i] = make_float4(absent, absent, absent, absent);
    }
    if (lane - first_lane < rows) p.partial_lse[first_row + lane - first_lane] = absent;
  }
  __threadfence();
  __syncwarp(kFullWarp << first_lane);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (lane == first_lane) {
    // results are ordered after their marks
    barrier_arrive(marked);
    let_next_kernel_start();
  }
#endif
}

// cp.async loads by the consumers themselves; they run ahead of the matmuls, across segments.
template <class C>
struct Loader {
  Walk<C::kRows, C::kSlots> walk;
  uint32_t left = 0;
  int stage = 0;

  __device__ __forceinline__ void next(const InjectedAttentionParams& p, const Scales* scales, uint32_t group, int head,
                                       uint8_t* shared) {
    while (left == 0) {
      if (!walk.next(p, group)) {
        commit_copies();
        return;
      }
      left = walk.span.slot_count == 0 ? 0 : walk.count;
    }
    const uint32_t block = walk.first + walk.count - left;
    const int64_t slot = walk.span.slot_begin + static_cast<int64_t>(block) * C::kSlots;
    const int valid = walk.span.slot_count - static_cast<int>(block * C::kSlots);
    constexpr int kChunks = C::kRowBytes / 16, kElement = C::kEightBit ? 1 : 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t* const stride = i == 0 ? p.k_stride : p.v_stride;
      const uint8_t* const from =
          static_cast<const uint8_t*>(i == 0 ? p.k : p.v) + (slot * stride[0] + head * stride[1]) * kElement;
      const uint32_t to = shared_address(shared) + (2 * stage + i) * C::kTileBytes;
#pragma unroll 4
      for (int item = threadIdx.x; item < C::kSlots * kChunks; item += C::kConsumers) {
        const int r = item / kChunks, chunk = item % kChunks;
        const bool inside = r < valid;
        copy16_async(to + swizzle(r * C::kRowBytes + chunk * 16),
                     from + (inside ? r * stride[0] * kElement + chunk * 16 : 0), inside);
      }
      if constexpr (C::kEightBit) {
        const float* const scale = i == 0 ? scales->key : scales->value;
        const int64_t* const scale_stride = i == 0 ? scales->key_stride : scales->value_stride;
        for (int r = threadIdx.x; r < C::kSlots; r += C::kConsumers) {
          copy4_async(shared_address(shared) + C::kScaleOffset + (2 * stage + i) * C::kScaleBytes + r * 4,
                      scale + (slot + (r < valid ? r : 0)) * scale_stride[0] + head * scale_stride[1], r < valid);
        }
      }
    }
    commit_copies();
    --left;
    if (++stage == C::kStages) stage = 0;
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    attend(const __grid_constant__ InjectedAttentionParams p,
           const __grid_constant__ std::conditional_t<C::kBulk, BulkMaps, Nothing> maps,
           const __grid_constant__ std::conditional_t<C::kEightBit, Scales, Nothing> scales, uint64_t hint,
           bool awaited) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr bool kCompiled = true;
  // the merging kernel may become resident beside this one and wait
  if (!C::kMayAwait || !awaited) let_next_kernel_start();
#else
  constexpr bool kCompiled = !C::kBulk;
#endif
  if constexpr (kCompiled) {
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ PlaceScan scan;
    uint8_t* const queries_shared = shared + C::kRingBytes;
    float* const tile_scales = reinterpret_cast<float*>(shared + C::kScaleOffset);
    float* const statistics = reinterpret_cast<float*>(shared + C::kStatisticsOffset);
    float* const row_largest = reinterpret_cast<float*>(shared + C::kRowScaleOffset);
    uint64_t* const full = reinterpret_cast<uint64_t*>(shared + C::kBarrierOffset);  // keys and values alternate
    uint64_t* const empty = full + 2 * C::kStages;
    uint64_t* const queries_issued = empty + 2 * C::kStages;
    uint64_t* const marked = queries_issued + 1;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.x % p.kv_heads, worker = blockIdx.x / p.kv_heads;
    const uint32_t group = static_cast<uint32_t>(p.q_heads) / static_cast<uint32_t>(p.kv_heads);

    // A single row usually reads all slots: the first block is requested before the row's slots are known.
    int32_t guess = -1;
    if (C::kMayAwait && !C::kEightBit && awaited) {
      const uint32_t units = (static_cast<uint32_t>(p.num_slots) + C::kSlots - 1) / C::kSlots;
      const uint32_t first = (units + p.splits - 1) / p.splits * worker;
      if (first < units) guess = static_cast<int32_t>(first * C::kSlots);
    }

    if constexpr (C::kBulk) {
      if (threadIdx.x == C::kConsumers) {
        prefetch_tensor_map(&maps.key);
        prefetch_tensor_map(&maps.value);
#pragma unroll 1
        for (int i = 0; i < 2 * C::kStages; ++i) {
          barrier_init(full + i, C::kEightBit ? 33 : 1);
          barrier_init(empty + i, C::kWarps);
        }
        barrier_init(queries_issued, C::kWarps);
        barrier_init(marked, 1);
        barrier_init_fence();
        if (guess >= 0) {
#pragma unroll 1
          for (int i = 0; i < 2; ++i) {
            barrier_arrive_expect(full + i, C::kTileBytes);
            tensor_load_4d(shared + i * C::kTileBytes, i == 0 ? &maps.key : &maps.value, full + i, 0, 0, head, guess,
                           hint);
          }
        }
      }
    }
    uint64_t begin = 0, count = 0;
    const Place place = find_place<C::kRows, C::kSlots, C::kThreads, false>(p, group, scan, [&](uint64_t units) {
      const uint64_t share = worker_share(units, p.splits);
      begin = share * worker;
      count = begin < units ? (units - begin < share ? units - begin : share) : 0;
      return begin;
    });
    Walk<C::kRows, C::kSlots> walk;
    walk.begin(place, group, begin, count);
    // stage 0 holds a wrong guess
    bool missed = guess >= 0 && (count == 0 || place.span.slot_count == 0 ||
                                 place.span.slot_begin + static_cast<int32_t>(walk.first * C::kSlots) != guess);
    if constexpr (C::kBulk) {
      // the consumers see the producer's barriers
      if (warp == C::kWarps) {
        named_barrier_arrive(2, C::kThreads);
      } else {
        named_barrier_sync(2, C::kThreads);
      }
    }

    if constexpr (C::kBulk) {
      if (warp == C::kWarps) {
        if (!C::kEightBit && lane != 0) {
          if (C::kMayAwait && awaited && count > 0) mark_absent<C>(p, group, head, worker, 1, marked);
          return;
        }
        int stage = missed ? 1 : 0;
        bool loaded = guess >= 0 && !missed;
        uint32_t phase = 1;
        bool first = true;
        while (walk.next(p, group)) {
          if (walk.span.slot_count == 0) continue;
          int32_t slot = walk.span.slot_begin + static_cast<int32_t>(walk.first * C::kSlots);
#pragma unroll 1
          for (uint32_t n = 0; n < walk.count; ++n, slot += C::kSlots) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              uint64_t* const barrier = full + 2 * stage + i;
              // A block guessed right already has its stage. The consumers may have finished with it by now: waiting
              // for an empty stage would be waiting for its next use.
              if (!loaded) barrier_wait(empty + 2 * stage + i, phase);
              if ((!C::kEightBit || lane == 0) && !loaded) {
                barrier_arrive_expect(barrier, C::kTileBytes);
                tensor_load_4d(shared + (2 * stage + i) * C::kTileBytes, i == 0 ? &maps.key : &maps.value, barrier, 0,
                               0, head, slot, hint);
              }
              if constexpr (C::kEightBit) {
                const float* const from =
                    i == 0 ? scales.key + head * scales.key_stride[1] : scales.value + head * scales.value_stride[1];
                const int64_t stride = i == 0 ? scales.key_stride[0] : scales.value_stride[0];
#pragma unroll
                for (int r = lane; r < C::kSlots; r += 32) {
                  const bool inside = slot + r < p.num_slots;
                  copy4_async(shared_address(tile_scales + (2 * stage + i) * C::kSlots + r),
                              from + (inside ? slot + r : 0) * stride, inside);
                }
                barrier_arrive_after_copies(barrier);
              }
            }
            if (++stage == C::kStages) {
              stage = 0;
              phase ^= 1;
            }
            // the queries' loads go first: queued after a full ring they would take as long as the ring
            loaded = false;
            if (C::kEightBit && C::kMayAwait && awaited && first) {
              mark_absent<C>(p, group, head, worker, 0, marked);
            }
            if (first) barrier_wait(queries_issued, 0);
            first = false;
          }
        }
        // no slots, no block
        if (C::kEightBit && C::kMayAwait && awaited && first && count > 0) {
          mark_absent<C>(p, group, head, worker, 0, marked);
        }
        return;
      }
    }

    // a negative scale negates the queries, so that the largest score is always the best one; a scale of 0 makes them 0
    const float full_scale_log2 = (p.scale == 0 ? 1.0f : fabsf(p.scale)) * kLog2E;
    const float query_factor = p.scale == 0 ? 0.0f : p.scale < 0 ? -1.0f : 1.0f;
    // 8-bit scores are already scaled
    const float scale_log2 = C::kEightBit ? 1.0f : full_scale_log2;
    const int row_warp = warp / C::kSlotWarps;
    int stage = 0;
    uint32_t phase = 0;
    bool first = true;
    const auto skip_missed = [&] {
      if (!missed) return;
      barrier_wait(full, 0);
      barrier_wait(full + 1, 0);
      // all lanes have seen this phase before the next one can come
      __syncwarp();
      if (lane == 0) {
        barrier_arrive(empty);
        barrier_arrive(empty + 1);
      }
      missed = false;
      stage = 1;
    };
    Loader<C> loader{walk};
    const Scales* loader_scales = nullptr;
    if constexpr (C::kEightBit) loader_scales = &scales;
    if constexpr (!C::kBulk) {
#pragma unroll 1
      for (int i = 0; i < C::kStages - 1; ++i) loader.next(p, loader_scales, group, head, shared);
    }

#pragma unroll 1
    while (walk.next(p, group)) {
      load_queries<C>(p, walk.span, walk.tile, group, head, queries_shared, query_factor, row_largest,
                      C::kBulk && first ? queries_issued : nullptr);
      if constexpr (C::kBulk) {
        first = false;
      }
      sync_consumers<C::kConsumers>();
      if constexpr (C::kBulk) skip_missed();
      const Queries<C> queries(shared_address(queries_shared), row_warp * C::kWarpRows);
      float row_scale[C::kRowTiles][2];
      if constexpr (C::kEightBit) {
#pragma unroll
        for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int r = row_warp * C::kWarpRows + n * 8 + lane % 4 * 2 + i;
            row_scale[n][i] = query_divisor(row_largest[r]) * full_scale_log2;
          }
        }
      }
      WarpState<C> state;
      state.clear();
      int valid = walk.span.slot_count - static_cast<int>(walk.first * C::kSlots);
      // a row without slots has one block, and nothing in it
      const uint32_t blocks = walk.span.slot_count == 0 ? 0 : walk.count;
#pragma unroll 1
      for (uint32_t n = 0; n < blocks; ++n, valid -= C::kSlots) {
        const uint32_t keys = shared_address(shared) + 2 * stage * C::kTileBytes, values = keys + C::kTileBytes;
        Scores<C> s;
        if constexpr (C::kBulk) {
          barrier_wait(full + 2 * stage, phase);
        } else {
          wait_copies<C::kStages - 2>();
          sync_consumers<C::kConsumers>();
          loader.next(p, loader_scales, group, head, shared);
        }
        multiply_keys<C>(keys, queries, s);
        if constexpr (C::kEightBit) scale_scores<C>(tile_scales + 2 * stage * C::kSlots, row_scale, s);
        if (valid < C::kSlots) mask_scores<C>(valid, s);
        float value_scales[C::kSlotTiles][2];
        if constexpr (C::kEightBit) {
          if constexpr (C::kBulk) barrier_wait(full + 2 * stage + 1, phase);
#pragma unroll
          for (int t = 0; t < C::kSlotTiles; ++t) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int slot = warp_slot<C>() + t * 16 + lane / 4 + 8 * j;
              value_scales[t][j] = slot < valid ? tile_scales[(2 * stage + 1) * C::kSlots + slot] : 0.0f;
            }
          }
        }
        weigh<C>(s, state, scale_log2, value_scales);
        if constexpr (C::kBulk) {
          // An arrival does not wait for loads on their way from shared memory to registers. These keys have arrived,
          // since the vote on their scores is over, and with them the values of the previous block.
          if (lane == 0) {
            barrier_arrive(empty + 2 * stage);
            if (n > 0) barrier_arrive(empty + 2 * (stage > 0 ? stage : C::kStages) - 1);
          }
          __syncwarp();
        }
        if constexpr (C::kBulk && !C::kEightBit) barrier_wait(full + 2 * stage + 1, phase);
        multiply_values<C>(values, valid, s, state);
        if (++stage == C::kStages) {
          stage = 0;
          phase ^= 1;
        }
      }
      if (C::kMayAwait && awaited) barrier_wait(marked, 0);
      finish_segment<C>(p, walk, group, head, worker, scale_log2, state, reinterpret_cast<float*>(queries_shared),
                        statistics);
      if constexpr (C::kBulk) {
        if (blocks > 0 && lane == 0) barrier_arrive(empty + 2 * (stage > 0 ? stage : C::kStages) - 1);
      }
    }
    // copies must not outlive the block
    if constexpr (C::kBulk) skip_missed();
  }
}

// ---- merging ----

constexpr int kMergeWarps = 4, kMergeThreads = 32 * kMergeWarps, kMergeLoads = 8;
static_assert(kMergeWarps * kMergeLoads == 32);
// While more parts than this are absent, only their statistics are polled.
constexpr int kFewParts = 4;
// Polls before we give up and wait for the producing kernel (about 50 ms). Then the parts are taken as they are, so
// that nothing can keep this kernel from ending.
constexpr int kPatience = 1 << 16;

__device__ __forceinline__ bool is_absent(float x) { return __float_as_uint(x) == kAbsent; }
// One block merges one packed row of one tile that several workers shared; its warps take the parts alternately.
// kByTile: block -> tile; else block -> worker that has the first part of a shared tile. `rows`: those of a tile that a
// batch of this size can fill.
template <class T, int kHeadSize, int kRows, int kSlots, bool kByTile, bool kMayAwait>
__global__ void __launch_bounds__(kMergeThreads)
    merge_parts(const __grid_constant__ InjectedAttentionParams p, int32_t rows, bool await_parts) {
  const bool awaits = kMayAwait && await_parts;
  constexpr int kVectors = kHeadSize / 4, kColumns = (kVectors + 31) / 32;
  __shared__ PlaceScan scan;
  __shared__ float4 shared[kMergeWarps][kColumns * 32];
  const int r = blockIdx.x % rows, head = blockIdx.x / rows % p.kv_heads, index = blockIdx.x / rows / p.kv_heads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t group = static_cast<uint32_t>(p.q_heads) / static_cast<uint32_t>(p.kv_heads);
  uint64_t share = 1, unit = 0;
  const Place place = find_place<kRows, kSlots, kMergeThreads, kByTile>(p, group, scan, [&](uint64_t units) {
    share = worker_share(units, p.splits);
    if (kByTile) return static_cast<uint64_t>(index);
    // the worker's last unit
    unit = share * (index + 1) - 1;
    return unit;
  });
  int first_worker = 0, parts = 0;
  int64_t token_and_head = 0;
  if (place.row >= 0) {
    const uint32_t blocks = blocks_of<kSlots>(place.span);
    const uint32_t tile =
        static_cast<uint32_t>(kByTile ? index - place.tiles_before : (unit - place.units_before) / blocks);
    const uint64_t begin = place.units_before + static_cast<uint64_t>(tile) * blocks;
    first_worker = static_cast<int>(begin / share);
    const int last_worker = static_cast<int>((begin + blocks - 1) / share);
    const uint32_t packed = tile * kRows + r, query = packed / group;
    if (packed < place.span.q_count * group && (kByTile || first_worker == index))
      parts = last_worker - first_worker + 1;
    token_and_head =
        static_cast<int64_t>(place.span.q_begin + query) * p.q_heads + (head * group + (packed - query * group));
  }
  // by all blocks, also those without work: a later kernel must not overtake the one before this
  if (parts <= 1) {
    wait_for_previous_kernel();
    return;
  }
  const auto workspace_row = [&](int part) {
    return (static_cast<int64_t>(2 * (first_worker + part) + (part == 0 ? 1 : 0)) * p.kv_heads + head) * kRows + r;
  };

  // When waiting for parts, first run without them: code and addresses are then in the caches when they come.
#pragma unroll 1
  for (int pass = awaits ? 0 : 1; pass < 2; ++pass) {
    const bool rehearsal = pass == 0;
    if (!awaits) wait_for_previous_kernel();
    float maximum = -kInfinity, total = 0;
    float4 sum[kColumns]{};
    // every warp sees the statistics of all parts, and reads the results of its own
#pragma unroll 1
    for (int base = 0; base < parts; base += 32) {
      float lse = -kInfinity;
      int patience = kPatience;
      // only these while most are absent: polling all results would slow the previous kernel down
      if (base + lane < parts) lse = load_strong(p.partial_lse + workspace_row(base + lane));
      if (awaits && !rehearsal) {
        while (__popc(__ballot_sync(kFullWarp, is_absent(lse))) > kFewParts && --patience > 0) {
          if (base + lane < parts) lse = load_strong(p.partial_lse + workspace_row(base + lane));
        }
      }
      float4 x[kMergeLoads][kColumns];
#pragma unroll
      for (int j = 0; j < kMergeLoads; ++j) {
        const int part = base + j * kMergeWarps + warp;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          x[j][c] = float4{};
          if (part < parts && c * 32 + lane < kVectors) {
            x[j][c] = load_strong(reinterpret_cast<const float4*>(p.partial_out + workspace_row(part) * kHeadSize) +
                                  c * 32 + lane);
          }
        }
      }
      if (awaits && !rehearsal) {
        bool absent = true;
        while (__any_sync(kFullWarp, absent) && patience >= 0) {
          if (--patience <= 0) {
            wait_for_previous_kernel();
            patience = -1;
          }
          absent = is_absent(lse);
          if (absent) lse = load_strong(p.partial_lse + workspace_row(base + lane));
#pragma unroll
          for (int j = 0; j < kMergeLoads; ++j) {
            const int part = base + j * kMergeWarps + warp;
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
              if (is_absent(x[j][c].x) || is_absent(x[j][c].y) || is_absent(x[j][c].z) || is_absent(x[j][c].w)) {
                absent = true;
                x[j][c] = load_strong(reinterpret_cast<const float4*>(p.partial_out + workspace_row(part) * kHeadSize) +
                                      c * 32 + lane);
              }
            }
          }
        }
      }
      float highest = fmaxf(lse, maximum);
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, offset));
      }
      const float shift = highest == -kInfinity ? 0.0f : highest;
      const float shrink = exp2f(maximum - shift), weight = exp2f(lse - shift);
      float weights = weight;
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) weights += __shfl_xor_sync(kFullWarp, weights, offset);
      total = total * shrink + weights;
      maximum = highest;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        sum[c].x *= shrink, sum[c].y *= shrink, sum[c].z *= shrink, sum[c].w *= shrink;
      }
#pragma unroll
      for (int j = 0; j < kMergeLoads; ++j) {
        const float w = __shfl_sync(kFullWarp, weight, j * kMergeWarps + warp);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          sum[c].x = fmaf(w, x[j][c].x, sum[c].x), sum[c].y = fmaf(w, x[j][c].y, sum[c].y);
          sum[c].z = fmaf(w, x[j][c].z, sum[c].z), sum[c].w = fmaf(w, x[j][c].w, sum[c].w);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) shared[warp][c * 32 + lane] = sum[c];
    __syncthreads();
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    if (threadIdx.x < kVectors) {
      float4 y = shared[0][threadIdx.x];
#pragma unroll
      for (int w = 1; w < kMergeWarps; ++w) {
        const float4 x = shared[w][threadIdx.x];
        y.x += x.x, y.y += x.y, y.z += x.z, y.w += x.w;
      }
      uint2* const out =
          reinterpret_cast<uint2*>(static_cast<T*>(p.out) + token_and_head * kHeadSize + 4 * threadIdx.x);
      const uint2 packed =
          make_uint2(pack_pair(T{}, y.x * inverse, y.y * inverse), pack_pair(T{}, y.z * inverse, y.w * inverse));
      if (rehearsal) {
        prefetch_line(out);
      } else {
        *out = packed;
      }
    }
    if (threadIdx.x == 0) {
      float* const lse = p.lse + token_and_head;
      const float merged = total == 0.0f ? -kInfinity : (maximum + log2f(total)) * kLn2;
      if (rehearsal) {
        prefetch_line(lse);
      } else {
        *lse = merged;
      }
    }
    __syncthreads();
  }
  if (awaits) wait_for_previous_kernel();
}

// ---- launch ----

template <class C, bool kByTile>
constexpr auto merge_kernel = merge_parts<typename C::T, C::kHeadSize, C::kRows, C::kSlots, kByTile, C::kMayAwait>;

template <class Kernel>
cudaError_t prepare_merge(Kernel* kernel) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

template <class C>
cudaError_t launch_merge(const InjectedAttentionParams& p, bool awaits, cudaStream_t stream) {
  const int64_t group = p.q_heads / p.kv_heads;
  // tiles that any batch of this size can have; each of them is shared at most once, and so is each worker's last one
  const int64_t tiles = p.num_queries * group / C::kRows + p.num_rows;
  const bool by_tile = tiles < p.splits;
  const int32_t rows = static_cast<int32_t>(std::min<int64_t>(C::kRows, p.num_queries * group));
  const int64_t blocks = (by_tile ? tiles : p.splits) * p.kv_heads * rows;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kMergeThreads);
  config.stream = stream;
  // PDL: its blocks become resident while the last blocks of the previous kernel run, find their place and wait
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = C::kBulk ? 1 : 0;
  return cudaLaunchKernelEx(&config, by_tile ? merge_kernel<C, true> : merge_kernel<C, false>, p, rows, awaits);
}

// A box holds kSlots slots of one head, cut into pieces of 128 bytes, whole heads one after the other.
template <class C>
cudaError_t encode_map(CUtensorMap* map, const InjectedAttentionParams& p, const void* base,
                       const int64_t (&stride)[2]) {
  // in units of 16 bits, whatever the element type
  constexpr int kUnits = C::kRowBytes / 2, kPiece = 64;
  constexpr int kElements = C::kEightBit ? 2 : 1;  // in a unit
  const int64_t sizes[4] = {kPiece, kUnits / kPiece, p.kv_heads, p.num_slots};
  const int64_t strides[3] = {kPiece, stride[1] / kElements, stride[0] / kElements};
  const int32_t box[4] = {kPiece, kUnits / kPiece, 1, C::kSlots};
  // without slots nothing is read, and there may be no memory
  return encode_tensor_map_4d(map, FloatType::kFloat16, p.num_slots > 0 ? base : p.q, sizes, strides, box);
}

// Once per device: the kernel may use the shared memory that it needs, and it was compiled for this device.
template <class C>
cudaError_t prepare_kernel() {
  static std::atomic<uint64_t> prepared{0};
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (prepared.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  if (C::kBulk) {
    bool waits = false;
    status = code_waits(attend<C>, &waits);
    if (status != cudaSuccess) return status;
    // compiled for less, the kernel is empty
    if (!waits) return cudaErrorNotSupported;
  }
  status = cudaFuncSetAttribute(attend<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
  if (status != cudaSuccess) return status;
  // with another split of L1 cache and shared memory its blocks could not be resident beside those of the previous
  // kernel
  status = prepare_merge(merge_kernel<C, true>);
  if (status != cudaSuccess) return status;
  status = prepare_merge(merge_kernel<C, false>);
  if (status != cudaSuccess) return status;
  prepared.fetch_or(bit, std::memory_order_relaxed);
  return cudaSuccess;
}

template <class C>
cudaError_t launch(const InjectedAttentionParams& p, const Scales* scales, cudaStream_t stream) {
  std::conditional_t<C::kBulk, BulkMaps, Nothing> maps;
  std::conditional_t<C::kEightBit, Scales, Nothing> kernel_scales;
  const int64_t blocks = int64_t{p.splits} * p.kv_heads;
  if (p.num_slots > INT32_MAX || p.num_rows > INT32_MAX || p.num_queries * p.q_heads > INT32_MAX ||
      p.num_positions > INT32_MAX || blocks > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  cudaError_t status = prepare_kernel<C>();
  if (status != cudaSuccess) return status;
  if constexpr (C::kBulk) {
    status = encode_map<C>(&maps.key, p, p.k, p.k_stride);
    if (status != cudaSuccess) return status;
    status = encode_map<C>(&maps.value, p, p.v, p.v_stride);
    if (status != cudaSuccess) return status;
  }
  if constexpr (C::kEightBit) kernel_scales = *scales;
  // What the caches cannot hold anyway should not evict the rest; much more than that streams faster without the hint:
  // 36.8 against 40.8 us for 67 MB, 194.6 against 188.5 us for 537 MB.
  constexpr int64_t kLarge = int64_t{128} << 20;
  const int64_t bytes = 2 * p.num_slots * p.kv_heads * C::kRowBytes;
  constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
  const uint64_t hint = bytes > kLarge ? kEvictNormal : kEvictFirst;
  // Waiting for parts instead of the kernel's end saves 1 us for 67 MB. For less the merging kernel comes too late; for
  // more its polling costs more than it saves (3 us of 183 for 537 MB).
  constexpr int64_t kSmall = int64_t{32} << 20;
  const bool awaits = C::kMayAwait && p.splits > 1 && p.num_rows == 1 &&
                      p.num_queries * (p.q_heads / p.kv_heads) <= C::kRows && bytes >= kSmall && bytes <= kLarge;
  attend<C>
      <<<static_cast<unsigned>(blocks), C::kThreads, C::kSharedBytes, stream>>>(p, maps, kernel_scales, hint, awaits);
  status = cudaGetLastError();
  if (status != cudaSuccess || p.splits == 1) return status;
  return launch_merge<C>(p, awaits, stream);
}

// Chooses the tile. The slots of a block make 16 KB of keys (32 KB for 256 columns of 16 bits).
template <class T, class Code, int kHeadSize>
cudaError_t launch_bulk(const InjectedAttentionParams& p, const Scales* scales, cudaStream_t stream) {
  constexpr int kBytes = kHeadSize * sizeof(Code);
  // TMA's swizzle takes pieces of 128 bytes; other sizes use cp.async
  if constexpr (kBytes % 128 != 0) {
    return cudaErrorNotSupported;
  } else {
    constexpr int kSlots = kBytes <= 128 ? 128 : 64;
    constexpr bool kWide = kHeadSize == 256;
    // as many stages as fit beside the rest
    constexpr int kStages = kBytes == 512 ? 3 : 6, kFewerStages = kBytes == 512 ? 3 : kWide ? 5 : 6;
    switch (decode_tile_rows(p)) {
      case 8:
        return launch<Config<T, Code, kHeadSize, kSlots, 4, 1, 1, kStages, true>>(p, scales, stream);
      case 16:
        return launch<Config<T, Code, kHeadSize, kSlots, 4, kWide ? 2 : 1, kWide ? 1 : 2, kStages, true>>(p, scales,
                                                                                                          stream);
      case 32:
        return launch<Config<T, Code, kHeadSize, kSlots, kWide ? 2 : 4, kWide ? 4 : 2, kWide ? 1 : 2, kStages, true>>(
            p, scales, stream);
      default:
        return launch<Config<T, Code, kHeadSize, kSlots, 2, kWide ? 8 : 4, kWide ? 1 : 2, kFewerStages, true>>(
            p, scales, stream);
    }
  }
}

// Two stages: below the 99 KB of the smaller GPUs, and two blocks per SM on the larger ones. Three where two such
// blocks fit: 34.8 against 35.5 us for 67 MB, and 183.5 against 187.2 us for 537 MB, there with one block per SM
// (plan_injected_attention_decode).
template <class T, class Code, int kHeadSize>
cudaError_t launch_portable(const InjectedAttentionParams& p, const Scales* scales, cudaStream_t stream) {
  constexpr int kBytes = kHeadSize * sizeof(Code);
  constexpr bool kWide = kHeadSize == 256;
  constexpr int kSlots = kBytes == 512 ? 32 : kBytes <= 128 ? 128 : 64, kSlotWarps = kSlots == 32 ? 2 : 4;
  switch (decode_tile_rows(p)) {
    case 8: {
      using Deep = Config<T, Code, kHeadSize, kSlots, kSlotWarps, 1, 1, 3, false>;
      int shared_bytes = 0;
      const cudaError_t status = current_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &shared_bytes);
      if (status != cudaSuccess) return status;
      // each block takes up to 2 KB besides
      if (shared_bytes >= 2 * (Deep::kSharedBytes + 2048)) return launch<Deep>(p, scales, stream);
      return launch<Config<T, Code, kHeadSize, kSlots, kSlotWarps, 1, 1, 2, false>>(p, scales, stream);
    }
    case 16:
      return launch<Config<T, Code, kHeadSize, kSlots, kSlotWarps, kWide ? 2 : 1, kWide ? 1 : 2, 2, false>>(p, scales,
                                                                                                            stream);
    case 32:
      return launch<Config<T, Code, kHeadSize, kSlots, 2, kWide ? 4 : 2, kWide ? 1 : 2, 2, false>>(p, scales, stream);
    default:
      return launch<Config<T, Code, kHeadSize, kSlots, 2, kWide ? 8 : 4, kWide ? 1 : 2, 2, false>>(p, scales, stream);
  }
}

}  // namespace decode

template <class T, int kHeadSize>
cudaError_t launch_injected_attention_decode_bulk(const InjectedAttentionParams& p, cudaStream_t stream) {
  return decode::launch_bulk<T, T, kHeadSize>(p, nullptr, stream);
}
template <class T, int kHeadSize>
cudaError_t launch_injected_attention_decode_portable(const InjectedAttentionParams& p, cudaStream_t stream) {
  return decode::launch_portable<T, T, kHeadSize>(p, nullptr, stream);
}

}  // namespace sharedllm

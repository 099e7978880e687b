// Injected attention for a few queries per row. The slots of all rows are cut into blocks and dealt out evenly to
// workers; a worker walks its blocks, whatever rows they belong to. Rows that several workers share are merged by a
// second kernel. Scores are computed transposed (slots x packed rows), so that eight packed rows fill a product of the
// tensor cores. docs/kernels/injected_attention_decode.md has the derivation.
#pragma once

#include <algorithm>

#include "kernels/common/attention_rows.cuh"
#include "kernels/common/hopper.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/common/query_rotation.cuh"
#include "kernels/common/tensor_map.h"
#include "kernels/injected_attention_decode.h"

namespace sharedllm {
namespace decode {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_inff();
// The maximum is only raised when it grows by a factor of 2^8 in the weights: until then float32 sums lose nothing, and
// the exchange between lanes and the rescaling of the accumulators are skipped.
constexpr float kGrowth = 8.0f;

// ---- which slots a worker reads ----

// The work of a batch row: its tiles of packed rows times its blocks of slots. A row without slots counts as one block,
// so that somebody writes its zeros.
struct RowWork {
  int64_t tiles, blocks;
};
template <int kRows, int kSlots>
__device__ __forceinline__ RowWork row_work(const InjectedAttentionParams& p, const RowTile& row) {
  const int64_t group = p.q_heads / p.kv_heads;
  const int64_t blocks = (row.slot_count + kSlots - 1) / kSlots;
  return {(row.q_count * group + kRows - 1) / kRows, blocks > 0 ? blocks : 1};
}

// Where a unit of work (a block of slots of a tile; rows, then tiles, then blocks) or a tile lies.
struct Place {
  int64_t row;           // -1: there is no such unit
  int64_t units_before;  // of the rows before
  int64_t tiles_before;
};

struct PlaceScan {
  int64_t units[32], tiles[32];  // of each warp's rows
  Place found;
};

// Finds the row of a unit, or of a tile. All threads of the block take part and get the result; `target` sees the total
// number of units first.
template <int kRows, int kSlots, int kThreads, bool kByTile, class Target>
__device__ __forceinline__ Place find_place(const InjectedAttentionParams& p, PlaceScan& scan, int64_t* total_units,
                                            const Target& target) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  // neighbouring rows to a thread
  const int64_t each = (p.num_rows + kThreads - 1) / kThreads;
  const int64_t first = clamp_index(thread * each, 0, p.num_rows), end = clamp_index(first + each, 0, p.num_rows);
  const auto work_of = [&](int64_t row) {
    RowTile found;
    load_row(p, row, &found);
    return row_work<kRows, kSlots>(p, found);
  };
  int64_t units = 0, tiles = 0;
#pragma unroll 4
  for (int64_t row = first; row < end; ++row) {
    const RowWork work = work_of(row);
    units += work.tiles * work.blocks;
    tiles += work.tiles;
  }
  int64_t units_through = units, tiles_through = tiles;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int64_t other_units = __shfl_up_sync(0xffffffffu, units_through, offset);
    const int64_t other_tiles = __shfl_up_sync(0xffffffffu, tiles_through, offset);
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
  int64_t units_before = units_through - units, tiles_before = tiles_through - tiles, total = 0;
#pragma unroll
  for (int other = 0; other < kThreads / 32; ++other) {
    if (other < warp) {
      units_before += scan.units[other];
      tiles_before += scan.tiles[other];
    }
    total += scan.units[other];
  }
  *total_units = total;
  const int64_t wanted = target(total);
  const int64_t before = kByTile ? tiles_before : units_before, inside = kByTile ? tiles : units;
  if (before <= wanted && wanted < before + inside) {
    for (int64_t row = first; row < end; ++row) {
      const RowWork work = work_of(row);
      const int64_t row_units = work.tiles * work.blocks;
      if (wanted < (kByTile ? tiles_before + work.tiles : units_before + row_units)) {
        scan.found = {row, units_before, tiles_before};
        break;
      }
      units_before += row_units;
      tiles_before += work.tiles;
    }
  }
  __syncthreads();
  return scan.found;
}

// Units of worker w are [worker_begin(w), worker_begin(w + 1)); no worker is without one.
__device__ __forceinline__ int64_t used_workers(int64_t units, int64_t workers) {
  return units < workers ? units : workers;
}
__device__ __forceinline__ int64_t worker_begin(int64_t units, int64_t used, int64_t worker) {
  return units * worker / used;
}
__device__ __forceinline__ int64_t worker_of(int64_t units, int64_t used, int64_t unit) {
  return ((unit + 1) * used - 1) / units;
}

// Blocks of one tile that a worker reads in one go.
struct Segment {
  RowTile row;
  int64_t first, count, blocks;  // blocks [first, first + count) of the row's `blocks`
};

// Walks the segments of a worker.
template <int kRows, int kSlots>
struct Walk {
  RowTile row;
  RowWork work;
  int64_t block, left;

  __device__ __forceinline__ void begin(const InjectedAttentionParams& p, const Place& place, int64_t unit,
                                        int64_t count) {
    left = count;
    if (left <= 0) return;
    load_row(p, place.row, &row);
    work = row_work<kRows, kSlots>(p, row);
    const int64_t inside = unit - place.units_before;
    row.tile = inside / work.blocks;
    block = inside - row.tile * work.blocks;
  }

  __device__ __forceinline__ bool next(const InjectedAttentionParams& p, Segment* segment) {
    if (left <= 0) return false;
    if (block == work.blocks) {
      block = 0;
      if (++row.tile == work.tiles) {
        int64_t next_row = row.row;
        do {
          // no unit is left behind the last row
          if (++next_row == p.num_rows) return false;
          load_row(p, next_row, &row);
          work = row_work<kRows, kSlots>(p, row);
        } while (work.tiles == 0);
        row.tile = 0;
      }
    }
    const int64_t rest = work.blocks - block;
    *segment = {row, block, left < rest ? left : rest, work.blocks};
    block += segment->count;
    left -= segment->count;
    return true;
  }
};

// ---- the kernel ----

// Warps of a block: kSlotWarps x kRowWarps; a warp takes kSlots / kSlotWarps slots of a block and 8 * kRowTiles rows.
template <class Element, int kHeadSize_, int kSlots_, int kSlotWarps_, int kRowWarps_, int kRowTiles_, int kStages_,
          int kBlocks_, bool kBulk_>
struct Config {
  using T = Element;
  static constexpr int kHeadSize = kHeadSize_, kSlots = kSlots_, kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kSlotWarps = kSlotWarps_, kRowWarps = kRowWarps_, kRowTiles = kRowTiles_;
  static constexpr bool kBulk = kBulk_;
  static constexpr int kWarpRows = 8 * kRowTiles, kRows = kWarpRows * kRowWarps;
  static constexpr int kSlotTiles = kSlots / (16 * kSlotWarps);  // of a warp
  static constexpr int kWarps = kSlotWarps * kRowWarps, kConsumers = 32 * kWarps;
  static constexpr int kThreads = kConsumers + (kBulk ? 32 : 0);
  static constexpr int kSteps = kHeadSize / 16;
  static constexpr int kPanels = (kHeadSize + 63) / 64;  // of 64 columns, 128 bytes
  static constexpr int kPanelBytes = kSlots * 128, kTileBytes = kPanels * kPanelBytes;
  static constexpr int kQueryBytes = kPanels * kRows * 128;
  // columns of the accumulators that the warps of a block sum at a time
  static constexpr int kMergeColumns = kHeadSize == 96 ? 48 : 64;
  static constexpr int kMergePitch = kMergeColumns + 4;  // no bank conflicts: 2 * pitch = 8 modulo 32
  static constexpr int kMergeBytes = kWarps * 8 * kMergePitch * 4;
  static constexpr int kRingBytes = 2 * kStages * kTileBytes;
  // the queries' memory serves for the sums, when all scores are computed
  static constexpr int kSharedOffset = kRingBytes + (kQueryBytes > kMergeBytes ? kQueryBytes : kMergeBytes);
  static constexpr int kStatisticsBytes = 2 * kSlotWarps * kRows * 4;
  static constexpr int kBarrierOffset = kSharedOffset + kStatisticsBytes;
  static constexpr int kSharedBytes = kBarrierOffset + 4 * kStages * 8;
  static_assert(kSlots % (16 * kSlotWarps) == 0 && kHeadSize % 16 == 0);
};

struct BulkMaps {
  CUtensorMap key, value;
};
struct NoMaps {};

// Transposes an 8 x 8 matrix of 16-bit numbers held as accumulators are: what was a row's pair becomes a column's.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

template <int kThreads>
__device__ __forceinline__ void sync_consumers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

template <class C>
__device__ __forceinline__ void store4(typename C::T* to, const float4& x, float factor) {
  using T = typename C::T;
  *reinterpret_cast<uint2*>(to) =
      make_uint2(pack_pair(T{}, x.x * factor, x.y * factor), pack_pair(T{}, x.z * factor, x.w * factor));
}

// What a warp knows of its rows: accumulators transposed (columns x rows), running maximum and sum of weights. A thread
// holds rows 2 * (lane % 4) and the next of each tile of 8; the sums are those of its own slots until the end.
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

// The queries as operand B, eight rows to a tile: in registers where they fit beside the accumulators.
template <class C>
struct Queries {
  static constexpr bool kInRegisters = C::kRowTiles * C::kHeadSize <= 128;
  uint32_t address;
  uint32_t held[kInRegisters ? C::kRowTiles : 1][kInRegisters ? C::kSteps : 1][2];

  __device__ __forceinline__ void fetch(int n, int step, uint32_t (&b)[4]) const {
    const int lane = threadIdx.x % 32;
    const uint32_t at = address + (step / 4) * (C::kRows * 128) + n * (8 * 128) + (lane % 8) * 128 +
                        (((step % 4 * 2 + lane / 8) ^ (lane % 8)) << 4);
    load_block(b, at);
  }
  // `shared`: the tile's queries; `row`: the warp's first
  __device__ __forceinline__ void load(uint32_t shared, int row) {
    address = shared + row * 128;
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

// Scores of the warp's slots in the block of keys at `keys`.
template <class C>
__device__ __forceinline__ void multiply_keys(uint32_t keys, const Queries<C>& queries, Scores<C>& s) {
  const int lane = threadIdx.x % 32, warp_slot = threadIdx.x / 32 % C::kSlotWarps * (16 * C::kSlotTiles);
  // two sums for even and odd steps where one alone would be a long chain of dependent products
  constexpr int kChains = C::kSlotTiles * C::kRowTiles < 3 ? 2 : 1;
  const uint32_t base = keys + (warp_slot + lane % 16) * 128 + (((lane / 16) ^ (lane % 8)) << 4);
#pragma unroll
  for (int t = 0; t < C::kSlotTiles; ++t) {
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
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        load_block(a[j], (base ^ ((step + j) % 4 << 5)) + (step / 4) * C::kPanelBytes + t * (16 * 128));
      }
#pragma unroll
      for (int n = 0; n < C::kRowTiles; ++n) {
        uint32_t b[4];
        queries.get(n, step, b);
        multiply_add<typename C::T>(sums[0][n], a[0], b[0], b[1]);
        multiply_add<typename C::T>(sums[kChains - 1][n], a[1], b[2], b[3]);
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
  const int lane = threadIdx.x % 32, warp_slot = threadIdx.x / 32 % C::kSlotWarps * (16 * C::kSlotTiles);
#pragma unroll
  for (int t = 0; t < C::kSlotTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool outside = warp_slot + t * 16 + lane / 4 + i / 2 * 8 >= valid;
#pragma unroll
      for (int n = 0; n < C::kRowTiles; ++n) {
        if (outside) s[t][n][i] = -kInfinity;
      }
    }
  }
}

// Weights of the scores in place; raises the running maximum and shrinks the accumulators if it has to.
template <class C>
__device__ __forceinline__ void weigh(Scores<C>& s, WarpState<C>& state, float scale_log2) {
  float best[C::kRowTiles][2];
  bool grows = false;
#pragma unroll
  for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      best[n][i] = fmaxf(s[0][n][i], s[0][n][2 + i]);
#pragma unroll
      for (int t = 1; t < C::kSlotTiles; ++t) best[n][i] = fmaxf(best[n][i], fmaxf(s[t][n][i], s[t][n][2 + i]));
      // false for two infinities of the same sign, whose difference is NaN
      grows |= (best[n][i] - state.maximum[n][i]) * scale_log2 > kGrowth;
    }
  }
  if (__any_sync(0xffffffffu, grows)) {
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float highest = best[n][i];
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) {
          highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, offset));
        }
        if (highest > state.maximum[n][i]) {
          const float factor = exp2_fast((state.maximum[n][i] - highest) * scale_log2);
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
  }
#pragma unroll
  for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // a row that has seen only -inf keeps weights of 0
      const float base = state.maximum[n][i] == -kInfinity ? 0.0f : state.maximum[n][i] * scale_log2;
#pragma unroll
      for (int t = 0; t < C::kSlotTiles; ++t) {
        s[t][n][i] = exp2_fast(fmaf(s[t][n][i], scale_log2, -base));
        s[t][n][2 + i] = exp2_fast(fmaf(s[t][n][2 + i], scale_log2, -base));
        state.sum[n][i] += s[t][n][i] + s[t][n][2 + i];
      }
    }
  }
}

// Adds the weighted values of the warp's slots to the accumulators. kRagged: values from slot `valid` on count as
// zeros, whatever they hold.
template <class C, bool kRagged>
__device__ __forceinline__ void multiply_values(uint32_t values, int valid, const Scores<C>& s, WarpState<C>& state) {
  using T = typename C::T;
  const int lane = threadIdx.x % 32, warp_slot = threadIdx.x / 32 % C::kSlotWarps * (16 * C::kSlotTiles);
  const uint32_t base = values + (warp_slot + lane % 8 + lane / 16 * 8) * 128 + (((lane / 8 % 2) ^ (lane % 8)) << 4);
#pragma unroll
  for (int t = 0; t < C::kSlotTiles; ++t) {
    uint32_t weights[C::kRowTiles][2];
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        weights[n][i] = transpose_matrix(pack_pair(T{}, s[t][n][2 * i], s[t][n][2 * i + 1]));
      }
    }
    uint32_t keep[2] = {0xffffffffu, 0xffffffffu};
    if (kRagged) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int slot = warp_slot + t * 16 + i * 8 + lane % 4 * 2;
        keep[i] = slot + 1 < valid ? 0xffffffffu : slot < valid ? 0xffffu : 0u;
      }
    }
#pragma unroll
    for (int m = 0; m < C::kSteps; ++m) {
      uint32_t a[4];
      load_block_transposed(a, (base ^ (m % 4 << 5)) + (m / 4) * C::kPanelBytes + t * (16 * 128));
      if (kRagged) {
        a[0] &= keep[0], a[1] &= keep[0];
        a[2] &= keep[1], a[3] &= keep[1];
      }
#pragma unroll
      for (int n = 0; n < C::kRowTiles; ++n) multiply_add<T>(state.o[m][n], a, weights[n][0], weights[n][1]);
    }
  }
}

// Rotated queries of a tile to shared memory, rows behind the batch row's end as zeros; the consumers take part.
template <class C>
__device__ __forceinline__ void load_queries(const InjectedAttentionParams& p, const RowTile& row, int head,
                                             uint8_t* queries, float factor) {
  using T = typename C::T;
  const uint32_t group = static_cast<uint32_t>(p.q_heads) / static_cast<uint32_t>(p.kv_heads);
  const RotaryRow rotary{p.cos + row.position * p.rotary_half, p.sin + row.position * p.rotary_half, p.rotary_half};
  constexpr int kChunks = C::kHeadSize / 8;
  for (int i = threadIdx.x; i < C::kRows * kChunks; i += C::kConsumers) {
    const int r = i / kChunks, chunk = i % kChunks;
    const int64_t packed = row.tile * C::kRows + r;
    uint4 rotated = make_uint4(0, 0, 0, 0);
    if (packed < row.q_count * group) {
      const int64_t query = packed / group;
      const T* const from = static_cast<const T*>(p.q) + (row.q_begin + query) * p.q_stride[0] +
                            (head * group + (packed - query * group)) * p.q_stride[1];
      rotated = rotated_chunk(from, chunk, rotary, factor);
    }
    *reinterpret_cast<uint4*>(queries + (chunk / 8) * (C::kRows * 128) + r * 128 + (((chunk ^ r) & 7) << 4)) = rotated;
  }
}

// The warps' results of a segment, merged and written: to out and lse where the segment is the whole tile, else to the
// workspace, there with zeros where no slot had a weight.
template <class C>
__device__ __forceinline__ void finish_segment(const InjectedAttentionParams& p, const Segment& segment, int head,
                                               int64_t worker, float scale_log2, WarpState<C>& state, float* merge,
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
      for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
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

  const uint32_t group = static_cast<uint32_t>(p.q_heads) / static_cast<uint32_t>(p.kv_heads);
  const int64_t first_packed = segment.row.tile * C::kRows, packed_rows = segment.row.q_count * group - first_packed;
  const bool whole = segment.count == segment.blocks;
  const int64_t workspace_row = ((2 * worker + (segment.first == 0 ? 1 : 0)) * p.kv_heads + head) * C::kRows;
  const auto token_and_head = [&](int r) {
    const int64_t packed = first_packed + r, query = packed / group;
    return (segment.row.q_begin + query) * p.q_heads + head * group + (packed - query * group);
  };

  for (int r = thread; r < C::kRows; r += C::kConsumers) {
    if (r >= packed_rows) continue;
    const float maximum = maximum_of(r), total = total_of(r, maximum);
    // -inf alone, or no slot
    const float lse = total == 0.0f ? -kInfinity : maximum * scale_log2 + log2f(total);
    if (whole) {
      p.lse[token_and_head(r)] = lse * kLn2;
    } else {
      p.partial_lse[workspace_row + r] = lse;
    }
  }

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
      float* const own = merge + warp * (8 * C::kMergePitch) + lane / 4;
#pragma unroll
      for (int m = 0; m < C::kMergeColumns / 16; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          own[(lane % 4 * 2 + i % 2) * C::kMergePitch + m * 16 + i / 2 * 8] =
              state.o[round * (C::kMergeColumns / 16) + m][n][i] * factor[i % 2];
        }
      }
      sync_consumers<C::kConsumers>();
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
        const float total = total_of(r, maximum_of(r));
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
        const int column = round * C::kMergeColumns + 4 * vector;
        if (whole) {
          store4<C>(static_cast<T*>(p.out) + token_and_head(r) * C::kHeadSize + column, sum, inverse);
        } else {
          *reinterpret_cast<float4*>(p.partial_out + (workspace_row + r) * C::kHeadSize + column) =
              make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse);
        }
      }
      sync_consumers<C::kConsumers>();
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    attend(const __grid_constant__ InjectedAttentionParams p,
           const __grid_constant__ std::conditional_t<C::kBulk, BulkMaps, NoMaps> maps) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr bool kCompiled = true;
  // the merging kernel may settle beside this one and wait
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#else
  constexpr bool kCompiled = !C::kBulk;
#endif
  if constexpr (kCompiled) {
    using T = typename C::T;
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ PlaceScan scan;
    uint8_t* const queries_shared = shared + C::kRingBytes;
    float* const statistics = reinterpret_cast<float*>(shared + C::kSharedOffset);
    uint64_t* const full = reinterpret_cast<uint64_t*>(shared + C::kBarrierOffset);  // keys, values by turns
    uint64_t* const empty = full + 2 * C::kStages;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.x % p.kv_heads;
    const int64_t worker = blockIdx.x / p.kv_heads;

    if constexpr (C::kBulk) {
      if (threadIdx.x == 0) {
        for (int i = 0; i < 2 * C::kStages; ++i) {
          barrier_init(full + i, 1);
          barrier_init(empty + i, C::kWarps);
        }
        barrier_init_fence();
      }
    }
    int64_t units, begin = 0, count = 0;
    const Place place =
        find_place<C::kRows, C::kSlots, C::kThreads, false>(p, scan, &units, [&](int64_t total) -> int64_t {
          const int64_t used = used_workers(total, p.splits);
          if (worker >= used) return -1;
          begin = worker_begin(total, used, worker);
          count = worker_begin(total, used, worker + 1) - begin;
          return begin;
        });
    if (count == 0) return;
    Walk<C::kRows, C::kSlots> walk;
    walk.begin(p, place, begin, count);
    Segment segment;

    if constexpr (C::kBulk) {
      if (warp == C::kWarps) {
        if (lane != 0) return;
        prefetch_tensor_map(&maps.key);
        prefetch_tensor_map(&maps.value);
        int stage = 0;
        uint32_t phase = 1;
        while (walk.next(p, &segment)) {
          if (segment.row.slot_count == 0) continue;
          int32_t slot = static_cast<int32_t>(segment.row.slot_begin + segment.first * C::kSlots);
          for (int64_t n = 0; n < segment.count; ++n, slot += C::kSlots) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              uint64_t* const barrier = full + 2 * stage + i;
              barrier_wait(empty + 2 * stage + i, phase);
              barrier_arrive_expect(barrier, C::kTileBytes);
              uint8_t* const to = shared + (2 * stage + i) * C::kTileBytes;
#pragma unroll
              for (int panel = 0; panel < C::kPanels; ++panel) {
                tensor_load_3d(to + panel * C::kPanelBytes, i == 0 ? &maps.key : &maps.value, barrier, panel * 64, head,
                               slot, kEvictFirst);
              }
            }
            if (++stage == C::kStages) {
              stage = 0;
              phase ^= 1;
            }
          }
        }
        return;
      }
    }

    // a negative scale turns the queries round, so that the largest score is always the best one; a scale of 0 makes
    // them 0
    const float scale_log2 = (p.scale == 0 ? 1.0f : fabsf(p.scale)) * kLog2E;
    const float query_factor = p.scale == 0 ? 0.0f : p.scale < 0 ? -1.0f : 1.0f;
    const uint32_t ring = shared_offset(shared), queries_address = shared_offset(queries_shared);
    const int row_warp = warp / C::kSlotWarps;
    WarpState<C> state;
    Queries<C> queries;
    int stage = 0;
    uint32_t phase = 0;

    // cp.async: the loads run ahead of the products by kStages - 1 blocks, across segments
    Walk<C::kRows, C::kSlots> ahead = walk;
    Segment loading;
    int64_t loading_left = 0;
    int load_stage = 0;
    const auto load_next = [&] {
      while (loading_left == 0) {
        if (!ahead.next(p, &loading)) {
          commit_copies();
          return;
        }
        loading_left = loading.row.slot_count == 0 ? 0 : loading.count;
      }
      const int64_t block = loading.first + loading.count - loading_left;
      const int64_t slot = loading.row.slot_begin + block * C::kSlots;
      const int64_t valid = loading.row.slot_count - block * C::kSlots;
      constexpr int kChunks = C::kHeadSize / 8;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const T* const from = i == 0 ? static_cast<const T*>(p.k) + slot * p.k_stride[0] + head * p.k_stride[1]
                                     : static_cast<const T*>(p.v) + slot * p.v_stride[0] + head * p.v_stride[1];
        const int64_t stride = i == 0 ? p.k_stride[0] : p.v_stride[0];
        const uint32_t to = ring + (2 * load_stage + i) * C::kTileBytes;
#pragma unroll 4
        for (int item = threadIdx.x; item < C::kSlots * kChunks; item += C::kConsumers) {
          const int r = item / kChunks, chunk = item % kChunks;
          const bool inside = r < valid;
          copy16_async(to + (chunk / 8) * C::kPanelBytes + r * 128 + (((chunk ^ r) & 7) << 4),
                       from + (inside ? r * stride + chunk * 8 : 0), inside);
        }
      }
      commit_copies();
      --loading_left;
      if (++load_stage == C::kStages) load_stage = 0;
    };
    if constexpr (!C::kBulk) {
      for (int i = 0; i < C::kStages - 1; ++i) load_next();
    }

    while (walk.next(p, &segment)) {
      load_queries<C>(p, segment.row, head, queries_shared, query_factor);
      sync_consumers<C::kConsumers>();
      queries.load(queries_address, row_warp * C::kWarpRows);
      state.clear();
      const int64_t blocks = segment.row.slot_count == 0 ? 0 : segment.count;
      for (int64_t n = 0; n < blocks; ++n) {
        const uint32_t keys = ring + 2 * stage * C::kTileBytes, values = keys + C::kTileBytes;
        const int64_t rest = segment.row.slot_count - (segment.first + n) * C::kSlots;
        Scores<C> s;
        if constexpr (C::kBulk) {
          barrier_wait(full + 2 * stage, phase);
        } else {
          wait_copies<C::kStages - 2>();
          sync_consumers<C::kConsumers>();
          load_next();
        }
        multiply_keys<C>(keys, queries, s);
        if constexpr (C::kBulk) {
          __syncwarp();
          if (lane == 0) barrier_arrive(empty + 2 * stage);
        }
        if (rest >= C::kSlots) {
          weigh<C>(s, state, scale_log2);
          if constexpr (C::kBulk) barrier_wait(full + 2 * stage + 1, phase);
          multiply_values<C, false>(values, 0, s, state);
        } else {
          mask_scores<C>(static_cast<int>(rest), s);
          weigh<C>(s, state, scale_log2);
          if constexpr (C::kBulk) barrier_wait(full + 2 * stage + 1, phase);
          multiply_values<C, true>(values, static_cast<int>(rest), s, state);
        }
        if constexpr (C::kBulk) {
          __syncwarp();
          if (lane == 0) barrier_arrive(empty + 2 * stage + 1);
        }
        if (++stage == C::kStages) {
          stage = 0;
          phase ^= 1;
        }
      }
      finish_segment<C>(p, segment, head, worker, scale_log2, state, reinterpret_cast<float*>(queries_shared),
                        statistics);
    }
  }
}

// ---- merging ----

constexpr int kMergeThreads = 128, kMergeLoads = 8;

// One block merges one packed row of one tile that several workers shared; its warps take the parts by turns.
// kByTile: block -> tile; else block -> worker that has the first part of a shared tile. `rows`: of a tile, those that
// a batch of this size can fill.
template <class T, int kHeadSize, int kRows, int kSlots, bool kByTile>
__global__ void __launch_bounds__(kMergeThreads)
    merge_parts(const __grid_constant__ InjectedAttentionParams p, int32_t rows) {
  constexpr int kVectors = kHeadSize / 4, kWarps = kMergeThreads / 32, kColumns = (kVectors + 31) / 32;
  __shared__ PlaceScan scan;
  __shared__ float4 shared[kWarps][kColumns * 32];
  const int r = blockIdx.x % rows, head = blockIdx.x / rows % p.kv_heads;
  const int64_t index = blockIdx.x / rows / p.kv_heads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t group = static_cast<uint32_t>(p.q_heads) / static_cast<uint32_t>(p.kv_heads);
  int64_t units, used = 0, unit = -1;
  const Place place = find_place<kRows, kSlots, kMergeThreads, kByTile>(p, scan, &units, [&](int64_t total) -> int64_t {
    used = used_workers(total, p.splits);
    if (kByTile) return index;
    if (index >= used) return -1;
    unit = worker_begin(total, used, index + 1) - 1;
    return unit;
  });
  int64_t first_worker = 0, parts = 0, token_and_head = 0;
  if (place.row >= 0) {
    RowTile row;
    load_row(p, place.row, &row);
    const RowWork work = row_work<kRows, kSlots>(p, row);
    row.tile = kByTile ? index - place.tiles_before : (unit - place.units_before) / work.blocks;
    const int64_t begin = place.units_before + row.tile * work.blocks;
    first_worker = worker_of(units, used, begin);
    const int64_t last_worker = worker_of(units, used, begin + work.blocks - 1);
    const int64_t packed = row.tile * kRows + r, query = packed / group;
    if (packed < row.q_count * group && (kByTile || first_worker == index)) parts = last_worker - first_worker + 1;
    token_and_head = (row.q_begin + query) * p.q_heads + head * group + (packed - query * group);
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // also by blocks without work: whatever comes after this kernel must not overtake the one before it
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  if (parts <= 1) return;
  const auto workspace_row = [&](int64_t part) {
    return ((2 * (first_worker + part) + (part == 0 ? 1 : 0)) * p.kv_heads + head) * kRows + r;
  };

  float maximum = -kInfinity, total = 0;
  float4 sum[kColumns]{};
  // every warp sees the statistics of all parts, and reads the results of its own
  for (int64_t base = 0; base < parts; base += kWarps * kMergeLoads) {
    float4 x[kMergeLoads][kColumns];
#pragma unroll
    for (int j = 0; j < kMergeLoads; ++j) {
      const int64_t part = base + j * kWarps + warp;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        x[j][c] = float4{};
        if (part < parts && c * 32 + lane < kVectors) {
          x[j][c] =
              __ldcg(reinterpret_cast<const float4*>(p.partial_out + workspace_row(part) * kHeadSize) + c * 32 + lane);
        }
      }
    }
    const int64_t own = base + lane;
    static_assert(kWarps * kMergeLoads == 32);
    const float lse = own < parts ? __ldcg(p.partial_lse + workspace_row(own)) : -kInfinity;
    float highest = fmaxf(lse, maximum);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, offset));
    }
    const float shift = highest == -kInfinity ? 0.0f : highest;
    const float shrink = exp2f(maximum - shift), weight = exp2f(lse - shift);
    float weights = weight;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) weights += __shfl_xor_sync(0xffffffffu, weights, offset);
    total = total * shrink + weights;
    maximum = highest;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      sum[c].x *= shrink, sum[c].y *= shrink, sum[c].z *= shrink, sum[c].w *= shrink;
#pragma unroll
      for (int j = 0; j < kMergeLoads; ++j) {
        const float w = __shfl_sync(0xffffffffu, weight, j * kWarps + warp);
        sum[c].x = fmaf(w, x[j][c].x, sum[c].x), sum[c].y = fmaf(w, x[j][c].y, sum[c].y);
        sum[c].z = fmaf(w, x[j][c].z, sum[c].z), sum[c].w = fmaf(w, x[j][c].w, sum[c].w);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) shared[warp][c * 32 + lane] = sum[c];
  __syncthreads();
  for (int i = threadIdx.x; i < kVectors; i += kMergeThreads) {
    float4 y = shared[0][i];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      const float4 x = shared[w][i];
      y.x += x.x, y.y += x.y, y.z += x.z, y.w += x.w;
    }
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + token_and_head * kHeadSize + 4 * i) =
        make_uint2(pack_pair(T{}, y.x * inverse, y.y * inverse), pack_pair(T{}, y.z * inverse, y.w * inverse));
  }
  if (threadIdx.x == 0) p.lse[token_and_head] = total == 0.0f ? -kInfinity : (maximum + log2f(total)) * kLn2;
}

// ---- launch ----

template <class C>
cudaError_t launch_merge(const InjectedAttentionParams& p, cudaStream_t stream) {
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
  // its blocks come while the last of the kernel before run, find their place and wait
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = C::kBulk ? 1 : 0;
  return by_tile
             ? cudaLaunchKernelEx(&config, merge_parts<typename C::T, C::kHeadSize, C::kRows, C::kSlots, true>, p, rows)
             : cudaLaunchKernelEx(&config, merge_parts<typename C::T, C::kHeadSize, C::kRows, C::kSlots, false>, p,
                                  rows);
}

template <class C>
cudaError_t launch(const InjectedAttentionParams& p, cudaStream_t stream) {
  std::conditional_t<C::kBulk, BulkMaps, NoMaps> maps;
  const int64_t blocks = int64_t{p.splits} * p.kv_heads;
  if (p.num_slots > INT32_MAX || blocks > INT32_MAX) return cudaErrorInvalidValue;
  cudaError_t status;
  if constexpr (C::kBulk) {
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(&attributes, attend<C>);
    if (status != cudaSuccess) return status;
    // compiled for less, the kernel is empty
    if (attributes.ptxVersion < 90) return cudaErrorNotSupported;
    const int64_t sizes[3] = {C::kHeadSize, p.kv_heads, p.num_slots};
    const int32_t box[3] = {64, 1, C::kSlots};
    const int64_t key_strides[2] = {p.k_stride[1], p.k_stride[0]}, value_strides[2] = {p.v_stride[1], p.v_stride[0]};
    status = encode_tensor_map_3d(&maps.key, p.type, p.k, sizes, key_strides, box);
    if (status != cudaSuccess) return status;
    status = encode_tensor_map_3d(&maps.value, p.type, p.v, sizes, value_strides, box);
    if (status != cudaSuccess) return status;
  }
  status = cudaFuncSetAttribute(attend<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
  if (status != cudaSuccess) return status;
  attend<C><<<static_cast<unsigned>(blocks), C::kThreads, C::kSharedBytes, stream>>>(p, maps);
  status = cudaGetLastError();
  if (status != cudaSuccess || p.splits == 1) return status;
  return launch_merge<C>(p, stream);
}

}  // namespace decode
}  // namespace sharedllm

namespace sharedllm {

template <class T, int kHeadSize>
cudaError_t launch_injected_attention_decode_bulk(const InjectedAttentionParams& p, cudaStream_t stream) {
  // 16 KB of keys in a block of slots (32 KB for 256 columns), and as many stages as the blocks' memory holds
  constexpr int kSlots = kHeadSize == 64 ? 128 : 64;
  constexpr bool kWide = kHeadSize == 256;
  constexpr int kBlocks = kWide ? 1 : 2, kStages = 3;
  switch (decode_tiling(p).rows) {
    case 8:
      return decode::launch<decode::Config<T, kHeadSize, kSlots, 4, 1, 1, kStages, kBlocks, true>>(p, stream);
    case 16:
      return decode::launch<
          decode::Config<T, kHeadSize, kSlots, 4, kWide ? 2 : 1, kWide ? 1 : 2, kStages, kBlocks, true>>(p, stream);
    case 32:
      return decode::launch<
          decode::Config<T, kHeadSize, kSlots, 4, kWide ? 4 : 2, kWide ? 1 : 2, kStages, kBlocks, true>>(p, stream);
    default:
      // 17 warps with accumulators of 64 registers a thread leave room for one block
      return decode::launch<
          decode::Config<T, kHeadSize, kSlots, kWide ? 2 : 4, kWide ? 8 : 4, kWide ? 1 : 2, kWide ? 3 : 6, 1, true>>(
          p, stream);
  }
}

template <class T, int kHeadSize>
cudaError_t launch_injected_attention_decode_portable(const InjectedAttentionParams& p, cudaStream_t stream) {
  // two stages: below the 99 KB of the smaller GPUs, and two blocks to a multiprocessor on the larger ones
  constexpr bool kWide = kHeadSize == 256;
  constexpr int kSlots = kWide ? 32 : 64, kSlotWarps = kWide ? 2 : 4, kStages = 2;
  switch (decode_tiling(p).rows) {
    case 8:
      return decode::launch<decode::Config<T, kHeadSize, kSlots, kSlotWarps, 1, 1, kStages, 1, false>>(p, stream);
    case 16:
      return decode::launch<
          decode::Config<T, kHeadSize, kSlots, kSlotWarps, kWide ? 2 : 1, kWide ? 1 : 2, kStages, 1, false>>(p, stream);
    case 32:
      return decode::launch<
          decode::Config<T, kHeadSize, kSlots, kSlotWarps, kWide ? 4 : 2, kWide ? 1 : 2, kStages, 1, false>>(p, stream);
    default:
      return decode::launch<
          decode::Config<T, kHeadSize, kSlots, kSlotWarps, kWide ? 8 : 4, kWide ? 1 : 2, kStages, 1, false>>(p, stream);
  }
}

}  // namespace sharedllm

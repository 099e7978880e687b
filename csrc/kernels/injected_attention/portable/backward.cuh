// Kernels of the portable backward pass (mma.sync, ldmatrix, cp.async). Both recompute the weights P = exp2(S scale
// log2(e) - lse_log2) from the rotated queries and form dS = P (dP - delta) in registers; see
// docs/kernels/injected_attention_backward_portable.md.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/common/global_memory.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/injected_attention/portable/backward.h"
#include "kernels/injected_attention/portable/backward_tiles.h"
#include "kernels/injected_attention/query_rotation.cuh"
#include "kernels/injected_attention/rows.cuh"

namespace sharedllm {
namespace backward_portable {

// ---- matmuls of tiles ----

struct Nothing {
  __device__ __forceinline__ void operator()(int, int) const {}
};

// sum [16 kM, 16 kN] += a b^T over kColumns: rows of both tiles are vectors. a is the tile's address + lane_base, b
// that + pair_lane_base. meanwhile(i, n) is called n times with work for other units while the tensor cores are busy.
template <class T, int kColumns, int kM, int kN, class Function = Nothing>
__device__ __forceinline__ void multiply_rows(float (&sum)[kM][2 * kN][4], uint32_t a, int a_block, uint32_t b,
                                              int b_block, const Function& meanwhile = Function()) {
  using Tile = SwizzledTile<kColumns>;
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_block(left[m], Tile::block(a, a_block + m, k));
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      uint32_t right[4];
      load_block(right, Tile::block(b, b_block + n, k));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply_add<T>(sum[m][2 * n], left[m], right[0], right[1]);
        multiply_add<T>(sum[m][2 * n + 1], left[m], right[2], right[3]);
      }
    }
    meanwhile(k, kColumns / 16);
  }
}

// The same with a in registers.
template <class T, int kColumns, int kM, int kN, class Function = Nothing>
__device__ __forceinline__ void multiply_rows(float (&sum)[kM][2 * kN][4], const uint32_t (&a)[kM][kColumns / 16][4],
                                              uint32_t b, int b_block, const Function& meanwhile = Function()) {
  using Tile = SwizzledTile<kColumns>;
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      uint32_t right[4];
      load_block(right, Tile::block(b, b_block + n, k));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply_add<T>(sum[m][2 * n], a[m][k], right[0], right[1]);
        multiply_add<T>(sum[m][2 * n + 1], a[m][k], right[2], right[3]);
      }
    }
    meanwhile(k, kColumns / 16);
  }
}

// sum [16 kM, 16 kN] += a [16 kM, 16 kK] times rows of the tile b from block b_row on, its columns from block b_column
// on; b is the tile's address + lane_base.
template <class T, int kColumns, int kM, int kN, int kK, class Function = Nothing>
__device__ __forceinline__ void multiply_columns(float (&sum)[kM][2 * kN][4], const uint32_t (&a)[kM][kK][4],
                                                 uint32_t b, int b_row, int b_column,
                                                 const Function& meanwhile = Function()) {
  using Tile = SwizzledTile<kColumns>;
#pragma unroll
  for (int k = 0; k < kK; ++k) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      uint32_t right[4];
      load_block_transposed(right, Tile::block(b, b_row + k, b_column + n));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply_add<T>(sum[m][2 * n], a[m][k], right[0], right[1]);
        multiply_add<T>(sum[m][2 * n + 1], a[m][k], right[2], right[3]);
      }
    }
    meanwhile(k, kK);
  }
}

template <int kM, int kN>
__device__ __forceinline__ void fill(float (&sum)[kM][kN][4], float value) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[m][n][i] = value;
    }
  }
}

template <class T, int kM, int kK>
__device__ __forceinline__ void pack_operands(uint32_t (&to)[kM][kK][4], const float (&from)[kM][2 * kK][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int k = 0; k < kK; ++k) pack_operand<T>(to[m][k], from[m][2 * k], from[m][2 * k + 1]);
  }
}

// ---- loads ----

// How the threads of a block share the 16-byte chunks of a tile: thread t takes chunks t, t + kThreads, …. With a whole
// number of rows at a time each thread stays in one column, so that its addresses need little arithmetic.
template <int kColumns, int kRows, int kThreads, class Function>
__device__ __forceinline__ void for_each_chunk(const Function& function) {
  constexpr int kChunks = kColumns / 8, kTotal = kRows * kChunks;
  const unsigned thread = threadIdx.x;
  if constexpr (kThreads % kChunks == 0) {
    const int row = thread / kChunks, chunk = thread % kChunks;
#pragma unroll
    for (int base = 0; base < kRows; base += kThreads / kChunks) {
      if (kTotal % kThreads == 0 || base + row < kRows) function(base + row, chunk);
    }
  } else {
#pragma unroll
    for (int base = 0; base < kTotal; base += kThreads) {
      const unsigned i = base + thread;
      if (kTotal % kThreads == 0 || i < kTotal) function(static_cast<int>(i / kChunks), static_cast<int>(i % kChunks));
    }
  }
}

// Loads kRows vectors, stride elements apart, into a tile; zeros from count on.
template <class T, int kColumns, int kRows, int kThreads>
__device__ __forceinline__ void load_slots(uint32_t tile, const T* from, int64_t stride, int count) {
  using Tile = SwizzledTile<kColumns>;
  for_each_chunk<kColumns, kRows, kThreads>([&](int row, int chunk) {
    const bool valid = row < count;
    copy16_async(tile + Tile::at(row, chunk), valid ? from + row * stride + chunk * 8 : from, valid);
  });
}

// Where the packed rows of a tile are in a [T, Hq, …] tensor: the group's G heads of one query after the other.
struct PackedRows {
  int64_t first;        // vector of the first query's first head of the group
  int skip;             // packed rows of that query before the tile
  int count;            // rows of the tile that exist
  int skip_heads;       // Hq - G
  float inverse, half;  // 1 / G, 1 / 2G

  __device__ __forceinline__ void set_group(int group, int q_heads) {
    skip_heads = q_heads - group;
    inverse = 1.0f / group;
    half = 0.5f * inverse;
  }
  // Query of a packed row, counted from the first; exact, since skip + row is far below 2^20.
  __device__ __forceinline__ int query(int row) const { return static_cast<int>(fmaf(skip + row, inverse, half)); }
  // Vector of a packed row, counted from the first.
  __device__ __forceinline__ int vector(int row) const { return skip + row + query(row) * skip_heads; }
};

// Rows of one contiguous [T, Hq, D] tensor, or of two at once; q and grad point to the first vector.
template <class T, int kColumns, int kRows, int kThreads>
__device__ __forceinline__ void load_rows(uint32_t q_tile, uint32_t grad_tile, const T* q, const T* grad,
                                          const PackedRows& rows) {
  using Tile = SwizzledTile<kColumns>;
  for_each_chunk<kColumns, kRows, kThreads>([&](int row, int chunk) {
    const bool valid = row < rows.count;
    const int at = valid ? rows.vector(row) * kColumns + chunk * 8 : 0;
    if (q != nullptr) copy16_async(q_tile + Tile::at(row, chunk), q + at, valid);
    copy16_async(grad_tile + Tile::at(row, chunk), grad + at, valid);
  });
}

// ---- rotation of 8 columns ----

// cos and sin of the 8 columns of a chunk, and where their partners are; a chunk that is not rotated is its own
// partner.
struct ChunkRotation {
  float cos[8], sin[8];  // sin with the sign for forward rotation
  int partner;           // first column of the partner chunk
  bool turns;

  // half is a multiple of 8
  __device__ __forceinline__ ChunkRotation(const RotaryRow& rotary, int first, float direction) {
    turns = first < 2 * rotary.half;
    const bool low = first < rotary.half;
    partner = !turns ? first : low ? first + rotary.half : first - rotary.half;
    const int at = low ? first : partner;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      cos[i] = turns ? __ldg(rotary.cos + at + i) : 0.0f;
      sin[i] = turns ? __ldg(rotary.sin + at + i) * (low ? -direction : direction) : 0.0f;
    }
  }
  __device__ __forceinline__ void apply(float (&x)[8], const float (&other)[8]) const {
    if (turns) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = x[i] * cos[i] + other[i] * sin[i];
    }
  }
};

// ---- gradient of the queries alone ----

template <int kHeadSize>
struct QueryTiles;
// A warp of 32 rows uses an operand from shared memory for two matmuls, which the bandwidth requires; 32 x D sums and 2
// x 32 x slots scores fill the registers. All fit 99 KiB (8.6, 8.9, 12.0); two blocks share 227 KiB.
template <>
struct QueryTiles<64> {
  static constexpr int kWarps = 4, kRowBlocks = 2, kSlots = 64;
};
template <>
struct QueryTiles<96> {
  static constexpr int kWarps = 4, kRowBlocks = 2, kSlots = 32;
};
template <>
struct QueryTiles<128> {
  static constexpr int kWarps = 4, kRowBlocks = 2, kSlots = 32;
};
template <>
struct QueryTiles<256> {  // 32 x 256 sums would not fit
  static constexpr int kWarps = 4, kRowBlocks = 1, kSlots = 16;
};

template <class T, int kHeadSize>
struct QueryKernel {
  using Tiles = QueryTiles<kHeadSize>;
  static constexpr int kThreads = 32 * Tiles::kWarps;
  static constexpr int kRows = 16 * Tiles::kRowBlocks * Tiles::kWarps;
  static constexpr int kRowBytes = 2 * kHeadSize;
  static constexpr int kSharedBytes = 2 * kRows * kRowBytes + 4 * Tiles::kSlots * kRowBytes;
};

template <class T, int kHeadSize>
__global__ void __launch_bounds__(QueryKernel<T, kHeadSize>::kThreads, 2)
    grad_query_kernel(const InjectedAttentionBackwardParams p, int64_t row_tiles) {
  using Kernel = QueryKernel<T, kHeadSize>;
  using Tiles = typename Kernel::Tiles;
  using Tile = SwizzledTile<kHeadSize>;
  constexpr int kThreads = Kernel::kThreads, kRows = Kernel::kRows, kSlots = Tiles::kSlots;
  constexpr int kM = Tiles::kRowBlocks, kN = kSlots / 16;
  constexpr int kTileBytes = kSlots * Kernel::kRowBytes;
  extern __shared__ __align__(1024) unsigned char shared[];

  const InjectedAttentionParams& f = p.forward;
  const int64_t head = blockIdx.x / row_tiles;
  const RowTile tile = find_row_tile(f, blockIdx.x % row_tiles, kRows);
  if (tile.row < 0) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  const int group = f.q_heads / f.kv_heads;
  PackedRows rows;
  {
    const int64_t packed = tile.tile * kRows, query = packed / group;
    rows.first = (tile.q_begin + query) * f.q_heads + head * group;
    rows.skip = static_cast<int>(packed - query * group);
    rows.count = static_cast<int>(min(tile.q_count * group - packed, static_cast<int64_t>(kRows)));
    rows.set_group(group, f.q_heads);
  }

  const uint32_t q_tile = shared_address(shared), grad_tile = q_tile + kRows * Kernel::kRowBytes;
  const uint32_t k_tiles = grad_tile + kRows * Kernel::kRowBytes, v_tiles = k_tiles + 2 * kTileBytes;
  load_rows<T, kHeadSize, kRows, kThreads>(0, grad_tile, nullptr,
                                           static_cast<const T*>(p.grad_out) + rows.first * kHeadSize, rows);
  const T* k = static_cast<const T*>(f.k) + tile.slot_begin * f.k_stride[0] + head * f.k_stride[1];
  const T* v = static_cast<const T*>(f.v) + tile.slot_begin * f.v_stride[0] + head * f.v_stride[1];
  const int64_t steps = (tile.slot_count + kSlots - 1) / kSlots;
  const auto load_step = [&](int64_t step) {
    const int count = static_cast<int>(min(tile.slot_count - step * kSlots, static_cast<int64_t>(kSlots)));
    const int stage = static_cast<int>(step & 1);
    load_slots<T, kHeadSize, kSlots, kThreads>(k_tiles + stage * kTileBytes, k, f.k_stride[0], count);
    load_slots<T, kHeadSize, kSlots, kThreads>(v_tiles + stage * kTileBytes, v, f.v_stride[0], count);
    k += kSlots * f.k_stride[0];
    v += kSlots * f.v_stride[0];
  };
  if (steps > 0) load_step(0);
  commit_copies();

  const RotaryRow rotary = f.num_positions > 0 ? RotaryRow{f.cos + tile.position * f.rotary_half,
                                                           f.sin + tile.position * f.rotary_half, f.rotary_half}
                                               : RotaryRow{nullptr, nullptr, 0};
  const bool rotates_chunks = kThreads % Tile::kChunks == 0 && rotary.half % 8 == 0;
  {
    const T* const q = static_cast<const T*>(f.q) + (tile.q_begin + tile.tile * kRows / group) * f.q_stride[0] +
                       head * group * f.q_stride[1];
    const auto find = [&](int row) {
      const int query = rows.query(row);
      return q + query * f.q_stride[0] + (rows.skip + row - query * group) * f.q_stride[1];
    };
    if (rotates_chunks) {
      constexpr int kStep = kThreads / Tile::kChunks > 0 ? kThreads / Tile::kChunks : 1;
      const int chunk = threadIdx.x % Tile::kChunks;
      const ChunkRotation rotation(rotary, chunk * 8, 1.0f);
#pragma unroll 4
      for (int row = threadIdx.x / Tile::kChunks; row < kRows; row += kStep) {
        uint4 packed = make_uint4(0, 0, 0, 0);
        if (row < rows.count) {
          const T* const from = find(row);
          float x[8], other[8];
          unpack8(T{}, load_cached(reinterpret_cast<const uint4*>(from + chunk * 8)), x);
          unpack8(T{}, load_cached(reinterpret_cast<const uint4*>(from + rotation.partner)), other);
          rotation.apply(x, other);
          packed = pack8(T{}, x);
        }
        *reinterpret_cast<uint4*>(shared + Tile::at(row, chunk)) = packed;
      }
    } else {
      for (int i = threadIdx.x; i < kRows * Tile::kChunks; i += kThreads) {
        const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
        *reinterpret_cast<uint4*>(shared + Tile::at(row, chunk)) =
            row < rows.count ? rotated_chunk(find(row), chunk, rotary, 1.0f) : make_uint4(0, 0, 0, 0);
      }
    }
  }
  wait_copies<0>();
  __syncthreads();

  // delta: the four lanes that hold a row's scores share its columns
  float lse[kM][2], delta[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = (warp * kM + m) * 16 + half * 8 + lane / 4;
      const bool valid = row < rows.count;
      const int64_t at = rows.first + (valid ? rows.vector(row) : 0);
      const T* const out = static_cast<const T*>(f.out) + at * kHeadSize;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < Tile::kChunks; i += 4) {
        const int chunk = i + lane % 4;
        float x[8], grad[8];
        unpack8(T{}, load_cached(reinterpret_cast<const uint4*>(out + chunk * 8)), x);
        unpack8(T{}, *reinterpret_cast<const uint4*>(shared + kRows * Kernel::kRowBytes + Tile::at(row, chunk)), grad);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += x[j] * grad[j];
      }
      sum = sum_lanes<4>(sum);
      if (p.grad_lse != nullptr) sum -= p.grad_lse[at];
      const float natural = f.lse[at];
      delta[m][half] = valid ? sum : 0.0f;
      lse[m][half] = valid && natural != -kInfinity ? natural * kLog2E : kInfinity;
    }
  }

  const uint32_t lane_base = Tile::lane_base(lane), pair_base = Tile::pair_lane_base(lane);
  const float scale_log2 = f.scale * kLog2E;
  float grad_q[kM][kHeadSize / 8][4];
  fill(grad_q, 0.0f);
  for (int64_t step = 0; step < steps; ++step) {
    if (step > 0) {
      wait_copies<0>();
      __syncthreads();
    }
    if (step + 1 < steps) load_step(step + 1);
    commit_copies();
    const int stage = static_cast<int>(step & 1);
    const uint32_t k_tile = k_tiles + stage * kTileBytes, v_tile = v_tiles + stage * kTileBytes;

    float scores[kM][2 * kN][4], grads[kM][2 * kN][4];
    fill(scores, 0.0f);
    multiply_rows<T, kHeadSize, kM, kN>(scores, q_tile + lane_base, warp * kM, k_tile + pair_base, 0);
    fill(grads, 0.0f);
    multiply_rows<T, kHeadSize, kM, kN>(
        grads, grad_tile + lane_base, warp * kM, v_tile + pair_base, 0, [&](int part, int parts) {
#pragma unroll
          for (int i = 0; i < kM * 2 * kN; ++i) {
            if (i * parts / (kM * 2 * kN) != part) continue;
            const int m = i / (2 * kN), n = i % (2 * kN);
#pragma unroll
            for (int j = 0; j < 4; ++j) scores[m][n][j] = exp2_fast(fmaf(scores[m][n][j], scale_log2, -lse[m][j / 2]));
          }
        });
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[m][n][i] *= grads[m][n][i] - delta[m][i / 2];
      }
    }
    if (step + 1 == steps) {
      // slots past the end were loaded as zeros, but their weights need not be finite
      const int count = static_cast<int>(tile.slot_count - step * kSlots);
#pragma unroll
      for (int n = 0; n < 2 * kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (n * 8 + lane % 4 * 2 + i % 2 >= count) {
#pragma unroll
            for (int m = 0; m < kM; ++m) scores[m][n][i] = 0;
          }
        }
      }
    }
    uint32_t operand[kM][kN][4];
    pack_operands<T, kM, kN>(operand, scores);
    multiply_columns<T, kHeadSize, kM, kHeadSize / 16, kN>(grad_q, operand, k_tile + lane_base, 0, 0);
  }

  // Through shared memory, where each warp has room for its rows in float32: the rotation needs two columns at once,
  // and the stores become 16 bytes wide.
  wait_copies<0>();
  __syncthreads();
  constexpr int kWarpRows = 16 * kM;
  float* const mine = reinterpret_cast<float*>(shared) + warp * kWarpRows * kHeadSize;
  const auto place = [](int row, int column) {  // swizzled in groups of 4 columns against bank conflicts
    return row * kHeadSize + (((column >> 2) ^ (row & 7)) << 2) + (column & 3);
  };
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kHeadSize / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<float2*>(mine + place(m * 16 + half * 8 + lane / 4, n * 8 + lane % 4 * 2)) =
            make_float2(grad_q[m][n][2 * half] * f.scale, grad_q[m][n][2 * half + 1] * f.scale);
      }
    }
  }
  __syncwarp();
  const auto store = [&](int row, int first, const float (&x)[8]) {
    T* const to = static_cast<T*>(p.grad_q) + (rows.first + rows.vector(warp * kWarpRows + row)) * kHeadSize + first;
    *reinterpret_cast<uint4*>(to) = pack8(T{}, x);
  };
  const int count = rows.count - warp * kWarpRows < kWarpRows ? rows.count - warp * kWarpRows : kWarpRows;
  if (rotates_chunks && 32 % Tile::kChunks == 0) {
    const int first = lane % Tile::kChunks * 8;
    const ChunkRotation rotation(rotary, first, -1.0f);
    for (int row = lane / Tile::kChunks; row < count; row += 32 / Tile::kChunks > 0 ? 32 / Tile::kChunks : 1) {
      float x[8], other[8];
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        *reinterpret_cast<float4*>(x + i) = *reinterpret_cast<const float4*>(mine + place(row, first + i));
        *reinterpret_cast<float4*>(other + i) =
            *reinterpret_cast<const float4*>(mine + place(row, rotation.partner + i));
      }
      rotation.apply(x, other);
      store(row, first, x);
    }
  } else {
    const int half = rotary.half;
    for (int i = lane; i < count * Tile::kChunks; i += 32) {
      const int row = i / Tile::kChunks, first = i % Tile::kChunks * 8;
      float x[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int column = first + j;
        x[j] = mine[place(row, column)];
        if (column < half) {
          x[j] = x[j] * rotary.cos[column] + mine[place(row, column + half)] * rotary.sin[column];
        } else if (column < 2 * half) {
          x[j] = x[j] * rotary.cos[column - half] - mine[place(row, column - half)] * rotary.sin[column - half];
        }
      }
      store(row, first, x);
    }
  }
}

// ---- gradients of the keys and values ----

// Steps of a block: the row tiles of every batch row whose slots overlap the block's, every kv_splits-th of them.
struct Step {
  int64_t first;
  int skip, count;           // count 0: no more steps
  int slot_begin, slot_end;  // of the block's slots
};
struct Walk {
  int64_t row, tile, tiles, start, q_begin, packed_count;
  int slot_begin, slot_end;
};

// Called by one whole warp.
template <int kRows, bool kStaggered>
__device__ __forceinline__ void advance(const InjectedAttentionParams& p, Walk* walk, Step* step, int64_t slot_tile,
                                        int64_t slot_tiles, int64_t slot, int slots, int64_t head, int splits) {
  const int lane = threadIdx.x % 32;
  const int64_t group = p.q_heads / p.kv_heads;
  Walk w = *walk;
  w.tile += splits;
  while (w.tile >= w.tiles) {
    w.tile -= w.tiles;
    w.tiles = 0;
    bool found = false;
    for (int64_t base = w.row + 1; base < p.num_rows && !found; base += 32) {
      RowTile row{};
      if (base + lane < p.num_rows) load_row(p, base + lane, &row);
      const unsigned overlaps =
          __ballot_sync(kFullWarp, row.q_count > 0 && row.slot_count > 0 && row.slot_begin < slot + slots &&
                                       row.slot_begin + row.slot_count > slot);
      if (overlaps) {
        found = true;
        const int owner = __ffs(overlaps) - 1;
        w.row = base + owner;
        w.q_begin = __shfl_sync(kFullWarp, row.q_begin, owner);
        w.packed_count = __shfl_sync(kFullWarp, row.q_count, owner) * group;
        w.tiles = (w.packed_count + kRows - 1) / kRows;
        const int64_t begin = row.slot_begin - slot, end = begin + row.slot_count;
        // Blocks of neighbouring slots begin at different rows, so that they do not add to the same grad_q at once.
        w.start = kStaggered ? slot_tile * w.tiles / slot_tiles : 0;
        w.slot_begin = __shfl_sync(kFullWarp, static_cast<int>(begin > 0 ? begin : 0), owner);
        w.slot_end = __shfl_sync(kFullWarp, static_cast<int>(end < slots ? end : slots), owner);
      }
    }
    if (!found) {
      w.row = p.num_rows;
      break;
    }
  }
  __syncwarp();  // all lanes have read the walk
  if (lane == 0) {
    *walk = w;
    if (w.row < p.num_rows) {
      int64_t tile = w.tile + w.start;
      if (tile >= w.tiles) tile -= w.tiles;
      const int64_t packed = tile * kRows, left = w.packed_count - packed;
      // a 64-bit division takes a hundred instructions
      const int64_t query =
          packed >> 32 ? packed / group : static_cast<uint32_t>(packed) / static_cast<uint32_t>(group);
      step->first = (w.q_begin + query) * p.q_heads + head * group;
      step->skip = static_cast<int>(packed - query * group);
      step->count = static_cast<int>(left < kRows ? left : kRows);
      step->slot_begin = w.slot_begin;
      step->slot_end = w.slot_end;
    } else {
      step->count = 0;
    }
  }
}

// Adds a lane's columns 2 t, 2 t + 1 (t = lane % 4) of two neighbouring matmuls [8 rows, 8 columns] to the row at `to`,
// whose 16 columns these are. Every cache line that an instruction touches costs a cycle, so lanes exchange halves to
// add 16 bytes each where the device can.
__device__ __forceinline__ void add_columns(float* to, bool valid, float left0, float left1, float right0,
                                            float right1) {
  const int t = threadIdx.x % 4;
#if __CUDA_ARCH__ >= 900
  const bool odd = t % 2;
  const float other0 = __shfl_xor_sync(kFullWarp, odd ? left0 : right0, 1);
  const float other1 = __shfl_xor_sync(kFullWarp, odd ? left1 : right1, 1);
  if (valid) {
    add_four(to + (odd ? 8 : 0) + t / 2 * 4, odd ? other0 : left0, odd ? other1 : left1, odd ? right0 : other0,
             odd ? right1 : other1);
  }
#else
  if (valid) {
    atomicAdd(to + 2 * t, left0);
    atomicAdd(to + 2 * t + 1, left1);
    atomicAdd(to + 8 + 2 * t, right0);
    atomicAdd(to + 8 + 2 * t + 1, right1);
  }
#endif
}

template <class T, class Tiles, bool kGradQuery>
__global__ void __launch_bounds__(Tiles::kThreads, Tiles::kBlocks)
    grad_key_value_kernel(const InjectedAttentionBackwardParams p, int64_t slot_tiles) {
  constexpr int kHeadSize = Tiles::kHeadSize, kThreads = Tiles::kThreads, kRows = Tiles::kRows;
  constexpr int kSlots = Tiles::kSlots, kM = Tiles::kSlotBlocks, kParts = Tiles::kParts;
  constexpr int kN = kHeadSize / 16 / kParts;  // column blocks of a warp's grad_k and grad_v
  constexpr int kChunk = Tiles::kChunkRows / 16;
  using Tile = SwizzledTile<kHeadSize>;
  using WeightTile = SwizzledTile<kRows>;
  constexpr bool kStaggered = kGradQuery;
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ Step steps[4];  // of the previous step, this one and the next two
  __shared__ Walk walk;

  const InjectedAttentionParams& f = p.forward;
  const int64_t index = blockIdx.x / slot_tiles;
  const int64_t head = index / p.kv_splits;
  const int split = static_cast<int>(index % p.kv_splits);
  const int64_t slot_tile = blockIdx.x % slot_tiles, slot = slot_tile * kSlots;
  const int slots = static_cast<int>(min(f.num_slots - slot, static_cast<int64_t>(kSlots)));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int slot_warp = warp / kParts, part = warp % kParts;

  const uint32_t base = shared_address(shared);
  const uint32_t v_load = base + (Tiles::kValueInRegisters ? Tiles::kQuery : Tiles::kValue);
  load_slots<T, kHeadSize, kSlots, kThreads>(base + Tiles::kKey,
                                             static_cast<const T*>(f.k) + slot * f.k_stride[0] + head * f.k_stride[1],
                                             f.k_stride[0], slots);
  load_slots<T, kHeadSize, kSlots, kThreads>(
      v_load, static_cast<const T*>(f.v) + slot * f.v_stride[0] + head * f.v_stride[1], f.v_stride[0], slots);
  commit_copies();
  if (warp == 0) {
    if (lane == 0) {
      walk.row = -1;
      walk.tile = split - p.kv_splits;
      walk.tiles = 0;
    }
    __syncwarp();
    advance<kRows, kStaggered>(f, &walk, &steps[0], slot_tile, slot_tiles, slot, slots, head, p.kv_splits);
    __syncwarp();
    advance<kRows, kStaggered>(f, &walk, &steps[1], slot_tile, slot_tiles, slot, slots, head, p.kv_splits);
  }
  wait_copies<0>();
  __syncthreads();

  const uint32_t lane_base = Tile::lane_base(lane), pair_base = Tile::pair_lane_base(lane);
  float* const poison = reinterpret_cast<float*>(shared + Tiles::kPoison);
  bool poisoned = false;
  if constexpr (kGradQuery) {
    // Batch rows that do not own a slot multiply its key by 0 for grad_q. A key that is not finite is therefore
    // replaced by 0, and makes the weights NaN for the rows that own it.
    for (int i = threadIdx.x; i < kSlots; i += kThreads) {
      constexpr uint32_t kExponent = sizeof(T) == 2 && std::is_same_v<T, __half> ? 0x7c00u : 0x7f80u;
      bool finite = true;
      uint4* const row = reinterpret_cast<uint4*>(shared + Tiles::kKey + i * Tiles::kRowBytes);
      for (int j = 0; j < Tile::kChunks; ++j) {
        const uint4 chunk = row[(j + i) % Tile::kChunks];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const uint32_t word = (&chunk.x)[k];
          finite = finite && (word & kExponent) != kExponent && (word >> 16 & kExponent) != kExponent;
        }
      }
      poison[i] = finite ? 0.0f : __int_as_float(0x7fc00000);
      poisoned = poisoned || !finite;
      if (!finite) {
        for (int j = 0; j < Tile::kChunks; ++j) row[j] = make_uint4(0, 0, 0, 0);
      }
    }
  }
  uint32_t value[Tiles::kValueInRegisters ? kM : 1][kHeadSize / 16][4];
  if constexpr (Tiles::kValueInRegisters) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int k = 0; k < kHeadSize / 16; ++k) {
        load_block(value[m][k], Tile::block(v_load + lane_base, slot_warp * kM + m, k));
      }
    }
  }
  poisoned = __syncthreads_or(poisoned);

  PackedRows rows;
  rows.set_group(f.q_heads / f.kv_heads, f.q_heads);
  const auto use_step = [&](int i) {
    const Step& step = steps[i & 3];
    rows.first = step.first;
    rows.skip = step.skip;
    rows.count = step.count;
  };
  const auto load_step = [&](int i) {
    const int stage = i & 1;
    use_step(i);
    load_rows<T, kHeadSize, kRows, kThreads>(base + Tiles::kQuery + stage * Tiles::kRowTileBytes,
                                             base + Tiles::kGrad + stage * Tiles::kRowTileBytes,
                                             static_cast<const T*>(p.q_rotated) + rows.first * kHeadSize,
                                             static_cast<const T*>(p.grad_out) + rows.first * kHeadSize, rows);
    // rows that do not exist: their query and gradient are zeros, so any finite weight will do
    for (int row = threadIdx.x; row < kRows; row += kThreads) {
      const bool valid = row < rows.count;
      const int64_t at = rows.first + (valid ? rows.vector(row) : 0);
      copy4_async(base + Tiles::kLse + (stage * kRows + row) * 4, p.lse_log2 + at, valid);
      copy4_async(base + Tiles::kDelta + (stage * kRows + row) * 4, p.delta + at, valid);
    }
  };
  // grad_q of one step from its dS; the warps divide rows and columns among themselves
  const auto add_grad_query = [&](int i, uint32_t weights) {
    constexpr int kRowWarps = Tiles::kQueryRowWarps, kColumnWarps = Tiles::kWarps / kRowWarps;
    constexpr int kQueryM = kRows / 16 / kRowWarps, kQueryN = kHeadSize / 16 / kColumnWarps;
    static_assert(kQueryM * kRowWarps * 16 == kRows && kQueryN * kColumnWarps * 16 == kHeadSize);
    const int row_block = warp / kColumnWarps * kQueryM, column_block = warp % kColumnWarps * kQueryN;
    const uint32_t weight_lane = weights + WeightTile::pair_lane_base(lane);  // operand A stored as [k][m]
    float sum[kQueryM][2 * kQueryN][4];
    fill(sum, 0.0f);
#pragma unroll
    for (int k = 0; k < kSlots / 16; ++k) {
      uint32_t left[kQueryM][1][4];
#pragma unroll
      for (int m = 0; m < kQueryM; ++m) {
        load_block_transposed(left[m][0], WeightTile::block(weight_lane, k, row_block + m));
      }
      multiply_columns<T, kHeadSize, kQueryM, kQueryN, 1>(sum, left, base + Tiles::kKey + lane_base, k, column_block);
    }
    use_step(i);
    float* const to = p.grad_q_float + rows.first * kHeadSize + column_block * 16;
#pragma unroll
    for (int m = 0; m < kQueryM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = (row_block + m) * 16 + half * 8 + lane / 4;
        float* const vector = to + rows.vector(row) * kHeadSize;
#pragma unroll
        for (int n = 0; n < kQueryN; ++n) {
          const float (&left)[4] = sum[m][2 * n], (&right)[4] = sum[m][2 * n + 1];
          add_columns(vector + n * 16, row < rows.count, left[2 * half], left[2 * half + 1], right[2 * half],
                      right[2 * half + 1]);
        }
      }
    }
  };

  const float scale_log2 = f.scale * kLog2E;
  float grad_k[kM][2 * kN][4], grad_v[kM][2 * kN][4];
  fill(grad_k, 0.0f);
  fill(grad_v, 0.0f);
  if (steps[0].count > 0) load_step(0);
  commit_copies();
  int i = 0;
  for (; steps[i & 3].count > 0; ++i) {
    const int stage = i & 1;
    wait_copies<0>();
    __syncthreads();
    const uint32_t q_tile = base + Tiles::kQuery + stage * Tiles::kRowTileBytes;
    const uint32_t grad_tile = base + Tiles::kGrad + stage * Tiles::kRowTileBytes;
    // with one part, dS of the last step is read while this one's is written; with more, weights and dS of this step
    const uint32_t weight_tile = base + Tiles::kWeights;
    const uint32_t grad_weight_tile =
        base + Tiles::kWeights + (kParts > 1 ? Tiles::kWeightBytes : stage * Tiles::kWeightBytes);
    if constexpr (kGradQuery && kParts == 1) {
      if (i > 0) add_grad_query(i - 1, base + Tiles::kWeights + (stage ^ 1) * Tiles::kWeightBytes);
    }

    if (steps[(i + 1) & 3].count > 0) load_step(i + 1);
    commit_copies();
    if (warp == 0) {
      advance<kRows, kStaggered>(f, &walk, &steps[(i + 2) & 3], slot_tile, slot_tiles, slot, slots, head, p.kv_splits);
    }
    const int slot_begin = steps[i & 3].slot_begin, slot_end = steps[i & 3].slot_end;
    const bool masked = slot_begin > 0 || slot_end < kSlots;
    const float* const lse_row = reinterpret_cast<const float*>(shared + Tiles::kLse) + stage * kRows;
    const float* const delta_row = reinterpret_cast<const float*>(shared + Tiles::kDelta) + stage * kRows;
#pragma unroll
    for (int chunk = 0; chunk < Tiles::kScoreRows / Tiles::kChunkRows; ++chunk) {
      const int row_block = part * (Tiles::kScoreRows / 16) + chunk * kChunk;
      float weights[kM][2 * kChunk][4];
      fill(weights, 0.0f);
      multiply_rows<T, kHeadSize, kM, kChunk>(weights, base + Tiles::kKey + lane_base, slot_warp * kM,
                                              q_tile + pair_base, row_block);
      if (kGradQuery && poisoned) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float add = poison[(slot_warp * kM + m) * 16 + half * 8 + lane / 4];
#pragma unroll
            for (int n = 0; n < 2 * kChunk; ++n) {
              weights[m][n][2 * half] += add;
              weights[m][n][2 * half + 1] += add;
            }
          }
        }
      }
      const auto mask = [&](float (&x)[kM][2 * kChunk][4]) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int at = (slot_warp * kM + m) * 16 + half * 8 + lane / 4;
            const bool outside = at < slot_begin || at >= slot_end;
#pragma unroll
            for (int n = 0; n < 2 * kChunk; ++n) {
              x[m][n][2 * half] = outside ? 0.0f : x[m][n][2 * half];
              x[m][n][2 * half + 1] = outside ? 0.0f : x[m][n][2 * half + 1];
            }
          }
        }
      };
      uint32_t operand[kM][kChunk][4];
      const auto store = [&](uint32_t tile) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int at = (slot_warp * kM + m) * 16 + half * 8 + lane / 4;
#pragma unroll
            for (int n = 0; n < 2 * kChunk; ++n) {
              store_word(tile + WeightTile::at(at, row_block * 2 + n) + lane % 4 * 4,
                         operand[m][n / 2][n % 2 * 2 + half]);
            }
          }
        }
      };

      float grads[kM][2 * kChunk][4];
      fill(grads, 0.0f);
      const auto make_weights = [&](int of, int parts) {
#pragma unroll
        for (int n = 0; n < 2 * kChunk; ++n) {
          if (n * parts / (2 * kChunk) != of) continue;
          const float2 lse = *reinterpret_cast<const float2*>(lse_row + row_block * 16 + n * 8 + lane % 4 * 2);
#pragma unroll
          for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              weights[m][n][j] = exp2_fast(fmaf(weights[m][n][j], scale_log2, j % 2 ? -lse.y : -lse.x));
            }
          }
        }
      };
      const auto make_grads = [&](int of, int parts) {
#pragma unroll
        for (int n = 0; n < 2 * kChunk; ++n) {
          if (n * parts / (2 * kChunk) != of) continue;
          const float2 delta = *reinterpret_cast<const float2*>(delta_row + row_block * 16 + n * 8 + lane % 4 * 2);
#pragma unroll
          for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              grads[m][n][j] = weights[m][n][j] * (grads[m][n][j] - (j % 2 ? delta.y : delta.x));
            }
          }
        }
      };
      if constexpr (Tiles::kValueInRegisters) {
        multiply_rows<T, kHeadSize, kM, kChunk>(grads, value, grad_tile + pair_base, row_block, make_weights);
      } else {
        multiply_rows<T, kHeadSize, kM, kChunk>(grads, base + Tiles::kValue + lane_base, slot_warp * kM,
                                                grad_tile + pair_base, row_block, make_weights);
      }
      if (masked) mask(weights);
      pack_operands<T, kM, kChunk>(operand, weights);
      if constexpr (kParts == 1) {
        multiply_columns<T, kHeadSize, kM, kN, kChunk>(grad_v, operand, grad_tile + lane_base, row_block, 0,
                                                       make_grads);
      } else {
        store(weight_tile);
        make_grads(0, 1);
      }
      if (masked) mask(grads);
      pack_operands<T, kM, kChunk>(operand, grads);
      if constexpr (kParts == 1) {
        multiply_columns<T, kHeadSize, kM, kN, kChunk>(grad_k, operand, q_tile + lane_base, row_block, 0);
      }
      if constexpr (kParts > 1 || kGradQuery) store(grad_weight_tile);
    }

    if constexpr (kParts > 1) {
      __syncthreads();
      const auto add_rows = [&](float (&sum)[kM][2 * kN][4], uint32_t weights, uint32_t tile) {
        const uint32_t weight_lane = weights + WeightTile::lane_base(lane);
#pragma unroll
        for (int k = 0; k < kRows / 16; ++k) {
          uint32_t left[kM][1][4];
#pragma unroll
          for (int m = 0; m < kM; ++m) load_block(left[m][0], WeightTile::block(weight_lane, slot_warp * kM + m, k));
          multiply_columns<T, kHeadSize, kM, kN, 1>(sum, left, tile, k, part * kN);
        }
      };
      add_rows(grad_v, weight_tile, grad_tile + lane_base);
      add_rows(grad_k, grad_weight_tile, q_tile + lane_base);
      if constexpr (kGradQuery) add_grad_query(i, grad_weight_tile);
    }
  }
  if constexpr (kGradQuery && kParts == 1) {
    __syncthreads();
    if (i > 0) add_grad_query(i - 1, base + Tiles::kWeights + ((i - 1) & 1) * Tiles::kWeightBytes);
  }

#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = (slot_warp * kM + m) * 16 + half * 8 + lane / 4;
      if (at < slots) {
        const int64_t vector = (slot + at) * f.kv_heads + head;
        const int64_t to = vector * kHeadSize + part * (kN * 16) + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < 2 * kN; ++n) {
          const float k0 = grad_k[m][n][2 * half] * f.scale, k1 = grad_k[m][n][2 * half + 1] * f.scale;
          const float v0 = grad_v[m][n][2 * half], v1 = grad_v[m][n][2 * half + 1];
          if (p.kv_splits == 1) {
            *reinterpret_cast<uint32_t*>(static_cast<T*>(p.grad_k) + to + n * 8) = pack_pair(T{}, k0, k1);
            *reinterpret_cast<uint32_t*>(static_cast<T*>(p.grad_v) + to + n * 8) = pack_pair(T{}, v0, v1);
          } else {
            const int64_t share = split * (f.num_slots * f.kv_heads * kHeadSize) + to + n * 8;
            *reinterpret_cast<float2*>(p.partial_grad_k + share) = make_float2(k0, k1);
            *reinterpret_cast<float2*>(p.partial_grad_v + share) = make_float2(v0, v1);
          }
        }
      }
    }
  }
}

// ---- launches ----

template <class T, int kHeadSize>
cudaError_t launch_grad_query(const InjectedAttentionBackwardParams& p, cudaStream_t stream) {
  using Kernel = QueryKernel<T, kHeadSize>;
  const InjectedAttentionParams& f = p.forward;
  const int64_t packed = f.num_queries * (f.q_heads / f.kv_heads);
  const int64_t row_tiles = packed == 0 ? 0 : packed / Kernel::kRows + f.num_rows;
  const int64_t blocks = row_tiles * f.kv_heads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  const auto kernel = grad_query_kernel<T, kHeadSize>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), Kernel::kThreads, Kernel::kSharedBytes, stream>>>(p, row_tiles);
  return cudaGetLastError();
}

template <class T, class Tiles, bool kGradQuery>
cudaError_t launch_grad_key_value(const InjectedAttentionBackwardParams& p, cudaStream_t stream) {
  const InjectedAttentionParams& f = p.forward;
  const int64_t slot_tiles = (f.num_slots + Tiles::kSlots - 1) / Tiles::kSlots;
  const int64_t blocks = slot_tiles * f.kv_heads * p.kv_splits;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  const auto kernel = grad_key_value_kernel<T, Tiles, kGradQuery>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tiles::shared_bytes(kGradQuery));
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), Tiles::kThreads, Tiles::shared_bytes(kGradQuery), stream>>>(p, slot_tiles);
  return cudaGetLastError();
}

}  // namespace backward_portable

template <class T, int kHeadSize>
cudaError_t launch_injected_attention_backward_portable_instance(const InjectedAttentionBackwardParams& params,
                                                                 cudaStream_t stream) {
  using namespace backward_portable;
  using Choice = KeyValueChoice<kHeadSize>;
  if (params.grad_q_float == nullptr || params.grad_k == nullptr) {
    const cudaError_t error = launch_grad_query<T, kHeadSize>(params, stream);
    if (error != cudaSuccess || params.grad_k == nullptr) return error;
  }
  int shared_memory = 0;
  const cudaError_t error = query_shared_memory(&shared_memory);
  if (error != cudaSuccess) return error;
  const bool sums_grad_q = params.grad_q_float != nullptr;
  if (fits(Choice::Large::shared_bytes(sums_grad_q), shared_memory)) {
    return sums_grad_q ? launch_grad_key_value<T, typename Choice::Large, true>(params, stream)
                       : launch_grad_key_value<T, typename Choice::Large, false>(params, stream);
  }
  return sums_grad_q ? launch_grad_key_value<T, typename Choice::Small, true>(params, stream)
                     : launch_grad_key_value<T, typename Choice::Small, false>(params, stream);
}

}  // namespace sharedllm

// Injected attention with mma.sync. A block of 128 threads takes a tile of packed rows; each warp keeps 16 or 32 of
// them, their outputs in registers, and goes over the slots in tiles that arrive in a ring of shared memory. The
// exponentials of a quarter of a tile are computed between the products of the quarter before.
// docs/kernels/injected_attention_portable.md has the derivation.
#pragma once

#include <algorithm>

#include "kernels/common/attention_rows.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/common/query_rotation.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/injected_attention_portable.h"

namespace sharedllm {
namespace portable {

// The maximum is only raised when it grows by a factor of 2^8 in the weights: until then float32 sums lose nothing, and
// the rescaling of the accumulators is skipped.
constexpr float kGrowth = 8.0f;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_inff();

// kRowBlocks: blocks of 16 rows of a warp. kSlots: of a tile. kBuffers: tiles of keys or values in shared memory, which
// alternate in the ring; with 4, keys and values of one tile arrive together and one barrier a tile suffices. kBlocks:
// on a multiprocessor.
template <int kHeadSize_, int kWarps_, int kRowBlocks_, int kSlots_, int kBuffers_, int kBlocks_, bool kKeepQueries_>
struct Tile {
  static constexpr int kHeadSize = kHeadSize_, kWarps = kWarps_, kRowBlocks = kRowBlocks_, kSlots = kSlots_;
  static constexpr int kBuffers = kBuffers_, kBlocks = kBlocks_;
  // queries in registers rather than read from shared memory for every tile
  static constexpr bool kKeepQueries = kKeepQueries_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kRowBlocks, kRows = kWarps * kWarpRows;
  static constexpr int kQueryBytes = kRows * kHeadSize * 2;
  static constexpr int kTileBytes = kSlots * kHeadSize * 2;
  static constexpr int kSharedBytes = kQueryBytes + kBuffers * kTileBytes;
  static constexpr bool kPaired = kBuffers == 4;
  using Layout = SwizzledTile<kHeadSize>;
  // of the copies: threads next to each other read a row's neighbouring chunks
  static constexpr int kCopyRows = kThreads / Layout::kGroup;
  static_assert(kBuffers >= 2 && kBuffers <= 4);
  static_assert(kSlots % 16 == 0 && kSlots % kCopyRows == 0 && kCopyRows % 8 == 0);
};

// Tiles of slots that a split of a row covers.
struct SlotTiles {
  int64_t begin, end;
};
__device__ __forceinline__ SlotTiles split_tiles(int64_t slots, int tile, int splits, int split) {
  const int64_t tiles = (slots + tile - 1) / tile;
  const int64_t each = (tiles + splits - 1) / splits;
  const int64_t begin = each * split < tiles ? each * split : tiles;
  return {begin, begin + each < tiles ? begin + each : tiles};
}

// Keys or values on their way into shared memory, tile by tile.
template <class T, class Shape>
struct SlotStream {
  const T* from;       // of this thread in the next tile
  int64_t row_stride;  // elements
  const T* anywhere;   // an address for copies of nothing
  uint32_t to;         // of this thread in a buffer
  int row;             // of this thread in a tile

  __device__ __forceinline__ SlotStream(const void* base, const int64_t (&stride)[2], int64_t slot, int head,
                                        uint32_t buffers) {
    using Layout = typename Shape::Layout;
    const int chunk = threadIdx.x % Layout::kGroup;
    row = threadIdx.x / Layout::kGroup;
    row_stride = stride[0];
    anywhere = static_cast<const T*>(base);
    from = anywhere + (slot + row) * row_stride + head * stride[1] + chunk * 8;
    to = buffers + Layout::at(row, chunk);
  }

  // The next tile into a buffer; zeros behind its valid slots, which belong to somebody else.
  __device__ __forceinline__ void load(uint32_t buffer, int valid) {
    using Layout = typename Shape::Layout;
    const T* pass_from = from;
    const uint32_t pass_to = to + buffer;
    if (valid >= Shape::kSlots) {
#pragma unroll
      for (int pass = 0; pass < Shape::kSlots / Shape::kCopyRows; ++pass) {
#pragma unroll
        for (int group = 0; group < Layout::kChunks / Layout::kGroup; ++group) {
          copy16_async(pass_to + pass * Shape::kCopyRows * Layout::kPitch + group * Layout::kGroup * 16,
                       pass_from + group * Layout::kGroup * 8);
        }
        pass_from += Shape::kCopyRows * row_stride;
      }
    } else {
#pragma unroll
      for (int pass = 0; pass < Shape::kSlots / Shape::kCopyRows; ++pass) {
        const bool inside = row + pass * Shape::kCopyRows < valid;
#pragma unroll
        for (int group = 0; group < Layout::kChunks / Layout::kGroup; ++group) {
          copy16_async(pass_to + pass * Shape::kCopyRows * Layout::kPitch + group * Layout::kGroup * 16,
                       inside ? pass_from + group * Layout::kGroup * 8 : anywhere, inside);
        }
        pass_from += Shape::kCopyRows * row_stride;
      }
    }
    from = pass_from;
  }
};

// A warp's packed rows into shared memory, rotated and rounded once.
template <class T, class Shape>
__device__ __forceinline__ void load_queries(const InjectedAttentionParams& p, const RowTile& row, uint8_t* to,
                                             int64_t first_query, uint32_t first_member, int used_rows, int head,
                                             uint32_t group, float factor) {
  using Layout = typename Shape::Layout;
  const int lane = threadIdx.x % 32;
  const RotaryRow rotary{p.cos + row.position * p.rotary_half, p.sin + row.position * p.rotary_half, p.rotary_half};
  const T* const q = static_cast<const T*>(p.q);
  const auto vector = [&](int r) {
    const uint32_t member = first_member + r, query = member / group;
    return q + (first_query + query) * p.q_stride[0] + (head * group + (member - query * group)) * p.q_stride[1];
  };
  const uint4 zeros = make_uint4(0, 0, 0, 0);
  if (rotary.half % 8 != 0) {
    for (int i = lane; i < Shape::kWarpRows * Layout::kChunks; i += 32) {
      const int r = i / Layout::kChunks, chunk = i % Layout::kChunks;
      *reinterpret_cast<uint4*>(to + Layout::at(r, chunk)) =
          r < used_rows ? rotated_chunk(vector(r), chunk, rotary, factor) : zeros;
    }
    return;
  }
  // A lane takes two chunks that turn with each other, or two that only pass, in every row of its own; so it needs one
  // part of the tables.
  constexpr int kPairs = Layout::kChunks / 2, kLanes = kPairs <= 4 ? 4 : kPairs <= 8 ? 8 : 16;
  const int pair = lane % kLanes, turning = rotary.half / 8;
  if (pair >= kPairs) return;
  const bool turns = pair < turning;
  const int low = turns ? pair : 2 * pair, high = turns ? pair + turning : 2 * pair + 1;
  float cos[8], sin[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    cos[i] = turns ? __ldg(rotary.cos + 8 * pair + i) * factor : factor;
    sin[i] = turns ? __ldg(rotary.sin + 8 * pair + i) * factor : 0.0f;
  }
#pragma unroll 4
  for (int r = lane / kLanes; r < Shape::kWarpRows; r += 32 / kLanes) {
    uint4 first = zeros, second = zeros;
    if (r < used_rows) {
      const T* const from = vector(r);
      float x[8], y[8], turned_x[8], turned_y[8];
      unpack8(T{}, load_cached(reinterpret_cast<const uint4*>(from) + low), x);
      unpack8(T{}, load_cached(reinterpret_cast<const uint4*>(from) + high), y);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        // what passes must not meet its neighbour: 0 * inf is NaN
        turned_x[i] = turns ? x[i] * cos[i] - y[i] * sin[i] : x[i] * factor;
        turned_y[i] = turns ? y[i] * cos[i] + x[i] * sin[i] : y[i] * factor;
      }
      first = pack8(T{}, turned_x);
      second = pack8(T{}, turned_y);
    }
    *reinterpret_cast<uint4*>(to + Layout::at(r, low)) = first;
    *reinterpret_cast<uint4*>(to + Layout::at(r, high)) = second;
  }
}

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    injected_attention(const __grid_constant__ InjectedAttentionParams p, uint32_t tiles) {
  using Layout = typename Shape::Layout;
  constexpr int kHeadSize = Shape::kHeadSize, kSlots = Shape::kSlots, kRowBlocks = Shape::kRowBlocks;
  constexpr int kSteps = kHeadSize / 16, kQuarters = kSlots / 16;
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // tiles of rows fastest, so that blocks that run together read the same slots
  const uint32_t rest = blockIdx.x / tiles;
  const int split = rest % p.splits, head = rest / p.splits;
  const RowTile row = find_row_tile(p, blockIdx.x % tiles, Shape::kRows);
  if (row.row < 0) return;
  const SlotTiles range = split_tiles(row.slot_count, kSlots, p.splits, split);
  const int count = static_cast<int>(range.end - range.begin);
  // slots of this split, at most
  const int64_t slots = row.slot_count - range.begin * kSlots;
  const int last_valid = count == 0 ? 0 : static_cast<int>(slots - (count - 1) * static_cast<int64_t>(kSlots));

  const uint32_t group = static_cast<uint32_t>(p.q_heads) / static_cast<uint32_t>(p.kv_heads);
  const int64_t first_packed = row.tile * Shape::kRows + warp * Shape::kWarpRows;
  const int64_t packed_rows = row.q_count * group - first_packed;  // from this warp's first on; may be none
  const int used_rows =
      packed_rows < Shape::kWarpRows ? (packed_rows < 0 ? 0 : static_cast<int>(packed_rows)) : Shape::kWarpRows;
  const int64_t first_query = row.q_begin + first_packed / group;
  const uint32_t first_member = static_cast<uint32_t>(first_packed % group);

  // a negative scale turns the queries round, so that the largest score is always the best one; a scale of 0 makes them
  // 0
  const float scale_log2 = (p.scale == 0 ? 1.0f : fabsf(p.scale)) * kLog2E;
  uint8_t* const my_queries = shared + warp * Shape::kWarpRows * Layout::kPitch;
  const uint32_t ring = shared_offset(shared) + Shape::kQueryBytes;
  const uint32_t lane_base = Layout::lane_base(lane), key_lane_base = Layout::pair_lane_base(lane);
  const uint32_t query_base = shared_offset(my_queries) + lane_base;

  float o[kRowBlocks][kHeadSize / 8][4];
  float maximum[kRowBlocks][2], sum[kRowBlocks][2];
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int i = 0; i < kHeadSize / 8 * 4; ++i) o[m][i / 4][i % 4] = 0;
    maximum[m][0] = maximum[m][1] = -kInfinity;
    sum[m][0] = sum[m][1] = 0;
  }

  if (count > 0) {
    SlotStream<T, Shape> keys(p.k, p.k_stride, row.slot_begin + range.begin * kSlots, head, ring);
    SlotStream<T, Shape> values(p.v, p.v_stride, row.slot_begin + range.begin * kSlots, head, ring);
    const auto valid_of = [&](int n) { return n + 1 == count ? last_valid : kSlots; };
    // Tiles of keys (even) and values (odd) asked for so far, the buffer of the next and of the one in use.
    int asked = 0;
    uint32_t write = 0, read = 0;
    const auto advance = [](uint32_t& buffer) {
      buffer += Shape::kTileBytes;
      if (buffer == Shape::kBuffers * Shape::kTileBytes) buffer = 0;
    };
    const auto ask = [&] {
      const int n = asked / 2;
      if (n < count) {
        if (asked % 2 == 0) {
          keys.load(write, valid_of(n));
        } else {
          values.load(write, valid_of(n));
        }
      }
      commit_copies();
      ++asked;
      advance(write);
    };
#pragma unroll
    for (int i = 0; i < (Shape::kPaired ? 2 : Shape::kBuffers - 1); ++i) ask();

    const float factor = p.scale == 0 ? 0.0f : p.scale < 0 ? -1.0f : 1.0f;
    load_queries<T, Shape>(p, row, my_queries, first_query, first_member, used_rows, head, group, factor);
    __syncwarp();
    uint32_t kept[Shape::kKeepQueries ? kSteps : 1][kRowBlocks][4];
    if constexpr (Shape::kKeepQueries) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) load_block(kept[step][m], Layout::block(query_base, m, step));
      }
    }

    for (int n = 0; n < count; ++n) {
      // ---- scores ----
      if constexpr (Shape::kPaired) {
        wait_copies<0>();
        __syncthreads();
        ask();
        ask();
      } else {
        wait_copies<Shape::kBuffers - 2>();
        __syncthreads();
        ask();
      }
      float s[kRowBlocks][kSlots / 8][4];
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int i = 0; i < kSlots / 8 * 4; ++i) s[m][i / 4][i % 4] = 0;
      }
      const uint32_t key_base = ring + read + key_lane_base;
      advance(read);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[kRowBlocks][4];
        if constexpr (!Shape::kKeepQueries) {
#pragma unroll
          for (int m = 0; m < kRowBlocks; ++m) load_block(a[m], Layout::block(query_base, m, step));
        }
#pragma unroll
        for (int j = 0; j < kQuarters; ++j) {
          uint32_t b[4];
          load_block(b, Layout::block(key_base, j, step));
#pragma unroll
          for (int m = 0; m < kRowBlocks; ++m) {
            const uint32_t (&query)[4] = Shape::kKeepQueries ? kept[Shape::kKeepQueries ? step : 0][m] : a[m];
            multiply_add<T>(s[m][2 * j], query, b[0], b[1]);
            multiply_add<T>(s[m][2 * j + 1], query, b[2], b[3]);
          }
        }
      }
      if (n + 1 == count && last_valid < kSlots) {
#pragma unroll
        for (int j = 0; j < kSlots / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const bool outside = 8 * j + lane % 4 * 2 + i >= last_valid;
#pragma unroll
            for (int m = 0; m < kRowBlocks; ++m) {
              if (outside) s[m][j][i] = s[m][j][i + 2] = -kInfinity;
            }
          }
        }
      }

      // ---- running maximum ----
      bool grows = false;
      float best[kRowBlocks][2];
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float high = fmaxf(s[m][0][2 * i], s[m][0][2 * i + 1]);
#pragma unroll
          for (int j = 1; j < kSlots / 8; ++j) high = fmaxf(high, fmaxf(s[m][j][2 * i], s[m][j][2 * i + 1]));
          high = fmaxf(high, __shfl_xor_sync(kFullWarp, high, 1));
          high = fmaxf(high, __shfl_xor_sync(kFullWarp, high, 2));
          best[m][i] = fmaxf(high, maximum[m][i]);
          // false for two infinities of the same sign, whose difference is NaN
          grows = grows || (best[m][i] - maximum[m][i]) * scale_log2 > kGrowth;
        }
      }
      if (__any_sync(kFullWarp, grows)) {
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float shrink =
                best[m][i] == maximum[m][i] ? 1.0f : exp2_fast((maximum[m][i] - best[m][i]) * scale_log2);
            maximum[m][i] = best[m][i];
            sum[m][i] *= shrink;
#pragma unroll
            for (int j = 0; j < kHeadSize / 8; ++j) {
              o[m][j][2 * i] *= shrink;
              o[m][j][2 * i + 1] *= shrink;
            }
          }
        }
      }
      float base[kRowBlocks][2];
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          // a row that has seen only -inf keeps weights of 0
          base[m][i] = maximum[m][i] == -kInfinity ? 0.0f : maximum[m][i] * scale_log2;
        }
      }
      const auto weigh = [&](int m, int j, int e) {
        const float weight = exp2_fast(fmaf(s[m][j][e], scale_log2, -base[m][e / 2]));
        s[m][j][e] = weight;
        sum[m][e / 2] += weight;
      };

      // ---- output ----
      if constexpr (!Shape::kPaired) {
        wait_copies<Shape::kBuffers - 2>();
        __syncthreads();
        ask();
      }
      const uint32_t value_base = ring + read + lane_base;
      advance(read);
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int e = 0; e < 8; ++e) weigh(m, e / 4, e % 4);
      }
#pragma unroll
      for (int j = 0; j < kQuarters; ++j) {
        uint32_t a[kRowBlocks][4];
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) pack_operand<T>(a[m], s[m][2 * j], s[m][2 * j + 1]);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          uint32_t b[4];
          load_block_transposed(b, Layout::block(value_base, j, step));
#pragma unroll
          for (int m = 0; m < kRowBlocks; ++m) {
            multiply_add<T>(o[m][2 * step], a[m], b[0], b[1]);
            multiply_add<T>(o[m][2 * step + 1], a[m], b[2], b[3]);
          }
          // the next quarter's exponentials fill the gaps between the products
          if (j + 1 < kQuarters) {
            constexpr int kEach = (kRowBlocks * 8 + kSteps - 1) / kSteps;
#pragma unroll
            for (int i = step * kEach; i < (step + 1) * kEach; ++i) {
              if (i < kRowBlocks * 8) weigh(i / 8, 2 * j + 2 + i % 8 / 4, i % 4);
            }
          }
        }
      }
    }
  }

  const auto token_and_head = [&](int r) {
    const uint32_t member = first_member + r, query = member / group;
    return (first_query + query) * p.q_heads + head * group + (member - query * group);
  };
  float* const lse = p.splits == 1 ? p.lse : p.partial_lse + split * p.num_queries * p.q_heads;
  float inverse[kRowBlocks][2];
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float total = sum[m][i];
      total += __shfl_xor_sync(kFullWarp, total, 1);
      total += __shfl_xor_sync(kFullWarp, total, 2);
      // no slots, or -inf scores alone: zeros
      const bool nothing = total == 0.0f;
      inverse[m][i] = nothing ? 0.0f : 1.0f / total;
      const int r = 16 * m + lane / 4 + 8 * i;
      if (lane % 4 == 0 && r < used_rows) {
        lse[token_and_head(r)] = nothing ? -kInfinity : (maximum[m][i] * scale_log2 + log2f(total)) * kLn2;
      }
    }
  }
  if (p.splits > 1) {
    float* const partial = p.partial_out + split * p.num_queries * p.q_heads * kHeadSize;
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = 16 * m + lane / 4 + 8 * i;
        if (r >= used_rows) continue;
        float* const to = partial + token_and_head(r) * kHeadSize + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kHeadSize / 8; ++j) {
          *reinterpret_cast<float2*>(to + 8 * j) =
              make_float2(o[m][j][2 * i] * inverse[m][i], o[m][j][2 * i + 1] * inverse[m][i]);
        }
      }
    }
    return;
  }
  // through the warp's own queries in shared memory, which it has finished with, so that rows are stored whole
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int j = 0; j < kHeadSize / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = 16 * m + lane / 4 + 8 * i;
        *reinterpret_cast<uint32_t*>(my_queries + Layout::at(r, j) + lane % 4 * 4) =
            pack_pair(T{}, o[m][j][2 * i] * inverse[m][i], o[m][j][2 * i + 1] * inverse[m][i]);
      }
    }
  }
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < Shape::kWarpRows * Layout::kChunks; i += 32) {
    const int r = i / Layout::kChunks, chunk = i % Layout::kChunks;
    if (r < used_rows) {
      *reinterpret_cast<uint4*>(static_cast<T*>(p.out) + token_and_head(r) * kHeadSize + 8 * chunk) =
          *reinterpret_cast<const uint4*>(my_queries + Layout::at(r, chunk));
    }
  }
}

template <class T, class Shape>
cudaError_t launch_tile(const InjectedAttentionParams& p, cudaStream_t stream) {
  const auto kernel = injected_attention<T, Shape>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  if (status != cudaSuccess) return status;
  // a batch row adds at most one tile that is not full
  const int64_t tiles = p.num_queries * (p.q_heads / p.kv_heads) / Shape::kRows + p.num_rows;
  const int64_t blocks = tiles * p.splits * p.kv_heads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  kernel<<<static_cast<unsigned>(blocks), Shape::kThreads, Shape::kSharedBytes, stream>>>(p,
                                                                                          static_cast<uint32_t>(tiles));
  return cudaGetLastError();
}

}  // namespace portable

#ifdef PORTABLE_TILE
template <class T, int kHeadSize>
cudaError_t launch_injected_attention_portable_instance(const InjectedAttentionParams& p, cudaStream_t stream) {
  return portable::launch_tile<T, portable::Tile<kHeadSize, PORTABLE_TILE>>(p, stream);
}
#endif

}  // namespace sharedllm

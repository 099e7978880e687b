// Injected attention with mma.sync, ldmatrix and cp.async. A block of 128 threads takes a tile of packed rows (GQA).
// Each warp keeps 16 or 32 of them, their outputs in registers, and loops over the slots in tiles that arrive in a ring
// of shared memory. The exponentials of a quarter of a tile are computed between the matmuls of the previous quarter.
// docs/kernels/injected_attention_portable.md has the derivation.
#pragma once

#include "kernels/common/mma.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/injected_attention/portable/tile.cuh"
#include "kernels/injected_attention/query_rotation.cuh"
#include "kernels/injected_attention/rows.cuh"

namespace sharedllm {
namespace portable {

// Packed rows of a warp.
struct WarpRows {
  int64_t first_query;
  uint32_t first_member;
  int used_rows;
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

// Whether a head has the chunk that this thread copies in a group of chunks.
template <class Shape>
__device__ __forceinline__ bool has_chunk(int head_size, int group) {
  return 8 * (group * Shape::Layout::kGroup + static_cast<int>(threadIdx.x) % Shape::Layout::kGroup) < head_size;
}

// Loads the next tile of keys or values into a buffer, from this thread's place in it on; zeros past its valid slots,
// which belong to another row. `anywhere` is a valid address for copies of nothing. Chunks that the head does not have
// stay as they are.
template <class T, class Shape>
__device__ __forceinline__ void load_slots(uint32_t to, const T*& from, int64_t row_stride, int valid,
                                           const void* anywhere, int head_size) {
  using Layout = typename Shape::Layout;
  constexpr int kPasses = Shape::kSlots / Shape::kCopyRows, kGroups = Layout::kChunks / Layout::kGroup;
  constexpr int kPassBytes = Shape::kCopyRows * Layout::kPitch, kGroupBytes = Layout::kGroup * 16;
  if (valid >= Shape::kSlots) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        if (!has_chunk<Shape>(head_size, group)) continue;
        copy16_async(to + pass * kPassBytes + group * kGroupBytes, from + group * Layout::kGroup * 8);
      }
      from += Shape::kCopyRows * row_stride;
    }
    return;
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const bool inside = static_cast<int>(threadIdx.x) / Layout::kGroup + pass * Shape::kCopyRows < valid;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (!has_chunk<Shape>(head_size, group)) continue;
      copy16_async(to + pass * kPassBytes + group * kGroupBytes, inside ? from + group * Layout::kGroup * 8 : anywhere,
                   inside);
    }
    from += Shape::kCopyRows * row_stride;
  }
}

// Zeros in the chunks of all buffers that a narrower head does not have.
template <class Shape>
__device__ __forceinline__ void clear_missing_chunks(uint8_t* ring, int head_size) {
  using Layout = typename Shape::Layout;
  const int missing = Layout::kChunks - head_size / 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < Shape::kBuffers * Shape::kSlots * missing; i += Shape::kThreads) {
    const int row = i / missing, chunk = head_size / 8 + i % missing;
    *reinterpret_cast<uint4*>(ring + Layout::at(row, chunk)) = uint4{};
  }
}

// Member of a group of heads -> query, without an integer division: a member of a tile is far below 2^22, and the half
// keeps the rounded quotient on the right side.
struct GroupDivision {
  uint32_t group;
  float inverse;
  __device__ __forceinline__ explicit GroupDivision(uint32_t group) : group(group), inverse(1.0f / group) {}
  __device__ __forceinline__ uint32_t query(uint32_t member) const {
    return __float2uint_rd((static_cast<float>(member) + 0.5f) * inverse);
  }
};

// A warp's packed rows into shared memory, rotated and rounded once; zeros past a narrower head's end. Rows past the
// used ones hold anything: no row reaches another.
template <class T, class Shape>
__device__ __forceinline__ void load_queries(const InjectedAttentionParams& p, int64_t position, uint8_t* to,
                                             const WarpRows& rows, int head, uint32_t group, float factor) {
  using Layout = typename Shape::Layout;
  if (rows.used_rows == 0) return;
  const int lane = threadIdx.x % 32;
  const RotaryRow rotary{p.cos + position * p.rotary_half, p.sin + position * p.rotary_half, p.rotary_half};
  const T* const q = static_cast<const T*>(p.q) + rows.first_query * p.q_stride[0] +
                     static_cast<int64_t>(head) * group * p.q_stride[1];
  const GroupDivision division(group);
  const auto vector = [&](int r) {
    const uint32_t member = rows.first_member + (r < rows.used_rows ? r : 0), query = division.query(member);
    return q + query * p.q_stride[0] + (member - query * group) * p.q_stride[1];
  };
  if (rotary.half % 8 != 0) {
    for (int i = lane; i < Shape::kWarpRows * Layout::kChunks; i += 32) {
      const int r = i / Layout::kChunks, chunk = i % Layout::kChunks;
      *reinterpret_cast<uint4*>(to + Layout::at(r, chunk)) =
          8 * chunk < p.head_size ? rotated_chunk(vector(r), chunk, rotary, factor) : uint4{};
    }
    return;
  }
  // A lane takes two chunks that are rotated with each other, or two that only pass, in every row of its own. So it
  // needs one part of the tables, and can request all of its rows before it needs the first.
  constexpr int kPairs = Layout::kChunks / 2, kLanes = kPairs <= 4 ? 4 : kPairs <= 8 ? 8 : 16;
  constexpr int kLaneRows = Shape::kWarpRows * kLanes / 32;
  const int pair = lane % kLanes, turning = rotary.half / 8;
  if (pair >= kPairs) return;
  const bool turns = pair < turning;
  const int low = turns ? pair : 2 * pair, high = turns ? pair + turning : 2 * pair + 1;
  uint4 first[kLaneRows], second[kLaneRows];
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const uint4* const from = reinterpret_cast<const uint4*>(vector(lane / kLanes + i * (32 / kLanes)));
    first[i] = 8 * low < p.head_size ? load_cached(from + low) : uint4{};
    second[i] = 8 * high < p.head_size ? load_cached(from + high) : uint4{};
  }
  float cos[8], sin[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    cos[i] = turns ? __ldg(rotary.cos + 8 * pair + i) * factor : factor;
    sin[i] = turns ? __ldg(rotary.sin + 8 * pair + i) * factor : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const int r = lane / kLanes + i * (32 / kLanes);
    float x[8], y[8], turned_x[8], turned_y[8];
    unpack8(T{}, first[i], x);
    unpack8(T{}, second[i], y);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      // what passes must not meet its neighbour: 0 * inf is NaN
      turned_x[e] = turns ? x[e] * cos[e] - y[e] * sin[e] : x[e] * factor;
      turned_y[e] = turns ? y[e] * cos[e] + x[e] * sin[e] : y[e] * factor;
    }
    *reinterpret_cast<uint4*>(to + Layout::at(r, low)) = pack8(T{}, turned_x);
    *reinterpret_cast<uint4*>(to + Layout::at(r, high)) = pack8(T{}, turned_y);
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

  // tiles of rows vary fastest, so that blocks that run together read the same slots
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
  // what the end needs again waits in shared memory: registers are short in between
  __shared__ WarpRows kept_rows[Shape::kWarps];
  const WarpRows asked_rows{row.q_begin + first_packed / group, static_cast<uint32_t>(first_packed % group), used_rows};
  if (lane == 0) kept_rows[warp] = asked_rows;

  // a negative scale negates the queries, so that the largest score is always the best one; a scale of 0 makes them 0
  const float scale_log2 = (p.scale == 0 ? 1.0f : fabsf(p.scale)) * kLog2E;
  uint8_t* const my_queries = shared + warp * Shape::kWarpRows * Layout::kPitch;
  const uint32_t ring = shared_address(shared) + Shape::kQueryBytes;
  const uint32_t lane_base = Layout::lane_base(lane), key_lane_base = Layout::pair_lane_base(lane);
  const uint32_t query_base = shared_address(my_queries) + lane_base;

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
    const int copy_row = threadIdx.x / Layout::kGroup, copy_chunk = threadIdx.x % Layout::kGroup;
    const int64_t copy_slot = row.slot_begin + range.begin * kSlots + copy_row;
    const T* key_from = static_cast<const T*>(p.k) + copy_slot * p.k_stride[0] + head * p.k_stride[1] + copy_chunk * 8;
    const T* value_from =
        static_cast<const T*>(p.v) + copy_slot * p.v_stride[0] + head * p.v_stride[1] + copy_chunk * 8;
    const uint32_t copy_to = ring + Layout::at(copy_row, copy_chunk);
    // Buffers in the order of their use: keys of a tile, its values, keys of the next.
    uint32_t write = 0, read = 0;
    const auto advance = [](uint32_t& buffer) {
      buffer += Shape::kTileBytes;
      if (buffer == Shape::kBuffers * Shape::kTileBytes) buffer = 0;
    };
    const auto ask_keys = [&](int n) {
      if (n < count) {
        load_slots<T, Shape>(copy_to + write, key_from, p.k_stride[0], n + 1 == count ? last_valid : kSlots, p.k,
                             p.head_size);
      }
      commit_copies();
      advance(write);
    };
    const auto ask_values = [&](int n) {
      if (n < count) {
        load_slots<T, Shape>(copy_to + write, value_from, p.v_stride[0], n + 1 == count ? last_valid : kSlots, p.v,
                             p.head_size);
      }
      commit_copies();
      advance(write);
    };
    ask_keys(0);
    if constexpr (Shape::kBuffers >= 3) ask_values(0);
    if (p.head_size < kHeadSize) clear_missing_chunks<Shape>(shared + Shape::kQueryBytes, p.head_size);

    const float factor = p.scale == 0 ? 0.0f : p.scale < 0 ? -1.0f : 1.0f;
    load_queries<T, Shape>(p, row.position, my_queries, asked_rows, head, group, factor);
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
        ask_keys(n + 1);
        ask_values(n + 1);
      } else {
        wait_copies<Shape::kBuffers - 2>();
        __syncthreads();
        if constexpr (Shape::kBuffers == 2) {
          ask_values(n);
        } else {
          ask_keys(n + 1);
        }
      }
      float s[kRowBlocks][kSlots / 8][4];
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int i = 0; i < kSlots / 8 * 4; ++i) s[m][i / 4][i % 4] = 0;
      }
      const uint32_t key_base = ring + read + key_lane_base;
      advance(read);
      // fragments are loaded one matmul ahead
      uint32_t a[2][kRowBlocks][4], b[2][4];
      const auto load_query_step = [&](int step) {
        if constexpr (!Shape::kKeepQueries) {
#pragma unroll
          for (int m = 0; m < kRowBlocks; ++m) load_block(a[step % 2][m], Layout::block(query_base, m, step));
        }
      };
      load_query_step(0);
      load_block(b[0], Layout::block(key_base, 0, 0));
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int j = 0; j < kQuarters; ++j) {
          if (j + 1 < kQuarters) {
            load_block(b[(j + 1) % 2], Layout::block(key_base, j + 1, step));
          } else if (step + 1 < kSteps) {
            load_block(b[0], Layout::block(key_base, 0, step + 1));
            load_query_step(step + 1);
          }
#pragma unroll
          for (int m = 0; m < kRowBlocks; ++m) {
            const uint32_t (&query)[4] = Shape::kKeepQueries ? kept[Shape::kKeepQueries ? step : 0][m] : a[step % 2][m];
            multiply_add<T>(s[m][2 * j], query, b[j % 2][0], b[j % 2][1]);
            multiply_add<T>(s[m][2 * j + 1], query, b[j % 2][2], b[j % 2][3]);
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
        if constexpr (Shape::kBuffers == 2) {
          ask_keys(n + 1);
        } else {
          ask_values(n + 1);
        }
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
          // the next quarter's exponentials fill the gaps between the matmuls
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

  __syncwarp();
  const WarpRows rows = kept_rows[warp];
  const int64_t first_token = rows.first_query * p.q_heads + static_cast<int64_t>(head) * group;
  const GroupDivision division(group);
  const auto token_and_head = [&](int r) {
    const uint32_t member = rows.first_member + r, query = division.query(member);
    return first_token + static_cast<int64_t>(query) * p.q_heads + (member - query * group);
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
      // no slots, or only -inf scores: zeros
      const bool nothing = total == 0.0f;
      inverse[m][i] = nothing ? 0.0f : 1.0f / total;
      const int r = 16 * m + lane / 4 + 8 * i;
      if (lane % 4 == 0 && r < rows.used_rows) {
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
        if (r >= rows.used_rows) continue;
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
  // epilogue through the warp's own queries in shared memory, which it has finished with, so that whole rows are stored
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
    if (r < rows.used_rows && 8 * chunk < p.head_size) {
      *reinterpret_cast<uint4*>(static_cast<T*>(p.out) + token_and_head(r) * p.head_size + 8 * chunk) =
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
  // a batch row adds at most one partial tile
  const int64_t tiles = p.num_queries * (p.q_heads / p.kv_heads) / Shape::kRows + p.num_rows;
  const int64_t blocks = tiles * p.splits * p.kv_heads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  kernel<<<static_cast<unsigned>(blocks), Shape::kThreads, Shape::kSharedBytes, stream>>>(p,
                                                                                          static_cast<uint32_t>(tiles));
  return cudaGetLastError();
}

}  // namespace portable

#ifndef PORTABLE_TILE
template <class T, int kHeadSize>
cudaError_t launch_injected_attention_portable_instance(const InjectedAttentionParams& p, cudaStream_t stream) {
  using Choice = portable::TileChoice<kHeadSize>;
  portable::SharedMemory memory;
  const cudaError_t status = portable::query_shared_memory(&memory);
  if (status != cudaSuccess) return status;
  if (memory.fits<typename Choice::Large>()) return portable::launch_tile<T, typename Choice::Large>(p, stream);
  if (memory.fits<typename Choice::Medium>()) return portable::launch_tile<T, typename Choice::Medium>(p, stream);
  return portable::launch_tile<T, typename Choice::Small>(p, stream);
}
#else
template <class T, int kHeadSize>
cudaError_t launch_injected_attention_portable_instance(const InjectedAttentionParams& p, cudaStream_t stream) {
  return portable::launch_tile<T, portable::Tile<kHeadSize, PORTABLE_TILE>>(p, stream);
}
#endif

}  // namespace sharedllm

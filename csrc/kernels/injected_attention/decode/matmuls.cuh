// Matmuls of a block of slots and the softmax between them. Scores are computed transposed (slots x packed rows), so
// that eight packed rows fill an mma.sync.
#pragma once

#include <cstdint>

#include "kernels/common/mma.cuh"
#include "kernels/common/scalar.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/common/vector_load.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/injected_attention/decode/config.cuh"
#include "kernels/injected_attention/decode/queries.cuh"
#include "kernels/injected_attention/decode/tiles.cuh"

namespace sharedllm {
namespace decode {

// Two of four signed bytes (the selector names them in its first and third digit) as halves: 1024 + 128 + x has the
// byte x + 128 as its low bits.
template <uint32_t kSelector>
__device__ __forceinline__ uint32_t bytes_to_halves(uint32_t flipped) {
  const uint32_t raised = __byte_perm(flipped, 0x64646464u, kSelector);
  const __half2 offset = __half2half2(__ushort_as_half(0x6480));
  const __half2 x = __hsub2(*reinterpret_cast<const __half2*>(&raised), offset);
  return *reinterpret_cast<const uint32_t*>(&x);
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

}  // namespace decode
}  // namespace sharedllm

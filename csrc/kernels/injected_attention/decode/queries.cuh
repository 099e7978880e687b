// The queries of a tile: rotated into shared memory, and from there as an operand.
#pragma once

#include <cstdint>

#include "kernels/common/hopper.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/common/vector_load.cuh"
#include "kernels/injected_attention/decode/config.cuh"
#include "kernels/injected_attention/decode/tiles.cuh"

namespace sharedllm {
namespace decode {

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

// The power of 2 by which a row's queries are divided for matmuls with 8-bit keys: in float16 they then keep all bits
// of float16 and bfloat16. 0 for rows too small to be divided.
__device__ __forceinline__ float query_divisor(float largest) {
  return __uint_as_float(__float_as_uint(largest) & 0x7f800000u);
}

// Queries of a tile to shared memory, rotated in float32 and rounded once, rows past the batch row's end as zeros; the
// consumers take part. A thread rotates pairs (i, i + R/2), then takes the columns past R; those past a narrower head's
// end are zeros. 8-bit: divided by query_divisor() of the row's largest, which goes to row_largest.
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
    int low = turns ? pair : 2 * pair, high = turns ? pair + p.rotary_half : 2 * pair + 1;
    if constexpr (C::kMayBeWider) {
      if (2 * pair >= p.head_size) low = high = 0;
    }
    raw.low = from[low];
    raw.high = from[high];
    raw.c = 1, raw.s = 0;
    if (p.rotary_half > 0) {
      const int at = turns ? pair : 0;
      raw.c = cos[at], raw.s = sin[at];
    }
  };
  const auto turn = [&](int r, int pair, const Raw& raw, float (&x)[2]) {
    const float low = to_float(raw.low), high = to_float(raw.high);
    const bool turns = pair < p.rotary_half;
    bool inside = tile * C::kRows + r < packed_rows;
    if constexpr (C::kMayBeWider) inside = inside && 2 * pair < p.head_size;
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

}  // namespace decode
}  // namespace sharedllm

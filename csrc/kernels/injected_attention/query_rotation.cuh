// RoPE of the queries on their way into shared memory: rotated in float32 by the position of their batch row, rounded
// once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/common/vector_load.cuh"

namespace sharedllm {

// One row of the rotary tables: element i < half is rotated with element i + half; elements past both halves pass
// through.
struct RotaryRow {
  const float* cos;
  const float* sin;
  int half;
};

__device__ __forceinline__ void unpack8(__nv_bfloat16, const uint4& from, float (&to)[8]) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = Word<__nv_bfloat16>::get(words[i / 2], i & 1);
}
__device__ __forceinline__ void unpack8(__half, const uint4& from, float (&to)[8]) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = Word<__half>::get(words[i / 2], i & 1);
}

__device__ __forceinline__ uint4 pack8(__nv_bfloat16, const float (&from)[8]) {
  uint4 to;
  uint32_t* const words = &to.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
    words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return to;
}
__device__ __forceinline__ uint4 pack8(__half, const float (&from)[8]) {
  uint4 to;
  uint32_t* const words = &to.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 pair = __floats2half2_rn(from[2 * i], from[2 * i + 1]);
    words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return to;
}

// Elements 8 * chunk .. 8 * chunk + 7 of a head's vector (aligned to 16 bytes), rotated, times a factor; with kBack by
// the transposed rotation.
template <class T, bool kBack = false>
__device__ __forceinline__ uint4 rotated_chunk(const T* vector, int chunk, const RotaryRow& rotary, float factor) {
  const int first = 8 * chunk, half = rotary.half;
  float x[8];
  unpack8(T{}, load_cached(reinterpret_cast<const uint4*>(vector + first)), x);
  if (half % 8 == 0) {
    if (first < 2 * half) {
      const bool low = first < half;
      float partner[8];
      unpack8(T{}, load_cached(reinterpret_cast<const uint4*>(vector + (low ? first + half : first - half))), partner);
      const int at = low ? first : first - half;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float cos = __ldg(rotary.cos + at + i), sin = __ldg(rotary.sin + at + i);
        x[i] = x[i] * cos + (low != kBack ? -partner[i] : partner[i]) * sin;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int element = first + i;
      const float sign = kBack ? -1.0f : 1.0f;
      if (element < half) {
        x[i] = x[i] * rotary.cos[element] - sign * to_float(vector[element + half]) * rotary.sin[element];
      } else if (element < 2 * half) {
        x[i] = x[i] * rotary.cos[element - half] + sign * to_float(vector[element - half]) * rotary.sin[element - half];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] *= factor;
  return pack8(T{}, x);
}

}  // namespace sharedllm

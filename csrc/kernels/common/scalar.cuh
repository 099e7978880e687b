// Small functions of scalars.
#pragma once

#include <cstdint>

namespace sharedllm {

// Index values come from the caller: clamped, they never become wild addresses.
__device__ __forceinline__ int64_t clamp_index(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace sharedllm

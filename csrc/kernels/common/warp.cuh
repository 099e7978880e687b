// Warp-level primitives: sum, search.
#pragma once

#include <cstdint>

namespace sharedllm {

constexpr unsigned kFullWarp = 0xffffffffu;

// Sum over kLanes neighbouring threads, the same in each of them; every thread of the warp takes part.
template <int kLanes>
__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

// First index in [0, count] whose value is not below target, or count. 32 probes a step, since each step costs a load's
// latency. Terminates, inside [0, count], even if the values are not sorted.
__device__ __forceinline__ int64_t lower_bound_by_warp(const int64_t* values, int64_t count, int64_t target, int lane) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t step = (high - low + 31) / 32;
    const int64_t probe = low + (lane + 1) * step - 1;
    const bool below = probe < high && values[probe] < target;
    const int passed = __popc(__ballot_sync(kFullWarp, below));
    const int64_t next = low + (passed + 1) * step - 1;
    high = next < high ? next : high;
    low = low + passed * step < high ? low + passed * step : high;
  }
  return low;
}

}  // namespace sharedllm

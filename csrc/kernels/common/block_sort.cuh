// Bitonic sort in shared memory by one block.
#pragma once

#include <cstdint>

namespace sharedllm {

// Sorts keys[0 .. count) in ascending order; count is a power of two. The caller synchronises before; all threads of
// the block see the result after.
template <int kThreads>
__device__ __forceinline__ void sort_by_block(uint64_t* keys, int count) {
  for (int size = 2; size <= count; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int t = threadIdx.x; t < count / 2; t += kThreads) {
        const int low = 2 * t - (t & (stride - 1)), high = low + stride;
        const uint64_t a = keys[low], b = keys[high];
        const bool rising = (low & size) == 0;
        if ((a > b) == rising) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      // with strides up to 32 a warp's pairs are in 64 keys of its own
      const int next = stride > 1 ? stride / 2 : size;
      if (stride > 32 || next > 32 || (stride == 1 && size == count)) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    }
  }
}

}  // namespace sharedllm

// L2 prefetch of memory that a later kernel reads, while this one leaves the memory idle (compute capability 9.0).
#pragma once

#include <cstdint>

namespace sharedllm {

// Prefetches the block's share of `bytes` (a multiple of 16, like the address); does nothing on older devices.
__device__ __forceinline__ void prefetch_share(const void* from, int64_t bytes) {
#if __CUDA_ARCH__ >= 900
  constexpr int64_t kPiece = 8192;
  if (from == nullptr || threadIdx.x % 32 != 0) return;
  const int64_t warps = blockDim.x / 32;
  const int64_t step = gridDim.x * warps * kPiece;
  for (int64_t at = (blockIdx.x * warps + threadIdx.x / 32) * kPiece; at < bytes; at += step) {
    const unsigned size = static_cast<unsigned>(bytes - at < kPiece ? bytes - at : kPiece);
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(static_cast<const char*>(from) + at), "r"(size)
                 : "memory");
  }
#endif
}

}  // namespace sharedllm

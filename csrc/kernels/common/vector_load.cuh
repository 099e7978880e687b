// 16-byte loads, and element types as float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sharedllm {

// Data that is read once: do not evict what is reused (the queries) from the caches.
__device__ __forceinline__ uint4 load_streaming(const uint4* from) { return __ldcs(from); }
__device__ __forceinline__ uint4 load_cached(const uint4* from) { return __ldg(from); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Two numbers in one register, the first in the low half.
__device__ __forceinline__ uint32_t pack_pair(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pack_pair(__half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// The elements of one 32-bit word of a vector: one float, or two narrow numbers.
template <class T>
struct Word;

template <>
struct Word<float> {
  static constexpr int kElements = 1;
  static __device__ __forceinline__ float get(uint32_t word, int) { return __uint_as_float(word); }
};

template <>
struct Word<__nv_bfloat16> {
  static constexpr int kElements = 2;
  // bfloat16 is the upper half of the float32 of the same value
  static __device__ __forceinline__ float get(uint32_t word, int element) {
    return __uint_as_float(element ? word & 0xffff0000u : word << 16);
  }
};

template <>
struct Word<__half> {
  static constexpr int kElements = 2;
  static __device__ __forceinline__ float get(uint32_t word, int element) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(element ? word >> 16 : word & 0xffffu)));
  }
};

}  // namespace sharedllm

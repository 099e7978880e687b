#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/common/vector_load.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/common/with_float_type.h"
#include "kernels/memory_quantization.h"

namespace sharedllm {
namespace {

constexpr int kThreads = 256;
constexpr float kLargestCode = 127.0f;
constexpr float kSmallest = 7.888609052210118e-31f;  // 2^-100: 127 / x stays finite

// 8 neighbouring elements
__device__ __forceinline__ void load8(const float* from, float (&x)[8]) {
  const float4 low = __ldcs(reinterpret_cast<const float4*>(from));
  const float4 high = __ldcs(reinterpret_cast<const float4*>(from) + 1);
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}
template <class T>
__device__ __forceinline__ void load8(const T* from, float (&x)[8]) {
  const uint4 words = load_streaming(reinterpret_cast<const uint4*>(from));
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = Word<T>::get(word[i / 2], i & 1);
}

__device__ __forceinline__ void store8(float* to, const float (&x)[8]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}
__device__ __forceinline__ void store8(__nv_bfloat16* to, const float (&x)[8]) {
  __align__(16) __nv_bfloat162 pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(pairs);
}
__device__ __forceinline__ void store8(__half* to, const float (&x)[8]) {
  __align__(16) __half2 pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(pairs);
}

// kLanes threads per vector, 8 elements each; those past its end idle.
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads) quantize(const MemoryQuantizationParams p) {
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int column = threadIdx.x % kLanes * 8;
  const bool active = vector < p.num_slots * p.heads && column < p.head_size;
  float x[8] = {};
  const int64_t slot = vector / p.heads, head = vector - slot * p.heads;
  if (active) {
    load8(static_cast<const T*>(p.input) + slot * p.stride[0] + head * p.stride[1] + column, x);
  }
  // as bits, because they are ordered like magnitudes and NaN is above infinity
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) bits = max(bits, __float_as_uint(fabsf(x[i])));
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) bits = max(bits, __shfl_xor_sync(kFullWarp, bits, offset));
  if (!active) return;
  const float largest = __uint_as_float(bits);
  const bool finite = largest < __builtin_inff();
  const float inverse = finite && largest >= kSmallest ? __frcp_rn(largest) * kLargestCode : 0.0f;
  uint32_t packed[2] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int code = inverse == 0.0f ? 0 : __float2int_rn(x[i] * inverse);
    packed[i / 4] |= (static_cast<uint32_t>(code) & 0xffu) << (i % 4 * 8);
  }
  *reinterpret_cast<uint2*>(p.codes + vector * p.head_size + column) = make_uint2(packed[0], packed[1]);
  if (column == 0) {
    p.scale[slot * p.scale_stride[0] + head * p.scale_stride[1]] = !finite           ? largest
                                                                   : inverse == 0.0f ? 0.0f
                                                                                     : largest * (1.0f / kLargestCode);
  }
}

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads) dequantize(const MemoryDequantizationParams p) {
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int column = threadIdx.x % kLanes * 8;
  if (vector >= p.num_slots * p.heads || column >= p.head_size) return;
  const int64_t slot = vector / p.heads, head = vector - slot * p.heads;
  const uint2 packed =
      *reinterpret_cast<const uint2*>(p.codes + slot * p.code_stride[0] + head * p.code_stride[1] + column);
  const float scale = p.scale[slot * p.scale_stride[0] + head * p.scale_stride[1]];
  const uint32_t words[2] = {packed.x, packed.y};
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = static_cast<float>(static_cast<int8_t>(words[i / 4] >> (i % 4 * 8))) * scale;
  store8(static_cast<T*>(p.out) + vector * p.head_size + column, x);
}

template <class T, int kLanes>
cudaError_t run(const MemoryQuantizationParams& p, unsigned blocks, cudaStream_t stream) {
  quantize<T, kLanes><<<blocks, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}
template <class T, int kLanes>
cudaError_t run(const MemoryDequantizationParams& p, unsigned blocks, cudaStream_t stream) {
  dequantize<T, kLanes><<<blocks, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <class T, class Params>
cudaError_t launch(const Params& p, cudaStream_t stream) {
  const int lanes = p.head_size <= 64 ? 8 : p.head_size <= 128 ? 16 : 32;
  const int64_t vectors = p.num_slots * p.heads, blocks = (vectors + kThreads / lanes - 1) / (kThreads / lanes);
  if (p.head_size % 8 != 0 || p.head_size > 256) return cudaErrorNotSupported;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (vectors == 0) return cudaSuccess;
  switch (lanes) {
    case 8:
      return run<T, 8>(p, static_cast<unsigned>(blocks), stream);
    case 16:
      return run<T, 16>(p, static_cast<unsigned>(blocks), stream);
    default:
      return run<T, 32>(p, static_cast<unsigned>(blocks), stream);
  }
}

template <class Params>
cudaError_t launch_type(const Params& p, cudaStream_t stream) {
  return with_float_type(p.type, [&](auto number) { return launch<decltype(number)>(p, stream); });
}

}  // namespace

cudaError_t launch_quantize_memory(const MemoryQuantizationParams& params, cudaStream_t stream) {
  return launch_type(params, stream);
}

cudaError_t launch_dequantize_memory(const MemoryDequantizationParams& params, cudaStream_t stream) {
  return launch_type(params, stream);
}

}  // namespace sharedllm

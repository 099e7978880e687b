#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/common/softmax.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/common/with_float_type.h"
#include "kernels/injected_attention/combine.h"

namespace sharedllm {
namespace {

constexpr int kBlockWarps = 4;
// loads of a lane in flight
constexpr int kLoads = 4;

__device__ __forceinline__ void store4(float* to, const float4& x) { *reinterpret_cast<float4*>(to) = x; }
__device__ __forceinline__ void store4(__nv_bfloat16* to, const float4& x) {
  __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w)};
  *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(pairs);
}
__device__ __forceinline__ void store4(__half* to, const float4& x) {
  __half2 pairs[2] = {__floats2half2_rn(x.x, x.y), __floats2half2_rn(x.z, x.w)};
  *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(pairs);
}

__device__ __forceinline__ void add_weighted(float4& sum, float weight, const float4& x) {
  sum.x = fmaf(weight, x.x, sum.x);
  sum.y = fmaf(weight, x.y, sum.y);
  sum.z = fmaf(weight, x.z, sum.z);
  sum.w = fmaf(weight, x.w, sum.w);
}

// NaN wins, so that a row with NaN is not taken for one without slots.
__device__ __forceinline__ float max_or_nan(float x, float y) { return x > y || x != x ? x : y; }

__device__ __forceinline__ float max_lanes(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = max_or_nan(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

// kRowWarps warps share the parts of one result (a query's head): more than one if there are too few results to fill
// the GPU.
template <class T, int kRowWarps>
__global__ void __launch_bounds__(32 * kBlockWarps) combine(const InjectedAttentionParams p, int64_t results) {
  __shared__ float4 shared[kRowWarps > 1 ? kBlockWarps : 1][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp % kRowWarps;
  const int64_t result = static_cast<int64_t>(blockIdx.x) * (kBlockWarps / kRowWarps) + warp / kRowWarps;
  // with several warps per result there is one result per block, so that all its warps leave together
  if (result >= results) return;
  const float* const lse = p.partial_lse + result;
  float maximum = -kInfinity;
  for (int split = lane; split < p.splits; split += 32) maximum = max_or_nan(maximum, lse[split * results]);
  maximum = max_lanes(maximum);
  T* const out = static_cast<T*>(p.out) + result * p.head_size;
  const int vectors = p.head_size / 4;
  if (maximum == -kInfinity) {
    for (int i = part * 32 + lane; i < vectors; i += 32 * kRowWarps) store4(out + 4 * i, float4{});
    if (part == 0 && lane == 0) p.lse[result] = -kInfinity;
    return;
  }
  float total = 0;
  for (int split = lane; split < p.splits; split += 32) total += expf(lse[split * results] - maximum);
  total = sum_lanes<32>(total);
  if (part == 0 && lane == 0) p.lse[result] = maximum + logf(total);

  const float* const partial = p.partial_out + result * p.columns;
  const int64_t stride = results * p.columns;
  for (int first = 0; first < vectors; first += 32) {
    const int vector = first + lane;
    const bool mine = vector < vectors;
    float4 sum{};
    for (int base = 0; base < p.splits; base += 32) {
      const float weight = base + lane < p.splits ? expf(lse[(base + lane) * results] - maximum) : 0.0f;
      const int end = p.splits - base < 32 ? p.splits - base : 32;
      for (int i = part; i < end; i += kLoads * kRowWarps) {
        // all loads before the first use; parts without weight are never read
        float4 x[kLoads];
        float weights[kLoads];
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
          const int split = i + j * kRowWarps;
          weights[j] = __shfl_sync(kFullWarp, weight, split & 31);
          if (split >= end) weights[j] = 0;
          x[j] = float4{};
          if (mine && weights[j] != 0) {
            x[j] = __ldcs(reinterpret_cast<const float4*>(partial + (base + split) * stride) + vector);
          }
        }
#pragma unroll
        for (int j = 0; j < kLoads; ++j) add_weighted(sum, weights[j], x[j]);
      }
    }
    if (kRowWarps > 1) {
      shared[warp][lane] = sum;
      __syncthreads();
      if (part == 0) {
#pragma unroll
        for (int other = 1; other < kRowWarps; ++other) add_weighted(sum, 1.0f, shared[warp + other][lane]);
      }
      __syncthreads();
    }
    if (part == 0 && mine) {
      const float inverse = 1.0f / total;
      store4(out + 4 * vector, float4{sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse});
    }
  }
}

template <class T>
cudaError_t launch(const InjectedAttentionParams& p, cudaStream_t stream) {
  const int64_t results = p.num_queries * p.q_heads;
  // four warps per result while that is still fewer warps than the largest GPUs hold at once
  if (p.splits >= 8 && results <= 2048) {
    combine<T, kBlockWarps><<<static_cast<unsigned>(results), 32 * kBlockWarps, 0, stream>>>(p, results);
  } else {
    const int64_t blocks = (results + kBlockWarps - 1) / kBlockWarps;
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    combine<T, 1><<<static_cast<unsigned>(blocks), 32 * kBlockWarps, 0, stream>>>(p, results);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_injected_attention_combine(const InjectedAttentionParams& p, cudaStream_t stream) {
  if (p.num_queries == 0 || p.q_heads == 0) return cudaSuccess;
  if (p.splits < 1 || p.head_size % 4 != 0) return cudaErrorInvalidValue;
  return with_float_type(p.type, [&](auto number) { return launch<decltype(number)>(p, stream); });
}

}  // namespace sharedllm

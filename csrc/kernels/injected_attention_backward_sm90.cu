#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/common/vector_load.cuh"
#include "kernels/injected_attention_backward_sm90.h"

namespace sharedllm {

// defined in instances/
template <class T, int kHeadSize>
cudaError_t launch_query_gradient(const InjectedAttentionBackwardParams& params, cudaStream_t stream);
template <class T, int kHeadSize>
cudaError_t launch_backward(const InjectedAttentionBackwardParams& params, cudaStream_t stream);

namespace {

constexpr int kSlotTile = 128, kThreads = 256;

__device__ __forceinline__ uint32_t round_pair(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t round_pair(__half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// grad_k and grad_v from the shares of the parts, in their order.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_shares_kernel(const __grid_constant__ InjectedAttentionBackwardParams p,
                                                              const __grid_constant__ int64_t quads) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= 2 * quads) return;
  const bool is_value = index >= quads;
  const int64_t at = is_value ? index - quads : index;
  const float4* const from = reinterpret_cast<const float4*>(is_value ? p.partial_grad_v : p.partial_grad_k) + at;
  float4 sum = __ldcs(from);
  for (int split = 1; split < p.kv_splits; ++split) {
    const float4 x = __ldcs(from + split * quads);
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }
  static_cast<uint2*>(is_value ? p.grad_v : p.grad_k)[at] =
      make_uint2(round_pair(T{}, sum.x, sum.y), round_pair(T{}, sum.z, sum.w));
}

template <class T>
cudaError_t launch_sum_shares(const InjectedAttentionBackwardParams& params, cudaStream_t stream) {
  const int64_t quads = params.forward.num_slots * params.forward.kv_heads * params.forward.head_size / 4;
  const int64_t blocks = (2 * quads + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  sum_shares_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params, quads);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_dq(const InjectedAttentionBackwardParams& params, cudaStream_t stream) {
  if (params.forward.num_queries == 0 || params.forward.num_rows == 0) return cudaSuccess;
  switch (params.forward.head_size) {
    case 64:
      return launch_query_gradient<T, 64>(params, stream);
    case 96:
      return launch_query_gradient<T, 96>(params, stream);
    case 128:
      return launch_query_gradient<T, 128>(params, stream);
    case 256:
      return launch_query_gradient<T, 256>(params, stream);
    default:
      return cudaErrorNotSupported;
  }
}

template <class T>
cudaError_t launch_all(const InjectedAttentionBackwardParams& params, cudaStream_t stream) {
  if (params.forward.num_slots == 0) return cudaSuccess;
  cudaError_t status = cudaErrorNotSupported;
  switch (params.forward.head_size) {
    case 64:
      status = launch_backward<T, 64>(params, stream);
      break;
    case 96:
      status = launch_backward<T, 96>(params, stream);
      break;
    case 128:
      status = launch_backward<T, 128>(params, stream);
      break;
  }
  if (status != cudaSuccess || params.kv_splits == 1) return status;
  return launch_sum_shares<T>(params, stream);
}

template <class T>
cudaError_t launch(const InjectedAttentionBackwardParams& params, cudaStream_t stream) {
  return params.grad_k == nullptr ? launch_dq<T>(params, stream) : launch_all<T>(params, stream);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

cudaError_t plan_injected_attention_backward_sm90(InjectedAttentionBackwardParams* params) {
  params->kv_splits = 1;
  int device = 0, processors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const InjectedAttentionParams& forward = params->forward;
  const int64_t blocks = (forward.num_slots + kSlotTile - 1) / kSlotTile * forward.kv_heads;
  if (blocks == 0) return cudaSuccess;
  // A part below 16 steps of 64 rows spends too much of its time on its start, and on its shares of grad_k and grad_v.
  const int64_t steps = forward.num_queries * (forward.q_heads / forward.kv_heads) / 64;
  const int64_t most = std::min<int64_t>(32, steps / 16);
  double best = 0;
  for (int splits = 1; splits <= std::max<int64_t>(most, 1); ++splits) {
    const int64_t total = blocks * splits, waves = (total + processors - 1) / processors;
    const double busy = static_cast<double>(total) / (waves * processors);
    if (busy > best + 0.05) best = busy, params->kv_splits = splits;
  }
  return cudaSuccess;
}

cudaError_t launch_injected_attention_backward_sm90(const InjectedAttentionBackwardParams& params,
                                                    cudaStream_t stream) {
  const InjectedAttentionParams& forward = params.forward;
  const bool all = params.grad_k != nullptr;
  if (all != (params.grad_v != nullptr)) return cudaErrorNotSupported;
  for (int i = 0; i < 2; ++i) {
    if (forward.k_stride[i] % 8 != 0 || forward.v_stride[i] % 8 != 0) return cudaErrorNotSupported;
  }
  for (const void* pointer : {forward.k, forward.v, params.grad_out, static_cast<const void*>(params.q_rotated),
                              static_cast<const void*>(params.grad_q), static_cast<const void*>(params.grad_k),
                              static_cast<const void*>(params.grad_v), static_cast<const void*>(params.grad_q_float)}) {
    if (!is_aligned(pointer)) return cudaErrorNotSupported;
  }
  if (all && (params.grad_q_float == nullptr || params.kv_splits < 1)) return cudaErrorInvalidValue;
  switch (forward.type) {
    case FloatType::kBFloat16:
      return launch<__nv_bfloat16>(params, stream);
    case FloatType::kFloat16:
      return launch<__half>(params, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace sharedllm

// Backward of injected attention, portable path: plan, choice of the instance, sum of the partial gradients.
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/common/mma.cuh"
#include "kernels/injected_attention_backward_portable.h"
#include "kernels/injected_attention_backward_portable_tiles.h"

namespace sharedllm {
namespace {

using namespace backward_portable;

constexpr int kThreads = 256;
// Blocks beyond this many for each multiprocessor gain nothing, and every part costs a pass over grad_k and grad_v.
constexpr int kMaxSplits = 32;

template <class T>
__global__ void __launch_bounds__(kThreads) sum_partial_kernel(const InjectedAttentionBackwardParams p, int64_t quads) {
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
  reinterpret_cast<uint2*>(is_value ? p.grad_v : p.grad_k)[at] =
      make_uint2(pack_pair(T{}, sum.x, sum.y), pack_pair(T{}, sum.z, sum.w));
}

template <class T>
cudaError_t launch_sum_partial(const InjectedAttentionBackwardParams& p, cudaStream_t stream) {
  const int64_t quads = p.forward.num_slots * p.forward.kv_heads * p.forward.head_size / 4;
  const int64_t blocks = (2 * quads + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  sum_partial_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, quads);
  return cudaGetLastError();
}

struct Shape {
  int slots, rows, blocks;
};

template <int kHeadSize>
Shape describe(int shared_memory) {
  using Small = typename KeyValueChoice<kHeadSize>::Small;
  using Large = typename KeyValueChoice<kHeadSize>::Large;
  if (fits(Large::shared_bytes(true), shared_memory)) return {Large::kSlots, Large::kRows, Large::kBlocks};
  return {Small::kSlots, Small::kRows, Small::kBlocks};
}

template <class T>
cudaError_t launch_any(const InjectedAttentionBackwardParams& p, cudaStream_t stream) {
  switch (p.forward.head_size) {
    case 64:
      return launch_injected_attention_backward_portable_instance<T, 64>(p, stream);
    case 96:
      return launch_injected_attention_backward_portable_instance<T, 96>(p, stream);
    case 128:
      return launch_injected_attention_backward_portable_instance<T, 128>(p, stream);
    case 256:
      return launch_injected_attention_backward_portable_instance<T, 256>(p, stream);
    default:
      return cudaErrorNotSupported;
  }
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

cudaError_t plan_injected_attention_backward_portable(InjectedAttentionBackwardParams* params) {
  const InjectedAttentionParams& f = params->forward;
  params->kv_splits = 1;
  int device = 0, processors = 0, shared_memory = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = query_shared_memory(&shared_memory);
  if (error != cudaSuccess) return error;
  Shape shape{};
  switch (f.head_size) {
    case 64:
      shape = describe<64>(shared_memory);
      break;
    case 96:
      shape = describe<96>(shared_memory);
      break;
    case 128:
      shape = describe<128>(shared_memory);
      break;
    case 256:
      shape = describe<256>(shared_memory);
      break;
    default:
      return cudaErrorNotSupported;
  }
  const int64_t blocks = (f.num_slots + shape.slots - 1) / shape.slots * f.kv_heads;
  const int64_t places = static_cast<int64_t>(processors) * shape.blocks;
  if (blocks == 0) return cudaSuccess;
  // A batch row of equal slots has at least this many steps; a part should have 8 of them to be worth its start.
  const int64_t steps = f.num_queries * (f.q_heads / f.kv_heads) / shape.rows;
  const int64_t most = std::min<int64_t>(kMaxSplits, steps / 8);
  double best = 0;
  for (int splits = 1; splits <= std::max<int64_t>(most, 1); ++splits) {
    const int64_t total = blocks * splits, waves = (total + places - 1) / places;
    const double busy = static_cast<double>(total) / (waves * places);
    if (busy > best + 0.05) {
      best = busy;
      params->kv_splits = splits;
    }
  }
  return cudaSuccess;
}

cudaError_t launch_injected_attention_backward_portable(const InjectedAttentionBackwardParams& params,
                                                        cudaStream_t stream) {
  const InjectedAttentionParams& f = params.forward;
  bool supported = f.type != FloatType::kFloat32 && (params.grad_k == nullptr) == (params.grad_v == nullptr);
  for (int i = 0; i < 2; ++i) supported = supported && f.k_stride[i] % 8 == 0 && f.v_stride[i] % 8 == 0;
  for (const void* pointer :
       {f.k, f.v, static_cast<const void*>(params.grad_q), static_cast<const void*>(params.grad_k),
        static_cast<const void*>(params.grad_v), static_cast<const void*>(params.grad_q_float),
        static_cast<const void*>(params.q_rotated), params.grad_out}) {
    supported = supported && is_aligned(pointer);
  }
  if (!supported) return cudaErrorNotSupported;
  const bool is_bfloat16 = f.type == FloatType::kBFloat16;
  const cudaError_t error =
      is_bfloat16 ? launch_any<__nv_bfloat16>(params, stream) : launch_any<__half>(params, stream);
  if (error != cudaSuccess || params.grad_k == nullptr || params.kv_splits == 1) return error;
  return is_bfloat16 ? launch_sum_partial<__nv_bfloat16>(params, stream) : launch_sum_partial<__half>(params, stream);
}

}  // namespace sharedllm

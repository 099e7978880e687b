// Injected attention for a few queries per row: plan, workspace, choice of the instance.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/injected_attention_decode.h"

namespace sharedllm {
namespace {

cudaError_t device_attribute(cudaDeviceAttr attribute, int* value) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  return status != cudaSuccess ? status : cudaDeviceGetAttribute(value, attribute, device);
}

template <class T, int kHeadSize>
cudaError_t launch(const InjectedAttentionParams& p, cudaStream_t stream) {
  int major = 0;
  cudaError_t status = device_attribute(cudaDevAttrComputeCapabilityMajor, &major);
  if (status != cudaSuccess) return status;
  if (major >= 9) {
    status = launch_injected_attention_decode_bulk<T, kHeadSize>(p, stream);
    if (status != cudaErrorNotSupported) return status;
  }
  return launch_injected_attention_decode_portable<T, kHeadSize>(p, stream);
}

template <class T>
cudaError_t launch(const InjectedAttentionParams& p, cudaStream_t stream) {
  switch (p.head_size) {
    case 64:
      return launch<T, 64>(p, stream);
    case 96:
      return launch<T, 96>(p, stream);
    case 128:
      return launch<T, 128>(p, stream);
    case 256:
      return launch<T, 256>(p, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace

DecodeTiling decode_tiling(const InjectedAttentionParams& p) {
  const int64_t group = p.q_heads / p.kv_heads;
  const int64_t packed = (p.num_queries + p.num_rows - 1) / p.num_rows * group;  // of an average row
  DecodeTiling tiling;
  tiling.rows = packed <= 8 ? 8 : packed <= 16 ? 16 : packed <= 32 ? 32 : 64;
  tiling.blocks_per_multiprocessor = p.head_size == 256 || tiling.rows == 64 ? 1 : 2;
  return tiling;
}

cudaError_t plan_injected_attention_decode(InjectedAttentionParams* params) {
  InjectedAttentionParams& p = *params;
  p.splits = 1;
  if (p.num_queries == 0 || p.num_rows == 0) return cudaSuccess;
  int multiprocessors = 0, major = 0, shared_bytes = 0;
  cudaError_t status = device_attribute(cudaDevAttrMultiProcessorCount, &multiprocessors);
  if (status != cudaSuccess) return status;
  status = device_attribute(cudaDevAttrComputeCapabilityMajor, &major);
  if (status != cudaSuccess) return status;
  status = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &shared_bytes);
  if (status != cudaSuccess) return status;
  // a portable block takes between 75 and 100 KB
  const int blocks = major >= 9 ? decode_tiling(p).blocks_per_multiprocessor : shared_bytes >= 160 * 1024 ? 2 : 1;
  // one worker for each block that can run; the heads of a worker read neighbouring memory at the same time
  p.splits = std::max(1, multiprocessors * blocks / p.kv_heads);
  return cudaSuccess;
}

int64_t injected_attention_decode_workspace_rows(const InjectedAttentionParams& p) {
  if (p.splits <= 1 || p.num_queries == 0 || p.num_rows == 0) return 0;
  return int64_t{2} * p.splits * p.kv_heads * decode_tiling(p).rows;
}

cudaError_t launch_injected_attention_decode(const InjectedAttentionParams& p, cudaStream_t stream) {
  if (p.num_queries == 0 || p.num_rows == 0) return cudaSuccess;
  switch (p.type) {
    case FloatType::kBFloat16:
      return launch<__nv_bfloat16>(p, stream);
    case FloatType::kFloat16:
      return launch<__half>(p, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace sharedllm

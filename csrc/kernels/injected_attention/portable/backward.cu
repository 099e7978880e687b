// Backward of injected attention, portable path: plan and choice of the kernel instance.
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/common/instances.h"
#include "kernels/injected_attention/portable/backward.h"
#include "kernels/injected_attention/portable/backward_tiles.h"

namespace sharedllm {
namespace {

using namespace backward_portable;

// More blocks per SM than this gain nothing, and every part costs a pass over grad_k and grad_v.
constexpr int kMaxSplits = 32;

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

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

cudaError_t plan_injected_attention_backward_portable(InjectedAttentionBackwardParams* params) {
  const InjectedAttentionParams& f = params->forward;
  params->kv_splits = 1;
  int processors = 0, shared_memory = 0;
  Shape shape{};
  cudaError_t error = current_attribute(cudaDevAttrMultiProcessorCount, &processors);
  if (error == cudaSuccess) error = query_shared_memory(&shared_memory);
  if (error == cudaSuccess) {
    error = with_head_size(f.columns, [&](auto size) {
      shape = describe<size()>(shared_memory);
      return cudaSuccess;
    });
  }
  if (error != cudaSuccess) return error;
  const int64_t blocks = (f.num_slots + shape.slots - 1) / shape.slots * f.kv_heads;
  const int64_t places = static_cast<int64_t>(processors) * shape.blocks;
  if (blocks == 0) return cudaSuccess;
  // If all rows have equally many slots, each has at least this many steps; a part should have 8 of them to be worth
  // its start.
  const int64_t steps = f.num_queries * (f.q_heads / f.kv_heads) / shape.rows;
  const int64_t most = std::min<int64_t>(kMaxSplits, steps / 8);
  params->kv_splits = fewest_splits(blocks, places, most, 0, 0.05);
  return cudaSuccess;
}

cudaError_t launch_injected_attention_backward_portable(const InjectedAttentionBackwardParams& params,
                                                        cudaStream_t stream) {
  const InjectedAttentionParams& f = params.forward;
  bool supported = f.type != FloatType::kFloat32 && (params.grad_k == nullptr) == (params.grad_v == nullptr);
  supported = supported && f.head_size == f.columns;
  for (int i = 0; i < 2; ++i) supported = supported && f.k_stride[i] % 8 == 0 && f.v_stride[i] % 8 == 0;
  for (const void* pointer :
       {f.k, f.v, static_cast<const void*>(params.grad_q), static_cast<const void*>(params.grad_k),
        static_cast<const void*>(params.grad_v), static_cast<const void*>(params.grad_q_float),
        static_cast<const void*>(params.q_rotated), params.grad_out}) {
    supported = supported && is_aligned(pointer);
  }
  if (!supported) return cudaErrorNotSupported;
  const cudaError_t error = with_instance(f.type, f.columns, [&](auto number, auto size) {
    return launch_injected_attention_backward_portable_instance<decltype(number), size()>(params, stream);
  });
  if (error != cudaSuccess || params.grad_k == nullptr || params.kv_splits == 1) return error;
  return launch_injected_attention_backward_sum_parts(params, stream);
}

}  // namespace sharedllm

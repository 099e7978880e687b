// Backward of injected attention on Hopper: plan and choice of the kernel instance.
#include "kernels/common/instances.h"
#include "kernels/injected_attention/backward.h"
#include "kernels/injected_attention/hopper/backward.h"

namespace sharedllm {

// kernel instances: cmake/SharedLLMInstances.cmake
template <class T, int kHeadSize>
cudaError_t launch_query_gradient(const InjectedAttentionBackwardParams& params, cudaStream_t stream);
template <class T, int kHeadSize>
cudaError_t launch_backward(const InjectedAttentionBackwardParams& params, cudaStream_t stream);

namespace {

// Each piece of a tail has its own start, and its share has to be summed: below this part of all work the gain is lost.
constexpr int64_t kFewestIdleParts = 64;

// The fused kernel has no instance for D of 256.
template <class T, int kHeadSize>
cudaError_t launch_all(const InjectedAttentionBackwardParams& params, cudaStream_t stream) {
  if constexpr (kHeadSize == 256) {
    return cudaErrorNotSupported;
  } else {
    if (params.forward.num_slots == 0) return cudaSuccess;
    cudaError_t status = launch_backward<T, kHeadSize>(params, stream);
    if (status == cudaSuccess && (params.kv_splits > 1 || params.tail_shares > 0)) {
      status = launch_injected_attention_backward_sum_parts(params, stream);
    }
    return status != cudaSuccess ? status : launch_injected_attention_backward_finish_packed(params, stream);
  }
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

cudaError_t plan_injected_attention_backward_sm90(InjectedAttentionBackwardParams* params) {
  params->kv_splits = 1;
  params->tail_shares = 0;
  const InjectedAttentionParams& forward = params->forward;
  int processors = 0;
  const cudaError_t status = current_attribute(cudaDevAttrMultiProcessorCount, &processors);
  if (status != cudaSuccess) return status;
  const int64_t blocks = (forward.num_slots + kBackwardSlots - 1) / kBackwardSlots * forward.kv_heads;
  if (blocks == 0) return cudaSuccess;
  // A part of fewer than 16 steps of 64 rows spends too much time on its start, and on its shares of grad_k and grad_v.
  const int64_t steps = forward.num_queries * (forward.q_heads / forward.kv_heads) / 64;
  const int64_t most = std::min<int64_t>(32, steps / 16);
  // With one batch row all blocks take equally long, and those of the last wave can be cut to fit.
  const int64_t rest = blocks % processors, idle = processors - rest;
  if (forward.num_rows == 1 && blocks > processors && rest > 0 && idle * kFewestIdleParts >= blocks && most > 1 &&
      rest + processors <= kMostPieces) {
    params->tail_shares = processors;
    return cudaSuccess;
  }
  params->kv_splits = fewest_splits(blocks, processors, most, 0, 0.05);
  return cudaSuccess;
}

cudaError_t launch_injected_attention_backward_sm90(const InjectedAttentionBackwardParams& params,
                                                    cudaStream_t stream) {
  const InjectedAttentionParams& forward = params.forward;
  const bool all = params.grad_k != nullptr;
  if (all != (params.grad_v != nullptr)) return cudaErrorNotSupported;
  for (int i = 0; i < 2; ++i) {
    if (forward.k_stride[i] % 8 != 0 || forward.v_stride[i] % 8 != 0) return cudaErrorNotSupported;
    if (params.turns_keys && forward.q_stride[i] % 8 != 0) return cudaErrorNotSupported;
  }
  for (const void* pointer :
       {forward.q, forward.k, forward.v, params.grad_out, static_cast<const void*>(params.q_rotated),
        static_cast<const void*>(params.grad_q), static_cast<const void*>(params.grad_k),
        static_cast<const void*>(params.grad_v), static_cast<const void*>(params.grad_q_float)}) {
    if (!is_aligned(pointer)) return cudaErrorNotSupported;
  }
  if (all && (params.grad_q_float == nullptr || params.kv_splits < 1)) return cudaErrorInvalidValue;
  if (params.tail_shares > 0 && params.kv_splits != 1) return cudaErrorInvalidValue;
  return with_instance(forward.type, forward.columns, [&](auto number, auto size) {
    using T = decltype(number);
    if (all) return launch_all<T, size()>(params, stream);
    if (forward.num_queries == 0 || forward.num_rows == 0) return cudaSuccess;
    return launch_query_gradient<T, size()>(params, stream);
  });
}

}  // namespace sharedllm

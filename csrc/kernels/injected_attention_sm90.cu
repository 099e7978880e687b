// Injected attention on Hopper: choice of the instance and of the number of splits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/injected_attention_sm90.h"

namespace sharedllm {
namespace {

template <class T>
cudaError_t launch(const InjectedAttentionParams& p, cudaStream_t stream) {
  switch (p.head_size) {
    case 64:
      return launch_injected_attention_sm90_instance<T, 64>(p, stream);
    case 96:
      return launch_injected_attention_sm90_instance<T, 96>(p, stream);
    case 128:
      return launch_injected_attention_sm90_instance<T, 128>(p, stream);
    case 256:
      return launch_injected_attention_sm90_instance<T, 256>(p, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace

cudaError_t plan_injected_attention_sm90(InjectedAttentionParams* params) {
  InjectedAttentionParams& p = *params;
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  p.splits = 1;
  const int64_t rows = p.head_size == 64 ? 192 : 128;
  const int64_t tiles = (p.num_queries * (p.q_heads / p.kv_heads) / rows + 1) * p.kv_heads;
  // a split shorter than this costs more in its beginning, end and merging than it gains
  const int64_t most = std::min<int64_t>(p.num_slots / 1024, 32);
  // the fewest parts that leave the fewest multiprocessors idle over all rounds
  double best = 0;
  for (int64_t splits = 1; splits <= std::max<int64_t>(most, 1); ++splits) {
    const int64_t items = tiles * splits;
    const int64_t rounds = (items + multiprocessors - 1) / multiprocessors;
    const double busy = static_cast<double>(items) / static_cast<double>(rounds * multiprocessors);
    // merging reads and writes the results once more for each part
    const double worth = busy / (1.0 + 0.01 * static_cast<double>(splits - 1));
    if (worth > best + 0.03) {
      best = worth;
      p.splits = static_cast<int32_t>(splits);
    }
  }
  return cudaSuccess;
}

cudaError_t launch_injected_attention_sm90(const InjectedAttentionParams& p, cudaStream_t stream) {
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

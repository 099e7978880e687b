// Injected attention on compute capability 8.0 and later: choice of the instance and of the number of splits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/injected_attention_portable_tile.cuh"

namespace sharedllm {
namespace {

// Packed rows of a block and blocks of a multiprocessor on the current device.
template <int kHeadSize>
void describe(const portable::SharedMemory& memory, int* rows, int* blocks) {
  using Choice = portable::TileChoice<kHeadSize>;
  const bool large = memory.fits<typename Choice::Large>(), medium = memory.fits<typename Choice::Medium>();
  *rows = large ? Choice::Large::kRows : medium ? Choice::Medium::kRows : Choice::Small::kRows;
  *blocks = large ? Choice::Large::kBlocks : medium ? Choice::Medium::kBlocks : Choice::Small::kBlocks;
}

template <class T>
cudaError_t launch(const InjectedAttentionParams& p, cudaStream_t stream) {
  switch (p.head_size) {
    case 64:
      return launch_injected_attention_portable_instance<T, 64>(p, stream);
    case 96:
      return launch_injected_attention_portable_instance<T, 96>(p, stream);
    case 128:
      return launch_injected_attention_portable_instance<T, 128>(p, stream);
    case 256:
      return launch_injected_attention_portable_instance<T, 256>(p, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace

cudaError_t plan_injected_attention_portable(InjectedAttentionParams* params) {
  InjectedAttentionParams& p = *params;
  p.splits = 1;
  portable::SharedMemory memory;
  int device = 0, multiprocessors = 0, rows = 0, resident = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = portable::query_shared_memory(&memory);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status != cudaSuccess) return status;
  switch (p.head_size) {
    case 64:
      describe<64>(memory, &rows, &resident);
      break;
    case 96:
      describe<96>(memory, &rows, &resident);
      break;
    case 128:
      describe<128>(memory, &rows, &resident);
      break;
    case 256:
      describe<256>(memory, &rows, &resident);
      break;
    default:
      return cudaErrorNotSupported;
  }
  const int64_t packed = p.num_queries * (p.q_heads / p.kv_heads);
  const int64_t blocks = std::max<int64_t>((packed + rows - 1) / rows, 1) * p.kv_heads;
  const int64_t places = static_cast<int64_t>(multiprocessors) * resident;
  // a split shorter than this costs more in its beginning, end and merging than it gains
  const int64_t most = std::min<int64_t>(p.num_slots / 1024, 32);
  // the fewest parts that leave the fewest places idle over all rounds
  double best = 0;
  for (int64_t splits = 1; splits <= std::max<int64_t>(most, 1); ++splits) {
    const int64_t total = blocks * splits, rounds = (total + places - 1) / places;
    // merging reads and writes the results once more for each part
    const double busy = static_cast<double>(total) / static_cast<double>(rounds * places);
    const double worth = busy / (1.0 + 0.01 * static_cast<double>(splits - 1));
    if (worth > best + 0.03) {
      best = worth;
      p.splits = static_cast<int32_t>(splits);
    }
  }
  return cudaSuccess;
}

cudaError_t launch_injected_attention_portable(const InjectedAttentionParams& p, cudaStream_t stream) {
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

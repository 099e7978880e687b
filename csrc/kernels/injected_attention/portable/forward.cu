// Injected attention on compute capability 8.0 and later: choice of the kernel instance and of the number of splits
// (split-KV).
#include <algorithm>

#include "kernels/common/instances.h"
#include "kernels/injected_attention/portable/tile.cuh"

namespace sharedllm {
namespace {

// Packed rows of a block, and resident blocks on an SM, on the current device.
template <int kHeadSize>
void describe(const portable::SharedMemory& memory, int* rows, int* blocks) {
  using Choice = portable::TileChoice<kHeadSize>;
  const bool large = memory.fits<typename Choice::Large>(), medium = memory.fits<typename Choice::Medium>();
  *rows = large ? Choice::Large::kRows : medium ? Choice::Medium::kRows : Choice::Small::kRows;
  *blocks = large ? Choice::Large::kBlocks : medium ? Choice::Medium::kBlocks : Choice::Small::kBlocks;
}

}  // namespace

cudaError_t plan_injected_attention_portable(InjectedAttentionParams* params) {
  InjectedAttentionParams& p = *params;
  p.splits = 1;
  portable::SharedMemory memory;
  int multiprocessors = 0, rows = 0, resident = 0;
  cudaError_t status = portable::query_shared_memory(&memory);
  if (status == cudaSuccess) status = current_attribute(cudaDevAttrMultiProcessorCount, &multiprocessors);
  if (status == cudaSuccess) {
    status = with_head_size(p.columns, [&](auto size) {
      describe<size()>(memory, &rows, &resident);
      return cudaSuccess;
    });
  }
  if (status != cudaSuccess) return status;
  const int64_t packed = p.num_queries * (p.q_heads / p.kv_heads);
  const int64_t blocks = std::max<int64_t>((packed + rows - 1) / rows, 1) * p.kv_heads;
  const int64_t places = static_cast<int64_t>(multiprocessors) * resident;
  // a shorter split costs more in its beginning, end and merging than it gains
  const int64_t most = std::min<int64_t>(p.num_slots / 1024, 32);
  // merging reads and writes the results once more for each part
  p.splits = fewest_splits(blocks, places, most, 0.01, 0.03);
  return cudaSuccess;
}

cudaError_t launch_injected_attention_portable(const InjectedAttentionParams& p, cudaStream_t stream) {
  return with_instance(p.type, p.columns, [&](auto number, auto size) {
    return launch_injected_attention_portable_instance<decltype(number), size()>(p, stream);
  });
}

}  // namespace sharedllm

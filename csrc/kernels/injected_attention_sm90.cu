// Injected attention on Hopper: choice of the instance and of the number of splits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/injected_attention_sm90.h"

namespace sharedllm {
namespace {

template <class T>
cudaError_t launch(const InjectedAttentionSm90Params& p, cudaStream_t stream) {
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

// Items are counted in 32 bits, a round of blocks beyond the end included.
constexpr int64_t kMostItems = 0x7fff0000;
// Writing and merging the parts of the last round takes about as long as this many blocks of slots.
constexpr int64_t kBlocksOfMerging = 12;
// A part of fewer blocks spends more in its beginning and end than in between.
constexpr int64_t kFewestBlocks = 4;

struct TileSize {
  int64_t rows, slots;
};

template <int kHeadSize>
TileSize tile_size() {
  return {64 * Sm90Tile<kHeadSize>::kWarpgroups, Sm90Tile<kHeadSize>::kSlots};
}

TileSize tile_size(int32_t head_size) {
  return head_size == 64 ? tile_size<64>() : head_size == 256 ? tile_size<256>() : tile_size<128>();
}

}  // namespace

cudaError_t plan_injected_attention_sm90(InjectedAttentionSm90Params* params) {
  InjectedAttentionSm90Params& p = *params;
  if (p.type == FloatType::kFloat32 ||
      (p.head_size != 64 && p.head_size != 96 && p.head_size != 128 && p.head_size != 256))
    return cudaErrorNotSupported;
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const TileSize tile = tile_size(p.head_size);
  const int64_t packed = p.num_queries * (p.q_heads / p.kv_heads), blocks = (p.num_slots + tile.slots - 1) / tile.slots;
  if (packed > kMostItems || p.num_slots > kMostItems) return cudaErrorNotSupported;
  p.splits = 1;
  p.tail_items = 0;
  p.tail_shares = 1;
  p.partial_rows = 0;
  if (p.num_rows == 1) {
    const int64_t tiles = (packed + tile.rows - 1) / tile.rows, items = tiles * p.kv_heads;
    const int64_t rest = items % multiprocessors, idle = multiprocessors - rest;
    if (items > kMostItems) return cudaErrorNotSupported;
    p.tiles = static_cast<int32_t>(tiles);
    // the last round is shared out if what it would idle is worth more than writing and merging parts
    if (rest > 0 && idle * blocks > kBlocksOfMerging * multiprocessors) {
      p.tail_items = static_cast<int32_t>(rest);
      p.tail_shares =
          static_cast<int32_t>(std::max(rest, std::min<int64_t>(multiprocessors, rest * blocks / kFewestBlocks)));
      p.partial_rows = 2 * static_cast<int64_t>(p.tail_shares) * tile.rows;
    }
    p.whole_items = static_cast<int32_t>(items - p.tail_items);
    p.grid = std::max(p.tail_items > 0 ? p.tail_shares : 0,
                      static_cast<int32_t>(std::min<int64_t>(p.whole_items, multiprocessors)));
    return cudaSuccess;
  }
  // a batch row adds at most one tile that is not full
  const int64_t tiles = packed / tile.rows + p.num_rows, most = std::min<int64_t>(blocks / kFewestBlocks, 32);
  // the fewest parts that leave the fewest multiprocessors idle over all rounds
  double best = 0;
  for (int64_t splits = 1; splits <= std::max<int64_t>(most, 1); ++splits) {
    const int64_t items = tiles * p.kv_heads * splits;
    const int64_t rounds = (items + multiprocessors - 1) / multiprocessors;
    const double busy = static_cast<double>(items) / static_cast<double>(rounds * multiprocessors);
    // merging reads and writes the results once more for each part
    const double worth = busy / (1.0 + 0.01 * static_cast<double>(splits - 1));
    if (worth > best + 0.03) {
      best = worth;
      p.splits = static_cast<int32_t>(splits);
    }
  }
  const int64_t items = tiles * p.kv_heads * p.splits;
  if (items > kMostItems) return cudaErrorNotSupported;
  p.tiles = static_cast<int32_t>(tiles);
  p.whole_items = static_cast<int32_t>(items);
  p.grid = static_cast<int32_t>(std::min<int64_t>(items, multiprocessors));
  p.partial_rows = p.splits > 1 ? p.splits * p.num_queries * p.q_heads : 0;
  return cudaSuccess;
}

cudaError_t launch_injected_attention_sm90(const InjectedAttentionSm90Params& p, cudaStream_t stream) {
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

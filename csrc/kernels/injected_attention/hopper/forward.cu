// Injected attention on Hopper: choice of the kernel instance and of the number of splits (split-KV, stream-K).
#include <algorithm>

#include "kernels/common/instances.h"
#include "kernels/injected_attention/hopper/forward.h"

namespace sharedllm {
namespace {

// Items are counted in 32 bits, including a wave of blocks past the end.
constexpr int64_t kMostItems = 0x7fff0000;
// Writing and merging the parts of the last wave takes about as long as this many blocks of slots.
constexpr int64_t kBlocksOfMerging = 12;
// A part of fewer blocks spends more time in its beginning and end than in between.
constexpr int64_t kFewestBlocks = 4;
// Chained tiles (D 128, 8 waves of tiles) take 0.92, 0.93, 0.96 and 0.97 of the time at 8, 16, 32 and 128 blocks of
// slots, but 1.10 at 4, where the producer warps are the limit. Few waves leave little to chain.
constexpr int64_t kFewestChainedBlocks = 8, kFewestChainedRounds = 4;
// They do not split the last wave: it may leave this part of everything idle (8 waves of 7.76 were timed), and so may
// whole queries in the rows of a tile.
constexpr int64_t kMostIdleParts = 25;

struct TileSize {
  int64_t rows, slots;
};

template <int kHeadSize>
TileSize tile_size() {
  return {64 * Sm90Tile<kHeadSize>::kWarpgroups, Sm90Tile<kHeadSize>::kSlots};
}

// Whether chained tiles gain over this many waves of tiles. The rows of a batch may have far fewer slots than there are
// in all.
bool chains(const InjectedAttentionSm90Params& p, int64_t items, int64_t multiprocessors) {
  constexpr int64_t kSlots = Sm90Tile<128>::kSlots;
  const int64_t blocks = (p.num_slots + kSlots - 1) / kSlots;
  return p.columns == 128 && p.num_rows == 1 && blocks >= kFewestChainedBlocks &&
         items >= kFewestChainedRounds * multiprocessors;
}

// With one wave nothing is chained; 512 queries over 512 slots, 1.9 waves, took 20.1 us instead of 18.2.
constexpr int64_t kFewestBulkRounds = 2;
// Their gain is worth this many more blocks before splitting the last wave is better (D 64 x 2048 slots: 154 us against
// 169 split).
constexpr int64_t kBlocksOfGain = 2 * kBlocksOfMerging;

// Plans them if they gain. A tile is a box of whole queries, which may leave few rows unused.
bool plan_bulk(InjectedAttentionSm90Params* params, int64_t packed, const TileSize& tile, int64_t multiprocessors) {
  InjectedAttentionSm90Params& p = *params;
  const int64_t group = p.q_heads / p.kv_heads, rows = tile.rows / group * group;
  // turn_keys counts chunks of 16 bytes in 32 bits
  const bool counts = p.num_slots * p.kv_heads * (p.head_size / 8) <= INT32_MAX;
  // keys that were rotated back have no form for a narrower head
  const bool own = p.head_size == p.columns && p.head_size <= 128;
  const bool fits = counts && own && p.num_rows == 1 && p.num_slots > 0 && p.num_slots <= kMostBulkSlots &&
                    (tile.rows - rows) * kMostIdleParts <= tile.rows;
  // The gradients round the scores as they were rounded here, and their kernel rotates keys back only if all columns
  // are rotated and a group has at most 64 heads.
  const bool turns_back = p.rotary_half == 0 || 2 * p.rotary_half == p.head_size;
  if (!fits || !turns_back || group > 64) return false;
  const int64_t tiles = (packed + rows - 1) / rows, items = tiles * p.kv_heads;
  const int64_t rest = items % multiprocessors, idle = multiprocessors - rest;
  if (items < kFewestBulkRounds * multiprocessors || items > kMostItems) return false;
  // otherwise splitting the last wave is better
  const int64_t blocks = (p.num_slots + tile.slots - 1) / tile.slots;
  const bool full = rest == 0 || idle * kMostIdleParts <= items;
  if (!full && idle * blocks > kBlocksOfGain * multiprocessors) return false;
  p.kernel = Sm90Kernel::kBulk;
  p.tile_rows = static_cast<int32_t>(rows);
  p.tiles = static_cast<int32_t>(tiles);
  p.whole_items = static_cast<int32_t>(items);
  p.grid = static_cast<int32_t>(multiprocessors);
  if (p.rotary_half > 0 || p.scale <= 0) p.turned_rows = p.num_slots * p.kv_heads;
  return true;
}

}  // namespace

cudaError_t plan_injected_attention_sm90(InjectedAttentionSm90Params* params) {
  InjectedAttentionSm90Params& p = *params;
  if (p.type == FloatType::kFloat32) return cudaErrorNotSupported;
  TileSize tile{};
  cudaError_t status = with_head_size(p.columns, [&](auto size) {
    tile = tile_size<size()>();
    return cudaSuccess;
  });
  if (status != cudaSuccess) return status;
  int multiprocessors = 0;
  status = current_attribute(cudaDevAttrMultiProcessorCount, &multiprocessors);
  if (status != cudaSuccess) return status;
  const int64_t packed = p.num_queries * (p.q_heads / p.kv_heads), blocks = (p.num_slots + tile.slots - 1) / tile.slots;
  if (packed > kMostItems || p.num_slots > kMostItems) return cudaErrorNotSupported;
  p.splits = 1;
  p.tail_items = 0;
  p.tail_shares = 1;
  p.partial_rows = 0;
  p.kernel = Sm90Kernel::kSingle;
  p.tile_rows = static_cast<int32_t>(tile.rows);
  p.turned_rows = 0;
  p.turned_keys = nullptr;
  if (plan_bulk(&p, packed, tile, multiprocessors)) return cudaSuccess;
  if (p.num_rows == 1) {
    const int64_t tiles = (packed + tile.rows - 1) / tile.rows, items = tiles * p.kv_heads;
    const int64_t rest = items % multiprocessors, idle = multiprocessors - rest;
    if (items > kMostItems) return cudaErrorNotSupported;
    p.tiles = static_cast<int32_t>(tiles);
    // the last wave is split if what it would leave idle is worth more than writing and merging parts
    const bool chained = chains(p, items, multiprocessors) && idle * kMostIdleParts <= items;
    if (rest > 0 && idle * blocks > kBlocksOfMerging * multiprocessors && !chained) {
      p.tail_items = static_cast<int32_t>(rest);
      p.tail_shares =
          static_cast<int32_t>(std::max(rest, std::min<int64_t>(multiprocessors, rest * blocks / kFewestBlocks)));
      p.partial_rows = 2 * static_cast<int64_t>(p.tail_shares) * tile.rows;
    }
    p.whole_items = static_cast<int32_t>(items - p.tail_items);
    if (p.tail_items == 0 && chains(p, items, multiprocessors)) p.kernel = Sm90Kernel::kChained;
    p.grid = std::max(p.tail_items > 0 ? p.tail_shares : 0,
                      static_cast<int32_t>(std::min<int64_t>(p.whole_items, multiprocessors)));
    return cudaSuccess;
  }
  // a batch row adds at most one partial tile
  const int64_t tiles = packed / tile.rows + p.num_rows, most = std::min<int64_t>(blocks / kFewestBlocks, 32);
  // merging reads and writes the results once more for each part
  p.splits = fewest_splits(tiles * p.kv_heads, multiprocessors, most, 0.01, 0.03);
  const int64_t items = tiles * p.kv_heads * p.splits;
  if (items > kMostItems) return cudaErrorNotSupported;
  p.tiles = static_cast<int32_t>(tiles);
  p.whole_items = static_cast<int32_t>(items);
  p.grid = static_cast<int32_t>(std::min<int64_t>(items, multiprocessors));
  p.partial_rows = p.splits > 1 ? p.splits * p.num_queries * p.q_heads : 0;
  return cudaSuccess;
}

bool injected_attention_sm90_turns_keys(const InjectedAttentionParams& params) {
  InjectedAttentionSm90Params planned{params};
  return plan_injected_attention_sm90(&planned) == cudaSuccess && planned.kernel == Sm90Kernel::kBulk;
}

cudaError_t launch_injected_attention_sm90(const InjectedAttentionSm90Params& p, cudaStream_t stream) {
  return with_instance(p.type, p.columns, [&](auto number, auto size) {
    if constexpr (size() == 128) {
      if (p.kernel == Sm90Kernel::kChained) {
        return launch_injected_attention_chained_sm90_instance<decltype(number), size()>(p, stream);
      }
    }
    if constexpr (size() <= 128) {
      if (p.kernel == Sm90Kernel::kBulk) {
        if (p.turned_rows > 0) {
          // a negative scale negates the keys, so that the largest score is always the best one
          const float factor = p.scale == 0 ? 0.0f : p.scale < 0 ? -1.0f : 1.0f;
          const cudaError_t status = launch_injected_attention_turn_keys(p, factor, p.turned_keys, stream);
          if (status != cudaSuccess) return status;
        }
        return launch_injected_attention_bulk_sm90_instance<decltype(number), size()>(p, stream);
      }
    }
    return launch_injected_attention_sm90_instance<decltype(number), size()>(p, stream);
  });
}

}  // namespace sharedllm

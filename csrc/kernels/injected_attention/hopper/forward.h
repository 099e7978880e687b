// Injected attention on Hopper (TMA, WGMMA): plan and launch of the prefill path.
#pragma once

#include "kernels/injected_attention/params.h"

namespace sharedllm {

// Slots of a block, consumer warpgroups, and query stages. Blocks of 128 slots fit the paper's chunks, which keep 128
// slots each, so that no block is cut off; 256 columns leave room for 80 slots and one query stage only. Three consumer
// warpgroups hide the softmax better, where their accumulators fit in 152 registers.
template <int kHeadSize>
struct Sm90Tile {
  static constexpr int kSlots = 128, kWarpgroups = 2, kQueryStages = 2;
};
template <>
struct Sm90Tile<64> {
  static constexpr int kSlots = 128, kWarpgroups = 3, kQueryStages = 2;
};
template <>
struct Sm90Tile<256> {
  static constexpr int kSlots = 80, kWarpgroups = 2, kQueryStages = 1;
};

// Chained tiles whose queries and results TMA moves gain up to this many slots (D 128: 0.78, 0.87, 0.97 and 0.99 of the
// time of the other kernels at 512, 1024, 2048 and 4096). Rotating keys back costs memory and time for each slot, and
// the third query stage costs one of keys and values.
constexpr int64_t kMostBulkSlots = 4096;

// Which kernel runs a plan's tiles.
enum class Sm90Kernel : int32_t {
  kSingle,   // tiles one after another
  kChained,  // chained tiles, whose queries the producer warps rotate
  kBulk,     // chained tiles, whose queries and results TMA moves, over keys that are rotated back instead
};

// Persistent blocks take whole_items tiles, head by head; tail_items more (of a batch of one row) are cut into
// tail_shares equal shares of slots (stream-K), whose partial results are [2 * tail_shares, packed rows of a tile, D].
struct InjectedAttentionSm90Params : InjectedAttentionParams {
  int64_t partial_rows;  // vectors of D elements that partial_out has to hold, and elements of partial_lse
  int32_t grid, tiles, whole_items, tail_items, tail_shares;
  Sm90Kernel kernel;
  int32_t tile_rows;    // packed rows of a tile
  int64_t turned_rows;  // vectors of D elements that turned_keys has to hold
  void* turned_keys;    // [S, Hkv, D] in the keys' type
};

// Plans the work for the current device, from what the host knows (T, B, S): everything but the pointers to partial
// results and, with turned_rows > 0, to turned_keys, which is null otherwise. Needs compute capability 9.0, bfloat16 or
// float16, columns of 64, 96, 128 or 256, pointers aligned to 16 bytes and strides to 8 elements, T > 0, fewer than
// 2^31 packed rows, slots and tiles; otherwise cudaErrorNotSupported.
cudaError_t plan_injected_attention_sm90(InjectedAttentionSm90Params* params);

// Whether the plan rotates keys back, which the gradients then have to do as well: scores of rotated queries and of
// keys rotated back differ by their rounding, and weights are exponentials of those scores over their sum.
bool injected_attention_sm90_turns_keys(const InjectedAttentionParams& params);

// Writes R^T k times a factor, contiguous [S, Hkv, D] in the keys' type, for a batch of one row and at most
// kMostBulkSlots slots. The next kernel on the stream may start before it ends, if launched by PDL.
cudaError_t launch_injected_attention_turn_keys(const InjectedAttentionParams& params, float factor, void* turned,
                                                cudaStream_t stream);

// Queues a planned problem; with params.splits > 1 launch_injected_attention_combine has to follow.
cudaError_t launch_injected_attention_sm90(const InjectedAttentionSm90Params& params, cudaStream_t stream);

// One element type and head size, a kernel instance.
template <class T, int kHeadSize>
cudaError_t launch_injected_attention_sm90_instance(const InjectedAttentionSm90Params& params, cudaStream_t stream);

// The same for plans of chained tiles (128 columns) and of those that TMA moves (D of its own 64, 96 or 128 columns).
template <class T, int kHeadSize>
cudaError_t launch_injected_attention_chained_sm90_instance(const InjectedAttentionSm90Params& params,
                                                            cudaStream_t stream);
template <class T, int kHeadSize>
cudaError_t launch_injected_attention_bulk_sm90_instance(const InjectedAttentionSm90Params& params,
                                                         cudaStream_t stream);

}  // namespace sharedllm

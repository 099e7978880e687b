// What is chosen when the kernel is compiled: types, tile, stages, and the shared memory that they take.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/common/hopper.cuh"
#include "kernels/common/named_barrier.cuh"
#include "kernels/injected_attention/decode/work.cuh"

namespace sharedllm {
namespace decode {

// What the workspace holds before a result is there. Arithmetic never produces this NaN.
constexpr uint32_t kAbsent = 0xffffffffu;

// The slots and rows that a block takes at a time, and how its warps share them.
struct Tile {
  int slots;
  int slot_warps;  // each takes slots / slot_warps slots ...
  int row_warps;   // ... and 8 * row_tiles packed rows
  int row_tiles;
  int stages;  // of keys and of values
  bool bulk;   // a producer warp and TMA, else cp.async
};

// Element: type of queries and results; Code: of keys and values, the same or int8 with a scale for each slot and head.
template <class Element, class Code, int kHeadSize_, Tile kTile>
struct Config {
  using T = Element;
  static constexpr bool kEightBit = sizeof(Code) == 1;
  using Operand = std::conditional_t<kEightBit, __half, T>;  // of the matmuls
  static constexpr int kHeadSize = kHeadSize_, kSlots = kTile.slots, kStages = kTile.stages;
  static constexpr int kSlotWarps = kTile.slot_warps, kRowWarps = kTile.row_warps, kRowTiles = kTile.row_tiles;
  static constexpr bool kBulk = kTile.bulk;
  // than the heads; TMA's boxes of several pieces would bring the next head's columns instead of zeros
  static constexpr bool kMayBeWider = !kBulk;
  static constexpr int kWarpRows = 8 * kRowTiles, kRows = kWarpRows * kRowWarps;
  static constexpr int kSlotTiles = kSlots / (16 * kSlotWarps);  // of a warp
  static constexpr int kWarps = kSlotWarps * kRowWarps, kConsumers = 32 * kWarps;
  static constexpr int kThreads = kConsumers + (kBulk ? 32 : 0);
  static constexpr int kSteps = kHeadSize / 16;
  static constexpr int kRowBytes = kHeadSize * sizeof(Code);
  static constexpr int kTileBytes = kSlots * kRowBytes;
  static constexpr int kScaleBytes = kEightBit ? kSlots * 4 : 0;  // of a tile
  static constexpr int kQueryRowBytes = 2 * kHeadSize, kQueryBytes = kRows * kQueryRowBytes;
  // columns of the accumulators that the warps of a block sum at a time
  static constexpr int kMergeColumns = kBulk && kWarps <= 4 && kHeadSize <= 128 ? kHeadSize
                                       : kHeadSize == 96                        ? 48
                                       : kWarps > 8                             ? 32
                                                                                : 64;
  static constexpr int kMergePitch = kMergeColumns + 4;  // no bank conflicts: 2 * pitch = 8 modulo 32
  static constexpr int kMergeBytes = kWarps * 8 * kMergePitch * 4;
  static constexpr int kRingBytes = 2 * kStages * kTileBytes;
  // the queries' memory is reused for the sums, when all scores are computed
  static constexpr int kScaleOffset = kRingBytes + (kQueryBytes > kMergeBytes ? kQueryBytes : kMergeBytes);
  static constexpr int kStatisticsOffset = kScaleOffset + 2 * kStages * kScaleBytes;
  static constexpr int kRowScaleOffset = kStatisticsOffset + 2 * kSlotWarps * kRows * 4;
  static constexpr int kBarrierOffset = kRowScaleOffset + (kEightBit ? kRows * 4 : 0);
  static constexpr int kSharedBytes = kBarrierOffset + (4 * kStages + 2) * 8;
  // The merging kernel can wait for each result instead of for the end of this kernel.
  static constexpr bool kMayAwait = kBulk && kRows == 8;
  static_assert(kSlots % (16 * kSlotWarps) == 0 && kHeadSize % 32 == 0 && kTileBytes % 1024 == 0);
  static_assert(kHeadSize % kMergeColumns == 0 && kMergeColumns % 16 == 0, "all columns are summed, in whole tiles");
  static_assert(kSharedBytes + sizeof(PlaceScan) <= 227 * 1024);
  // Weights of 8-bit values carry the value's scale and are rounded to half: raised by 2^7, so that 2^kGrowth times
  // that still fits and small ones keep their bits.
  static constexpr float kWeightShift = kEightBit ? 7.0f : 0.0f;
};

struct BulkMaps {
  CUtensorMap key, value;
};
struct Scales {
  const float* key;         // [S, Hkv]
  const float* value;       // [S, Hkv]
  int64_t key_stride[2];    // between slots, between heads
  int64_t value_stride[2];  // likewise
};
struct Nothing {};

// Named barriers.
enum Barrier : int {
  kConsumerBarrier = 1,  // of the warps that compute
  kStartBarrier,         // of all warps: the producer has made its mbarriers
};

template <int kThreads>
__device__ __forceinline__ void sync_consumers() {
  __syncwarp();
  named_barrier_sync<kConsumerBarrier, kThreads>();
}

}  // namespace decode
}  // namespace sharedllm

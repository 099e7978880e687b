// Tiles of the portable backward kernel for grad_k and grad_v, and which device uses which.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/common/instances.h"

namespace sharedllm {
namespace backward_portable {

// kSlotWarps x kParts warps. The warps of a slot group each hold a part of the columns of grad_k and grad_v. They
// divide the scores of the group by rows, and exchange weights through shared memory if there is more than one part.
template <int kHeadSize_, int kSlotWarps_, int kParts_, int kSlotBlocks_, int kRows_, int kQueryRowWarps_,
          bool kValueInRegisters_, int kBlocks_ = 1>
struct KeyValueTiles {
  static constexpr int kHeadSize = kHeadSize_, kSlotWarps = kSlotWarps_, kParts = kParts_, kSlotBlocks = kSlotBlocks_;
  static constexpr int kRows = kRows_;                    // packed rows of a step
  static constexpr int kQueryRowWarps = kQueryRowWarps_;  // for grad_q: warps along the rows, the others along columns
  static constexpr bool kValueInRegisters = kValueInRegisters_;
  static constexpr int kBlocks = kBlocks_;  // resident blocks on an SM
  static constexpr int kWarps = kSlotWarps * kParts, kThreads = 32 * kWarps;
  static constexpr int kSlots = 16 * kSlotBlocks * kSlotWarps;
  static constexpr int kRowBytes = 2 * kHeadSize;
  static constexpr int kScoreRows = kRows / kParts;
  // weights and their gradients are held for this many rows at once
  static constexpr int kChunkRows = kScoreRows * kSlotBlocks > 64 ? 64 / kSlotBlocks : kScoreRows;
  static constexpr int kRowTileBytes = kRows * kRowBytes, kWeightBytes = kSlots * kRows * 2;
  static constexpr int kWeightTiles = 2;  // weights and dS, or dS of two steps

  static constexpr int kKey = 0;
  static constexpr int kValue = kKey + kSlots * kRowBytes;
  static constexpr int kQuery = kValue + (kValueInRegisters ? 0 : kSlots * kRowBytes);
  static constexpr int kGrad = kQuery + 2 * kRowTileBytes;
  static constexpr int kLse = kGrad + 2 * kRowTileBytes;
  static constexpr int kDelta = kLse + 2 * 4 * kRows;
  static constexpr int kWeights = kDelta + 2 * 4 * kRows;
  static constexpr int kPoison = kWeights + kWeightTiles * kWeightBytes;
  static constexpr int shared_bytes(bool grad_query) {
    return grad_query ? kPoison + 4 * kSlots : kParts > 1 ? kPoison : kWeights;
  }
  static_assert(!kValueInRegisters || kSlots * kRowBytes <= 4 * kRowTileBytes);
};

// Small fits the 99 KiB of 8.6, 8.9 and 12.0, Large the 163 KiB of 8.0. grad_k and grad_v of a warp take 128 registers
// per thread each (96 with D = 96), which leaves room for the scores of 64 rows by 16 slots or as many.
template <int kHeadSize>
struct KeyValueChoice;
template <>
struct KeyValueChoice<64> {
  using Small = KeyValueTiles<64, 4, 1, 2, 64, 2, false, 2>;
  using Large = Small;
};
template <>
struct KeyValueChoice<96> {
  using Small = KeyValueTiles<96, 6, 1, 1, 32, 2, true>;
  using Large = KeyValueTiles<96, 8, 1, 1, 64, 4, false>;
};
template <>
struct KeyValueChoice<128> {
  using Small = KeyValueTiles<128, 8, 1, 1, 32, 1, true>;
  // two parts: a warp multiplies 32 x 32 and 32 x 64 blocks, for which shared memory is nearly fast enough; with one
  // part (128, 8, 1, 1, 64, 2, false) it took 2% longer
  using Large = KeyValueTiles<128, 4, 2, 2, 64, 2, false>;
};
template <>
struct KeyValueChoice<256> {
  using Small = KeyValueTiles<256, 2, 2, 1, 32, 1, true>;
  using Large = KeyValueTiles<256, 4, 2, 1, 32, 1, false>;
};

inline bool fits(int bytes, int shared_memory) { return bytes + 1024 <= shared_memory; }

inline cudaError_t query_shared_memory(int* bytes) {
  return current_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, bytes);
}

}  // namespace backward_portable
}  // namespace sharedllm

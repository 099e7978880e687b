// Tiles of the portable kernel of injected attention, and which of them a device takes.
#pragma once

#include "kernels/common/instances.h"
#include "kernels/common/mma.cuh"
#include "kernels/injected_attention/portable/forward.h"

namespace sharedllm {
namespace portable {

// kRowBlocks: blocks of 16 rows of a warp. kSlots: slots of a tile. kBuffers: tiles of keys or values in shared memory,
// which alternate in the ring; with 4, keys and values of one tile arrive together and one barrier per tile suffices.
// kBlocks: resident blocks on an SM.
template <int kHeadSize_, int kWarps_, int kRowBlocks_, int kSlots_, int kBuffers_, int kBlocks_, bool kKeepQueries_>
struct Tile {
  static constexpr int kHeadSize = kHeadSize_, kWarps = kWarps_, kRowBlocks = kRowBlocks_, kSlots = kSlots_;
  static constexpr int kBuffers = kBuffers_, kBlocks = kBlocks_;
  // queries in registers rather than read from shared memory for every tile
  static constexpr bool kKeepQueries = kKeepQueries_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kRowBlocks, kRows = kWarps * kWarpRows;
  static constexpr int kQueryBytes = kRows * kHeadSize * 2;
  static constexpr int kTileBytes = kSlots * kHeadSize * 2;
  static constexpr int kSharedBytes = kQueryBytes + kBuffers * kTileBytes;
  static constexpr bool kPaired = kBuffers == 4;
  using Layout = SwizzledTile<kHeadSize>;
  // of the copies: adjacent threads read neighbouring chunks of a row
  static constexpr int kCopyRows = kThreads / Layout::kGroup;
  static_assert(kBuffers >= 2 && kBuffers <= 4);
  static_assert(kSlots % 32 == 0 && kSlots % kCopyRows == 0 && kCopyRows % 8 == 0);
};

// For SMs with 228 KB (9.0), 164 KB (8.0) and 100 KB (8.6, 8.9) of shared memory: the largest tiles of slots of which
// two blocks fit, so that the matmuls of one run during the exponentials of the other.
template <int kHeadSize>
struct TileChoice;
template <>
struct TileChoice<64> {
  using Large = Tile<64, 4, 2, 64, 4, 2, true>;
  using Medium = Large;
  using Small = Large;
};
template <>
struct TileChoice<96> {
  using Large = Tile<96, 4, 2, 64, 4, 2, false>;
  using Medium = Large;
  using Small = Tile<96, 4, 2, 32, 4, 2, false>;
};
template <>
struct TileChoice<128> {
  using Large = Tile<128, 4, 2, 64, 4, 2, false>;
  using Medium = Tile<128, 4, 2, 64, 3, 2, false>;
  using Small = Tile<128, 4, 2, 32, 2, 2, false>;
};
template <>
struct TileChoice<256> {
  using Large = Tile<256, 4, 1, 64, 2, 2, false>;
  using Medium = Tile<256, 4, 1, 32, 3, 2, false>;
  using Small = Tile<256, 4, 1, 32, 3, 1, false>;
};

// Shared memory of the current device, bytes.
struct SharedMemory {
  int block, multiprocessor;
  template <class Shape>
  bool fits() const {
    // the system reserves 1 KB for each block
    constexpr int kBytes = Shape::kSharedBytes + kStaticBytes;
    return kBytes <= block && Shape::kBlocks * (kBytes + 1024) <= multiprocessor;
  }
  static constexpr int kStaticBytes = 128;
};
inline cudaError_t query_shared_memory(SharedMemory* memory) {
  const cudaError_t status = current_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &memory->block);
  if (status != cudaSuccess) return status;
  return current_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &memory->multiprocessor);
}

}  // namespace portable
}  // namespace sharedllm

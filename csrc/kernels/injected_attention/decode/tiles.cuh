// Tiles of queries, keys and values in shared memory.
#pragma once

#include <cstdint>

namespace sharedllm {
namespace decode {

// Rows of kRowBytes follow each other; the 16-byte chunks are permuted as by TMA's 128-byte swizzle.
__host__ __device__ constexpr uint32_t swizzle(uint32_t offset) { return offset ^ ((offset >> 3) & 0x70); }

// Address of the 16 bytes at row `row`, byte 32 * step + 16 * half. The tile is aligned to 1024 bytes.
template <int kRowBytes>
struct TileRow {
  static constexpr bool kPowerOfTwo = (kRowBytes & (kRowBytes - 1)) == 0;
  uint32_t tile, offset;
  __device__ __forceinline__ TileRow(uint32_t tile, int row, int half)
      : tile(tile), offset(row * kRowBytes + half * 16) {
    if (kPowerOfTwo) offset = swizzle(offset);
  }
  __device__ __forceinline__ uint32_t at(int step) const {
    // the swizzle is linear in the bits, and a power of two keeps row and step in different ones
    return tile + (kPowerOfTwo ? offset ^ swizzle(32 * step) : swizzle(offset + 32 * step));
  }
};

}  // namespace decode
}  // namespace sharedllm

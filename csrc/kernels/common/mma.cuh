// Warp-level matmuls on tensor cores (compute capability 8.0 and later): swizzled tiles in shared memory, fragment
// loads (ldmatrix), mma.sync of 16 x 8 x 16 with float32 accumulation.
#pragma once

#include <cstdint>

#include "kernels/common/copy_async.cuh"
#include "kernels/common/scalar.cuh"
#include "kernels/common/vector_load.cuh"

namespace sharedllm {

// ---- tiles ----

// Rows of kColumns 16-bit numbers. The 16-byte chunks of a row are swizzled in groups, so that the same chunk of 8
// adjacent rows, which one matrix of ldmatrix reads, is in different banks. The tile is aligned to 128 bytes.
template <int kColumns>
struct SwizzledTile {
  static constexpr int kPitch = 2 * kColumns;  // bytes
  static constexpr int kChunks = kColumns / 8;
  // with an odd number of 64-byte units a row already shifts every other row by half of the banks
  static constexpr int kGroup = kChunks % 8 == 0 ? 8 : 4;
  static_assert(kChunks % kGroup == 0, "a row is a multiple of 64 bytes");

  static __device__ __forceinline__ int permute(int row) { return kGroup == 8 ? row & 7 : (row >> 1) & 3; }
  // Byte offset of a chunk.
  static __device__ __forceinline__ uint32_t at(int row, int chunk) {
    return row * kPitch + ((chunk ^ permute(row)) << 4);
  }
  // A lane's part of a fragment's address: 16 rows by lane % 16, two chunks by lane / 16.
  static __device__ __forceinline__ uint32_t lane_base(int lane) { return at(lane % 16, lane / 16); }
  // The same for operand B stored as [n][k]. Its two matmuls take registers 0, 1 and 2, 3: aligned pairs, which need no
  // moves.
  static __device__ __forceinline__ uint32_t pair_lane_base(int lane) {
    return at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  // The lane's address in the block of 16 x 16 at row 16 * row_block and column 16 * column_block; base is the tile's
  // address + lane_base.
  static __device__ __forceinline__ uint32_t block(uint32_t base, int row_block, int column_block) {
    constexpr int kBlocks = kGroup / 2;
    return (base ^ ((column_block % kBlocks) << 5)) + (column_block / kBlocks) * (kGroup * 16) +
           row_block * (16 * kPitch);
  }
};

// A block of 16 x 16 as four matrices of 8 x 8: upper left, lower left, upper right, lower right. That is operand A
// [m][k] of a matmul; stored as [n][k], operand B of two matmuls: registers 0, 2 and 1, 3 (0, 1 and 2, 3 with
// pair_lane_base).
__device__ __forceinline__ void load_block(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
// The same with each matrix transposed: stored as [k][n], operand B of two matmuls: registers 0, 1 and 2, 3; stored as
// [k][m], operand A with registers 1 and 2 exchanged.
__device__ __forceinline__ void load_block_transposed(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// Stores a word at an address in shared memory.
__device__ __forceinline__ void store_word(uint32_t to, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}

// Transposes an 8 x 8 matrix of 16-bit numbers in accumulator layout (movmatrix): a row's pair becomes a column's.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// ---- matmuls ----

// sum [16, 8] += a [16, 16] b [16, 8]. With g = lane / 4 and t = lane % 4, sum holds rows g (0, 1) and g + 8 (2, 3),
// columns 2 t and 2 t + 1.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<__half>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                     uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sum [16, 8] += a [16, 8] b [8, 8] in tf32.
__device__ __forceinline__ void multiply_add_tf32(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounds two neighbouring sums [16, 8] to an operand A [16, 16].
template <class T>
__device__ __forceinline__ void pack_operand(uint32_t (&to)[4], const float (&left)[4], const float (&right)[4]) {
  to[0] = pack_pair(T{}, left[0], left[1]);
  to[1] = pack_pair(T{}, left[2], left[3]);
  to[2] = pack_pair(T{}, right[0], right[1]);
  to[3] = pack_pair(T{}, right[2], right[3]);
}

}  // namespace sharedllm

// Layout in which the fused Hopper backward pass accumulates dQ: the columns of each consumer warpgroup are separate,
// so that what a warp adds is one contiguous piece of memory.
#pragma once

#include <cstdint>

#include "kernels/injected_attention/params.h"

namespace sharedllm {

// [part][kv heads][T * group][width], float32, T * Hq * columns of them. A row consists of quads, in the order of a
// warpgroup's accumulators: columns 2 l and 2 l + 1 of two neighbouring groups of 8 make one quad. In odd rows the
// halves of each 8 quads are exchanged; then a warp's stores to shared memory, which has the same layout, have no bank
// conflicts.
struct QuerySums {
  int64_t rows;  // of a kv head
  int32_t kv_heads, all_columns;

  __host__ __device__ explicit QuerySums(const InjectedAttentionParams& p)
      : rows(p.num_queries * (p.q_heads / p.kv_heads)), kv_heads(p.kv_heads), all_columns(p.columns) {}

  // columns of the first part; the second has the rest
  static __host__ __device__ constexpr int columns(int head_size) { return head_size == 64 ? 32 : 64; }
  __host__ __device__ int width(int part) const {
    return part == 0 ? columns(all_columns) : all_columns - columns(all_columns);
  }
  // of a row of a part
  __host__ __device__ int64_t offset(int part, int kv_head, int64_t row) const {
    return part * rows * kv_heads * columns(all_columns) + (kv_head * rows + row) * width(part);
  }
  // in a row of a part: the quad that holds columns 2 l, 2 l + 1 of groups 2 i and 2 i + 1
  static __host__ __device__ constexpr int quad(int64_t row, int i, int l) {
    return (4 * i + l) ^ (static_cast<int>(row & 1) << 2);
  }
};

}  // namespace sharedllm

// Shared by the Hopper kernels of the backward pass: query tiles, TMA maps, WGMMA with a transposed A operand.
#pragma once

#include "kernels/common/hopper.cuh"
#include "kernels/common/scalar.cuh"
#include "kernels/common/tensor_map.h"
#include "kernels/common/warp.cuh"
#include "kernels/common/warpgroup_product.cuh"
#include "kernels/injected_attention/rows.cuh"

namespace sharedllm {

// A tile of at most 64 packed rows: `heads` query heads of one key/value head times `queries` queries, query-major. It
// never begins inside a query, so that one TMA box holds it for any group size (63 rows for a group of 7). A group of
// more than 64 heads is cut into `chunks`, each of which counts as a key/value head of its own.
struct QueryTiling {
  int32_t heads;
  int32_t queries;
  int32_t chunks;
};

constexpr int kTileRows = 64;

__host__ __device__ __forceinline__ QueryTiling make_query_tiling(int group) {
  QueryTiling tiling;
  tiling.heads = group < kTileRows ? group : kTileRows;
  tiling.queries = kTileRows / tiling.heads;
  tiling.chunks = (group + tiling.heads - 1) / tiling.heads;
  return tiling;
}

// Query tensors are seen as [T, kv heads, group, D], so that heads past a group's end arrive as zeros.
struct BackwardTensorMaps {
  CUtensorMap query, grad_out;  // boxes of a query tile
  CUtensorMap key, value;       // boxes of `slots` slots
};

inline cudaError_t encode_backward_maps(BackwardTensorMaps* maps, const InjectedAttentionBackwardParams& params,
                                        const QueryTiling& tiling, int32_t slots) {
  const InjectedAttentionParams& p = params.forward;
  if (p.num_queries > INT32_MAX || p.num_slots > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t size = p.head_size, group = p.q_heads / p.kv_heads;
  const int64_t query_sizes[4] = {size, group, p.kv_heads, p.num_queries};
  const int64_t query_strides[3] = {size, group * size, p.q_heads * size};
  const int32_t query_box[4] = {64, tiling.heads, 1, tiling.queries};
  const int64_t slot_sizes[3] = {size, p.kv_heads, p.num_slots};
  const int64_t key_strides[2] = {p.k_stride[1], p.k_stride[0]}, value_strides[2] = {p.v_stride[1], p.v_stride[0]};
  const int32_t slot_box[3] = {64, 1, slots};
  const int64_t own_strides[3] = {p.q_stride[1], group * p.q_stride[1], p.q_stride[0]};
  const bool own = params.turns_keys;
  cudaError_t status = encode_tensor_map_4d(&maps->query, p.type, own ? p.q : params.q_rotated, query_sizes,
                                            own ? own_strides : query_strides, query_box);
  if (status != cudaSuccess) return status;
  status = encode_tensor_map_4d(&maps->grad_out, p.type, params.grad_out, query_sizes, query_strides, query_box);
  if (status != cudaSuccess) return status;
  status = encode_tensor_map_3d(&maps->key, p.type, p.k, slot_sizes, key_strides, slot_box);
  if (status != cudaSuccess) return status;
  return encode_tensor_map_3d(&maps->value, p.type, p.v, slot_sizes, value_strides, slot_box);
}

// Low word of the descriptor of an operand in 128-byte swizzle (swizzled_operand); the high word is the same for all.
// Kernels short of registers keep these and hide them from the compiler, which would otherwise compute every
// instruction's descriptor before the loop.
__device__ __forceinline__ uint32_t operand_word(const void* shared, uint32_t leading_bytes = 16) {
  return (shared_address(shared) & 0x3ffff) >> 4 | leading_bytes >> 4 << 16;
}
__device__ __forceinline__ uint64_t operand_at(uint32_t word, uint32_t offset_bytes) {
  constexpr uint64_t kHigh = uint64_t{1} << 62 | uint64_t{1024 / 16} << 32;
  return kHigh | (word + offset_bytes / 16);
}

// c = a^T b or c += a^T b: in both operands the contraction index runs across the rows (MN-major).
template <class T, int kColumns>
struct TransposedAtom;

#define SHAREDLLM_TRANSPOSED_ATOM(COLUMNS)                                                     \
  template <>                                                                                  \
  struct TransposedAtom<__nv_bfloat16, COLUMNS> {                                              \
    using Type = cute::SM90::GMMA::MMA_64x##COLUMNS##x16_F32BF16BF16_SS<Major::MN, Major::MN>; \
  };                                                                                           \
  template <>                                                                                  \
  struct TransposedAtom<__half, COLUMNS> {                                                     \
    using Type = cute::SM90::GMMA::MMA_64x##COLUMNS##x16_F32F16F16_SS<Major::MN, Major::MN>;   \
  };
SHAREDLLM_TRANSPOSED_ATOM(32)
SHAREDLLM_TRANSPOSED_ATOM(64)
#undef SHAREDLLM_TRANSPOSED_ATOM

template <class T, int kColumns>
__device__ __forceinline__ void multiply_transposed(uint64_t a, uint64_t b, float (&c)[kColumns / 2], bool accumulate) {
  product_shared<typename TransposedAtom<T, kColumns>::Type>(a, b, c, accumulate ? ScaleOut::One : ScaleOut::Zero,
                                                             std::make_index_sequence<kColumns / 2>{});
}

// Converts accumulator pairs of columns to quads: of two neighbouring groups of 8 columns, the even lane of a pair of
// lanes keeps the first, the odd lane the second. `x` holds two pairs of one row; the quad starts at column 8 * odd +
// lane % 4 / 2 * 4.
__device__ __forceinline__ float4 exchange_pairs(float x0, float x1, float y0, float y1) {
  const bool odd = threadIdx.x & 1;
  const float a = __shfl_xor_sync(kFullWarp, odd ? x0 : y0, 1);
  const float b = __shfl_xor_sync(kFullWarp, odd ? x1 : y1, 1);
  return odd ? make_float4(a, b, y0, y1) : make_float4(x0, x1, a, b);
}

// Sets rows [first, end) of a tile of 128-byte panels to zero; every lane of one warp takes part. The swizzle only
// permutes within a row of 128 bytes.
__device__ __forceinline__ void zero_rows(uint8_t* tile, int panels, int panel_bytes, int first, int end) {
  const int lane = threadIdx.x % 32;
  for (int panel = 0; panel < panels; ++panel) {
    for (int offset = first * 128 + lane * 16; offset < end * 128; offset += 512) {
      *reinterpret_cast<uint4*>(tile + panel * panel_bytes + offset) = uint4{};
    }
  }
}

}  // namespace sharedllm

// Injected attention in float32 arithmetic, for what the tensor-core kernels do not take. Online softmax over tiles of
// slots.
#include "kernels/common/warp.cuh"
#include "kernels/injected_attention/generic/float_attention.cuh"
#include "kernels/injected_attention/generic/forward.h"

namespace sharedllm {
namespace {

using namespace float_attention;

// One tile of 32 packed rows of one key/value head.
template <class T, int kParts>
__global__ void __launch_bounds__(kThreads)
    generic_kernel(const __grid_constant__ InjectedAttentionParams p, uint32_t tiles) {
  extern __shared__ __align__(16) float floats[];
  float* const queries = floats;
  float* const tile = queries + kept_floats<kParts>();
  float* const weights = tile + kTileFloats;
  const int head = blockIdx.x / tiles;
  const RowTile row = find_row_tile(p, blockIdx.x % tiles, kRows);
  if (row.row < 0) return;
  const int64_t first_packed = row.tile * kRows;
  const int64_t packed_rows = row.q_count * (p.q_heads / p.kv_heads) - first_packed;
  const int used_rows = packed_rows < kRows ? static_cast<int>(packed_rows) : kRows;
  const RotatedVectors<T> source = rotated_vectors<T>(p, row, first_packed, head);
  load_kept<kParts>(queries, source, used_rows, p.head_size);

  float o[kParts][4][4], maximum[4], sum[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    maximum[i] = -kInfinity;
    sum[i] = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int c = 0; c < 4; ++c) o[part][i][c] = 0;
    }
  }
  const T* const keys = static_cast<const T*>(p.k) + head * p.k_stride[1];
  const T* const values = static_cast<const T*>(p.v) + head * p.v_stride[1];
  for (int64_t done = 0; done < row.slot_count; done += kTile) {
    const int valid = row.slot_count - done < kTile ? static_cast<int>(row.slot_count - done) : kTile;
    const int64_t slot = row.slot_begin + done;
    float s[4][4] = {};
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      __syncthreads();
      load_tile(tile, Vectors<T>{keys + slot * p.k_stride[0], p.k_stride[0]}, valid, part * kPart, p.head_size);
      __syncthreads();
      multiply_rows<kParts>(s, queries, tile, part * kPart, part_columns(p.head_size, part));
    }
    float shrink[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float best = maximum[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s[i][j] = thread_x() + 16 * j < valid ? s[i][j] * p.scale : -kInfinity;
        best = fmaxf(best, s[i][j]);
      }
      // the 16 threads of a row are half a warp
#pragma unroll
      for (int offset = 8; offset > 0; offset /= 2) best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, offset));
      shrink[i] = best == maximum[i] ? 1.0f : expf(maximum[i] - best);
      maximum[i] = best;
      // a row that has seen only -inf keeps weights of 0
      const float base = best == -kInfinity ? 0.0f : best;
      float total = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s[i][j] = expf(s[i][j] - base);
        total += s[i][j];
      }
      sum[i] = sum[i] * shrink[i] + sum_lanes<16>(total);
    }
    // written and read by the same half warp
    __syncwarp();
    store_weights(weights, s);
    __syncwarp();
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      __syncthreads();
      load_tile(tile, Vectors<T>{values + slot * p.v_stride[0], p.v_stride[0]}, valid, part * kPart, p.head_size);
      __syncthreads();
      // a tile's own sum first: rounding then grows with the number of tiles, not of slots
      float product[4][4] = {};
      multiply_columns(product, weights, tile);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) o[part][i][c] = fmaf(o[part][i][c], shrink[i], product[i][c]);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = 4 * thread_y() + i;
    if (r >= used_rows) continue;
    const int64_t at = token_and_head(source, r, p.q_heads);
    // no slots, or only -inf scores: zeros
    const bool nothing = sum[i] == 0.0f;
    const float inverse = nothing ? 0.0f : 1.0f / sum[i];
    if (thread_x() == 0) p.lse[at] = nothing ? -kInfinity : maximum[i] + logf(sum[i]);
    T* const to = static_cast<T*>(p.out) + at * p.head_size;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = part * kPart + 4 * thread_x() + c;
        if (column < p.head_size) to[column] = from_float<T>(o[part][i][c] * inverse);
      }
    }
  }
}

template <class T, int kParts>
cudaError_t launch(const InjectedAttentionParams& p, cudaStream_t stream) {
  constexpr int kBytes = (kept_floats<kParts>() + kTileFloats + kWeightFloats) * 4;
  const cudaError_t status =
      cudaFuncSetAttribute(generic_kernel<T, kParts>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  // a batch row adds at most one partial tile
  const int64_t tiles = p.num_queries * (p.q_heads / p.kv_heads) / kRows + p.num_rows;
  const int64_t blocks = tiles * p.kv_heads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  generic_kernel<T, kParts>
      <<<static_cast<unsigned>(blocks), kThreads, kBytes, stream>>>(p, static_cast<uint32_t>(tiles));
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_any(const InjectedAttentionParams& p, cudaStream_t stream) {
  switch ((p.head_size + kPart - 1) / kPart) {
    case 1:
      return launch<T, 1>(p, stream);
    case 2:
      return launch<T, 2>(p, stream);
    case 3:
      return launch<T, 3>(p, stream);
    case 4:
      return launch<T, 4>(p, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace

cudaError_t launch_injected_attention_generic(const InjectedAttentionParams& params, cudaStream_t stream) {
  static_assert(kGenericMaxHeadSize == 4 * kPart);
  // 16-bit types have tensor cores
  return params.type == FloatType::kFloat32 ? launch_any<float>(params, stream) : cudaErrorNotSupported;
}

}  // namespace sharedllm

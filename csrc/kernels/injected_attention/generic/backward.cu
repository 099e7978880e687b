// Backward of injected attention in float32 arithmetic, without tensor cores: one kernel over tiles of queries for
// grad_q, one over tiles of slots for grad_k and grad_v. Each recomputes the weights from lse.
#include "kernels/common/warp.cuh"
#include "kernels/injected_attention/generic/backward.h"
#include "kernels/injected_attention/generic/float_attention.cuh"
#include "kernels/injected_attention/generic/forward.h"

namespace sharedllm {
namespace {

using namespace float_attention;

// Kept rows of two tensors, a tile of the other side, weights.
template <int kParts>
constexpr int kSharedBytes = (2 * kept_floats<kParts>() + kTileFloats + kWeightFloats + 3 * kTile) * 4;

template <class T>
__device__ __forceinline__ PackedVectors<T> packed_contiguous(const InjectedAttentionParams& p, const void* base,
                                                              int64_t q_begin, int64_t first_packed, int head) {
  return packed_vectors<T>(p, base, static_cast<int64_t>(p.q_heads) * p.head_size, p.head_size, q_begin, first_packed,
                           head);
}

// lse and delta = rowsum(grad_out * out) - grad_lse of `rows` packed rows into shared memory.
template <class T>
__device__ __forceinline__ void load_row_numbers(const InjectedAttentionBackwardParams& p, const PackedVectors<T>& out,
                                                 const PackedVectors<T>& grad, int rows, int valid, float* lse,
                                                 float* delta) {
  const int lane = threadIdx.x % 32;
#pragma unroll 2
  for (int r = threadIdx.x / 32; r < rows; r += kThreads / 32) {
    float sum = 0;
    if (r < valid) {
      const T *const out_row = out.row(r), *const grad_row = grad.row(r);
      for (int column = lane; column < p.forward.head_size; column += 32) {
        sum = fmaf(to_float(out_row[column]), to_float(grad_row[column]), sum);
      }
    }
    sum = sum_lanes<32>(sum);
    if (lane == 0) {
      const int64_t at = r < valid ? token_and_head(out, r, p.forward.q_heads) : 0;
      lse[r] = r < valid ? p.forward.lse[at] : -kInfinity;
      delta[r] = r < valid && p.grad_lse != nullptr ? sum - p.grad_lse[at] : sum;
    }
  }
}

// Weight of a score; 0 for a row whose scores are all -inf.
__device__ __forceinline__ float weight_of(float score, float scale, float lse) {
  return lse == -kInfinity ? 0.0f : expf(score * scale - lse);
}

template <class T, int kParts>
__global__ void __launch_bounds__(kThreads, 2)
    query_gradient_kernel(const __grid_constant__ InjectedAttentionBackwardParams p, uint32_t tiles) {
  const InjectedAttentionParams& f = p.forward;
  extern __shared__ __align__(16) float floats[];
  float* const queries = floats;
  float* const upstream = queries + kept_floats<kParts>();
  float* const tile = upstream + kept_floats<kParts>();
  float* const weights = tile + kTileFloats;
  float* const lse = weights + kWeightFloats;
  float* const delta = lse + kTile;
  const int head = blockIdx.x / tiles;
  const RowTile row = find_row_tile(f, blockIdx.x % tiles, kRows);
  if (row.row < 0) return;
  const int64_t first_packed = row.tile * kRows;
  const int64_t packed_rows = row.q_count * (f.q_heads / f.kv_heads) - first_packed;
  const int used_rows = packed_rows < kRows ? static_cast<int>(packed_rows) : kRows;
  const RotatedVectors<T> source = rotated_vectors<T>(f, row, first_packed, head);
  const PackedVectors<T> grad = packed_contiguous<T>(f, p.grad_out, row.q_begin, first_packed, head);
  const PackedVectors<T> out = packed_contiguous<T>(f, f.out, row.q_begin, first_packed, head);
  load_kept<kParts>(queries, source, used_rows, f.head_size);
  load_kept<kParts>(upstream, grad, used_rows, f.head_size);
  load_row_numbers(p, out, grad, kRows, used_rows, lse, delta);

  float sum[kParts][4][4];
#pragma unroll
  for (int i = 0; i < kParts * 16; ++i) sum[i / 16][i / 4 % 4][i % 4] = 0;
  const T* const keys = static_cast<const T*>(f.k) + head * f.k_stride[1];
  const T* const values = static_cast<const T*>(f.v) + head * f.v_stride[1];
  for (int64_t done = 0; done < row.slot_count; done += kTile) {
    const int valid = row.slot_count - done < kTile ? static_cast<int>(row.slot_count - done) : kTile;
    const Vectors<T> key_tile{keys + (row.slot_begin + done) * f.k_stride[0], f.k_stride[0]};
    const Vectors<T> value_tile{values + (row.slot_begin + done) * f.v_stride[0], f.v_stride[0]};
    float s[4][4] = {}, g[4][4] = {};
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      __syncthreads();
      load_tile(tile, value_tile, valid, part * kPart, f.head_size);
      __syncthreads();
      multiply_rows<kParts>(g, upstream, tile, part * kPart, part_columns(f.head_size, part));
    }
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      __syncthreads();
      load_tile(tile, key_tile, valid, part * kPart, f.head_size);
      __syncthreads();
      multiply_rows<kParts>(s, queries, tile, part * kPart, part_columns(f.head_size, part));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = 4 * thread_y() + i;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool inside = thread_x() + 16 * j < valid;
        s[i][j] = inside ? weight_of(s[i][j], f.scale, lse[r]) * (g[i][j] - delta[r]) * f.scale : 0.0f;
      }
    }
    __syncwarp();
    store_weights(weights, s);
    __syncwarp();
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      // with one part the tile is still in shared memory
      if (kParts > 1) {
        __syncthreads();
        load_tile(tile, key_tile, valid, part * kPart, f.head_size);
        __syncthreads();
      }
      float product[4][4] = {};
      multiply_columns(product, weights, tile);
#pragma unroll
      for (int i = 0; i < 16; ++i) sum[part][i / 4][i % 4] += product[i / 4][i % 4];
    }
  }

  // through shared memory, since the two numbers of a rotated pair belong to different threads
  __syncthreads();
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int r = 4 * thread_y() + i / 4, column = part * kPart + 4 * thread_x() + i % 4;
      queries[r * kept_pitch<kParts>() + column] = sum[part][i / 4][i % 4];
    }
  }
  __syncthreads();
  const int lane = threadIdx.x % 32, half = f.rotary_half;
  for (int r = threadIdx.x / 32; r < used_rows; r += kThreads / 32) {
    const float* const x = queries + r * kept_pitch<kParts>();
    T* const to = static_cast<T*>(p.grad_q) + token_and_head(source, r, f.q_heads) * f.head_size;
    for (int column = lane; column < f.head_size; column += 32) {
      float y = x[column];
      if (column < half) {
        y = y * source.cos[column] + x[column + half] * source.sin[column];
      } else if (column < 2 * half) {
        y = y * source.cos[column - half] - x[column - half] * source.sin[column - half];
      }
      to[column] = from_float<T>(y);
    }
  }
}

template <class T, int kParts>
__global__ void __launch_bounds__(kThreads, 2)
    slot_gradient_kernel(const __grid_constant__ InjectedAttentionBackwardParams p, uint32_t tiles) {
  const InjectedAttentionParams& f = p.forward;
  extern __shared__ __align__(16) float floats[];
  float* const keys = floats;
  float* const values = keys + kept_floats<kParts>();
  float* const tile = values + kept_floats<kParts>();
  float* const weights = tile + kTileFloats;
  float* const lse = weights + kWeightFloats;
  float* const delta = lse + kTile;
  const int head = blockIdx.x / tiles;
  const int64_t first_slot = static_cast<int64_t>(blockIdx.x % tiles) * kRows;
  const int slots = f.num_slots - first_slot < kRows ? static_cast<int>(f.num_slots - first_slot) : kRows;
  const Vectors<T> key_rows{static_cast<const T*>(f.k) + first_slot * f.k_stride[0] + head * f.k_stride[1],
                            f.k_stride[0]};
  const Vectors<T> value_rows{static_cast<const T*>(f.v) + first_slot * f.v_stride[0] + head * f.v_stride[1],
                              f.v_stride[0]};
  load_kept<kParts>(keys, key_rows, slots, f.head_size);
  load_kept<kParts>(values, value_rows, slots, f.head_size);

  float grad_k[kParts][4][4], grad_v[kParts][4][4];
#pragma unroll
  for (int i = 0; i < kParts * 16; ++i) grad_k[i / 16][i / 4 % 4][i % 4] = grad_v[i / 16][i / 4 % 4][i % 4] = 0;
  const int64_t group = f.q_heads / f.kv_heads;
  RowTile row;
  for (int64_t b = 0; b < f.num_rows; ++b) {
    load_row(f, b, &row);
    // this row's slots among the kept ones
    const int64_t from = row.slot_begin - first_slot, to = from + row.slot_count;
    if (from >= slots || to <= 0 || row.slot_count == 0) continue;
    const int low = from < 0 ? 0 : static_cast<int>(from), high = to < slots ? static_cast<int>(to) : slots;
    for (int64_t done = 0; done < row.q_count * group; done += kTile) {
      const int64_t left = row.q_count * group - done;
      const int valid = left < kTile ? static_cast<int>(left) : kTile;
      const RotatedVectors<T> query = rotated_vectors<T>(f, row, done, head);
      const PackedVectors<T> grad = packed_contiguous<T>(f, p.grad_out, row.q_begin, done, head);
      __syncthreads();
      load_row_numbers(p, packed_contiguous<T>(f, f.out, row.q_begin, done, head), grad, kTile, valid, lse, delta);
      float s[4][4] = {}, g[4][4] = {};
#pragma unroll 1
      for (int part = 0; part < kParts; ++part) {
        __syncthreads();
        load_tile(tile, query, valid, part * kPart, f.head_size);
        __syncthreads();
        multiply_rows<kParts>(s, keys, tile, part * kPart, part_columns(f.head_size, part));
      }
#pragma unroll 1
      for (int part = 0; part < kParts; ++part) {
        __syncthreads();
        load_tile(tile, grad, valid, part * kPart, f.head_size);
        __syncthreads();
        multiply_rows<kParts>(g, values, tile, part * kPart, part_columns(f.head_size, part));
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = thread_x() + 16 * j;
        const float row_lse = lse[column], row_delta = delta[column];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = 4 * thread_y() + i;
          const bool inside = column < valid && r >= low && r < high;
          s[i][j] = inside ? weight_of(s[i][j], f.scale, row_lse) : 0.0f;
          g[i][j] = inside ? s[i][j] * (g[i][j] - row_delta) * f.scale : 0.0f;
        }
      }
      __syncwarp();
      store_weights(weights, s);
      __syncwarp();
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        // with one part the tile is still in shared memory
        if (kParts > 1) {
          __syncthreads();
          load_tile(tile, grad, valid, part * kPart, f.head_size);
          __syncthreads();
        }
        float product[4][4] = {};
        multiply_columns(product, weights, tile);
#pragma unroll
        for (int i = 0; i < 16; ++i) grad_v[part][i / 4][i % 4] += product[i / 4][i % 4];
      }
      __syncwarp();
      store_weights(weights, g);
      __syncwarp();
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        __syncthreads();
        load_tile(tile, query, valid, part * kPart, f.head_size);
        __syncthreads();
        float product[4][4] = {};
        multiply_columns(product, weights, tile);
#pragma unroll
        for (int i = 0; i < 16; ++i) grad_k[part][i / 4][i % 4] += product[i / 4][i % 4];
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = 4 * thread_y() + i;
    if (r >= slots) continue;
    const int64_t at = ((first_slot + r) * f.kv_heads + head) * f.head_size;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = part * kPart + 4 * thread_x() + c;
        if (column >= f.head_size) continue;
        if (p.grad_k != nullptr) static_cast<T*>(p.grad_k)[at + column] = from_float<T>(grad_k[part][i][c]);
        if (p.grad_v != nullptr) static_cast<T*>(p.grad_v)[at + column] = from_float<T>(grad_v[part][i][c]);
      }
    }
  }
}

template <class T, int kParts>
cudaError_t launch(const InjectedAttentionBackwardParams& p, cudaStream_t stream) {
  const InjectedAttentionParams& f = p.forward;
  constexpr int kBytes = kSharedBytes<kParts>;
  cudaError_t status =
      cudaFuncSetAttribute(query_gradient_kernel<T, kParts>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  status = cudaFuncSetAttribute(slot_gradient_kernel<T, kParts>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  // a batch row adds at most one partial tile
  const int64_t query_tiles = f.num_queries * (f.q_heads / f.kv_heads) / kRows + f.num_rows;
  const int64_t slot_tiles = p.grad_k == nullptr && p.grad_v == nullptr ? 0 : (f.num_slots + kRows - 1) / kRows;
  const int64_t query_blocks = query_tiles * f.kv_heads, slot_blocks = slot_tiles * f.kv_heads;
  if (query_blocks > 0x7fffffff || slot_blocks > 0x7fffffff) return cudaErrorInvalidValue;
  if (query_blocks > 0) {
    query_gradient_kernel<T, kParts>
        <<<static_cast<unsigned>(query_blocks), kThreads, kBytes, stream>>>(p, static_cast<uint32_t>(query_tiles));
    status = cudaGetLastError();
    if (status != cudaSuccess) return status;
  }
  if (slot_blocks > 0) {
    slot_gradient_kernel<T, kParts>
        <<<static_cast<unsigned>(slot_blocks), kThreads, kBytes, stream>>>(p, static_cast<uint32_t>(slot_tiles));
  }
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_any(const InjectedAttentionBackwardParams& p, cudaStream_t stream) {
  switch ((p.forward.head_size + kPart - 1) / kPart) {
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

cudaError_t launch_injected_attention_backward_generic(const InjectedAttentionBackwardParams& params,
                                                       cudaStream_t stream) {
  static_assert(kGenericMaxHeadSize == 4 * kPart);
  // 16-bit types have tensor cores
  return params.forward.type == FloatType::kFloat32 ? launch_any<float>(params, stream) : cudaErrorNotSupported;
}

}  // namespace sharedllm

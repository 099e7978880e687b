// Attention without tensor cores: float32 matmuls of tiles in shared memory, for any stride.
// A block of 128 threads keeps 32 rows of one side (queries or slots), all columns, and loops over the other side in
// tiles of 64 rows, 64 columns at a time. Thread (y, x) = (index / 16, index % 16) computes 4 x 4 numbers: rows 4 y ..
// 4 y + 3 with tile rows x, x + 16, x + 32, x + 48, or with columns 4 x .. 4 x + 3.
#pragma once

#include "kernels/common/softmax.cuh"
#include "kernels/common/vector_load.cuh"
#include "kernels/injected_attention/rows.cuh"

namespace sharedllm {
namespace float_attention {

constexpr int kThreads = 128;
constexpr int kRows = 32;  // rows that a block keeps
constexpr int kTile = 64;  // rows of a tile of the other side
constexpr int kPart = 64;  // columns at a time
// 16 bytes more than the columns: the same column of adjacent rows is in different banks
constexpr int kTilePitch = kPart + 4;

template <int kParts>
constexpr int kept_pitch() {
  return kParts * kPart + 4;
}
template <int kParts>
constexpr int kept_floats() {
  return kRows * kept_pitch<kParts>();
}
constexpr int kTileFloats = kTile * kTilePitch;
constexpr int kWeightFloats = kRows * kTilePitch;

__device__ __forceinline__ int thread_x() { return threadIdx.x % 16; }
__device__ __forceinline__ int thread_y() { return threadIdx.x / 16; }

// Vectors [rows][columns] of slots, or of a tensor packed like them.
template <class T>
struct Vectors {
  const T* first;
  int64_t stride;
  __device__ __forceinline__ const T* row(int r) const { return first + r * stride; }
  __device__ __forceinline__ float load(const T* vector, int column) const { return to_float(vector[column]); }
};

// Packed rows (query, member of the group) of one key/value head.
template <class T>
struct PackedVectors {
  const T* base;
  int64_t strides[2];  // between queries, between heads
  int64_t first_query;
  uint32_t first_member, group;
  int head;  // key/value head
  __device__ __forceinline__ const T* row(int r) const {
    const uint32_t member = first_member + r, query = member / group;
    return base + (first_query + query) * strides[0] +
           (head * static_cast<int64_t>(group) + member % group) * strides[1];
  }
  __device__ __forceinline__ float load(const T* vector, int column) const { return to_float(vector[column]); }
};

// The same, rotated.
template <class T>
struct RotatedVectors : PackedVectors<T> {
  const float* cos;
  const float* sin;
  int half;
  __device__ __forceinline__ float load(const T* vector, int column) const {
    const float x = to_float(vector[column]);
    if (column < half) return x * cos[column] - to_float(vector[column + half]) * sin[column];
    if (column < 2 * half) return x * cos[column - half] + to_float(vector[column - half]) * sin[column - half];
    return x;
  }
};

// Packed rows of a batch row from first_packed on.
template <class T>
__device__ __forceinline__ PackedVectors<T> packed_vectors(const InjectedAttentionParams& p, const void* base,
                                                           int64_t stride0, int64_t stride1, int64_t q_begin,
                                                           int64_t first_packed, int head) {
  const uint32_t group = static_cast<uint32_t>(p.q_heads / p.kv_heads);
  return {static_cast<const T*>(base),
          {stride0, stride1},
          q_begin + first_packed / group,
          static_cast<uint32_t>(first_packed % group),
          group,
          head};
}
template <class T>
__device__ __forceinline__ RotatedVectors<T> rotated_vectors(const InjectedAttentionParams& p, const RowTile& row,
                                                             int64_t first_packed, int head) {
  RotatedVectors<T> rotated;
  static_cast<PackedVectors<T>&>(rotated) =
      packed_vectors<T>(p, p.q, p.q_stride[0], p.q_stride[1], row.q_begin, first_packed, head);
  rotated.cos = p.cos + row.position * p.rotary_half;
  rotated.sin = p.sin + row.position * p.rotary_half;
  rotated.half = p.rotary_half;
  return rotated;
}
// Index of packed row r in [T, Hq].
template <class T>
__device__ __forceinline__ int64_t token_and_head(const PackedVectors<T>& rows, int r, int q_heads) {
  const uint32_t member = rows.first_member + r, query = member / rows.group;
  return (rows.first_query + query) * q_heads + static_cast<int64_t>(rows.head) * rows.group + member % rows.group;
}

// The kept side: all columns of rows below `valid`, zeros elsewhere.
template <int kParts, class Source>
__device__ __forceinline__ void load_kept(float* to, const Source& source, int valid, int head_size) {
  const int lane = threadIdx.x % 32;
  for (int r = threadIdx.x / 32; r < kRows; r += kThreads / 32) {
    const auto* const vector = source.row(r < valid ? r : 0);
#pragma unroll
    for (int column = lane; column < kParts * kPart; column += 32) {
      to[r * kept_pitch<kParts>() + column] = r < valid && column < head_size ? source.load(vector, column) : 0.0f;
    }
  }
}

// Columns first .. first + 63 of a tile's rows below `valid`, zeros elsewhere.
template <class Source>
__device__ __forceinline__ void load_tile(float* to, const Source& source, int valid, int first, int head_size) {
  const int lane = threadIdx.x % 32;
#pragma unroll 4
  for (int r = threadIdx.x / 32; r < kTile; r += kThreads / 32) {
    const auto* const vector = source.row(r < valid ? r : 0);
#pragma unroll
    for (int half = 0; half < kPart; half += 32) {
      const int column = first + half + lane;
      to[r * kTilePitch + half + lane] = r < valid && column < head_size ? source.load(vector, column) : 0.0f;
    }
  }
}

// sum[i][j] += kept row 4 y + i times tile row x + 16 j, over the columns of a part, padded with zeros. 16 columns are
// summed on their own first: rounding grows with the length of a chain of additions.
template <int kParts>
__device__ __forceinline__ void multiply_rows(float (&sum)[4][4], const float* kept, const float* tile, int first,
                                              int columns) {
  const float* const a_row = kept + 4 * thread_y() * kept_pitch<kParts>() + first;
  const float* const b_row = tile + thread_x() * kTilePitch;
  for (int begin = 0; begin < columns; begin += 16) {
    float chain[4][4] = {};
#pragma unroll
    for (int d = begin; d < begin + 16; d += 4) {
      float4 a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = *reinterpret_cast<const float4*>(a_row + i * kept_pitch<kParts>() + d);
#pragma unroll
      for (int j = 0; j < 4; ++j) b[j] = *reinterpret_cast<const float4*>(b_row + 16 * j * kTilePitch + d);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          chain[i][j] = fmaf(a[i].x, b[j].x, chain[i][j]);
          chain[i][j] = fmaf(a[i].y, b[j].y, chain[i][j]);
          chain[i][j] = fmaf(a[i].z, b[j].z, chain[i][j]);
          chain[i][j] = fmaf(a[i].w, b[j].w, chain[i][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] += chain[i / 4][i % 4];
  }
}

// sum[i][c] += over the tile's rows: weight of row 4 y + i times column 4 x + c.
__device__ __forceinline__ void multiply_columns(float (&sum)[4][4], const float* weights, const float* tile) {
  const float* const w_row = weights + 4 * thread_y() * kTilePitch;
  const float* const t_row = tile + 4 * thread_x();
#pragma unroll 2
  for (int s = 0; s < kTile; s += 4) {
    float w[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      *reinterpret_cast<float4*>(w[i]) = *reinterpret_cast<const float4*>(w_row + i * kTilePitch + s);
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const float4 x = *reinterpret_cast<const float4*>(t_row + (s + u) * kTilePitch);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[i][0] = fmaf(w[i][u], x.x, sum[i][0]);
        sum[i][1] = fmaf(w[i][u], x.y, sum[i][1]);
        sum[i][2] = fmaf(w[i][u], x.z, sum[i][2]);
        sum[i][3] = fmaf(w[i][u], x.w, sum[i][3]);
      }
    }
  }
}

__device__ __forceinline__ void store_weights(float* weights, const float (&w)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) weights[(4 * thread_y() + i) * kTilePitch + thread_x() + 16 * j] = w[i][j];
  }
}

// Columns of part `part` that have to be multiplied.
__device__ __forceinline__ int part_columns(int head_size, int part) {
  const int left = head_size - part * kPart;
  return left < kPart ? left : kPart;
}

}  // namespace float_attention
}  // namespace sharedllm

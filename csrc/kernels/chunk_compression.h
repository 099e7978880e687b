// Chunk compression on the GPU (RoPE, selection, packing): parameters and launches. No torch header here or in what
// this includes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/float_type.h"

namespace sharedllm {

// Elements of a head, and heads, are counted in 32 bits, including a few strides past the end.
constexpr int64_t kChunkCompressionMaxSize = 1 << 30;

// Index values on the device need no check: a position outside the tables takes the nearest row, and a kept token
// outside the tokens leaves its slot zero.
struct ChunkCompressionIndices {
  const float* cos;              // [P, half]
  const float* sin;              // [P, half]
  const int64_t* q_positions;    // [Tq] or null
  const int64_t* positions;      // [T] or null
  const int64_t* keep_index;     // [S], outside 0 .. T-1: unused
  const int64_t* keep_position;  // [S]
  int64_t num_queries, num_tokens, num_slots, num_positions;
  int32_t q_heads, kv_heads, head_size, half;
};

struct ChunkCompressionParams {
  ChunkCompressionIndices indices;
  const void* q;                                  // [Tq, Hq, D] or null
  const void* k;                                  // [T, Hkv, D]
  const void* v;                                  // [T, Hkv, D]
  void* q_rotated;                                // [Tq, Hq, D], dense; written with q
  void* k_rotated;                                // [T, Hkv, D], dense; written with positions
  void* memory_k;                                 // [S, Hkv, D], dense
  void* memory_v;                                 // [S, Hkv, D], dense
  int64_t q_stride[2], k_stride[2], v_stride[2];  // of row and head; elements are contiguous
  FloatType type;
};

struct ChunkCompressionBackwardParams {
  ChunkCompressionIndices indices;
  const void* grad_q_rotated;  // [Tq, Hq, D], null without q_positions
  const void* grad_k_rotated;  // [T, Hkv, D], null without positions
  const void* grad_memory_k;   // [S, Hkv, D]
  const void* grad_memory_v;   // [S, Hkv, D]
  void* grad_q;                // [Tq, Hq, D], dense; written with grad_q_rotated
  void* grad_k;                // [T, Hkv, D], dense
  void* grad_v;                // [T, Hkv, D], dense
  int64_t* slot_of_token;      // [T], workspace
  int64_t q_stride[2], k_stride[2], memory_k_stride[2], memory_v_stride[2];  // of row and head
  FloatType type;
};

// Queues the kernels on the stream. The tables need at least one row if anything is rotated. No token may be kept
// twice: the forward pass fills all of its slots, the backward pass counts only the last.
cudaError_t launch_chunk_compression(const ChunkCompressionParams& params, cudaStream_t stream);
cudaError_t launch_chunk_compression_backward(const ChunkCompressionBackwardParams& params, cudaStream_t stream);

}  // namespace sharedllm

// Between the projections and the attention of one new token: head norms, RoPE, the append to the KV cache. Overlaps
// its neighbours by PDL.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/float_type.h"

namespace sharedllm {

struct DecodeAppendParams {
  const void* qkv;        // [B, (Hq + 2 Hkv) D]: all query heads, all key heads, all value heads
  const void* q_norm;     // [D], or null
  const void* k_norm;     // [D], or null
  const int64_t* length;  // [B], tokens that the cache holds of each row
  const int64_t* first;   // [B], how many of them are left padding
  const float* cos;       // [P, R/2]
  const float* sin;       // [P, R/2]
  void* keys;             // [B, capacity, Hkv, D]
  void* values;           // [B, capacity, Hkv, D]
  void* q;                // [B, Hq, D], contiguous
  int64_t* slot_range;    // [B, 2], contiguous: the row's slots of the cache seen as [B * capacity, Hkv, D]
  const void* prefetch;   // what the next kernels read, to be prefetched into L2, or null
  int64_t prefetch_bytes;
  int64_t qkv_stride;       // elements between rows; the last stride is 1
  int64_t key_stride[3];    // between rows, tokens, heads; the last stride is 1
  int64_t value_stride[3];  // likewise
  int64_t rows;             // B
  int64_t capacity;
  int64_t num_positions;  // P
  int64_t window;         // tokens that a query sees, including itself; 0: all
  int32_t q_heads, kv_heads;
  int32_t head_size;    // D
  int32_t rotary_half;  // R/2
  float eps;            // of the norms
  bool overlap;  // PDL: launched before the previous kernel has ended (9.0 and later); its results are waited for
  FloatType type;
};

// The new token goes to index length[b]; its position is length[b] - first[b]. Lengths are clamped to the capacity:
// where the cache is full nothing is written and the range ends at the capacity. Any D and alignment. Can be captured
// into a CUDA graph.
cudaError_t launch_decode_append(const DecodeAppendParams& params, cudaStream_t stream);

}  // namespace sharedllm

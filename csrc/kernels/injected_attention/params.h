// Injected attention on the GPU: parameters and launches of every path. Cross-attention over the memory's slots with
// GQA, RoPE at one position per row, no mask. No torch header here or in what this includes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/float_type.h"

namespace sharedllm {

// A ragged batch of rows: row b owns queries cu_q[b] .. cu_q[b + 1] - 1 and reads slots slot_range[b]. The values are
// on the device: kernels clamp them into the tensors, so that a caller's mistake never becomes a wild address.
struct InjectedAttentionParams {
  const void* q;              // [T, Hq, D], not rotated
  const void* k;              // [S, Hkv, D]
  const void* v;              // [S, Hkv, D]
  const int64_t* cu_q;        // [B + 1]
  const int64_t* slot_range;  // [B, 2]
  const int64_t* q_position;  // [B]
  const float* cos;           // [P, R/2]
  const float* sin;           // [P, R/2]
  void* out;                  // [T, Hq, D], contiguous
  float* lse;                 // [T, Hq], contiguous; log-sum-exp
  int64_t q_stride[2];        // elements between tokens, between heads; the last stride is 1
  int64_t k_stride[2];        // between slots, between heads
  int64_t v_stride[2];
  int64_t num_queries;        // T
  int64_t num_slots;          // S
  int64_t num_rows;           // B
  int64_t num_positions;      // P
  int32_t q_heads, kv_heads;  // Hq, Hkv
  int32_t head_size;          // D
  int32_t rotary_half;        // R/2
  float scale;
  FloatType type;

  // Split-KV: number of parts of a row's slots; with more than one, the partial results go to the workspace and
  // launch_injected_attention_combine merges them.
  int32_t splits;
  int32_t columns;     // of the kernel instance: D, or a larger head size, whose columns from D on are zeros
  float* partial_out;  // [splits, T, Hq, columns]; undefined where partial_lse is -inf
  float* partial_lse;  // [splits, T, Hq]
};

// Gradients: dS = P * (dP - delta), delta = rowsum(grad_out * out) - grad_lse.
struct InjectedAttentionBackwardParams {
  InjectedAttentionParams forward;  // out and lse are inputs here; splits unused
  const void* grad_out;             // [T, Hq, D], contiguous
  const float* grad_lse;            // [T, Hq], contiguous, or null
  void* grad_q;                     // [T, Hq, D], contiguous
  void* grad_k;                     // [S, Hkv, D], contiguous, or null: not wanted
  void* grad_v;                     // [S, Hkv, D], contiguous, or null

  // workspace, written by launch_injected_attention_backward_prepare
  void* q_rotated;      // [T, Hq, D], in q's dtype; null with turns_keys
  float* delta;         // [T, Hq]
  float* lse_log2;      // [T, Hq], lse * log2(e); +inf for a row without slots, so that its weights are 0
  float* grad_q_float;  // [T, Hq, columns], zeroed; sum of dS k, not scaled, not rotated back. Null on paths without it
  // Keys are rotated back instead of queries rotated forward, and sums of dS k are those of the queries as they came.
  bool turns_keys;

  // Number of parts of a slot tile's queries; with more than one, each part sums into its own share.
  int32_t kv_splits;
  // Or only the tiles of the last wave of blocks are cut, into this many shares of equal work (SlotTileTail); 0: not
  // cut.
  int32_t tail_shares;
  float* partial_grad_k;  // [kv_splits, S, Hkv, columns], or [pieces of the tail, slots of a tile, columns]
  float* partial_grad_v;
};

}  // namespace sharedllm

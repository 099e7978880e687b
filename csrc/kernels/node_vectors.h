// Node vectors' attention on the GPU (RoPE, GQA, split-KV): parameters, plan and launch. No torch header here or in
// what this includes.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cstdint>

#include "kernels/common/float_type.h"

namespace sharedllm {

constexpr int32_t kNodeVectorsMaxSize = 256;
// Leaves of a root are numbered in 32 bits beside its length.
constexpr int32_t kNodeVectorsMaxLevel = 20;

// Roots are halved level by level, left = floor(length / 2). The nodes of levels first_level .. last_level, 2^level per
// root, get a vector each: the attention of their last token over all of their tokens. Level 0 is the root itself, so
// first_level = last_level = 0 is the plain operator. All nodes inside one node of first_level share one read of its
// keys and values: a deeper node has the scores of its ancestor, as rotary scores depend on relative positions only.
struct NodeVectorsParams {
  const void* q;         // [N, 2^last_level, Hq, D]: queries at the last token of each leaf, the nodes of last_level
  const void* k;         // [T, Hkv, D], not rotated
  const void* v;         // [T, Hkv, D]
  const int64_t* spans;  // [N, 2]: start and length of the roots
  const float* cos;      // [P, R/2]
  const float* sin;      // [P, R/2]
  void* out;             // [N, 2^(last_level + 1) - 2^first_level, Hq, D], contiguous; level by level
  int64_t q_stride[2];   // elements between leaves, between heads; the last stride is 1
  int64_t k_stride[2];   // between tokens, between heads
  int64_t v_stride[2];
  int64_t num_roots;          // N
  int64_t num_tokens;         // T
  int64_t num_positions;      // P
  int32_t q_heads, kv_heads;  // Hq, Hkv
  int32_t head_size;          // D
  int32_t rotary_half;        // R/2
  int32_t first_level, last_level;
  float scale;
  FloatType type;

  // filled by plan_node_vectors
  int32_t tensor_tiles;    // query columns / 8 that a warp's tensor cores take at once; 0: the kernel without them
  int32_t warps, stages;   // of a block with tensor cores; tiles that a warp keeps in shared memory
  int32_t units;           // warps that share one worker's tokens: key/value heads times groups of query rows
  int64_t workers;         // equal shares of all tokens
  int64_t workspace_size;  // bytes
  void* workspace;         // allocated by the caller after the plan, 16-byte aligned
};

// Chooses the kernel for the current device and sets the size of the workspace. Never waits for the device.
cudaError_t plan_node_vectors(NodeVectorsParams* params);

// Queues the kernels; needs num_roots > 0, q_heads > 0 and head_size > 0.
cudaError_t launch_node_vectors(const NodeVectorsParams& params, cudaStream_t stream);

// Gradients of the plain operator (levels 0): dS = P * (dP - delta) * scale, delta = rowsum(dP * P).
struct NodeVectorsBackwardParams {
  NodeVectorsParams forward;  // only inputs are used
  const void* grad_out;       // [N, Hq, D], contiguous
  void* grad_q;               // [N, Hq, D], contiguous
  void* grad_k;               // [T, Hkv, D], contiguous
  void* grad_v;               // [T, Hkv, D], contiguous

  // workspace, allocated by the caller
  float* query;   // [N, Hq, D]: rotated, times scale * log2(e)
  float2* stats;  // [N, Hq]: log-sum-exp of the scores, to base 2, and delta
};

// Queues the kernels; needs head_size > 0 and q_heads > 0. Any number of nodes and tokens; overlapping spans add up.
cudaError_t launch_node_vectors_backward(const NodeVectorsBackwardParams& params, cudaStream_t stream);

}  // namespace sharedllm

// Top-k node retrieval on the GPU: parameters, plan and launch. No torch header here or in what this includes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/float_type.h"

namespace sharedllm {

// A group's candidates are merged in shared memory with one batch of new ones, which bounds k.
constexpr int64_t kTopkNodesMaxK = 1024;
// A sort key holds the row's index in 31 bits.
constexpr int64_t kTopkNodesMaxRows = 0x7fffffff;
// Elements of a row are counted in 32 bits, including a few strides past the end.
constexpr int64_t kTopkNodesMaxSize = 1 << 30;

struct TopkNodesParams {
  const void* queries;         // [Q, d], rows query_stride elements apart
  const void* nodes;           // [N, d], rows node_stride elements apart
  const int64_t* cu_groups;    // [G + 1]
  const int64_t* group_query;  // [G]
  const uint8_t* valid;        // [N] or null
  int64_t* indices;            // [G, k]
  float* similarity;           // [G, k]
  int64_t query_stride, node_stride;
  int64_t num_queries, num_nodes, num_groups, size, k;
  float eps;
  FloatType type;

  // filled by plan_topk_nodes
  bool vector;             // rows are 16-byte aligned
  int32_t lanes;           // threads that share one row
  int32_t tile;            // rows of one block, a power of two
  int64_t tiles;           // blocks
  int64_t partial;         // candidates that a tile keeps of a group that it shares with its neighbours
  int64_t merges;          // blocks of the second kernel: one per group, or per border between tiles if these are fewer
  int64_t workspace_size;  // number of workspace elements
  uint64_t* workspace;     // [2, partial, tiles]; allocated by the caller after the plan
};

// Chooses the tile for the current device and sets the size of the workspace. Never waits for the device.
cudaError_t plan_topk_nodes(TopkNodesParams* params);

// Queues the kernels; needs num_groups > 0 and k > 0.
cudaError_t launch_topk_nodes(const TopkNodesParams& params, cudaStream_t stream);

}  // namespace sharedllm

// Context tree on the GPU: parameters, plan and launches. No torch header here or in what this includes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sharedllm {

// Nodes are counted in 32 bits, including one block of them past the end.
constexpr int64_t kContextTreeMaxNodes = 1 << 30;

enum class OffsetType { kFloat32, kBFloat16, kFloat16, kFloat64 };

// Strides count elements.
struct ContextTreeSplitParams {
  const int64_t* spans;  // [n, 2]
  const void* offset;    // [n] or null
  int64_t* children;     // [n, 2, 2], dense, aligned to 16 bytes
  int64_t span_stride[2], offset_stride;
  int64_t count;
  OffsetType offset_type;
};

struct ContextTreeSelectParams {
  const int64_t* children;  // [n, 2, 2]
  const int64_t* choice;    // [n] or null
  int64_t* picked;          // [n, 2], dense, aligned to 16 bytes
  int64_t* retained;        // [n, 2], dense, aligned to 16 bytes
  int64_t child_stride[3], choice_stride;
  int64_t count;
};

struct ContextTreeLayoutParams {
  const int64_t* nodes;        // [n, m, 2]
  const int64_t* chunk_index;  // [n]
  int64_t* positions;          // [T], aligned to 16 bytes
  int64_t* cu_nodes;           // [n * m + 1]
  int64_t* keep_index;         // [S], aligned to 16 bytes
  int64_t* keep_position;      // [S], aligned to 16 bytes
  int64_t* cu_slots;           // [n + 1]
  int64_t node_stride[3], chunk_index_stride;
  int64_t num_chunks, nodes_per_chunk, slots_per_node, num_tokens, num_slots;

  // filled by plan_context_tree_layout
  int64_t scan_blocks;     // blocks that sum the nodes
  int64_t workspace_size;  // number of workspace elements
  int64_t* workspace;      // [n * m + 1] cumulative kept tokens, then the blocks' own; allocated after the plan
};

cudaError_t launch_context_tree_split(const ContextTreeSplitParams& params, cudaStream_t stream);
cudaError_t launch_context_tree_select(const ContextTreeSelectParams& params, cudaStream_t stream);

// Sets the size of the workspace.
void plan_context_tree_layout(ContextTreeLayoutParams* params);

// Queues the kernels; needs nodes_per_chunk > 0, slots_per_node > 0 and at most kContextTreeMaxNodes nodes. Whatever
// the nodes hold, every element of the outputs is written and nothing else.
cudaError_t launch_context_tree_layout(const ContextTreeLayoutParams& params, cudaStream_t stream);

}  // namespace sharedllm

// Context tree: children of spans, one level's choice, and the layout of the retained nodes. The layout adds up the
// nodes' lengths and kept tokens in node order (one block if they are few, else blocks that know each other's sums),
// and then looks up the node of every token and of every slot, a tile at a time.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/common/warp.cuh"
#include "kernels/context_tree.h"

namespace sharedllm {
namespace {

constexpr int kThreads = 256;
// Nodes that a block adds up at a time, one by each thread.
constexpr int kScanThreads = 1024;
// So many rounds of a single block are done without a kernel for the blocks' sums.
constexpr int kScanRounds = 4;
// Tokens or slots of a block: enough to pay for the search of their first node, few enough to spread over the GPU.
constexpr int kTile = 1024;

__device__ __forceinline__ void store_pair(int64_t* to, int64_t first, int64_t second) {
  *reinterpret_cast<longlong2*>(to) = make_longlong2(first, second);
}

__device__ __forceinline__ double offset_at(const ContextTreeSplitParams& p, int64_t i) {
  i *= p.offset_stride;
  switch (p.offset_type) {
    case OffsetType::kFloat32:
      return static_cast<const float*>(p.offset)[i];
    case OffsetType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p.offset)[i]);
    case OffsetType::kFloat16:
      return __half2float(static_cast<const __half*>(p.offset)[i]);
    default:
      return static_cast<const double*>(p.offset)[i];
  }
}

__global__ void __launch_bounds__(kThreads) context_tree_split(const __grid_constant__ ContextTreeSplitParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.count) return;
  const int64_t* span = p.spans + i * p.span_stride[0];
  const int64_t start = span[0], length = span[p.span_stride[1]];
  int64_t left = length / 2;
  // rounds down; out of range saturates and NaN gives the lowest number, which the bounds below mend
  if (p.offset != nullptr) left = __double2ll_rd(static_cast<double>(length) / 2 - offset_at(p, i));
  const int64_t lowest = length > 1 ? 1 : 0, highest = length > 1 ? length - 1 : 0;
  left = left < lowest ? lowest : left > highest ? highest : left;
  store_pair(p.children + 4 * i, start, left);
  store_pair(p.children + 4 * i + 2, start + left, length - left);
}

__global__ void __launch_bounds__(kThreads) context_tree_select(const __grid_constant__ ContextTreeSelectParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.count) return;
  const int64_t* left = p.children + i * p.child_stride[0];
  const int64_t* right = left + p.child_stride[1];
  const int64_t part = p.child_stride[2];
  const int64_t left_start = left[0], left_length = left[part], right_start = right[0], right_length = right[part];
  const bool wants_left = p.choice != nullptr && p.choice[i * p.choice_stride] == 0;
  const bool pick_left = (wants_left && left_length > 0) || right_length == 0;
  store_pair(p.picked + 2 * i, pick_left ? left_start : right_start, pick_left ? left_length : right_length);
  store_pair(p.retained + 2 * i, pick_left ? right_start : left_start, pick_left ? right_length : left_length);
}

struct Node {
  int64_t start, length;

  // Whether this node comes before another in token order, `first`: it does among equals. An empty node comes before
  // the node that starts where it does.
  __device__ __forceinline__ bool before(const Node& other, bool first) const {
    const int64_t key = start * 2 + (length > 0), other_key = other.start * 2 + (other.length > 0);
    return key < other_key || (key == other_key && first);
  }
};

// Nodes and chunks fit into 32 bits, which makes the divisions cheap.
__device__ __forceinline__ int num_nodes(const ContextTreeLayoutParams& p) {
  return static_cast<int>(p.num_chunks) * static_cast<int>(p.nodes_per_chunk);
}

// Lengths are kept inside of the tokens, so that sums of the caller's mistakes do not overflow.
__device__ __forceinline__ Node node_at(const ContextTreeLayoutParams& p, int chunk, int place) {
  const int64_t* node = p.nodes + chunk * p.node_stride[0] + place * p.node_stride[1];
  const int64_t length = __ldg(node + p.node_stride[2]);
  return {__ldg(node), length < 0 ? 0 : length > p.num_tokens ? p.num_tokens : length};
}

struct Sums {
  int64_t length = 0, kept = 0;

  __device__ __forceinline__ void add(const Sums& other) {
    length += other.length;
    kept += other.kept;
  }
};

__device__ __forceinline__ Sums sums_of(const ContextTreeLayoutParams& p, const Node& node) {
  return {node.length, node.length < p.slots_per_node ? node.length : p.slots_per_node};
}

// Sum over the threads up to and with this one, and of all of them; every thread of the block takes part.
__device__ __forceinline__ Sums scan_block(Sums x, Sums* total) {
  __shared__ Sums warp_sums[kScanThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const Sums other{__shfl_up_sync(kFullWarp, x.length, offset), __shfl_up_sync(kFullWarp, x.kept, offset)};
    if (lane >= offset) x.add(other);
  }
  // of the call before, which another warp may still read
  __syncthreads();
  if (lane == 31) warp_sums[warp] = x;
  __syncthreads();
  Sums before;
  *total = {};
#pragma unroll
  for (int i = 0; i < kScanThreads / 32; ++i) {
    if (i < warp) before.add(warp_sums[i]);
    total->add(warp_sums[i]);
  }
  x.add(before);
  return x;
}

// Whether the node comes after one of the next chunk, so that the chunks do not lie in token order.
__device__ __forceinline__ bool out_of_order(const ContextTreeLayoutParams& p, const Node& node, int chunk) {
  if (chunk + 1 >= p.num_chunks) return false;
  bool wrong = false;
  for (int j = 0; j < p.nodes_per_chunk; ++j) wrong |= !node.before(node_at(p, chunk + 1, j), true);
  return wrong;
}

// Writes a node's entry of cu_nodes: its rank in token order and the lengths before it come from the chunk, whose first
// token is known, or from all nodes if the chunks lie in another order.
__device__ __forceinline__ void write_boundary(const ContextTreeLayoutParams& p, int i, bool ordered,
                                               int64_t lengths_before) {
  const int m = static_cast<int>(p.nodes_per_chunk), chunk = i / m, place = i - chunk * m;
  const int last_chunk = ordered ? chunk : static_cast<int>(p.num_chunks) - 1;
  const Node node = node_at(p, chunk, place);
  int rank = ordered ? chunk * m : 0;
  int64_t begin = 0;
  for (int c = ordered ? chunk : 0; c <= last_chunk; ++c) {
    for (int j = 0; j < m; ++j) {
      const Node other = node_at(p, c, j);
      const bool earlier = c < chunk || (c == chunk && j < place);
      if (other.before(node, earlier)) {
        ++rank;
        begin += other.length;
      }
      if (ordered && earlier) lengths_before -= other.length;
    }
  }
  // lengths_before is now the sum over the chunks before
  p.cu_nodes[rank] = ordered ? lengths_before + begin : begin;
}

// Sums of each scan block's nodes, for the blocks after it: length, kept tokens, whether its chunks are out of order.
__global__ void __launch_bounds__(kScanThreads)
    context_tree_layout_sums(const __grid_constant__ ContextTreeLayoutParams p) {
  const int i = static_cast<int>(blockIdx.x * kScanThreads + threadIdx.x), m = static_cast<int>(p.nodes_per_chunk);
  Sums sums;
  bool wrong = false;
  if (i < num_nodes(p)) {
    const int chunk = i / m;
    const Node node = node_at(p, chunk, i - chunk * m);
    sums = sums_of(p, node);
    wrong = out_of_order(p, node, chunk);
  }
  Sums total;
  scan_block(sums, &total);
  wrong = __syncthreads_or(wrong);
  if (threadIdx.x == 0) {
    int64_t* const to = p.workspace + num_nodes(p) + 1 + 3 * static_cast<int64_t>(blockIdx.x);
    to[0] = total.length;
    to[1] = total.kept;
    to[2] = wrong;
  }
}

__global__ void __launch_bounds__(kScanThreads)
    context_tree_layout_scan(const __grid_constant__ ContextTreeLayoutParams p) {
  const int count = num_nodes(p), m = static_cast<int>(p.nodes_per_chunk);
  const bool alone = gridDim.x == 1;
  const int begin = static_cast<int>(blockIdx.x) * kScanThreads;
  const int end = alone ? count : begin + kScanThreads < count ? begin + kScanThreads : count;
  int64_t* const cu_kept = p.workspace;
  Sums before;
  bool ordered = true;
  if (!alone) {
    const int64_t* const sums = cu_kept + count + 1;
    Sums mine;
    bool wrong = false;
    for (uint32_t block = threadIdx.x; block < gridDim.x; block += kScanThreads) {
      if (block < blockIdx.x) mine.add({sums[3 * block], sums[3 * block + 1]});
      wrong |= sums[3 * block + 2] != 0;
    }
    scan_block(mine, &before);
    ordered = !__syncthreads_or(wrong);
  }

  bool wrong = false;
  for (int base = begin; base < end; base += kScanThreads) {
    const int i = base + static_cast<int>(threadIdx.x), chunk = i / m;
    Node node{};
    if (i < end) node = node_at(p, chunk, i - chunk * m);
    const Sums own = sums_of(p, node);
    Sums total;
    Sums through = scan_block(own, &total);
    through.add(before);
    before.add(total);
    if (i < end) {
      if (alone) wrong |= out_of_order(p, node, chunk);
      write_boundary(p, i, ordered, through.length - own.length);
      cu_kept[i] = through.kept - own.kept;
      if (chunk * m == i) p.cu_slots[chunk] = through.kept - own.kept;
    }
  }
  if (end == count && threadIdx.x == 0) {
    p.cu_nodes[count] = before.length;
    cu_kept[count] = p.cu_slots[p.num_chunks] = before.kept;
  }
  if (alone && __syncthreads_or(wrong)) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kScanThreads) write_boundary(p, i, false, 0);
  }
}

// How many of cumulative[1 .. count] are at most value, if that is known to lie in [low, high].
__device__ __forceinline__ int count_up_to(const int64_t* cumulative, int low, int high, int64_t value) {
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (cumulative[middle + 1] <= value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Blocks of kTile tokens, then blocks of kTile slots.
__global__ void __launch_bounds__(kThreads)
    context_tree_layout_fill(const __grid_constant__ ContextTreeLayoutParams p, int64_t token_tiles) {
  __shared__ int owners[2];
  const bool slots = blockIdx.x >= token_tiles;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) - (slots ? token_tiles : 0)) * kTile;
  const int count = num_nodes(p), m = static_cast<int>(p.nodes_per_chunk);
  const int64_t total = slots ? p.num_slots : p.num_tokens;
  const int64_t* const cumulative = slots ? p.workspace : p.cu_nodes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp < 2) {
    const int64_t last = first + kTile < total ? first + kTile - 1 : total - 1;
    const int64_t owner = lower_bound_by_warp(cumulative + 1, count, (warp ? last : first) + 1, lane);
    if (lane == 0) owners[warp] = static_cast<int>(owner);
  }
  __syncthreads();
  const int low = owners[0], high = owners[1];

#pragma unroll
  for (int round = 0; round < kTile / (2 * kThreads); ++round) {
    const int64_t i = first + 2 * (round * kThreads + static_cast<int>(threadIdx.x));
    if (i >= total) return;
    int owner = count_up_to(cumulative, low, high, i);
    int64_t result[2], position[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j == 1) owner = count_up_to(cumulative, owner, high, i + 1);
      if (!slots) {
        result[j] = i + j - cumulative[owner];
      } else if (owner >= count) {
        result[j] = -1;
        position[j] = 0;
      } else {
        const int chunk = owner / m;
        const Node node = node_at(p, chunk, owner - chunk * m);
        const int64_t begin = cumulative[owner], kept = cumulative[owner + 1] - begin;
        const int64_t inside = (i + j - begin) * node.length / (kept > 0 ? kept : 1);
        result[j] = node.start + inside;
        position[j] = inside + __ldg(p.chunk_index + chunk * p.chunk_index_stride);
      }
    }
    int64_t* const to = (slots ? p.keep_index : p.positions) + i;
    if (i + 1 < total) {
      store_pair(to, result[0], result[1]);
      if (slots) store_pair(p.keep_position + i, position[0], position[1]);
    } else {
      to[0] = result[0];
      if (slots) p.keep_position[i] = position[0];
    }
  }
}

// A grid of at least one block.
cudaLaunchConfig_t config_of(int64_t blocks, int threads, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = stream;
  return config;
}

constexpr int64_t kMaxBlocks = 0x7fffffff;

int64_t tiles_of(int64_t count, int64_t tile) { return (count + tile - 1) / tile; }

}  // namespace

cudaError_t launch_context_tree_split(const ContextTreeSplitParams& params, cudaStream_t stream) {
  const int64_t blocks = tiles_of(params.count, kThreads);
  if (blocks == 0) return cudaSuccess;
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  const cudaLaunchConfig_t config = config_of(blocks, kThreads, stream);
  return cudaLaunchKernelEx(&config, context_tree_split, params);
}

cudaError_t launch_context_tree_select(const ContextTreeSelectParams& params, cudaStream_t stream) {
  const int64_t blocks = tiles_of(params.count, kThreads);
  if (blocks == 0) return cudaSuccess;
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  const cudaLaunchConfig_t config = config_of(blocks, kThreads, stream);
  return cudaLaunchKernelEx(&config, context_tree_select, params);
}

void plan_context_tree_layout(ContextTreeLayoutParams* params) {
  ContextTreeLayoutParams& p = *params;
  const int64_t count = p.num_chunks * p.nodes_per_chunk;
  p.scan_blocks = count <= kScanRounds * kScanThreads ? 1 : tiles_of(count, kScanThreads);
  p.workspace_size = count + 1 + (p.scan_blocks > 1 ? 3 * p.scan_blocks : 0);
}

cudaError_t launch_context_tree_layout(const ContextTreeLayoutParams& params, cudaStream_t stream) {
  const int64_t token_tiles = tiles_of(params.num_tokens, kTile), slot_tiles = tiles_of(params.num_slots, kTile);
  if (token_tiles + slot_tiles > kMaxBlocks) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = config_of(params.scan_blocks, kScanThreads, stream);
  cudaError_t status = cudaSuccess;
  if (params.scan_blocks > 1) status = cudaLaunchKernelEx(&config, context_tree_layout_sums, params);
  if (status == cudaSuccess) status = cudaLaunchKernelEx(&config, context_tree_layout_scan, params);
  if (status != cudaSuccess || token_tiles + slot_tiles == 0) return status;
  config = config_of(token_tiles + slot_tiles, kThreads, stream);
  return cudaLaunchKernelEx(&config, context_tree_layout_fill, params, token_tiles);
}

}  // namespace sharedllm

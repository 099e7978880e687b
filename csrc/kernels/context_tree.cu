// Context tree: children of spans, the choice of one level, and the layout of the retained nodes. Integers only.
// The layout is a prefix sum over the nodes' lengths and kept tokens in node order (one block if there are few,
// otherwise blocks that know each other's sums). Then the node of every token and of every slot is looked up, a tile at
// a time.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/common/warp.cuh"
#include "kernels/context_tree.h"

namespace sharedllm {
namespace {

constexpr int kThreads = 256;
// Nodes that one block sums, one thread each: few enough that 1024 chunks of 4 occupy several SMs.
constexpr int kScanThreads = 512;
// Up to this many blocks, each adds up all nodes before its own, which costs less than a kernel for the blocks' sums.
constexpr int kDirectBlocks = 16;
// Resident blocks of the fill kernel on an SM: each waits for one search after another.
constexpr int kFillBlocks = 5;
// Tokens or slots of a block: fewer spread over more of the GPU, more need fewer searches for their first node.
constexpr int kSmallTile = 1024, kLargeTile = 4096;
// From here on small tiles would need more than one wave.
constexpr int64_t kManyElements = 1 << 20;

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
  // rounds down; out of range saturates and NaN gives the lowest number, both corrected by the bounds below
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

  // Whether this node comes before another in token order; `first` decides between equals. An empty node comes before
  // the node that starts at the same token.
  __device__ __forceinline__ bool before(const Node& other, bool first) const {
    if (start != other.start) return start < other.start;
    return (length > 0) == (other.length > 0) ? first : length <= 0;
  }
};

// Nodes and chunks fit into 32 bits, which makes the divisions cheap.
__device__ __forceinline__ int num_nodes(const ContextTreeLayoutParams& p) {
  return static_cast<int>(p.num_chunks) * static_cast<int>(p.nodes_per_chunk);
}

// Lengths are clamped to the number of tokens, so that sums of invalid input do not overflow.
__device__ __forceinline__ Node node_at(const ContextTreeLayoutParams& p, int chunk, int place) {
  const int64_t* node = p.nodes + chunk * p.node_stride[0] + place * p.node_stride[1];
  const int64_t start = __ldg(node), length = __ldg(node + p.node_stride[2]);
  return {start, length < 0 ? 0 : length > p.num_tokens ? p.num_tokens : length};
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

// Inclusive prefix sum over the lanes of a warp.
__device__ __forceinline__ Sums scan_warp(Sums x, int lane) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const Sums other{__shfl_up_sync(kFullWarp, x.length, offset), __shfl_up_sync(kFullWarp, x.kept, offset)};
    if (lane >= offset) x.add(other);
  }
  return x;
}

// Inclusive prefix sum over the threads, and the sum of all; every thread of the block takes part.
__device__ __forceinline__ Sums scan_block(Sums x, Sums* total) {
  constexpr int kWarps = kScanThreads / 32;
  static_assert(kWarps <= 32);
  __shared__ Sums warp_sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  x = scan_warp(x, lane);
  // of the previous call, which another warp may still read
  __syncthreads();
  if (lane == 31) warp_sums[warp] = x;
  __syncthreads();
  if (warp == 0) {
    const Sums through = scan_warp(lane < kWarps ? warp_sums[lane] : Sums{}, lane);
    if (lane < kWarps) warp_sums[lane] = through;
  }
  __syncthreads();
  if (warp > 0) x.add(warp_sums[warp - 1]);
  *total = warp_sums[kWarps - 1];
  return x;
}

// In the workspace after the cumulative kept tokens: whether a scan block found its nodes out of order, then the sums
// of its nodes.
__device__ __forceinline__ int64_t* flags_of(const ContextTreeLayoutParams& p) {
  return p.workspace + num_nodes(p) + 1;
}
__device__ __forceinline__ int64_t* block_sums_of(const ContextTreeLayoutParams& p) {
  return flags_of(p) + p.scan_blocks;
}

__global__ void __launch_bounds__(kScanThreads)
    context_tree_layout_sums(const __grid_constant__ ContextTreeLayoutParams p) {
  const int i = static_cast<int>(blockIdx.x * kScanThreads + threadIdx.x), m = static_cast<int>(p.nodes_per_chunk);
  Sums sums, total;
  if (i < num_nodes(p)) sums = sums_of(p, node_at(p, i / m, i % m));
  scan_block(sums, &total);
  if (threadIdx.x == 0) {
    block_sums_of(p)[2 * blockIdx.x] = total.length;
    block_sums_of(p)[2 * blockIdx.x + 1] = total.kept;
  }
}

// Cumulative sums as if the chunks were in token order. They are if every node then starts where it should.
__global__ void __launch_bounds__(kScanThreads)
    context_tree_layout_scan(const __grid_constant__ ContextTreeLayoutParams p) {
  const int count = num_nodes(p), m = static_cast<int>(p.nodes_per_chunk), thread = static_cast<int>(threadIdx.x);
  const int begin = static_cast<int>(blockIdx.x) * kScanThreads, i = begin + thread, chunk = i / m;
  int64_t* const cu_kept = p.workspace;
  Node node{};
  if (i < count) node = node_at(p, chunk, i - chunk * m);

  Sums mine, before, total;
  if (begin > 0) {
    if (p.scan_blocks > kDirectBlocks) {
      const int64_t* const sums = block_sums_of(p);
      for (int block = thread; block < static_cast<int>(blockIdx.x); block += kScanThreads) {
        mine.add({sums[2 * block], sums[2 * block + 1]});
      }
    } else {
#pragma unroll 4
      for (int j = thread; j < begin; j += kScanThreads) mine.add(sums_of(p, node_at(p, j / m, j % m)));
    }
    scan_block(mine, &before);
  }
  const Sums own = sums_of(p, node);
  Sums until = scan_block(own, &total);
  until.add(before);
  until.length -= own.length;
  until.kept -= own.kept;

  bool wrong = false;
  if (i < count) {
    // from the lengths before this node to those before its chunk, then to those before it in token order
    const int place = i - chunk * m;
    int rank = chunk * m;
    int64_t boundary = until.length;
    for (int j = 0; j < m; ++j) {
      const Node other = node_at(p, chunk, j);
      if (j < place) boundary -= other.length;
      if (other.before(node, j < place)) {
        boundary += other.length;
        ++rank;
      }
    }
    p.cu_nodes[rank] = boundary;
    wrong = boundary != node.start;
    cu_kept[i] = until.kept;
    if (place == 0) p.cu_slots[chunk] = until.kept;
  }
  wrong = __syncthreads_or(wrong);
  if (thread == 0) {
    flags_of(p)[blockIdx.x] = wrong;
    if (blockIdx.x + 1 == gridDim.x) {
      before.add(total);
      p.cu_nodes[count] = before.length;
      cu_kept[count] = p.cu_slots[p.num_chunks] = before.kept;
    }
  }
}

// Chunks in another order than their tokens: the boundaries of this block's share of the nodes, by comparing each with
// all, and the positions in a tile of tokens. Slow; only callers outside the contract get here.
__device__ __forceinline__ void fill_out_of_order(const ContextTreeLayoutParams& p, int64_t first, int64_t end) {
  const int count = num_nodes(p), m = static_cast<int>(p.nodes_per_chunk);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < count; at += threads) {
    const int i = static_cast<int>(at);
    const Node node = node_at(p, i / m, i % m);
    int rank = 0;
    int64_t boundary = 0;
    for (int j = 0; j < count; ++j) {
      const Node other = node_at(p, j / m, j % m);
      if (!other.before(node, j < i)) continue;
      boundary += other.length;
      ++rank;
    }
    p.cu_nodes[rank] = boundary;
  }
  // in case no node holds a token
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) p.positions[i] = i;
  __syncthreads();
  for (int j = static_cast<int>(threadIdx.x); j < count; j += kThreads) {
    const Node node = node_at(p, j / m, j % m);
    const int64_t node_end = node.start + node.length;
    for (int64_t i = node.start > first ? node.start : first; i < end && i < node_end; ++i) {
      p.positions[i] = i - node.start;
    }
  }
}

// How many of cumulative[1 .. count] are at most value, given that the result is in [low, high].
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

// Blocks of `tile` tokens, then blocks of `tile` slots.
__global__ void __launch_bounds__(kThreads, kFillBlocks)
    context_tree_layout_fill(const __grid_constant__ ContextTreeLayoutParams p, int64_t token_tiles, int tile) {
  __shared__ int owners[2];
  const bool slots = blockIdx.x >= token_tiles;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) - (slots ? token_tiles : 0)) * tile;
  const int count = num_nodes(p), m = static_cast<int>(p.nodes_per_chunk);
  const int64_t total = slots ? p.num_slots : p.num_tokens, end = first + tile < total ? first + tile : total;
  const int64_t* const cumulative = slots ? p.workspace : p.cu_nodes;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  bool wrong = false;
  for (int i = thread; i < static_cast<int>(p.scan_blocks); i += kThreads) wrong |= flags_of(p)[i] != 0;
  if (warp < 2) {
    const int64_t owner = lower_bound_by_warp(cumulative + 1, count, warp ? end : first + 1, lane);
    if (lane == 0) owners[warp] = static_cast<int>(owner);
  }
  if (__syncthreads_or(wrong)) {
    fill_out_of_order(p, first, slots ? first : end);
    if (!slots) return;
  }
  const int low = owners[0], high = owners[1];

  for (int64_t i = first + 2 * thread; i < end; i += 2 * kThreads) {
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
    if (i + 1 < end) {
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
  p.scan_blocks = std::max<int64_t>(tiles_of(count, kScanThreads), 1);
  p.workspace_size = count + 1 + (p.scan_blocks > kDirectBlocks ? 3 : 1) * p.scan_blocks;
}

cudaError_t launch_context_tree_layout(const ContextTreeLayoutParams& params, cudaStream_t stream) {
  const int tile = params.num_tokens + params.num_slots < kManyElements ? kSmallTile : kLargeTile;
  const int64_t token_tiles = tiles_of(params.num_tokens, tile), tiles = token_tiles + tiles_of(params.num_slots, tile);
  if (tiles > kMaxBlocks) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = config_of(params.scan_blocks, kScanThreads, stream);
  cudaError_t status = cudaSuccess;
  if (params.scan_blocks > kDirectBlocks) status = cudaLaunchKernelEx(&config, context_tree_layout_sums, params);
  if (status == cudaSuccess) status = cudaLaunchKernelEx(&config, context_tree_layout_scan, params);
  if (status != cudaSuccess || tiles == 0) return status;
  config = config_of(tiles, kThreads, stream);
  return cudaLaunchKernelEx(&config, context_tree_layout_fill, params, token_tiles, tile);
}

}  // namespace sharedllm

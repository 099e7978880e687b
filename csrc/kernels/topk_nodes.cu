// Top-k node retrieval. The rows are cut into tiles of equal length, whatever the groups are, so that the host needs no
// sizes. A block scores the rows of its tile and sorts them by (group, similarity, row). Groups inside the tile are
// then finished; of a group that continues in the next tile, the best candidates go to the workspace. A second kernel
// merges those, one block for each such group.
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/common/block_sort.cuh"
#include "kernels/common/overlap.cuh"
#include "kernels/common/scalar.cuh"
#include "kernels/common/vector_load.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/topk_nodes.h"

namespace sharedllm {
namespace {

constexpr int kTileThreads = 256;
constexpr int kMaxTile = 1024;
constexpr int kMergeThreads = 1024;
constexpr int kMergeKeys = 2048;
constexpr int kFirstBatch = 256;
static_assert(kTopkNodesMaxK + kMergeThreads <= kMergeKeys);

// Candidate between tiles: rank (32 bits) | row (31) | is NaN (1). Smaller is better.
constexpr uint64_t kNothing = ~uint64_t{0};
// Ranks of numbers go from that of +inf, 0x007fffff, to that of -inf, 0xff800000.
constexpr uint32_t kInvalidRank = 0xffffffffu;
// Key inside a tile: first row of the group (20 bits) | rank (32) | row (11) | is NaN (1), rows counted in the tile.
constexpr int kRankShift = 12, kGroupShift = 44;

// Ascends from the best similarity to the worst; NaN ranks with -inf.
__device__ __forceinline__ uint32_t rank_of(float similarity) {
  if (similarity != similarity) similarity = -__int_as_float(0x7f800000);
  const uint32_t bits = __float_as_uint(similarity + 0.0f);  // -0 equals +0
  return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

__device__ __forceinline__ float similarity_of(uint64_t candidate) {
  if (candidate & 1) return __int_as_float(0x7fc00000);
  const uint32_t rank = static_cast<uint32_t>(candidate >> 32);
  return __uint_as_float(rank & 0x80000000u ? rank : ~rank & 0x7fffffffu);
}

__device__ __forceinline__ uint64_t candidate_of(uint64_t tile_key, int64_t first_row) {
  const uint64_t rank = (tile_key >> kRankShift) & 0xffffffffu;
  if (rank == kInvalidRank) return kNothing;
  const uint64_t row = first_row + ((tile_key & ((1 << kRankShift) - 1)) >> 1);
  return rank << 32 | row << 1 | (tile_key & 1);
}

__device__ __forceinline__ void write_result(const TopkNodesParams& p, int64_t at, uint64_t candidate) {
  const bool found = candidate != kNothing;
  p.indices[at] = found ? static_cast<int64_t>((candidate >> 1) & 0x7fffffffu) : -1;
  p.similarity[at] = found ? similarity_of(candidate) : -__int_as_float(0x7f800000);
}

struct Range {
  int64_t begin, end;
};

// Rows of a group. Values outside the nodes would be the caller's mistake: they must not become wild addresses.
__device__ __forceinline__ Range group_rows(const TopkNodesParams& p, int64_t group) {
  const int64_t begin = clamp_index(p.cu_groups[group], 0, p.num_nodes);
  return {begin, clamp_index(p.cu_groups[group + 1], begin, p.num_nodes)};
}

struct Sums {
  float dot = 0, node = 0, query = 0;

  __device__ __forceinline__ void add(float x, float q) {
    dot = fmaf(x, q, dot);
    node = fmaf(x, x, node);
    query = fmaf(q, q, query);
  }

  template <class T>
  __device__ __forceinline__ void add(const uint4& nodes, const uint4& queries) {
    const uint32_t x[4] = {nodes.x, nodes.y, nodes.z, nodes.w}, q[4] = {queries.x, queries.y, queries.z, queries.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < Word<T>::kElements; ++j) add(Word<T>::get(x[i], j), Word<T>::get(q[i], j));
    }
  }
};

// One thread's share of dot product and squared norms.
template <class T, int kLanes, bool kVector>
__device__ __forceinline__ Sums partial_sums(const T* node, const T* query, int size, int lane) {
  // four vectors in flight hide the memory latency, four chains of sums that of the arithmetic
  constexpr int kUnroll = 4;
  Sums sums[kUnroll];
  int done = 0;
  if constexpr (kVector) {
    constexpr int kWidth = 16 / sizeof(T);
    const int vectors = size / kWidth;
    const uint4* nodes = reinterpret_cast<const uint4*>(node);
    const uint4* queries = reinterpret_cast<const uint4*>(query);
    int v = lane;
    for (; v + (kUnroll - 1) * kLanes < vectors; v += kUnroll * kLanes) {
      uint4 x[kUnroll], q[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) x[u] = load_streaming(nodes + v + u * kLanes);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) q[u] = load_cached(queries + v + u * kLanes);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) sums[u].template add<T>(x[u], q[u]);
    }
    for (; v < vectors; v += kLanes) sums[0].template add<T>(load_streaming(nodes + v), load_cached(queries + v));
    done = vectors * kWidth;
  }
  for (int i = done + lane; i < size; i += kLanes) sums[1].add(to_float(node[i]), to_float(query[i]));
  Sums total;
  total.dot = (sums[0].dot + sums[1].dot) + (sums[2].dot + sums[3].dot);
  total.node = (sums[0].node + sums[1].node) + (sums[2].node + sums[3].node);
  total.query = (sums[0].query + sums[1].query) + (sums[2].query + sums[3].query);
  return total;
}

// A comparison instead of fmaxf, which would replace NaN by eps.
__device__ __forceinline__ float norm_of(float square, float eps) {
  const float norm = sqrtf(square);
  return norm < eps ? eps : norm;
}

template <class T, int kLanes, bool kVector>
__global__ void __launch_bounds__(kTileThreads) topk_nodes_tile(const __grid_constant__ TopkNodesParams p) {
  __shared__ uint64_t keys[kMaxTile];
  __shared__ int64_t query_of_row[kMaxTile];
  __shared__ int64_t group_bounds[2];
  constexpr int kRowsPerWarp = 32 / kLanes, kWarps = kTileThreads / 32;
  const int warp = threadIdx.x / 32, warp_lane = threadIdx.x % 32, lane = threadIdx.x % kLanes;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * p.tile, tile_end = begin + p.tile;
  const bool last_tile = blockIdx.x + 1 == p.tiles;
  const int rows = static_cast<int>(p.num_nodes - begin < p.tile ? p.num_nodes - begin : p.tile);

  // groups that begin in this tile; those past the last row (they are empty) belong to the last tile
  if (warp < 2) {
    const int64_t bound = warp == 1 && last_tile
                              ? p.num_groups
                              : lower_bound_by_warp(p.cu_groups, p.num_groups, warp ? tile_end : begin, warp_lane);
    if (warp_lane == 0) group_bounds[warp] = bound;
  }
  __syncthreads();
  const int64_t first_group = group_bounds[0], end_group = group_bounds[1];

  for (int row = threadIdx.x; row < p.tile; row += kTileThreads) {
    if (row >= rows) {
      keys[row] = kNothing;
      continue;
    }
    // the last group that begins at or before the row holds it
    int64_t low = first_group > 0 ? first_group - 1 : 0, high = end_group;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      if (p.cu_groups[middle] <= begin + row) {
        low = middle;
      } else {
        high = middle;
      }
    }
    low = clamp_index(low, 0, p.num_groups - 1);
    keys[row] = static_cast<uint64_t>(clamp_index(p.cu_groups[low] - begin, 0, kMaxTile - 1)) << kGroupShift;
    query_of_row[row] = clamp_index(p.group_query[low], 0, p.num_queries - 1);
  }
  __syncthreads();

  for (int base = warp * kRowsPerWarp; base < rows; base += kWarps * kRowsPerWarp) {
    const int row = base + warp_lane / kLanes;
    const bool wanted = row < rows && (p.valid == nullptr || p.valid[begin + row] != 0);
    Sums sums;
    if (wanted) {
      const T* node = static_cast<const T*>(p.nodes) + (begin + row) * p.node_stride;
      const T* query = static_cast<const T*>(p.queries) + query_of_row[row] * p.query_stride;
      sums = partial_sums<T, kLanes, kVector>(node, query, static_cast<int>(p.size), lane);
    }
    const float dot = sum_lanes<kLanes>(sums.dot);
    const float node_square = sum_lanes<kLanes>(sums.node);
    const float query_square = sum_lanes<kLanes>(sums.query);
    if (lane == 0 && row < rows) {
      const float similarity = dot / (norm_of(query_square, p.eps) * norm_of(node_square, p.eps));
      const uint64_t rank = wanted ? rank_of(similarity) : kInvalidRank;
      const uint64_t is_nan = similarity != similarity;
      keys[row] |= rank << kRankShift | static_cast<uint64_t>(row) << 1 | is_nan;
    }
  }
  __syncthreads();
  // the group is the first criterion, so each group's rows stay in the group's places
  sort_by_block<kTileThreads>(keys, p.tile);

  const int64_t results = (end_group - first_group) * p.k;
  for (int64_t i = threadIdx.x; i < results; i += kTileThreads) {
    const int64_t group = first_group + i / p.k, j = i % p.k;
    const Range range = group_rows(p, group);
    if (range.end > tile_end) continue;
    const int64_t place = clamp_index(range.begin - begin, 0, p.tile) + j;
    const bool inside = j < range.end - range.begin && place < rows;
    write_result(p, group * p.k + j, inside ? candidate_of(keys[place], begin) : kNothing);
  }

  // slot 0: the group that continues from the previous tile; slot 1: the group that begins here and continues
  for (int slot = 0; slot < 2; ++slot) {
    const int64_t group = slot ? end_group - 1 : first_group - 1;
    if (group < (slot ? first_group : 0)) continue;
    const Range range = group_rows(p, group);
    if (range.end <= (slot ? tile_end : begin)) continue;
    const int64_t place = slot ? clamp_index(range.begin - begin, 0, p.tile) : 0;
    const int64_t count = (range.end - begin < rows ? range.end - begin : rows) - place;
    for (int64_t j = threadIdx.x; j < p.partial; j += kTileThreads) {
      const uint64_t candidate = j < count ? candidate_of(keys[place + j], begin) : kNothing;
      p.workspace[(slot * p.partial + j) * p.tiles + blockIdx.x] = candidate;
    }
  }
}

// Merges the candidates of a group that is in more than one tile. Block b takes group b; or, where there are fewer
// borders between tiles than groups, the group whose first border is the one between tiles b and b + 1.
__global__ void __launch_bounds__(kMergeThreads, 1) topk_nodes_merge(const __grid_constant__ TopkNodesParams p) {
  __shared__ uint64_t keys[kMergeKeys];
  __shared__ int64_t shared_group;
  __shared__ int shared_count;
  const int lane = threadIdx.x % 32;
  const bool by_group = p.merges == p.num_groups;
  if (threadIdx.x < 32) {
    const int64_t border = (static_cast<int64_t>(blockIdx.x) + 1) * p.tile;
    const int64_t group = by_group ? blockIdx.x : lower_bound_by_warp(p.cu_groups, p.num_groups, border, lane) - 1;
    if (lane == 0) {
      shared_group = group;
      shared_count = 0;
    }
  }
  wait_for_previous_kernel();
  __syncthreads();
  const int64_t group = shared_group;
  if (group < 0) return;
  const Range range = group_rows(p, group);
  const int64_t first_tile = range.begin / p.tile;
  if (range.end <= (first_tile + 1) * p.tile || (!by_group && first_tile != blockIdx.x)) return;

  // Candidates in the order best of each tile, second best of each tile, ...: as soon as one of every tile in a row is
  // too bad, all that follow are. The first batch is small, as its only use is a limit for the others.
  const int64_t tiles = (range.end - 1) / p.tile - first_tile + 1, candidates = tiles * p.partial;
  uint64_t limit = kNothing;
  int64_t too_bad = 0;
  int count = 0, batch = p.k <= kFirstBatch / 2 ? kFirstBatch : kMergeThreads;
  for (int64_t base = 0; base < candidates && too_bad < tiles; base += batch, batch = kMergeThreads) {
    const int64_t i = base + threadIdx.x;
    uint64_t candidate = kNothing;
    if (static_cast<int>(threadIdx.x) < batch && i < candidates) {
      const int64_t j = i / tiles, tile = i % tiles, slot = tile == 0 ? 1 : 0;
      candidate = p.workspace[(slot * p.partial + j) * p.tiles + first_tile + tile];
    }
    const bool keep = candidate < limit;
    const unsigned kept = __ballot_sync(kFullWarp, keep);
    int place = 0;
    // the order in which warps get their places does not matter: the keys are different and get sorted
    if (lane == 0 && kept) place = atomicAdd(&shared_count, __popc(kept));
    place = __shfl_sync(kFullWarp, place, 0);
    if (keep) keys[place + __popc(kept & ((1u << lane) - 1))] = candidate;
    __syncthreads();
    const int total = shared_count;
    too_bad = total == count ? too_bad + batch : 0;
    count = total;
    // room for the next batch, and a limit as early as possible
    if (count + kMergeThreads > kMergeKeys || (limit == kNothing && count >= p.k)) {
      int sorted = 2;
      while (sorted < count) sorted *= 2;
      for (int at = count + threadIdx.x; at < sorted; at += kMergeThreads) keys[at] = kNothing;
      __syncthreads();
      sort_by_block<kMergeThreads>(keys, sorted);
      if (count >= p.k) {
        count = static_cast<int>(p.k);
        limit = keys[count - 1];
      }
      if (threadIdx.x == 0) shared_count = count;
    }
    __syncthreads();
  }

  int sorted = 2;
  while (sorted < count) sorted *= 2;
  for (int at = count + threadIdx.x; at < sorted; at += kMergeThreads) keys[at] = kNothing;
  __syncthreads();
  sort_by_block<kMergeThreads>(keys, sorted);
  for (int64_t j = threadIdx.x; j < p.k; j += kMergeThreads) {
    write_result(p, group * p.k + j, j < count ? keys[j] : kNothing);
  }
}

template <class T, int kLanes>
cudaError_t launch_tiles(const TopkNodesParams& p, const cudaLaunchConfig_t& config) {
  return p.vector ? cudaLaunchKernelEx(&config, topk_nodes_tile<T, kLanes, true>, p)
                  : cudaLaunchKernelEx(&config, topk_nodes_tile<T, kLanes, false>, p);
}

template <class T>
cudaError_t launch_tiles(const TopkNodesParams& p, const cudaLaunchConfig_t& config) {
  return p.lanes == 32 ? launch_tiles<T, 32>(p, config) : launch_tiles<T, 8>(p, config);
}

}  // namespace

cudaError_t plan_topk_nodes(TopkNodesParams* params) {
  TopkNodesParams& p = *params;
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;

  const int64_t element = p.type == FloatType::kFloat32 ? 4 : 2;
  const auto aligned = [&](const void* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element % 16 == 0;
  };
  p.vector = aligned(p.nodes, p.node_stride) && aligned(p.queries, p.query_stride);
  // eight threads read a short row in at most two vectors each; a whole warp would idle
  p.lanes = p.size * element <= 256 ? 8 : 32;
  // Eight blocks per SM before the tiles grow, more than are resident at a time: some sort while others read. At least
  // one row for every group of lanes.
  const int64_t wanted = p.num_nodes / (8 * std::max(multiprocessors, 1));
  p.tile = kTileThreads / p.lanes;
  while (p.tile < kMaxTile && 2 * p.tile <= wanted) p.tile *= 2;
  p.tiles = std::max<int64_t>((p.num_nodes + p.tile - 1) / p.tile, 1);
  p.partial = std::min<int64_t>(p.k, p.tile);
  p.workspace_size = p.tiles > 1 ? 2 * p.partial * p.tiles : 0;
  p.merges = std::min(p.num_groups, p.tiles - 1);
  return cudaSuccess;
}

cudaError_t launch_topk_nodes(const TopkNodesParams& p, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(p.tiles));
  config.blockDim = dim3(kTileThreads);
  config.stream = stream;
  const cudaError_t status = p.type == FloatType::kFloat32    ? launch_tiles<float>(p, config)
                             : p.type == FloatType::kBFloat16 ? launch_tiles<__nv_bfloat16>(p, config)
                                                              : launch_tiles<__half>(p, config);
  if (status != cudaSuccess || p.merges == 0) return status;
  return launch_after(topk_nodes_merge, p.merges, kMergeThreads, 0, true, stream, p);
}

}  // namespace sharedllm

// Node vectors' attention: the division into tiles, the merge of partial results, the kernel for any element type and
// head size, and the choice of the kernel.
#include <algorithm>

#include "kernels/node_vectors.cuh"

namespace sharedllm {
namespace node_vectors {
namespace {

constexpr int kDivideThreads = 1024;
constexpr int kLeavesPerThread = 4;

// Finds the leaves and counts their tiles. One block: a few thousand leaves are the usual case.
__global__ void __launch_bounds__(kDivideThreads) node_vectors_divide(const __grid_constant__ NodeVectorsParams p) {
  __shared__ int64_t warp_tiles[kDivideThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t leaves = num_leaves(p);
  // so long that no node of first_level is longer than the tables
  const int64_t longest =
      p.num_positions < (int64_t{1} << 30 >> p.first_level) ? p.num_positions << p.first_level : int64_t{1} << 30;
  Workspace w;
  divide_workspace(p, &w);
  int64_t before = 0;
  for (int64_t base = 0; base < leaves; base += kDivideThreads * kLeavesPerThread) {
    const int64_t first = base + threadIdx.x * kLeavesPerThread;
    int64_t tiles[kLeavesPerThread], through = 0;
#pragma unroll
    for (int i = 0; i < kLeavesPerThread; ++i) {
      const int64_t leaf = first + i;
      tiles[i] = 0;
      if (leaf >= leaves) continue;
      const int64_t root = leaf >> p.last_level;
      int64_t start = clamp(p.spans[2 * root], 0, p.num_tokens);
      int64_t length = clamp(p.spans[2 * root + 1], 0, min(p.num_tokens - start, longest)), shared_start = start;
      for (int level = 1; level <= p.last_level; ++level) {
        const int64_t left = length / 2;
        if (leaf >> (p.last_level - level) & 1) {
          start += left;
          length -= left;
        } else {
          length = left;
        }
        if (level == p.first_level) shared_start = start;
      }
      w.leaves[leaf] = {start, static_cast<int32_t>(length), static_cast<int32_t>(start - shared_start)};
      // an empty leaf gets a tile without keys, so that somebody writes its zeros
      tiles[i] = length > 0 ? (length + kTile - 1) / kTile : 1;
      through += tiles[i];
    }
    const int64_t own = through;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int64_t other = __shfl_up_sync(kFullWarp, through, offset);
      if (lane >= offset) through += other;
    }
    if (lane == 31) warp_tiles[warp] = through;
    __syncthreads();
    int64_t warps_before = 0, block_tiles = 0;
    for (int i = 0; i < kDivideThreads / 32; ++i) {
      if (i < warp) warps_before += warp_tiles[i];
      block_tiles += warp_tiles[i];
    }
    int64_t at = before + warps_before + through - own;
#pragma unroll
    for (int i = 0; i < kLeavesPerThread; ++i) {
      if (first + i < leaves) w.first_tile[first + i] = at;
      at += tiles[i];
    }
    before += block_tiles;
    __syncthreads();
  }
  if (threadIdx.x == 0) w.first_tile[leaves] = before;
}

constexpr int kMergeWarps = 8;

// A block merges, for one worker's unfinished node of one level, the heads that share one key/value head.
template <class T>
__global__ void __launch_bounds__(32 * kMergeWarps) node_vectors_merge(const __grid_constant__ NodeVectorsParams p) {
  __shared__ float warp_sums[kMergeWarps][kNodeVectorsMaxSize];
  __shared__ float warp_totals[kMergeWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, levels = num_levels(p);
  const int kv_head = static_cast<int>(blockIdx.x % p.kv_heads), group = p.q_heads / p.kv_heads;
  const int level = static_cast<int>(blockIdx.x / p.kv_heads % levels);
  const int64_t worker = blockIdx.x / p.kv_heads / levels;
  Workspace w;
  divide_workspace(p, &w);
  const Unfinished record = w.unfinished[worker * levels + level];
  if (record.node < 0) return;
  const int parts = static_cast<int>(record.last_worker - worker) + 1;
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const auto row_of = [&](int part) { return partial_row(p, worker + part, part == 0 ? 1 : 0, level, head); };
    float top = -INFINITY;
    for (int part = lane; part < parts; part += 32) top = fmaxf(top, w.stats[row_of(part)].x);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, offset));
    if (top == -INFINITY) top = 0.0f;
    float total = 0.0f, sums[kNodeVectorsMaxSize / 32] = {};
#pragma unroll 2
    for (int part = warp; part < parts; part += kMergeWarps) {
      const int64_t partial = row_of(part);
      const float2 stats = w.stats[partial];
      const float factor = exp2f(stats.x - top);
      total += stats.y * factor;
#pragma unroll
      for (int i = 0; i < kNodeVectorsMaxSize / 32; ++i) {
        const int d = lane + 32 * i;
        if (d < p.head_size) sums[i] += w.sums[partial * p.head_size + d] * factor;
      }
    }
    if (lane == 0) warp_totals[warp] = total;
#pragma unroll
    for (int i = 0; i < kNodeVectorsMaxSize / 32; ++i) warp_sums[warp][lane + 32 * i] = sums[i];
    __syncthreads();
    for (int d = threadIdx.x; d < p.head_size; d += 32 * kMergeWarps) {
      float weight = 0.0f, sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kMergeWarps; ++i) {
        weight += warp_totals[i];
        sum += warp_sums[i][d];
      }
      T* const to = static_cast<T*>(p.out) + (record.node * p.q_heads + head) * p.head_size + d;
      store(to, weight == 0.0f ? 0.0f : sum / weight);
    }
    __syncthreads();
  }
}

constexpr int kAnyWarps = 8;
constexpr int kAnyRows = 4;  // query rows of a warp: their sums and the keys in flight fill the registers
constexpr int kAnyKeys = 4;  // keys loaded at once, to hide the latency

// float32, and head sizes or alignments that the tensor cores' kernel does not take: a lane holds kPairs pairs of
// elements of every row, keys are rotated by their own position, scores are sums over the warp.
template <class T, int kPairs>
__global__ void __launch_bounds__(32 * kAnyWarps) node_vectors_any(const __grid_constant__ NodeVectorsParams p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Workspace w;
  divide_workspace(p, &w);
  const int64_t global_warp = static_cast<int64_t>(blockIdx.x) * kAnyWarps + warp;
  const int64_t worker = global_warp / p.units;
  const int unit = static_cast<int>(global_warp % p.units);
  if (worker >= p.workers) return;
  const Run run = run_of(p, w, worker);
  if (run.begin >= run.end) {
    if (unit == 0) record_unfinished(p, w, worker, run, 0, lane);
    return;
  }
  const int kv_head = unit % p.kv_heads, first_row = unit / p.kv_heads * kAnyRows;
  const int group = p.q_heads / p.kv_heads;
  const int rows = min(num_levels(p) * group - first_row, kAnyRows);
  const T* const k = static_cast<const T*>(p.k) + kv_head * p.k_stride[1];
  const T* const v = static_cast<const T*>(p.v) + kv_head * p.v_stride[1];

  int low[kPairs], high[kPairs];
  bool has_low[kPairs], has_high[kPairs], rotated[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    pair_offsets(lane + 32 * i, p.rotary_half, 1, &low[i], &high[i]);
    has_low[i] = low[i] < p.head_size;
    has_high[i] = high[i] < p.head_size;
    rotated[i] = lane + 32 * i < p.rotary_half;
  }
  const auto load = [&](const T* from, float (&x)[kPairs][2]) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      x[i][0] = has_low[i] ? to_float(from[low[i]]) : 0.0f;
      x[i][1] = has_high[i] ? to_float(from[high[i]]) : 0.0f;
    }
  };
  const auto rotate = [&](float (&x)[kPairs][2], int64_t position) {
    const int64_t at = clamp(position, 0, p.num_positions - 1) * p.rotary_half + lane;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (!rotated[i]) continue;
      const float c = __ldg(p.cos + at + 32 * i), s = __ldg(p.sin + at + 32 * i);
      const float a = x[i][0], b = x[i][1];
      x[i][0] = a * c - b * s;
      x[i][1] = b * c + a * s;
    }
  };

  float query[kAnyRows][kPairs][2], sums[kAnyRows][kPairs][2], top[kAnyRows], total[kAnyRows];
#pragma unroll
  for (int r = 0; r < kAnyRows; ++r) {
    top[r] = -INFINITY;
    total[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      query[r][i][0] = query[r][i][1] = sums[r][i][0] = sums[r][i][1] = 0.0f;
    }
  }

  Cursor at;
  at.seek(p, w, run.begin, lane);
  for (int64_t tile = run.begin; tile < run.end; ++tile) {
    if (tile == run.begin || at.done == 0) {
      for (int r = 0; r < kAnyRows; ++r) {
        if (r >= rows) break;
        const int level = (first_row + r) / group, head = kv_head * group + (first_row + r) % group;
        const int64_t leaf = node_of(p, at.leaf, level).last_leaf;
        const Leaf last = w.leaves[leaf];
        float x[kPairs][2];
        load(static_cast<const T*>(p.q) + leaf * p.q_stride[0] + head * p.q_stride[1], x);
        rotate(x, int64_t{last.position} + last.length - 1);
        // a register array is indexed by constants only
#pragma unroll
        for (int s = 0; s < kAnyRows; ++s) {
#pragma unroll
          for (int i = 0; i < kPairs; ++i) {
            if (s == r) {
              query[s][i][0] = x[i][0] * (p.scale * kLog2e);
              query[s][i][1] = x[i][1] * (p.scale * kLog2e);
            }
          }
        }
      }
    }
    const int count = at.count();
    const T* from_k = k + (at.start + at.done) * p.k_stride[0];
    const T* from_v = v + (at.start + at.done) * p.v_stride[0];
    for (int first = 0; first < count; first += kAnyKeys) {
      float keys[kAnyKeys][kPairs][2], values[kAnyKeys][kPairs][2];
#pragma unroll
      for (int j = 0; j < kAnyKeys; ++j) {
        // behind the end: the last key once more, without weight
        const int token = min(first + j, count - 1);
        load(from_k + token * p.k_stride[0], keys[j]);
        load(from_v + token * p.v_stride[0], values[j]);
      }
#pragma unroll
      for (int j = 0; j < kAnyKeys; ++j) {
        rotate(keys[j], int64_t{at.position} + at.done + min(first + j, count - 1));
      }
#pragma unroll
      for (int r = 0; r < kAnyRows; ++r) {
        if (r >= rows) break;
        float x[kAnyKeys], best = -INFINITY;
#pragma unroll
        for (int j = 0; j < kAnyKeys; ++j) {
          x[j] = 0.0f;
#pragma unroll
          for (int i = 0; i < kPairs; ++i) {
            x[j] = fmaf(keys[j][i][0], query[r][i][0], fmaf(keys[j][i][1], query[r][i][1], x[j]));
          }
          x[j] = sum_lanes<32>(x[j]);
          if (first + j >= count) x[j] = -INFINITY;
          best = fmaxf(best, x[j]);
        }
        best = fmaxf(best, top[r]);
        const float reference = best == -INFINITY ? 0.0f : best, factor = exp2f(top[r] - reference);
        top[r] = best;
        total[r] *= factor;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          sums[r][i][0] *= factor;
          sums[r][i][1] *= factor;
        }
#pragma unroll
        for (int j = 0; j < kAnyKeys; ++j) {
          const float weight = exp2f(x[j] - reference);
          total[r] += weight;
#pragma unroll
          for (int i = 0; i < kPairs; ++i) {
            sums[r][i][0] = fmaf(weight, values[j][i][0], sums[r][i][0]);
            sums[r][i][1] = fmaf(weight, values[j][i][1], sums[r][i][1]);
          }
        }
      }
    }
    const bool leaf_ends = at.ends_leaf(), run_ends = tile + 1 == run.end;
    if (leaf_ends || run_ends) {
#pragma unroll
      for (int r = 0; r < kAnyRows; ++r) {
        if (r >= rows) break;
        const int level = (first_row + r) / group, head = kv_head * group + (first_row + r) % group;
        const Node node = node_of(p, at.leaf, level);
        const bool ends = leaf_ends && node.last;
        if (!ends && !run_ends) continue;
        const bool begins_here = w.first_tile[node.first_leaf] >= run.begin;
        if (ends && begins_here) {
          T* const to = static_cast<T*>(p.out) + (node.row * p.q_heads + head) * p.head_size;
          const float inverse = total[r] == 0.0f ? 0.0f : 1.0f / total[r];
#pragma unroll
          for (int i = 0; i < kPairs; ++i) {
            if (has_low[i]) store(to + low[i], sums[r][i][0] * inverse);
            if (has_high[i]) store(to + high[i], sums[r][i][1] * inverse);
          }
        } else {
          const int64_t partial = partial_row(p, worker, begins_here ? 1 : 0, level, head);
          if (lane == 0) w.stats[partial] = make_float2(top[r], total[r]);
          float* const to = w.sums + partial * p.head_size;
#pragma unroll
          for (int i = 0; i < kPairs; ++i) {
            if (has_low[i]) to[low[i]] = sums[r][i][0];
            if (has_high[i]) to[high[i]] = sums[r][i][1];
          }
        }
        if (ends) {
          top[r] = -INFINITY;
          total[r] = 0.0f;
#pragma unroll
          for (int i = 0; i < kPairs; ++i) sums[r][i][0] = sums[r][i][1] = 0.0f;
        }
      }
    }
    if (run_ends && unit == 0) record_unfinished(p, w, worker, run, at.leaf, lane);
    at.advance(p, w);
  }
}

template <class T>
cudaError_t launch_any(const NodeVectorsParams& p, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((p.workers * p.units + kAnyWarps - 1) / kAnyWarps));
  config.blockDim = dim3(32 * kAnyWarps);
  config.stream = stream;
  if (p.head_size <= 64) return cudaLaunchKernelEx(&config, node_vectors_any<T, 1>, p);
  if (p.head_size <= 128) return cudaLaunchKernelEx(&config, node_vectors_any<T, 2>, p);
  return cudaLaunchKernelEx(&config, node_vectors_any<T, 4>, p);
}

template <class T>
cudaError_t choose_tensor(const NodeVectorsParams& p, cudaStream_t stream) {
  switch (p.head_size * 4 + p.tensor_tiles) {
    case 64 * 4 + 1:
      return launch_tensor<T, 64, 1>(p, stream);
    case 64 * 4 + 2:
      return launch_tensor<T, 64, 2>(p, stream);
    case 96 * 4 + 1:
      return launch_tensor<T, 96, 1>(p, stream);
    case 96 * 4 + 2:
      return launch_tensor<T, 96, 2>(p, stream);
    case 128 * 4 + 1:
      return launch_tensor<T, 128, 1>(p, stream);
    case 128 * 4 + 2:
      return launch_tensor<T, 128, 2>(p, stream);
    case 256 * 4 + 1:
      return launch_tensor<T, 256, 1>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <class T>
cudaError_t launch_merge(const NodeVectorsParams& p, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((p.workers - 1) * num_levels(p) * p.kv_heads));
  config.blockDim = dim3(32 * kMergeWarps);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, node_vectors_merge<T>, p);
}

bool tensor_cores_fit(const NodeVectorsParams& p) {
  if (p.type == FloatType::kFloat32 || p.rotary_half % 4 != 0) return false;
  if (p.head_size != 64 && p.head_size != 96 && p.head_size != 128 && p.head_size != 256) return false;
  const auto aligned = [](const void* data, int64_t bytes0, int64_t bytes1) {
    return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(bytes0) | static_cast<uintptr_t>(bytes1)) % 16 ==
           0;
  };
  return aligned(p.q, p.q_stride[0] * 2, p.q_stride[1] * 2) && aligned(p.k, p.k_stride[0] * 2, p.k_stride[1] * 2) &&
         aligned(p.v, p.v_stride[0] * 2, p.v_stride[1] * 2) && aligned(p.cos, 0, 0) && aligned(p.sin, 0, 0);
}

}  // namespace
}  // namespace node_vectors

cudaError_t plan_node_vectors(NodeVectorsParams* params) {
  NodeVectorsParams& p = *params;
  int device = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const int rows = node_vectors::num_levels(p) * (p.q_heads / p.kv_heads);
  int64_t warps = 0;
  if (node_vectors::tensor_cores_fit(p)) {
    // heads of 256 fill the registers with eight columns
    p.tensor_tiles = rows > 8 && p.head_size <= 128 ? 2 : 1;
    p.units = p.kv_heads * ((rows + 8 * p.tensor_tiles - 1) / (8 * p.tensor_tiles));
    warps = int64_t{multiprocessors} * (p.head_size > 128 ? 4 : 8);
  } else {
    p.tensor_tiles = 0;
    p.units = p.kv_heads * ((rows + node_vectors::kAnyRows - 1) / node_vectors::kAnyRows);
    // two blocks of eight warps run at a time at least
    warps = int64_t{multiprocessors} * 16;
  }
  p.workers = std::max<int64_t>(warps / p.units, 1);
  node_vectors::Workspace w;
  p.workspace = nullptr;
  p.workspace_size = node_vectors::divide_workspace(p, &w);
  return cudaSuccess;
}

cudaError_t launch_node_vectors(const NodeVectorsParams& p, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(node_vectors::kDivideThreads);
  config.stream = stream;
  cudaError_t status = cudaLaunchKernelEx(&config, node_vectors::node_vectors_divide, p);
  if (status != cudaSuccess) return status;
  const bool bfloat16 = p.type == FloatType::kBFloat16;
  if (p.tensor_tiles > 0) {
    status = bfloat16 ? node_vectors::choose_tensor<__nv_bfloat16>(p, stream)
                      : node_vectors::choose_tensor<__half>(p, stream);
  } else {
    status = p.type == FloatType::kFloat32 ? node_vectors::launch_any<float>(p, stream)
             : bfloat16                    ? node_vectors::launch_any<__nv_bfloat16>(p, stream)
                                           : node_vectors::launch_any<__half>(p, stream);
  }
  if (status != cudaSuccess || p.workers == 1) return status;
  return p.type == FloatType::kFloat32 ? node_vectors::launch_merge<float>(p, stream)
         : bfloat16                    ? node_vectors::launch_merge<__nv_bfloat16>(p, stream)
                                       : node_vectors::launch_merge<__half>(p, stream);
}

}  // namespace sharedllm

// Node vectors' attention: the division into tiles, the merge of partial results (split-KV), the kernel for any element
// type and head size, and the choice of the kernel.
#include <algorithm>

#include "kernels/node_vectors.cuh"

namespace sharedllm {
namespace node_vectors {

// kernel instances: cmake/SharedLLMInstances.cmake
#define SHAREDLLM_INSTANCES(T)                                                                  \
  extern template cudaError_t launch_tensor<T, 64, 1>(const NodeVectorsParams&, cudaStream_t);  \
  extern template cudaError_t launch_tensor<T, 64, 2>(const NodeVectorsParams&, cudaStream_t);  \
  extern template cudaError_t launch_tensor<T, 96, 1>(const NodeVectorsParams&, cudaStream_t);  \
  extern template cudaError_t launch_tensor<T, 96, 2>(const NodeVectorsParams&, cudaStream_t);  \
  extern template cudaError_t launch_tensor<T, 128, 1>(const NodeVectorsParams&, cudaStream_t); \
  extern template cudaError_t launch_tensor<T, 128, 2>(const NodeVectorsParams&, cudaStream_t); \
  extern template cudaError_t launch_tensor<T, 256, 1>(const NodeVectorsParams&, cudaStream_t);
SHAREDLLM_INSTANCES(__nv_bfloat16)
SHAREDLLM_INSTANCES(__half)
#undef SHAREDLLM_INSTANCES

namespace {

constexpr int kDivideThreads = 1024;
constexpr int kLeavesPerThread = 4;

// Finds the leaves and counts their tiles. One block: a few thousand leaves are the usual case.
__global__ void __launch_bounds__(kDivideThreads) node_vectors_divide(const __grid_constant__ NodeVectorsParams p) {
  __shared__ int64_t warp_tiles[kDivideThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t leaves = num_leaves(p);
  // the next kernel fills its tables meanwhile
  let_next_kernel_start();
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
      int64_t start = clamp_index(p.spans[2 * root], 0, p.num_tokens);
      int64_t length = clamp_index(p.spans[2 * root + 1], 0, min(p.num_tokens - start, longest)), shared_start = start;
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
      // an empty leaf gets a tile without keys, so that its zeros are written
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

// kWidth neighbouring elements.
template <int kWidth>
struct Elements {
  float x[kWidth];
};
template <>
struct __align__(16) Elements<4> {
  float x[4];
};

// A block merges, for one worker's unfinished node of one level, the heads that share one key/value head, several at a
// time. Most blocks have little or nothing to do, so they are small: many are resident at once. A lane holds kCount
// times kWidth elements of a row.
template <class T, int kWidth, int kCount>
__global__ void __launch_bounds__(32 * kMergeWarps, kCount* kWidth > 4 ? 2 : 6)
    node_vectors_merge(const __grid_constant__ NodeVectorsParams p) {
  using Vector = Elements<kWidth>;
  constexpr int kTogether = kCount * kWidth > 4 ? 2 : 4;  // parts whose loads are in flight at a time
  __shared__ float warp_sums[kMergeWarps][kNodeVectorsMaxSize];
  __shared__ float warp_totals[kMergeWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, levels = num_levels(p);
  const int kv_head = static_cast<int>(blockIdx.x % p.kv_heads), group = p.q_heads / p.kv_heads;
  const int level = static_cast<int>(blockIdx.x / p.kv_heads % levels);
  const int64_t worker = blockIdx.x / p.kv_heads / levels;
  Workspace w;
  divide_workspace(p, &w);
  wait_for_previous_kernel();
  const Unfinished record = w.unfinished[worker * levels + level];
  if (record.node < 0) return;
  const int parts = static_cast<int>(record.last_worker - worker) + 1;
  const int together = min(group, kMergeWarps), share = kMergeWarps / together;  // heads at a time, warps to a head
  for (int first = 0; first < group; first += together) {
    const int own = warp / share, head = kv_head * group + first + own;
    const bool wanted = own < together && first + own < group;
    float top = -INFINITY, total = 0.0f, sums[kCount][kWidth] = {};
    if (wanted) {
      // part 0 is what the worker left, the others are what the next workers began with
      const int64_t row = partial_row(p, worker, 0, level, head), step = partial_row(p, 1, 0, 0, 0);
      const int64_t first_row = partial_row(p, worker, 1, level, head);
      const auto row_of = [&](int part) { return part == 0 ? first_row : row + part * step; };
      for (int part = lane; part < parts; part += 32) top = fmaxf(top, w.stats[row_of(part)].x);
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, offset));
      if (top == -INFINITY) top = 0.0f;
      for (int part = warp % share; part < parts; part += kTogether * share) {
        float2 stats[kTogether];
        Vector x[kTogether][kCount];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const int64_t from = row_of(min(part + j * share, parts - 1));
          stats[j] = w.stats[from];
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            const int d = (lane + 32 * i) * kWidth;
            x[j][i] = d < p.head_size ? *reinterpret_cast<const Vector*>(w.sums + from * p.head_size + d) : Vector{};
          }
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const float factor = part + j * share < parts ? exp2f(stats[j].x - top) : 0.0f;
          total += stats[j].y * factor;
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
#pragma unroll
            for (int e = 0; e < kWidth; ++e) sums[i][e] = fmaf(x[j][i].x[e], factor, sums[i][e]);
          }
        }
      }
    }
    if (lane == 0) warp_totals[warp] = total;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const int d = (lane + 32 * i) * kWidth + e;
        if (d < p.head_size) warp_sums[warp][d] = sums[i][e];
      }
    }
    __syncthreads();
    const int heads = min(together, group - first);
    for (int i = warp; i < heads; i += kMergeWarps) {
      float weight = 0.0f;
      for (int j = i * share; j < (i + 1) * share; ++j) weight += warp_totals[j];
      const float inverse = weight == 0.0f ? 0.0f : 1.0f / weight;
      const int64_t row = record.node * p.q_heads + kv_head * group + first + i;
      for (int d = lane; d < p.head_size; d += 32) {
        float sum = 0.0f;
        for (int j = i * share; j < (i + 1) * share; ++j) sum += warp_sums[j][d];
        store(static_cast<T*>(p.out) + row * p.head_size + d, sum * inverse);
      }
    }
    __syncthreads();
  }
}

constexpr int kAnyWarps = 8;
constexpr int kAnyRows = 4;    // query rows of a warp: these, their sums and the keys in flight fill the registers
constexpr int kAnyPairs = 4;   // pairs of elements of a row that a lane holds
constexpr int kAnyKeys = 2;    // keys that a lane loads at once, to hide the latency
constexpr int kAnyBlocks = 1;  // resident blocks on an SM

// For float32, and for head sizes or alignments that the tensor-core kernel does not take. kLanes lanes share a key, so
// a warp takes 32 / kLanes keys at a time, each group of lanes with an online softmax of its own; keys are rotated by
// their position in each row's own node.
template <class T, int kLanes>
__global__ void __launch_bounds__(32 * kAnyWarps, kAnyBlocks)
    node_vectors_any(const __grid_constant__ NodeVectorsParams p) {
  constexpr int kGroups = 32 / kLanes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % kLanes, key_group = threadIdx.x % 32 / kLanes;
  Workspace w;
  divide_workspace(p, &w);
  wait_for_previous_kernel();
  const int64_t global_warp = static_cast<int64_t>(blockIdx.x) * kAnyWarps + warp;
  const int64_t worker = global_warp / p.units;
  const int unit = static_cast<int>(global_warp % p.units);
  if (worker >= p.workers) return;
  const Run run = run_of(p, w, worker);
  if (run.begin >= run.end) {
    if (unit == 0) record_unfinished(p, w, worker, run, 0, threadIdx.x % 32);
    return;
  }
  const int kv_head = unit % p.kv_heads, first_row = unit / p.kv_heads * kAnyRows;
  const int group = p.q_heads / p.kv_heads;
  const int rows = min(num_levels(p) * group - first_row, kAnyRows);
  const T* const k = static_cast<const T*>(p.k) + kv_head * p.k_stride[1];
  const T* const v = static_cast<const T*>(p.v) + kv_head * p.v_stride[1];

  int low[kAnyPairs], high[kAnyPairs];
#pragma unroll
  for (int i = 0; i < kAnyPairs; ++i) pair_offsets(lane + kLanes * i, p.rotary_half, 1, &low[i], &high[i]);
  const auto load = [&](const T* from, float (&x)[kAnyPairs][2]) {
#pragma unroll
    for (int i = 0; i < kAnyPairs; ++i) {
      x[i][0] = low[i] < p.head_size ? to_float(from[low[i]]) : 0.0f;
      x[i][1] = high[i] < p.head_size ? to_float(from[high[i]]) : 0.0f;
    }
  };
  const auto rotate = [&](float (&x)[kAnyPairs][2], int32_t position) {
    const int64_t at = clamp_index(position, 0, p.num_positions - 1) * p.rotary_half + lane;
#pragma unroll
    for (int i = 0; i < kAnyPairs; ++i) {
      if (lane + kLanes * i >= p.rotary_half) continue;
      const float c = __ldg(p.cos + at + kLanes * i), s = __ldg(p.sin + at + kLanes * i);
      const float a = x[i][0], b = x[i][1];
      x[i][0] = a * c - b * s;
      x[i][1] = b * c + a * s;
    }
  };

  float query[kAnyRows][kAnyPairs][2], sums[kAnyRows][kAnyPairs][2], top[kAnyRows], total[kAnyRows];
#pragma unroll
  for (int r = 0; r < kAnyRows; ++r) {
    top[r] = -INFINITY;
    total[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < kAnyPairs; ++i) query[r][i][0] = query[r][i][1] = sums[r][i][0] = sums[r][i][1] = 0.0f;
  }

  Cursor at;
  at.seek(p, w, run.begin, threadIdx.x % 32);
  int32_t node_position[kAnyRows] = {};  // where the row's node begins
  for (int64_t tile = run.begin; tile < run.end; ++tile) {
    if (tile == run.begin || at.done == 0) {
#pragma unroll
      for (int r = 0; r < kAnyRows; ++r) {
        if (r >= rows) break;
        const int level = (first_row + r) / group, head = kv_head * group + (first_row + r) % group;
        const Node node = node_of(p, at.leaf, level);
        const Leaf last = w.leaves[node.last_leaf];
        node_position[r] = w.leaves[node.first_leaf].position;
        load(static_cast<const T*>(p.q) + node.last_leaf * p.q_stride[0] + head * p.q_stride[1], query[r]);
        rotate(query[r], last.position + last.length - 1 - node_position[r]);
#pragma unroll
        for (int i = 0; i < kAnyPairs; ++i) {
          query[r][i][0] *= p.scale * kLog2E;
          query[r][i][1] *= p.scale * kLog2E;
        }
      }
    }
    const int count = at.count();
    const T* from_k = k + (at.start + at.done) * p.k_stride[0];
    const T* from_v = v + (at.start + at.done) * p.v_stride[0];
#pragma unroll 1
    for (int first = 0; first < count; first += kAnyKeys * kGroups) {
      float raw[kAnyKeys][kAnyPairs][2], keys[kAnyKeys][kAnyPairs][2], values[kAnyKeys][kAnyPairs][2];
      int token[kAnyKeys];
#pragma unroll
      for (int j = 0; j < kAnyKeys; ++j) {
        // past the end: the last key once more, without weight
        token[j] = min(first + j * kGroups + key_group, count - 1);
        load(from_k + token[j] * p.k_stride[0], raw[j]);
        load(from_v + token[j] * p.v_stride[0], values[j]);
      }
#pragma unroll
      for (int r = 0; r < kAnyRows; ++r) {
        if (r >= rows) break;
        // rows of one node share the rotated keys
        if (r == 0 || node_position[r] != node_position[r - 1]) {
#pragma unroll
          for (int j = 0; j < kAnyKeys; ++j) {
#pragma unroll
            for (int i = 0; i < kAnyPairs; ++i) {
              keys[j][i][0] = raw[j][i][0];
              keys[j][i][1] = raw[j][i][1];
            }
            rotate(keys[j], at.position + at.done + token[j] - node_position[r]);
          }
        }
        float x[kAnyKeys], best = top[r];
#pragma unroll
        for (int j = 0; j < kAnyKeys; ++j) {
          x[j] = 0.0f;
#pragma unroll
          for (int i = 0; i < kAnyPairs; ++i) {
            x[j] = fmaf(keys[j][i][0], query[r][i][0], fmaf(keys[j][i][1], query[r][i][1], x[j]));
          }
          x[j] = sum_lanes<kLanes>(x[j]);
          if (first + j * kGroups + key_group >= count) x[j] = -INFINITY;
          best = fmaxf(best, x[j]);
        }
        const float reference = best == -INFINITY ? 0.0f : best, factor = exp2f(top[r] - reference);
        top[r] = best;
        total[r] *= factor;
#pragma unroll
        for (int i = 0; i < kAnyPairs; ++i) {
          sums[r][i][0] *= factor;
          sums[r][i][1] *= factor;
        }
#pragma unroll
        for (int j = 0; j < kAnyKeys; ++j) {
          const float weight = exp2f(x[j] - reference);
          total[r] += weight;
#pragma unroll
          for (int i = 0; i < kAnyPairs; ++i) {
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
        // the groups' softmaxes are merged, the same in each of them
#pragma unroll
        for (int offset = kLanes; offset < 32; offset *= 2) {
          const float other = __shfl_xor_sync(kFullWarp, top[r], offset);
          const float best = fmaxf(top[r], other), reference = best == -INFINITY ? 0.0f : best;
          const float own_factor = exp2f(top[r] - reference), other_factor = exp2f(other - reference);
          const auto merge = [&](float x) {
            return x * own_factor + __shfl_xor_sync(kFullWarp, x, offset) * other_factor;
          };
          top[r] = best;
          total[r] = merge(total[r]);
#pragma unroll
          for (int i = 0; i < kAnyPairs; ++i) {
            sums[r][i][0] = merge(sums[r][i][0]);
            sums[r][i][1] = merge(sums[r][i][1]);
          }
        }
        const bool begins_here = w.first_tile[node.first_leaf] >= run.begin;
        if (key_group > 0) {
          // written by the first group
        } else if (ends && begins_here) {
          T* const to = static_cast<T*>(p.out) + (node.row * p.q_heads + head) * p.head_size;
          const float inverse = total[r] == 0.0f ? 0.0f : 1.0f / total[r];
#pragma unroll
          for (int i = 0; i < kAnyPairs; ++i) {
            if (low[i] < p.head_size) store(to + low[i], sums[r][i][0] * inverse);
            if (high[i] < p.head_size) store(to + high[i], sums[r][i][1] * inverse);
          }
        } else {
          const int64_t partial = partial_row(p, worker, begins_here ? 1 : 0, level, head);
          if (lane == 0) w.stats[partial] = make_float2(top[r], total[r]);
          float* const to = w.sums + partial * p.head_size;
#pragma unroll
          for (int i = 0; i < kAnyPairs; ++i) {
            if (low[i] < p.head_size) to[low[i]] = sums[r][i][0];
            if (high[i] < p.head_size) to[high[i]] = sums[r][i][1];
          }
        }
        if (ends) {
          top[r] = -INFINITY;
          total[r] = 0.0f;
#pragma unroll
          for (int i = 0; i < kAnyPairs; ++i) sums[r][i][0] = sums[r][i][1] = 0.0f;
        }
      }
    }
    if (run_ends && unit == 0) record_unfinished(p, w, worker, run, at.leaf, threadIdx.x % 32);
    at.advance(p, w);
  }
}

template <class T>
cudaError_t launch_any(const NodeVectorsParams& p, cudaStream_t stream) {
  const auto kernel = p.head_size <= 64    ? node_vectors_any<T, 8>
                      : p.head_size <= 128 ? node_vectors_any<T, 16>
                                           : node_vectors_any<T, 32>;
  const int64_t blocks = (p.workers * p.units + kAnyWarps - 1) / kAnyWarps;
  return launch_after(kernel, blocks, 32 * kAnyWarps, 0, true, stream, p);
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
  const auto kernel = p.head_size % 4 != 0 ? node_vectors_merge<T, 1, kNodeVectorsMaxSize / 32>
                      : p.head_size <= 128 ? node_vectors_merge<T, 4, 1>
                                           : node_vectors_merge<T, 4, 2>;
  const int64_t blocks = (p.workers - 1) * num_levels(p) * p.kv_heads;
  return launch_after(kernel, blocks, 32 * kMergeWarps, 0, true, stream, p);
}

// Bytes of shared memory, 0 for a head size that the tensor-core kernel does not take.
int tensor_shared_bytes(int head_size, int warps, int stages) {
  switch (head_size) {
    case 64:
      return Tiling<64>::shared_bytes(warps, stages);
    case 96:
      return Tiling<96>::shared_bytes(warps, stages);
    case 128:
      return Tiling<128>::shared_bytes(warps, stages);
    case 256:
      return Tiling<256>::shared_bytes(warps, stages);
    default:
      return 0;
  }
}

bool tensor_cores_fit(const NodeVectorsParams& p) {
  if (p.type == FloatType::kFloat32 || p.rotary_half % 4 != 0) return false;
  if (tensor_shared_bytes(p.head_size, 1, 2) == 0) return false;
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
  using namespace node_vectors;
  NodeVectorsParams& p = *params;
  int device = 0, multiprocessors = 0, shared_bytes = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(&multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (status != cudaSuccess) return status;

  const int rows = num_levels(p) * (p.q_heads / p.kv_heads);
  p.tensor_tiles = 0;
  if (tensor_cores_fit(p)) {
    // heads of 256 fill the registers with eight columns
    const int columns = rows > 8 && p.head_size <= 128 ? 2 : 1;
    // As many warps as fit, then as many stages: loads in flight hide the memory latency. With sixteen columns two
    // stages are faster (797 against 839 us for 28/4 heads and 1024 chunks): the L1 cache keeps more of what spills.
    const int most_stages = columns == 2 ? 2 : 3;
    for (p.warps = p.head_size > 128 ? 4 : 8; p.warps >= 2; p.warps /= 2) {
      for (p.stages = most_stages; p.stages >= 2; --p.stages) {
        if (tensor_shared_bytes(p.head_size, p.warps, p.stages) <= shared_bytes) p.tensor_tiles = columns;
        if (p.tensor_tiles > 0) break;
      }
      if (p.tensor_tiles > 0) break;
    }
  }
  int64_t warps = 0;
  if (p.tensor_tiles > 0) {
    p.units = p.kv_heads * ((rows + 8 * p.tensor_tiles - 1) / (8 * p.tensor_tiles));
    warps = int64_t{multiprocessors} * p.warps;
  } else {
    p.units = p.kv_heads * ((rows + kAnyRows - 1) / kAnyRows);
    warps = int64_t{multiprocessors} * kAnyWarps * kAnyBlocks;
  }
  p.workers = std::max<int64_t>(warps / p.units, 1);
  Workspace w;
  p.workspace = nullptr;
  p.workspace_size = divide_workspace(p, &w);
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

// Node vectors' attention: how the tokens are divided among warps (stream-K), and the tensor-core kernel.
// Leaves are cut into tiles of 16 keys. All tiles of all leaves, in order, are divided into equal runs, one for each
// worker, so that ragged nodes cost what they hold and the host needs no lengths. A worker is some warps (units), one
// for each key/value head and group of query rows. A node inside one run is finished there. Of the others each worker
// leaves a partial result in the workspace, at most two for each level, and a second kernel merges them in order.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common/mma.cuh"
#include "kernels/common/overlap.cuh"
#include "kernels/common/scalar.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/common/vector_load.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/node_vectors.h"

namespace sharedllm {
namespace node_vectors {

constexpr int kTile = 16;
// Windows of keys after which the queries are rotated from the tables again: until then rounding accumulates.
constexpr int kMaxWindows = 16;

struct Leaf {
  int64_t start;
  int32_t length;
  int32_t position;  // of its first token in the node of first_level
};

// A node that continues in the next worker's run.
struct Unfinished {
  int64_t node;  // row of out, -1 for none
  int64_t last_worker;
};

struct Workspace {
  int64_t* first_tile;     // [leaves + 1]
  Leaf* leaves;            // [leaves]
  Unfinished* unfinished;  // [workers, levels]
  // what a worker began in the middle of (0) and what it leaves unfinished (1)
  float2* stats;  // [workers, 2, levels, Hq]: maximum of the scores, to base 2, and sum of the weights
  float* sums;    // [workers, 2, levels, Hq, D]: weighted values
};

__host__ __device__ inline int64_t align16(int64_t bytes) { return (bytes + 15) / 16 * 16; }

__host__ __device__ inline int64_t num_leaves(const NodeVectorsParams& p) { return p.num_roots << p.last_level; }
__host__ __device__ inline int num_levels(const NodeVectorsParams& p) { return p.last_level - p.first_level + 1; }

// Returns the bytes needed.
__host__ __device__ inline int64_t divide_workspace(const NodeVectorsParams& p, Workspace* w) {
  char* const base = static_cast<char*>(p.workspace);
  const int64_t leaves = num_leaves(p), levels = num_levels(p), rows = p.workers * 2 * levels * p.q_heads;
  int64_t at = 0;
  w->first_tile = reinterpret_cast<int64_t*>(base + at);
  at += align16(sizeof(int64_t) * (leaves + 1));
  w->leaves = reinterpret_cast<Leaf*>(base + at);
  at += align16(sizeof(Leaf) * leaves);
  w->unfinished = reinterpret_cast<Unfinished*>(base + at);
  at += align16(sizeof(Unfinished) * p.workers * levels);
  w->stats = reinterpret_cast<float2*>(base + at);
  at += align16(sizeof(float2) * rows);
  w->sums = reinterpret_cast<float*>(base + at);
  return at + align16(sizeof(float) * rows * p.head_size);
}

#ifdef __CUDACC__

// A worker's run of tiles.
struct Run {
  int64_t begin, end, tiles_per_worker;
};

__device__ __forceinline__ Run run_of(const NodeVectorsParams& p, const Workspace& w, int64_t worker) {
  const int64_t total = w.first_tile[num_leaves(p)], share = (total + p.workers - 1) / p.workers;
  const int64_t begin = worker * share;
  return {begin < total ? begin : total, begin + share < total ? begin + share : total, share};
}

// The tile at which a warp is.
struct Cursor {
  int64_t leaf;
  int64_t start;     // first token of the leaf
  int32_t length;    // of the leaf
  int32_t position;  // of the leaf's first token
  int32_t done;      // tokens of the leaf before this tile
  Leaf next;         // loaded ahead, to hide the latency

  __device__ __forceinline__ void enter(const NodeVectorsParams& p, const Workspace& w, const Leaf& found) {
    start = found.start;
    length = found.length;
    position = found.position;
    // the last worker's cursor ends past the last leaf, where nothing was written
    next = w.leaves[min(leaf + 1, num_leaves(p) - 1)];
  }
  // Every lane of the warp takes part.
  __device__ __forceinline__ void seek(const NodeVectorsParams& p, const Workspace& w, int64_t tile, int lane) {
    leaf = lower_bound_by_warp(w.first_tile, num_leaves(p), tile + 1, lane) - 1;
    enter(p, w, w.leaves[leaf]);
    done = static_cast<int32_t>(tile - w.first_tile[leaf]) * kTile;
  }
  __device__ __forceinline__ int count() const { return length - done < kTile ? length - done : kTile; }
  __device__ __forceinline__ bool ends_leaf() const { return length - done <= kTile; }
  __device__ __forceinline__ void advance(const NodeVectorsParams& p, const Workspace& w) {
    done += kTile;
    if (done < length) return;
    done = 0;
    ++leaf;
    enter(p, w, next);
  }
};

// The node of one level that holds a leaf.
struct Node {
  int64_t first_leaf, last_leaf;
  int64_t row;  // of out
  bool last;    // whether the leaf is its last
};

__device__ __forceinline__ Node node_of(const NodeVectorsParams& p, int64_t leaf, int level_index) {
  const int level = p.first_level + level_index, below = p.last_level - level;
  const int64_t index = leaf >> below, root = leaf >> p.last_level;
  const int64_t rows = (int64_t{2} << p.last_level) - (int64_t{1} << p.first_level);
  Node node;
  node.first_leaf = index << below;
  node.last_leaf = node.first_leaf + (int64_t{1} << below) - 1;
  // level by level inside the root
  node.row = root * rows + (index - (root << level)) + (int64_t{1} << level) - (int64_t{1} << p.first_level);
  node.last = leaf == node.last_leaf;
  return node;
}

__device__ __forceinline__ int64_t partial_row(const NodeVectorsParams& p, int64_t worker, int kind, int level_index,
                                               int head) {
  return ((worker * 2 + kind) * num_levels(p) + level_index) * p.q_heads + head;
}

// What the worker leaves unfinished; the merge kernel starts from it. Called by one warp of each worker.
__device__ __forceinline__ void record_unfinished(const NodeVectorsParams& p, const Workspace& w, int64_t worker,
                                                  const Run& run, int64_t last_leaf_seen, int lane) {
  for (int level = lane; level < num_levels(p); level += 32) {
    Unfinished record{-1, 0};
    if (run.begin < run.end) {
      const Node node = node_of(p, last_leaf_seen, level);
      const int64_t first = w.first_tile[node.first_leaf], end = w.first_tile[node.last_leaf + 1];
      if (first >= run.begin && end > run.end) {
        record.node = node.row;
        record.last_worker = (end - 1) / run.tiles_per_worker;
      }
    }
    w.unfinished[worker * num_levels(p) + level] = record;
  }
}

// Where a pair of elements that are rotated together is, for pairs aligned to `width`. Past the rotated part the
// elements are paired as they come.
__device__ __forceinline__ void pair_offsets(int pair, int half, int width, int* low, int* high) {
  const bool rotated = pair < half;
  *low = rotated ? pair : 2 * half + 2 * (pair - half);
  *high = rotated ? pair + half : *low + width;
}

__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16(x); }
__device__ __forceinline__ void store(__half* to, float x) { *to = __float2half(x); }

// ---- tensor cores ----

// x = high + low, high with the 11 significant bits of tf32.
__device__ __forceinline__ void split_tf32(float x, uint32_t* high, uint32_t* low) {
  *high = __float_as_uint(x) & 0xffffe000u;
  *low = __float_as_uint(x - __uint_as_float(*high));
}

template <int D>
struct Tiling {
  // What the registers have room for.
  static constexpr int max_warps(int columns) { return D > 128 ? 6 : columns > 1 || D > 64 ? 8 : 12; }
  // Keys are rotated by their place in a window of this many positions, and the queries once for each window: the keys'
  // tables then stay in shared memory. Reading them for each key would double the traffic.
  static constexpr int kWindow = D > 128 ? 32 : 64;
  // No bank conflicts: four rows of 32 bytes of k, eight rows of 16 of v, two rows of 64 of the table. Rows of whole
  // 128 bytes are swizzled, others padded.
  static constexpr bool kPermuted = D % 64 == 0;
  static constexpr int kPitchK = kPermuted ? 2 * D : 2 * D + 32, kPitchV = kPermuted ? 2 * D : 2 * D + 16;
  static constexpr int kPitchTable = 4 * D;
  static constexpr int kStageBytes = kTile * (kPitchK + kPitchV);
  // the last row holds the angles of one window
  static constexpr int kTableBytes = (kWindow + 1) * kPitchTable;

  static __host__ __device__ constexpr int shared_bytes(int warps, int stages) {
    return kTableBytes + warps * stages * kStageBytes;
  }
  static __device__ __forceinline__ int offset_k(int row, int byte) {
    return row * kPitchK + (kPermuted ? byte ^ (row % 4 * 32) : byte);
  }
  static __device__ __forceinline__ int offset_v(int row, int byte) {
    return row * kPitchV + (kPermuted ? byte ^ (row % 8 * 16) : byte);
  }
  static __device__ __forceinline__ int offset_table(int row, int byte) {
    return row * kPitchTable + (byte ^ (row % 2 * 64));
  }
};

// One warp computes S^T = K Q^T (16 keys x 8 columns, a column is a query row) in tf32, each factor split in two so
// that the scores are as exact as in float32, and O^T += V^T P^T in T, the weights split in two likewise.
template <class T, int D, int kColumns>
__global__ void __launch_bounds__(32 * Tiling<D>::max_warps(kColumns), 1)
    node_vectors_tensor(const __grid_constant__ NodeVectorsParams p) {
  using Shape = Tiling<D>;
  constexpr int kGroups = D / 32;  // a lane has four pairs of each
  extern __shared__ __align__(128) char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
  Workspace w;
  divide_workspace(p, &w);

  const uint32_t shared_base = shared_address(shared);
#pragma unroll 4
  for (int i = threadIdx.x; i < (Shape::kWindow + 1) * (D / 8); i += blockDim.x) {
    const int position = i / (D / 8), pair = i % (D / 8) * 4;
    float4 c = make_float4(1, 1, 1, 1), s = make_float4(0, 0, 0, 0);
    if (pair < p.rotary_half && position < p.num_positions) {
      c = __ldg(reinterpret_cast<const float4*>(p.cos + static_cast<int64_t>(position) * p.rotary_half + pair));
      s = __ldg(reinterpret_cast<const float4*>(p.sin + static_cast<int64_t>(position) * p.rotary_half + pair));
      if (position == Shape::kWindow) {
        // tables may hold a common factor, which position 0 shows; rotating the queries must not apply it again
        const float4 one = __ldg(reinterpret_cast<const float4*>(p.cos + pair));
        c = make_float4(c.x / one.x, c.y / one.y, c.z / one.z, c.w / one.w);
        s = make_float4(s.x / one.x, s.y / one.y, s.z / one.z, s.w / one.w);
      }
    }
    *reinterpret_cast<float4*>(shared + Shape::offset_table(position, 4 * pair)) = c;
    *reinterpret_cast<float4*>(shared + Shape::offset_table(position, 4 * pair + 2 * D)) = s;
  }
  __syncthreads();
  wait_for_previous_kernel();

  const int64_t global_warp = static_cast<int64_t>(blockIdx.x) * p.warps + warp;
  const int64_t worker = global_warp / p.units;
  const int unit = static_cast<int>(global_warp % p.units);
  if (worker >= p.workers) return;
  const Run run = run_of(p, w, worker);
  if (run.begin >= run.end) {
    if (unit == 0) record_unfinished(p, w, worker, run, 0, lane);
    return;
  }
  const int kv_head = unit % p.kv_heads, first_row = unit / p.kv_heads * (8 * kColumns);
  const int group = p.q_heads / p.kv_heads, rows = num_levels(p) * group;

  const uint32_t stages = Shape::kTableBytes + warp * p.stages * Shape::kStageBytes;
  const T* const k = static_cast<const T*>(p.k) + kv_head * p.k_stride[1];
  const T* const v = static_cast<const T*>(p.v) + kv_head * p.v_stride[1];

  const auto copy_tile = [&](const Cursor& from, int stage) {
    constexpr int kVectors = D / 8;  // of a row
    const uint32_t to = shared_base + stages + stage * Shape::kStageBytes;
    const int64_t token = from.start + from.done;
    const int count = from.count();
    const auto copy = [&](const T* x, int64_t stride, uint32_t x_to, auto offset) {
      if constexpr (32 % kVectors == 0) {
        // a lane's vectors are below each other
        constexpr int kRows = 32 / kVectors;
        const T* at = x + (token + lane / kVectors) * stride + lane % kVectors * 8;
#pragma unroll
        for (int i = 0; i < kTile / kRows; ++i) {
          const int r = i * kRows + lane / kVectors;
          copy16_async(x_to + offset(r, lane % kVectors * 16), at, r < count);
          at += kRows * stride;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kTile * kVectors / 32; ++i) {
          const int vector = i * 32 + lane, r = vector / kVectors, element = vector % kVectors * 8;
          copy16_async(x_to + offset(r, element * 2), x + (token + r) * stride + element, r < count);
        }
      }
    };
    copy(k, p.k_stride[0], to, [](int r, int byte) { return Shape::offset_k(r, byte); });
    copy(v, p.v_stride[0], to + kTile * Shape::kPitchK, [](int r, int byte) { return Shape::offset_v(r, byte); });
  };

  Cursor ahead;
  ahead.seek(p, w, run.begin, lane);
  Cursor at = ahead;
  int64_t ahead_tile = run.begin;
  for (int stage = 0; stage < p.stages - 1; ++stage) {
    if (ahead_tile < run.end) {
      copy_tile(ahead, stage);
      ahead.advance(p, w);
      ++ahead_tile;
    }
    commit_copies();
  }

  // bytes of the row in shared memory, which is the same for rows eight apart
  uint32_t key_low[kGroups], key_high[kGroups];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    int low, high;
    pair_offsets(4 * (quad + 4 * i), p.rotary_half, 4, &low, &high);
    key_low[i] = stages + Shape::offset_k(row, 2 * low);
    key_high[i] = stages + Shape::offset_k(row, 2 * high);
  }

  // the query of column `row`, rotated, times scale * log2(e); split in its two parts where the registers have room for
  // them
  constexpr bool kSplit = kColumns == 1 && D <= 128;
  uint32_t query[kColumns][kGroups * 4][2][kSplit ? 2 : 1];
  const auto set_query = [](uint32_t (&to)[kSplit ? 2 : 1], float x) {
    if constexpr (kSplit) {
      split_tf32(x, &to[0], &to[1]);
    } else {
      to[0] = __float_as_uint(x);
    }
  };
  const auto get_query = [](const uint32_t (&from)[kSplit ? 2 : 1]) {
    return kSplit ? __uint_as_float(from[0]) + __uint_as_float(from[kSplit ? 1 : 0]) : __uint_as_float(from[0]);
  };
  // base: the position where the window begins
  const auto load_queries = [&](int32_t base) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const bool wanted = first_row + 8 * n + row < rows;
      const int r = wanted ? first_row + 8 * n + row : 0;
      const int level = r / group, head = kv_head * group + r - level * group;
      const int64_t leaf = node_of(p, at.leaf, level).last_leaf;
      const Leaf last = w.leaves[leaf];
      const T* const from = static_cast<const T*>(p.q) + leaf * p.q_stride[0] + head * p.q_stride[1];
      const int64_t position = clamp_index(int64_t{last.position} + last.length - 1 - base, 0, p.num_positions - 1);
      const float factor = wanted ? p.scale * kLog2E : 0.0f;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const int pair = 4 * (quad + 4 * i);
        int low, high;
        pair_offsets(pair, p.rotary_half, 4, &low, &high);
        const uint2 x = __ldg(reinterpret_cast<const uint2*>(from + low));
        const uint2 y = __ldg(reinterpret_cast<const uint2*>(from + high));
        float4 c = make_float4(1, 1, 1, 1), s = make_float4(0, 0, 0, 0);
        if (pair < p.rotary_half) {
          c = __ldg(reinterpret_cast<const float4*>(p.cos + position * p.rotary_half + pair));
          s = __ldg(reinterpret_cast<const float4*>(p.sin + position * p.rotary_half + pair));
        }
        const uint32_t xs[2] = {x.x, x.y}, ys[2] = {y.x, y.y};
        const float cs[4] = {c.x, c.y, c.z, c.w}, ss[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float a = Word<T>::get(xs[e / 2], e % 2), b = Word<T>::get(ys[e / 2], e % 2);
          // a selected 0, as the query of row 0 may be NaN
          set_query(query[n][4 * i + e][0], wanted ? (a * cs[e] - b * ss[e]) * factor : 0.0f);
          set_query(query[n][4 * i + e][1], wanted ? (b * cs[e] + a * ss[e]) * factor : 0.0f);
        }
      }
    }
  };
  // Rotates them back by one window, without reading memory.
  const auto step_queries = [&] {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const char* const angles = shared + Shape::kTableBytes - Shape::kPitchTable + 16 * (quad + 4 * i);
      const float4 c = *reinterpret_cast<const float4*>(angles), s = *reinterpret_cast<const float4*>(angles + 2 * D);
      const float cs[4] = {c.x, c.y, c.z, c.w}, ss[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const float a = get_query(query[n][4 * i + e][0]), b = get_query(query[n][4 * i + e][1]);
          set_query(query[n][4 * i + e][0], a * cs[e] + b * ss[e]);
          set_query(query[n][4 * i + e][1], b * cs[e] - a * ss[e]);
        }
      }
    }
  };

  // columns 2 * quad and 2 * quad + 1 of each eight
  float sums[kColumns][D / 16][4], top[kColumns][2], total[kColumns][2];
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) top[n][j] = -INFINITY, total[n][j] = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[n][i][j] = 0.0f;
    }
  }

  // Writes the nodes that end with this tile, and starts them anew.
  const auto flush = [&](bool leaf_ends, bool run_ends) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float weight = total[n][j];
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) weight += __shfl_xor_sync(kFullWarp, weight, offset);
        const int r = first_row + 8 * n + 2 * quad + j;
        if (r >= rows) continue;
        const int level = r / group, head = kv_head * group + r - level * group;
        const Node node = node_of(p, at.leaf, level);
        const bool ends = leaf_ends && node.last;
        if (!ends && !run_ends) continue;
        const bool begins_here = w.first_tile[node.first_leaf] >= run.begin;
        if (ends && begins_here) {
          T* const to = static_cast<T*>(p.out) + (node.row * p.q_heads + head) * D + row;
          const float inverse = weight == 0.0f ? 0.0f : 1.0f / weight;
#pragma unroll
          for (int i = 0; i < D / 16; ++i) {
            store(to + 16 * i, sums[n][i][j] * inverse);
            store(to + 16 * i + 8, sums[n][i][2 + j] * inverse);
          }
        } else {
          const int64_t partial = partial_row(p, worker, begins_here ? 1 : 0, level, head);
          if (row == 0) w.stats[partial] = make_float2(top[n][j], weight);
          float* const to = w.sums + partial * D + row;
#pragma unroll
          for (int i = 0; i < D / 16; ++i) {
            to[16 * i] = sums[n][i][j];
            to[16 * i + 8] = sums[n][i][2 + j];
          }
        }
        if (ends) {
          top[n][j] = -INFINITY;
          total[n][j] = 0.0f;
#pragma unroll
          for (int i = 0; i < D / 16; ++i) sums[n][i][j] = sums[n][i][2 + j] = 0.0f;
        }
      }
    }
  };

  // odd rows of the table have the halves of each 128 bytes exchanged
  const uint32_t even_angles = row * Shape::kPitchTable + quad * 16 + row % 2 * 64;
  const uint32_t odd_angles = row * Shape::kPitchTable + quad * 16 - row % 2 * 64;
  const int matrix_row = lane / 16 * 8 + lane % 8;
  uint32_t matrices[4];  // of each 64 elements
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    matrices[i] =
        shared_base + stages + kTile * Shape::kPitchK + Shape::offset_v(matrix_row, lane / 8 % 2 * 16 + 32 * i);
  }

  int window = 0, window_tile = 0;  // windows since the queries were loaded; tile of the window
  uint32_t stage = 0, stage_bytes = 0;
  for (int64_t tile = run.begin; tile < run.end; ++tile) {
    const bool window_ends = window_tile == Shape::kWindow / kTile;
    if (tile == run.begin || at.done == 0 || (window_ends && window == kMaxWindows - 1)) {
      load_queries(at.position + at.done);
      window = window_tile = 0;
    } else if (window_ends) {
      step_queries();
      ++window;
      window_tile = 0;
    }
    if (p.stages > 2) {
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    // also: the lanes have finished with the stage that is filled next
    __syncwarp();
    if (ahead_tile < run.end) {
      copy_tile(ahead, stage == 0 ? p.stages - 1 : stage - 1);
      ahead.advance(p, w);
      ++ahead_tile;
    }
    commit_copies();

    const uint32_t here = stage_bytes, window_bytes = window_tile * (kTile * Shape::kPitchTable);
    ++window_tile;
    ++stage;
    stage_bytes += Shape::kStageBytes;
    if (stage == p.stages) stage = stage_bytes = 0;

    // separate sums of the large and the two small matmuls: three short chains
    float scores[kColumns][3][4];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 3; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) scores[n][i][j] = 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const uint2 low0 = *reinterpret_cast<const uint2*>(shared + here + key_low[i]),
                  high0 = *reinterpret_cast<const uint2*>(shared + here + key_high[i]);
      const uint2 low1 = *reinterpret_cast<const uint2*>(shared + here + key_low[i] + 8 * Shape::kPitchK);
      const uint2 high1 = *reinterpret_cast<const uint2*>(shared + here + key_high[i] + 8 * Shape::kPitchK);
      const uint32_t cosines = window_bytes + (i % 2 ? odd_angles : even_angles) + 64 * i;
      // the sines are 2 * D bytes further: an odd number of 64 for D = 96
      const uint32_t sines = window_bytes + ((i + D / 32) % 2 ? odd_angles : even_angles) + 64 * i + 2 * D;
      const float4 c0 = *reinterpret_cast<const float4*>(shared + cosines),
                   s0 = *reinterpret_cast<const float4*>(shared + sines);
      const float4 c1 = *reinterpret_cast<const float4*>(shared + cosines + 8 * Shape::kPitchTable);
      const float4 s1 = *reinterpret_cast<const float4*>(shared + sines + 8 * Shape::kPitchTable);
      const uint32_t x0[2] = {low0.x, low0.y}, y0[2] = {high0.x, high0.y};
      const uint32_t x1[2] = {low1.x, low1.y}, y1[2] = {high1.x, high1.y};
      const float cs0[4] = {c0.x, c0.y, c0.z, c0.w}, ss0[4] = {s0.x, s0.y, s0.z, s0.w};
      const float cs1[4] = {c1.x, c1.y, c1.z, c1.w}, ss1[4] = {s1.x, s1.y, s1.z, s1.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float a0 = Word<T>::get(x0[e / 2], e % 2), b0 = Word<T>::get(y0[e / 2], e % 2);
        const float a1 = Word<T>::get(x1[e / 2], e % 2), b1 = Word<T>::get(y1[e / 2], e % 2);
        uint32_t big[4], small[4];
        split_tf32(a0 * cs0[e] - b0 * ss0[e], &big[0], &small[0]);
        split_tf32(a1 * cs1[e] - b1 * ss1[e], &big[1], &small[1]);
        split_tf32(b0 * cs0[e] + a0 * ss0[e], &big[2], &small[2]);
        split_tf32(b1 * cs1[e] + a1 * ss1[e], &big[3], &small[3]);
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          uint32_t q_big[2], q_small[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const auto& x = query[n][4 * i + e][j];
            if constexpr (kSplit) {
              q_big[j] = x[0];
              q_small[j] = x[1];
            } else {
              split_tf32(__uint_as_float(x[0]), &q_big[j], &q_small[j]);
            }
          }
          multiply_add_tf32(scores[n][0], big, q_big[0], q_big[1]);
          multiply_add_tf32(scores[n][1], small, q_big[0], q_big[1]);
          multiply_add_tf32(scores[n][2], big, q_small[0], q_small[1]);
        }
      }
    }

    const int count = at.count();
    uint32_t weights[kColumns][4];  // keys 0-7 and 8-15, high and low part
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      float x[4], factor[2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x[j] = scores[n][0][j] + (scores[n][1][j] + scores[n][2][j]);
        if (row + (j / 2) * 8 >= count) x[j] = -INFINITY;
      }
      bool risen = false;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float best = fmaxf(x[j], x[2 + j]);
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) best = fmaxf(best, __shfl_xor_sync(kFullWarp, best, offset));
        best = fmaxf(best, top[n][j]);
        // only -inf so far: any number does
        const float reference = best == -INFINITY ? 0.0f : best;
        factor[j] = exp2f(top[n][j] - reference);
        risen |= best > top[n][j];
        top[n][j] = best;
        x[j] = exp2f(x[j] - reference);
        x[2 + j] = exp2f(x[2 + j] - reference);
      }
      if (__any_sync(kFullWarp, risen)) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          total[n][j] *= factor[j];
#pragma unroll
          for (int i = 0; i < D / 16; ++i) {
            sums[n][i][j] *= factor[j];
            sums[n][i][2 + j] *= factor[j];
          }
        }
      }
      total[n][0] += x[0] + x[2];
      total[n][1] += x[1] + x[3];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t big = pack_pair(T{}, x[2 * i], x[2 * i + 1]);
        const uint32_t small = pack_pair(T{}, x[2 * i] - Word<T>::get(big, 0), x[2 * i + 1] - Word<T>::get(big, 1));
        weights[n][i] = transpose_matrix(big);
        weights[n][2 + i] = transpose_matrix(small);
      }
    }
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      uint32_t x[4];
      load_block_transposed(x, here + matrices[i % 4] + i / 4 * 128);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        multiply_add<T>(sums[n][i], x, weights[n][0], weights[n][1]);
        multiply_add<T>(sums[n][i], x, weights[n][2], weights[n][3]);
      }
    }

    const bool leaf_ends = at.ends_leaf(), run_ends = tile + 1 == run.end;
    if (leaf_ends || run_ends) flush(leaf_ends, run_ends);
    if (run_ends && unit == 0) record_unfinished(p, w, worker, run, at.leaf, lane);
    at.advance(p, w);
  }
}

template <class T, int D, int kColumns>
cudaError_t launch_tensor(const NodeVectorsParams& p, cudaStream_t stream) {
  const auto kernel = node_vectors_tensor<T, D, kColumns>;
  const int bytes = Tiling<D>::shared_bytes(p.warps, p.stages);
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const int64_t blocks = (p.workers * p.units + p.warps - 1) / p.warps;
  return launch_after(kernel, blocks, 32 * p.warps, bytes, true, stream, p);
}

#endif  // __CUDACC__

}  // namespace node_vectors
}  // namespace sharedllm

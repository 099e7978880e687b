// Merges the rows that several workers shared, while or after the workers write their parts.
#pragma once

#include <cstdint>

#include "kernels/common/global_memory.cuh"
#include "kernels/common/overlap.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/common/vector_load.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/injected_attention/decode/config.cuh"
#include "kernels/injected_attention/decode/work.cuh"

namespace sharedllm {
namespace decode {

constexpr int kMergeWarps = 4, kMergeThreads = 32 * kMergeWarps, kMergeLoads = 8;
static_assert(kMergeWarps * kMergeLoads == 32);
// While more parts than this are absent, only their statistics are polled.
constexpr int kFewParts = 4;
// Polls before we give up and wait for the producing kernel (about 50 ms). Then the parts are taken as they are, so
// that nothing can keep this kernel from ending.
constexpr int kPatience = 1 << 16;

__device__ __forceinline__ bool is_absent(float x) { return __float_as_uint(x) == kAbsent; }
// One block merges one packed row of one tile that several workers shared; its warps take the parts alternately.
// kByTile: block -> tile; else block -> worker that has the first part of a shared tile. `rows`: those of a tile that a
// batch of this size can fill.
template <class T, int kHeadSize, int kRows, int kSlots, bool kByTile, bool kMayAwait>
__global__ void __launch_bounds__(kMergeThreads)
    merge_parts(const __grid_constant__ InjectedAttentionParams p, int32_t rows, bool await_parts) {
  const bool awaits = kMayAwait && await_parts;
  constexpr int kVectors = kHeadSize / 4, kColumns = (kVectors + 31) / 32;
  __shared__ PlaceScan scan;
  __shared__ float4 shared[kMergeWarps][kColumns * 32];
  const int r = blockIdx.x % rows, head = blockIdx.x / rows % p.kv_heads, index = blockIdx.x / rows / p.kv_heads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t group = static_cast<uint32_t>(p.q_heads) / static_cast<uint32_t>(p.kv_heads);
  uint64_t share = 1, unit = 0;
  const Place place = find_place<kRows, kSlots, kMergeThreads, kByTile>(p, group, scan, [&](uint64_t units) {
    share = worker_share(units, p.splits);
    if (kByTile) return static_cast<uint64_t>(index);
    // the worker's last unit
    unit = share * (index + 1) - 1;
    return unit;
  });
  int first_worker = 0, parts = 0;
  int64_t token_and_head = 0;
  if (place.row >= 0) {
    const uint32_t blocks = blocks_of<kSlots>(place.span);
    const uint32_t tile =
        static_cast<uint32_t>(kByTile ? index - place.tiles_before : (unit - place.units_before) / blocks);
    const uint64_t begin = place.units_before + static_cast<uint64_t>(tile) * blocks;
    first_worker = static_cast<int>(begin / share);
    const int last_worker = static_cast<int>((begin + blocks - 1) / share);
    const uint32_t packed = tile * kRows + r, query = packed / group;
    if (packed < place.span.q_count * group && (kByTile || first_worker == index))
      parts = last_worker - first_worker + 1;
    token_and_head =
        static_cast<int64_t>(place.span.q_begin + query) * p.q_heads + (head * group + (packed - query * group));
  }
  // by all blocks, also those without work: a later kernel must not overtake the one before this
  if (parts <= 1) {
    wait_for_previous_kernel();
    return;
  }
  const auto workspace_row = [&](int part) {
    return (static_cast<int64_t>(2 * (first_worker + part) + (part == 0 ? 1 : 0)) * p.kv_heads + head) * kRows + r;
  };

  // When waiting for parts, first run without them: code and addresses are then in the caches when they come.
#pragma unroll 1
  for (int pass = awaits ? 0 : 1; pass < 2; ++pass) {
    const bool rehearsal = pass == 0;
    if (!awaits) wait_for_previous_kernel();
    float maximum = -kInfinity, total = 0;
    float4 sum[kColumns]{};
    // every warp sees the statistics of all parts, and reads the results of its own
#pragma unroll 1
    for (int base = 0; base < parts; base += 32) {
      float lse = -kInfinity;
      int patience = kPatience;
      // only these while most are absent: polling all results would slow the previous kernel down
      if (base + lane < parts) lse = load_strong(p.partial_lse + workspace_row(base + lane));
      if (awaits && !rehearsal) {
        while (__popc(__ballot_sync(kFullWarp, is_absent(lse))) > kFewParts && --patience > 0) {
          if (base + lane < parts) lse = load_strong(p.partial_lse + workspace_row(base + lane));
        }
      }
      float4 x[kMergeLoads][kColumns];
#pragma unroll
      for (int j = 0; j < kMergeLoads; ++j) {
        const int part = base + j * kMergeWarps + warp;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          x[j][c] = float4{};
          if (part < parts && c * 32 + lane < kVectors) {
            x[j][c] = load_strong(reinterpret_cast<const float4*>(p.partial_out + workspace_row(part) * kHeadSize) +
                                  c * 32 + lane);
          }
        }
      }
      if (awaits && !rehearsal) {
        bool absent = true;
        while (__any_sync(kFullWarp, absent) && patience >= 0) {
          if (--patience <= 0) {
            wait_for_previous_kernel();
            patience = -1;
          }
          absent = is_absent(lse);
          if (absent) lse = load_strong(p.partial_lse + workspace_row(base + lane));
#pragma unroll
          for (int j = 0; j < kMergeLoads; ++j) {
            const int part = base + j * kMergeWarps + warp;
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
              if (is_absent(x[j][c].x) || is_absent(x[j][c].y) || is_absent(x[j][c].z) || is_absent(x[j][c].w)) {
                absent = true;
                x[j][c] = load_strong(reinterpret_cast<const float4*>(p.partial_out + workspace_row(part) * kHeadSize) +
                                      c * 32 + lane);
              }
            }
          }
        }
      }
      float highest = fmaxf(lse, maximum);
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(kFullWarp, highest, offset));
      }
      const float shift = highest == -kInfinity ? 0.0f : highest;
      const float shrink = exp2f(maximum - shift), weight = exp2f(lse - shift);
      float weights = weight;
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) weights += __shfl_xor_sync(kFullWarp, weights, offset);
      total = total * shrink + weights;
      maximum = highest;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        sum[c].x *= shrink, sum[c].y *= shrink, sum[c].z *= shrink, sum[c].w *= shrink;
      }
#pragma unroll
      for (int j = 0; j < kMergeLoads; ++j) {
        const float w = __shfl_sync(kFullWarp, weight, j * kMergeWarps + warp);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          sum[c].x = fmaf(w, x[j][c].x, sum[c].x), sum[c].y = fmaf(w, x[j][c].y, sum[c].y);
          sum[c].z = fmaf(w, x[j][c].z, sum[c].z), sum[c].w = fmaf(w, x[j][c].w, sum[c].w);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) shared[warp][c * 32 + lane] = sum[c];
    __syncthreads();
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    // of a narrower head there are fewer
    if (threadIdx.x < static_cast<unsigned>(p.head_size) / 4) {
      float4 y = shared[0][threadIdx.x];
#pragma unroll
      for (int w = 1; w < kMergeWarps; ++w) {
        const float4 x = shared[w][threadIdx.x];
        y.x += x.x, y.y += x.y, y.z += x.z, y.w += x.w;
      }
      uint2* const out =
          reinterpret_cast<uint2*>(static_cast<T*>(p.out) + token_and_head * p.head_size + 4 * threadIdx.x);
      const uint2 packed =
          make_uint2(pack_pair(T{}, y.x * inverse, y.y * inverse), pack_pair(T{}, y.z * inverse, y.w * inverse));
      if (rehearsal) {
        prefetch_line(out);
      } else {
        *out = packed;
      }
    }
    if (threadIdx.x == 0) {
      float* const lse = p.lse + token_and_head;
      const float merged = total == 0.0f ? -kInfinity : (maximum + log2f(total)) * kLn2;
      if (rehearsal) {
        prefetch_line(lse);
      } else {
        *lse = merged;
      }
    }
    __syncthreads();
  }
  if (awaits) wait_for_previous_kernel();
}

}  // namespace decode
}  // namespace sharedllm

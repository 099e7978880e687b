// Merges the rows that several workers shared, while or after the workers write their parts. One set of kernels for all
// tiles of the kernel before: what they are is known when it is launched, and is needed only while that one runs.
#include <algorithm>
#include <cstdint>

#include "kernels/common/global_memory.cuh"
#include "kernels/common/once_per_device.h"
#include "kernels/common/overlap.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/common/vector_load.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/injected_attention/decode/config.cuh"
#include "kernels/injected_attention/decode/merge.h"
#include "kernels/injected_attention/decode/work.cuh"

namespace sharedllm {
namespace decode {
namespace {

constexpr int kMergeWarps = 4, kMergeThreads = 32 * kMergeWarps, kMergeLoads = 8;
static_assert(kMergeWarps * kMergeLoads == 32);
// While more parts than this are absent, only their statistics are polled.
constexpr int kFewParts = 4;
// Polls before we give up and wait for the producing kernel (about 50 ms). Then the parts are taken as they are, so
// that nothing can keep this kernel from ending.
constexpr int kPatience = 1 << 16;

__device__ __forceinline__ bool is_absent(float x) { return __float_as_uint(x) == kAbsent; }

struct MergeWork {
  UnitShape shape;
  int32_t rows;      // those of a tile that a batch of this size can fill
  bool by_tile;      // block -> tile; else block -> worker that has the first part of a shared tile
  bool await_parts;  // instead of the end of the kernel before
};

// One block merges one packed row of one tile that several workers shared; its warps take the parts alternately.
// kVectors: of 4 columns, that a lane takes.
template <class T, int kVectors, bool kMayAwait>
__global__ void __launch_bounds__(kMergeThreads)
    merge_parts(const __grid_constant__ InjectedAttentionParams p, const __grid_constant__ MergeWork work) {
  const bool awaits = kMayAwait && work.await_parts, by_tile = work.by_tile;
  const UnitShape shape = work.shape;
  const int vectors = p.columns / 4;
  __shared__ PlaceScan scan;
  __shared__ float4 shared[kMergeWarps][kVectors * 32];
  const int r = blockIdx.x % work.rows, head = blockIdx.x / work.rows % p.kv_heads;
  const int index = blockIdx.x / work.rows / p.kv_heads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t group = static_cast<uint32_t>(p.q_heads) / static_cast<uint32_t>(p.kv_heads);
  uint64_t share = 1, unit = 0;
  const Place place = find_place<kMergeThreads>(p, group, scan, shape, by_tile, [&](uint64_t units) {
    share = worker_share(units, p.splits);
    if (by_tile) return static_cast<uint64_t>(index);
    // the worker's last unit
    unit = share * (index + 1) - 1;
    return unit;
  });
  int first_worker = 0, parts = 0;
  int64_t token_and_head = 0;
  if (place.row >= 0) {
    const uint32_t blocks = blocks_of(place.span, shape);
    const uint32_t tile =
        static_cast<uint32_t>(by_tile ? index - place.tiles_before : (unit - place.units_before) / blocks);
    const uint64_t begin = place.units_before + static_cast<uint64_t>(tile) * blocks;
    first_worker = static_cast<int>(begin / share);
    const int last_worker = static_cast<int>((begin + blocks - 1) / share);
    const uint32_t packed = (tile << shape.row_bits) + r, query = packed / group;
    if (packed < place.span.q_count * group && (by_tile || first_worker == index))
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
    const int64_t tile = static_cast<int64_t>(2 * (first_worker + part) + (part == 0 ? 1 : 0)) * p.kv_heads + head;
    return (tile << shape.row_bits) + r;
  };

  // When waiting for parts, first run without them: code and addresses are then in the caches when they come.
#pragma unroll 1
  for (int pass = awaits ? 0 : 1; pass < 2; ++pass) {
    const bool rehearsal = pass == 0;
    if (!awaits) wait_for_previous_kernel();
    float maximum = -kInfinity, total = 0;
    float4 sum[kVectors]{};
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
      float4 x[kMergeLoads][kVectors];
#pragma unroll
      for (int j = 0; j < kMergeLoads; ++j) {
        const int part = base + j * kMergeWarps + warp;
#pragma unroll
        for (int c = 0; c < kVectors; ++c) {
          x[j][c] = float4{};
          if (part < parts && c * 32 + lane < vectors) {
            x[j][c] = load_strong(reinterpret_cast<const float4*>(p.partial_out + workspace_row(part) * p.columns) +
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
            for (int c = 0; c < kVectors; ++c) {
              if (is_absent(x[j][c].x) || is_absent(x[j][c].y) || is_absent(x[j][c].z) || is_absent(x[j][c].w)) {
                absent = true;
                x[j][c] = load_strong(reinterpret_cast<const float4*>(p.partial_out + workspace_row(part) * p.columns) +
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
      for (int c = 0; c < kVectors; ++c) {
        sum[c].x *= shrink, sum[c].y *= shrink, sum[c].z *= shrink, sum[c].w *= shrink;
      }
#pragma unroll
      for (int j = 0; j < kMergeLoads; ++j) {
        const float w = __shfl_sync(kFullWarp, weight, j * kMergeWarps + warp);
#pragma unroll
        for (int c = 0; c < kVectors; ++c) {
          sum[c].x = fmaf(w, x[j][c].x, sum[c].x), sum[c].y = fmaf(w, x[j][c].y, sum[c].y);
          sum[c].z = fmaf(w, x[j][c].z, sum[c].z), sum[c].w = fmaf(w, x[j][c].w, sum[c].w);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kVectors; ++c) shared[warp][c * 32 + lane] = sum[c];
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

template <class T, int kVectors>
cudaError_t prepare() {
  for (auto* const kernel : {merge_parts<T, kVectors, false>, merge_parts<T, kVectors, true>}) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

template <class T>
cudaError_t launch(const InjectedAttentionParams& p, const Merge& merge, cudaStream_t stream) {
  const int64_t group = p.q_heads / p.kv_heads;
  // tiles that any batch of this size can have; each of them is shared at most once, and so is each worker's last one
  const int64_t tiles = p.num_queries * group / merge.tile_rows + p.num_rows;
  MergeWork work{unit_shape(merge.tile_rows, merge.block_slots),
                 static_cast<int32_t>(std::min<int64_t>(merge.tile_rows, p.num_queries * group)), tiles < p.splits,
                 merge.awaits};
  const int64_t blocks = (work.by_tile ? tiles : p.splits) * p.kv_heads * work.rows;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kMergeThreads);
  config.stream = stream;
  // PDL: its blocks become resident while the last blocks of the previous kernel run, find their place and wait
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = merge.overlaps ? 1 : 0;
  auto* const kernel = p.columns <= 128  ? merge.may_await ? merge_parts<T, 1, true> : merge_parts<T, 1, false>
                       : merge.may_await ? merge_parts<T, 2, true>
                                         : merge_parts<T, 2, false>;
  return cudaLaunchKernelEx(&config, kernel, p, work);
}

}  // namespace

cudaError_t prepare_merge() {
  static uint64_t done = 0;
  return once_per_device(&done, [] {
    cudaError_t status = prepare<__nv_bfloat16, 1>();
    if (status == cudaSuccess) status = prepare<__nv_bfloat16, 2>();
    if (status == cudaSuccess) status = prepare<__half, 1>();
    if (status == cudaSuccess) status = prepare<__half, 2>();
    return status;
  });
}

cudaError_t launch_merge(const InjectedAttentionParams& p, const Merge& merge, cudaStream_t stream) {
  switch (p.type) {
    case FloatType::kBFloat16:
      return launch<__nv_bfloat16>(p, merge, stream);
    case FloatType::kFloat16:
      return launch<__half>(p, merge, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace decode
}  // namespace sharedllm

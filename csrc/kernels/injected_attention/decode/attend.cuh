// Injected attention for a few queries per row (decoding, split-KV). The slots of all rows are cut into blocks and
// divided evenly among workers; a worker walks its blocks, whatever rows they belong to (stream-K). A producer warp
// loads keys and values by TMA, consumer warps compute. Rows that several workers share are merged by a second kernel
// (merge.cuh), launched by PDL. docs/kernels/injected_attention_decode.md has the derivation.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/common/copy_async.cuh"
#include "kernels/common/hopper.cuh"
#include "kernels/common/overlap.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/injected_attention/decode/config.cuh"
#include "kernels/injected_attention/decode/epilogue.cuh"
#include "kernels/injected_attention/decode/matmuls.cuh"
#include "kernels/injected_attention/decode/queries.cuh"
#include "kernels/injected_attention/decode/tiles.cuh"
#include "kernels/injected_attention/decode/work.cuh"

namespace sharedllm {
namespace decode {

// Marks what a worker may write to the workspace as absent, then lets the merging kernel start, which therefore never
// sees the results of an earlier call. Lanes from `first_lane` of one warp take part.
template <class C>
__device__ __forceinline__ void mark_absent(const InjectedAttentionParams& p, uint32_t group, int head, int worker,
                                            int first_lane, uint64_t* marked) {
  const int lane = threadIdx.x % 32;
  const uint32_t rows = min(static_cast<uint32_t>(C::kRows), static_cast<uint32_t>(p.num_queries) * group);
  const float absent = __uint_as_float(kAbsent);
  for (int part = 0; part < 2; ++part) {
    const int64_t first_row = (static_cast<int64_t>(2 * worker + part) * p.kv_heads + head) * C::kRows;
    float4* const out = reinterpret_cast<float4*>(p.partial_out + first_row * C::kHeadSize);
    for (uint32_t i = lane - first_lane; i < rows * (C::kHeadSize / 4); i += 32 - first_lane) {
      out[i] = make_float4(absent, absent, absent, absent);
    }
    if (lane - first_lane < rows) p.partial_lse[first_row + lane - first_lane] = absent;
  }
  __threadfence();
  __syncwarp(kFullWarp << first_lane);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (lane == first_lane) {
    // results are ordered after their marks
    barrier_arrive(marked);
    let_next_kernel_start();
  }
#endif
}

// cp.async loads by the consumers themselves; they run ahead of the matmuls, across segments.
template <class C>
struct Loader {
  Walk<C::kRows, C::kSlots> walk;
  uint32_t left = 0;
  int stage = 0;

  __device__ __forceinline__ void next(const InjectedAttentionParams& p, const Scales* scales, uint32_t group, int head,
                                       uint8_t* shared) {
    while (left == 0) {
      if (!walk.next(p, group)) {
        commit_copies();
        return;
      }
      left = walk.span.slot_count == 0 ? 0 : walk.count;
    }
    const uint32_t block = walk.first + walk.count - left;
    const int64_t slot = walk.span.slot_begin + static_cast<int64_t>(block) * C::kSlots;
    const int valid = walk.span.slot_count - static_cast<int>(block * C::kSlots);
    constexpr int kChunks = C::kRowBytes / 16, kElement = C::kEightBit ? 1 : 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t* const stride = i == 0 ? p.k_stride : p.v_stride;
      const uint8_t* const from =
          static_cast<const uint8_t*>(i == 0 ? p.k : p.v) + (slot * stride[0] + head * stride[1]) * kElement;
      const uint32_t to = shared_address(shared) + (2 * stage + i) * C::kTileBytes;
#pragma unroll 4
      for (int item = threadIdx.x; item < C::kSlots * kChunks; item += C::kConsumers) {
        const int r = item / kChunks, chunk = item % kChunks;
        const bool inside = r < valid && chunk * 16 < p.head_size * kElement;
        copy16_async(to + swizzle(r * C::kRowBytes + chunk * 16),
                     from + (inside ? r * stride[0] * kElement + chunk * 16 : 0), inside);
      }
      if constexpr (C::kEightBit) {
        const float* const scale = i == 0 ? scales->key : scales->value;
        const int64_t* const scale_stride = i == 0 ? scales->key_stride : scales->value_stride;
        for (int r = threadIdx.x; r < C::kSlots; r += C::kConsumers) {
          copy4_async(shared_address(shared) + C::kScaleOffset + (2 * stage + i) * C::kScaleBytes + r * 4,
                      scale + (slot + (r < valid ? r : 0)) * scale_stride[0] + head * scale_stride[1], r < valid);
        }
      }
    }
    commit_copies();
    --left;
    if (++stage == C::kStages) stage = 0;
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    attend(const __grid_constant__ InjectedAttentionParams p,
           const __grid_constant__ std::conditional_t<C::kBulk, BulkMaps, Nothing> maps,
           const __grid_constant__ std::conditional_t<C::kEightBit, Scales, Nothing> scales, uint64_t hint,
           bool awaited) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr bool kCompiled = true;
  // the merging kernel may become resident beside this one and wait
  if (!C::kMayAwait || !awaited) let_next_kernel_start();
#else
  constexpr bool kCompiled = !C::kBulk;
#endif
  if constexpr (kCompiled) {
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ PlaceScan scan;
    uint8_t* const queries_shared = shared + C::kRingBytes;
    float* const tile_scales = reinterpret_cast<float*>(shared + C::kScaleOffset);
    float* const statistics = reinterpret_cast<float*>(shared + C::kStatisticsOffset);
    float* const row_largest = reinterpret_cast<float*>(shared + C::kRowScaleOffset);
    uint64_t* const full = reinterpret_cast<uint64_t*>(shared + C::kBarrierOffset);  // keys and values alternate
    uint64_t* const empty = full + 2 * C::kStages;
    uint64_t* const queries_issued = empty + 2 * C::kStages;
    uint64_t* const marked = queries_issued + 1;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.x % p.kv_heads, worker = blockIdx.x / p.kv_heads;
    const uint32_t group = static_cast<uint32_t>(p.q_heads) / static_cast<uint32_t>(p.kv_heads);

    // A single row usually reads all slots: the first block is requested before the row's slots are known.
    int32_t guess = -1;
    if (C::kMayAwait && !C::kEightBit && awaited) {
      const uint32_t units = (static_cast<uint32_t>(p.num_slots) + C::kSlots - 1) / C::kSlots;
      const uint32_t first = (units + p.splits - 1) / p.splits * worker;
      if (first < units) guess = static_cast<int32_t>(first * C::kSlots);
    }

    if constexpr (C::kBulk) {
      if (threadIdx.x == C::kConsumers) {
        prefetch_tensor_map(&maps.key);
        prefetch_tensor_map(&maps.value);
#pragma unroll 1
        for (int i = 0; i < 2 * C::kStages; ++i) {
          barrier_init(full + i, C::kEightBit ? 33 : 1);
          barrier_init(empty + i, C::kWarps);
        }
        barrier_init(queries_issued, C::kWarps);
        barrier_init(marked, 1);
        barrier_init_fence();
        if (guess >= 0) {
#pragma unroll 1
          for (int i = 0; i < 2; ++i) {
            barrier_arrive_expect(full + i, C::kTileBytes);
            tensor_load_4d(shared + i * C::kTileBytes, i == 0 ? &maps.key : &maps.value, full + i, 0, 0, head, guess,
                           hint);
          }
        }
      }
    }
    uint64_t begin = 0, count = 0;
    const Place place = find_place<C::kRows, C::kSlots, C::kThreads, false>(p, group, scan, [&](uint64_t units) {
      const uint64_t share = worker_share(units, p.splits);
      begin = share * worker;
      count = begin < units ? (units - begin < share ? units - begin : share) : 0;
      return begin;
    });
    Walk<C::kRows, C::kSlots> walk;
    walk.begin(place, group, begin, count);
    // stage 0 holds a wrong guess
    bool missed = guess >= 0 && (count == 0 || place.span.slot_count == 0 ||
                                 place.span.slot_begin + static_cast<int32_t>(walk.first * C::kSlots) != guess);
    if constexpr (C::kBulk) {
      // the consumers see the producer's barriers
      if (warp == C::kWarps) {
        named_barrier_arrive(kStartBarrier, C::kThreads);
      } else {
        named_barrier_sync(kStartBarrier, C::kThreads);
      }
    }

    if constexpr (C::kBulk) {
      if (warp == C::kWarps) {
        if (!C::kEightBit && lane != 0) {
          if (C::kMayAwait && awaited && count > 0) mark_absent<C>(p, group, head, worker, 1, marked);
          return;
        }
        int stage = missed ? 1 : 0;
        bool loaded = guess >= 0 && !missed;
        uint32_t phase = 1;
        bool first = true;
        while (walk.next(p, group)) {
          if (walk.span.slot_count == 0) continue;
          int32_t slot = walk.span.slot_begin + static_cast<int32_t>(walk.first * C::kSlots);
#pragma unroll 1
          for (uint32_t n = 0; n < walk.count; ++n, slot += C::kSlots) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              uint64_t* const barrier = full + 2 * stage + i;
              // A block guessed right already has its stage. The consumers may have finished with it by now: waiting
              // for an empty stage would be waiting for its next use.
              if (!loaded) barrier_wait(empty + 2 * stage + i, phase);
              if ((!C::kEightBit || lane == 0) && !loaded) {
                barrier_arrive_expect(barrier, C::kTileBytes);
                tensor_load_4d(shared + (2 * stage + i) * C::kTileBytes, i == 0 ? &maps.key : &maps.value, barrier, 0,
                               0, head, slot, hint);
              }
              if constexpr (C::kEightBit) {
                const float* const from =
                    i == 0 ? scales.key + head * scales.key_stride[1] : scales.value + head * scales.value_stride[1];
                const int64_t stride = i == 0 ? scales.key_stride[0] : scales.value_stride[0];
#pragma unroll
                for (int r = lane; r < C::kSlots; r += 32) {
                  const bool inside = slot + r < p.num_slots;
                  copy4_async(shared_address(tile_scales + (2 * stage + i) * C::kSlots + r),
                              from + (inside ? slot + r : 0) * stride, inside);
                }
                barrier_arrive_after_copies(barrier);
              }
            }
            if (++stage == C::kStages) {
              stage = 0;
              phase ^= 1;
            }
            // the queries' loads go first: queued after a full ring they would take as long as the ring
            loaded = false;
            if (C::kEightBit && C::kMayAwait && awaited && first) {
              mark_absent<C>(p, group, head, worker, 0, marked);
            }
            if (first) barrier_wait(queries_issued, 0);
            first = false;
          }
        }
        // no slots, no block
        if (C::kEightBit && C::kMayAwait && awaited && first && count > 0) {
          mark_absent<C>(p, group, head, worker, 0, marked);
        }
        return;
      }
    }

    // a negative scale negates the queries, so that the largest score is always the best one; a scale of 0 makes them 0
    const float full_scale_log2 = (p.scale == 0 ? 1.0f : fabsf(p.scale)) * kLog2E;
    const float query_factor = p.scale == 0 ? 0.0f : p.scale < 0 ? -1.0f : 1.0f;
    // 8-bit scores are already scaled
    const float scale_log2 = C::kEightBit ? 1.0f : full_scale_log2;
    const int row_warp = warp / C::kSlotWarps;
    int stage = 0;
    uint32_t phase = 0;
    bool first = true;
    const auto skip_missed = [&] {
      if (!missed) return;
      barrier_wait(full, 0);
      barrier_wait(full + 1, 0);
      // all lanes have seen this phase before the next one can come
      __syncwarp();
      if (lane == 0) {
        barrier_arrive(empty);
        barrier_arrive(empty + 1);
      }
      missed = false;
      stage = 1;
    };
    Loader<C> loader{walk};
    const Scales* loader_scales = nullptr;
    if constexpr (C::kEightBit) loader_scales = &scales;
    if constexpr (!C::kBulk) {
#pragma unroll 1
      for (int i = 0; i < C::kStages - 1; ++i) loader.next(p, loader_scales, group, head, shared);
    }

#pragma unroll 1
    while (walk.next(p, group)) {
      load_queries<C>(p, walk.span, walk.tile, group, head, queries_shared, query_factor, row_largest,
                      C::kBulk && first ? queries_issued : nullptr);
      if constexpr (C::kBulk) {
        first = false;
      }
      sync_consumers<C::kConsumers>();
      if constexpr (C::kBulk) skip_missed();
      const Queries<C> queries(shared_address(queries_shared), row_warp * C::kWarpRows);
      float row_scale[C::kRowTiles][2];
      if constexpr (C::kEightBit) {
#pragma unroll
        for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int r = row_warp * C::kWarpRows + n * 8 + lane % 4 * 2 + i;
            row_scale[n][i] = query_divisor(row_largest[r]) * full_scale_log2;
          }
        }
      }
      WarpState<C> state;
      state.clear();
      int valid = walk.span.slot_count - static_cast<int>(walk.first * C::kSlots);
      // a row without slots has one block, and nothing in it
      const uint32_t blocks = walk.span.slot_count == 0 ? 0 : walk.count;
#pragma unroll 1
      for (uint32_t n = 0; n < blocks; ++n, valid -= C::kSlots) {
        const uint32_t keys = shared_address(shared) + 2 * stage * C::kTileBytes, values = keys + C::kTileBytes;
        Scores<C> s;
        if constexpr (C::kBulk) {
          barrier_wait(full + 2 * stage, phase);
        } else {
          wait_copies<C::kStages - 2>();
          sync_consumers<C::kConsumers>();
          loader.next(p, loader_scales, group, head, shared);
        }
        multiply_keys<C>(keys, queries, s);
        if constexpr (C::kEightBit) scale_scores<C>(tile_scales + 2 * stage * C::kSlots, row_scale, s);
        if (valid < C::kSlots) mask_scores<C>(valid, s);
        float value_scales[C::kSlotTiles][2];
        if constexpr (C::kEightBit) {
          if constexpr (C::kBulk) barrier_wait(full + 2 * stage + 1, phase);
#pragma unroll
          for (int t = 0; t < C::kSlotTiles; ++t) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int slot = warp_slot<C>() + t * 16 + lane / 4 + 8 * j;
              value_scales[t][j] = slot < valid ? tile_scales[(2 * stage + 1) * C::kSlots + slot] : 0.0f;
            }
          }
        }
        weigh<C>(s, state, scale_log2, value_scales);
        if constexpr (C::kBulk) {
          // An arrival does not wait for loads on their way from shared memory to registers. These keys have arrived,
          // since the vote on their scores is over, and with them the values of the previous block.
          if (lane == 0) {
            barrier_arrive(empty + 2 * stage);
            if (n > 0) barrier_arrive(empty + 2 * (stage > 0 ? stage : C::kStages) - 1);
          }
          __syncwarp();
        }
        if constexpr (C::kBulk && !C::kEightBit) barrier_wait(full + 2 * stage + 1, phase);
        multiply_values<C>(values, valid, s, state);
        if (++stage == C::kStages) {
          stage = 0;
          phase ^= 1;
        }
      }
      if (C::kMayAwait && awaited) barrier_wait(marked, 0);
      finish_segment<C>(p, walk, group, head, worker, scale_log2, state, reinterpret_cast<float*>(queries_shared),
                        statistics);
      if constexpr (C::kBulk) {
        if (blocks > 0 && lane == 0) barrier_arrive(empty + 2 * (stage > 0 ? stage : C::kStages) - 1);
      }
    }
    // copies must not outlive the block
    if constexpr (C::kBulk) skip_missed();
  }
}

}  // namespace decode
}  // namespace sharedllm

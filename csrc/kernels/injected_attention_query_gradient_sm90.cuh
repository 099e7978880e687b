// dq alone on Hopper: tiles of query rows stay in shared memory, keys and values stream past them.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common/hopper_backward.cuh"
#include "kernels/common/tensor_map.h"
#include "kernels/injected_attention_backward_sm90.h"

namespace sharedllm {

#ifndef SLOTS128
#define SLOTS128 96
#endif
constexpr int kSlots128 = SLOTS128;
template <int kHeadSize>
struct QueryGradientTile {
  static constexpr int kPanels = (kHeadSize + 63) / 64;
  // The score tiles S and dP, the sums of dQ and the packed dS together stay below 232 registers a thread.
  static constexpr int kSlots = kHeadSize == 64 ? 128 : kHeadSize <= 128 ? kSlots128 : 64;
  static constexpr int kWarpgroups = 2;
  // A value tile is free once dP is there, a key tile only after dQ: with a head size of 256 there is room for three.
  static constexpr int kKeyBuffers = kHeadSize == 64 ? 3 : 2;
  static constexpr int kValueBuffers = kHeadSize == 64 ? 3 : kHeadSize == 256 ? 1 : 2;
  static constexpr int kQueryPanelBytes = kTileRows * 128, kQueryBytes = kPanels * kQueryPanelBytes;
  static constexpr int kSlotPanelBytes = kSlots * 128, kSlotBytes = kPanels * kSlotPanelBytes;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kBarriers = kWarpgroups + 2 * kKeyBuffers + 2 * kValueBuffers + 1;
  static constexpr int kSharedBytes =
      2 * kWarpgroups * kQueryBytes + (kKeyBuffers + kValueBuffers) * kSlotBytes + 8 * kBarriers + sizeof(RowTile);
};

// The sums of one warpgroup go through shared memory (64 rows of kHeadSize floats) to be scaled and rotated back in
// vectors of 8 columns, whatever the rotary width is. Its chunks of 4 are swizzled against bank conflicts.
template <class T, int kHeadSize>
__device__ __forceinline__ void store_query_gradient(const InjectedAttentionBackwardParams& p, const RowTile& row,
                                                     const QueryTiling& tiling, int64_t first_query, int first_head,
                                                     int valid_heads, const float (&sums)[kHeadSize / 2],
                                                     float* staging, int barrier) {
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  const auto place = [](int r, int chunk) { return r * kHeadSize + 4 * (chunk ^ ((r & 3) << 1)); };
#pragma unroll
  for (int i = 0; i < kHeadSize / 8; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = thread / 32 * 16 + lane / 4 + 8 * half;
      const int column = 8 * i + 2 * (lane % 4);
      *reinterpret_cast<float2*>(staging + place(r, column / 4) + column % 4) =
          make_float2(sums[4 * i + 2 * half] * p.forward.scale, sums[4 * i + 2 * half + 1] * p.forward.scale);
    }
  }
  named_barrier_sync(barrier, 128);

  const int half = p.forward.rotary_half;
  const float* cos = p.forward.cos + row.position * half;
  const float* sin = p.forward.sin + row.position * half;
  constexpr int kVectors = kHeadSize / 8;
  for (int index = thread; index < kTileRows * kVectors; index += 128) {
    const int r = index / kVectors, column = index % kVectors * 8;
    const int64_t query = first_query + r / tiling.heads;
    if (r >= tiling.heads * tiling.queries || query >= row.q_begin + row.q_count || r % tiling.heads >= valid_heads) {
      continue;
    }
    float x[8];
#pragma unroll
    for (int e = 0; e < 8; e += 4) {
      const float4 four = *reinterpret_cast<const float4*>(staging + place(r, (column + e) / 4));
      x[e] = four.x, x[e + 1] = four.y, x[e + 2] = four.z, x[e + 3] = four.w;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int c = column + e;
      if (c < 2 * half) {
        const bool low = c < half;
        const int pair = low ? c : c - half, other = low ? c + half : pair;
        const float y = staging[place(r, other / 4) + other % 4];
        x[e] = low ? x[e] * cos[pair] + y * sin[pair] : x[e] * cos[pair] - y * sin[pair];
      }
    }
    const T type{};
    const uint4 packed =
        make_uint4(pack(type, x[0], x[1]), pack(type, x[2], x[3]), pack(type, x[4], x[5]), pack(type, x[6], x[7]));
    T* to =
        static_cast<T*>(p.grad_q) + (query * p.forward.q_heads + first_head + r % tiling.heads) * kHeadSize + column;
    *reinterpret_cast<uint4*>(to) = packed;
  }
}

template <class T, int kHeadSize>
__global__ __launch_bounds__(QueryGradientTile<kHeadSize>::kThreads, 1) void query_gradient_kernel(
    const __grid_constant__ InjectedAttentionBackwardParams p, const __grid_constant__ QueryTiling tiling,
    const __grid_constant__ int64_t tiles, const __grid_constant__ CUtensorMap query_map,
    const __grid_constant__ CUtensorMap grad_out_map, const __grid_constant__ CUtensorMap key_map,
    const __grid_constant__ CUtensorMap value_map) {
  using Tile = QueryGradientTile<kHeadSize>;
  constexpr int kSlots = Tile::kSlots;
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t* const key_tiles = shared + 2 * Tile::kWarpgroups * Tile::kQueryBytes;
  uint8_t* const value_tiles = key_tiles + Tile::kKeyBuffers * Tile::kSlotBytes;
  uint64_t* const query_full = reinterpret_cast<uint64_t*>(value_tiles + Tile::kValueBuffers * Tile::kSlotBytes);
  uint64_t* const key_full = query_full + Tile::kWarpgroups;
  uint64_t* const key_empty = key_full + Tile::kKeyBuffers;
  uint64_t* const value_full = key_empty + Tile::kKeyBuffers;
  uint64_t* const value_empty = value_full + Tile::kValueBuffers;
  uint64_t* const partial_key = value_empty + Tile::kValueBuffers;

  const int64_t virtual_head = blockIdx.x / tiles;
  const int kv_head = static_cast<int>(virtual_head / tiling.chunks);
  const int chunk = static_cast<int>(virtual_head % tiling.chunks);
  const int group = p.forward.q_heads / p.forward.kv_heads;
  // in shared memory, since the loop leaves no registers for it
  RowTile& row = *reinterpret_cast<RowTile*>(partial_key + 1);
  // the same in all lanes, which the compiler cannot see
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);

  if (threadIdx.x < 32) {
    const RowTile found =
        find_row_tile(p.forward, blockIdx.x - virtual_head * tiles, Tile::kWarpgroups * tiling.queries * group);
    if (threadIdx.x == 0) row = found;
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kWarpgroups; ++i) barrier_init(query_full + i, 1);
    for (int i = 0; i < Tile::kKeyBuffers; ++i) {
      barrier_init(key_full + i, 1);
      barrier_init(key_empty + i, 4 * Tile::kWarpgroups);
    }
    for (int i = 0; i < Tile::kValueBuffers; ++i) {
      barrier_init(value_full + i, 1);
      barrier_init(value_empty + i, 4 * Tile::kWarpgroups);
    }
    barrier_init(partial_key, 1);
    barrier_init_fence();
  }
  __syncthreads();
  if (row.row < 0) return;
  const int steps = static_cast<int>((row.slot_count + kSlots - 1) / kSlots);

  if (warpgroup == 0) {
    lower_registers<24>();
    if (threadIdx.x >= 32 || steps == 0) return;
    const bool leader = threadIdx.x == 0;
    if (leader) {
      const uint32_t bytes = 2 * Tile::kPanels * 128 * tiling.heads * tiling.queries;
      for (int w = 0; w < Tile::kWarpgroups; ++w) {
        uint8_t* const to = shared + 2 * w * Tile::kQueryBytes;
        const int32_t query = static_cast<int32_t>(row.q_begin + (row.tile * Tile::kWarpgroups + w) * tiling.queries);
        barrier_arrive_expect(query_full + w, bytes);
        for (int panel = 0; panel < Tile::kPanels; ++panel) {
          tensor_load_4d(to + panel * Tile::kQueryPanelBytes, &query_map, query_full + w, 64 * panel,
                         chunk * tiling.heads, kv_head, query, kEvictFirst);
          tensor_load_4d(to + Tile::kQueryBytes + panel * Tile::kQueryPanelBytes, &grad_out_map, query_full + w,
                         64 * panel, chunk * tiling.heads, kv_head, query, kEvictFirst);
        }
      }
    }
    int key_buffer = 0, value_buffer = 0;
    uint32_t key_phase = 1, value_phase = 1;
    for (int step = 0; step < steps; ++step) {
      const int64_t done = static_cast<int64_t>(step) * kSlots;
      const int32_t slot = static_cast<int32_t>(row.slot_begin + done);
      const int valid = static_cast<int>(row.slot_count - done < kSlots ? row.slot_count - done : kSlots);
      uint8_t* const keys = key_tiles + key_buffer * Tile::kSlotBytes;
      barrier_wait(key_empty + key_buffer, key_phase);
      uint64_t* const arrival = valid == kSlots ? key_full + key_buffer : partial_key;
      if (leader) {
        barrier_arrive_expect(arrival, Tile::kSlotBytes);
        for (int panel = 0; panel < Tile::kPanels; ++panel) {
          tensor_load_3d(keys + panel * Tile::kSlotPanelBytes, &key_map, arrival, 64 * panel, kv_head, slot,
                         kEvictLast);
        }
        barrier_wait(value_empty + value_buffer, value_phase);
        uint8_t* const values = value_tiles + value_buffer * Tile::kSlotBytes;
        barrier_arrive_expect(value_full + value_buffer, Tile::kSlotBytes);
        for (int panel = 0; panel < Tile::kPanels; ++panel) {
          tensor_load_3d(values + panel * Tile::kSlotPanelBytes, &value_map, value_full + value_buffer, 64 * panel,
                         kv_head, slot, kEvictLast);
        }
      }
      if (valid < kSlots) {
        // Slots behind the range may hold NaN, and 0 * NaN would reach dQ. Only the last tile is partial.
        barrier_wait(partial_key, 0);
        zero_rows(keys, Tile::kPanels, Tile::kSlotPanelBytes, valid, kSlots);
        async_proxy_fence();
        __syncwarp();
        if (leader) barrier_arrive(key_full + key_buffer);
      }
      __syncwarp();
      if (++key_buffer == Tile::kKeyBuffers) key_buffer = 0, key_phase ^= 1;
      if (++value_buffer == Tile::kValueBuffers) value_buffer = 0, value_phase ^= 1;
    }
  } else {
    raise_registers<240>();
    const int w = warpgroup - 1, thread = threadIdx.x % 128, lane = threadIdx.x % 32;
    uint8_t* const queries = shared + 2 * w * Tile::kQueryBytes;
    const auto first_query = [&]() {
      return row.q_begin + (row.tile * Tile::kWarpgroups + w) * static_cast<int64_t>(tiling.queries);
    };
    const int first_head = kv_head * group + chunk * tiling.heads;
    const int valid_heads = min(tiling.heads, group - chunk * tiling.heads);

    float lse[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = thread / 32 * 16 + lane / 4 + 8 * half;
      const int64_t query = first_query() + r / tiling.heads;
      const bool valid =
          r < tiling.heads * tiling.queries && query < row.q_begin + row.q_count && r % tiling.heads < valid_heads;
      const int64_t at = query * p.forward.q_heads + first_head + r % tiling.heads;
      lse[half] = valid ? p.lse_log2[at] : 0.f;
      delta[half] = valid ? p.delta[at] : 0.f;
    }

    float sums[kHeadSize / 2];
#pragma unroll
    for (int i = 0; i < kHeadSize / 2; ++i) sums[i] = 0.f;

    if (steps > 0) {
      const float scale = p.forward.scale * 1.4426950408889634f;
      float scores[kSlots / 2], products[kSlots / 2];
      uint32_t packed[kSlots / 4];
      const uint64_t query_operand = swizzled_operand(queries, 16, 1024);
      const uint64_t grad_out_operand = swizzled_operand(queries + Tile::kQueryBytes, 16, 1024);
      const uint64_t key_operand = swizzled_operand(key_tiles, 16, 1024);
      const uint64_t value_operand = swizzled_operand(value_tiles, 16, 1024);
      const uint64_t key_rows = swizzled_operand(key_tiles, Tile::kSlotPanelBytes, 1024);

      int key_buffer = 0, value_buffer = 0;
      uint32_t key_phase = 0, value_phase = 0;

      // scores of a tile of slots: A and B both contract over the head size
      const auto multiply_rows = [&](uint64_t a, uint64_t b, float (&c)[kSlots / 2]) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kHeadSize / 16; ++k) {
          multiply<T, kSlots, Major::K>(a + (k / 4 * Tile::kQueryPanelBytes + k % 4 * 32) / 16,
                                        b + (k / 4 * Tile::kSlotPanelBytes + k % 4 * 32) / 16, c, k != 0);
        }
        wgmma_commit();
      };
      // scores in flight become dS, packed as an A operand
      const auto differentiate = [&](bool last) {
        const int valid = static_cast<int>(row.slot_count - static_cast<int64_t>(steps - 1) * kSlots) - 2 * (lane % 4);
        wgmma_wait<1>();
        fence_registers(scores);
        if (last) {
#pragma unroll
          for (int i = 0; i < kSlots / 2; ++i) {
            if (i / 4 * 8 + i % 2 >= valid) scores[i] = -INFINITY;
          }
        }
#pragma unroll
        for (int i = 0; i < kSlots / 2; ++i) {
          scores[i] = exp2_approximate(fmaf(scores[i], scale, -lse[i / 2 % 2]));
        }
        wgmma_wait<0>();
        fence_registers(products);
        if (lane == 0) barrier_arrive(value_empty + value_buffer);
        if (last) {
#pragma unroll
          for (int i = 0; i < kSlots / 2; ++i) {
            if (i / 4 * 8 + i % 2 >= valid) products[i] = 0.f;
          }
        }
#pragma unroll
        for (int i = 0; i < kSlots / 2; i += 2) {
          packed[i / 2] = pack(T{}, scores[i] * (products[i] - delta[i / 2 % 2]),
                               scores[i + 1] * (products[i + 1] - delta[i / 2 % 2]));
        }
      };
      const auto accumulate = [&](int buffer) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kSlots / 16; ++k) {
          multiply<T, kHeadSize, Major::MN>(packed + 4 * k, key_rows + (buffer * Tile::kSlotBytes + k * 2048) / 16,
                                            sums, true);
        }
        wgmma_commit();
      };

      // dQ of the last tile of slots, and behind it the scores of the next, so that the tensor cores do not wait for
      // the exponentials. No product is in flight across the loop's end: ptxas would run all of them one by one.
      const auto advance = [&](bool last) {
        accumulate(key_buffer);
        const int done_buffer = key_buffer;
        if (++key_buffer == Tile::kKeyBuffers) key_buffer = 0, key_phase ^= 1;
        if (++value_buffer == Tile::kValueBuffers) value_buffer = 0, value_phase ^= 1;
        barrier_wait(key_full + key_buffer, key_phase);
        multiply_rows(query_operand, key_operand + key_buffer * (Tile::kSlotBytes / 16), scores);
        barrier_wait(value_full + value_buffer, value_phase);
        multiply_rows(grad_out_operand, value_operand + value_buffer * (Tile::kSlotBytes / 16), products);
        wgmma_wait<2>();
        if (lane == 0) barrier_arrive(key_empty + done_buffer);
        differentiate(last);
      };

      barrier_wait(query_full + w, 0);
      barrier_wait(key_full, 0);
      multiply_rows(query_operand, key_operand, scores);
      barrier_wait(value_full, 0);
      multiply_rows(grad_out_operand, value_operand, products);
      differentiate(steps == 1);
      for (int step = 1; step + 1 < steps; ++step) advance(false);
      if (steps > 1) advance(true);
      accumulate(key_buffer);
      wgmma_wait<0>();
      fence_registers(sums);
      // every warp's products have read the queries that the staging overwrites
      named_barrier_sync(1 + w, 128);
    }
    store_query_gradient<T, kHeadSize>(p, row, tiling, first_query(), first_head, valid_heads, sums,
                                       reinterpret_cast<float*>(queries), 1 + w);
  }
}

template <class T, int kHeadSize>
cudaError_t launch_query_gradient(const InjectedAttentionBackwardParams& params, cudaStream_t stream) {
  using Tile = QueryGradientTile<kHeadSize>;
  const InjectedAttentionParams& forward = params.forward;
  const int group = forward.q_heads / forward.kv_heads;
  const QueryTiling tiling = make_query_tiling(group);
  BackwardTensorMaps maps;
  cudaError_t status = encode_backward_maps(&maps, params, tiling, Tile::kSlots);
  if (status != cudaSuccess) return status;
  // rows of the batch end in partial tiles, hence one more for each
  const int64_t block_queries = Tile::kWarpgroups * tiling.queries;
  const int64_t tiles = (forward.num_queries + block_queries - 1) / block_queries + forward.num_rows;
  const int64_t blocks = tiles * forward.kv_heads * tiling.chunks;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  auto* const kernel = query_gradient_kernel<T, kHeadSize>;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
  if (status != cudaSuccess) return status;
  kernel<<<static_cast<unsigned>(blocks), Tile::kThreads, Tile::kSharedBytes, stream>>>(
      params, tiling, tiles, maps.query, maps.grad_out, maps.key, maps.value);
  return cudaGetLastError();
}

}  // namespace sharedllm

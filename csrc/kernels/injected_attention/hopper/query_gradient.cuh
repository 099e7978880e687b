// dq alone on Hopper (WGMMA, TMA, producer and consumer warps): tiles of query rows stay in shared memory, keys and
// values stream past them.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/common/instances.h"
#include "kernels/common/softmax.cuh"
#include "kernels/common/vector_load.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/injected_attention/hopper/backward.h"
#include "kernels/injected_attention/hopper/backward_tiles.cuh"

namespace sharedllm {

template <int kHeadSize>
struct QueryGradientTile {
  static constexpr int kPanels = (kHeadSize + 63) / 64;
  // The score tiles S and dP, the sums of dQ and the packed dS together have to stay below about 200 registers per
  // thread.
  static constexpr int kSlots = kHeadSize == 64 ? 128 : kHeadSize <= 128 ? 96 : 64;
  static constexpr int kWarpgroups = 2;
  // The next tile's queries arrive while the last tile's are in use, where there is room.
  static constexpr int kQueryBuffers = kHeadSize == 256 ? 1 : 2;
  // A value tile is free once dP is complete, a key tile only after dQ: with a head size of 256 there is room for
  // three.
  static constexpr int kKeyBuffers = kHeadSize == 64 ? 3 : 2;
  static constexpr int kValueBuffers = kHeadSize == 64 ? 3 : kHeadSize == 256 ? 1 : 2;
  static constexpr int kQueryPanelBytes = kTileRows * 128, kQueryBytes = kPanels * kQueryPanelBytes;
  static constexpr int kSlotPanelBytes = kSlots * 128, kSlotBytes = kPanels * kSlotPanelBytes;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  // together the 504 registers that a block of 384 threads starts with
  static constexpr int kConsumerRegisters = kHeadSize < 256 ? 232 : 240,
                       kProducerRegisters = 504 - 2 * kConsumerRegisters;
  static constexpr int kBarriers = 2 * (kWarpgroups * kQueryBuffers + kKeyBuffers + kValueBuffers) + 1;
};

// What the consumers have to know of a tile. The ring is longer than that of the queries: a tile's queries are free
// before its gradients are written.
struct QueryGradientStep {
  int64_t position;
  int32_t first_query, end_query;  // of the block's first warpgroup, of the batch row
  int32_t head, heads;             // first query head, heads of the tile
  int32_t slots;                   // of the batch row; 0 ends the sequence
};
constexpr int kQueryGradientSteps = 4;

template <int kHeadSize>
constexpr int query_gradient_shared_bytes() {
  using Tile = QueryGradientTile<kHeadSize>;
  return 2 * Tile::kQueryBuffers * Tile::kWarpgroups * Tile::kQueryBytes +
         (Tile::kKeyBuffers + Tile::kValueBuffers) * Tile::kSlotBytes + 8 * Tile::kBarriers +
         kQueryGradientSteps * sizeof(QueryGradientStep);
}

// Rotates the sums of a warpgroup back and writes them. The pairs (i, i + R/2) are in one thread, since R is a multiple
// of 32. `sums` is shifted by R/2 columns for that, in powers of two, because a register's index has to be constant.
template <class T, int kHeadSize>
__device__ __forceinline__ void store_query_gradient(const InjectedAttentionBackwardParams& p,
                                                     const QueryGradientStep& step, int first_query, int heads,
                                                     int rows, const float (&sums)[kHeadSize / 2]) {
  constexpr int kGroups = kHeadSize / 8;
  const int lane = threadIdx.x % 32;
  const int half_groups = p.forward.rotary_half / 8;
  const int offset = lane % 2 * 8 + lane % 4 / 2 * 4;
  const float* const cos = p.forward.cos + step.position * p.forward.rotary_half + offset;
  const float* const sin = p.forward.sin + step.position * p.forward.rotary_half + offset;
  const auto scaled = [&](float4 x) {
    return make_float4(x.x * p.forward.scale, x.y * p.forward.scale, x.z * p.forward.scale, x.w * p.forward.scale);
  };
  const auto write = [&](T* to, float4 x) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack_pair(T{}, x.x, x.y), pack_pair(T{}, x.z, x.w));
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = threadIdx.x % 128 / 32 * 16 + lane / 4 + 8 * half;
    const int query = first_query + r / heads, head = r % heads;
    const bool valid = r < rows && query < step.end_query && head < step.heads;
    T* const to = static_cast<T*>(p.grad_q) +
                  (static_cast<int64_t>(query) * p.forward.q_heads + step.head + head) * kHeadSize + offset;
    // pairs of columns of this row, R/2 columns further
    float y[2 * kGroups];
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) y[i] = sums[i / 2 * 4 + 2 * half + i % 2];
#pragma unroll
    for (int b = 0; b < 5; ++b) {
#pragma unroll
      for (int i = 0; i < 2 * kGroups; ++i) {
        if (i + (2 << b) < 2 * kGroups) y[i] = half_groups >> b & 1 ? y[i + (2 << b)] : y[i];
      }
    }
#pragma unroll
    for (int j = 0; j < kGroups; j += 2) {
      const int i = 4 * j + 2 * half;
      const float4 low = scaled(exchange_pairs(sums[i], sums[i + 1], sums[i + 4], sums[i + 5]));
      if (j < kGroups / 2) {
        const float4 high = scaled(exchange_pairs(y[2 * j], y[2 * j + 1], y[2 * j + 2], y[2 * j + 3]));
        if (j < half_groups) {
          const float4 c = *reinterpret_cast<const float4*>(cos + 8 * j);
          const float4 s = *reinterpret_cast<const float4*>(sin + 8 * j);
          if (valid) {
            write(to + 8 * j, make_float4(low.x * c.x + high.x * s.x, low.y * c.y + high.y * s.y,
                                          low.z * c.z + high.z * s.z, low.w * c.w + high.w * s.w));
            write(to + 8 * (j + half_groups), make_float4(high.x * c.x - low.x * s.x, high.y * c.y - low.y * s.y,
                                                          high.z * c.z - low.z * s.z, high.w * c.w - low.w * s.w));
          }
        }
      }
      if (valid && j >= 2 * half_groups) write(to + 8 * j, low);
    }
  }
}

template <class T, int kHeadSize>
__global__ __launch_bounds__(QueryGradientTile<kHeadSize>::kThreads, 1) void query_gradient_kernel(
    const __grid_constant__ InjectedAttentionBackwardParams p, const __grid_constant__ QueryTiling tiling,
    const __grid_constant__ int tiles, const __grid_constant__ int total, const __grid_constant__ CUtensorMap query_map,
    const __grid_constant__ CUtensorMap grad_out_map, const __grid_constant__ CUtensorMap key_map,
    const __grid_constant__ CUtensorMap value_map) {
  using Tile = QueryGradientTile<kHeadSize>;
  constexpr int kSlots = Tile::kSlots;
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t* const key_tiles = shared + 2 * Tile::kQueryBuffers * Tile::kWarpgroups * Tile::kQueryBytes;
  uint8_t* const value_tiles = key_tiles + Tile::kKeyBuffers * Tile::kSlotBytes;
  uint64_t* const query_full = reinterpret_cast<uint64_t*>(value_tiles + Tile::kValueBuffers * Tile::kSlotBytes);
  uint64_t* const query_empty = query_full + Tile::kWarpgroups * Tile::kQueryBuffers;
  uint64_t* const key_full = query_empty + Tile::kWarpgroups * Tile::kQueryBuffers;
  uint64_t* const key_empty = key_full + Tile::kKeyBuffers;
  uint64_t* const value_full = key_empty + Tile::kKeyBuffers;
  uint64_t* const value_empty = value_full + Tile::kValueBuffers;
  uint64_t* const partial_key = value_empty + Tile::kValueBuffers;
  QueryGradientStep* const ring = reinterpret_cast<QueryGradientStep*>(partial_key + 1);
  // queries, and after them output gradients, of a buffer and a warpgroup
  const auto query_tile = [&](int buffer, int w) {
    return shared + 2 * (buffer * Tile::kWarpgroups + w) * Tile::kQueryBytes;
  };

  // named barriers of the ping-pong, one for each warpgroup
  enum Barrier : int { kTurnBarrier = 1 };
  // the same in all lanes, which the compiler cannot see
  const int warpgroup = __shfl_sync(kFullWarp, threadIdx.x / 128, 0);

  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kWarpgroups * Tile::kQueryBuffers; ++i) {
      barrier_init(query_full + i, 1);
      barrier_init(query_empty + i, 128);
    }
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

  if (warpgroup == 0) {
    lower_registers<Tile::kProducerRegisters>();
    if (threadIdx.x >= 32) return;
    const int lane = threadIdx.x;
    const bool leader = lane == 0;
    const int group = p.forward.q_heads / p.forward.kv_heads;
    int key_buffer = 0, value_buffer = 0, query_buffer = 0, ring_index = 0;
    uint32_t key_phase = 1, value_phase = 1, query_phase = 1, partial_phase = 0;
    for (int index = blockIdx.x; index < total; index += gridDim.x) {
      const int virtual_head = index / tiles;
      const RowTile row = find_row_tile(p.forward, index % tiles, Tile::kWarpgroups * tiling.queries * group);
      if (row.row < 0) continue;
      const int kv_head = virtual_head / tiling.chunks, chunk = virtual_head % tiling.chunks;
      QueryGradientStep step;
      step.position = row.position;
      step.first_query = static_cast<int>(row.q_begin + row.tile * (Tile::kWarpgroups * tiling.queries));
      step.end_query = static_cast<int>(row.q_begin + row.q_count);
      step.head = kv_head * group + chunk * tiling.heads;
      step.heads = min(tiling.heads, group - chunk * tiling.heads);
      step.slots = static_cast<int>(row.slot_count);
      if (step.slots == 0) {
        const int queries = min(step.end_query - step.first_query, Tile::kWarpgroups * tiling.queries);
        for (int r = 0; r < queries * step.heads; ++r) {
          T* const to =
              static_cast<T*>(p.grad_q) + (static_cast<int64_t>(step.first_query + r / step.heads) * p.forward.q_heads +
                                           step.head + r % step.heads) *
                                              kHeadSize;
          if (lane < kHeadSize / 8) *reinterpret_cast<uint4*>(to + lane * 8) = uint4{};
        }
        continue;
      }

      for (int w = 0; w < Tile::kWarpgroups; ++w) {
        barrier_wait(query_empty + query_buffer * Tile::kWarpgroups + w, query_phase);
      }
      if (leader) {
        ring[ring_index] = step;
        const uint32_t bytes = 2 * Tile::kPanels * 128 * tiling.heads * tiling.queries;
        for (int w = 0; w < Tile::kWarpgroups; ++w) {
          uint8_t* const to = query_tile(query_buffer, w);
          uint64_t* const arrival = query_full + query_buffer * Tile::kWarpgroups + w;
          barrier_arrive_expect(arrival, bytes);
          for (int panel = 0; panel < Tile::kPanels; ++panel) {
            tensor_load_4d(to + panel * Tile::kQueryPanelBytes, &query_map, arrival, 64 * panel, chunk * tiling.heads,
                           kv_head, step.first_query + w * tiling.queries, kEvictFirst);
            tensor_load_4d(to + Tile::kQueryBytes + panel * Tile::kQueryPanelBytes, &grad_out_map, arrival, 64 * panel,
                           chunk * tiling.heads, kv_head, step.first_query + w * tiling.queries, kEvictFirst);
          }
        }
      }
      __syncwarp();
      ring_index = (ring_index + 1) % kQueryGradientSteps;
      if (++query_buffer == Tile::kQueryBuffers) query_buffer = 0, query_phase ^= 1;

      int slot = static_cast<int>(row.slot_begin);
      for (int left = step.slots; left > 0; left -= kSlots, slot += kSlots) {
        uint8_t* const keys = key_tiles + key_buffer * Tile::kSlotBytes;
        barrier_wait(key_empty + key_buffer, key_phase);
        if (leader) {
          uint64_t* const arrival = left >= kSlots ? key_full + key_buffer : partial_key;
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
        if (left < kSlots) {
          // Slots past the range may hold NaN, and 0 * NaN would reach dQ. Only the last tile is partial.
          barrier_wait(partial_key, partial_phase);
          partial_phase ^= 1;
          zero_rows(keys, Tile::kPanels, Tile::kSlotPanelBytes, left, kSlots);
          async_proxy_fence();
          __syncwarp();
          if (leader) barrier_arrive(key_full + key_buffer);
        }
        __syncwarp();
        if (++key_buffer == Tile::kKeyBuffers) key_buffer = 0, key_phase ^= 1;
        if (++value_buffer == Tile::kValueBuffers) value_buffer = 0, value_phase ^= 1;
      }
    }
    for (int w = 0; w < Tile::kWarpgroups; ++w) {
      barrier_wait(query_empty + query_buffer * Tile::kWarpgroups + w, query_phase);
    }
    if (leader) {
      ring[ring_index].slots = 0;
      for (int w = 0; w < Tile::kWarpgroups; ++w) barrier_arrive(query_full + query_buffer * Tile::kWarpgroups + w);
    }
  } else {
    raise_registers<Tile::kConsumerRegisters>();
    const int w = warpgroup - 1, lane = threadIdx.x % 32;
    const float scale = p.forward.scale * kLog2E;
    float sums[kHeadSize / 2], scores[kSlots / 2], products[kSlots / 2];
    float lse[2], delta[2];
    uint32_t packed[kSlots / 4];
    int key_buffer = 0, value_buffer = 0, query_buffer = 0, ring_index = 0;
    uint32_t key_phase = 0, value_phase = 0, query_phase = 0;
    // writing a tile's gradients while the next tile's scores are in flight takes registers
    constexpr bool kOverlapStore = kHeadSize < 256;
    // tiles of slots, and valid slots of the last of them
    int steps = 0, last_slots = 0;
    bool first = true;

    const auto load_rows = [&]() {
      const QueryGradientStep& step = ring[ring_index];
      steps = (step.slots + kSlots - 1) / kSlots;
      last_slots = step.slots - (steps - 1) * kSlots;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = threadIdx.x % 128 / 32 * 16 + lane / 4 + 8 * half;
        const int query = step.first_query + w * tiling.queries + r / tiling.heads, head = r % tiling.heads;
        const bool valid = r < tiling.heads * tiling.queries && query < step.end_query && head < step.heads;
        const int64_t at = static_cast<int64_t>(query) * p.forward.q_heads + step.head + head;
        lse[half] = valid ? p.lse_log2[at] : 0.f;
        delta[half] = valid ? p.delta[at] : 0.f;
      }
    };
    // scores of a tile of slots: A and B both contract over the head size
    const auto multiply_rows = [&](const uint8_t* rows, const uint8_t* slots, float (&c)[kSlots / 2]) {
      const uint32_t a = hidden(operand_word(rows)), b = hidden(operand_word(slots));
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kHeadSize / 16; ++k) {
        multiply<T, kSlots, Major::K>(operand_at(a, k / 4 * Tile::kQueryPanelBytes + k % 4 * 32),
                                      operand_at(b, k / 4 * Tile::kSlotPanelBytes + k % 4 * 32), c, k != 0);
      }
      wgmma_commit();
    };
    const auto start_scores = [&]() {
      const uint8_t* const queries = query_tile(query_buffer, w);
      barrier_wait(key_full + key_buffer, key_phase);
      multiply_rows(queries, key_tiles + key_buffer * Tile::kSlotBytes, scores);
      barrier_wait(value_full + value_buffer, value_phase);
      multiply_rows(queries + Tile::kQueryBytes, value_tiles + value_buffer * Tile::kSlotBytes, products);
    };
    // scores in flight become dS, packed as an A operand
    const auto differentiate = [&](bool last) {
      wgmma_wait<1>();
      fence_registers(scores);
      const int valid = last_slots - 2 * (lane % 4);
#pragma unroll
      for (int i = 0; i < kSlots / 2; ++i) scores[i] = exp2_fast(fmaf(scores[i], scale, -lse[i / 2 % 2]));
      // the weights, not the scores, whose sign the scale may flip
      if (last) {
#pragma unroll
        for (int i = 0; i < kSlots / 2; ++i) {
          if (i / 4 * 8 + i % 2 >= valid) scores[i] = 0.f;
        }
      }
      wgmma_wait<0>();
      fence_registers(products);
      if (lane == 0) barrier_arrive(value_empty + value_buffer);
      if (++value_buffer == Tile::kValueBuffers) value_buffer = 0, value_phase ^= 1;
      if (last) {
#pragma unroll
        for (int i = 0; i < kSlots / 2; ++i) {
          if (i / 4 * 8 + i % 2 >= valid) products[i] = 0.f;
        }
      }
#pragma unroll
      for (int i = 0; i < kSlots / 2; i += 2) {
        packed[i / 2] = pack_pair(T{}, scores[i] * (products[i] - delta[i / 2 % 2]),
                                  scores[i + 1] * (products[i + 1] - delta[i / 2 % 2]));
      }
    };
    const auto accumulate = [&]() {
      const uint32_t b = hidden(operand_word(key_tiles + key_buffer * Tile::kSlotBytes, Tile::kSlotPanelBytes));
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kSlots / 16; ++k) {
        multiply<T, kHeadSize, Major::MN>(packed + 4 * k, operand_at(b, k * 2048), sums, k != 0 || !first);
      }
      wgmma_commit();
      first = false;
    };
    const auto next_key = [&]() {
      const int done = key_buffer;
      if (++key_buffer == Tile::kKeyBuffers) key_buffer = 0, key_phase ^= 1;
      return done;
    };
    const auto store = [&](int index) {
      const QueryGradientStep& step = ring[index];
      store_query_gradient<T, kHeadSize>(p, step, step.first_query + w * tiling.queries, tiling.heads,
                                         tiling.heads * tiling.queries, sums);
    };
    // Ping-pong: the matmuls of one warpgroup run while the other computes its exponentials.
    const auto take_turn = [&]() { named_barrier_sync(kTurnBarrier + w, 128 * Tile::kWarpgroups); };
    const auto give_turn = [&]() { named_barrier_arrive(kTurnBarrier + 1 - w, 128 * Tile::kWarpgroups); };

    if (w == 1) give_turn();
    barrier_wait(query_full + w, 0);
    bool more = ring[0].slots > 0;
    if (more) {
      load_rows();
      take_turn();
      start_scores();
      give_turn();
      differentiate(steps == 1);
    }
    while (more) {
      // dQ of the last tile of slots, and after it the scores of the next. No matmul is in flight across the end of a
      // loop: ptxas would serialise all of them.
      for (int left = steps - 2; left >= 0; --left) {
        take_turn();
        accumulate();
        const int done = next_key();
        start_scores();
        give_turn();
        wgmma_wait<2>();
        if (lane == 0) barrier_arrive(key_empty + done);
        differentiate(left == 0);
      }

      // all scores of this tile are complete
      barrier_arrive(query_empty + query_buffer * Tile::kWarpgroups + w);
      if (++query_buffer == Tile::kQueryBuffers) query_buffer = 0, query_phase ^= 1;
      const int done_index = ring_index;
      ring_index = (ring_index + 1) % kQueryGradientSteps;
      barrier_wait(query_full + query_buffer * Tile::kWarpgroups + w, query_phase);
      more = ring[ring_index].slots > 0;
      if (more && !kOverlapStore) {
        take_turn();
        accumulate();
        const int done = next_key();
        give_turn();
        wgmma_wait<0>();
        fence_registers(sums);
        if (lane == 0) barrier_arrive(key_empty + done);
        store(done_index);
        first = true;
        load_rows();
        take_turn();
        start_scores();
        give_turn();
        differentiate(steps == 1);
      } else if (more) {
        load_rows();
        take_turn();
        accumulate();
        const int done = next_key();
        start_scores();
        give_turn();
        wgmma_wait<2>();
        fence_registers(sums);
        if (lane == 0) barrier_arrive(key_empty + done);
        store(done_index);
        first = true;
        differentiate(steps == 1);
      } else {
        take_turn();
        accumulate();
        give_turn();
        wgmma_wait<0>();
        fence_registers(sums);
        store(done_index);
      }
    }
    // the turn that nobody took
    if (w == 0) take_turn();
  }
}

template <class T, int kHeadSize>
cudaError_t launch_query_gradient(const InjectedAttentionBackwardParams& params, cudaStream_t stream) {
  using Tile = QueryGradientTile<kHeadSize>;
  const InjectedAttentionParams& forward = params.forward;
  if (forward.rotary_half % 16 != 0) return cudaErrorNotSupported;
  const QueryTiling tiling = make_query_tiling(forward.q_heads / forward.kv_heads);
  BackwardTensorMaps maps;
  cudaError_t status = encode_backward_maps(&maps, params, tiling, Tile::kSlots);
  if (status != cudaSuccess) return status;
  // rows of the batch end in partial tiles, hence one more for each
  const int64_t block_queries = Tile::kWarpgroups * tiling.queries;
  const int64_t tiles = (forward.num_queries + block_queries - 1) / block_queries + forward.num_rows;
  const int64_t total = tiles * forward.kv_heads * tiling.chunks;
  if (total > INT32_MAX / 2) return cudaErrorInvalidValue;
  int processors = 0;
  status = current_attribute(cudaDevAttrMultiProcessorCount, &processors);
  if (status != cudaSuccess) return status;
  auto* const kernel = query_gradient_kernel<T, kHeadSize>;
  constexpr int kSharedBytes = query_gradient_shared_bytes<kHeadSize>();
  static_assert(kSharedBytes <= 227 * 1024);
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  kernel<<<static_cast<unsigned>(std::min<int64_t>(total, processors)), Tile::kThreads, kSharedBytes, stream>>>(
      params, tiling, static_cast<int>(tiles), static_cast<int>(total), maps.query, maps.grad_out, maps.key,
      maps.value);
  return cudaGetLastError();
}

}  // namespace sharedllm

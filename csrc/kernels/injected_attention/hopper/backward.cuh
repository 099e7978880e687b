// dq, dk and dv in one kernel on Hopper (WGMMA, TMA, producer and consumer warps). A tile of slots stays in shared
// memory; the query tiles of every batch row that reads it stream past. dk and dv accumulate in registers, dq by atomic
// additions of float32.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/common/overlap.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/common/vector_load.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/injected_attention/hopper/backward.h"
#include "kernels/injected_attention/hopper/backward_tiles.cuh"
#include "kernels/injected_attention/hopper/query_sums.h"
#include "kernels/injected_attention/query_rotation.cuh"

namespace sharedllm {

// A query tile in the pipeline, and the slots of the slot tile that its batch row reads.
struct QueryStep {
  int64_t first_query;
  int32_t queries;    // of this tile, at most QueryTiling::queries
  int32_t low, high;  // slots of the tile; high = 0 ends the sequence
};

template <int kHeadSize>
struct KeyValueGradientTile {
  static constexpr int kPanels = (kHeadSize + 63) / 64;
  // 64 slots per warpgroup: dK and dV (2 x 64 registers per thread for 128 columns) leave room for S and dP of 64 rows.
  static constexpr int kWarpgroups = 2, kSlots = 64 * kWarpgroups;
  // Ping-pong: the warpgroups are half a step apart, so one begins with the next tile before the other has finished the
  // last.
  static constexpr int kQueryStages = 3, kGradOutStages = 3, kScoreBuffers = 2;
  static constexpr int kSlotPanelBytes = kSlots * 128, kSlotBytes = kPanels * kSlotPanelBytes;
  static constexpr int kQueryPanelBytes = kTileRows * 128, kQueryBytes = kPanels * kQueryPanelBytes;
  static constexpr int kScoreBytes = kSlots * 128;
  // columns of dQ for each warpgroup, and their sums in shared memory on their way to global memory
  static constexpr int kColumns = kPanels * 64 / kWarpgroups, kSumBytes = kTileRows * kColumns * 4;
  static_assert(kColumns == QuerySums::columns(kHeadSize), "the layout in global memory");
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  // Together the 504 registers that a block of 384 threads starts with. With 128 columns the producer warps spill a
  // little, which costs time that they would spend waiting.
  static constexpr int kConsumerRegisters = kHeadSize < 128 ? 232 : 240,
                       kProducerRegisters = 504 - 2 * kConsumerRegisters;
  static constexpr int kBarriers = 2 * kQueryStages + 2 * kGradOutStages + 3;
  static constexpr int kSharedBytes = 2 * kSlotBytes + (kQueryStages + kGradOutStages) * kQueryBytes +
                                      kScoreBuffers * kScoreBytes + kWarpgroups * kSumBytes +
                                      kQueryStages * (2 * kTileRows * 4 + sizeof(QueryStep)) + 8 * kBarriers;
};

// A piece of a tile of slots: the part of each batch row's query tiles that it takes.
struct SlotTilePiece {
  uint16_t tile, share;  // of the tail; share of partial_grad_k and partial_grad_v
  uint16_t begin, end;   // in the tail's units
};
struct SlotTilePieces {
  uint32_t whole;
  int32_t units;
  SlotTilePiece piece[kMostPieces];  // the longest first, so that they fill the wave evenly
};

// The work of a block. A tile in the tail has only a piece, and no other split.
struct BlockWork {
  bool is_piece;
  SlotTilePiece piece;
  int split, kv_head;
  int64_t slot_tile;

  __device__ __forceinline__ BlockWork(const InjectedAttentionBackwardParams& p, const SlotTilePieces& pieces,
                                       unsigned block)
      : is_piece(p.tail_shares > 0 && block >= pieces.whole),
        piece(is_piece ? pieces.piece[block - pieces.whole] : SlotTilePiece{0, 0, 0, 1}),
        split(static_cast<int>(block % p.kv_splits)) {
    const int64_t slot_tiles = (p.forward.num_slots + kBackwardSlots - 1) / kBackwardSlots;
    const int64_t tile = is_piece ? pieces.whole + piece.tile : block / p.kv_splits;
    slot_tile = tile % slot_tiles;
    kv_head = static_cast<int>(tile / slot_tiles);
  }
};

// Enumerates the query tiles that read a tile of slots, every `stride`-th of them. A warp walks together.
class QueryWalk {
 public:
  __device__ __forceinline__ QueryWalk(const InjectedAttentionParams& p, int slot, int slots, int tile_queries,
                                       int first, int stride, int rotation, const SlotTilePiece& piece, int units)
      : p_(p),
        slot_(slot),
        slots_(slots),
        tile_queries_(tile_queries),
        stride_(stride),
        tile_(first),
        rotation_(rotation),
        begin_(piece.begin),
        end_(piece.end),
        units_(units) {}

  // False at the end.
  __device__ __forceinline__ bool next(QueryStep* step) {
    while (tile_ >= count_) {
      tile_ -= count_;
      count_ = 0;
      if (!next_row()) return false;
      // Blocks of other slots add to other rows of dQ at the same time, instead of queueing for the same ones.
      if (count_ > 0) at_ = (from_ + tile_ + rotation_) % tiles_;
    }
    step->first_query = q_begin_ + at_ * tile_queries_;
    const int left = q_end_ - step->first_query;
    step->queries = left < tile_queries_ ? left : tile_queries_;
    step->low = low_;
    step->high = high_;
    tile_ += stride_;
    at_ += stride_;
    // if the stride is longer than the row, a tile past the row's last one is found in the next row
    if (at_ >= tiles_) at_ -= tiles_;
    return true;
  }

 private:
  __device__ __forceinline__ bool next_row() {
    while (pending_ == 0) {
      if (base_ >= p_.num_rows) return false;
      const int64_t row = base_ + threadIdx.x % 32;
      bool overlaps = false;
      if (row < p_.num_rows) {
        lane_begin_ = static_cast<int>(clamp_index(p_.cu_q[row], 0, p_.num_queries));
        lane_end_ = static_cast<int>(clamp_index(p_.cu_q[row + 1], lane_begin_, p_.num_queries));
        const int64_t begin = clamp_index(p_.slot_range[2 * row], 0, p_.num_slots);
        const int64_t end = clamp_index(p_.slot_range[2 * row + 1], begin, p_.num_slots);
        lane_low_ = static_cast<int>(clamp_index(begin - slot_, 0, slots_));
        lane_high_ = static_cast<int>(clamp_index(end - slot_, 0, slots_));
        overlaps = lane_low_ < lane_high_ && lane_begin_ < lane_end_;
      }
      pending_ = __ballot_sync(kFullWarp, overlaps);
      base_ += 32;
    }
    const int owner = __ffs(pending_) - 1;
    pending_ &= pending_ - 1;
    q_begin_ = __shfl_sync(kFullWarp, lane_begin_, owner);
    q_end_ = __shfl_sync(kFullWarp, lane_end_, owner);
    low_ = __shfl_sync(kFullWarp, lane_low_, owner);
    high_ = __shfl_sync(kFullWarp, lane_high_, owner);
    tiles_ = (q_end_ - q_begin_ + tile_queries_ - 1) / tile_queries_;
    from_ = static_cast<int>(static_cast<int64_t>(tiles_) * begin_ / units_);
    count_ = static_cast<int>(static_cast<int64_t>(tiles_) * end_ / units_) - from_;
    return true;
  }

  const InjectedAttentionParams& p_;
  const int slot_;
  const int slots_, tile_queries_, stride_;
  int tile_, tiles_ = 0, rotation_, q_begin_ = 0, q_end_ = 0;
  const int begin_, end_, units_;
  int from_ = 0, count_ = 0, at_ = 0;
  int64_t base_ = 0;
  int low_ = 0, high_ = 0;
  unsigned pending_ = 0;
  int lane_begin_ = 0, lane_end_ = 0;
  int lane_low_ = 0, lane_high_ = 0;
};

__device__ __forceinline__ bool has_non_finite(__nv_bfloat16, uint32_t pair) {
  return (pair & 0x7f80u) == 0x7f80u || (pair & 0x7f800000u) == 0x7f800000u;
}
__device__ __forceinline__ bool has_non_finite(__half, uint32_t pair) {
  return (pair & 0x7c00u) == 0x7c00u || (pair & 0x7c000000u) == 0x7c000000u;
}

// A batch row's dS is 0 at slots it does not read, but 0 * NaN is not, and a tile may hold slots of other rows with any
// content. A row that does read such a slot has NaN as its sum of exponentials, so all its gradients stay NaN.
template <class T, int kPanels, int kSlots, int kThreads>
__device__ __forceinline__ void zero_non_finite_rows(uint8_t* tile, int thread) {
  for (int r = thread / 8; r < kSlots; r += kThreads / 8) {
    bool bad = false;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const uint4 x = *reinterpret_cast<const uint4*>(tile + panel * kSlots * 128 + r * 128 + thread % 8 * 16);
      bad |=
          has_non_finite(T{}, x.x) || has_non_finite(T{}, x.y) || has_non_finite(T{}, x.z) || has_non_finite(T{}, x.w);
    }
    if (__ballot_sync(kFullWarp, bad) >> (thread % 32 / 8 * 8) & 0xff) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        *reinterpret_cast<uint4*>(tile + panel * kSlots * 128 + r * 128 + thread % 8 * 16) = uint4{};
      }
    }
  }
}

// Rotates keys back in place by the tables' row for the only batch row: (R q) k = q (R^T k). Each warp has the rows
// that it has in zero_non_finite_rows.
template <class T, int kHeadSize, int kSlots, int kThreads>
__device__ __forceinline__ void turn_keys_back(uint8_t* tile, const RotaryRow& rotary, int thread) {
  constexpr int kPairs = kHeadSize / 16;
  const int chunk = thread % 8;
  if (chunk >= kPairs) return;
  float cos[8], sin[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    cos[i] = __ldg(rotary.cos + 8 * chunk + i);
    sin[i] = __ldg(rotary.sin + 8 * chunk + i);
  }
  for (int r = thread / 8; r < kSlots; r += kThreads / 8) {
    const auto place = [&](int c) {
      return reinterpret_cast<uint4*>(tile + c / 8 * (kSlots * 128) + r * 128 + ((c ^ r) & 7) * 16);
    };
    float low[8], high[8], turned[2][8];
    unpack8(T{}, *place(chunk), low);
    unpack8(T{}, *place(chunk + kPairs), high);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      turned[0][i] = low[i] * cos[i] + high[i] * sin[i];
      turned[1][i] = high[i] * cos[i] - low[i] * sin[i];
    }
    *place(chunk) = pack8(T{}, turned[0]);
    *place(chunk + kPairs) = pack8(T{}, turned[1]);
  }
}

// Rotates their gradients forward again.
template <int kHeadSize>
__device__ __forceinline__ void turn_key_sums(float (&sums)[kHeadSize / 2], const RotaryRow& rotary) {
#pragma unroll
  for (int j = 0; j < kHeadSize / 16; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = 8 * j + threadIdx.x % 4 * 2 + e;
      const float cos = __ldg(rotary.cos + column), sin = __ldg(rotary.sin + column);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float &low = sums[4 * j + 2 * half + e], &high = sums[4 * (j + kHeadSize / 16) + 2 * half + e];
        const float x = low, y = high;
        low = x * cos - y * sin;
        high = y * cos + x * sin;
      }
    }
  }
}

// dK or dV of a warpgroup's 64 slots, `stride` elements from slot to slot: rounded, or float32 as the share of one part
// of the queries.
template <class T, int kHeadSize>
__device__ __forceinline__ void store_slot_gradient(const float (&sums)[kHeadSize / 2], float scale, int64_t slot,
                                                    int64_t stride, const InjectedAttentionParams& p, T* gradient,
                                                    float* partial) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = threadIdx.x % 128 / 32 * 16 + lane / 4 + 8 * half;
    const int64_t at = r * stride + lane % 2 * 8 + lane % 4 / 2 * 4;
#pragma unroll
    for (int j = 0; j < kHeadSize / 8; j += 2) {
      const int i = 4 * j + 2 * half;
      float4 x = exchange_pairs(sums[i], sums[i + 1], sums[i + 4], sums[i + 5]);
      x.x *= scale, x.y *= scale, x.z *= scale, x.w *= scale;
      if (slot + r >= p.num_slots) continue;
      if (partial != nullptr) {
        *reinterpret_cast<float4*>(partial + at + 8 * j) = x;
      } else {
        *reinterpret_cast<uint2*>(gradient + at + 8 * j) =
            make_uint2(pack_pair(T{}, x.x, x.y), pack_pair(T{}, x.z, x.w));
      }
    }
  }
}

template <class T, int kHeadSize>
__global__ __launch_bounds__(KeyValueGradientTile<kHeadSize>::kThreads, 1) void injected_attention_backward_kernel(
    const __grid_constant__ InjectedAttentionBackwardParams p, const __grid_constant__ QueryTiling tiling,
    const __grid_constant__ CUtensorMap query_map, const __grid_constant__ CUtensorMap grad_out_map,
    const __grid_constant__ CUtensorMap key_map, const __grid_constant__ CUtensorMap value_map,
    const __grid_constant__ SlotTilePieces pieces) {
  using Tile = KeyValueGradientTile<kHeadSize>;
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t* const keys = shared;
  uint8_t* const values = keys + Tile::kSlotBytes;
  uint8_t* const query_tiles = values + Tile::kSlotBytes;
  uint8_t* const grad_out_tiles = query_tiles + Tile::kQueryStages * Tile::kQueryBytes;
  uint8_t* const score_tiles = grad_out_tiles + Tile::kGradOutStages * Tile::kQueryBytes;
  uint8_t* const query_sum_tiles = score_tiles + Tile::kScoreBuffers * Tile::kScoreBytes;
  float* const row_values = reinterpret_cast<float*>(query_sum_tiles + Tile::kWarpgroups * Tile::kSumBytes);
  QueryStep* const query_steps = reinterpret_cast<QueryStep*>(row_values + Tile::kQueryStages * 2 * kTileRows);
  uint64_t* const query_full = reinterpret_cast<uint64_t*>(query_steps + Tile::kQueryStages);
  uint64_t* const query_empty = query_full + Tile::kQueryStages;
  uint64_t* const grad_out_full = query_empty + Tile::kQueryStages;
  uint64_t* const grad_out_empty = grad_out_full + Tile::kGradOutStages;
  uint64_t* const slots_full = grad_out_empty + Tile::kGradOutStages;
  uint64_t* const partial_tile = slots_full + 2;

  const BlockWork work(p, pieces, blockIdx.x);
  const int kv_head = work.kv_head;
  const int64_t slot = work.slot_tile * Tile::kSlots;
  // named barriers; the ping-pong takes one for each warpgroup
  enum Barrier : int { kKeysBarrier = 1, kTurnBarrier };
  // the same in all lanes, which the compiler cannot see
  const int warpgroup = __shfl_sync(kFullWarp, threadIdx.x / 128, 0);

  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kQueryStages; ++i) {
      // arrivals of the leader and of the warp that copies lse and delta
      barrier_init(query_full + i, 1 + 32);
      barrier_init(query_empty + i, 4 * Tile::kWarpgroups);
    }
    for (int i = 0; i < Tile::kGradOutStages; ++i) {
      barrier_init(grad_out_full + i, 1);
      barrier_init(grad_out_empty + i, 4 * Tile::kWarpgroups);
    }
    for (int i = 0; i < 2; ++i) barrier_init(slots_full + i, 1);
    barrier_init(partial_tile, 1);
    barrier_init_fence();
  }
  // A box may leave the last rows of the tiles unwritten, and the matmuls contract over them; dQ of step -1 is 0.
  for (uint8_t* x = query_tiles + threadIdx.x * 16; x < query_sum_tiles; x += Tile::kThreads * 16) {
    *reinterpret_cast<uint4*>(x) = uint4{};
  }
  async_proxy_fence();
  __syncthreads();

  if (warpgroup == 0) {
    lower_registers<Tile::kProducerRegisters>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp > 1) return;
    QueryWalk walk(p.forward, static_cast<int>(slot), Tile::kSlots, tiling.queries, work.split, p.kv_splits,
                   static_cast<int>(work.slot_tile), work.piece, work.is_piece ? pieces.units : 1);
    int stage = 0, grad_out_stage = 0;
    uint32_t phase = 1, grad_out_phase = 1, partial_phase = 0;
    QueryStep step{};
    if (warp == 0) {
      const bool leader = lane == 0;
      if (leader) {
        barrier_arrive_expect(slots_full, Tile::kSlotBytes);
        barrier_arrive_expect(slots_full + 1, Tile::kSlotBytes);
        for (int panel = 0; panel < Tile::kPanels; ++panel) {
          tensor_load_3d(keys + panel * Tile::kSlotPanelBytes, &key_map, slots_full, 64 * panel, kv_head,
                         static_cast<int32_t>(slot), kEvictFirst);
        }
        for (int panel = 0; panel < Tile::kPanels; ++panel) {
          tensor_load_3d(values + panel * Tile::kSlotPanelBytes, &value_map, slots_full + 1, 64 * panel, kv_head,
                         static_cast<int32_t>(slot), kEvictFirst);
        }
      }
      wait_for_previous_kernel();
      const uint32_t bytes = Tile::kPanels * 128 * tiling.heads * tiling.queries;
      while (walk.next(&step)) {
        const bool full = step.queries == tiling.queries;
        const int32_t query = step.first_query;
        uint8_t* const queries = query_tiles + stage * Tile::kQueryBytes;
        uint8_t* const grad_outs = grad_out_tiles + grad_out_stage * Tile::kQueryBytes;
        barrier_wait(query_empty + stage, phase);
        if (leader) {
          query_steps[stage] = step;
          uint64_t* const arrival = full ? query_full + stage : partial_tile;
          barrier_arrive_expect(arrival, full ? bytes : 2 * bytes);
          for (int panel = 0; panel < Tile::kPanels; ++panel) {
            tensor_load_4d(queries + panel * Tile::kQueryPanelBytes, &query_map, arrival, 64 * panel, 0, kv_head, query,
                           kEvictLast);
          }
        }
        barrier_wait(grad_out_empty + grad_out_stage, grad_out_phase);
        if (leader) {
          uint64_t* const arrival = full ? grad_out_full + grad_out_stage : partial_tile;
          if (full) barrier_arrive_expect(arrival, bytes);
          for (int panel = 0; panel < Tile::kPanels; ++panel) {
            tensor_load_4d(grad_outs + panel * Tile::kQueryPanelBytes, &grad_out_map, arrival, 64 * panel, 0, kv_head,
                           query, kEvictLast);
          }
        }
        if (!full) {
          // queries of the next batch row, or of none, must not count
          barrier_wait(partial_tile, partial_phase);
          partial_phase ^= 1;
          const int valid = step.queries * tiling.heads;
          zero_rows(queries, Tile::kPanels, Tile::kQueryPanelBytes, valid, kTileRows);
          zero_rows(grad_outs, Tile::kPanels, Tile::kQueryPanelBytes, valid, kTileRows);
          async_proxy_fence();
          __syncwarp();
          if (leader) {
            barrier_arrive(query_full + stage);
            barrier_arrive(grad_out_full + grad_out_stage);
          }
        }
        __syncwarp();
        if (++stage == Tile::kQueryStages) stage = 0, phase ^= 1;
        if (++grad_out_stage == Tile::kGradOutStages) grad_out_stage = 0, grad_out_phase ^= 1;
      }
      barrier_wait(query_empty + stage, phase);
      if (leader) {
        query_steps[stage].high = 0;
        barrier_arrive(query_full + stage);
      }
    } else {
      // the results of prepare, including the zeroed sums of dQ, reach the consumers through this warp's arrivals
      wait_for_previous_kernel();
      while (walk.next(&step)) {
        float* const to = row_values + stage * 2 * kTileRows;
        barrier_wait(query_empty + stage, phase);
        for (int r = lane; r < kTileRows; r += 32) {
          const int query = r / tiling.heads;
          const bool valid = query < step.queries;
          const int64_t at = static_cast<int64_t>(step.first_query + query) * p.forward.q_heads +
                             kv_head * tiling.heads + r % tiling.heads;
          copy_float_async(to + r, p.lse_log2 + (valid ? at : 0), valid);
          copy_float_async(to + kTileRows + r, p.delta + (valid ? at : 0), valid);
        }
        barrier_arrive_after_copies(query_full + stage);
        if (++stage == Tile::kQueryStages) stage = 0, phase ^= 1;
      }
      barrier_wait(query_empty + stage, phase);
      barrier_arrive(query_full + stage);
    }
  } else {
    raise_registers<Tile::kConsumerRegisters>();
    // kept in a register: reading its special register again would delay the ping-pong
    const int thread = static_cast<int>(hidden(threadIdx.x)) % 128;
    const int w = warpgroup - 1, warp = thread / 32, lane = thread % 32;
    float key_sums[kHeadSize / 2], value_sums[kHeadSize / 2];
#pragma unroll
    for (int i = 0; i < kHeadSize / 2; ++i) key_sums[i] = 0.f, value_sums[i] = 0.f;

    // of keys that are rotated back; looked up again at the end, instead of registers kept over the loop
    const auto find_rotary = [&](uint32_t zero) {
      if (!p.turns_keys || p.forward.rotary_half == 0) return RotaryRow{nullptr, nullptr, 0};
      const int64_t position = clamp_index(__ldg(p.forward.q_position + zero), 0, p.forward.num_positions - 1);
      return RotaryRow{p.forward.cos + position * (kHeadSize / 2), p.forward.sin + position * (kHeadSize / 2),
                       kHeadSize / 2};
    };
    barrier_wait(slots_full, 0);
    const RotaryRow rotary = find_rotary(0);
    if (rotary.half > 0) {
      turn_keys_back<T, kHeadSize, Tile::kSlots, 128 * Tile::kWarpgroups>(keys, rotary, threadIdx.x - 128);
      __syncwarp();
    }
    // after the rotation, which may make a number infinite but never finite
    zero_non_finite_rows<T, Tile::kPanels, Tile::kSlots, 128 * Tile::kWarpgroups>(keys, threadIdx.x - 128);
    async_proxy_fence();
    named_barrier_sync(kKeysBarrier, 128 * Tile::kWarpgroups);
    barrier_wait(slots_full + 1, 0);

    int stage = 0;
    uint32_t phase = 0;
    barrier_wait(query_full, 0);
    if (query_steps[0].high > 0) {
      const float scale = p.forward.scale * kLog2E;
      float scores[kTileRows / 2], products[kTileRows / 2];
      float query_sums[Tile::kColumns / 2];
      uint32_t weights[kTileRows / 4], packed[kTileRows / 4];
      // [slots, rows], contracted over the head size
      const auto multiply_rows = [&](const uint8_t* slots, const uint8_t* rows, float (&c)[kTileRows / 2]) {
        const uint32_t a = operand_word(slots) + hidden(w) * (64 * 128 / 16), b = hidden(operand_word(rows));
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kHeadSize / 16; ++k) {
          multiply<T, kTileRows, Major::K>(operand_at(a, k / 4 * Tile::kSlotPanelBytes + k % 4 * 32),
                                           operand_at(b, k / 4 * Tile::kQueryPanelBytes + k % 4 * 32), c, k != 0);
        }
        wgmma_commit();
      };
      // dK or dV, contracted over the rows
      const auto accumulate = [&](const uint32_t* a, const uint8_t* rows, float (&c)[kHeadSize / 2]) {
        const uint32_t b = hidden(operand_word(rows, Tile::kQueryPanelBytes));
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kTileRows / 16; ++k)
          multiply<T, kHeadSize, Major::MN>(a + 4 * k, operand_at(b, k * 2048), c, true);
        wgmma_commit();
      };
      // dQ, contracted over the slots of both warpgroups
      const auto multiply_keys = [&](int buffer) {
        const uint32_t a = hidden(operand_word(score_tiles + buffer * Tile::kScoreBytes, 1024));
        const uint32_t b = operand_word(keys, Tile::kSlotPanelBytes) +
                           hidden(w) * ((kHeadSize == 64 ? 64 : Tile::kSlotPanelBytes) / 16);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < Tile::kSlots / 16; ++k) {
          multiply_transposed<T, Tile::kColumns>(operand_at(a, k * 2048), operand_at(b, k * 2048), query_sums, k != 0);
        }
        wgmma_commit();
      };
      const auto query_tile = [&](int at) { return query_tiles + at * Tile::kQueryBytes; };
      const auto grad_out_tile = [&](int at) { return grad_out_tiles + at * Tile::kQueryBytes; };
      const auto is_masked = [&](int half) {
        const int r = w * 64 + warp * 16 + lane / 4 + 8 * half;
        return r < query_steps[stage].low || r >= query_steps[stage].high;
      };
      const auto is_partial = [&]() { return query_steps[stage].low > 0 || query_steps[stage].high < Tile::kSlots; };
      const auto weigh = [&]() {
        fence_registers(scores);
        const float* const lse = row_values + stage * 2 * kTileRows + 2 * (lane % 4);
#pragma unroll
        for (int j = 0; j < kTileRows / 8; ++j) {
          const float2 x = *reinterpret_cast<const float2*>(lse + 8 * j);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            scores[4 * j + e] = exp2_fast(fmaf(scores[4 * j + e], scale, e % 2 ? -x.y : -x.x));
          }
        }
        // the weights, not the scores: those lose their sign to the scale's, and may be NaN
        if (is_partial()) {
          const bool masked[2] = {is_masked(0), is_masked(1)};
#pragma unroll
          for (int i = 0; i < kTileRows / 2; ++i) {
            if (masked[i / 2 % 2]) scores[i] = 0.f;
          }
        }
      };
      const auto differentiate = [&]() {
        fence_registers(products);
        const float* const delta = row_values + (stage * 2 + 1) * kTileRows + 2 * (lane % 4);
#pragma unroll
        for (int j = 0; j < kTileRows / 8; ++j) {
          const float2 x = *reinterpret_cast<const float2*>(delta + 8 * j);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = 4 * j + e;
            products[i] = scores[i] * (products[i] - (e % 2 ? x.y : x.x));
          }
        }
        // dS, not dP: another batch row's delta may be NaN
        if (is_partial()) {
          const bool masked[2] = {is_masked(0), is_masked(1)};
#pragma unroll
          for (int i = 0; i < kTileRows / 2; ++i) {
            if (masked[i / 2 % 2]) products[i] = 0.f;
          }
        }
#pragma unroll
        for (int i = 0; i < kTileRows / 2; i += 2) {
          weights[i / 2] = pack_pair(T{}, scores[i], scores[i + 1]);
          packed[i / 2] = pack_pair(T{}, products[i], products[i + 1]);
        }
      };
      const auto store_scores = [&](int buffer) {
        // dS^T [slots, rows], 128 bytes to a slot
        const int r = w * 64 + warp * 16 + lane % 16;
        uint8_t* const to = score_tiles + buffer * Tile::kScoreBytes + r * 128;
#pragma unroll
        for (int k = 0; k < kTileRows / 16; ++k) {
          store_matrices(to + ((2 * k + lane / 16) ^ (r % 8)) * 16, packed + 4 * k);
        }
        async_proxy_fence();
      };
      // Adds dQ of a step to that of other blocks. Each warp sends its 16 rows, and waits only for what it sent a step
      // before. Rows past the batch row's end are not sent: they may be NaN.
      const QuerySums layout(p.forward);
      const auto add_query_sums = [&](int first_query, int rows) {
        fence_registers(query_sums);
        const int width = layout.width(w);
        const int first = first_query * tiling.heads + warp * 16;
        float* const sums = reinterpret_cast<float*>(query_sum_tiles + w * Tile::kSumBytes) + warp * 16 * width;
        if (lane == 0) bulk_wait_read();
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = lane / 4 + 8 * half;
#pragma unroll
          for (int i = 0; i < Tile::kColumns / 16; ++i) {
            // 16 columns; a second warpgroup may have fewer
            if (kHeadSize % 64 != 0 && 16 * i >= width) break;
            const int j = 8 * i + 2 * half;
            *reinterpret_cast<float4*>(sums + r * width + QuerySums::quad(first + r, i, lane % 4) * 4) =
                make_float4(query_sums[j], query_sums[j + 1], query_sums[j + 4], query_sums[j + 5]);
          }
        }
        async_proxy_fence();
        __syncwarp();
        const int valid = min(rows - warp * 16, 16);
        if (lane == 0 && valid > 0) {
          bulk_add(p.grad_q_float + layout.offset(w, kv_head, first), sums, valid * width * 4);
          bulk_commit();
        }
      };

      // Ping-pong: the matmuls of one warpgroup run while the other computes its exponentials.
      const auto take_turn = [&]() { named_barrier_sync(kTurnBarrier + w, 256); };
      const auto give_turn = [&]() { named_barrier_arrive(kTurnBarrier + 1 - w, 256); };
      if (w == 1) give_turn();

      take_turn();
      multiply_rows(keys, query_tiles, scores);
      barrier_wait(grad_out_full, 0);
      multiply_rows(values, grad_out_tiles, products);
      give_turn();
      wgmma_wait<1>();
      weigh();
      wgmma_wait<0>();
      differentiate();
      store_scores(0);
      // The first warpgroup sums dQ one step later than the second, which follows it in every step and finds both
      // halves of dS.
      int buffer = 0, last_query = 0, last_rows = 0;
      while (true) {
        const int done_stage = stage;
        const int done_query = query_steps[stage].first_query, done_rows = query_steps[stage].queries * tiling.heads;
        if (++stage == Tile::kQueryStages) stage = 0, phase ^= 1;
        barrier_wait(query_full + stage, phase);
        if (query_steps[stage].high == 0) {
          take_turn();
          multiply_keys(w == 0 ? buffer ^ 1 : buffer);
          accumulate(weights, grad_out_tile(done_stage), value_sums);
          accumulate(packed, query_tile(done_stage), key_sums);
          wgmma_wait<2>();
          add_query_sums(w == 0 ? last_query : done_query, w == 0 ? last_rows : done_rows);
          wgmma_wait<0>();
          give_turn();
          if (w == 0) {
            take_turn();
            multiply_keys(buffer);
            wgmma_wait<0>();
            add_query_sums(done_query, done_rows);
          }
          if (lane == 0) bulk_wait_read();
          break;
        }

        barrier_wait(grad_out_full + stage, phase);
        // From here on the other warpgroup's dS is visible.
        take_turn();
        accumulate(weights, grad_out_tile(done_stage), value_sums);
        multiply_keys(w == 0 ? buffer ^ 1 : buffer);
        accumulate(packed, query_tile(done_stage), key_sums);
        // dV is complete, and the registers of its operand are free for the next scores.
        wgmma_wait<2>();
        multiply_rows(keys, query_tile(stage), scores);
        // dQ is complete; its sums are sent while dK and the scores are in flight.
        wgmma_wait<2>();
        add_query_sums(w == 0 ? last_query : done_query, w == 0 ? last_rows : done_rows);
        last_query = done_query, last_rows = done_rows;
        // the tiles of the last step are free
        wgmma_wait<1>();
        multiply_rows(values, grad_out_tile(stage), products);
        give_turn();
        __syncwarp();
        if (lane == 0) {
          barrier_arrive(query_empty + done_stage);
          barrier_arrive(grad_out_empty + done_stage);
        }
        wgmma_wait<1>();
        weigh();
        wgmma_wait<0>();
        differentiate();
        // Both halves have been read, the other warpgroup's in its last pass.
        buffer ^= 1;
        store_scores(buffer);
      }
      fence_registers(key_sums);
      fence_registers(value_sums);
    }
    if (p.turns_keys && p.forward.rotary_half > 0) turn_key_sums<kHeadSize>(key_sums, find_rotary(hidden(0)));
    const BlockWork done(p, pieces, hidden(blockIdx.x));
    const bool partial = p.kv_splits > 1 || done.is_piece;
    const int64_t stride = done.is_piece ? kHeadSize : static_cast<int64_t>(p.forward.kv_heads) * kHeadSize;
    const int64_t first = done.slot_tile * Tile::kSlots + w * 64;
    const int64_t at = first * stride + done.kv_head * kHeadSize;
    const int64_t share = done.is_piece ? (static_cast<int64_t>(done.piece.share) * Tile::kSlots + w * 64) * stride
                                        : done.split * p.forward.num_slots * stride + at;
    store_slot_gradient<T, kHeadSize>(key_sums, p.forward.scale, first, stride, p.forward,
                                      static_cast<T*>(p.grad_k) + at, partial ? p.partial_grad_k + share : nullptr);
    store_slot_gradient<T, kHeadSize>(value_sums, 1.f, first, stride, p.forward, static_cast<T*>(p.grad_v) + at,
                                      partial ? p.partial_grad_v + share : nullptr);
  }
}

// False if there are more than the argument holds.
inline bool cut_tail(const InjectedAttentionBackwardParams& params, SlotTilePieces* pieces) {
  const SlotTileTail tail(params);
  if (tail.pieces() > kMostPieces || tail.tile_units > UINT16_MAX || tail.whole > INT32_MAX) return false;
  pieces->whole = static_cast<uint32_t>(tail.whole);
  pieces->units = tail.tile_units;
  int count = 0;
  for (int32_t tile = 0; tile < tail.tiles; ++tile) {
    const int32_t origin = tile * tail.tile_units;
    for (int32_t begin = 0; begin < tail.tile_units;) {
      const int32_t cut = ((origin + begin) / tail.share_units + 1) * tail.share_units - origin;
      const int32_t end = std::min(cut, tail.tile_units);
      pieces->piece[count] = {static_cast<uint16_t>(tile), static_cast<uint16_t>(count), static_cast<uint16_t>(begin),
                              static_cast<uint16_t>(end)};
      ++count;
      begin = end;
    }
  }
  std::stable_sort(pieces->piece, pieces->piece + count,
                   [](const SlotTilePiece& x, const SlotTilePiece& y) { return x.end - x.begin > y.end - y.begin; });
  return true;
}

template <class T, int kHeadSize>
cudaError_t launch_backward(const InjectedAttentionBackwardParams& params, cudaStream_t stream) {
  using Tile = KeyValueGradientTile<kHeadSize>;
  const InjectedAttentionParams& forward = params.forward;
  const QueryTiling tiling = make_query_tiling(forward.q_heads / forward.kv_heads);
  if (tiling.chunks > 1) return cudaErrorNotSupported;
  BackwardTensorMaps maps;
  cudaError_t status = encode_backward_maps(&maps, params, tiling, Tile::kSlots);
  if (status != cudaSuccess) return status;
  static_assert(Tile::kSlots == kBackwardSlots, "the tail is cut in these");
  static_assert(Tile::kSharedBytes <= 227 * 1024);
  SlotTilePieces pieces{};
  if (!cut_tail(params, &pieces)) return cudaErrorInvalidValue;
  const SlotTileTail tail(params);
  const int64_t blocks = tail.whole * params.kv_splits + tail.pieces();
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  auto* const kernel = injected_attention_backward_kernel<T, kHeadSize>;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
  if (status != cudaSuccess) return status;
  return launch_after(kernel, blocks, Tile::kThreads, Tile::kSharedBytes, true, stream, params, tiling, maps.query,
                      maps.grad_out, maps.key, maps.value, pieces);
}

}  // namespace sharedllm

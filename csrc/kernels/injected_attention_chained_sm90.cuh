// Injected attention on Hopper with chained tiles: the consumers of a persistent block never stop between them. The
// first scores of the next tile and the last product of this one are issued together, and the loading warps find the
// tiles, load their queries and store their results, so that a consumer knows blocks of slots only.
// docs/kernels/injected_attention_prefill.md has the derivation.
#pragma once

#include "kernels/injected_attention_sm90.cuh"

namespace sharedllm {

namespace sm90 {

// A tile of packed rows, handed to the consumers with its queries, and back to the loaders with its results.
struct ChainedTile {
  int blocks;        // of slots; 0: there are no more tiles
  int valid;         // slots of the last block
  int used;          // packed rows
  int first_member;  // the first row's place among the heads that share a key/value head
  int64_t row;       // of the results, [T, Hq], where member 0 of the first query stands
};

template <int kHeadSize>
struct ChainedShape : Shape<kHeadSize> {
  using S = Shape<kHeadSize>;
  static_assert(S::kQueryStages > 1, "results leave through a stage while the next tile is computed");
  static constexpr int kTileOffset = S::kSharedBytes;
  static constexpr int kLogSumExpOffset = kTileOffset + S::kQueryStages * static_cast<int>(sizeof(ChainedTile));
  static constexpr int kSharedBytes = kLogSumExpOffset + S::kQueryStages * S::kRows * 4;
  static_assert(S::kSharedBytes % 8 == 0 && kSharedBytes <= 227 * 1024);
};

// Whole rows out of a query stage, or zeros and log-sum-exp of -inf for a tile without slots.
template <class T, int kHeadSize, bool kZeros>
__device__ __forceinline__ void store_results(const InjectedAttentionSm90Params& p, const ChainedTile& tile,
                                              const uint8_t* from, const float* lse, const Divisor& group, int thread) {
  using S = Shape<kHeadSize>;
  constexpr int kChunks = kHeadSize / 8, kRowsAtOnce = kLoaders / kChunks, kUnroll = kZeros ? 1 : 4;
  const int used = tile.used;
  const uint32_t first_member = tile.first_member;
  const auto offset = [&](uint32_t r) {
    const uint32_t member = first_member + r, query = group.divide(member);
    return query * p.q_heads + (member - query * group.by());
  };
  const int chunk = thread % kChunks;
  const uint8_t* const place = from + chunk / 8 * (S::kRows * 128);
  T* const to = static_cast<T*>(p.out) + tile.row * kHeadSize + 8 * chunk;
#pragma unroll 1
  for (int first = thread / kChunks; first < used; first += kUnroll * kRowsAtOnce) {
    uint4 values[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int r = first + i * kRowsAtOnce;
      values[i] = make_uint4(0, 0, 0, 0);
      if (!kZeros && r < used) {
        values[i] = *reinterpret_cast<const uint4*>(place + r * 128 + ((chunk ^ r) & 7) * 16);
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int r = first + i * kRowsAtOnce;
      if (r < used) *reinterpret_cast<uint4*>(to + static_cast<int64_t>(offset(r)) * kHeadSize) = values[i];
    }
  }
  for (int r = thread; r < used; r += kLoaders) p.lse[tile.row + offset(r)] = kZeros ? -kInfinity : lse[r];
}

template <class T, int kHeadSize>
__global__ void __launch_bounds__(Shape<kHeadSize>::kThreads, 1)
    injected_attention_chained(const __grid_constant__ InjectedAttentionSm90Params p,
                               const __grid_constant__ CUtensorMap key_map,
                               const __grid_constant__ CUtensorMap value_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = ChainedShape<kHeadSize>;
  constexpr int kSlots = S::kSlots, kWarpgroups = S::kWarpgroups, kQueryStages = S::kQueryStages;
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t* const queries = shared;
  uint8_t* const slots = queries + kQueryStages * S::kQueryBytes;
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + S::kBarrierOffset);
  uint64_t* const empty = full + S::kStages;
  uint64_t* const query_full = empty + S::kStages;
  // the queries have been used, and the results stand in their place
  uint64_t* const results_full = query_full + kQueryStages;
  RowTile* const only = reinterpret_cast<RowTile*>(shared + S::kRowOffset);
  ChainedTile* const tiles = reinterpret_cast<ChainedTile*>(shared + S::kTileOffset);
  float* const lse_rows = reinterpret_cast<float*>(shared + S::kLogSumExpOffset);

  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&key_map);
    prefetch_tensor_map(&value_map);
#pragma unroll
    for (int stage = 0; stage < S::kStages; ++stage) {
      barrier_init(full + stage, 1);
      // one arrival for each consumer warp
      barrier_init(empty + stage, 4 * kWarpgroups);
    }
#pragma unroll
    for (int stage = 0; stage < kQueryStages; ++stage) {
      barrier_init(query_full + stage, kLoaders);
      // one for each consumer warpgroup, whose warps meet before
      barrier_init(results_full + stage, kWarpgroups);
    }
    barrier_init_fence();
  }
  if (threadIdx.x == 32 && p.num_rows == 1) load_row(p, 0, only);
  __syncthreads();

  // a negative scale turns the queries round, so that the largest score is always the best one; a scale of 0 makes them
  // 0
  const float scale_log2 = (p.scale == 0 ? 1.0f : fabsf(p.scale)) * kLog2E;

  if (warpgroup == 0) {
    lower_registers<S::kLoaderRegisters>();
    Walk walk(p, *only, S::kRows, kSlots);
    Work work;
    if (warp > 0) {
      const int thread = threadIdx.x - 32;
      const Divisor group(p.q_heads / p.kv_heads);
      const float factor = p.scale == 0 ? 0.0f : p.scale < 0 ? -1.0f : 1.0f;
      Cursor<kQueryStages> query;
      int handed = 0;  // tiles given to the consumers, up to the number of stages
      const auto store = [&] {
        store_results<T, kHeadSize, false>(p, tiles[query.stage], queries + query.stage * S::kQueryBytes,
                                           lse_rows + query.stage * S::kRows, group, thread);
      };
      const auto describe = [&](const Work& work, ChainedTile* tile) {
        const uint32_t first_query = work.first_packed / group.by();
        tile->blocks = work.end;
        tile->valid = work.slot_count - (work.end - 1) * kSlots;
        tile->used = min(work.packed_count - work.first_packed, S::kRows);
        tile->first_member = work.first_packed - first_query * group.by();
        tile->row = static_cast<int64_t>(work.q_begin + first_query) * p.q_heads + work.head * group.by();
      };
      while (walk.next(&work)) {
        if (work.end == 0) {
          ChainedTile tile;
          describe(work, &tile);
          store_results<T, kHeadSize, true>(p, tile, nullptr, nullptr, group, thread);
          continue;
        }
        barrier_wait(results_full + query.stage, query.phase ^ 1);
        if (handed == kQueryStages) {
          store();
        } else {
          ++handed;
        }
        // a thread's copies replace what it has just stored
        load_queries<T, kHeadSize>(p, work, queries + query.stage * S::kQueryBytes, factor, group, thread);
        if (thread == 0) describe(work, tiles + query.stage);
        barrier_arrive(query_full + query.stage);
        query.advance();
      }
#pragma unroll 1
      for (int i = 0; i < kQueryStages; ++i) {
        barrier_wait(results_full + query.stage, query.phase ^ 1);
        if (handed >= kQueryStages - i) store();
        if (i == 0) {
          // the description has been read
          named_barrier_sync(kLoaderBarrier, kLoaders);
          if (thread == 0) tiles[query.stage].blocks = 0;
          barrier_arrive(query_full + query.stage);
        }
        query.advance();
      }
      return;
    }
    Cursor<S::kStages> cursor;
    const auto load = [&](const CUtensorMap& map, int head, int slot) {
      barrier_wait(empty + cursor.stage, cursor.phase ^ 1);
      barrier_arrive_expect(full + cursor.stage, S::kSlotBytes);
#pragma unroll
      for (int panel = 0; panel < S::kPanels; ++panel) {
        tensor_load_3d(slots + cursor.stage * S::kSlotBytes + panel * kSlots * 128, &map, full + cursor.stage,
                       panel * kPanel, head, slot, kEvictLast);
      }
      cursor.advance();
    };
    // the block whose values are to come
    int head = -1, slot = 0;
    while (walk.next(&work)) {
      if (lane == 0) {
        // the last block first: it is the one with a ragged end
        for (int block = work.end - 1; block >= 0; --block) {
          const int next = work.slot_begin + block * kSlots;
          load(key_map, work.head, next);
          if (head >= 0) load(value_map, head, slot);
          head = work.head;
          slot = next;
        }
      }
      __syncwarp();
    }
    if (lane == 0 && head >= 0) {
      // an empty stage in place of keys, so that values always stand behind one
      barrier_wait(empty + cursor.stage, cursor.phase ^ 1);
      barrier_arrive(full + cursor.stage);
      cursor.advance();
      load(value_map, head, slot);
    }
    return;
  }

  raise_registers<S::kConsumerRegisters>();
  const int consumer = warpgroup - 1;
  const int turn = kTurnBarrier + consumer, own = kTurnBarrier + kWarpgroups + consumer;
  const auto give_turn = [&] {
#pragma unroll
    for (int other = 1; other < kWarpgroups; ++other) {
      named_barrier_arrive(kTurnBarrier + (consumer + other) % kWarpgroups, 128 * kWarpgroups);
    }
  };
  // the first warpgroup begins: those behind it in the round have already had their turn
#pragma unroll
  for (int ahead = 0; ahead < kWarpgroups - 1; ++ahead) {
    if (consumer > ahead) named_barrier_arrive(kTurnBarrier + ahead, 128 * kWarpgroups);
  }

  const uint64_t query_operand = swizzled_operand(queries + consumer * 64 * 128, 16, 1024);
  const uint64_t key_operand = swizzled_operand(slots, 16, 1024);
  const uint64_t value_operand = swizzled_operand(slots, kSlots * 128, 1024);
  Cursor<S::kStages> cursor;
  Cursor<kQueryStages> query;
  float o[kHeadSize / 2], s[kSlots / 2];
  uint32_t weights[kSlots / 4];
  float maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {0, 0}, factor[2];

  const auto multiply_keys = [&] {
    const uint64_t a = query_operand + query.stage * (S::kQueryBytes >> 4);
    const uint64_t b = key_operand + cursor.stage * (S::kSlotBytes >> 4);
#pragma unroll
    for (int step = 0; step < kHeadSize / 16; ++step) {
      const int panel = step / 4, inside = step % 4 * 2;  // 32 bytes
      multiply<T, kSlots, Major::K>(a + (panel * S::kRows * 8 + inside), b + (panel * kSlots * 8 + inside), s,
                                    step != 0);
    }
  };
  const auto multiply_values = [&] {
    const uint64_t b = value_operand + cursor.stage * (S::kSlotBytes >> 4);
#pragma unroll
    for (int step = 0; step < kSlots / 16; ++step) {
      multiply<T, kHeadSize, Major::MN>(weights + 4 * step, b + step * 128, o, true);
    }
  };
  const auto release = [&](uint64_t* barrier) {
    if (lane == 0) barrier_arrive(barrier);
  };
  // Scores of the next block and output of the last one; the scores are there when it returns.
  const auto issue = [&] {
    barrier_wait(full + cursor.stage, cursor.phase);
    named_barrier_sync(turn, 128 * kWarpgroups);
    fence_registers(s);
    fence_registers(o);
    fence_registers(weights);
    wgmma_fence();
    multiply_keys();
    wgmma_commit();
    uint64_t* const keys_used = empty + cursor.stage;
    cursor.advance();
    barrier_wait(full + cursor.stage, cursor.phase);
    wgmma_fence();
    multiply_values();
    wgmma_commit();
    give_turn();
    wgmma_wait<1>();
    fence_registers(s);
    release(keys_used);
  };
  const auto finish_values = [&] {
    wgmma_wait<0>();
    fence_registers(o);
    release(empty + cursor.stage);
    cursor.advance();
  };
  const auto pack_weights = [&] {
#pragma unroll
    for (int i = 0; i < kSlots / 4; ++i) weights[i] = pack_pair(T{}, s[2 * i], s[2 * i + 1]);
  };
  const auto mask_scores = [&](int valid) {
    if (valid >= kSlots) return;
#pragma unroll
    for (int j = 0; j < kSlots / 2; ++j) {
      const int column = j / 4 * 8 + lane % 4 * 2 + (j & 1);
      if (column >= valid) s[j] = -kInfinity;
    }
  };
  // The slots behind the end belong to somebody else, and a weight of 0 does not silence a NaN. Their values stand
  // behind the next keys. The barrier before the product that reads them is the caller's.
  const auto silence_values = [&](int valid) {
    if (valid >= kSlots) return;
    Cursor<S::kStages> value = cursor;
    value.advance();
    barrier_wait(full + value.stage, value.phase);
    uint8_t* const stage = slots + value.stage * S::kSlotBytes;
    for (int i = valid * 8 + threadIdx.x % 128; i < kSlots * 8; i += 128) {
#pragma unroll
      for (int panel = 0; panel < S::kPanels; ++panel) {
        *reinterpret_cast<uint4*>(stage + panel * kSlots * 128 + i * 16) = make_uint4(0, 0, 0, 0);
      }
    }
    async_proxy_fence();
  };
  // Results into the place of their queries, which the warpgroup has finished with: its warps have met since.
  const auto hand_back = [&](int stage, const float (&maximum)[2], float (&sum)[2]) {
    float inverse[2];
    const int row = consumer * 64 + warp % 4 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
      // scores of -inf alone: zeros
      const bool nothing = sum[i] == 0.0f;
      inverse[i] = nothing ? 0.0f : 1.0f / sum[i];
      const float lse = nothing ? -kInfinity : (maximum[i] * scale_log2 + log2f(sum[i])) * kLn2;
      if (lane % 4 == 0) lse_rows[stage * S::kRows + row + 8 * i] = lse;
    }
    uint8_t* const to = queries + stage * S::kQueryBytes;
#pragma unroll
    for (int j = 0; j < kHeadSize / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        *reinterpret_cast<uint32_t*>(to + swizzled<S::kRows>(row + 8 * i, 8 * j) + lane % 4 * 4) =
            pack_pair(T{}, o[4 * j + 2 * i] * inverse[i], o[4 * j + 2 * i + 1] * inverse[i]);
      }
    }
    named_barrier_sync(own, 128);
    if (threadIdx.x % 128 == 0) barrier_arrive(results_full + stage);
  };

  barrier_wait(query_full, 0);
  int left = tiles[0].blocks, valid = tiles[0].valid;
  if (left == 0) return;
#pragma unroll
  for (int i = 0; i < kHeadSize / 2; ++i) o[i] = 0;
  barrier_wait(full, 0);
  // in turn, so that the warpgroups do not compute their first weights all at once
  named_barrier_sync(turn, 128 * kWarpgroups);
  fence_registers(s);
  wgmma_fence();
  multiply_keys();
  wgmma_commit();
  give_turn();
  wgmma_wait<0>();
  fence_registers(s);
  release(empty);
  cursor.advance();
  mask_scores(valid);
  weigh(s, maximum, sum, factor, scale_log2);
  pack_weights();
  silence_values(valid);

  while (true) {
    for (; left > 1; --left) {
      issue();
      const bool rescale = weigh(s, maximum, sum, factor, scale_log2);
      finish_values();
      pack_weights();
      if (rescale) {
#pragma unroll
        for (int i = 0; i < kHeadSize / 2; i += 4) {
          o[i] *= factor[0];
          o[i + 1] *= factor[0];
          o[i + 2] *= factor[1];
          o[i + 3] *= factor[1];
        }
      }
    }
    // the last product of this tile beside the first scores of the next
    const int stage = query.stage;
    query.advance();
    barrier_wait(query_full + query.stage, query.phase);
    left = tiles[query.stage].blocks;
    valid = tiles[query.stage].valid;
    if (left == 0) break;
    issue();
    mask_scores(valid);
    const float last_maximum[2] = {maximum[0], maximum[1]};
    float last_sum[2] = {sum[0], sum[1]};
    maximum[0] = maximum[1] = -kInfinity;
    sum[0] = sum[1] = 0;
    weigh(s, maximum, sum, factor, scale_log2);
    finish_values();
    hand_back(stage, last_maximum, last_sum);
    pack_weights();
    silence_values(valid);
#pragma unroll
    for (int i = 0; i < kHeadSize / 2; ++i) o[i] = 0;
  }
  // the empty stage
  barrier_wait(full + cursor.stage, cursor.phase);
  release(empty + cursor.stage);
  cursor.advance();
  barrier_wait(full + cursor.stage, cursor.phase);
  named_barrier_sync(own, 128);
  fence_registers(o);
  fence_registers(weights);
  wgmma_fence();
  multiply_values();
  wgmma_commit();
  finish_values();
  hand_back((query.stage + kQueryStages - 1) % kQueryStages, maximum, sum);
#endif
}

}  // namespace sm90

template <class T, int kHeadSize>
cudaError_t launch_injected_attention_chained_sm90_instance(const InjectedAttentionSm90Params& p, cudaStream_t stream) {
  using S = sm90::ChainedShape<kHeadSize>;
  return sm90::launch_tiles<kHeadSize>(sm90::injected_attention_chained<T, kHeadSize>, S::kSharedBytes, p, stream);
}

}  // namespace sharedllm

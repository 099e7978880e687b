// Injected attention on Hopper with chained tiles: the consumers of a persistent block never stop between tiles. The
// first scores of the next tile and the last output matmul of this one are issued together. The producer warps find the
// tiles, load their queries and store their results, so that a consumer only knows blocks of slots. For short memories,
// where rotating queries would be the limit, an earlier kernel rotates the keys back, and TMA moves queries and
// results. docs/kernels/injected_attention_prefill.md has the derivation.
#pragma once

#include "kernels/common/warp.cuh"
#include "kernels/injected_attention/hopper/forward.cuh"

namespace sharedllm {

namespace sm90 {

// A tile of packed rows, handed to the consumers with its queries, and back to the producers with its results.
struct ChainedTile {
  int blocks;        // of slots; 0: there are no more tiles
  int valid;         // slots of the last block
  int used;          // packed rows
  int first_member;  // the first row's index among the heads that share a key/value head
  int query, head;   // of member 0 of the first query
};

struct ChainedMaps {
  CUtensorMap keys, values;  // boxes of a block of slots
  CUtensorMap queries, out;  // boxes of a tile; for TMA only
};

// Two query stages behave like one: a stage frees only after the next tile starts. So short tiles need three.
template <int kHeadSize, bool kBulk>
struct ChainedShape : Shape<kHeadSize, kBulk ? 3 : Sm90Tile<kHeadSize>::kQueryStages> {
  using S = Shape<kHeadSize, kBulk ? 3 : Sm90Tile<kHeadSize>::kQueryStages>;
  static_assert(S::kQueryStages > 1, "results leave through a stage while the next tile is computed");
  static constexpr int kTileOffset = S::kSharedBytes;
  static constexpr int kLogSumExpOffset = kTileOffset + S::kQueryStages * static_cast<int>(sizeof(ChainedTile));
  static constexpr int kSharedBytes = kLogSumExpOffset + S::kQueryStages * S::kRows * 4;
  static_assert(S::kSharedBytes % 8 == 0 && kSharedBytes <= 227 * 1024);
};

// Where the results of a tile's rows go, [T, Hq].
class ResultRows {
 public:
  __device__ __forceinline__ ResultRows(const InjectedAttentionSm90Params& p, const ChainedTile& tile,
                                        const Divisor& group)
      : group_(group),
        first_member_(tile.first_member),
        heads_(p.q_heads),
        first_(static_cast<int64_t>(tile.query) * p.q_heads + tile.head) {}
  __device__ __forceinline__ int64_t at(uint32_t r) const {
    const uint32_t member = first_member_ + r, query = group_.divide(member);
    return first_ + (query * heads_ + (member - query * group_.by()));
  }

 private:
  const Divisor& group_;
  const uint32_t first_member_, heads_;
  const int64_t first_;
};

// Stores whole rows out of a query stage, or zeros for a tile without slots; with `lse` also its log-sum-exp, or -inf.
// By one warp where TMA stores other tiles, else by all loaders.
template <class T, int kHeadSize, bool kByTma, bool kZeros>
__device__ __forceinline__ void store_results(const InjectedAttentionSm90Params& p, const ChainedTile& tile,
                                              const uint8_t* from, const float* lse, const Divisor& group, int thread) {
  using S = Shape<kHeadSize>;
  constexpr int kThreads = kByTma ? 32 : kLoaders;
  constexpr int kChunks = kHeadSize / 8, kRowsAtOnce = kThreads / kChunks, kUnroll = kZeros ? 1 : 4;
  const int used = tile.used;
  const ResultRows rows(p, tile, group);
  const int chunk = thread % kChunks;
  const uint8_t* const place = from + chunk / 8 * (S::kRows * 128);
  T* const to = static_cast<T*>(p.out) + 8 * chunk;
  // TMA's boxes are for heads of the kernel's own size
  const int head_size = kByTma ? kHeadSize : p.head_size;
  const int there = kByTma || 8 * chunk < head_size ? used : 0;
#pragma unroll 1
  for (int first = thread / kChunks; first < there; first += kUnroll * kRowsAtOnce) {
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
      if (r < used) *reinterpret_cast<uint4*>(to + rows.at(r) * head_size) = values[i];
    }
  }
  if (!kZeros && lse == nullptr) return;
  for (int r = thread; r < used; r += kThreads) p.lse[rows.at(r)] = kZeros ? -kInfinity : lse[r];
}

template <class T, int kHeadSize, bool kBulk>
__global__ void __launch_bounds__(Shape<kHeadSize>::kThreads, 1)
    injected_attention_chained(const __grid_constant__ InjectedAttentionSm90Params p,
                               const __grid_constant__ ChainedMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = ChainedShape<kHeadSize, kBulk>;
  constexpr int kSlots = S::kSlots, kWarpgroups = S::kWarpgroups, kQueryStages = S::kQueryStages;
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t* const queries = shared;
  uint8_t* const slots = queries + kQueryStages * S::kQueryBytes;
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + S::kBarrierOffset);
  uint64_t* const empty = full + S::kStages;
  uint64_t* const query_full = empty + S::kStages;
  // the queries have been used, and the results are in their place
  uint64_t* const results_full = query_full + kQueryStages;
  RowTile* const only = reinterpret_cast<RowTile*>(shared + S::kRowOffset);
  ChainedTile* const tiles = reinterpret_cast<ChainedTile*>(shared + S::kTileOffset);
  float* const lse_rows = reinterpret_cast<float*>(shared + S::kLogSumExpOffset);

  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&maps.keys);
    prefetch_tensor_map(&maps.values);
    if constexpr (kBulk) {
      prefetch_tensor_map(&maps.queries);
      prefetch_tensor_map(&maps.out);
    }
#pragma unroll
    for (int stage = 0; stage < S::kStages; ++stage) {
      barrier_init(full + stage, 1);
      // one arrival for each consumer warp
      barrier_init(empty + stage, 4 * kWarpgroups);
    }
#pragma unroll
    for (int stage = 0; stage < kQueryStages; ++stage) {
      barrier_init(query_full + stage, kBulk ? 1 : kLoaders);
      barrier_init(results_full + stage, 128 * kWarpgroups);
    }
    barrier_init_fence();
  }
  if (threadIdx.x == 32 && p.num_rows == 1) load_row(p, 0, only);
  __syncthreads();

  // a negative scale negates the queries, so that the largest score is always the best one; a scale of 0 makes them 0
  const float scale_log2 = (p.scale == 0 ? 1.0f : fabsf(p.scale)) * kLog2E;
  const Divisor group(p.q_heads / p.kv_heads);
  const auto describe = [&](const Work& work, ChainedTile* tile) {
    const uint32_t first_query = work.first_packed / group.by();
    tile->blocks = work.end;
    tile->valid = work.slot_count - (work.end - 1) * kSlots;
    tile->used = min(work.packed_count - work.first_packed, p.tile_rows);
    tile->first_member = work.first_packed - first_query * group.by();
    tile->query = work.q_begin + first_query;
    tile->head = work.head * group.by();
  };

  if (warpgroup == 0) {
    lower_registers<S::kLoaderRegisters>();
    Walk walk(p, *only, p.tile_rows, kSlots);
    Work work;
    if (kBulk && warp > 1) return;
    if (kBulk && warp == 1) {
      const uint32_t bytes = S::kPanels * p.tile_rows * 128;
      Cursor<kQueryStages> query;
      int handed = 0;  // tiles handed to the consumers, up to the number of stages
      const auto store = [&] {
        const ChainedTile& tile = tiles[query.stage];
        const uint8_t* const from = queries + query.stage * S::kQueryBytes;
        if (tile.used < p.tile_rows) {
          // TMA would write queries past the end of the batch row
          store_results<T, kHeadSize, true, false>(p, tile, from, nullptr, group, lane);
        } else if (lane == 0) {
#pragma unroll
          for (int panel = 0; panel < S::kPanels; ++panel) {
            tensor_store_3d(from + panel * (S::kRows * 128), &maps.out, panel * kPanel, tile.head, tile.query);
          }
          bulk_commit();
          bulk_wait_read();
        }
        __syncwarp();
      };
      while (walk.next(&work)) {
        if (work.end == 0) {
          ChainedTile tile;
          describe(work, &tile);
          store_results<T, kHeadSize, true, true>(p, tile, nullptr, nullptr, group, lane);
          continue;
        }
        barrier_wait(results_full + query.stage, query.phase ^ 1);
        if (handed == kQueryStages) {
          store();
        } else {
          ++handed;
        }
        if (lane == 0) {
          describe(work, tiles + query.stage);
          barrier_arrive_expect(query_full + query.stage, bytes);
#pragma unroll
          for (int panel = 0; panel < S::kPanels; ++panel) {
            tensor_load_3d(queries + query.stage * S::kQueryBytes + panel * (S::kRows * 128), &maps.queries,
                           query_full + query.stage, panel * kPanel, tiles[query.stage].head, tiles[query.stage].query,
                           kEvictFirst);
          }
        }
        // no lane may wait for a phase when the others' tiles have brought the next one
        __syncwarp();
        query.advance();
      }
#pragma unroll 1
      for (int i = 0; i < kQueryStages; ++i) {
        barrier_wait(results_full + query.stage, query.phase ^ 1);
        if (handed >= kQueryStages - i) store();
        if (i == 0 && lane == 0) {
          tiles[query.stage].blocks = 0;
          barrier_arrive(query_full + query.stage);
        }
        query.advance();
      }
      return;
    }
    if (!kBulk && warp > 0) {
      const int thread = threadIdx.x - 32;
      const float factor = p.scale == 0 ? 0.0f : p.scale < 0 ? -1.0f : 1.0f;
      Cursor<kQueryStages> query;
      int handed = 0;  // tiles handed to the consumers, up to the number of stages
      const auto store = [&] {
        store_results<T, kHeadSize, false, false>(p, tiles[query.stage], queries + query.stage * S::kQueryBytes,
                                                  lse_rows + query.stage * S::kRows, group, thread);
      };
      while (walk.next(&work)) {
        if (work.end == 0) {
          ChainedTile tile;
          describe(work, &tile);
          store_results<T, kHeadSize, false, true>(p, tile, nullptr, nullptr, group, thread);
          continue;
        }
        barrier_wait(results_full + query.stage, query.phase ^ 1);
        if (handed == kQueryStages) {
          store();
        } else {
          ++handed;
        }
        // a thread's copies overwrite what it has just stored
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
    if (kBulk) wait_for_previous_kernel();
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
    // the block whose values come next
    int head = -1, slot = 0;
    while (walk.next(&work)) {
      if (lane == 0) {
        // the last block first: it is the one with a ragged end
        for (int block = work.end - 1; block >= 0; --block) {
          const int next = work.slot_begin + block * kSlots;
          load(maps.keys, work.head, next);
          if (head >= 0) load(maps.values, head, slot);
          head = work.head;
          slot = next;
        }
      }
      __syncwarp();
    }
    if (lane == 0 && head >= 0) {
      // an empty stage in place of keys, so that values always follow one
      barrier_wait(empty + cursor.stage, cursor.phase ^ 1);
      barrier_arrive(full + cursor.stage);
      cursor.advance();
      load(maps.values, head, slot);
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
  // the first warpgroup begins: those after it in the round have already had their turn
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
  // Scores of the next block and output of the last one; the scores are complete when it returns. Work that does not
  // need them goes into `meanwhile`.
  const auto issue = [&](const auto& meanwhile) {
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
    meanwhile();
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
  // Slots past the end belong to another row, and a weight of 0 does not silence a NaN. Their values follow the next
  // keys. The barrier before the matmul that reads them is the caller's.
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
  const int row = consumer * 64 + warp % 4 * 16 + lane / 4;  // the first of a thread's two
  // Log-sum-exp of a tile, and the factors of its results.
  const auto finish_sums = [&](int stage, float (&inverse)[2]) {
    const ChainedTile& tile = tiles[stage];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(kFullWarp, sum[i], 1);
      sum[i] += __shfl_xor_sync(kFullWarp, sum[i], 2);
      // scores of -inf alone: zeros
      const bool nothing = sum[i] == 0.0f;
      inverse[i] = nothing ? 0.0f : 1.0f / sum[i];
      if (lane % 4 != 0) continue;
      const float lse = nothing ? -kInfinity : (maximum[i] * scale_log2 + log2f(sum[i])) * kLn2;
      if constexpr (kBulk) {
        if (row + 8 * i < tile.used) p.lse[ResultRows(p, tile, group).at(row + 8 * i)] = lse;
      } else {
        lse_rows[stage * S::kRows + row + 8 * i] = lse;
      }
    }
  };
  // Epilogue: writes results in the place of their queries, which the warpgroup has finished with: its warps have met
  // since. Every thread arrives, not one for all: TMA needs each one's fence.
  const auto hand_back = [&](int stage, const float (&inverse)[2]) {
    const int place = consumer * 64 + warp % 4 * 16 + lane % 16;
    uint8_t* const to = queries + stage * S::kQueryBytes + place * 128;
    const int swizzle = (lane / 16 ^ place) & 7;
#pragma unroll
    for (int j = 0; j < kHeadSize / 8; j += 2) {
      const uint32_t x[4] = {pack_pair(T{}, o[4 * j] * inverse[0], o[4 * j + 1] * inverse[0]),
                             pack_pair(T{}, o[4 * j + 2] * inverse[1], o[4 * j + 3] * inverse[1]),
                             pack_pair(T{}, o[4 * j + 4] * inverse[0], o[4 * j + 5] * inverse[0]),
                             pack_pair(T{}, o[4 * j + 6] * inverse[1], o[4 * j + 7] * inverse[1])};
      store_matrices(to + j / 8 * (S::kRows * 128) + (swizzle ^ j % 8) * 16, x);
    }
    if constexpr (kBulk) async_proxy_fence();
    barrier_arrive(results_full + stage);
  };

  barrier_wait(query_full, 0);
  int left = tiles[0].blocks, valid = tiles[0].valid;
  if (left == 0) return;
#pragma unroll
  for (int i = 0; i < kHeadSize / 2; ++i) o[i] = 0;
  barrier_wait(full, 0);
  // alternating, so that the warpgroups do not compute their first weights all at once
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
      issue([] {});
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
    // the last output matmul of this tile with the first scores of the next
    const int stage = query.stage;
    query.advance();
    barrier_wait(query_full + query.stage, query.phase);
    left = tiles[query.stage].blocks;
    valid = tiles[query.stage].valid;
    if (left == 0) break;
    float inverse[2];
    issue([&] { finish_sums(stage, inverse); });
    mask_scores(valid);
    maximum[0] = maximum[1] = -kInfinity;
    sum[0] = sum[1] = 0;
    weigh(s, maximum, sum, factor, scale_log2);
    finish_values();
    hand_back(stage, inverse);
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
  const int stage = (query.stage + kQueryStages - 1) % kQueryStages;
  float inverse[2];
  finish_sums(stage, inverse);
  finish_values();
  hand_back(stage, inverse);
#endif
}

}  // namespace sm90

template <class T, int kHeadSize>
cudaError_t launch_injected_attention_chained_sm90_instance(const InjectedAttentionSm90Params& p, cudaStream_t stream) {
  using S = sm90::ChainedShape<kHeadSize, false>;
  sm90::ChainedMaps maps{};
  cudaError_t status = sm90::encode_slot_map<kHeadSize>(&maps.keys, p, p.k, p.k_stride);
  if (status == cudaSuccess) status = sm90::encode_slot_map<kHeadSize>(&maps.values, p, p.v, p.v_stride);
  if (status != cudaSuccess) return status;
  return sm90::launch_tiles<kHeadSize>(sm90::injected_attention_chained<T, kHeadSize, false>, S::kSharedBytes, false,
                                       stream, p, maps);
}

template <class T, int kHeadSize>
cudaError_t launch_injected_attention_bulk_sm90_instance(const InjectedAttentionSm90Params& p, cudaStream_t stream) {
  using S = sm90::ChainedShape<kHeadSize, true>;
  const bool turned = p.turned_keys != nullptr;
  const int64_t turned_stride[2] = {static_cast<int64_t>(p.kv_heads) * kHeadSize, kHeadSize};
  const int64_t sizes[3] = {kHeadSize, p.q_heads, p.num_queries};
  const int32_t group = p.q_heads / p.kv_heads;
  const int32_t box[3] = {sm90::kPanel, group, p.tile_rows / group};
  const int64_t out_stride[2] = {kHeadSize, static_cast<int64_t>(p.q_heads) * kHeadSize};
  sm90::ChainedMaps maps{};
  cudaError_t status = sm90::encode_slot_map<kHeadSize>(&maps.keys, p, turned ? p.turned_keys : p.k,
                                                        turned ? turned_stride : p.k_stride);
  if (status == cudaSuccess) status = sm90::encode_slot_map<kHeadSize>(&maps.values, p, p.v, p.v_stride);
  if (status == cudaSuccess) {
    status = encode_tensor_map_3d(&maps.queries, p.type, p.q, sizes, {p.q_stride[1], p.q_stride[0]}, box);
  }
  if (status == cudaSuccess) status = encode_tensor_map_3d(&maps.out, p.type, p.out, sizes, out_stride, box);
  if (status != cudaSuccess) return status;
  return sm90::launch_tiles<kHeadSize>(sm90::injected_attention_chained<T, kHeadSize, true>, S::kSharedBytes, turned,
                                       stream, p, maps);
}

}  // namespace sharedllm

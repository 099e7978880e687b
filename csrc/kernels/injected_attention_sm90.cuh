// Injected attention on Hopper. A persistent block takes tiles of 64 packed rows for each of its consumer warpgroups; a
// producer warp streams the tile's keys and values through shared memory (bulk tensor copies, two stages each). A
// consumer issues the scores of the next block of slots and the output of the last one together and computes the
// softmax while the tensor cores work for its neighbour. docs/kernels/injected_attention_prefill.md has the derivation.
#pragma once

#include <algorithm>

#include "kernels/common/attention_rows.cuh"
#include "kernels/common/query_rotation.cuh"
#include "kernels/common/tensor_map.h"
#include "kernels/common/warpgroup_product.cuh"
#include "kernels/injected_attention_sm90.h"

namespace sharedllm {

// Slots of a block and consumer warpgroups: the largest that keep accumulators, scores and weights in registers (240 a
// thread with two consumer warpgroups) and two stages of keys and values beside the queries in 227 KB.
template <int kHeadSize>
struct Sm90Tile;
template <>
struct Sm90Tile<64> {
  static constexpr int kSlots = 128, kWarpgroups = 3;
};
template <>
struct Sm90Tile<96> {
  static constexpr int kSlots = 176, kWarpgroups = 2;
};
template <>
struct Sm90Tile<128> {
  static constexpr int kSlots = 176, kWarpgroups = 2;
};
template <>
struct Sm90Tile<256> {
  static constexpr int kSlots = 80, kWarpgroups = 2;
};

namespace sm90 {

constexpr int kStages = 2;
constexpr int kPanel = 64;  // columns of a panel of 128-byte rows
// The maximum is only raised when it grows by a factor of 2^8 in the weights: until then float32 sums lose nothing, and
// the rescaling of the accumulators is skipped.
constexpr float kGrowth = 8.0f;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_inff();

template <int kHeadSize, int kSlots, int kWarpgroups>
struct Shape {
  static constexpr int kPanels = (kHeadSize + kPanel - 1) / kPanel;
  static constexpr int kRows = 64 * kWarpgroups;
  static constexpr int kQueryBytes = kRows * kPanels * 128;
  static constexpr int kSlotBytes = kSlots * kPanels * 128;
  static constexpr int kBarrierOffset = kQueryBytes + 2 * kStages * kSlotBytes;
  static constexpr int kSharedBytes = kBarrierOffset + 4 * kStages * 8;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  // 64K registers: what the producer gives up goes to the consumers
  static constexpr int kProducerRegisters = kWarpgroups == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 232 : 160;
  static_assert(kSharedBytes <= 227 * 1024);
};

// A block's place in its pipeline.
struct Cursor {
  int count = 0;
  __device__ __forceinline__ int stage() const { return count % kStages; }
  __device__ __forceinline__ uint32_t phase() const { return (count / kStages) & 1; }
};

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Blocks of slots that a split of a row covers.
struct Blocks {
  int64_t begin, end;
};
__device__ __forceinline__ Blocks split_blocks(int64_t slots, int block, int splits, int split) {
  const int64_t blocks = (slots + block - 1) / block;
  const int64_t each = (blocks + splits - 1) / splits;
  const int64_t begin = each * split < blocks ? each * split : blocks;
  return {begin, begin + each < blocks ? begin + each : blocks};
}

// Work item of a persistent block: tile of packed rows fastest, so that blocks that run together read the same slots.
struct Item {
  int64_t tile;
  int split, head;
};
__device__ __forceinline__ Item item_of(int64_t index, int64_t tiles, int splits) {
  const int64_t rest = index / tiles;
  return {index % tiles, static_cast<int>(rest % splits), static_cast<int>(rest / splits)};
}

// Weights of one block of scores in place; raises the running maximum if it has to and says by which factors the
// accumulators shrink. A thread holds two rows: elements 4j, 4j + 1 and 4j + 2, 4j + 3.
template <int kCount>
__device__ __forceinline__ bool weigh(float (&s)[kCount], float (&maximum)[2], float (&sum)[2], float (&factor)[2],
                                      float scale_log2) {
  float best[2] = {fmaxf(s[0], s[1]), fmaxf(s[2], s[3])};
#pragma unroll
  for (int j = 4; j < kCount; j += 4) {
    best[0] = fmaxf(best[0], fmaxf(s[j], s[j + 1]));
    best[1] = fmaxf(best[1], fmaxf(s[j + 2], s[j + 3]));
  }
  bool grows[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    best[i] = fmaxf(best[i], __shfl_xor_sync(0xffffffffu, best[i], 1));
    best[i] = fmaxf(best[i], __shfl_xor_sync(0xffffffffu, best[i], 2));
    best[i] = fmaxf(best[i], maximum[i]);
    // false for two infinities of the same sign, whose difference is NaN
    grows[i] = (best[i] - maximum[i]) * scale_log2 > kGrowth;
    factor[i] = 1.0f;
  }
  const bool rescale = __any_sync(0xffffffffu, grows[0] || grows[1]);
  if (rescale) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (grows[i]) {
        factor[i] = exp2_fast((maximum[i] - best[i]) * scale_log2);
        maximum[i] = best[i];
      }
      sum[i] *= factor[i];
    }
  }
  // a row that has seen only -inf keeps weights of 0
  const float base[2] = {maximum[0] == -kInfinity ? 0.0f : maximum[0] * scale_log2,
                         maximum[1] == -kInfinity ? 0.0f : maximum[1] * scale_log2};
#pragma unroll
  for (int j = 0; j < kCount; j += 4) {
    s[j] = exp2_fast(fmaf(s[j], scale_log2, -base[0]));
    s[j + 1] = exp2_fast(fmaf(s[j + 1], scale_log2, -base[0]));
    s[j + 2] = exp2_fast(fmaf(s[j + 2], scale_log2, -base[1]));
    s[j + 3] = exp2_fast(fmaf(s[j + 3], scale_log2, -base[1]));
    sum[0] += s[j] + s[j + 1];
    sum[1] += s[j + 2] + s[j + 3];
  }
  return rescale;
}

template <class T, int kHeadSize, int kSlots, int kWarpgroups>
__global__ void __launch_bounds__(128 * (kWarpgroups + 1), 1)
    injected_attention(const __grid_constant__ InjectedAttentionParams p, const __grid_constant__ CUtensorMap key_map,
                       const __grid_constant__ CUtensorMap value_map, int64_t tiles) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Shape<kHeadSize, kSlots, kWarpgroups>;
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t* const queries = shared;
  uint8_t* const keys = queries + S::kQueryBytes;
  uint8_t* const values = keys + kStages * S::kSlotBytes;
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(shared + S::kBarrierOffset);
  uint64_t *const key_full = barriers, *const key_empty = barriers + kStages;
  uint64_t *const value_full = barriers + 2 * kStages, *const value_empty = barriers + 3 * kStages;

  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&key_map);
    prefetch_tensor_map(&value_map);
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(key_full + stage, 1);
      barrier_init(value_full + stage, 1);
      // one arrival for each consumer warp
      barrier_init(key_empty + stage, 4 * kWarpgroups);
      barrier_init(value_empty + stage, 4 * kWarpgroups);
    }
    barrier_init_fence();
  }
  __syncthreads();
  const int64_t items = tiles * p.splits * p.kv_heads;

  if (warpgroup == 0) {
    lower_registers<S::kProducerRegisters>();
    if (warp != 0) return;
    Cursor key, value;
    const auto load = [&](const CUtensorMap& map, uint8_t* to, uint64_t* full, uint64_t* empty, Cursor& cursor,
                          int head, int64_t slot) {
      const int stage = cursor.stage();
      barrier_wait(empty + stage, cursor.phase() ^ 1);
      barrier_arrive_expect(full + stage, S::kSlotBytes);
#pragma unroll
      for (int panel = 0; panel < S::kPanels; ++panel) {
        tensor_load_3d(to + stage * S::kSlotBytes + panel * kSlots * 128, &map, full + stage, panel * kPanel, head,
                       static_cast<int32_t>(slot), kEvictLast);
      }
      ++cursor.count;
    };
    for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
      const Item item = item_of(index, tiles, p.splits);
      const RowTile row = find_row_tile(p, item.tile, S::kRows);
      if (row.row < 0) continue;
      const Blocks blocks = split_blocks(row.slot_count, kSlots, p.splits, item.split);
      if (lane == 0 && blocks.begin < blocks.end) {
        // the last block first: it is the one with a ragged end
        load(key_map, keys, key_full, key_empty, key, item.head, row.slot_begin + (blocks.end - 1) * kSlots);
        for (int64_t n = blocks.end - 1; n > blocks.begin; --n) {
          load(key_map, keys, key_full, key_empty, key, item.head, row.slot_begin + (n - 1) * kSlots);
          load(value_map, values, value_full, value_empty, value, item.head, row.slot_begin + n * kSlots);
        }
        load(value_map, values, value_full, value_empty, value, item.head, row.slot_begin + blocks.begin * kSlots);
      }
      __syncwarp();
    }
    return;
  }

  raise_registers<S::kConsumerRegisters>();
  const int consumer = warpgroup - 1, thread = threadIdx.x % 128;
  const int turn = 1 + consumer, own = 1 + kWarpgroups + consumer;  // named barriers
  const auto give_turn = [&] {
#pragma unroll
    for (int other = 1; other < kWarpgroups; ++other) {
      named_barrier_arrive(1 + (consumer + other) % kWarpgroups, 128 * kWarpgroups);
    }
  };
  // the first warpgroup begins: those behind it in the round have already had their turn
#pragma unroll
  for (int ahead = 0; ahead < kWarpgroups - 1; ++ahead) {
    if (consumer > ahead) named_barrier_arrive(1 + ahead, 128 * kWarpgroups);
  }

  // a negative scale turns the queries round, so that the largest score is always the best one; a scale of 0 makes them
  // 0
  const float scale_log2 = (p.scale == 0 ? 1.0f : fabsf(p.scale)) * kLog2E;
  const float query_factor = p.scale == 0 ? 0.0f : p.scale < 0 ? -1.0f : 1.0f;
  const uint32_t group = static_cast<uint32_t>(p.q_heads) / static_cast<uint32_t>(p.kv_heads);
  uint8_t* const my_queries = queries + consumer * 64 * 128;
  const uint64_t query_operand = swizzled_operand(my_queries, 16, 1024);
  const uint64_t key_operand = swizzled_operand(keys, 16, 1024);
  const uint64_t value_operand = swizzled_operand(values, kSlots * 128, 1024);
  // of the keys' pipeline; inside a tile the values are one block behind
  Cursor key;

  const auto multiply_keys = [&](float (&s)[kSlots / 2]) {
    const uint64_t operand = key_operand + key.stage() * (S::kSlotBytes >> 4);
#pragma unroll
    for (int step = 0; step < kHeadSize / 16; ++step) {
      const int panel = step / 4, inside = step % 4 * 2;  // 32 bytes
      multiply<T, kSlots, Major::K>(query_operand + (panel * S::kRows * 8 + inside),
                                    operand + (panel * kSlots * 8 + inside), s, step != 0);
    }
  };
  const auto multiply_values = [&](const Cursor& value, const uint32_t (&weights)[kSlots / 4],
                                   float (&o)[kHeadSize / 2]) {
    const uint64_t operand = value_operand + value.stage() * (S::kSlotBytes >> 4);
#pragma unroll
    for (int step = 0; step < kSlots / 16; ++step) {
      multiply<T, kHeadSize, Major::MN>(weights + 4 * step, operand + step * 128, o, true);
    }
  };
  const auto release = [&](uint64_t* empty, const Cursor& cursor) {
    if (lane == 0) barrier_arrive(empty + cursor.stage());
  };

  for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
    const Item item = item_of(index, tiles, p.splits);
    const RowTile row = find_row_tile(p, item.tile, S::kRows);
    if (row.row < 0) continue;
    const Blocks blocks = split_blocks(row.slot_count, kSlots, p.splits, item.split);
    const int64_t first_packed = row.tile * S::kRows + consumer * 64;
    const int64_t packed_rows = row.q_count * group - first_packed;  // of this warpgroup; may be none
    const int used_rows = packed_rows < 64 ? (packed_rows < 0 ? 0 : static_cast<int>(packed_rows)) : 64;
    const int64_t first_query = row.q_begin + first_packed / group;
    const uint32_t first_member = static_cast<uint32_t>(first_packed % group);
    const auto token_and_head = [&](int r) {
      const uint32_t member = first_member + r, query = member / group;
      return (first_query + query) * p.q_heads + item.head * group + (member - query * group);
    };

    if (blocks.begin < blocks.end) {
      const RotaryRow rotary{p.cos + row.position * p.rotary_half, p.sin + row.position * p.rotary_half, p.rotary_half};
      constexpr int kChunks = kHeadSize / 8;
      // the tile before has left this memory
      named_barrier_sync(own, 128);
#pragma unroll 2
      for (int i = thread; i < 64 * kChunks; i += 128) {
        const int r = i / kChunks, chunk = i % kChunks;
        uint4 rotated = make_uint4(0, 0, 0, 0);
        if (r < used_rows) {
          const uint32_t member = first_member + r, query = member / group;
          const T* from = static_cast<const T*>(p.q) + (first_query + query) * p.q_stride[0] +
                          (item.head * group + (member - query * group)) * p.q_stride[1];
          rotated = rotated_chunk(from, chunk, rotary, query_factor);
        }
        *reinterpret_cast<uint4*>(my_queries + (chunk / 8) * (S::kRows * 128) + r * 128 + (((chunk ^ r) & 7) << 4)) =
            rotated;
      }
      async_proxy_fence();
      named_barrier_sync(own, 128);
    }

    float o[kHeadSize / 2], s[kSlots / 2];
    uint32_t weights[kSlots / 4];
    float maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {0, 0}, factor[2];
#pragma unroll
    for (int i = 0; i < kHeadSize / 2; ++i) o[i] = 0;

    if (blocks.begin < blocks.end) {
      barrier_wait(key_full + key.stage(), key.phase());
      fence_registers(s);
      wgmma_fence();
      multiply_keys(s);
      wgmma_commit();
      wgmma_wait<0>();
      fence_registers(s);
      release(key_empty, key);

      const int valid = static_cast<int>(row.slot_count - (blocks.end - 1) * kSlots);
      if (valid < kSlots) {
#pragma unroll
        for (int j = 0; j < kSlots / 2; ++j) {
          const int column = j / 4 * 8 + lane % 4 * 2 + (j & 1);
          if (column >= valid) s[j] = -kInfinity;
        }
        // the slots behind belong to somebody else; a weight of 0 does not silence a NaN
        barrier_wait(value_full + key.stage(), key.phase());
        uint8_t* const stage = values + key.stage() * S::kSlotBytes;
        for (int i = valid * 8 + thread; i < kSlots * 8; i += 128) {
#pragma unroll
          for (int panel = 0; panel < S::kPanels; ++panel) {
            *reinterpret_cast<uint4*>(stage + panel * kSlots * 128 + i * 16) = make_uint4(0, 0, 0, 0);
          }
        }
        async_proxy_fence();
        named_barrier_sync(own, 128);
      }
      weigh(s, maximum, sum, factor, scale_log2);
#pragma unroll
      for (int i = 0; i < kSlots / 4; ++i) weights[i] = pack(T{}, s[2 * i], s[2 * i + 1]);

      for (int left = static_cast<int>(blocks.end - blocks.begin) - 1; left > 0; --left) {
        const Cursor value = key;
        ++key.count;
        barrier_wait(key_full + key.stage(), key.phase());
        named_barrier_sync(turn, 128 * kWarpgroups);
        fence_registers(s);
        fence_registers(o);
        fence_registers(weights);
        wgmma_fence();
        multiply_keys(s);
        wgmma_commit();
        barrier_wait(value_full + value.stage(), value.phase());
        multiply_values(value, weights, o);
        wgmma_commit();
        give_turn();
        wgmma_wait<1>();
        fence_registers(s);
        release(key_empty, key);
        const bool rescale = weigh(s, maximum, sum, factor, scale_log2);
        wgmma_wait<0>();
        fence_registers(o);
        release(value_empty, value);
#pragma unroll
        for (int i = 0; i < kSlots / 4; ++i) weights[i] = pack(T{}, s[2 * i], s[2 * i + 1]);
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
      barrier_wait(value_full + key.stage(), key.phase());
      fence_registers(o);
      fence_registers(weights);
      wgmma_fence();
      multiply_values(key, weights, o);
      wgmma_commit();
      wgmma_wait<0>();
      fence_registers(o);
      release(value_empty, key);
      ++key.count;
    }

    float* const lse = p.splits == 1 ? p.lse : p.partial_lse + item.split * p.num_queries * p.q_heads;
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
      // no slots, or -inf scores alone: zeros
      const bool nothing = sum[i] == 0.0f;
      inverse[i] = nothing ? 0.0f : 1.0f / sum[i];
      const int r = warp % 4 * 16 + lane / 4 + 8 * i;
      if (lane % 4 == 0 && r < used_rows) {
        lse[token_and_head(r)] = nothing ? -kInfinity : (maximum[i] * scale_log2 + log2f(sum[i])) * kLn2;
      }
    }
    if (p.splits > 1) {
      float* const partial = p.partial_out + item.split * p.num_queries * p.q_heads * kHeadSize;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = warp % 4 * 16 + lane / 4 + 8 * i;
        if (r >= used_rows) continue;
        float* const to = partial + token_and_head(r) * kHeadSize + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kHeadSize / 8; ++j) {
          *reinterpret_cast<float2*>(to + 8 * j) =
              make_float2(o[4 * j + 2 * i] * inverse[i], o[4 * j + 2 * i + 1] * inverse[i]);
        }
      }
      continue;
    }
    // through the queries' shared memory, as soon as the whole warpgroup has finished with it, so that rows are stored
    // whole
    named_barrier_sync(own, 128);
#pragma unroll
    for (int j = 0; j < kHeadSize / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = warp % 4 * 16 + lane / 4 + 8 * i;
        *reinterpret_cast<uint32_t*>(my_queries + (j / 8) * (S::kRows * 128) + r * 128 + (((j ^ r) & 7) << 4) +
                                     lane % 4 * 4) =
            pack(T{}, o[4 * j + 2 * i] * inverse[i], o[4 * j + 2 * i + 1] * inverse[i]);
      }
    }
    // a warp reads back only the 16 rows that it wrote
    __syncwarp();
    constexpr int kChunks = kHeadSize / 8;
#pragma unroll 4
    for (int i = lane; i < 16 * kChunks; i += 32) {
      const int r = warp % 4 * 16 + i / kChunks, chunk = i % kChunks;
      if (r < used_rows) {
        const uint4 whole = *reinterpret_cast<const uint4*>(my_queries + (chunk / 8) * (S::kRows * 128) + r * 128 +
                                                            (((chunk ^ r) & 7) << 4));
        *reinterpret_cast<uint4*>(static_cast<T*>(p.out) + token_and_head(r) * kHeadSize + 8 * chunk) = whole;
      }
    }
  }
#endif
}

}  // namespace sm90

template <class T, int kHeadSize>
cudaError_t launch_injected_attention_sm90_instance(const InjectedAttentionParams& p, cudaStream_t stream) {
  constexpr int kSlots = Sm90Tile<kHeadSize>::kSlots, kWarpgroups = Sm90Tile<kHeadSize>::kWarpgroups;
  using S = sm90::Shape<kHeadSize, kSlots, kWarpgroups>;
  const auto kernel = sm90::injected_attention<T, kHeadSize, kSlots, kWarpgroups>;
  CUtensorMap maps[2];
  const int64_t sizes[3] = {kHeadSize, p.kv_heads, std::max<int64_t>(p.num_slots, 1)};
  const int32_t box[3] = {sm90::kPanel, 1, kSlots};
  for (int i = 0; i < 2; ++i) {
    const int64_t* const strides = i ? p.v_stride : p.k_stride;
    const int64_t map_strides[2] = {strides[1], strides[0]};
    const cudaError_t status = encode_tensor_map_3d(&maps[i], p.type, i ? p.v : p.k, sizes, map_strides, box);
    if (status != cudaSuccess) return status;
  }
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  if (status != cudaSuccess) return status;
  int device = 0, multiprocessors = 0;
  status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  // a batch row adds at most one tile that is not full
  const int64_t tiles = p.num_queries * (p.q_heads / p.kv_heads) / S::kRows + p.num_rows;
  const int64_t items = tiles * p.splits * p.kv_heads;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(items, multiprocessors)));
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = S::kSharedBytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, p, maps[0], maps[1], tiles);
}

}  // namespace sharedllm

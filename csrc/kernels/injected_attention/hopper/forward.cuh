// Injected attention on Hopper (WGMMA, TMA). A persistent block takes tiles of 64 packed rows for each of its consumer
// warpgroups; a producer warp streams the tile's keys and values through shared memory by TMA. A consumer issues the
// scores of the next block of slots and the output of the last one together, and computes the softmax while the tensor
// cores work for the other warpgroup (ping-pong). docs/kernels/injected_attention_prefill.md has the derivation.
#pragma once

#include <algorithm>

#include "kernels/common/overlap.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/common/tensor_map.h"
#include "kernels/common/vector_load.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/common/warpgroup_product.cuh"
#include "kernels/injected_attention/hopper/forward.h"
#include "kernels/injected_attention/rows.cuh"

namespace sharedllm {

namespace sm90 {

constexpr int kPanel = 64;  // columns of a panel of 128-byte rows
constexpr int kLoaders = 96;
// Named barriers. The ping-pong takes one for each warpgroup, as do the warpgroups alone, which follow: up to three
// each.
enum Barrier : int { kTurnBarrier = 1, kLoaderBarrier = 7 };

template <int kHeadSize, int kStagesOfQueries = Sm90Tile<kHeadSize>::kQueryStages>
struct Shape {
  using Tile = Sm90Tile<kHeadSize>;
  static constexpr int kSlots = Tile::kSlots, kWarpgroups = Tile::kWarpgroups, kQueryStages = kStagesOfQueries;
  static constexpr int kPanels = (kHeadSize + kPanel - 1) / kPanel;
  static constexpr int kRows = 64 * kWarpgroups;
  static constexpr int kQueryBytes = kRows * kPanels * 128;
  static constexpr int kSlotBytes = kSlots * kPanels * 128;
  // keys and values share one ring, in the order in which they are used; more than six stages hide nothing more
  static constexpr int kFit = (227 * 1024 - 512 - kQueryStages * kQueryBytes) / kSlotBytes;
  static constexpr int kStages = kFit < 6 ? kFit : 6;
  static constexpr int kBarrierOffset = kQueryStages * kQueryBytes + kStages * kSlotBytes;
  static constexpr int kRowOffset = kBarrierOffset + 2 * (kStages + kQueryStages) * 8;
  static constexpr int kSharedBytes = kRowOffset + static_cast<int>(sizeof(RowTile));
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  // 64K registers: what the producer warpgroup gives up goes to the consumers (setmaxnreg)
  static constexpr int kLoaderRegisters = kHeadSize == 256 ? 40 : kWarpgroups == 2 ? 72 : 32;
  static constexpr int kConsumerRegisters = kHeadSize == 256 ? 232 : kWarpgroups == 2 ? 216 : 160;
  static_assert(kStages >= 4 && kSharedBytes <= 227 * 1024);
};

// A place in a ring of shared-memory stages.
template <int kStages>
struct Cursor {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Byte of an element in panels of 64 columns and kRows rows, 16-byte units swizzled inside eight rows.
template <int kRows>
__device__ __forceinline__ int swizzled(int row, int column) {
  return column / kPanel * (kRows * 128) + row * 128 + ((column / 8 ^ row) & 7) * 16 + column % 8 * 2;
}

// Rotates four pairs of elements, 8-byte aligned, in place.
template <class T>
__device__ __forceinline__ void turn_quad(T* low, T* high, const float4& cos, const float4& sin, float factor) {
  const float c[4] = {cos.x * factor, cos.y * factor, cos.z * factor, cos.w * factor};
  const float s[4] = {sin.x * factor, sin.y * factor, sin.z * factor, sin.w * factor};
  uint2 words[2] = {*reinterpret_cast<const uint2*>(low), *reinterpret_cast<const uint2*>(high)};
  const uint32_t x[2] = {words[0].x, words[0].y}, y[2] = {words[1].x, words[1].y};
  uint32_t turned[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float x0 = Word<T>::get(x[i], 0), x1 = Word<T>::get(x[i], 1);
    const float y0 = Word<T>::get(y[i], 0), y1 = Word<T>::get(y[i], 1);
    turned[0][i] = pack_pair(T{}, x0 * c[2 * i] - y0 * s[2 * i], x1 * c[2 * i + 1] - y1 * s[2 * i + 1]);
    turned[1][i] = pack_pair(T{}, y0 * c[2 * i] + x0 * s[2 * i], y1 * c[2 * i + 1] + x1 * s[2 * i + 1]);
  }
  *reinterpret_cast<uint2*>(low) = make_uint2(turned[0][0], turned[0][1]);
  *reinterpret_cast<uint2*>(high) = make_uint2(turned[1][0], turned[1][1]);
}

// The next work of a persistent block: some blocks of slots for one tile of packed rows and one key/value head. Counts
// fit in 32 bits (the plan sees to it), and registers are short.
struct Work {
  int q_begin, packed_count;  // queries of the batch row, and how many packed rows they make
  int first_packed;           // of the tile
  int slot_begin, slot_count, position;
  int head;
  int begin, end;  // blocks of slots
  int part;        // where partial results go, -1: the result is complete

  // Takes over what find_row_tile or load_row has found.
  __device__ __forceinline__ void set(const RowTile& row, int group, int rows) {
    q_begin = static_cast<int>(row.q_begin);
    packed_count = static_cast<int>(row.q_count) * group;
    first_packed = static_cast<int>(row.tile) * rows;
    slot_begin = static_cast<int>(row.slot_begin);
    slot_count = static_cast<int>(row.slot_count);
    position = static_cast<int>(row.position);
  }
};

// The same sequence for every role of a block. Tiles vary fastest, so that blocks that run together read the same
// slots. With a tail (stream-K) the batch is one row: the tiles that do not fill another wave are cut into equal shares
// of slots.
class Walk {
 public:
  // `only` is the row of a batch of one.
  __device__ __forceinline__ Walk(const InjectedAttentionSm90Params& p, const RowTile& only, int rows, int slots)
      : p_(p), only_(only), rows_(rows), slots_(slots), index_(blockIdx.x) {}

  __device__ __forceinline__ bool next(Work* work) {
    const uint32_t tiles = p_.tiles, whole = p_.whole_items;
    const int group = p_.q_heads / p_.kv_heads;
    while (index_ < whole) {
      const uint32_t index = index_, rest = index / tiles, splits = p_.splits;
      index_ += gridDim.x;
      RowTile row;
      if (p_.num_rows == 1) {
        row = only_;
        row.tile = index % tiles;
      } else {
        row = find_row_tile(p_, index % tiles, rows_);
        if (row.row < 0) continue;
      }
      work->set(row, group, rows_);
      work->head = static_cast<int>(rest / splits);
      const uint32_t split = rest % splits, blocks = blocks_of(row.slot_count), each = (blocks + splits - 1) / splits;
      work->begin = static_cast<int>(min(each * split, blocks));
      work->end = static_cast<int>(min(each * split + each, blocks));
      work->part = splits > 1 ? static_cast<int>(split) : -1;
      return true;
    }
    const uint32_t shares = p_.tail_shares;
    if (p_.tail_items == 0 || blockIdx.x >= shares) return false;
    RowTile row = only_;
    const uint32_t blocks = blocks_of(row.slot_count);
    uint32_t item, segment = segment_++;
    if (blocks == 0) {
      // no slots to split: the tiles are spread out to be filled with zeros
      item = blockIdx.x + segment * shares;
      if (item >= static_cast<uint32_t>(p_.tail_items)) return false;
      work->begin = work->end = 0;
      work->part = -1;
    } else {
      const uint64_t total = static_cast<uint64_t>(blocks) * p_.tail_items;
      if (segment == 0) at_ = static_cast<uint32_t>(total * blockIdx.x / shares);
      const uint32_t end = static_cast<uint32_t>(total * (blockIdx.x + 1) / shares);
      if (at_ >= end) return false;
      item = at_ / blocks;
      const uint32_t first = item * blocks, stop = min(end, first + blocks);
      work->begin = static_cast<int>(at_ - first);
      work->end = static_cast<int>(stop - first);
      work->part = at_ == first && stop == first + blocks ? -1 : static_cast<int>(2 * blockIdx.x + segment);
      at_ = stop;
    }
    const uint32_t global = whole + item;
    row.tile = global % tiles;
    work->set(row, group, rows_);
    work->head = static_cast<int>(global / tiles);
    return true;
  }

 private:
  __device__ __forceinline__ uint32_t blocks_of(int64_t slots) const {
    return (static_cast<uint32_t>(slots) + slots_ - 1) / slots_;
  }

  const InjectedAttentionSm90Params& p_;
  const RowTile& only_;
  const int rows_, slots_;
  uint32_t index_;
  uint32_t at_ = 0, segment_ = 0;  // in the tail
};

// Turns the scores of one block into weights in place; raises the running maximum if necessary, and gives the factors
// by which the accumulators are rescaled. A thread holds two rows: elements 4j, 4j + 1 and 4j + 2, 4j + 3.
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
    best[i] = fmaxf(best[i], __shfl_xor_sync(kFullWarp, best[i], 1));
    best[i] = fmaxf(best[i], __shfl_xor_sync(kFullWarp, best[i], 2));
    best[i] = fmaxf(best[i], maximum[i]);
    // false for two infinities of the same sign, whose difference is NaN
    grows[i] = (best[i] - maximum[i]) * scale_log2 > kGrowth;
    factor[i] = 1.0f;
  }
  const bool rescale = __any_sync(kFullWarp, grows[0] || grows[1]);
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

// Division of numbers below 2^16 by a constant divisor.
class Divisor {
 public:
  __device__ __forceinline__ explicit Divisor(uint32_t by) : by_(by), factor_(0xffffffffu / by + 1) {}
  // by 1 the factor is 2^32, which does not fit
  __device__ __forceinline__ uint32_t divide(uint32_t x) const { return by_ == 1 ? x : __umulhi(x, factor_); }
  __device__ __forceinline__ uint32_t by() const { return by_; }

 private:
  uint32_t by_, factor_;
};

// The queries of one tile: copied, then rotated in place.
template <class T, int kHeadSize>
__device__ __forceinline__ void load_queries(const InjectedAttentionSm90Params& p, const Work& work, uint8_t* to,
                                             float factor, const Divisor& group, int thread) {
  using S = Shape<kHeadSize>;
  constexpr int kChunks = kHeadSize / 8, kRowsAtOnce = kLoaders / kChunks;
  static_assert(kLoaders % kChunks == 0);
  // copies are asynchronous, so unrolling only saves issue slots; where registers are short it would cost more
  constexpr int kUnroll = S::kLoaderRegisters < 64 ? 1 : 4;
  const int used = min(work.packed_count - work.first_packed, S::kRows);
  const uint32_t first_query = work.first_packed / group.by(), first_member = work.first_packed % group.by();
  const T* const source = static_cast<const T*>(p.q) +
                          (work.q_begin + static_cast<int64_t>(first_query)) * p.q_stride[0] +
                          work.head * static_cast<int64_t>(group.by()) * p.q_stride[1];
  {
    const int chunk = thread % kChunks;
    // past the end of the rows, and of the head in a wider kernel, there are zeros
    const int there = 8 * chunk < p.head_size ? used : 0;
    const uint32_t place = shared_address(to) + chunk / 8 * (S::kRows * 128);
#pragma unroll kUnroll
    for (int r = thread / kChunks; r < S::kRows; r += kRowsAtOnce) {
      const uint32_t member = first_member + r, query = group.divide(member);
      const T* const from = source + query * p.q_stride[0] + (member - query * group.by()) * p.q_stride[1] + 8 * chunk;
      copy16_async(place + r * 128 + ((chunk ^ r) & 7) * 16, r < there ? from : source, r < there);
    }
  }
  wait_all_copies();
  named_barrier_sync(kLoaderBarrier, kLoaders);

  const int half = p.rotary_half;
  const float* const cos = p.cos + static_cast<int64_t>(work.position) * half;
  const float* const sin = p.sin + static_cast<int64_t>(work.position) * half;
  const auto element = [&](int r, int column) { return reinterpret_cast<T*>(to + swizzled<S::kRows>(r, column)); };
  const bool aligned = (reinterpret_cast<uintptr_t>(p.cos) | reinterpret_cast<uintptr_t>(p.sin)) % 16 == 0;
  const int quads = half / 4;
  if (half % 4 == 0 && aligned && quads > 0) {
    // every thread keeps its columns, and with them its row of the tables; what does not fill a row idles
    const int column = thread % quads * 4, at_once = kLoaders / quads;
    const float4 c = __ldg(reinterpret_cast<const float4*>(cos + column));
    const float4 s = __ldg(reinterpret_cast<const float4*>(sin + column));
#pragma unroll kUnroll
    for (int r = thread < at_once * quads ? thread / quads : used; r < used; r += at_once) {
      turn_quad<T>(element(r, column), element(r, column + half), c, s, factor);
    }
  } else {
#pragma unroll 1
    for (int i = thread; i < used * half; i += kLoaders) {
      const int r = i / half, column = i % half;
      T *const low = element(r, column), *const high = element(r, column + half);
      const float x = to_float(*low), y = to_float(*high), c = cos[column] * factor, s = sin[column] * factor;
      *low = from_float<T>(x * c - y * s);
      *high = from_float<T>(y * c + x * s);
    }
  }
  if (factor != 1.0f) {
    const int rest = kHeadSize - 2 * half;
#pragma unroll 1
    for (int i = thread; i < used * rest; i += kLoaders) {
      T* const x = element(i / rest, 2 * half + i % rest);
      *x = from_float<T>(to_float(*x) * factor);
    }
  }
  async_proxy_fence();
}

template <class T, int kHeadSize>
__global__ void __launch_bounds__(Shape<kHeadSize>::kThreads, 1)
    injected_attention(const __grid_constant__ InjectedAttentionSm90Params p,
                       const __grid_constant__ CUtensorMap key_map, const __grid_constant__ CUtensorMap value_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Shape<kHeadSize>;
  constexpr int kSlots = S::kSlots, kWarpgroups = S::kWarpgroups, kQueryStages = S::kQueryStages;
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t* const queries = shared;
  uint8_t* const slots = queries + kQueryStages * S::kQueryBytes;
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + S::kBarrierOffset);
  uint64_t* const empty = full + S::kStages;
  uint64_t* const query_full = empty + S::kStages;
  uint64_t* const query_empty = query_full + kQueryStages;
  RowTile* const only = reinterpret_cast<RowTile*>(shared + S::kRowOffset);

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
      barrier_init(query_empty + stage, 128 * kWarpgroups);
    }
    barrier_init_fence();
  }
  if (threadIdx.x == 32 && p.num_rows == 1) load_row(p, 0, only);
  __syncthreads();
  Walk walk(p, *only, S::kRows, kSlots);
  Work work;

  // a negative scale negates the queries, so that the largest score is always the best one; a scale of 0 makes them 0
  const float scale_log2 = (p.scale == 0 ? 1.0f : fabsf(p.scale)) * kLog2E;

  if (warpgroup == 0) {
    lower_registers<S::kLoaderRegisters>();
    if (warp > 0) {
      const Divisor group(p.q_heads / p.kv_heads);
      const float factor = p.scale == 0 ? 0.0f : p.scale < 0 ? -1.0f : 1.0f;
      Cursor<kQueryStages> query;
      while (walk.next(&work)) {
        if (work.begin == work.end) continue;
        barrier_wait(query_empty + query.stage, query.phase ^ 1);
        load_queries<T, kHeadSize>(p, work, queries + query.stage * S::kQueryBytes, factor, group, threadIdx.x - 32);
        barrier_arrive(query_full + query.stage);
        query.advance();
      }
      return;
    }
    Cursor<S::kStages> cursor;
    const auto load = [&](const CUtensorMap& map, int block) {
      barrier_wait(empty + cursor.stage, cursor.phase ^ 1);
      barrier_arrive_expect(full + cursor.stage, S::kSlotBytes);
      const int32_t slot = work.slot_begin + block * kSlots;
#pragma unroll
      for (int panel = 0; panel < S::kPanels; ++panel) {
        tensor_load_3d(slots + cursor.stage * S::kSlotBytes + panel * kSlots * 128, &map, full + cursor.stage,
                       panel * kPanel, work.head, slot, kEvictLast);
      }
      cursor.advance();
    };
    while (walk.next(&work)) {
      if (lane == 0 && work.begin < work.end) {
        // the last block first: it is the one with a ragged end
        load(key_map, work.end - 1);
        for (int block = work.end - 1; block > work.begin; --block) {
          load(key_map, block - 1);
          load(value_map, block);
        }
        load(value_map, work.begin);
      }
      __syncwarp();
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

  const Divisor group(p.q_heads / p.kv_heads);
  const uint64_t query_operand = swizzled_operand(queries + consumer * 64 * 128, 16, 1024);
  const uint64_t key_operand = swizzled_operand(slots, 16, 1024);
  const uint64_t value_operand = swizzled_operand(slots, kSlots * 128, 1024);
  Cursor<S::kStages> cursor;
  Cursor<kQueryStages> query;

  const auto multiply_keys = [&](float (&s)[kSlots / 2]) {
    const uint64_t a = query_operand + query.stage * (S::kQueryBytes >> 4);
    const uint64_t b = key_operand + cursor.stage * (S::kSlotBytes >> 4);
#pragma unroll
    for (int step = 0; step < kHeadSize / 16; ++step) {
      const int panel = step / 4, inside = step % 4 * 2;  // 32 bytes
      multiply<T, kSlots, Major::K>(a + (panel * S::kRows * 8 + inside), b + (panel * kSlots * 8 + inside), s,
                                    step != 0);
    }
  };
  const auto multiply_values = [&](const uint32_t (&weights)[kSlots / 4], float (&o)[kHeadSize / 2]) {
    const uint64_t b = value_operand + cursor.stage * (S::kSlotBytes >> 4);
#pragma unroll
    for (int step = 0; step < kSlots / 16; ++step) {
      multiply<T, kHeadSize, Major::MN>(weights + 4 * step, b + step * 128, o, true);
    }
  };
  const auto release = [&](uint64_t* barrier) {
    if (lane == 0) barrier_arrive(barrier);
  };

  while (walk.next(&work)) {
    const uint32_t first_packed = work.first_packed + consumer * 64;
    // of this warpgroup; may be none
    const int used_rows = min(work.packed_count - static_cast<int>(first_packed), 64);
    const uint32_t first_query = first_packed / group.by(), first_member = first_packed - first_query * group.by();
    const auto token_and_head = [&](int r) {
      const uint32_t member = first_member + r, query_of_row = group.divide(member);
      return static_cast<int64_t>(work.q_begin + first_query + query_of_row) * p.q_heads + work.head * group.by() +
             (member - query_of_row * group.by());
    };
    if (work.begin == work.end) {
      for (int r = threadIdx.x % 128; r < used_rows; r += 128) {
        const int64_t at = token_and_head(r);
        if (work.part >= 0) {
          p.partial_lse[static_cast<int64_t>(work.part) * p.num_queries * p.q_heads + at] = -kInfinity;
          continue;
        }
        p.lse[at] = -kInfinity;
        T* const to = static_cast<T*>(p.out) + at * p.head_size;
#pragma unroll
        for (int chunk = 0; chunk < kHeadSize / 8; ++chunk) {
          if (8 * chunk < p.head_size) reinterpret_cast<uint4*>(to)[chunk] = make_uint4(0, 0, 0, 0);
        }
      }
      continue;
    }

    float o[kHeadSize / 2], s[kSlots / 2];
    uint32_t weights[kSlots / 4];
    float maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {0, 0}, factor[2];
#pragma unroll
    for (int i = 0; i < kHeadSize / 2; ++i) o[i] = 0;

    barrier_wait(query_full + query.stage, query.phase);
    barrier_wait(full + cursor.stage, cursor.phase);
    // alternating, so that the warpgroups do not compute their first weights all at once
    named_barrier_sync(turn, 128 * kWarpgroups);
    fence_registers(s);
    wgmma_fence();
    multiply_keys(s);
    wgmma_commit();
    give_turn();
    wgmma_wait<0>();
    fence_registers(s);
    release(empty + cursor.stage);
    cursor.advance();

    const int valid = max(work.slot_count - (work.end - 1) * kSlots, 0);
    if (valid < kSlots) {
#pragma unroll
      for (int j = 0; j < kSlots / 2; ++j) {
        const int column = j / 4 * 8 + lane % 4 * 2 + (j & 1);
        if (column >= valid) s[j] = -kInfinity;
      }
      // Slots past the end belong to another row, and a weight of 0 does not silence a NaN. Their values are in the
      // next stage but one if there is another block of keys, else in the next.
      Cursor<S::kStages> value = cursor;
      if (work.end - work.begin > 1) value.advance();
      barrier_wait(full + value.stage, value.phase);
      uint8_t* const stage = slots + value.stage * S::kSlotBytes;
      for (int i = valid * 8 + threadIdx.x % 128; i < kSlots * 8; i += 128) {
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
    for (int i = 0; i < kSlots / 4; ++i) weights[i] = pack_pair(T{}, s[2 * i], s[2 * i + 1]);

    for (int left = work.end - work.begin - 1; left > 0; --left) {
      barrier_wait(full + cursor.stage, cursor.phase);
      named_barrier_sync(turn, 128 * kWarpgroups);
      fence_registers(s);
      fence_registers(o);
      fence_registers(weights);
      wgmma_fence();
      multiply_keys(s);
      wgmma_commit();
      uint64_t* const keys_used = empty + cursor.stage;
      cursor.advance();
      barrier_wait(full + cursor.stage, cursor.phase);
      wgmma_fence();
      multiply_values(weights, o);
      wgmma_commit();
      give_turn();
      wgmma_wait<1>();
      fence_registers(s);
      release(keys_used);
      const bool rescale = weigh(s, maximum, sum, factor, scale_log2);
      wgmma_wait<0>();
      fence_registers(o);
      release(empty + cursor.stage);
      cursor.advance();
#pragma unroll
      for (int i = 0; i < kSlots / 4; ++i) weights[i] = pack_pair(T{}, s[2 * i], s[2 * i + 1]);
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
    if constexpr (kQueryStages == 1) barrier_arrive(query_empty + query.stage);
    barrier_wait(full + cursor.stage, cursor.phase);
    fence_registers(o);
    fence_registers(weights);
    wgmma_fence();
    multiply_values(weights, o);
    wgmma_commit();
    wgmma_wait<0>();
    fence_registers(o);
    release(empty + cursor.stage);
    cursor.advance();

    // one split of a row, or one part of a tile
    const bool in_tail = work.part >= 0 && p.splits == 1;
    const auto partial_row = [&](int r) {
      const int64_t part = work.part;
      return in_tail ? part * S::kRows + consumer * 64 + r : part * p.num_queries * p.q_heads + token_and_head(r);
    };
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(kFullWarp, sum[i], 1);
      sum[i] += __shfl_xor_sync(kFullWarp, sum[i], 2);
      // only -inf scores: zeros
      const bool nothing = sum[i] == 0.0f;
      inverse[i] = nothing ? 0.0f : 1.0f / sum[i];
      const int r = warp % 4 * 16 + lane / 4 + 8 * i;
      if (lane % 4 == 0 && r < used_rows) {
        const float lse = nothing ? -kInfinity : (maximum[i] * scale_log2 + log2f(sum[i])) * kLn2;
        if (work.part < 0) {
          p.lse[token_and_head(r)] = lse;
        } else {
          p.partial_lse[partial_row(r)] = lse;
        }
      }
    }
    if (work.part >= 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = warp % 4 * 16 + lane / 4 + 8 * i;
        if (r >= used_rows) continue;
        float* const to = p.partial_out + partial_row(r) * kHeadSize + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kHeadSize / 8; ++j) {
          *reinterpret_cast<float2*>(to + 8 * j) =
              make_float2(o[4 * j + 2 * i] * inverse[i], o[4 * j + 2 * i + 1] * inverse[i]);
        }
      }
    } else if constexpr (kQueryStages == 1) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = warp % 4 * 16 + lane / 4 + 8 * i;
        if (r >= used_rows) continue;
        T* const to = static_cast<T*>(p.out) + token_and_head(r) * p.head_size + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kHeadSize / 8; ++j) {
          const uint32_t pair = pack_pair(T{}, o[4 * j + 2 * i] * inverse[i], o[4 * j + 2 * i + 1] * inverse[i]);
          if (8 * j < p.head_size) *reinterpret_cast<uint32_t*>(to + 8 * j) = pair;
        }
      }
    } else {
      // epilogue through the queries' shared memory, as soon as the whole warpgroup has finished with it, so that whole
      // rows are stored
      uint8_t* const staging = queries + query.stage * S::kQueryBytes;
      named_barrier_sync(own, 128);
#pragma unroll
      for (int j = 0; j < kHeadSize / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int r = consumer * 64 + warp % 4 * 16 + lane / 4 + 8 * i;
          *reinterpret_cast<uint32_t*>(staging + swizzled<S::kRows>(r, 8 * j) + lane % 4 * 4) =
              pack_pair(T{}, o[4 * j + 2 * i] * inverse[i], o[4 * j + 2 * i + 1] * inverse[i]);
        }
      }
      // a warp reads back only the 16 rows that it wrote
      __syncwarp();
      constexpr int kChunks = kHeadSize / 8;
#pragma unroll 4
      for (int i = lane; i < 16 * kChunks; i += 32) {
        const int r = warp % 4 * 16 + i / kChunks, chunk = i % kChunks;
        if (r < used_rows && 8 * chunk < p.head_size) {
          *reinterpret_cast<uint4*>(static_cast<T*>(p.out) + token_and_head(r) * p.head_size + 8 * chunk) =
              *reinterpret_cast<const uint4*>(staging + swizzled<S::kRows>(consumer * 64 + r, 8 * chunk));
        }
      }
      __syncwarp();
    }
    if constexpr (kQueryStages > 1) barrier_arrive(query_empty + query.stage);
    query.advance();
  }
#endif
}

// Merges the parts of the tiles that the tail cut, one warp per packed row, in the order of the slots.
template <class T, int kHeadSize>
__global__ void __launch_bounds__(256) injected_attention_tail(const __grid_constant__ InjectedAttentionSm90Params p) {
  using S = Shape<kHeadSize>;
  constexpr int kPerLane = kHeadSize / 32;
  const int lane = threadIdx.x % 32;
  const uint32_t job = blockIdx.x * 8 + threadIdx.x / 32, item = job / S::kRows, r = job % S::kRows;
  if (item >= static_cast<uint32_t>(p.tail_items)) return;
  const uint32_t global = static_cast<uint32_t>(p.whole_items) + item, tiles = static_cast<uint32_t>(p.tiles);
  RowTile row;
  load_row(p, 0, &row);
  const uint32_t group = static_cast<uint32_t>(p.q_heads) / static_cast<uint32_t>(p.kv_heads);
  const int64_t packed = static_cast<int64_t>(global % tiles) * S::kRows + r;
  const uint64_t shares = p.tail_shares, blocks = (row.slot_count + S::kSlots - 1) / S::kSlots;
  const uint64_t total = blocks * p.tail_items, first_block = item * blocks, last_block = first_block + blocks - 1;
  if (packed >= row.q_count * group || blocks == 0) return;
  // share i begins at total * i / shares: the first and the last one that hold blocks of this tile
  const uint32_t first = static_cast<uint32_t>(((first_block + 1) * shares - 1) / total);
  const uint32_t last = static_cast<uint32_t>(((last_block + 1) * shares - 1) / total);
  if (first == last) return;  // whole: the result is written
  const int64_t at = (row.q_begin + packed / group) * p.q_heads + global / tiles * group + packed % group;
  // -1 for a share without blocks
  const auto part_row = [&](uint32_t share) -> int64_t {
    const uint64_t begin = total * share / shares, end = total * (share + 1) / shares;
    if (begin == end) return -1;
    // a share that begins before this tile has its first part here
    const bool second = begin < first_block;
    return (2 * static_cast<int64_t>(share) + (second ? 1 : 0)) * S::kRows + r;
  };
  float best = -kInfinity;
  for (uint32_t share = first; share <= last; ++share) {
    const int64_t part = part_row(share);
    if (part < 0) continue;
    const float lse = p.partial_lse[part];
    best = lse > best || lse != lse ? lse : best;
  }
  float sum = 0, out[kPerLane] = {};
  for (uint32_t share = first; share <= last; ++share) {
    const int64_t part = part_row(share);
    if (part < 0) continue;
    const float lse = p.partial_lse[part];
    if (lse == -kInfinity) continue;
    const float weight = exp2f((lse - best) * kLog2E);
    sum += weight;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      out[i] = fmaf(weight, p.partial_out[part * kHeadSize + lane + 32 * i], out[i]);
    }
  }
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int column = lane + 32 * i;
    if (column < p.head_size) static_cast<T*>(p.out)[at * p.head_size + column] = from_float<T>(out[i] * inverse);
  }
  if (lane == 0) p.lse[at] = sum == 0.0f ? -kInfinity : best + logf(sum);
}

// Boxes of a block of slots of one head.
template <int kHeadSize>
cudaError_t encode_slot_map(CUtensorMap* map, const InjectedAttentionSm90Params& p, const void* slots,
                            const int64_t (&strides)[2]) {
  // columns past a narrower head's end arrive as zeros
  const int64_t sizes[3] = {p.head_size, p.kv_heads, p.num_slots};
  const int32_t box[3] = {kPanel, 1, Shape<kHeadSize>::kSlots};
  return encode_tensor_map_3d(map, p.type, slots, sizes, {strides[1], strides[0]}, box);
}

// Queues the persistent blocks of a plan; with `after` (PDL) they may start while the previous kernel ends.
template <int kHeadSize, class Kernel, class... Maps>
cudaError_t launch_tiles(Kernel kernel, int shared_bytes, bool after, cudaStream_t stream,
                         const InjectedAttentionSm90Params& p, const Maps&... maps) {
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  return launch_after(kernel, p.grid, Shape<kHeadSize>::kThreads, shared_bytes, after, stream, p, maps...);
}

}  // namespace sm90

template <class T, int kHeadSize>
cudaError_t launch_injected_attention_sm90_instance(const InjectedAttentionSm90Params& p, cudaStream_t stream) {
  using S = sm90::Shape<kHeadSize>;
  CUtensorMap keys, values;
  cudaError_t status = sm90::encode_slot_map<kHeadSize>(&keys, p, p.k, p.k_stride);
  if (status == cudaSuccess) status = sm90::encode_slot_map<kHeadSize>(&values, p, p.v, p.v_stride);
  if (status != cudaSuccess) return status;
  status = sm90::launch_tiles<kHeadSize>(sm90::injected_attention<T, kHeadSize>, S::kSharedBytes, false, stream, p,
                                         keys, values);
  if (status != cudaSuccess || p.tail_items == 0) return status;
  cudaLaunchConfig_t merge{};
  merge.gridDim = dim3(static_cast<unsigned>((static_cast<int64_t>(p.tail_items) * S::kRows + 7) / 8));
  merge.blockDim = dim3(256);
  merge.stream = stream;
  return cudaLaunchKernelEx(&merge, sm90::injected_attention_tail<T, kHeadSize>, p);
}

}  // namespace sharedllm

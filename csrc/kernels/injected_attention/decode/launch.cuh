// Injected attention for a few queries per row: tile choice and launch of both kernels.
#pragma once

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "kernels/common/instances.h"
#include "kernels/common/overlap.cuh"
#include "kernels/common/tensor_map.h"
#include "kernels/injected_attention/decode/attend.cuh"
#include "kernels/injected_attention/decode/config.cuh"
#include "kernels/injected_attention/decode/decode.h"
#include "kernels/injected_attention/decode/merge.cuh"

namespace sharedllm {
namespace decode {

template <class C, bool kByTile>
constexpr auto merge_kernel = merge_parts<typename C::T, C::kHeadSize, C::kRows, C::kSlots, kByTile, C::kMayAwait>;

template <class Kernel>
cudaError_t prepare_merge(Kernel* kernel) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

template <class C>
cudaError_t launch_merge(const InjectedAttentionParams& p, bool awaits, cudaStream_t stream) {
  const int64_t group = p.q_heads / p.kv_heads;
  // tiles that any batch of this size can have; each of them is shared at most once, and so is each worker's last one
  const int64_t tiles = p.num_queries * group / C::kRows + p.num_rows;
  const bool by_tile = tiles < p.splits;
  const int32_t rows = static_cast<int32_t>(std::min<int64_t>(C::kRows, p.num_queries * group));
  const int64_t blocks = (by_tile ? tiles : p.splits) * p.kv_heads * rows;
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
  config.numAttrs = C::kBulk ? 1 : 0;
  return cudaLaunchKernelEx(&config, by_tile ? merge_kernel<C, true> : merge_kernel<C, false>, p, rows, awaits);
}

// A box holds kSlots slots of one head, cut into pieces of 128 bytes, whole heads one after the other.
template <class C>
cudaError_t encode_map(CUtensorMap* map, const InjectedAttentionParams& p, const void* base,
                       const int64_t (&stride)[2]) {
  // in units of 16 bits, whatever the element type
  constexpr int kUnits = C::kRowBytes / 2, kPiece = 64;
  constexpr int kElements = C::kEightBit ? 2 : 1;  // in a unit
  const int64_t sizes[4] = {kPiece, kUnits / kPiece, p.kv_heads, p.num_slots};
  const int64_t strides[3] = {kPiece, stride[1] / kElements, stride[0] / kElements};
  const int32_t box[4] = {kPiece, kUnits / kPiece, 1, C::kSlots};
  // without slots nothing is read, and there may be no memory
  return encode_tensor_map_4d(map, FloatType::kFloat16, p.num_slots > 0 ? base : p.q, sizes, strides, box);
}

// Once per device: the kernel may use the shared memory that it needs, and it was compiled for this device.
template <class C>
cudaError_t prepare_kernel() {
  static std::atomic<uint64_t> prepared{0};
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (prepared.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  if (C::kBulk) {
    bool waits = false;
    status = code_waits(attend<C>, &waits);
    if (status != cudaSuccess) return status;
    // compiled for less, the kernel is empty
    if (!waits) return cudaErrorNotSupported;
  }
  status = cudaFuncSetAttribute(attend<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
  if (status != cudaSuccess) return status;
  // with another split of L1 cache and shared memory its blocks could not be resident beside those of the previous
  // kernel
  status = prepare_merge(merge_kernel<C, true>);
  if (status != cudaSuccess) return status;
  status = prepare_merge(merge_kernel<C, false>);
  if (status != cudaSuccess) return status;
  prepared.fetch_or(bit, std::memory_order_relaxed);
  return cudaSuccess;
}

template <class C>
cudaError_t launch(const InjectedAttentionParams& p, const Scales* scales, cudaStream_t stream) {
  std::conditional_t<C::kBulk, BulkMaps, Nothing> maps;
  std::conditional_t<C::kEightBit, Scales, Nothing> kernel_scales;
  const int64_t blocks = int64_t{p.splits} * p.kv_heads;
  if (p.num_slots > INT32_MAX || p.num_rows > INT32_MAX || p.num_queries * p.q_heads > INT32_MAX ||
      p.num_positions > INT32_MAX || blocks > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  cudaError_t status = prepare_kernel<C>();
  if (status != cudaSuccess) return status;
  if constexpr (C::kBulk) {
    status = encode_map<C>(&maps.key, p, p.k, p.k_stride);
    if (status != cudaSuccess) return status;
    status = encode_map<C>(&maps.value, p, p.v, p.v_stride);
    if (status != cudaSuccess) return status;
  }
  if constexpr (C::kEightBit) kernel_scales = *scales;
  // What the caches cannot hold anyway should not evict the rest; much more than that streams faster without the hint:
  // 36.8 against 40.8 us for 67 MB, 194.6 against 188.5 us for 537 MB.
  constexpr int64_t kLarge = int64_t{128} << 20;
  const int64_t bytes = 2 * p.num_slots * p.kv_heads * p.head_size * (C::kEightBit ? 1 : 2);
  constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
  const uint64_t hint = bytes > kLarge ? kEvictNormal : kEvictFirst;
  // Waiting for parts instead of the kernel's end saves 1 us for 67 MB. For less the merging kernel comes too late; for
  // more its polling costs more than it saves (3 us of 183 for 537 MB).
  constexpr int64_t kSmall = int64_t{32} << 20;
  const bool awaits = C::kMayAwait && p.splits > 1 && p.num_rows == 1 &&
                      p.num_queries * (p.q_heads / p.kv_heads) <= C::kRows && bytes >= kSmall && bytes <= kLarge;
  attend<C>
      <<<static_cast<unsigned>(blocks), C::kThreads, C::kSharedBytes, stream>>>(p, maps, kernel_scales, hint, awaits);
  status = cudaGetLastError();
  if (status != cudaSuccess || p.splits == 1) return status;
  return launch_merge<C>(p, awaits, stream);
}

// Chooses the tile. The slots of a block make 16 KB of keys (32 KB for 256 columns of 16 bits). A warp of 256
// columns takes 8 rows, others up to 16.
template <class T, class Code, int kHeadSize>
cudaError_t launch_bulk(const InjectedAttentionParams& p, const Scales* scales, cudaStream_t stream) {
  constexpr int kBytes = kHeadSize * sizeof(Code);
  // TMA's swizzle takes pieces of 128 bytes; other sizes use cp.async
  if constexpr (kBytes % 128 != 0) {
    return cudaErrorNotSupported;
  } else {
    if (p.head_size != kHeadSize) return cudaErrorNotSupported;
    constexpr int kSlots = kBytes <= 128 ? 128 : 64;
    constexpr bool kWide = kHeadSize == 256;
    // as many stages as fit beside the rest
    constexpr int kStages = kBytes == 512 ? 3 : 6, kFewerStages = kBytes == 512 ? 3 : kWide ? 5 : 6;
    constexpr int kRowTiles = kWide ? 1 : 2;
    constexpr Tile kRows8{
        .slots = kSlots, .slot_warps = 4, .row_warps = 1, .row_tiles = 1, .stages = kStages, .bulk = true};
    constexpr Tile kRows16{.slots = kSlots,
                           .slot_warps = 4,
                           .row_warps = kWide ? 2 : 1,
                           .row_tiles = kRowTiles,
                           .stages = kStages,
                           .bulk = true};
    constexpr Tile kRows32{.slots = kSlots,
                           .slot_warps = kWide ? 2 : 4,
                           .row_warps = kWide ? 4 : 2,
                           .row_tiles = kRowTiles,
                           .stages = kStages,
                           .bulk = true};
    constexpr Tile kRows64{.slots = kSlots,
                           .slot_warps = 2,
                           .row_warps = kWide ? 8 : 4,
                           .row_tiles = kRowTiles,
                           .stages = kFewerStages,
                           .bulk = true};
    switch (decode_tile_rows(p)) {
      case 8:
        return launch<Config<T, Code, kHeadSize, kRows8>>(p, scales, stream);
      case 16:
        return launch<Config<T, Code, kHeadSize, kRows16>>(p, scales, stream);
      case 32:
        return launch<Config<T, Code, kHeadSize, kRows32>>(p, scales, stream);
      default:
        return launch<Config<T, Code, kHeadSize, kRows64>>(p, scales, stream);
    }
  }
}

// Two stages: below the 99 KB of the smaller GPUs, and two blocks per SM on the larger ones. Three where two such
// blocks fit: 34.8 against 35.5 us for 67 MB, and 183.5 against 187.2 us for 537 MB, there with one block per SM
// (plan_injected_attention_decode).
template <class T, class Code, int kHeadSize>
cudaError_t launch_portable(const InjectedAttentionParams& p, const Scales* scales, cudaStream_t stream) {
  constexpr int kBytes = kHeadSize * sizeof(Code);
  constexpr bool kWide = kHeadSize == 256;
  constexpr int kSlots = kBytes == 512 ? 32 : kBytes <= 128 ? 128 : 64, kSlotWarps = kSlots == 32 ? 2 : 4;
  constexpr int kRowTiles = kWide ? 1 : 2;
  constexpr Tile kRows8{
      .slots = kSlots, .slot_warps = kSlotWarps, .row_warps = 1, .row_tiles = 1, .stages = 2, .bulk = false};
  constexpr Tile kRows8Deep{
      .slots = kSlots, .slot_warps = kSlotWarps, .row_warps = 1, .row_tiles = 1, .stages = 3, .bulk = false};
  constexpr Tile kRows16{.slots = kSlots,
                         .slot_warps = kSlotWarps,
                         .row_warps = kWide ? 2 : 1,
                         .row_tiles = kRowTiles,
                         .stages = 2,
                         .bulk = false};
  constexpr Tile kRows32{
      .slots = kSlots, .slot_warps = 2, .row_warps = kWide ? 4 : 2, .row_tiles = kRowTiles, .stages = 2, .bulk = false};
  constexpr Tile kRows64{
      .slots = kSlots, .slot_warps = 2, .row_warps = kWide ? 8 : 4, .row_tiles = kRowTiles, .stages = 2, .bulk = false};
  switch (decode_tile_rows(p)) {
    case 8: {
      using Deep = Config<T, Code, kHeadSize, kRows8Deep>;
      int shared_bytes = 0;
      const cudaError_t status = current_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &shared_bytes);
      if (status != cudaSuccess) return status;
      // each block takes up to 2 KB besides
      if (shared_bytes >= 2 * (Deep::kSharedBytes + 2048)) return launch<Deep>(p, scales, stream);
      return launch<Config<T, Code, kHeadSize, kRows8>>(p, scales, stream);
    }
    case 16:
      return launch<Config<T, Code, kHeadSize, kRows16>>(p, scales, stream);
    case 32:
      return launch<Config<T, Code, kHeadSize, kRows32>>(p, scales, stream);
    default:
      return launch<Config<T, Code, kHeadSize, kRows64>>(p, scales, stream);
  }
}

}  // namespace decode

template <class T, int kHeadSize>
cudaError_t launch_injected_attention_decode_bulk(const InjectedAttentionParams& p, cudaStream_t stream) {
  return decode::launch_bulk<T, T, kHeadSize>(p, nullptr, stream);
}
template <class T, int kHeadSize>
cudaError_t launch_injected_attention_decode_portable(const InjectedAttentionParams& p, cudaStream_t stream) {
  return decode::launch_portable<T, T, kHeadSize>(p, nullptr, stream);
}

}  // namespace sharedllm

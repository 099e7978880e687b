// The end of a segment: the results of the warps that shared its slots.
#pragma once

#include <cstdint>

#include "kernels/common/scalar.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/common/vector_load.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/injected_attention/decode/config.cuh"
#include "kernels/injected_attention/decode/matmuls.cuh"
#include "kernels/injected_attention/decode/work.cuh"

namespace sharedllm {
namespace decode {

// Epilogue: merges the warps' results of a segment. A whole tile goes to out and lse, otherwise to the workspace, with
// zeros where no slot had a weight.
template <class C>
__device__ __forceinline__ void finish_segment(const InjectedAttentionParams& p,
                                               const Walk<C::kRows, C::kSlots>& segment, uint32_t group, int head,
                                               int worker, float scale_log2, WarpState<C>& state, float* merge,
                                               float* statistics) {
  using T = typename C::T;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int slot_warp = warp % C::kSlotWarps, row_warp = warp / C::kSlotWarps;
  float *const maxima = statistics, *const sums = statistics + C::kSlotWarps * C::kRows;
#pragma unroll
  for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = state.sum[n][i];
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
      if (lane < 4) {
        const int at = slot_warp * C::kRows + row_warp * C::kWarpRows + n * 8 + 2 * lane + i;
        maxima[at] = state.maximum[n][i];
        sums[at] = sum;
      }
    }
  }
  sync_consumers<C::kConsumers>();

  const auto maximum_of = [&](int row) {
    float maximum = maxima[row];
#pragma unroll
    for (int w = 1; w < C::kSlotWarps; ++w) maximum = fmaxf(maximum, maxima[w * C::kRows + row]);
    return maximum;
  };
  const auto factor_of = [&](float own, float maximum) {
    return own == -kInfinity ? 0.0f : exp2_fast((own - maximum) * scale_log2);
  };
  const auto total_of = [&](int row, float maximum) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < C::kSlotWarps; ++w) {
      total += sums[w * C::kRows + row] * factor_of(maxima[w * C::kRows + row], maximum);
    }
    return total;
  };

  const uint32_t first_packed = segment.tile * C::kRows, packed_rows = segment.span.q_count * group - first_packed;
  const bool whole = segment.count == segment.blocks;
  const int64_t workspace_row =
      (static_cast<int64_t>(2 * worker + (segment.first == 0 ? 1 : 0)) * p.kv_heads + head) * C::kRows;
  const auto token_and_head = [&](int r) -> int64_t {
    const uint32_t packed = first_packed + r, query = packed / group;
    return static_cast<int64_t>(segment.span.q_begin + query) * p.q_heads + (head * group + (packed - query * group));
  };

  constexpr int kRounds = C::kHeadSize / C::kMergeColumns, kVectors = C::kMergeColumns / 4;
#pragma unroll
  for (int n = 0; n < C::kRowTiles; ++n) {
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      factor[i] = factor_of(state.maximum[n][i], maximum_of(row_warp * C::kWarpRows + n * 8 + lane % 4 * 2 + i));
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      float* const own = merge + warp * (8 * C::kMergePitch);
#pragma unroll
      for (int m = 0; m < C::kMergeColumns / 16; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          own[(lane % 4 * 2 + i % 2) * C::kMergePitch + column_of<C>(m, i, lane)] =
              state.o[round * (C::kMergeColumns / 16) + m][n][i] * factor[i % 2];
        }
      }
      sync_consumers<C::kConsumers>();
#pragma unroll 1
      for (int item = thread; item < C::kRowWarps * 8 * kVectors; item += C::kConsumers) {
        const int vector = item % kVectors, row8 = item / kVectors % 8, rows = item / (8 * kVectors);
        const int r = rows * C::kWarpRows + n * 8 + row8;
        if (r >= packed_rows) continue;
        float4 sum{};
#pragma unroll
        for (int w = 0; w < C::kSlotWarps; ++w) {
          const float4 x = *reinterpret_cast<const float4*>(
              merge + ((rows * C::kSlotWarps + w) * 8 + row8) * C::kMergePitch + 4 * vector);
          sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        const float maximum = maximum_of(r), total = total_of(r, maximum);
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
        sum.x *= inverse, sum.y *= inverse, sum.z *= inverse, sum.w *= inverse;
        // only -inf, or no slot
        const float lse = total == 0.0f ? -kInfinity : maximum * scale_log2 - C::kWeightShift + log2f(total);
        const int column = round * C::kMergeColumns + 4 * vector;
        if (whole) {
          const int64_t at = token_and_head(r);
          const uint2 result = make_uint2(pack_pair(T{}, sum.x, sum.y), pack_pair(T{}, sum.z, sum.w));
          if constexpr (!C::kMayBeWider) {
            *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + at * C::kHeadSize + column) = result;
          } else if (column < p.head_size) {
            *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + at * p.head_size + column) = result;
          }
          if (column == 0) p.lse[at] = lse * kLn2;
        } else {
          *reinterpret_cast<float4*>(p.partial_out + (workspace_row + r) * C::kHeadSize + column) = sum;
          if (column == 0) p.partial_lse[workspace_row + r] = lse;
        }
      }
      sync_consumers<C::kConsumers>();
    }
  }
}

}  // namespace decode
}  // namespace sharedllm

// Before and after the backward kernels: delta, log-sum-exp and RoPE of each query, the rotation of its gradient back,
// the sum of the parts of the slots' gradients. Memory-bound.
#include <cuda_runtime.h>

#include "kernels/common/overlap.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/injected_attention/backward.h"
#include "kernels/injected_attention/hopper/query_sums.h"
#include "kernels/injected_attention/query_rotation.cuh"
#include "kernels/injected_attention/rows.cuh"

namespace sharedllm {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = 8;  // of one thread: 16 bytes

// The tables' row for the position of the batch row that owns a query.
__device__ __forceinline__ RotaryRow find_rotary_row(const InjectedAttentionParams& p, int64_t query) {
  if (p.num_rows == 0 || p.num_positions == 0) return {nullptr, nullptr, 0};
  int64_t row = 0, end = p.num_rows;  // the last row that begins at or before the query
  while (row + 1 < end) {
    const int64_t middle = row + (end - row) / 2;
    if (__ldg(p.cu_q + middle) <= query) {
      row = middle;
    } else {
      end = middle;
    }
  }
  const int64_t at = clamp_index(__ldg(p.q_position + row), 0, p.num_positions - 1) * p.rotary_half;
  return {p.cos + at, p.sin + at, p.rotary_half};
}

// kLanes threads, 8 elements each, share one head of one query.
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const InjectedAttentionBackwardParams p) {
  let_next_kernel_start();
  const InjectedAttentionParams& f = p.forward;
  const int chunk = threadIdx.x % kLanes;
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  const bool inside = vector < f.num_queries * f.q_heads;
  const bool loads = inside && chunk * kElements < f.head_size;
  const int64_t at = vector * f.head_size + chunk * kElements;
  if (p.grad_q_float != nullptr && inside && chunk * kElements < f.columns) {
    float4* const to = reinterpret_cast<float4*>(p.grad_q_float + vector * f.columns + chunk * kElements);
    to[0] = to[1] = make_float4(0, 0, 0, 0);
  }
  float sum = 0;
  if (loads) {
    float out[kElements], grad[kElements];
    unpack8(T{}, load_streaming(reinterpret_cast<const uint4*>(static_cast<const T*>(f.out) + at)), out);
    unpack8(T{}, load_streaming(reinterpret_cast<const uint4*>(static_cast<const T*>(p.grad_out) + at)), grad);
#pragma unroll
    for (int i = 0; i < kElements; ++i) sum += out[i] * grad[i];
    if (p.q_rotated != nullptr) {
      const int64_t query = vector / f.q_heads, head = vector % f.q_heads;
      const T* const from = static_cast<const T*>(f.q) + query * f.q_stride[0] + head * f.q_stride[1];
      *reinterpret_cast<uint4*>(static_cast<T*>(p.q_rotated) + at) =
          rotated_chunk(from, chunk, find_rotary_row(f, query), 1.0f);
    }
  }
  sum = sum_lanes<kLanes>(sum);
  if (inside && chunk == 0) {
    const float lse = f.lse[vector];
    p.delta[vector] = p.grad_lse == nullptr ? sum : sum - p.grad_lse[vector];
    p.lse_log2[vector] = lse == -kInfinity ? kInfinity : lse * kLog2E;
  }
}

__device__ __forceinline__ void load8(const float* from, float (&to)[kElements]) {
  const float4 low = __ldcs(reinterpret_cast<const float4*>(from));
  const float4 high = __ldcs(reinterpret_cast<const float4*>(from) + 1);
  to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
  to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const InjectedAttentionBackwardParams p) {
  const InjectedAttentionParams& f = p.forward;
  const int chunks = f.head_size / kElements;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t vector = index / chunks;
  if (vector >= f.num_queries * f.q_heads) return;
  const int first = static_cast<int>(index % chunks) * kElements;
  const float* const from = p.grad_q_float + vector * f.head_size;
  const RotaryRow rotary = find_rotary_row(f, vector / f.q_heads);
  float x[kElements];
  load8(from + first, x);
  if (rotary.half % kElements == 0 && first < 2 * rotary.half) {
    const bool low = first < rotary.half;
    const int at = low ? first : first - rotary.half;
    float partner[kElements];
    load8(from + (low ? first + rotary.half : at), partner);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float cos = __ldg(rotary.cos + at + i), sin = __ldg(rotary.sin + at + i);
      x[i] = x[i] * cos + (low ? partner[i] : -partner[i]) * sin;
    }
  } else if (first < 2 * rotary.half) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int element = first + i, half = rotary.half;
      if (element < half) {
        x[i] = x[i] * rotary.cos[element] + from[element + half] * rotary.sin[element];
      } else if (element < 2 * half) {
        x[i] = x[i] * rotary.cos[element - half] - from[element - half] * rotary.sin[element - half];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kElements; ++i) x[i] *= f.scale;
  *reinterpret_cast<uint4*>(static_cast<T*>(p.grad_q) + vector * f.head_size + first) = pack8(T{}, x);
}

// The same from the layout of QuerySums: a thread takes two quads of a vector, if possible the two that are rotated
// with each other.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_packed_kernel(const InjectedAttentionBackwardParams p) {
  wait_for_previous_kernel();
  const InjectedAttentionParams& f = p.forward;
  const int threads = f.columns / 8;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t vectors = f.num_queries * f.q_heads;
  const bool inside = index / threads < vectors;
  const int64_t vector = inside ? index / threads : vectors - 1;
  const int thread = static_cast<int>(index % threads);
  const QuerySums layout(f);
  const int group = f.q_heads / f.kv_heads, head = static_cast<int>(vector % f.q_heads);
  const int64_t query = vector / f.q_heads, row = query * group + head % group;
  const int columns = QuerySums::columns(f.columns);
  const auto find = [&](int quad) {
    const int part = quad / (columns / 4);
    return p.grad_q_float + layout.offset(part, head / group, row) +
           QuerySums::quad(row, quad % (columns / 4) / 4, quad % 4) * 4;
  };
  // column of an element of a quad
  const auto column = [](int quad, int e) { return quad / 4 * 16 + quad % 4 * 2 + e / 2 * 8 + e % 2; };
  const RotaryRow rotary = p.turns_keys ? RotaryRow{nullptr, nullptr, 0} : find_rotary_row(f, query);
  const int half = rotary.half;
  const bool whole = half % 16 == 0, turns = whole && thread < half / 4;
  // neighbouring threads take neighbouring quads
  const int turning = whole ? half / 4 : 0;
  const int quads[2] = {turns ? thread : thread + turning, turns ? thread + turning : thread + threads};
  float x[2][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 sums = __ldcs(reinterpret_cast<const float4*>(find(quads[i])));
    x[i][0] = sums.x, x[i][1] = sums.y, x[i][2] = sums.z, x[i][3] = sums.w;
  }
  if (turns) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float cos = __ldg(rotary.cos + column(thread, e)), sin = __ldg(rotary.sin + column(thread, e));
      const float low = x[0][e], high = x[1][e];
      x[0][e] = low * cos + high * sin;
      x[1][e] = high * cos - low * sin;
    }
  } else if (!whole) {
    const auto at = [&](int c) { return find(c / 16 * 4 + c % 8 / 2)[c / 8 % 2 * 2 + c % 2]; };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int c = column(quads[i], e);
        if (c < half) {
          x[i][e] = x[i][e] * rotary.cos[c] + at(c + half) * rotary.sin[c];
        } else if (c < 2 * half) {
          x[i][e] = x[i][e] * rotary.cos[c - half] - at(c - half) * rotary.sin[c - half];
        }
      }
    }
  }
  T* const to = static_cast<T*>(p.grad_q) + vector * f.head_size;
  const bool odd = threadIdx.x & 1;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t first = pack_pair(T{}, x[i][0] * f.scale, x[i][1] * f.scale);
    const uint32_t second = pack_pair(T{}, x[i][2] * f.scale, x[i][3] * f.scale);
    const uint32_t got = __shfl_xor_sync(kFullWarp, odd ? first : second, 1);
    // four columns in a row, if the head has them
    const int first_column = column(quads[i] & ~1, odd ? 2 : 0);
    if (inside && first_column < f.head_size) {
      *reinterpret_cast<uint2*>(to + first_column) = odd ? make_uint2(got, second) : make_uint2(first, got);
    }
  }
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool is_supported(const InjectedAttentionParams& p) {
  return p.type != FloatType::kFloat32 && p.head_size % kElements == 0 && p.head_size > 0 && p.head_size <= p.columns &&
         p.columns <= 256 && 2 * p.rotary_half <= p.head_size;
}

template <class T>
cudaError_t launch_prepare(const InjectedAttentionBackwardParams& p, cudaStream_t stream) {
  const InjectedAttentionParams& f = p.forward;
  const int lanes = f.columns <= 64 ? 8 : f.columns <= 128 ? 16 : 32;
  const int64_t vectors = f.num_queries * f.q_heads, per_block = kThreads / lanes;
  const int64_t blocks = (vectors + per_block - 1) / per_block;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  const auto kernel = lanes == 8 ? prepare_kernel<T, 8> : lanes == 16 ? prepare_kernel<T, 16> : prepare_kernel<T, 32>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_finish(const InjectedAttentionBackwardParams& p, bool packed, cudaStream_t stream) {
  const InjectedAttentionParams& f = p.forward;
  if (!is_supported(f) || !is_aligned(p.grad_q_float) || !is_aligned(p.grad_q)) return cudaErrorNotSupported;
  if (!packed && f.head_size != f.columns) return cudaErrorNotSupported;
  const int64_t threads = f.num_queries * f.q_heads * (f.columns / kElements);
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  const bool bfloat16 = f.type == FloatType::kBFloat16;
  if (packed) {
    auto* const kernel = bfloat16 ? finish_packed_kernel<__nv_bfloat16> : finish_packed_kernel<__half>;
    return launch_after(kernel, blocks, kThreads, 0, true, stream, p);
  }
  auto* const kernel = bfloat16 ? finish_kernel<__nv_bfloat16> : finish_kernel<__half>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

// Four neighbouring elements of grad_k or grad_v from the parts' shares.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_partial_kernel(const InjectedAttentionBackwardParams p, int64_t quads) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= 2 * quads) return;
  const bool is_value = index >= quads;
  const int64_t at = is_value ? index - quads : index;
  const float4* const from = reinterpret_cast<const float4*>(is_value ? p.partial_grad_v : p.partial_grad_k) + at;
  float4 sum = __ldcs(from);
  for (int split = 1; split < p.kv_splits; ++split) {
    const float4 x = __ldcs(from + split * quads);
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }
  reinterpret_cast<uint2*>(is_value ? p.grad_v : p.grad_k)[at] =
      make_uint2(pack_pair(T{}, sum.x, sum.y), pack_pair(T{}, sum.z, sum.w));
}

template <class T>
cudaError_t launch_sum_partial(const InjectedAttentionBackwardParams& p, cudaStream_t stream) {
  const int64_t quads = p.forward.num_slots * p.forward.kv_heads * p.forward.columns / 4;
  const int64_t blocks = (2 * quads + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  return launch_after(sum_partial_kernel<T>, blocks, kThreads, 0, true, stream, p, quads);
}

// The same for the tiles of a tail, from the shares of their pieces.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_tail_kernel(const InjectedAttentionBackwardParams p, const SlotTileTail tail) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const InjectedAttentionParams& f = p.forward;
  const int row_quads = f.columns / 4, tile_quads = kBackwardSlots * row_quads;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t quads = static_cast<int64_t>(tail.tiles) * tile_quads;
  if (index >= 2 * quads) return;
  const bool is_value = index >= quads;
  const int64_t vector = (is_value ? index - quads : index) / row_quads;
  const int quad = static_cast<int>(index % row_quads), row = static_cast<int>(vector % kBackwardSlots);
  const int tile = static_cast<int>(vector / kBackwardSlots);
  const int64_t slot_tiles = (f.num_slots + kBackwardSlots - 1) / kBackwardSlots;
  const int64_t slot = (tail.whole + tile) % slot_tiles * kBackwardSlots + row;
  const int64_t kv_head = (tail.whole + tile) / slot_tiles;
  if (slot >= f.num_slots) return;
  const int pieces = tail.first_piece(tile + 1) - tail.first_piece(tile);
  const float4* const from = reinterpret_cast<const float4*>(is_value ? p.partial_grad_v : p.partial_grad_k) +
                             static_cast<int64_t>(tail.first_piece(tile)) * tile_quads + row * row_quads + quad;
  float4 sum = __ldcs(from);
  for (int piece = 1; piece < pieces; ++piece) {
    const float4 x = __ldcs(from + static_cast<int64_t>(piece) * tile_quads);
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }
  reinterpret_cast<uint2*>(is_value ? p.grad_v : p.grad_k)[(slot * f.kv_heads + kv_head) * row_quads + quad] =
      make_uint2(pack_pair(T{}, sum.x, sum.y), pack_pair(T{}, sum.z, sum.w));
}

template <class T>
cudaError_t launch_sum_tail(const InjectedAttentionBackwardParams& p, cudaStream_t stream) {
  const SlotTileTail tail(p);
  const int64_t quads = static_cast<int64_t>(tail.tiles) * kBackwardSlots * p.forward.columns / 4;
  const int64_t blocks = (2 * quads + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  return launch_after(sum_tail_kernel<T>, blocks, kThreads, 0, true, stream, p, tail);
}

}  // namespace

cudaError_t launch_injected_attention_backward_prepare(const InjectedAttentionBackwardParams& params,
                                                       cudaStream_t stream) {
  const InjectedAttentionParams& f = params.forward;
  if (!is_supported(f) || f.q_stride[0] % kElements != 0 || f.q_stride[1] % kElements != 0 || !is_aligned(f.q) ||
      !is_aligned(f.out) || !is_aligned(params.grad_out) || !is_aligned(params.q_rotated) ||
      !is_aligned(params.grad_q_float)) {
    return cudaErrorNotSupported;
  }
  return f.type == FloatType::kBFloat16 ? launch_prepare<__nv_bfloat16>(params, stream)
                                        : launch_prepare<__half>(params, stream);
}

cudaError_t launch_injected_attention_backward_finish(const InjectedAttentionBackwardParams& params,
                                                      cudaStream_t stream) {
  return launch_finish(params, false, stream);
}

cudaError_t launch_injected_attention_backward_finish_packed(const InjectedAttentionBackwardParams& params,
                                                             cudaStream_t stream) {
  return launch_finish(params, true, stream);
}

cudaError_t launch_injected_attention_backward_sum_parts(const InjectedAttentionBackwardParams& params,
                                                         cudaStream_t stream) {
  if (!is_supported(params.forward)) return cudaErrorNotSupported;
  const bool bfloat16 = params.forward.type == FloatType::kBFloat16;
  if (params.tail_shares > 0) {
    return bfloat16 ? launch_sum_tail<__nv_bfloat16>(params, stream) : launch_sum_tail<__half>(params, stream);
  }
  return bfloat16 ? launch_sum_partial<__nv_bfloat16>(params, stream) : launch_sum_partial<__half>(params, stream);
}

}  // namespace sharedllm

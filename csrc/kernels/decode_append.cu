#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/common/l2_prefetch.cuh"
#include "kernels/common/overlap.cuh"
#include "kernels/common/scalar.cuh"
#include "kernels/common/vector_load.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/common/with_float_type.h"
#include "kernels/decode_append.h"

namespace sharedllm {
namespace {

// one warp per head: few threads that end soon, spread over the device
constexpr int kThreads = 64;

template <class T>
__global__ void __launch_bounds__(kThreads) append(const __grid_constant__ DecodeAppendParams p) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int heads = p.q_heads + 2 * p.kv_heads;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (task < p.rows * heads) {
    const int64_t row = task / heads;
    const int head = static_cast<int>(task - row * heads);
    const int64_t length = clamp_index(p.length[row], 0, p.capacity);
    const int64_t first = clamp_index(p.first[row], 0, length);
    if (head == 0 && lane == 0) {
      const int64_t end = length < p.capacity ? length + 1 : p.capacity;
      const int64_t begin = p.window > 0 && end - p.window > first ? end - p.window : first;
      p.slot_range[2 * row] = row * p.capacity + begin;
      p.slot_range[2 * row + 1] = row * p.capacity + end;
    }
    const bool is_query = head < p.q_heads, is_value = head >= p.q_heads + p.kv_heads;
    const T* const from = static_cast<const T*>(p.qkv) + row * p.qkv_stride + static_cast<int64_t>(head) * p.head_size;
    T* to;
    if (is_query) {
      to = static_cast<T*>(p.q) + (row * p.q_heads + head) * p.head_size;
    } else if (is_value) {
      to = static_cast<T*>(p.values) + row * p.value_stride[0] + length * p.value_stride[1] +
           (head - p.q_heads - p.kv_heads) * p.value_stride[2];
    } else {
      to = static_cast<T*>(p.keys) + row * p.key_stride[0] + length * p.key_stride[1] +
           (head - p.q_heads) * p.key_stride[2];
    }
    if (is_query || length < p.capacity) {
      const T* const weight = static_cast<const T*>(is_query ? p.q_norm : is_value ? nullptr : p.k_norm);
      float inverse = 0;
      if (weight != nullptr) {
        float squares = 0;
        for (int i = lane; i < p.head_size; i += 32) {
          const float x = to_float(from[i]);
          squares += x * x;
        }
        inverse = rsqrtf(sum_lanes<32>(squares) / static_cast<float>(p.head_size) + p.eps);
      }
      // rounded as the norm's module does
      const auto read = [&](int i) {
        const float x = to_float(from[i]);
        if (weight == nullptr) return x;
        return to_float(from_float<T>(to_float(from_float<T>(x * inverse)) * to_float(weight[i])));
      };
      const int half = is_value || p.num_positions == 0 ? 0 : p.rotary_half;
      const int64_t position = clamp_index(length - first, 0, p.num_positions - 1) * p.rotary_half;
      for (int i = lane; i < half; i += 32) {
        const float c = p.cos[position + i], s = p.sin[position + i];
        const float low = read(i), high = read(i + half);
        to[i] = from_float<T>(low * c - high * s);
        to[i + half] = from_float<T>(high * c + low * s);
      }
      for (int i = 2 * half + lane; i < p.head_size; i += 32) to[i] = from_float<T>(read(i));
    }
  }
  prefetch_share(p.prefetch, p.prefetch_bytes);
}

template <class T>
cudaError_t launch(const DecodeAppendParams& p, cudaStream_t stream) {
  const int64_t tasks = p.rows * (p.q_heads + int64_t{2} * p.kv_heads);
  const int64_t blocks = (tasks + kThreads / 32 - 1) / (kThreads / 32);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch_after(append<T>, blocks, kThreads, 0, p.overlap, stream, p);
}

}  // namespace

cudaError_t launch_decode_append(const DecodeAppendParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return with_float_type(p.type, [&](auto number) { return launch<decltype(number)>(p, stream); });
}

}  // namespace sharedllm

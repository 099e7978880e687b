// Gradients of the node vectors' attention. A first kernel, one block per node and query head, reads the node's keys
// and values once for the softmax statistics and the query's gradient. A second one, one block per 32 tokens and
// key/value head, collects the nodes that hold these tokens, in order, and adds up their gradients of keys and values:
// equal input gives equal output to the last bit, however the spans overlap.
#include <algorithm>

#include "kernels/common/with_float_type.h"
#include "kernels/node_vectors.cuh"

namespace sharedllm {
namespace node_vectors {
namespace {

constexpr int kWarps = 8;
constexpr int kKeys = 4;  // keys loaded at once, to hide the latency

__device__ __forceinline__ void span_of(const NodeVectorsParams& p, int64_t node, int64_t* start, int64_t* length) {
  *start = clamp_index(p.spans[2 * node], 0, p.num_tokens);
  const int64_t left = p.num_tokens - *start;
  *length = clamp_index(p.spans[2 * node + 1], 0, left < p.num_positions ? left : p.num_positions);
}

// The pairs of elements of a row that a lane holds.
template <int kPairs>
struct Pairs {
  int low[kPairs], high[kPairs];
  bool has_low[kPairs], has_high[kPairs], rotated[kPairs];

  __device__ __forceinline__ Pairs(const NodeVectorsParams& p, int lane) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      pair_offsets(lane + 32 * i, p.rotary_half, 1, &low[i], &high[i]);
      has_low[i] = low[i] < p.head_size;
      has_high[i] = high[i] < p.head_size;
      rotated[i] = lane + 32 * i < p.rotary_half;
    }
  }

  template <class T>
  __device__ __forceinline__ void load(const T* from, float (&x)[kPairs][2]) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      x[i][0] = has_low[i] ? to_float(from[low[i]]) : 0.0f;
      x[i][1] = has_high[i] ? to_float(from[high[i]]) : 0.0f;
    }
  }

  template <class T>
  __device__ __forceinline__ void save(T* to, const float (&x)[kPairs][2]) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (has_low[i]) store(to + low[i], x[i][0]);
      if (has_high[i]) store(to + high[i], x[i][1]);
    }
  }

  // direction -1: rotates back
  __device__ __forceinline__ void rotate(const NodeVectorsParams& p, int64_t position, int lane, float direction,
                                         float (&x)[kPairs][2]) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (!rotated[i]) continue;
      const int64_t at = position * p.rotary_half + lane + 32 * i;
      const float c = __ldg(p.cos + at), s = __ldg(p.sin + at) * direction;
      const float a = x[i][0], b = x[i][1];
      x[i][0] = a * c - b * s;
      x[i][1] = b * c + a * s;
    }
  }
};

template <int kPairs>
__device__ __forceinline__ float dot(const float (&x)[kPairs][2], const float (&y)[kPairs][2]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) sum = fmaf(x[i][0], y[i][0], fmaf(x[i][1], y[i][1], sum));
  return sum_lanes<32>(sum);
}

template <class T, int kPairs>
__global__ void __launch_bounds__(32 * kWarps)
    node_vectors_backward_queries(const __grid_constant__ NodeVectorsBackwardParams b) {
  __shared__ float parts[kWarps][2 * 64 * kPairs];
  __shared__ float tops[kWarps], totals[kWarps], deltas[kWarps];
  const NodeVectorsParams& p = b.forward;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x, node = row / p.q_heads;
  const int head = static_cast<int>(row % p.q_heads), kv_head = head / (p.q_heads / p.kv_heads);
  int64_t start, length;
  span_of(p, node, &start, &length);
  const Pairs<kPairs> pairs(p, lane);
  T* const grad_q = static_cast<T*>(b.grad_q) + row * p.head_size;
  float grad[kPairs][2] = {};
  if (length == 0) {
    if (warp == 0) pairs.save(grad_q, grad);
    return;
  }
  float query[kPairs][2], upstream[kPairs][2];
  pairs.load(static_cast<const T*>(p.q) + node * p.q_stride[0] + head * p.q_stride[1], query);
  pairs.rotate(p, length - 1, lane, 1.0f, query);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    query[i][0] *= p.scale * kLog2E;
    query[i][1] *= p.scale * kLog2E;
  }
  if (warp == 0) pairs.save(b.query + row * p.head_size, query);
  pairs.load(static_cast<const T*>(b.grad_out) + row * p.head_size, upstream);

  // grad_q = scale * (sum of w dw k - delta * sum of w k): both sums, and delta, in one pass
  float weighted[kPairs][2] = {}, plain[kPairs][2] = {}, top = -INFINITY, total = 0.0f, delta = 0.0f;
  const T* const k = static_cast<const T*>(p.k) + start * p.k_stride[0] + kv_head * p.k_stride[1];
  const T* const v = static_cast<const T*>(p.v) + start * p.v_stride[0] + kv_head * p.v_stride[1];
  for (int64_t first = warp * kKeys; first < length; first += kWarps * kKeys) {
    float keys[kKeys][kPairs][2], score[kKeys], grad_weight[kKeys], best = top;
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      // past the end: the last key once more, without weight
      const int64_t token = first + j < length ? first + j : length - 1;
      float value[kPairs][2];
      pairs.load(k + token * p.k_stride[0], keys[j]);
      pairs.load(v + token * p.v_stride[0], value);
      pairs.rotate(p, token, lane, 1.0f, keys[j]);
      score[j] = dot(keys[j], query);
      grad_weight[j] = dot(value, upstream);
      if (first + j >= length) score[j] = -INFINITY;
      best = fmaxf(best, score[j]);
    }
    const float reference = best == -INFINITY ? 0.0f : best, factor = exp2f(top - reference);
    top = best;
    total *= factor;
    delta *= factor;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        weighted[i][e] *= factor;
        plain[i][e] *= factor;
      }
    }
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      const float weight = exp2f(score[j] - reference), product = weight * grad_weight[j];
      total += weight;
      delta += product;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          weighted[i][e] = fmaf(product, keys[j][i][e], weighted[i][e]);
          plain[i][e] = fmaf(weight, keys[j][i][e], plain[i][e]);
        }
      }
    }
  }
  if (lane == 0) {
    tops[warp] = top;
    totals[warp] = total;
    deltas[warp] = delta;
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      parts[warp][(2 * i + e) * 32 + lane] = weighted[i][e];
      parts[warp][(2 * (i + kPairs) + e) * 32 + lane] = plain[i][e];
    }
  }
  __syncthreads();
  if (warp > 0) return;
  top = -INFINITY;
  for (int i = 0; i < kWarps; ++i) top = fmaxf(top, tops[i]);
  if (top == -INFINITY) top = 0.0f;
  total = delta = 0.0f;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) weighted[i][0] = weighted[i][1] = plain[i][0] = plain[i][1] = 0.0f;
  for (int w = 0; w < kWarps; ++w) {
    const float factor = exp2f(tops[w] - top);
    total += totals[w] * factor;
    delta += deltas[w] * factor;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        weighted[i][e] += parts[w][(2 * i + e) * 32 + lane] * factor;
        plain[i][e] += parts[w][(2 * (i + kPairs) + e) * 32 + lane] * factor;
      }
    }
  }
  delta /= total;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
#pragma unroll
    for (int e = 0; e < 2; ++e) grad[i][e] = (weighted[i][e] - delta * plain[i][e]) * (p.scale / total);
  }
  pairs.rotate(p, length - 1, lane, -1.0f, grad);
  pairs.save(grad_q, grad);
  if (lane == 0) b.stats[row] = make_float2(top + log2f(total), delta);
}

// kTokens: tokens of a warp; what is held for each fills the registers.
template <class T, int kPairs, int kTokens>
__global__ void __launch_bounds__(32 * kWarps)
    node_vectors_backward_tokens(const __grid_constant__ NodeVectorsBackwardParams b) {
  constexpr int kThreads = 32 * kWarps, kBlockTokens = kWarps * kTokens;
  __shared__ int64_t nodes[kThreads];
  __shared__ int found[kWarps];
  const NodeVectorsParams& p = b.forward;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = p.q_heads / p.kv_heads;
  const int kv_head = static_cast<int>(blockIdx.x % p.kv_heads);
  const int64_t block_token = blockIdx.x / p.kv_heads * kBlockTokens, first = block_token + warp * kTokens;
  const Pairs<kPairs> pairs(p, lane);

  float keys[kTokens][kPairs][2], values[kTokens][kPairs][2];
  float grad_keys[kTokens][kPairs][2] = {}, grad_values[kTokens][kPairs][2] = {};
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    const int64_t token = first + j < p.num_tokens ? first + j : p.num_tokens - 1;
    pairs.load(static_cast<const T*>(p.k) + token * p.k_stride[0] + kv_head * p.k_stride[1], keys[j]);
    pairs.load(static_cast<const T*>(p.v) + token * p.v_stride[0] + kv_head * p.v_stride[1], values[j]);
  }

  for (int64_t base = 0; base < p.num_roots; base += kThreads) {
    bool holds = false;
    if (base + threadIdx.x < p.num_roots) {
      int64_t start, length;
      span_of(p, base + threadIdx.x, &start, &length);
      holds = length > 0 && start < block_token + kBlockTokens && start + length > block_token;
    }
    const unsigned holders = __ballot_sync(kFullWarp, holds);
    if (lane == 0) found[warp] = __popc(holders);
    __syncthreads();
    int before = 0, count = 0;
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) before += found[i];
      count += found[i];
    }
    if (holds) nodes[before + __popc(holders & ((1u << lane) - 1))] = base + threadIdx.x;
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      const int64_t node = nodes[i];
      int64_t start, length;
      span_of(p, node, &start, &length);
      if (start >= first + kTokens || start + length <= first) continue;
      float turned[kTokens][kPairs][2], grad_turned[kTokens][kPairs][2] = {};
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
#pragma unroll
        for (int e = 0; e < kPairs; ++e) {
          turned[j][e][0] = keys[j][e][0];
          turned[j][e][1] = keys[j][e][1];
        }
        pairs.rotate(p, clamp_index(first + j - start, 0, length - 1), lane, 1.0f, turned[j]);
      }
      for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        const int64_t row = node * p.q_heads + head;
        float query[kPairs][2], upstream[kPairs][2];
        pairs.load(b.query + row * p.head_size, query);
        pairs.load(static_cast<const T*>(b.grad_out) + row * p.head_size, upstream);
        const float2 stats = b.stats[row];
#pragma unroll
        for (int j = 0; j < kTokens; ++j) {
          const bool inside = first + j >= start && first + j < start + length;
          const float score = dot(turned[j], query), grad_weight = dot(values[j], upstream);
          const float weight = inside ? exp2f(score - stats.x) : 0.0f;
          // the query holds the factor log2(e) as well as scale
          const float grad_score = inside ? weight * (grad_weight - stats.y) * (1.0f / kLog2E) : 0.0f;
#pragma unroll
          for (int e = 0; e < kPairs; ++e) {
#pragma unroll
            for (int side = 0; side < 2; ++side) {
              grad_turned[j][e][side] = fmaf(grad_score, query[e][side], grad_turned[j][e][side]);
              grad_values[j][e][side] = fmaf(weight, upstream[e][side], grad_values[j][e][side]);
            }
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        pairs.rotate(p, clamp_index(first + j - start, 0, length - 1), lane, -1.0f, grad_turned[j]);
#pragma unroll
        for (int e = 0; e < kPairs; ++e) {
          grad_keys[j][e][0] += grad_turned[j][e][0];
          grad_keys[j][e][1] += grad_turned[j][e][1];
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    if (first + j >= p.num_tokens) continue;
    const int64_t row = ((first + j) * p.kv_heads + kv_head) * p.head_size;
    pairs.save(static_cast<T*>(b.grad_k) + row, grad_keys[j]);
    pairs.save(static_cast<T*>(b.grad_v) + row, grad_values[j]);
  }
}

template <class T, int kPairs>
cudaError_t launch(const NodeVectorsBackwardParams& b, cudaStream_t stream) {
  constexpr int kTokens = kPairs > 2 ? 2 : 4;
  const NodeVectorsParams& p = b.forward;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(32 * kWarps);
  config.stream = stream;
  if (p.num_roots > 0) {
    config.gridDim = dim3(static_cast<unsigned>(p.num_roots * p.q_heads));
    const cudaError_t status = cudaLaunchKernelEx(&config, node_vectors_backward_queries<T, kPairs>, b);
    if (status != cudaSuccess) return status;
  }
  if (p.num_tokens == 0) return cudaSuccess;
  const int64_t tiles = (p.num_tokens + kWarps * kTokens - 1) / (kWarps * kTokens);
  config.gridDim = dim3(static_cast<unsigned>(tiles * p.kv_heads));
  return cudaLaunchKernelEx(&config, node_vectors_backward_tokens<T, kPairs, kTokens>, b);
}

template <class T>
cudaError_t launch(const NodeVectorsBackwardParams& b, cudaStream_t stream) {
  const int32_t size = b.forward.head_size;
  return size <= 64 ? launch<T, 1>(b, stream) : size <= 128 ? launch<T, 2>(b, stream) : launch<T, 4>(b, stream);
}

}  // namespace
}  // namespace node_vectors

cudaError_t launch_node_vectors_backward(const NodeVectorsBackwardParams& b, cudaStream_t stream) {
  return with_float_type(b.forward.type,
                         [&](auto number) { return node_vectors::launch<decltype(number)>(b, stream); });
}

}  // namespace sharedllm

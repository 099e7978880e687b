// Fused linear for a few rows (GEMV): one warp per one or two rows of weights, x in shared memory; prologue RMSNorm,
// epilogue bias, gate or residual.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/common/global_memory.cuh"
#include "kernels/common/l2_prefetch.cuh"
#include "kernels/common/overlap.cuh"
#include "kernels/common/vector_load.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/decode_linear.h"

namespace sharedllm {
namespace decode_linear {

// One block per SM, with half of its registers, so that the next kernel's blocks can load their first weights beside it
// (PDL).
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
// 16-byte loads of a thread in flight: 64 KB per SM, where latency times bandwidth is about 20 KB.
constexpr int kLoads = 8;
// Shared memory other than x: the norm's partial sums, and the system's own.
constexpr int kStaticBytes = 2048;

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

template <class T>
constexpr int kElements = 16 / static_cast<int>(sizeof(T));

// 16 bytes at an element index, zeros from `end` on.
template <class T, bool kVector, bool kWeights>
__device__ __forceinline__ uint4 load_chunk(const T* row, int first, int end) {
  uint4 x{};
  if constexpr (kVector) {
    if (first < end) {
      const uint4* const from = reinterpret_cast<const uint4*>(row + first);
      x = kWeights ? load_once(from) : *from;
    }
  } else {
    __align__(16) T part[kElements<T>];
#pragma unroll
    for (int i = 0; i < kElements<T>; ++i) part[i] = first + i < end ? row[first + i] : from_float<T>(0.0f);
    x = *reinterpret_cast<const uint4*>(part);
  }
  return x;
}

template <class T>
__device__ __forceinline__ void to_floats(const uint4& x, float (&y)[kElements<T>]) {
  const uint32_t word[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < kElements<T>; ++i) y[i] = Word<T>::get(word[i / Word<T>::kElements], i % Word<T>::kElements);
}

template <class T>
__device__ __forceinline__ uint4 from_floats(const float (&x)[kElements<T>]) {
  __align__(16) T part[kElements<T>];
#pragma unroll
  for (int i = 0; i < kElements<T>; ++i) part[i] = from_float<T>(x[i]);
  return *reinterpret_cast<const uint4*>(part);
}

// Where row `n` of the matrices, one below the other, begins.
template <class T>
__device__ __forceinline__ const T* find_row(const DecodeLinearParams& p, int n) {
  int matrix = 0;
#pragma unroll
  for (int i = 0; i < kDecodeLinearMatrices - 1; ++i) {
    if (matrix == i && n >= p.outputs[i]) {
      n -= p.outputs[i];
      matrix = i + 1;
    }
  }
  // selects, because indexing would put the parameters into local memory
  const void* const base = matrix == 0 ? p.weight[0] : matrix == 1 ? p.weight[1] : p.weight[2];
  const int64_t stride = matrix == 0 ? p.weight_stride[0] : matrix == 1 ? p.weight_stride[1] : p.weight_stride[2];
  return static_cast<const T*>(base) + n * stride;
}

template <class T>
__device__ __forceinline__ float find_bias(const DecodeLinearParams& p, int n) {
  int matrix = 0;
#pragma unroll
  for (int i = 0; i < kDecodeLinearMatrices - 1; ++i) {
    if (matrix == i && n >= p.outputs[i]) {
      n -= p.outputs[i];
      matrix = i + 1;
    }
  }
  const void* const base = matrix == 0 ? p.bias[0] : matrix == 1 ? p.bias[1] : p.bias[2];
  return base == nullptr ? 0.0f : to_float(static_cast<const T*>(base)[n]);
}

// The matmul of kRows rows. A unit is kUnit rows of weights: neighbours, or (gated) the same row of both matrices.
template <class T, int kRows, int kUnit, bool kGated, bool kVector>
__global__ void __launch_bounds__(kThreads, kVector&& kRows <= 2 ? 2 : 1)
    multiply(const __grid_constant__ DecodeLinearParams p, const int pitch) {
  static_assert(!kGated || kUnit == 2);
  constexpr int kDepth = kLoads / kUnit;
  constexpr int kStep = 32 * kElements<T>;  // elements of a row that a warp takes at once
  extern __shared__ __align__(16) unsigned char shared[];
  T* const xs = reinterpret_cast<T*>(shared);  // [kRows, pitch], zeros from K on
  T* const norm = xs + kRows * pitch;          // [pitch]
  __shared__ float partial[kRows][kWarps];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int groups = pitch / (kDepth * kStep);
  const int inner = static_cast<int>(p.inner), outputs = static_cast<int>(p.num_outputs);
  const int units = kGated ? outputs : (outputs + kUnit - 1) / kUnit;
  const int stride = static_cast<int>(gridDim.x) * kWarps;
  // neighbouring units go to different SMs, so that the last incomplete wave is spread over all of them
  int unit = static_cast<int>(blockIdx.x + gridDim.x * warp);

  // loads run one group ahead of the multiplications, across the ends of rows
  int next_unit = unit;
  int next_group = 0;
  const T* row[kUnit] = {};  // this thread's first element of the next group
  int left = 0;              // elements of the row from there on, none past the last unit
  const auto find = [&] {
    left = next_unit < units ? inner - lane * kElements<T> : 0;
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      // an odd last row is read twice
      const int n = kGated ? next_unit : min(next_unit * kUnit + j, outputs - 1);
      row[j] = lane * kElements<T> +
               (kGated ? static_cast<const T*>(j == 0 ? p.weight[0] : p.weight[1]) + n * p.weight_stride[j]
                       : find_row<T>(p, n));
    }
  };
  const auto load = [&](int i, int j) { return load_chunk<T, kVector, true>(row[j], i * kStep, left); };
  const auto advance = [&] {
    if (++next_group == groups) {
      next_group = 0;
      next_unit += stride;
      // not for rows that do not exist
      if (next_unit < units) {
        find();
      } else {
        left = 0;
      }
    } else {
      left -= kDepth * kStep;
#pragma unroll
      for (int j = 0; j < kUnit; ++j) row[j] += kDepth * kStep;
    }
  };
  if (unit < units) find();
  uint4 buffer[kDepth][kUnit];
#pragma unroll
  for (int i = 0; i < kDepth; ++i) {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) buffer[i][j] = load(i, j);
  }
  advance();
  if (p.norm_weight != nullptr) {
    for (int c = threadIdx.x * kElements<T>; c < pitch; c += kThreads * kElements<T>) {
      *reinterpret_cast<uint4*>(norm + c) =
          load_chunk<T, kVector, false>(static_cast<const T*>(p.norm_weight), c, inner);
    }
  }

  wait_for_previous_kernel();
  let_next_kernel_start();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const T* const x = static_cast<const T*>(p.x) + r * p.x_stride;
    const int end = r < p.rows ? inner : 0;
    float squares = 0;
#pragma unroll 4
    for (int c = threadIdx.x * kElements<T>; c < pitch; c += kThreads * kElements<T>) {
      const uint4 chunk = load_chunk<T, kVector, false>(x, c, end);
      *reinterpret_cast<uint4*>(xs + r * pitch + c) = chunk;
      float values[kElements<T>];
      to_floats<T>(chunk, values);
#pragma unroll
      for (int i = 0; i < kElements<T>; ++i) squares += values[i] * values[i];
    }
    if (p.norm_weight != nullptr) {
      squares = sum_lanes<32>(squares);
      if (lane == 0) partial[r][warp] = squares;
    }
  }
  if (p.norm_weight != nullptr) {
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float squares = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) squares += partial[r][i];
      const float inverse = rsqrtf(squares / static_cast<float>(p.inner) + p.eps);
      // every thread reads its own chunks; rounded twice, as the modules do
      for (int c = threadIdx.x * kElements<T>; c < pitch; c += kThreads * kElements<T>) {
        float values[kElements<T>], factors[kElements<T>];
        to_floats<T>(*reinterpret_cast<const uint4*>(xs + r * pitch + c), values);
        to_floats<T>(*reinterpret_cast<const uint4*>(norm + c), factors);
#pragma unroll
        for (int i = 0; i < kElements<T>; ++i) {
          values[i] = to_float(from_float<T>(values[i] * inverse)) * factors[i];
        }
        *reinterpret_cast<uint4*>(xs + r * pitch + c) = from_floats<T>(values);
      }
    }
  }
  __syncthreads();

  // of a unit's results, this thread writes this one
  const int my_row = lane % kRows, my_part = lane / kRows;
  const bool writes = my_row < p.rows && my_part < (kGated ? 1 : kUnit);
  float sums[kRows][kUnit] = {};
  float added[2] = {};  // epilogue: bias and residual; gated: both biases
  int group = 0;
  while (unit < units) {
    if (group == 0 && writes) {
      // loaded early: their latency is hidden while the row is read
      const int n = kGated ? unit : unit * kUnit + my_part;
      if (kGated) {
        if (p.bias[0] != nullptr) added[0] = to_float(static_cast<const T*>(p.bias[0])[n]);
        if (p.bias[1] != nullptr) added[1] = to_float(static_cast<const T*>(p.bias[1])[n]);
      } else if (n < outputs) {
        added[0] = find_bias<T>(p, n);
        if (p.residual != nullptr) {
          added[1] = to_float(static_cast<const T*>(p.residual)[my_row * p.residual_stride + n]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      float weights[kUnit][kElements<T>];
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        to_floats<T>(buffer[i][j], weights[j]);
        buffer[i][j] = load(i, j);
      }
      const T* const x = xs + (group * kDepth + i) * kStep + lane * kElements<T>;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float values[kElements<T>];
        to_floats<T>(*reinterpret_cast<const uint4*>(x + r * pitch), values);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
#pragma unroll
          for (int e = 0; e < kElements<T>; ++e) sums[r][j] = fmaf(weights[j][e], values[e], sums[r][j]);
        }
      }
    }
    advance();
    if (++group < groups) continue;

    group = 0;
    float mine = 0, other = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        const float sum = sum_lanes<32>(sums[r][j]);
        if (kGated && j == 1 && my_row == r) other = sum;
        if (my_row == r && (kGated ? j == 0 : my_part == j)) mine = sum;
        sums[r][j] = 0;
      }
    }
    const int n = kGated ? unit : unit * kUnit + my_part;
    if (writes && n < outputs) {
      float value;
      if (kGated) {
        const float gate = mine + added[0];
        value = gate / (1.0f + __expf(-gate)) * (other + added[1]);
      } else {
        value = mine + added[0] + added[1];
      }
      static_cast<T*>(p.out)[my_row * p.num_outputs + n] = from_float<T>(value);
    }
    unit += stride;
  }
  prefetch_share(p.prefetch, p.prefetch_bytes);
}

// Elements of a row of x in shared memory: whole groups of loads.
template <class T, int kUnit>
int64_t pitch_of(int64_t inner) {
  constexpr int64_t kGroup = kLoads / kUnit * 32 * kElements<T>;
  // at least one, so that the loops end even if there is nothing to add up
  return std::max<int64_t>((inner + kGroup - 1) / kGroup, 1) * kGroup;
}

struct Device {
  int multiprocessors = 0;
  int shared_limit = 0;
};

// Rows `first` .. `first + kRows - 1` of x.
template <class T, int kRows, int kUnit, bool kGated, bool kVector>
cudaError_t launch(DecodeLinearParams p, int64_t first, const Device& device, cudaStream_t stream) {
  p.x = static_cast<const T*>(p.x) + first * p.x_stride;
  if (p.residual != nullptr) p.residual = static_cast<const T*>(p.residual) + first * p.residual_stride;
  p.out = static_cast<T*>(p.out) + first * p.num_outputs;
  p.rows = std::min<int64_t>(p.rows - first, kRows);
  const int64_t pitch = pitch_of<T, kUnit>(p.inner);
  const int64_t bytes = (kRows + (p.norm_weight != nullptr ? 1 : 0)) * pitch * static_cast<int64_t>(sizeof(T));
  const auto kernel = multiply<T, kRows, kUnit, kGated, kVector>;
  if (bytes + kStaticBytes > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (status != cudaSuccess) return status;
  }
  const int64_t units = kGated ? p.num_outputs : (p.num_outputs + kUnit - 1) / kUnit;
  return launch_after(kernel, std::min<int64_t>(device.multiprocessors, units), kThreads, static_cast<int>(bytes),
                      p.overlap, stream, p, static_cast<int>(pitch));
}

// As many rows at a time as there are and as fit.
template <class T, bool kGated, bool kVector>
cudaError_t launch_rows(const DecodeLinearParams& p, const Device& device, cudaStream_t stream) {
  constexpr int kFew = kGated ? 2 : 1;
  const auto fits = [&](int rows, int64_t pitch) {
    return (rows + (p.norm_weight != nullptr ? 1 : 0)) * pitch * static_cast<int64_t>(sizeof(T)) + kStaticBytes <=
           device.shared_limit;
  };
  const int64_t few = pitch_of<T, kFew>(p.inner), many = pitch_of<T, 2>(p.inner);
  cudaError_t status = cudaSuccess;
  int64_t first = 0;
  const auto run = [&](auto rows, auto unit) {
    status = launch<T, rows(), unit(), kGated, kVector>(p, first, device, stream);
    first += rows();
  };
  while (first < p.rows && status == cudaSuccess) {
    const int64_t left = p.rows - first;
    // two rows of weights share each chunk of 8 rows of x; otherwise shared memory would be the limit
    if (left > (kVector ? 4 : 1) && fits(8, many)) {
      run(Constant<8>{}, Constant<2>{});
    } else if (kVector && left > 2 && fits(4, few)) {
      run(Constant<kVector ? 4 : 1>{}, Constant<kFew>{});
    } else if (kVector && left > 1 && fits(2, few)) {
      run(Constant<kVector ? 2 : 1>{}, Constant<kFew>{});
    } else if (fits(1, few)) {
      run(Constant<1>{}, Constant<kFew>{});
    } else {
      return cudaErrorInvalidValue;
    }
  }
  return status;
}

// 16-byte loads need whole chunks, aligned in every row.
template <class T>
bool is_aligned(const DecodeLinearParams& p) {
  const auto fits = [](const void* pointer, int64_t stride) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride % kElements<T> == 0;
  };
  bool aligned = p.inner % kElements<T> == 0 && fits(p.x, p.rows > 1 ? p.x_stride : 0) && fits(p.norm_weight, 0);
  for (int i = 0; i < kDecodeLinearMatrices; ++i) {
    aligned = aligned && fits(p.weight[i], p.outputs[i] > 1 ? p.weight_stride[i] : 0);
  }
  return aligned;
}

// The present device; refuses sizes that 32 bits do not count.
inline cudaError_t describe(const DecodeLinearParams& p, Device* device) {
  if (p.num_outputs > INT32_MAX / 2 || p.inner > INT32_MAX / 2) return cudaErrorInvalidValue;
  int index = 0;
  cudaError_t status = cudaGetDevice(&index);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, index);
  }
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&device->shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  }
  return status;
}

template <class T>
cudaError_t launch_all(const DecodeLinearParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.num_outputs == 0) return cudaSuccess;
  Device device;
  const cudaError_t status = describe(p, &device);
  if (status != cudaSuccess) return status;
  if (p.gated) {
    return is_aligned<T>(p) ? launch_rows<T, true, true>(p, device, stream)
                            : launch_rows<T, true, false>(p, device, stream);
  }
  return is_aligned<T>(p) ? launch_rows<T, false, true>(p, device, stream)
                          : launch_rows<T, false, false>(p, device, stream);
}

}  // namespace decode_linear

template <class T>
cudaError_t launch_decode_linear_of(const DecodeLinearParams& params, cudaStream_t stream) {
  return decode_linear::launch_all<T>(params, stream);
}

}  // namespace sharedllm

// Fused linear for a few rows with 8-bit weights, on tensor cores: two warps per 8 rows of weights, each with half of
// K, or gated, each with its own matrix. Weights and x become numbers of half precision, sums are float32.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/common/fp8.cuh"
#include "kernels/common/mma.cuh"
#include "kernels/common/named_barrier.cuh"
#include "kernels/decode_linear.cuh"

namespace sharedllm {
namespace decode_linear_fp8 {

using decode_linear::Device;

// Half of an SM's registers, so that the next kernel's blocks can load their first weights beside it (PDL).
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPairs = kWarps / 2;
// 16-byte loads of a thread in flight: 64 KB per SM, as in decode_linear.cuh, for half of the bytes in all.
constexpr int kLoads = 16;
// Loads of single bytes take registers of their own.
constexpr int depth_of(bool vector) { return vector ? kLoads : 4; }
// Columns that a warp takes at once: four threads a row, 16 codes each.
constexpr int kStep = 64;
// Rows of weights of a tile, and most rows of x.
constexpr int kTile = 8;
constexpr int kMaxRows = 8;
// Beyond a row's columns in shared memory, so that the 8 threads of a quarter of a warp read different banks.
constexpr int kSkew = 8;
// Of a row's largest number in half precision, which is below 2^(kExponent + 1).
constexpr int kExponent = 14;

// A power of two that brings numbers up to `largest` below 2^15, and its reciprocal; 1 if it is not finite.
struct Scale {
  float times, over;
};
__device__ __forceinline__ Scale scale_for(float largest) {
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23);
  if (exponent >= 255) return {1.0f, 1.0f};
  const int biased = min(127 + kExponent + 127 - exponent, 253);
  return {__uint_as_float(static_cast<uint32_t>(biased) << 23),
          __uint_as_float(static_cast<uint32_t>(254 - biased) << 23)};
}

// The two warps of a pair wait for each other. Numbers in the instruction: with one in a register the compiler takes
// all barriers of an SM for a block.
__device__ __forceinline__ void wait_for_pair(int pair) {
  static_assert(kPairs == 4);
  switch (pair) {
    case 0:
      return named_barrier_sync<1, 64>();
    case 1:
      return named_barrier_sync<2, 64>();
    case 2:
      return named_barrier_sync<3, 64>();
    default:
      return named_barrier_sync<4, 64>();
  }
}

// How two warps share a row: both in as many groups of `depth` steps, the second from column `second` on; gated, both
// all of it. What they read of x ends at column `columns`, what is past the row's end is zeros.
struct Split {
  int second, groups, columns;
  __host__ __device__ Split(int inner, bool gated, int depth) {
    const int steps = (inner + kStep - 1) / kStep, half = gated ? steps : (steps + 1) / 2;
    second = gated ? 0 : half * kStep;
    // at least one, so that the loops end even if there is nothing to add up
    groups = half > depth ? (half + depth - 1) / depth : 1;
    columns = second + groups * depth * kStep;
  }
};

__device__ __forceinline__ uint32_t magnitude_of(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// 16 codes at an index, zeros from `end` on; kWhole: there are as many.
template <bool kVector, bool kWhole>
__device__ __forceinline__ uint4 load_codes(const uint8_t* row, int first, int end) {
  uint4 codes{};
  if constexpr (kVector) {
    if (kWhole || first < end) codes = load_once(reinterpret_cast<const uint4*>(row + first));
  } else {
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (first + i < end) words[i / 4] |= static_cast<uint32_t>(row[first + i]) << (8 * (i % 4));
    }
    codes = make_uint4(words[0], words[1], words[2], words[3]);
  }
  return codes;
}

// Row `n` of the scales of the matrices, one below the other.
__device__ __forceinline__ float find_scale(const DecodeLinearParams& p, int n) {
  int matrix = 0;
#pragma unroll
  for (int i = 0; i < kDecodeLinearMatrices - 1; ++i) {
    if (matrix == i && n >= p.outputs[i]) {
      n -= p.outputs[i];
      matrix = i + 1;
    }
  }
  return (matrix == 0 ? p.scale[0] : matrix == 1 ? p.scale[1] : p.scale[2])[n];
}

// x [rows, K], normed if there is a weight, as half-precision numbers in shared memory, zeros beyond K and in the rows
// that do not exist. Returns the factor that undoes the scale of row `mine`. All threads of the block call it.
template <class T, int kRows, bool kVector>
__device__ __forceinline__ float stage_rows(const DecodeLinearParams& p, T* xs, const T* norm, int pitch, int columns,
                                            int mine, float largest_norm, uint32_t (&largest_of)[kRows][kWarps],
                                            float (&squares_of)[kRows][kWarps]) {
  using decode_linear::from_floats;
  using decode_linear::load_chunk;
  using decode_linear::to_floats;
  constexpr int kUnit = decode_linear::kElements<T>;
  static_assert(sizeof(T) == 2);
  // 8 loads before the first is used
  constexpr int kTogether = 8 / kRows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int inner = static_cast<int>(p.inner);
  const auto each = [&](const auto& work) {
    for (int first = threadIdx.x * kUnit; first < columns; first += kTogether * kThreads * kUnit) work(first);
  };
  float squares[kRows] = {};
  uint32_t largest[kRows] = {};
  each([&](int first) {
    uint4 chunk[kTogether][kRows];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const T* const x = static_cast<const T*>(p.x) + r * p.x_stride;
        chunk[i][r] = load_chunk<T, kVector, false>(x, first + i * kThreads * kUnit, r < p.rows ? inner : 0);
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int c = first + i * kThreads * kUnit;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float values[kUnit];
        to_floats<T>(chunk[i][r], values);
#pragma unroll
        for (int e = 0; e < kUnit; ++e) {
          squares[r] = fmaf(values[e], values[e], squares[r]);
          largest[r] = max(largest[r], magnitude_of(values[e]));
        }
        if (c < columns) *reinterpret_cast<uint4*>(xs + r * pitch + c) = chunk[i][r];
      }
    }
  });
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    squares[r] = sum_lanes<32>(squares[r]);
    largest[r] = __reduce_max_sync(kFullWarp, largest[r]);
    if (lane == 0) {
      squares_of[r][warp] = squares[r];
      largest_of[r][warp] = largest[r];
    }
  }
  __syncthreads();

  float undo = 1.0f;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float square = 0;
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      square += squares_of[r][i];
      bits = max(bits, largest_of[r][i]);
    }
    const float inverse = p.norm_weight != nullptr ? rsqrtf(square / static_cast<float>(p.inner) + p.eps) : 1.0f;
    Scale scale{1.0f, 1.0f};
    // a bound of the normed row, half precision has its own range
    if constexpr (!std::is_same_v<T, __half>) scale = scale_for(__uint_as_float(bits) * inverse * largest_norm);
    if (r == mine) undo = scale.over;
    // every thread reads its own chunks
    for (int c = threadIdx.x * kUnit; c < columns; c += kThreads * kUnit) {
      float values[kUnit];
      to_floats<T>(*reinterpret_cast<const uint4*>(xs + r * pitch + c), values);
      if (p.norm_weight != nullptr) {
        float factors[kUnit];
        to_floats<T>(*reinterpret_cast<const uint4*>(norm + c), factors);
        // rounded twice, as the modules do
#pragma unroll
        for (int e = 0; e < kUnit; ++e) {
          values[e] = to_float(from_float<T>(to_float(from_float<T>(values[e] * inverse)) * factors[e]));
        }
      }
#pragma unroll
      for (int e = 0; e < kUnit; ++e) values[e] *= scale.times;
      *reinterpret_cast<uint4*>(xs + r * pitch + c) = from_floats<__half>(values);
    }
  }
  __syncthreads();
  return undo;
}

// The matmul of up to kRows rows. A 16-byte chunk of 8 rows of x is operand A [16, 16] of the tensor cores as it is:
// half of its columns are the upper rows, the other half the lower ones. It is multiplied by the codes of the upper
// rows' columns, then by those of the lower rows' columns; half of each result is wanted, the other half is left.
template <class T, int kRows, bool kGated, bool kVector>
__global__ void __launch_bounds__(kThreads, 2)
    multiply(const __grid_constant__ DecodeLinearParams p, const int columns) {
  constexpr int kDepth = depth_of(kVector);
  extern __shared__ __align__(16) unsigned char shared[];
  const int pitch = columns + kSkew;
  T* const xs = reinterpret_cast<T*>(shared);  // [kRows, pitch]; numbers of half precision in the end
  T* const norm = xs + kRows * pitch;          // [columns]
  __shared__ float part_of[kPairs][2][kTile * kMaxRows];
  __shared__ float squares_of[kRows][kWarps];
  __shared__ uint32_t largest_of[kRows][kWarps];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int pair = warp / 2, member = warp % 2;
  const int mine = lane / 4, quarter = lane % 4;  // row of x and of the tile; 16 columns of a step
  const int inner = static_cast<int>(p.inner), outputs = static_cast<int>(p.num_outputs);
  const Split split(inner, kGated, kDepth);
  const int groups = split.groups;
  const int begin = member == 0 ? 0 : split.second;
  const int end = kGated || member == 1 ? inner : min(split.second, inner);
  const int tiles = (outputs + kTile - 1) / kTile;
  const int stride = static_cast<int>(gridDim.x) * kPairs;
  // neighbouring tiles go to different SMs, so that the last incomplete wave is spread over all of them
  int tile = static_cast<int>(blockIdx.x + gridDim.x * pair);

  // loads run one group ahead of the multiplications, across the ends of tiles
  int next_tile = tile;
  int next_group = 0;
  const uint8_t* row = nullptr;  // this thread's first code of the next group
  int left = 0;                  // codes of the warp's part of the row from there on, none past the last tile
  const auto find = [&] {
    left = end - begin;
    // the last row is read again for those that do not exist
    const int n = min(next_tile * kTile + mine, outputs - 1);
    const uint8_t* from;
    if constexpr (kGated) {
      from = static_cast<const uint8_t*>(member == 0 ? p.weight[0] : p.weight[1]) +
             n * (member == 0 ? p.weight_stride[0] : p.weight_stride[1]);
    } else {
      from = decode_linear::find_row<uint8_t>(p, n);
    }
    row = from + begin + quarter * 16;
  };
  const auto advance = [&] {
    if (++next_group == groups) {
      next_group = 0;
      next_tile += stride;
      if (next_tile < tiles) {
        find();
      } else {
        left = 0;
      }
    } else {
      left -= kDepth * kStep;
      row += kDepth * kStep;
    }
  };
  if (tile < tiles) find();
  uint4 buffer[kDepth];
#pragma unroll
  for (int i = 0; i < kDepth; ++i) buffer[i] = load_codes<kVector, false>(row, i * kStep, left - quarter * 16);
  advance();
  float largest_norm = 1.0f;
  if (p.norm_weight != nullptr) {
    constexpr int kUnit = decode_linear::kElements<T>;
    uint32_t largest = 0;
    for (int c = threadIdx.x * kUnit; c < columns; c += kThreads * kUnit) {
      const uint4 chunk = decode_linear::load_chunk<T, kVector, false>(static_cast<const T*>(p.norm_weight), c, inner);
      float values[kUnit];
      decode_linear::to_floats<T>(chunk, values);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) largest = max(largest, magnitude_of(values[e]));
      *reinterpret_cast<uint4*>(norm + c) = chunk;
    }
    // the block's largest is needed: every warp's is exchanged where the sums of squares will be
    largest = __reduce_max_sync(kFullWarp, largest);
    if (lane == 0) largest_of[0][warp] = largest;
    __syncthreads();
    largest = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) largest = max(largest, largest_of[0][i]);
    largest_norm = __uint_as_float(largest);
    __syncthreads();
  }

  wait_for_previous_kernel();
  let_next_kernel_start();
  const float undo =
      stage_rows<T, kRows, kVector>(p, xs, norm, pitch, columns, mine, largest_norm, largest_of, squares_of);

  // of a tile's results, a thread has those of row `mine` and of two rows of weights
  const bool exists = mine < p.rows, finishes = exists && (kGated || member == 0);
  const T* const x_row = xs + min(mine, kRows - 1) * pitch + begin + quarter * 16;
  float sums[2][4] = {};
  float factor[2] = {}, added[2] = {};  // epilogue: scales; bias, residual
  int group = 0, parity = 0;
  // of the present group; the next one's codes are loaded as soon as there is room
  const auto multiply_group = [&](auto whole) {
    const T* const from = x_row + group * kDepth * kStep;
    const int room = left - quarter * 16;
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const uint4 x[2] = {*reinterpret_cast<const uint4*>(from + i * kStep),
                          *reinterpret_cast<const uint4*>(from + i * kStep + 8)};
      const uint32_t codes[2][2] = {{buffer[i].x, buffer[i].y}, {buffer[i].z, buffer[i].w}};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        // A's upper rows are columns 0, 1, 4, 5 of x and its lower rows columns 2, 3, 6, 7
        const uint32_t a[4] = {x[j].x, x[j].y, x[j].z, x[j].w};
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          multiply_add<__half>(sums[side], a, halves_of_codes(static_cast<uint16_t>(codes[j][0] >> (16 * side))),
                               halves_of_codes(static_cast<uint16_t>(codes[j][1] >> (16 * side))));
        }
      }
      buffer[i] = load_codes<kVector, whole()>(row, i * kStep, room);
    }
  };
  while (tile < tiles) {
    const int first = tile * kTile + quarter * 2;
    if (group == 0 && finishes) {
      // loaded early: their latency is hidden while the rows are read
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = first + i;
        if (n >= outputs) continue;
        if constexpr (kGated) {
          factor[i] = (member == 0 ? p.scale[0] : p.scale[1])[n] * undo;
          const T* const bias = static_cast<const T*>(member == 0 ? p.bias[0] : p.bias[1]);
          added[i] = bias == nullptr ? 0.0f : to_float(bias[n]);
        } else {
          factor[i] = find_scale(p, n) * undo;
          added[i] = decode_linear::find_bias<T>(p, n);
          if (p.residual != nullptr) {
            added[i] += to_float(static_cast<const T*>(p.residual)[mine * p.residual_stride + n]);
          }
        }
      }
    }
    if (kVector && left >= kDepth * kStep) {
      multiply_group(std::bool_constant<kVector>{});
    } else {
      multiply_group(std::bool_constant<false>{});
    }
    advance();
    if (++group < groups) continue;

    group = 0;
    float* const part = part_of[pair][parity] + mine * kTile + quarter * 2;
    parity ^= 1;
    float own[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      own[i] = sums[0][i] + sums[1][2 + i];
      // the gate's other matrix is finished by its own warp
      if (kGated && member == 1) own[i] = fmaf(own[i], factor[i], added[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[0][i] = sums[1][i] = 0;
    if (member == 1) *reinterpret_cast<float2*>(part) = make_float2(own[0], own[1]);
    // two parts in turn: the next is written only when this one has been read
    wait_for_pair(pair);
    if (member == 0 && finishes) {
      const float2 other = *reinterpret_cast<const float2*>(part);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float others = i == 0 ? other.x : other.y;
        float value;
        if constexpr (kGated) {
          const float gate = fmaf(own[i], factor[i], added[i]);
          value = gate / (1.0f + __expf(-gate)) * others;
        } else {
          value = fmaf(own[i] + others, factor[i], added[i]);
        }
        if (first + i < outputs) static_cast<T*>(p.out)[mine * p.num_outputs + first + i] = from_float<T>(value);
      }
    }
    tile += stride;
  }
  prefetch_share(p.prefetch, p.prefetch_bytes);
}

// Bytes of shared memory that the launch asks for.
inline int64_t shared_bytes(const DecodeLinearParams& p, int rows, int columns) {
  return 2 * (static_cast<int64_t>(rows) * (columns + kSkew) + (p.norm_weight != nullptr ? columns : 0));
}

// Rows `first` .. `first + kRows - 1` of x.
template <class T, int kRows, bool kGated, bool kVector>
cudaError_t launch(DecodeLinearParams p, int64_t first, const Device& device, cudaStream_t stream) {
  p.x = static_cast<const T*>(p.x) + first * p.x_stride;
  if (p.residual != nullptr) p.residual = static_cast<const T*>(p.residual) + first * p.residual_stride;
  p.out = static_cast<T*>(p.out) + first * p.num_outputs;
  p.rows = std::min<int64_t>(p.rows - first, kRows);
  const int columns = Split(static_cast<int>(p.inner), kGated, depth_of(kVector)).columns;
  const int64_t bytes = shared_bytes(p, kRows, columns);
  const auto kernel = multiply<T, kRows, kGated, kVector>;
  if (bytes > 40 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (status != cudaSuccess) return status;
  }
  const int64_t tiles = (p.num_outputs + kTile - 1) / kTile;
  return launch_after(kernel, std::min<int64_t>(device.multiprocessors, tiles), kThreads, static_cast<int>(bytes),
                      p.overlap, stream, p, columns);
}

// As many rows at a time as there are and as fit.
template <class T, bool kGated, bool kVector>
cudaError_t launch_rows(const DecodeLinearParams& p, const Device& device, cudaStream_t stream) {
  // parts of the sums, and of the rows' squares and magnitudes
  constexpr int64_t kStatic = kPairs * 2 * kTile * kMaxRows * 4;
  const int columns = Split(static_cast<int>(p.inner), kGated, depth_of(kVector)).columns;
  const auto fits = [&](int rows) {
    return shared_bytes(p, rows, columns) + kStatic + rows * kWarps * 8 <= device.shared_limit;
  };
  cudaError_t status = cudaSuccess;
  int64_t first = 0;
  while (first < p.rows && status == cudaSuccess) {
    const int64_t left = p.rows - first;
    const auto run = [&](auto rows) {
      status = decode_linear_fp8::launch<T, rows(), kGated, kVector>(p, first, device, stream);
      first += rows();
    };
    if (left > (kVector ? 4 : 1) && fits(8)) {
      run(decode_linear::Constant<8>{});
    } else if (kVector && left > 2 && fits(4)) {
      run(decode_linear::Constant<kVector ? 4 : 1>{});
    } else if (kVector && left > 1 && fits(2)) {
      run(decode_linear::Constant<kVector ? 2 : 1>{});
    } else if (fits(1)) {
      run(decode_linear::Constant<1>{});
    } else {
      return cudaErrorInvalidValue;
    }
  }
  return status;
}

// 16-byte loads need whole chunks, aligned in every row.
template <class T>
bool is_aligned(const DecodeLinearParams& p) {
  const auto fits = [](const void* pointer, int64_t stride_bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride_bytes % 16 == 0;
  };
  bool aligned = p.inner % 16 == 0 && fits(p.x, p.rows > 1 ? 2 * p.x_stride : 0) && fits(p.norm_weight, 0);
  for (int i = 0; i < kDecodeLinearMatrices; ++i) {
    aligned = aligned && fits(p.weight[i], p.outputs[i] > 1 ? p.weight_stride[i] : 0);
  }
  return aligned;
}

template <class T>
cudaError_t launch_all(const DecodeLinearParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.num_outputs == 0) return cudaSuccess;
  Device device;
  const cudaError_t status = decode_linear::describe(p, &device);
  if (status != cudaSuccess) return status;
  if (p.gated) {
    return is_aligned<T>(p) ? decode_linear_fp8::launch_rows<T, true, true>(p, device, stream)
                            : decode_linear_fp8::launch_rows<T, true, false>(p, device, stream);
  }
  return is_aligned<T>(p) ? decode_linear_fp8::launch_rows<T, false, true>(p, device, stream)
                          : decode_linear_fp8::launch_rows<T, false, false>(p, device, stream);
}

}  // namespace decode_linear_fp8

template <class T>
cudaError_t launch_decode_linear_fp8_of(const DecodeLinearParams& params, cudaStream_t stream) {
  return decode_linear_fp8::launch_all<T>(params, stream);
}

}  // namespace sharedllm

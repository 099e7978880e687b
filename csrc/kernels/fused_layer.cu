// Element-wise work between a decoder layer's matmuls, memory-bound: a row in the registers of a block, any row in two
// passes, and element-wise products.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "kernels/common/scalar.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/common/vector_load.cuh"
#include "kernels/common/warp.cuh"
#include "kernels/common/with_float_type.h"
#include "kernels/fused_layer.h"

namespace sharedllm {
namespace {

constexpr int kUnit = 8;                             // elements of a vector: 16 bytes, twice that in float32
constexpr float kLargestCode = 448.0f;               // of e4m3
constexpr float kSmallest = 7.888609052210118e-31f;  // 2^-100: 448 / x stays finite
constexpr int kWarpRows = 8;                         // short rows, one per warp: rows of a block
constexpr int kGeneralThreads = 256;                 // of the kernels that take any row
constexpr int kProductThreads = 256;
// vectors of a thread; 1 and 4 are as fast
constexpr int kProductVectors = 2;
constexpr int64_t kPiece = kProductThreads * kProductVectors * kUnit;
// vectors of a thread that shares a row; of 2, 4 and 8 the one within 3% of the best for every operator
constexpr int kMaxVectors = 4;
// 128 registers per thread
constexpr int kMaxThreads = 512;

// 8 neighbouring elements as they are in memory: converted where they are used, they take half the registers.
template <class T>
struct Vector {
  static constexpr int kUnits = kUnit * sizeof(T) / 16;
  static constexpr int kPerWord = Word<T>::kElements;
  uint4 units[kUnits];

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) units[i] = load_streaming(reinterpret_cast<const uint4*>(from) + i);
  }
  __device__ __forceinline__ void load_reused(const T* from) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) units[i] = load_cached(reinterpret_cast<const uint4*>(from) + i);
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) units[i] = make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ float operator[](int i) const {
    const uint4& unit = units[i / (4 * kPerWord)];
    const int word = i / kPerWord % 4;
    return Word<T>::get(word == 0 ? unit.x : word == 1 ? unit.y : word == 2 ? unit.z : unit.w, i % kPerWord);
  }
  __device__ __forceinline__ void set(const float (&x)[kUnit]) {
    uint32_t words[kUnit / kPerWord];
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) words[i] = __float_as_uint(x[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kUnit / 2; ++i) words[i] = pack_pair(T{}, x[2 * i], x[2 * i + 1]);
    }
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      units[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    }
  }
  __device__ __forceinline__ void store(T* to) const {
    // an explicit 16-byte store, because the compiler splits some plain stores into words
#pragma unroll
    for (int i = 0; i < kUnits; ++i) __stwb(reinterpret_cast<uint4*>(to) + i, units[i]);
  }
};

// x / (1 + exp(-x)); the fast functions' errors of 2^-21 vanish in half precision
template <class T>
__device__ __forceinline__ float silu(float x) {
  if constexpr (std::is_same_v<T, float>) return x / (1.0f + expf(-x));
  return __fdividef(x, 1.0f + exp2_fast(x * -kLog2E));
}

// Largest magnitude as bits: they are ordered like the magnitudes, and NaN is above infinity.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(fabsf(x)); }

struct Sums {
  float square;
  uint32_t largest;
};

// Over the threads of a warp, or of the block; the same in each thread and in every run.
template <bool kNorm, bool kCodes>
__device__ __forceinline__ Sums reduce(Sums x, bool by_block) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    if (kNorm) x.square += __shfl_xor_sync(kFullWarp, x.square, offset);
    if (kCodes) x.largest = max(x.largest, __shfl_xor_sync(kFullWarp, x.largest, offset));
  }
  if (!by_block) return x;
  __shared__ Sums parts[32];
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = {0.0f, 0};
  if (threadIdx.x % 32 < blockDim.x / 32) x = parts[threadIdx.x % 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    if (kNorm) x.square += __shfl_xor_sync(kFullWarp, x.square, offset);
    if (kCodes) x.largest = max(x.largest, __shfl_xor_sync(kFullWarp, x.largest, offset));
  }
  return x;
}

// Factors of a row's elements, from its sums.
struct RowFactors {
  float norm;   // 1 / root mean square
  float code;   // 448 / largest, 0 if all codes are 0
  float scale;  // of the codes
};

template <bool kNorm, bool kCodes>
__device__ __forceinline__ RowFactors row_factors(const FusedLayerParams& p, const Sums& sums) {
  RowFactors factors{1.0f, 0.0f, 1.0f};
  // a row without elements has mean 0
  if (kNorm) factors.norm = rsqrtf(sums.square / fmaxf(static_cast<float>(p.width), 1.0f) + p.eps);
  if (kCodes) {
    // the norm's factor is common to the row, so its largest element is known before the norm
    const float largest = __uint_as_float(sums.largest) * factors.norm;
    if (!(largest < __builtin_inff())) {
      factors.scale = largest;
    } else if (largest >= kSmallest) {
      factors.code = __frcp_rn(largest) * kLargestCode;
      factors.scale = largest * (1.0f / kLargestCode);
    }
  }
  return factors;
}

__device__ __forceinline__ uint32_t two_codes(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

// Rows of whole vectors: kVectors for each of the blockDim.x threads of a row, all loads before the first use.
template <class T, RowFunction kFunction, bool kResidual, bool kCodes, int kVectors>
__global__ void __launch_bounds__(kMaxThreads) row_in_registers(const FusedLayerParams p) {
  constexpr bool kNorm = kFunction == RowFunction::kRmsNorm, kProduct = kFunction == RowFunction::kSiluProduct;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  // a whole warp, never one of a block that shares a row
  if (row >= p.rows) return;
  const int vectors = static_cast<int>(p.width) / kUnit;
  const T* const x_row = static_cast<const T*>(p.x) + row * p.x_stride;
  Vector<T> x[kVectors];
  const auto each = [&](const auto& work) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int place = threadIdx.x + v * blockDim.x;
      if (place < vectors) work(v, place * kUnit);
    }
  };
#pragma unroll
  for (int v = 0; v < kVectors; ++v) x[v].clear();
  each([&](int v, int column) { x[v].load(x_row + column); });

  // values of the product stay in float32 until their scale is known
  float value[kProduct ? kVectors : 1][kUnit];
  if constexpr (kProduct || kResidual) {
    const T* const y_row = static_cast<const T*>(p.y) + row * p.y_stride;
    Vector<T> y[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) y[v].clear();
    each([&](int v, int column) { y[v].load(y_row + column); });
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kProduct) {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) value[v][i] = silu<T>(x[v][i]) * y[v][i];
      } else {
        float sum[kUnit];
#pragma unroll
        for (int i = 0; i < kUnit; ++i) sum[i] = x[v][i] + y[v][i];
        x[v].set(sum);
      }
    }
  }
  if constexpr (kResidual) {
    T* const sum_row = static_cast<T*>(p.sum) + row * p.width;
    each([&](int v, int column) { x[v].store(sum_row + column); });
  }

  Vector<T> weight[kNorm ? kVectors : 1];
  if constexpr (kNorm) {
    each([&](int v, int column) { weight[v].load_reused(static_cast<const T*>(p.weight) + column); });
  }
  Sums sums{0.0f, 0};
  each([&](int v, int) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if constexpr (kNorm) {
        sums.square = fmaf(x[v][i], x[v][i], sums.square);
        if (kCodes) sums.largest = max(sums.largest, magnitude(x[v][i] * weight[v][i]));
      } else {
        sums.largest = max(sums.largest, magnitude(kProduct ? value[v][i] : x[v][i]));
      }
    }
  });
  sums = reduce<kNorm, kCodes>(sums, blockDim.y == 1);
  const RowFactors factors = row_factors<kNorm, kCodes>(p, sums);

  each([&](int v, int column) {
    float result[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if constexpr (kNorm) {
        result[i] = x[v][i] * factors.norm * weight[v][i];
      } else {
        result[i] = kProduct ? value[v][i] : x[v][i];
      }
    }
    if constexpr (kCodes) {
      uint32_t words[2] = {0, 0};
      if (factors.code != 0.0f) {
#pragma unroll
        for (int i = 0; i < kUnit; i += 2) {
          words[i / 4] |= two_codes(result[i] * factors.code, result[i + 1] * factors.code) << (i % 4 * 8);
        }
      }
      *reinterpret_cast<uint2*>(static_cast<uint8_t*>(p.out) + row * p.width + column) = make_uint2(words[0], words[1]);
    } else {
      Vector<T> y;
      y.set(result);
      y.store(static_cast<T*>(p.out) + row * p.width + column);
    }
  });
  if (kCodes && threadIdx.x == 0) p.scale[row] = factors.scale;
}

// Any row: element by element, in two passes; the second hits short rows in the caches.
template <class T, RowFunction kFunction, bool kResidual, bool kCodes>
__global__ void __launch_bounds__(kGeneralThreads) any_row(const FusedLayerParams p) {
  constexpr bool kNorm = kFunction == RowFunction::kRmsNorm, kProduct = kFunction == RowFunction::kSiluProduct;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;
  const T* const x_row = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* const y_row = kProduct || kResidual ? static_cast<const T*>(p.y) + row * p.y_stride : nullptr;
  const T* const weight = static_cast<const T*>(p.weight);
  const auto element = [&](int64_t i) {
    const float x = to_float(x_row[i]);
    if constexpr (kProduct) return silu<T>(x) * to_float(y_row[i]);
    if constexpr (kResidual) return to_float(from_float<T>(x + to_float(y_row[i])));
    return x;
  };
  Sums sums{0.0f, 0};
  for (int64_t i = threadIdx.x; i < p.width; i += blockDim.x) {
    const float x = element(i);
    if constexpr (kNorm) sums.square = fmaf(x, x, sums.square);
    if constexpr (kCodes) sums.largest = max(sums.largest, magnitude(kNorm ? x * to_float(weight[i]) : x));
    if constexpr (kResidual) static_cast<T*>(p.sum)[row * p.width + i] = from_float<T>(x);
  }
  sums = reduce<kNorm, kCodes>(sums, blockDim.y == 1);
  const RowFactors factors = row_factors<kNorm, kCodes>(p, sums);
  for (int64_t i = threadIdx.x; i < p.width; i += blockDim.x) {
    float x = element(i);
    if constexpr (kNorm) x = x * factors.norm * to_float(weight[i]);
    if constexpr (kCodes) {
      const float code = factors.code != 0.0f ? x * factors.code : 0.0f;
      static_cast<uint8_t*>(p.out)[row * p.width + i] = __nv_cvt_float_to_fp8(code, __NV_SATFINITE, __NV_E4M3);
    } else {
      static_cast<T*>(p.out)[row * p.width + i] = from_float<T>(x);
    }
  }
  if (kCodes && threadIdx.x == 0) p.scale[row] = factors.scale;
}

// The product without codes needs no row as a whole: a block takes a piece of one.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kProductThreads) silu_product(const FusedLayerParams p, int64_t pieces) {
  const int64_t row = pieces == gridDim.x ? 0 : blockIdx.x / pieces, piece = blockIdx.x - row * pieces;
  const int64_t begin = piece * kPiece;
  const T* const x_row = static_cast<const T*>(p.x) + row * p.x_stride + begin;
  const T* const y_row = static_cast<const T*>(p.y) + row * p.y_stride + begin;
  T* const out_row = static_cast<T*>(p.out) + row * p.width + begin;
  const int64_t left = p.width - begin;
  const auto one = [&](int64_t i) { out_row[i] = from_float<T>(silu<T>(to_float(x_row[i])) * to_float(y_row[i])); };
  if constexpr (kAligned) {
    Vector<T> x[kProductVectors], y[kProductVectors];
#pragma unroll
    for (int v = 0; v < kProductVectors; ++v) {
      const int column = (threadIdx.x + v * kProductThreads) * kUnit;
      if (column + kUnit <= left) {
        x[v].load(x_row + column);
        y[v].load(y_row + column);
      }
    }
#pragma unroll
    for (int v = 0; v < kProductVectors; ++v) {
      const int column = (threadIdx.x + v * kProductThreads) * kUnit;
      if (column + kUnit <= left) {
        float result[kUnit];
#pragma unroll
        for (int i = 0; i < kUnit; ++i) result[i] = silu<T>(x[v][i]) * y[v][i];
        x[v].set(result);
        x[v].store(out_row + column);
      }
    }
    // the remainder that is no whole vector, at the end of the last piece
    if (left < kPiece && threadIdx.x < left % kUnit) one(left / kUnit * kUnit + threadIdx.x);
  } else {
#pragma unroll
    for (int i = 0; i < kProductVectors * kUnit; ++i) {
      const int column = threadIdx.x + i * kProductThreads;
      if (column < left) one(column);
    }
  }
}

template <class T>
bool aligned(const void* base, int64_t stride, int64_t rows) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 &&
         (rows <= 1 || stride * static_cast<int64_t>(sizeof(T)) % 16 == 0);
}

template <class T>
cudaError_t launch_product(FusedLayerParams p, cudaStream_t stream) {
  if (p.rows == 0 || p.width == 0) return cudaSuccess;
  if (p.x_stride == p.width && p.y_stride == p.width) {
    p.width *= p.rows;
    p.rows = 1;
  }
  const int64_t pieces = (p.width + kPiece - 1) / kPiece, blocks = pieces * p.rows;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (aligned<T>(p.x, p.x_stride, p.rows) && aligned<T>(p.y, p.y_stride, p.rows) &&
      aligned<T>(p.out, p.width, p.rows)) {
    silu_product<T, true><<<static_cast<unsigned>(blocks), kProductThreads, 0, stream>>>(p, pieces);
  } else {
    silu_product<T, false><<<static_cast<unsigned>(blocks), kProductThreads, 0, stream>>>(p, pieces);
  }
  return cudaGetLastError();
}

template <class T, RowFunction kFunction, bool kResidual, bool kCodes>
cudaError_t launch_rows(const FusedLayerParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  const bool vectors_fit = p.width % kUnit == 0 && p.width > 0 && aligned<T>(p.x, p.x_stride, p.rows) &&
                           aligned<T>(p.y, p.y_stride, p.rows) && aligned<T>(p.weight, 0, 1) &&
                           p.width <= kUnit * kMaxVectors * kMaxThreads;
  const int64_t units = vectors_fit ? p.width / kUnit : p.width;
  // one warp per row up to 1 vector, or 8 elements, of each lane
  const bool by_warp = units <= 32 * (vectors_fit ? 1 : kUnit);
  const dim3 blocks(static_cast<unsigned>(by_warp ? (p.rows + kWarpRows - 1) / kWarpRows : p.rows));
  if (p.rows > INT32_MAX) return cudaErrorInvalidValue;
  if (!vectors_fit) {
    const dim3 threads = by_warp ? dim3(32, kWarpRows) : dim3(kGeneralThreads);
    any_row<T, kFunction, kResidual, kCodes><<<blocks, threads, 0, stream>>>(p);
    return cudaGetLastError();
  }
  const auto run = [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    const int64_t lanes = ((units + kVectors - 1) / kVectors + 31) / 32 * 32;
    const dim3 threads = by_warp ? dim3(32, kWarpRows) : dim3(static_cast<unsigned>(lanes));
    row_in_registers<T, kFunction, kResidual, kCodes, kVectors><<<blocks, threads, 0, stream>>>(p);
    return cudaGetLastError();
  };
  if (units <= 32) return run(std::integral_constant<int, 1>{});
  if (units <= 128) return run(std::integral_constant<int, 2>{});
  return run(std::integral_constant<int, kMaxVectors>{});
}

template <class T>
cudaError_t launch(RowFunction function, const FusedLayerParams& p, cudaStream_t stream) {
  switch (function) {
    case RowFunction::kCopy:
      return launch_rows<T, RowFunction::kCopy, false, true>(p, stream);
    case RowFunction::kSiluProduct:
      return p.scale ? launch_rows<T, RowFunction::kSiluProduct, false, true>(p, stream) : launch_product<T>(p, stream);
    case RowFunction::kRmsNorm:
      if (p.scale) {
        return p.y ? launch_rows<T, RowFunction::kRmsNorm, true, true>(p, stream)
                   : launch_rows<T, RowFunction::kRmsNorm, false, true>(p, stream);
      }
      return p.y ? launch_rows<T, RowFunction::kRmsNorm, true, false>(p, stream)
                 : launch_rows<T, RowFunction::kRmsNorm, false, false>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_fused_layer(RowFunction function, const FusedLayerParams& params, cudaStream_t stream) {
  return with_float_type(params.type, [&](auto number) { return launch<decltype(number)>(function, params, stream); });
}

}  // namespace sharedllm

// Element-wise work between a decoder layer's matmuls: RMSNorm, gated activation (SwiGLU), quantisation of rows to fp8.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/float_type.h"

namespace sharedllm {

// What comes before the quantisation, or is the result.
enum class RowFunction {
  kCopy,         // x
  kRmsNorm,      // x / sqrt(mean(x^2) + eps) * weight
  kSiluProduct,  // x / (1 + exp(-x)) * y
};

struct FusedLayerParams {
  const void* x;       // [T, n]
  const void* y;       // [T, n]; `up` of the product, residual of the norm or null
  const void* weight;  // [n] of the norm
  void* sum;           // [T, n], contiguous; x + y rounded, with a residual
  void* out;           // [T, n], contiguous; of x's type, or codes (float8 e4m3) if there is a scale
  float* scale;        // [T] or null
  int64_t x_stride;    // elements between rows; the last stride is 1
  int64_t y_stride;
  int64_t rows;   // T
  int64_t width;  // n
  float eps;
  FloatType type;  // of x, y, weight, sum
};

// Everything in float32 and rounded once; the norm is that of the rounded sum. codes = value * (1 / largest magnitude *
// 448) and scale = largest / 448. A largest magnitude below 2^-100 counts as 0: codes 0, scale 1. One that is not
// finite becomes the scale, with codes of 0, so that the row reads back as NaN. Any strides and addresses. Rows of
// whole 16-byte units, of at most 16384 elements unless it is the product without codes, are fastest.
cudaError_t launch_fused_layer(RowFunction function, const FusedLayerParams& params, cudaStream_t stream);

}  // namespace sharedllm

// Fused linear for a few rows (decoding): optional RMSNorm, 1 to 3 matmuls, then bias, gate or residual as the
// epilogue. Bound by reading the weights once: in the type of x, or in 8 bits with a scale for each row.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/float_type.h"

namespace sharedllm {

constexpr int kDecodeLinearMatrices = 3;

struct DecodeLinearParams {
  const void* x;                              // [rows, K]
  const void* weight[kDecodeLinearMatrices];  // [N_i, K]; null after the last
  const float* scale[kDecodeLinearMatrices];  // [N_i], of weights in 8 bits (e4m3); null for weights in x's type
  const void* bias[kDecodeLinearMatrices];    // [N_i], or null
  const void* norm_weight;                    // [K], or null: x as it is
  const void* residual;                       // [rows, N], or null
  void* out;                                  // [rows, N], contiguous; N = sum N_i, gated: N_0
  const void* prefetch;                       // what the next kernels read, to be prefetched into L2, or null
  int64_t prefetch_bytes;
  int64_t x_stride;  // elements between rows; the last stride is 1
  int64_t weight_stride[kDecodeLinearMatrices];
  int64_t residual_stride;
  int64_t outputs[kDecodeLinearMatrices];  // N_i, 0 after the last
  int64_t num_outputs;                     // N
  int64_t rows;
  int64_t inner;  // K
  float eps;      // of the norm
  bool gated;     // silu of the first matmul's result times the second's
  // PDL: launched before the previous kernel has ended (9.0 and later). Weights, biases and the norm's weight are read
  // before that kernel's results are visible, so they must be older than it.
  bool overlap;
  FloatType type;
};

// Any K up to what one row takes in shared memory (cudaErrorInvalidValue beyond), any N and alignment; 16-byte loads
// where K, strides and addresses allow them. Reads the weights once for every 8 rows, or fewer where K is too large for
// shared memory. The same bits in every run. Can be captured into a CUDA graph.
cudaError_t launch_decode_linear(const DecodeLinearParams& params, cudaStream_t stream);

// The same with weights in 8 bits and their scales, whose products with x are exact in float32 sums (the tensor
// cores'). x of float16 or bfloat16 (cudaErrorInvalidValue for others). A row of bfloat16 is taken in half precision
// after a power of two has brought its largest number below 2^15: what is 2^29 times smaller loses digits.
cudaError_t launch_decode_linear_fp8(const DecodeLinearParams& params, cudaStream_t stream);

// One element type, a kernel instance.
template <class T>
cudaError_t launch_decode_linear_of(const DecodeLinearParams& params, cudaStream_t stream);
template <class T>
cudaError_t launch_decode_linear_fp8_of(const DecodeLinearParams& params, cudaStream_t stream);

}  // namespace sharedllm

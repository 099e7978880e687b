// 8-bit memory: int8 codes and one float32 scale for each slot and head, value = code * scale.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/float_type.h"

namespace sharedllm {

struct MemoryQuantizationParams {
  const void* input;        // [S, Hkv, D], aligned to 16 bytes, strides multiples of 16 bytes
  int8_t* codes;            // [S, Hkv, D], contiguous, aligned to 8 bytes
  float* scale;             // [S, Hkv]
  int64_t stride[2];        // of the input: elements between slots, between heads; the last stride is 1
  int64_t scale_stride[2];  // elements between slots, between heads; decoding is faster with slots adjacent
  int64_t num_slots;        // S
  int32_t heads;            // Hkv
  int32_t head_size;        // D, a multiple of 8, at most 256
  FloatType type;           // of the input
};

// scale = largest magnitude * (1 / 127), code = input * ((1 / largest) * 127) to the nearest integer (ties to even),
// each operation in float32. A largest magnitude below 2^-100 counts as 0; one that is not finite becomes the scale,
// with codes of 0, so that it reads back as NaN.
cudaError_t launch_quantize_memory(const MemoryQuantizationParams& params, cudaStream_t stream);

struct MemoryDequantizationParams {
  const int8_t* codes;      // [S, Hkv, D], aligned to 8 bytes, strides multiples of 8
  const float* scale;       // [S, Hkv]
  void* out;                // [S, Hkv, D], contiguous, aligned to 16 bytes
  int64_t code_stride[2];   // elements between slots, between heads; the last stride is 1
  int64_t scale_stride[2];  // likewise
  int64_t num_slots;        // S
  int32_t heads;            // Hkv
  int32_t head_size;        // D, a multiple of 8, at most 256
  FloatType type;           // of out
};

// out = code * scale, rounded once.
cudaError_t launch_dequantize_memory(const MemoryDequantizationParams& params, cudaStream_t stream);

}  // namespace sharedllm

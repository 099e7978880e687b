// TMA tensor maps: how Hopper's copy engine sees a tensor, encoded on the host. No torch header here.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/float_type.h"

namespace sharedllm {

// A map of `rank` (3 or 4) dimensions, innermost first, loaded in boxes with 128-byte swizzle. `strides` holds the
// elements between neighbours of dimensions 1 .. rank - 1; the innermost one is contiguous. Elements of a box outside
// the sizes arrive as zeros, and count as transferred bytes. box[0] is at most 128 bytes, the others at most 256
// elements. The base and the strides have to be aligned to 16 bytes. Sizes of 0 are mapped as 1.
cudaError_t encode_tensor_map(CUtensorMap* map, FloatType type, const void* base, int rank, const int64_t* sizes,
                              const int64_t* strides, const int32_t* box);

inline cudaError_t encode_tensor_map_3d(CUtensorMap* map, FloatType type, const void* base, const int64_t (&sizes)[3],
                                        const int64_t (&strides)[2], const int32_t (&box)[3]) {
  return encode_tensor_map(map, type, base, 3, sizes, strides, box);
}

inline cudaError_t encode_tensor_map_4d(CUtensorMap* map, FloatType type, const void* base, const int64_t (&sizes)[4],
                                        const int64_t (&strides)[3], const int32_t (&box)[4]) {
  return encode_tensor_map(map, type, base, 4, sizes, strides, box);
}

}  // namespace sharedllm

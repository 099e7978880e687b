// Choice of a kernel instance by element type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "kernels/common/float_type.h"

namespace sharedllm {

// Calls launch(number) with a number of the element type.
template <class Launch>
cudaError_t with_float_type(FloatType type, const Launch& launch) {
  switch (type) {
    case FloatType::kFloat32:
      return launch(float{});
    case FloatType::kBFloat16:
      return launch(__nv_bfloat16{});
    case FloatType::kFloat16:
      return launch(__half{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace sharedllm

// Choice of a kernel instance (element type, head size), and of the number of splits (split-KV).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/common/float_type.h"

namespace sharedllm {

// Calls launch(size) with the head size as an integral constant; cudaErrorNotSupported for a size without tensor-core
// kernels.
template <class Launch>
cudaError_t with_head_size(int32_t head_size, const Launch& launch) {
  switch (head_size) {
    case 64:
      return launch(std::integral_constant<int, 64>{});
    case 96:
      return launch(std::integral_constant<int, 96>{});
    case 128:
      return launch(std::integral_constant<int, 128>{});
    case 256:
      return launch(std::integral_constant<int, 256>{});
    default:
      return cudaErrorNotSupported;
  }
}

// Calls launch(number, size), with a number of the element type as well; cudaErrorNotSupported also for float32.
template <class Launch>
cudaError_t with_instance(FloatType type, int32_t head_size, const Launch& launch) {
  switch (type) {
    case FloatType::kBFloat16:
      return with_head_size(head_size, [&](auto size) { return launch(__nv_bfloat16{}, size); });
    case FloatType::kFloat16:
      return with_head_size(head_size, [&](auto size) { return launch(__half{}, size); });
    default:
      return cudaErrorNotSupported;
  }
}

inline cudaError_t current_attribute(cudaDeviceAttr attribute, int* value) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  return status != cudaSuccess ? status : cudaDeviceGetAttribute(value, attribute, device);
}

// The smallest number of splits, at most `most`, that leaves the fewest of `places` idle over all waves of blocks *
// splits. Each further split costs `cost`, a share of the whole, and has to gain more than `gain` of all places.
inline int32_t fewest_splits(int64_t blocks, int64_t places, int64_t most, double cost, double gain) {
  int32_t chosen = 1;
  double best = 0;
  for (int64_t splits = 1; splits <= std::max<int64_t>(most, 1); ++splits) {
    const int64_t items = blocks * splits, rounds = (items + places - 1) / places;
    const double busy = static_cast<double>(items) / static_cast<double>(rounds * places);
    const double worth = busy / (1.0 + cost * static_cast<double>(splits - 1));
    if (worth > best + gain) {
      best = worth;
      chosen = static_cast<int32_t>(splits);
    }
  }
  return chosen;
}

}  // namespace sharedllm

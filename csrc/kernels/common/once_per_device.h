// What is done once for each device. Without <atomic>, which takes a second to compile in every file.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sharedllm {

// Calls `function` unless it has succeeded on the current device before. `done` has a bit for each of 64 devices; on
// others it is called every time.
template <class Function>
cudaError_t once_per_device(uint64_t* done, const Function& function) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (__atomic_load_n(done, __ATOMIC_RELAXED) & bit) return cudaSuccess;
  status = function();
  if (status == cudaSuccess) __atomic_fetch_or(done, bit, __ATOMIC_RELAXED);
  return status;
}

}  // namespace sharedllm

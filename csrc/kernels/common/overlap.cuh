// Kernels that start while the one before them on the stream ends (compute capability 9.0 and later).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sharedllm {

// The results of the kernel before are seen from here on. Every block of a kernel launched with overlap calls it, even
// one that has nothing to do: its end would otherwise count as the end of the kernel before, too.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start as soon as every block has called this or ended.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether the code of a kernel that this device runs waits for the kernel before it: what was compiled for less than
// 9.0, for an older device or as PTX for newer ones, does not.
template <class Kernel>
cudaError_t code_waits(Kernel kernel, bool* waits) {
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  *waits = status == cudaSuccess && attributes.ptxVersion >= 90;
  return status;
}

// Launches a kernel; with `overlap` it may start while the one before it ends, if its code waits for that.
template <class Kernel, class... Params>
cudaError_t launch_after(Kernel kernel, int64_t blocks, int threads, int shared_bytes, bool overlap,
                         cudaStream_t stream, const Params&... params) {
  if (overlap) {
    const cudaError_t status = code_waits(kernel, &overlap);
    if (status != cudaSuccess) return status;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

}  // namespace sharedllm

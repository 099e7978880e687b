// PDL (programmatic dependent launch): a kernel starts while the one before it on the stream ends (compute capability
// 9.0 and later).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sharedllm {

// Waits for the previous kernel: its results are visible from here on. Every block of a kernel launched with overlap
// calls this, even one without work: otherwise its end would also count as the end of the previous kernel.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start as soon as every block has called this or ended.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether the code that this device runs waits for the previous kernel. Code compiled for less than 9.0 (for an older
// device, or as PTX for newer ones) does not.
template <class Kernel>
cudaError_t code_waits(Kernel kernel, bool* waits) {
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  *waits = status == cudaSuccess && attributes.ptxVersion >= 90;
  return status;
}

// Launches a kernel; with `overlap` it may start while the previous one ends, if its code waits for that.
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

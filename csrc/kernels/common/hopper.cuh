// Hopper's asynchronous instructions: mbarriers, TMA copies, WGMMA operands (sm_90a only).
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/common/copy_async.cuh"
#include "kernels/common/named_barrier.cuh"

namespace sharedllm {

// ---- mbarriers (transaction barriers) ----

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Makes initialised barriers visible to TMA.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}

// Arrives when the calling thread's cp.async so far are complete.
__device__ __forceinline__ void barrier_arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Makes ordinary stores to shared memory visible to the tensor cores and to TMA.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Four matrices of 8 x 8 two-byte elements (stmatrix): lane l gives the address of 16 bytes, row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(void* to, const uint32_t* x) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(to)), "r"(x[0]),
               "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

// ---- TMA ----

// Cache hints for L2, as TMA encodes them.
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull, kEvictLast = 0x14F0000000000000ull;

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// Loads a box of a three-dimensional tensor, innermost coordinate first.
__device__ __forceinline__ void tensor_load_3d(void* to, const CUtensorMap* map, uint64_t* barrier, int32_t x,
                                               int32_t y, int32_t z, uint64_t hint) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "l"(hint)
      : "memory");
}

// The same for four dimensions.
__device__ __forceinline__ void tensor_load_4d(void* to, const CUtensorMap* map, uint64_t* barrier, int32_t x,
                                               int32_t y, int32_t z, int32_t w, uint64_t hint) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w), "l"(hint)
      : "memory");
}

// Stores a box: shared memory has to be visible to TMA first (async_proxy_fence).
__device__ __forceinline__ void tensor_store_3d(const void* from, const CUtensorMap* map, int32_t x, int32_t y,
                                                int32_t z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
                   reinterpret_cast<uint64_t>(map)),
               "r"(shared_address(from)), "r"(x), "r"(y), "r"(z)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Adds contiguous float32, a multiple of 16 bytes, to global memory. The order of additions by several blocks is not
// defined.
__device__ __forceinline__ void bulk_add(float* to, const float* from, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(to)),
      "r"(shared_address(from)), "r"(bytes)
      : "memory");
}
// Waits until the calling thread's bulk copies have read shared memory.
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// ---- WGMMA ----

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// WGMMA operand in shared memory, 128-byte swizzle: rows of 128 bytes, atoms of 8 rows (1024 bytes), base aligned to
// 1024 bytes.
// K-major (the contraction index runs along the 128-byte rows): atoms of 8 rows follow each other every 1024 bytes,
// which is the stride offset; the leading offset is unused. The next 16 elements of k are 32 bytes further.
// MN-major (the output index runs along the 128-byte rows, the contraction index across the rows): 8 rows of k further
// is `stride_bytes` (1024 in a panel whose rows follow each other), the next 64 output elements `leading_bytes`.
__device__ __forceinline__ uint64_t swizzled_operand(const void* shared, uint32_t leading_bytes,
                                                     uint32_t stride_bytes) {
  uint64_t descriptor = (shared_address(shared) & 0x3ffff) >> 4;
  descriptor |= static_cast<uint64_t>(leading_bytes >> 4) << 16;
  descriptor |= static_cast<uint64_t>(stride_bytes >> 4) << 32;
  return descriptor | uint64_t{1} << 62;
}

// Keeps the compiler from moving uses of accumulators across asynchronous matmuls.
template <int kCount>
__device__ __forceinline__ void fence_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void fence_registers(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// Keeps the compiler from knowing a number, and so from computing what depends on it before a loop.
__device__ __forceinline__ uint32_t hidden(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <uint32_t kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <uint32_t kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace sharedllm

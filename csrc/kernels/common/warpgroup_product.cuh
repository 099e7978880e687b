// WGMMA: matmuls of one tile by a warpgroup, accumulators in registers, through CUTLASS's instruction wrappers (sm_90a
// only).
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
// after the header above, whose types it uses
#include <cute/arch/mma_sm90_gmma_ext.hpp>
#include <utility>

#include "kernels/common/hopper.cuh"

namespace sharedllm {

using cute::SM90::GMMA::Major;
using cute::SM90::GMMA::ScaleOut;

// The instruction of 64 x kColumns x 16 for an element type: A from shared memory (K-major) or from registers.
template <class T, int kColumns>
struct ProductAtom;

#define SHAREDLLM_PRODUCT_ATOM(COLUMNS)                                                     \
  template <>                                                                               \
  struct ProductAtom<__nv_bfloat16, COLUMNS> {                                              \
    template <Major kB>                                                                     \
    using Shared = cute::SM90::GMMA::MMA_64x##COLUMNS##x16_F32BF16BF16_SS<Major::K, kB>;    \
    template <Major kB>                                                                     \
    using Registers = cute::SM90::GMMA::MMA_64x##COLUMNS##x16_F32BF16BF16_RS<Major::K, kB>; \
  };                                                                                        \
  template <>                                                                               \
  struct ProductAtom<__half, COLUMNS> {                                                     \
    template <Major kB>                                                                     \
    using Shared = cute::SM90::GMMA::MMA_64x##COLUMNS##x16_F32F16F16_SS<Major::K, kB>;      \
    template <Major kB>                                                                     \
    using Registers = cute::SM90::GMMA::MMA_64x##COLUMNS##x16_F32F16F16_RS<Major::K, kB>;   \
  };
SHAREDLLM_PRODUCT_ATOM(64)
SHAREDLLM_PRODUCT_ATOM(80)
SHAREDLLM_PRODUCT_ATOM(96)
SHAREDLLM_PRODUCT_ATOM(128)
SHAREDLLM_PRODUCT_ATOM(160)
SHAREDLLM_PRODUCT_ATOM(176)
SHAREDLLM_PRODUCT_ATOM(192)
SHAREDLLM_PRODUCT_ATOM(224)
SHAREDLLM_PRODUCT_ATOM(256)
#undef SHAREDLLM_PRODUCT_ATOM

template <class Atom, size_t... kIndex>
__device__ __forceinline__ void product_shared(uint64_t a, uint64_t b, float (&c)[sizeof...(kIndex)], ScaleOut scale,
                                               std::index_sequence<kIndex...>) {
  Atom::fma(a, b, c[kIndex]..., scale);
}

template <class Atom, size_t... kIndex>
__device__ __forceinline__ void product_registers(const uint32_t* a, uint64_t b, float (&c)[sizeof...(kIndex)],
                                                  ScaleOut scale, std::index_sequence<kIndex...>) {
  Atom::fma(a[0], a[1], a[2], a[3], b, c[kIndex]..., scale);
}

// One step of 16 along the contraction: c = a b, or c += a b.
template <class T, int kColumns, Major kB>
__device__ __forceinline__ void multiply(uint64_t a, uint64_t b, float (&c)[kColumns / 2], bool accumulate) {
  product_shared<typename ProductAtom<T, kColumns>::template Shared<kB>>(
      a, b, c, accumulate ? ScaleOut::One : ScaleOut::Zero, std::make_index_sequence<kColumns / 2>{});
}
template <class T, int kColumns, Major kB>
__device__ __forceinline__ void multiply(const uint32_t* a, uint64_t b, float (&c)[kColumns / 2], bool accumulate) {
  product_registers<typename ProductAtom<T, kColumns>::template Registers<kB>>(
      a, b, c, accumulate ? ScaleOut::One : ScaleOut::Zero, std::make_index_sequence<kColumns / 2>{});
}

}  // namespace sharedllm

// 8-bit floats (e4m3) as half-precision numbers.
#pragma once

#include <cstdint>

namespace sharedllm {

// Two codes as two numbers of half precision, the first in the low half; exact, and a NaN stays one.
__device__ __forceinline__ uint32_t halves_of_codes(uint16_t codes) {
#if __CUDA_ARCH__ >= 890
  uint32_t y;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(codes));
  return y;
#else
  // Exponent and mantissa begin at the same bit in both if the code lies in the upper byte, shifted by one: that number
  // is 2^-8 of the code's, whose exponent counts from 7 instead of 15. Subnormal codes become subnormal halves.
  const uint32_t spread = (codes & 0xffu) << 8 | (codes & 0xff00u) << 16;
  const uint32_t magnitude = (spread & 0x7f007f00u) >> 1;
  uint32_t y;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(magnitude), "r"(0x5c005c00u));  // 2^8
  // the one magnitude that is a NaN
  const uint32_t nan = __vcmpeq2(magnitude, 0x3f803f80u) & 0x7fff7fffu;
  return y | nan | (spread & 0x80008000u);
#endif
}

}  // namespace sharedllm

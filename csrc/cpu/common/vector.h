// Sixteen floats as one compiler vector: the same text becomes AVX-512, AVX2, SSE2 or NEON code.
#pragma once

#include <cstdint>
#include <cstring>

#define SHAREDLLM_INLINE inline __attribute__((always_inline))

// Defines `void name params { call; }` once for each instruction set; the fastest that the machine has is taken at run
// time.
#if defined(__x86_64__) && defined(__GNUC__)
#define SHAREDLLM_FOR_EACH_ISA(name, params, args, call)                                                     \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))) void name##_avx512 params { call; } \
  __attribute__((target("avx2,fma"))) void name##_avx2 params { call; }                                      \
  void name##_generic params { call; }                                                                       \
  void name params {                                                                                         \
    static const auto chosen = ::sharedllm::has_avx512() ? &name##_avx512                                    \
                               : ::sharedllm::has_avx2() ? &name##_avx2                                      \
                                                         : &name##_generic;                                  \
    chosen args;                                                                                             \
  }
#else
#define SHAREDLLM_FOR_EACH_ISA(name, params, args, call) \
  void name params { call; }
#endif

// Every function that takes a vector is inlined, so no calling convention is involved.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace sharedllm {

#if defined(__x86_64__) && defined(__GNUC__)
inline bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}

inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

constexpr int64_t kLanes = 16;

using Float16 = float __attribute__((vector_size(64)));
using Bits16 = uint32_t __attribute__((vector_size(64)));
using Short16 = uint16_t __attribute__((vector_size(32)));

// bfloat16 travels as uint16_t: the upper half of the float32 of the same value.
SHAREDLLM_INLINE Float16 load16(const float* from) {
  Float16 x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

SHAREDLLM_INLINE Float16 load16(const uint16_t* from) {
  Short16 narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  const Bits16 bits = __builtin_convertvector(narrow, Bits16) << 16;
  return (Float16)bits;
}

// The first `count` of sixteen elements, zeros after them.
template <class T>
SHAREDLLM_INLINE Float16 load_upto16(const T* from, int64_t count) {
  if (count >= kLanes) return load16(from);
  T padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load16(padded);
}

SHAREDLLM_INLINE void store16(float* to, const Float16& x) { std::memcpy(to, &x, sizeof x); }

// Round to nearest, ties to even; a NaN stays a NaN.
SHAREDLLM_INLINE void store16(uint16_t* to, const Float16& x) {
  const Bits16 bits = (Bits16)x;
  const Bits16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits16 number = (Bits16)(x == x);
  const Short16 narrow = __builtin_convertvector((rounded & number) | (0x7fc0 & ~number), Short16);
  std::memcpy(to, &narrow, sizeof narrow);
}

template <class T>
SHAREDLLM_INLINE void store_upto16(T* to, const Float16& x, int64_t count) {
  if (count >= kLanes) return store16(to, x);
  T padded[kLanes];
  store16(padded, x);
  std::memcpy(to, padded, count * sizeof(T));
}

SHAREDLLM_INLINE float sum16(const Float16& x) {
  float sum[8];
  for (int i = 0; i < 8; ++i) sum[i] = x[i] + x[i + 8];
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

}  // namespace sharedllm

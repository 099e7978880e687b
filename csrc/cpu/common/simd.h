// Vectors of floats for the attention kernels, one struct for each instruction set; a kernel file is included once for
// each.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the deliberately undefined operands of its own intrinsics for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wignored-attributes"
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

// Code between BEGIN and END may use the named instructions, whatever the compiler was told to aim at.
#define SHAREDLLM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SHAREDLLM_BEGIN_TARGET(names) \
  SHAREDLLM_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define SHAREDLLM_END_TARGET SHAREDLLM_PRAGMA(clang attribute pop)
#else
#define SHAREDLLM_BEGIN_TARGET(names) SHAREDLLM_PRAGMA(GCC push_options) SHAREDLLM_PRAGMA(GCC target(names))
#define SHAREDLLM_END_TARGET SHAREDLLM_PRAGMA(GCC pop_options)
#endif

#define SHAREDLLM_AVX2 "avx2,fma"
#define SHAREDLLM_AVX512 "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"
#define SHAREDLLM_AVX512_BF16 "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"

#define SHAREDLLM_SIMD static inline __attribute__((always_inline))

namespace sharedllm {

using bf16 = uint16_t;  // upper half of the float32 of the same value

enum class e4m3 : uint8_t {};  // 8 bits: sign, 4 of the exponent, 3 of the mantissa

enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Bf16 };

inline Isa fastest_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

// Exponent and mantissa of a code shifted to those of a float32 are its magnitude times 2^-120; subnormal ones too.
constexpr float kCodeFactor = 0x1p120f;
constexpr uint32_t kCodeNan = 0x7f;

inline float to_float(e4m3 x) {
  const uint32_t code = static_cast<uint32_t>(x);
  const uint32_t bits = (code & 0x80) << 24 | ((code & 0x7f) == kCodeNan ? 0x7fc00000u : (code & 0x7f) << 20);
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y * kCodeFactor;
}

// Round to nearest, ties to even; a NaN stays a NaN.
inline bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store(float* to, float x) { *to = x; }

inline void store(bf16* to, float x) { *to = to_bf16(x); }

// 2^f on [-1/2, 1/2]: interpolation at the Chebyshev nodes, relative error 2e-8 before rounding.
constexpr float kExp2[7] = {1.0f,           0.693147182f,  0.240226507f,   0.0555032715f,
                            0.00961805694f, 0.0013400428f, 0.000154614449f};
// 2^x is 0 in float32 below; also keeps -inf - -inf away from the polynomial.
constexpr float kExp2Lowest = -160.0f;

// Four floats in the compiler's own vector type: SSE2, NEON, or whatever the target has.
struct Generic {
  using F = float __attribute__((vector_size(16)));
  using I = int32_t __attribute__((vector_size(16)));
  static constexpr bool kPairs = false;  // has products of bfloat16 pairs
  static constexpr int kLanes = 4;
  static constexpr int kVectors = 2;  // vectors in a panel: with kRows rows they fill the register file
  static constexpr int kRows = 4;

  SHAREDLLM_SIMD F zero() { return F{}; }
  SHAREDLLM_SIMD F set1(float x) { return F{x, x, x, x}; }
  SHAREDLLM_SIMD F load(const float* from) {
    F x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
  SHAREDLLM_SIMD F load(const bf16* from) {
    return F{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
  }
  SHAREDLLM_SIMD F load(const e4m3* from) {
    return F{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
  }
  SHAREDLLM_SIMD void save(float* to, F x) { std::memcpy(to, &x, sizeof x); }
  SHAREDLLM_SIMD F add(F a, F b) { return a + b; }
  SHAREDLLM_SIMD F sub(F a, F b) { return a - b; }
  SHAREDLLM_SIMD F mul(F a, F b) { return a * b; }
  SHAREDLLM_SIMD F fma(F a, F b, F c) { return a * b + c; }
  // b where either is NaN, as the x86 instruction
  SHAREDLLM_SIMD F max(F a, F b) {
    const I larger = a > b;
    return (F)(((I)a & larger) | ((I)b & ~larger));
  }
  SHAREDLLM_SIMD float sum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
  SHAREDLLM_SIMD void sum4(F a, F b, F c, F d, float* to) {
    to[0] = sum(a);
    to[1] = sum(b);
    to[2] = sum(c);
    to[3] = sum(d);
  }
  SHAREDLLM_SIMD F exp2(F x) {
    x = max(set1(kExp2Lowest), x);
    const F magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const F whole = (x + magic) - magic;
    const F part = x - whole;
    F y = set1(kExp2[6]);
    for (int i = 5; i >= 0; --i) y = y * part + set1(kExp2[i]);
    // in two steps, as 2^-160 has no exponent of its own
    const I n = __builtin_convertvector(whole, I);
    const I half = n >> 1;
    return y * (F)((half + 127) << 23) * (F)((n - half + 127) << 23);
  }
};

#if defined(__x86_64__)

SHAREDLLM_BEGIN_TARGET(SHAREDLLM_AVX2)
struct Avx2 {
  using F = __m256;
  static constexpr bool kPairs = false;
  static constexpr int kLanes = 8;
  static constexpr int kVectors = 2;
  static constexpr int kRows = 6;

  SHAREDLLM_SIMD F zero() { return _mm256_setzero_ps(); }
  SHAREDLLM_SIMD F set1(float x) { return _mm256_set1_ps(x); }
  SHAREDLLM_SIMD F load(const float* from) { return _mm256_loadu_ps(from); }
  SHAREDLLM_SIMD F load(const bf16* from) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
  }
  SHAREDLLM_SIMD F load(const e4m3* from) {
    const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi32(0x7f));
    const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(code, 7), 31);
    // all bits
    const __m256i nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(kCodeNan));
    const __m256i bits = _mm256_or_si256(_mm256_slli_epi32(magnitude, 20), _mm256_or_si256(sign, nan));
    return _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(kCodeFactor));
  }
  SHAREDLLM_SIMD void save(float* to, F x) { _mm256_storeu_ps(to, x); }
  SHAREDLLM_SIMD F add(F a, F b) { return _mm256_add_ps(a, b); }
  SHAREDLLM_SIMD F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  SHAREDLLM_SIMD F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  SHAREDLLM_SIMD F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  SHAREDLLM_SIMD F max(F a, F b) { return _mm256_max_ps(a, b); }
  SHAREDLLM_SIMD float sum(F x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }
  SHAREDLLM_SIMD void sum4(F a, F b, F c, F d, float* to) {
    const F all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
  SHAREDLLM_SIMD F exp2(F x) {
    x = max(set1(kExp2Lowest), x);
    const F whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F part = sub(x, whole);
    F y = set1(kExp2[6]);
    for (int i = 5; i >= 0; --i) y = fma(y, part, set1(kExp2[i]));
    const __m256i n = _mm256_cvtps_epi32(whole);
    const __m256i half = _mm256_srai_epi32(n, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256i low = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i high = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias), 23);
    return mul(mul(y, _mm256_castsi256_ps(low)), _mm256_castsi256_ps(high));
  }
};
SHAREDLLM_END_TARGET

SHAREDLLM_BEGIN_TARGET(SHAREDLLM_AVX512)
struct Avx512 {
  using F = __m512;
  static constexpr bool kPairs = false;
  static constexpr int kLanes = 16;
  static constexpr int kVectors = 4;
  static constexpr int kRows = 6;

  SHAREDLLM_SIMD F zero() { return _mm512_setzero_ps(); }
  SHAREDLLM_SIMD F set1(float x) { return _mm512_set1_ps(x); }
  SHAREDLLM_SIMD F load(const float* from) { return _mm512_loadu_ps(from); }
  SHAREDLLM_SIMD F load(const bf16* from) {
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
  }
  SHAREDLLM_SIMD F load(const e4m3* from) {
    const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi32(0x7f));
    const __m512i sign = _mm512_slli_epi32(_mm512_srli_epi32(code, 7), 31);
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(kCodeNan));
    const __m512i bits = _mm512_or_si512(_mm512_slli_epi32(magnitude, 20), sign);
    const __m512i all = _mm512_mask_set1_epi32(bits, nan, -1);
    return _mm512_mul_ps(_mm512_castsi512_ps(all), _mm512_set1_ps(kCodeFactor));
  }
  SHAREDLLM_SIMD void save(float* to, F x) { _mm512_storeu_ps(to, x); }
  SHAREDLLM_SIMD F add(F a, F b) { return _mm512_add_ps(a, b); }
  SHAREDLLM_SIMD F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  SHAREDLLM_SIMD F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  SHAREDLLM_SIMD F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  SHAREDLLM_SIMD F max(F a, F b) { return _mm512_max_ps(a, b); }
  SHAREDLLM_SIMD float sum(F x) { return _mm512_reduce_add_ps(x); }
  SHAREDLLM_SIMD void sum4(F a, F b, F c, F d, float* to) {
    const F ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const F cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const F all =
        add(_mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0)), _mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
  SHAREDLLM_SIMD F exp2(F x) {
    x = max(set1(kExp2Lowest), x);
    const F whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F part = sub(x, whole);
    F y = set1(kExp2[6]);
    for (int i = 5; i >= 0; --i) y = fma(y, part, set1(kExp2[i]));
    return _mm512_scalef_ps(y, whole);
  }
};
SHAREDLLM_END_TARGET

SHAREDLLM_BEGIN_TARGET(SHAREDLLM_AVX512_BF16)
struct Avx512Bf16 : Avx512 {
  static constexpr bool kPairs = true;

  // Every lane holds two bfloat16: c + a.low * b.low + a.high * b.high.
  SHAREDLLM_SIMD F dot(F a, F b, F c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
  SHAREDLLM_SIMD __m256i narrow(F x) { return (__m256i)_mm512_cvtneps_pbh(x); }
  // low halves of the lanes from `low`, high halves from `high`
  SHAREDLLM_SIMD F pair(__m256i low, __m256i high) {
    const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(low), upper));
  }
  SHAREDLLM_SIMD __m256i load_narrow(const bf16* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  SHAREDLLM_SIMD void store_narrow(float* to, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }
};
SHAREDLLM_END_TARGET

#endif  // x86

}  // namespace sharedllm

// CRC-32 by folding: a block of the message, multiplied by x^distance modulo the polynomial, is added to the block that
// lies so many bits after it, so the message becomes shorter and its remainder stays the same.
//
// Polynomials over GF(2) are reflected, as in the message: the lowest bit of a register is the highest power of x.
#include "cpu/checksum.h"

#include <array>

#include "cpu/common/simd.h"

namespace sharedllm {

#if defined(__x86_64__)
namespace {

constexpr uint32_t times_x(uint32_t remainder) {
  constexpr uint32_t kPolynomial = 0xedb88320;  // without x^32
  return remainder >> 1 ^ (remainder & 1 ? kPolynomial : 0);
}

// x^n modulo the polynomial.
constexpr uint32_t power_of_x(int n) {
  uint32_t remainder = 0x80000000;
  for (; n > 0; --n) remainder = times_x(remainder);
  return remainder;
}

constexpr std::array<uint32_t, 256> remainders_of_bytes() {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t remainder = byte;
    for (int bit = 0; bit < 8; ++bit) remainder = times_x(remainder);
    table[byte] = remainder;
  }
  return table;
}

// What the first and second 64 bits of a block are multiplied by. The first are x^64 times higher. The product of two
// registers of 64 bits has 127: read as one of 128 bits it is x times the product, hence a power of x less.
struct Factors {
  int64_t first, second;
};

constexpr Factors factors(int distance) {
  return {static_cast<int64_t>(uint64_t{power_of_x(distance + 63)} << 32),
          static_cast<int64_t>(uint64_t{power_of_x(distance - 1)} << 32)};
}

constexpr std::array<uint32_t, 256> kBytes = remainders_of_bytes();
constexpr Factors kBy128 = factors(128), kBy512 = factors(512), kBy2048 = factors(2048);

uint32_t add_bytes(uint32_t remainder, const uint8_t* data, size_t bytes) {
  for (const uint8_t* end = data + bytes; data < end; ++data) {
    remainder = kBytes[(remainder ^ *data) & 0xff] ^ remainder >> 8;
  }
  return remainder;
}

SHAREDLLM_BEGIN_TARGET("pclmul")

SHAREDLLM_SIMD __m128i load(const uint8_t* data) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data)); }

SHAREDLLM_SIMD __m128i fold(__m128i block, __m128i by, __m128i onto) {
  const __m128i first = _mm_clmulepi64_si128(block, by, 0x00), second = _mm_clmulepi64_si128(block, by, 0x11);
  return _mm_xor_si128(_mm_xor_si128(first, second), onto);
}

// The remainder of a block and of what follows it.
SHAREDLLM_SIMD uint32_t finish(__m128i block, const uint8_t* data, size_t bytes) {
  const __m128i by128 = _mm_set_epi64x(kBy128.second, kBy128.first);
  for (; bytes >= 16; data += 16, bytes -= 16) block = fold(block, by128, load(data));
  uint8_t last[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(last), block);
  return add_bytes(add_bytes(0, last, sizeof last), data, bytes);
}

// Four blocks at a time, which hides the latency of a multiplication.
uint32_t crc32_pclmul(uint32_t sum, const uint8_t* data, size_t bytes) {
  if (bytes < 64) return ~add_bytes(~sum, data, bytes);
  const __m128i by128 = _mm_set_epi64x(kBy128.second, kBy128.first);
  const __m128i by512 = _mm_set_epi64x(kBy512.second, kBy512.first);
  __m128i a = _mm_xor_si128(load(data), _mm_cvtsi32_si128(static_cast<int>(~sum)));
  __m128i b = load(data + 16), c = load(data + 32), d = load(data + 48);
  for (data += 64, bytes -= 64; bytes >= 64; data += 64, bytes -= 64) {
    a = fold(a, by512, load(data));
    b = fold(b, by512, load(data + 16));
    c = fold(c, by512, load(data + 32));
    d = fold(d, by512, load(data + 48));
  }
  return ~finish(fold(fold(fold(a, by128, b), by128, c), by128, d), data, bytes);
}

SHAREDLLM_END_TARGET
SHAREDLLM_BEGIN_TARGET("pclmul,vpclmulqdq,avx512f")

SHAREDLLM_SIMD __m512i fold(__m512i blocks, __m512i by, __m512i onto) {
  const __m512i first = _mm512_clmulepi64_epi128(blocks, by, 0x00), second = _mm512_clmulepi64_epi128(blocks, by, 0x11);
  constexpr int kSumOfThree = 0x96;
  return _mm512_ternarylogic_epi64(first, second, onto, kSumOfThree);
}

// The same with four times four blocks.
uint32_t crc32_vpclmul(uint32_t sum, const uint8_t* data, size_t bytes) {
  if (bytes < 256) return crc32_pclmul(sum, data, bytes);
  const __m512i by512 = _mm512_broadcast_i32x4(_mm_set_epi64x(kBy512.second, kBy512.first));
  const __m512i by2048 = _mm512_broadcast_i32x4(_mm_set_epi64x(kBy2048.second, kBy2048.first));
  __m512i a =
      _mm512_xor_si512(_mm512_loadu_si512(data), _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(~sum))));
  __m512i b = _mm512_loadu_si512(data + 64), c = _mm512_loadu_si512(data + 128), d = _mm512_loadu_si512(data + 192);
  for (data += 256, bytes -= 256; bytes >= 256; data += 256, bytes -= 256) {
    a = fold(a, by2048, _mm512_loadu_si512(data));
    b = fold(b, by2048, _mm512_loadu_si512(data + 64));
    c = fold(c, by2048, _mm512_loadu_si512(data + 128));
    d = fold(d, by2048, _mm512_loadu_si512(data + 192));
  }
  a = fold(fold(fold(a, by512, b), by512, c), by512, d);
  for (; bytes >= 64; data += 64, bytes -= 64) a = fold(a, by512, _mm512_loadu_si512(data));
  const __m128i by128 = _mm_set_epi64x(kBy128.second, kBy128.first);
  __m128i block = _mm512_castsi512_si128(a);
  block = fold(block, by128, _mm512_extracti32x4_epi32(a, 1));
  block = fold(block, by128, _mm512_extracti32x4_epi32(a, 2));
  block = fold(block, by128, _mm512_extracti32x4_epi32(a, 3));
  return ~finish(block, data, bytes);
}

SHAREDLLM_END_TARGET

}  // namespace
#endif

std::vector<Crc32> crc32_versions() {
  std::vector<Crc32> versions;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("pclmul")) return versions;
  if (__builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx512f")) {
    versions.push_back({"vpclmulqdq", &crc32_vpclmul});
  }
  versions.push_back({"pclmulqdq", &crc32_pclmul});
#endif
  return versions;
}

}  // namespace sharedllm

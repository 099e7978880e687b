// CRC-32 as zlib computes it, by carry-less multiplication.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sharedllm {

struct Crc32 {
  const char* instructions;
  // continues a sum, which begins with 0
  uint32_t (*update)(uint32_t sum, const uint8_t* data, size_t bytes);
};

// The versions that run on this machine, the fastest first; none without instructions for it.
std::vector<Crc32> crc32_versions();

}  // namespace sharedllm

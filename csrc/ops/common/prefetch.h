// What a kernel of a decoding step prefetches into L2 for the kernels after it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

namespace sharedllm {

// Largest part of a tensor that can be prefetched: whole 16-byte units.
inline void describe_prefetch(const std::optional<torch::stable::Tensor>& tensor, int64_t bytes, const void** from,
                              int64_t* size) {
  *from = nullptr;
  *size = 0;
  if (!tensor || !tensor->is_cuda() || !tensor->is_contiguous()) return;
  const int64_t there = tensor->numel() * static_cast<int64_t>(tensor->element_size());
  const void* const data = tensor->const_data_ptr();
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return;
  *from = data;
  *size = std::max<int64_t>(std::min(bytes, there), 0) / 16 * 16;
}

}  // namespace sharedllm

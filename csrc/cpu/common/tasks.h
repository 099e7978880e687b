// Threads over uneven tasks, and what the attention operators share on the host side.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "common/checks.h"

namespace sharedllm {

// Starts at most one worker for each thread; each takes task after task from the counter, so uneven tasks balance.
template <class Worker>
inline void run_tasks(int64_t tasks, const Worker& worker) {
  if (tasks == 0) return;
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) worker(next);
  });
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows and heads may be anywhere; the elements of a head must be contiguous.
inline torch::stable::Tensor dense_heads(const torch::stable::Tensor& x) {
  return (x.stride(2) == 1 || x.size(2) <= 1) && is_aligned(x) ? x : dense(x);
}

}  // namespace sharedllm

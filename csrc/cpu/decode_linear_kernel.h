// What the host operator hands to the kernels of decode_linear.
#pragma once

#include <cstdint>
#include <vector>

namespace sharedllm::linear {

struct Matrix {
  const void* weight;  // [rows, K], dense
  const float* scale;  // [rows], of weights in 8 bits; null for those in x's type
  const void* bias;    // [rows] or null
  int64_t rows;        // N_i
  int64_t column;      // of the output, where its part begins
};

struct Linear {
  const void* x;     // [rows, K], dense
  const void* norm;  // [K] or null
  float eps;
  std::vector<Matrix> matrices;  // gated: two of equal shape, and the output has the columns of one
  const void* residual;          // [rows, columns], dense, or null
  void* out;                     // [rows, columns]
  bool gated;
  int64_t rows, size, columns;  // size: K
};

// Rows of a matrix in a task. They have to be many times what a tile takes at once, and few enough that two threads
// share the smallest projections evenly: 192 key rows are four tasks.
constexpr int64_t kTaskRows = 48;

}  // namespace sharedllm::linear

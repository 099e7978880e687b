// Which rows of a batch read the same slots: the kernels take them as one row of more queries, so that keys and values
// are read once for all of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "injected_attention_kernel.h"

namespace sharedllm::injected {

// Rows of equal slot range as one, wherever they are in the batch; rows without slots count as equal. Inside of a
// merged row the queries keep the batch's order, so that a batch without shared slots is computed as it comes.
class MergedRows {
 public:
  MergedRows() = default;

  // cu_q [rows + 1], slot_range [rows, 2] and q_position [rows] of the batch, checked.
  MergedRows(const int64_t* cu_q, const int64_t* slot_range, const int64_t* q_position, int64_t rows) {
    std::vector<int64_t> order;
    for (int64_t row = 0; row < rows; ++row) {
      if (cu_q[row] < cu_q[row + 1]) order.push_back(row);
    }
    const auto low = [&](int64_t row) { return slot_range[2 * row]; };
    const auto high = [&](int64_t row) { return slot_range[2 * row + 1]; };
    const auto is_empty = [&](int64_t row) { return low(row) == high(row); };
    // those without slots come first
    const auto before = [&](int64_t a, int64_t b) {
      if (is_empty(a) || is_empty(b)) return is_empty(a) && !is_empty(b);
      return low(a) != low(b) ? low(a) < low(b) : high(a) < high(b);
    };
    std::stable_sort(order.begin(), order.end(), before);
    for (size_t i = 0; i < order.size(); ++i) {
      const int64_t row = order[i];
      if (i == 0 || before(order[i - 1], row)) {
        cu_q_.push_back(cu_q_.back());
        slot_range_.insert(slot_range_.end(), {low(row), high(row)});
      }
      runs_.push_back({cu_q_.back(), cu_q[row], q_position[row]});
      cu_q_.back() += cu_q[row + 1] - cu_q[row];
    }
  }

  int64_t rows() const { return static_cast<int64_t>(cu_q_.size()) - 1; }
  int64_t runs() const { return static_cast<int64_t>(runs_.size()); }
  const int64_t* cu_q() const { return cu_q_.data(); }
  const int64_t* slot_range() const { return slot_range_.data(); }
  const QueryRun* run() const { return runs_.data(); }

 private:
  std::vector<int64_t> cu_q_ = {0};
  std::vector<int64_t> slot_range_;
  std::vector<QueryRun> runs_;
};

}  // namespace sharedllm::injected

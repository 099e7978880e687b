// What the host operator hands to the kernels of injected attention, and how the work is cut.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace sharedllm::injected {

// [rows, heads, D] with unit stride in D; other strides in elements.
struct View {
  const void* data = nullptr;
  int64_t row = 0, head = 0;
};

// Queries that a row of the batch puts into a merged row, see MergedRows.
struct QueryRun {
  int64_t place;     // of the first among the queries of all merged rows
  int64_t token;     // the first query
  int64_t position;  // rotary, of all of them
};

struct Problem {
  View q, k, v;               // [T, Hq, D], [S, Hkv, D], [S, Hkv, D]
  const int64_t* cu_q;        // [B + 1]
  const int64_t* slot_range;  // [B, 2], no two of them equal
  const QueryRun* run;        // [runs], places ascending
  int64_t runs;
  const float *cos, *sin;                   // [P, R/2]
  int64_t half;                             // R/2
  int64_t rows, queries, slots;             // B, T, S
  int64_t q_heads, kv_heads, groups, size;  // Hq, Hkv, Hq/Hkv, D
  float scale;
};

struct Forward : Problem {
  void* out;   // [T, Hq, D]
  float* lse;  // [T, Hq]
};

struct Backward : Problem {
  View grad_out, out;     // [T, Hq, D]
  const float* lse;       // [T, Hq]
  const float* grad_lse;  // [T, Hq] or null
  void* grad_q;           // [T, Hq, D]
  void *grad_k, *grad_v;  // [S, Hkv, D] or null
};

// Stacked query i of a row and key/value head: the heads of a group that read it, query after query.
struct StackedQuery {
  int64_t token, head, position;
};

inline StackedQuery stacked_query(const Problem& p, int64_t row, int64_t kv_head, int64_t i) {
  const int64_t place = p.cu_q[row] + i / p.groups;
  const QueryRun* const run = std::upper_bound(p.run + 1, p.run + p.runs, place,
                                               [](int64_t value, const QueryRun& x) { return value < x.place; }) -
                              1;
  return {run->token + place - run->place, kv_head * p.groups + i % p.groups, run->position};
}

// Stacked queries of one row and one key/value head.
struct QueryBlock {
  int64_t row, head;
  int64_t begin, count;  // stacked queries
  int64_t low, high;     // slots
};

// Uninitialised floats on a cache line's boundary.
class Floats64 {
 public:
  explicit Floats64(int64_t count)
      : data_(static_cast<float*>(
            ::operator new(sizeof(float) * static_cast<size_t>(count + 64), std::align_val_t{64}))) {}
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<float, Free> data_;
};

// Slots that a kernel takes at once: a multiple of every tile's rows; keys and values of 128 elements fill half the L2
// cache.
constexpr int64_t kSlots = 96;

// Stacked queries of a task; a block of slots that is copied once serves all of them.
constexpr int64_t kTaskQueries = 256;

// Too few query blocks for many threads: their slots are cut into parts that are merged afterwards. The numbers depend
// on the shapes alone, so the result does not depend on the number of threads.
constexpr int64_t kWantedTasks = 64;
constexpr int64_t kMinPart = 1024;
constexpr int64_t kMaxParts = 64;

// Bytes of packed queries, and of partial query gradients, that the backward pass holds at once.
constexpr int64_t kPackedBytes = int64_t{256} << 20;
constexpr int64_t kPartialBytes = int64_t{128} << 20;

}  // namespace sharedllm::injected

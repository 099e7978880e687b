// Chunk compression, forward and backward: RoPE, selection of the kept positions, packing. Memory-bound.
// Every job is of one kind: an output row = a row of one tensor, rotated, plus a row of another, rotated. The source
// row is the output row itself or comes from an index. One launch does all jobs of a direction. In the forward pass the
// jobs that read the same keys run side by side, so that the second read of a kept key hits the L2 cache.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "kernels/chunk_compression.h"
#include "kernels/common/vector_load.cuh"

namespace sharedllm {
namespace {

constexpr int kThreads = 256;
// Heads of a row that a thread rotates by the same angles: it reads cos and sin once for all of them, and has as many
// pairs of loads in flight.
constexpr int kHeads = 4;
// Resident blocks on an SM: 24 warps with 8 loads of 16 bytes each cover the memory latency. The sum of two rows needs
// twice as many loads.
constexpr int kBlocks = 3, kSumBlocks = 2;

struct Source {
  const void* data;         // [count, heads, D]; null: nothing is added
  const int64_t* index;     // [rows] source row of each output row, out of range: zeros; null: the same row
  const int64_t* position;  // [rows], or [count] if position_by_source
  int64_t count, row_stride, head_stride;
  bool position_by_source;
};

struct Job {
  Source sources[2];
  void* out;  // [rows, heads, D], dense
  int64_t rows;
  int32_t heads;
  int32_t half;         // pairs that are rotated, 0 for a copy
  int32_t slices;       // threads that share the heads of a row; slice s has heads s, s + slices, ...
  int32_t tile_rows;    // rows of one block
  int32_t parts;        // blocks that share a row, where one is too small for it,
  int32_t slice_parts;  // of which this many share the slices
  uint32_t blocks;
};

// Job 0 runs first. Then job 1, with jobs 2 and 3 interleaved: one of their blocks, alternately, after every `period`
// blocks of job 1, so that all three walk through their rows at the same pace.
struct Jobs {
  Job jobs[4];
  const float* cos;  // [num_positions, half]
  const float* sin;
  int64_t num_positions;
  int32_t size;
  float sign;  // -1: rotates by the opposite angle
  uint32_t period;
};

// 16 bytes, or a single element where sizes or addresses do not allow that. Processed in parts of up to four elements,
// which bounds the registers.
template <class T, bool kVector>
struct Access {
  static constexpr int kWidth = kVector ? 16 / sizeof(T) : 1;
  static constexpr int kPart = kVector ? 4 : 1;
  using Raw = std::conditional_t<kVector, uint4, T>;

  static __device__ __forceinline__ Raw zero() {
    if constexpr (kVector) {
      return Raw{};
    } else {
      return T(0.0f);
    }
  }
  static __device__ __forceinline__ Raw load(const T* from) { return __ldcs(reinterpret_cast<const Raw*>(from)); }
  static __device__ __forceinline__ void store(T* to, const Raw& value) { *reinterpret_cast<Raw*>(to) = value; }
  static __device__ __forceinline__ void get(const Raw& from, int part, float (&to)[kPart]) {
    if constexpr (!kVector) {
      to[0] = to_float(from);
    } else {
      constexpr int kElements = Word<T>::kElements;
      const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
      for (int i = 0; i < kPart; ++i) to[i] = Word<T>::get(words[(kPart * part + i) / kElements], i % kElements);
    }
  }
  static __device__ __forceinline__ void set(Raw& to, int part, const float (&from)[kPart]) {
    if constexpr (!kVector) {
      to = T(from[0]);
    } else if constexpr (std::is_same_v<T, float>) {
      to = {__float_as_uint(from[0]), __float_as_uint(from[1]), __float_as_uint(from[2]), __float_as_uint(from[3])};
    } else {
      const uint32_t first = pack_pair(T{}, from[0], from[1]), second = pack_pair(T{}, from[2], from[3]);
      if (part == 0) {
        to.x = first, to.y = second;
      } else {
        to.z = first, to.w = second;
      }
    }
  }
  static __device__ __forceinline__ uint32_t pack_pair(__nv_bfloat16, float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ __forceinline__ uint32_t pack_pair(__half, float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

// Cosine and sine of a few neighbouring pairs.
template <int kPart>
struct Angles {
  float cos[kPart], sin[kPart];

  Angles() = default;
  __device__ __forceinline__ Angles(const Jobs& p, int64_t at) {
    if constexpr (kPart == 4) {
      const float4 c = __ldg(reinterpret_cast<const float4*>(p.cos + at));
      const float4 s = __ldg(reinterpret_cast<const float4*>(p.sin + at));
      cos[0] = c.x, cos[1] = c.y, cos[2] = c.z, cos[3] = c.w;
      sin[0] = p.sign * s.x, sin[1] = p.sign * s.y, sin[2] = p.sign * s.z, sin[3] = p.sign * s.w;
    } else {
      cos[0] = __ldg(p.cos + at);
      sin[0] = p.sign * __ldg(p.sin + at);
    }
  }

  // Every product and sum is rounded on its own, as in the PyTorch expression: a fused multiply-add would give other
  // last bits.
  __device__ __forceinline__ void rotate(float (&low)[kPart], float (&high)[kPart]) const {
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      const float x = low[i], y = high[i];
      low[i] = __fsub_rn(__fmul_rn(x, cos[i]), __fmul_rn(y, sin[i]));
      high[i] = __fadd_rn(__fmul_rn(y, cos[i]), __fmul_rn(x, sin[i]));
    }
  }
};

// Where the two vectors of a thread are in each of its heads. Offsets and steps count elements.
struct Places {
  int heads;      // heads of this thread, at most kHeads
  int gap;        // from the first vector to the second
  bool has_high;  // whether there is a second vector
};

// A thread's vectors of one row. Elements of `low` are rotated with those of `high`.
template <class T, bool kVector>
struct HeadVectors {
  using A = Access<T, kVector>;
  static constexpr int kPart = A::kPart, kParts = A::kWidth / kPart;
  typename A::Raw low[kHeads], high[kHeads];

  // Zeros where there is nothing to load.
  __device__ __forceinline__ HeadVectors(const T* from, int64_t step, const Places& places, bool present) {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      low[i] = high[i] = A::zero();
      if (present && i < places.heads) low[i] = A::load(from);
      if (present && i < places.heads && places.has_high) high[i] = A::load(from + places.gap);
      from += step;
    }
  }

  __device__ __forceinline__ void store(T* to, int64_t step, const Places& places) const {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (i < places.heads) A::store(to, low[i]);
      if (i < places.heads && places.has_high) A::store(to + places.gap, high[i]);
      to += step;
    }
  }

  __device__ __forceinline__ void rotate(const Jobs& p, int64_t table) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const Angles<kPart> angles(p, table + part * kPart);
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        float x[kPart], y[kPart];
        A::get(low[i], part, x);
        A::get(high[i], part, y);
        angles.rotate(x, y);
        A::set(low[i], part, x);
        A::set(high[i], part, y);
      }
    }
  }

  // The sum of both, rotated if requested, rounded once.
  __device__ __forceinline__ void rotate_and_add(const Jobs& p, bool rotated, int64_t table, const HeadVectors& other,
                                                 int64_t other_table) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      Angles<kPart> angles, other_angles;
      if (rotated) {
        angles = Angles<kPart>(p, table + part * kPart);
        other_angles = Angles<kPart>(p, other_table + part * kPart);
      }
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        float x[kPart], y[kPart], u[kPart], v[kPart];
        A::get(low[i], part, x);
        A::get(high[i], part, y);
        A::get(other.low[i], part, u);
        A::get(other.high[i], part, v);
        if (rotated) {
          angles.rotate(x, y);
          other_angles.rotate(u, v);
        }
#pragma unroll
        for (int j = 0; j < kPart; ++j) {
          x[j] = __fadd_rn(x[j], u[j]);
          y[j] = __fadd_rn(y[j], v[j]);
        }
        A::set(low[i], part, x);
        A::set(high[i], part, y);
      }
    }
  }
};

// The source row of an output row (null if there is none), and the position it is rotated to.
template <class T>
struct Row {
  const T* data = nullptr;
  int64_t position = 0;

  __device__ __forceinline__ Row(const Job& job, const Source& source, int64_t row, int64_t at) {
    if (at < 0 || at >= source.count) return;
    data = static_cast<const T*>(source.data) + at * source.row_stride;
    if (job.half > 0) position = __ldg(source.position + (source.position_by_source ? at : row));
  }

  // First element of its row in the tables. The position is first used here, so that the loads before need not wait for
  // it.
  __device__ __forceinline__ int64_t table(const Jobs& p, const Job& job) const {
    return (position < 0 ? 0 : position >= p.num_positions ? p.num_positions - 1 : position) * job.half;
  }
};

// threadIdx.x: which pair of vectors of a head; threadIdx.y: which row and which of its heads.
template <class T, bool kVector, bool kSum>
__global__ void __launch_bounds__(kThreads, kSum ? kSumBlocks : kBlocks) rotate_rows(const __grid_constant__ Jobs p) {
  using Vectors = HeadVectors<T, kVector>;
  constexpr int kWidth = Access<T, kVector>::kWidth;
  uint32_t block = blockIdx.x;
  int number = 0;
  if (block >= p.jobs[0].blocks) {
    block -= p.jobs[0].blocks;
    const uint32_t pairs = p.jobs[2].blocks + p.jobs[3].blocks, group = block / (p.period + 1);
    if (group >= pairs) {
      number = 1;
      block -= pairs;
    } else if (block - group * (p.period + 1) < p.period) {
      number = 1;
      block -= group;
    } else {
      number = 2 + (group & 1);
      block = group / 2;
    }
  }
  const Job& job = p.jobs[number];
  int first_slice = 0, first_item = 0;
  if (job.parts > 1) {
    const uint32_t whole = block / job.parts, part = block - whole * job.parts;
    first_item = part / job.slice_parts * blockDim.x;
    first_slice = part % job.slice_parts * blockDim.y;
    block = whole;
  }
  const int row_in_tile = threadIdx.y / job.slices, slice = first_slice + threadIdx.y - row_in_tile * job.slices;
  const int64_t row = static_cast<int64_t>(block) * job.tile_rows + row_in_tile;
  const int half = job.half / kWidth, items = (p.size / kWidth + 1) / 2, item = first_item + threadIdx.x;
  if (row_in_tile >= job.tile_rows || row >= job.rows || slice >= job.slices || item >= items) return;

  const Source &source = job.sources[0], &other = job.sources[1];
  // requested before the data of the first source, so that it does not wait for them
  int64_t second_at = -1;
  if (kSum && other.data != nullptr) second_at = __ldg(other.index + row);
  const Row<T> first(job, source, row, source.index == nullptr ? row : __ldg(source.index + row));
  const bool rotated = item < half;
  // columns that are not rotated are cut into two halves of vectors; the second may be one shorter
  const int low_at = (rotated ? item : half + item) * kWidth;
  Places places;
  places.heads = (job.heads - slice + job.slices - 1) / job.slices;
  places.gap = (rotated ? half : items - half) * kWidth;
  places.has_high = low_at + places.gap < p.size;
  Vectors vectors(first.data + slice * source.head_stride + low_at, job.slices * source.head_stride, places,
                  first.data != nullptr);
  bool done = false;
  if constexpr (kSum) {
    const Row<T> second(job, other, row, second_at);
    if (second.data != nullptr) {
      const Vectors addend(second.data + slice * other.head_stride + low_at, job.slices * other.head_stride, places,
                           true);
      vectors.rotate_and_add(p, rotated, first.table(p, job) + low_at, addend, second.table(p, job) + low_at);
      done = true;
    }
  }
  if (!done && rotated && first.data != nullptr) vectors.rotate(p, first.table(p, job) + low_at);
  T* const to = static_cast<T*>(job.out) + (row * job.heads + slice) * p.size + low_at;
  vectors.store(to, static_cast<int64_t>(job.slices) * p.size, places);
}

// The last slot that keeps a token; the map holds -1 before.
__global__ void __launch_bounds__(kThreads)
    invert_keep_index(const int64_t* keep_index, int64_t num_slots, int64_t num_tokens, int64_t* slot_of_token) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (slot >= num_slots) return;
  const int64_t token = keep_index[slot];
  if (token < 0 || token >= num_tokens) return;
  atomicMax(reinterpret_cast<long long*>(slot_of_token + token), static_cast<long long>(slot));
}

constexpr int64_t kMaxBlocks = 0x7fffffff;

struct Plan {
  Jobs jobs{};
  int64_t element;
  bool vector;
  int32_t items;
  dim3 block;

  Plan(const ChunkCompressionIndices& p, FloatType type, float sign) : element(type == FloatType::kFloat32 ? 4 : 2) {
    jobs.cos = p.cos;
    jobs.sin = p.sin;
    jobs.num_positions = p.num_positions;
    jobs.size = p.head_size;
    jobs.sign = sign;
    const int64_t width = 16 / element;
    vector = p.head_size % width == 0 && p.half % width == 0 && aligned(p.cos) && aligned(p.sin);
  }

  static bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

  // All sources are known now: the shape of a block follows from the access width.
  void choose_block() {
    items = static_cast<int32_t>((jobs.size / (vector ? 16 / element : 1) + 1) / 2);
    block.x = static_cast<unsigned>(std::min(items, kThreads));
    block.y = kThreads / block.x;
  }

  Source source(const void* data, const int64_t (&stride)[2], int64_t count, int32_t heads, const int64_t* position) {
    // a stride along which no step is taken does not matter
    const auto fits = [this](int64_t steps, int64_t length) { return steps <= 1 || length * element % 16 == 0; };
    vector = vector && aligned(data) && fits(count, stride[0]) && fits(heads, stride[1]);
    return {data, nullptr, position, count, stride[0], stride[1], false};
  }
};

// False if the job needs more blocks than a grid may have.
bool add_job(Plan& plan, int number, const Source& first, const Source& second, void* out, int64_t rows, int32_t heads,
             int32_t half) {
  Job& job = plan.jobs.jobs[number];
  job.sources[0] = first;
  job.sources[1] = second;
  job.out = out;
  job.rows = rows;
  job.heads = heads;
  job.half = half;
  job.slices = (heads + kHeads - 1) / kHeads;
  if (job.slices == 0 || plan.jobs.size == 0) return true;
  const int32_t x = static_cast<int32_t>(plan.block.x), y = static_cast<int32_t>(plan.block.y);
  job.tile_rows = std::max(y / job.slices, 1);
  job.slice_parts = (job.slices + y - 1) / y;
  job.parts = job.slice_parts * ((plan.items + x - 1) / x);
  const int64_t blocks = (rows + job.tile_rows - 1) / job.tile_rows * job.parts;
  job.blocks = static_cast<uint32_t>(blocks);
  return blocks <= kMaxBlocks;
}

template <bool kSum>
cudaError_t launch(Plan& plan, FloatType type, cudaStream_t stream) {
  Jobs& jobs = plan.jobs;
  const int64_t pairs = static_cast<int64_t>(jobs.jobs[2].blocks) + jobs.jobs[3].blocks;
  const int64_t blocks = jobs.jobs[0].blocks + static_cast<int64_t>(jobs.jobs[1].blocks) + pairs;
  if (blocks == 0) return cudaSuccess;
  if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  jobs.period = pairs > 0 ? static_cast<uint32_t>(jobs.jobs[1].blocks / pairs) : 0;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = plan.block;
  config.stream = stream;
  const auto start = [&](auto element) {
    using T = decltype(element);
    return plan.vector ? cudaLaunchKernelEx(&config, rotate_rows<T, true, kSum>, jobs)
                       : cudaLaunchKernelEx(&config, rotate_rows<T, false, kSum>, jobs);
  };
  return type == FloatType::kFloat32    ? start(float{})
         : type == FloatType::kBFloat16 ? start(__nv_bfloat16{})
                                        : start(__half{});
}

}  // namespace

cudaError_t launch_chunk_compression(const ChunkCompressionParams& params, cudaStream_t stream) {
  const ChunkCompressionIndices& p = params.indices;
  Plan plan(p, params.type, 1.0f);
  Source q{}, k = plan.source(params.k, params.k_stride, p.num_tokens, p.kv_heads, p.positions);
  Source v = plan.source(params.v, params.v_stride, p.num_tokens, p.kv_heads, nullptr);
  const bool has_q = params.q != nullptr && p.q_positions != nullptr;
  if (has_q) q = plan.source(params.q, params.q_stride, p.num_queries, p.q_heads, p.q_positions);
  plan.choose_block();

  Source kept_k = k, kept_v = v;
  kept_k.index = kept_v.index = p.keep_index;
  kept_k.position = p.keep_position;
  bool fits = !has_q || add_job(plan, 0, q, {}, params.q_rotated, p.num_queries, p.q_heads, p.half);
  fits =
      fits && (p.positions == nullptr || add_job(plan, 1, k, {}, params.k_rotated, p.num_tokens, p.kv_heads, p.half));
  fits = fits && add_job(plan, 2, kept_k, {}, params.memory_k, p.num_slots, p.kv_heads, p.half);
  fits = fits && add_job(plan, 3, kept_v, {}, params.memory_v, p.num_slots, p.kv_heads, 0);
  return fits ? launch<false>(plan, params.type, stream) : cudaErrorInvalidConfiguration;
}

cudaError_t launch_chunk_compression_backward(const ChunkCompressionBackwardParams& params, cudaStream_t stream) {
  const ChunkCompressionIndices& p = params.indices;
  Plan plan(p, params.type, -1.0f);
  Source q{}, k{};
  Source memory_k = plan.source(params.grad_memory_k, params.memory_k_stride, p.num_slots, p.kv_heads, p.keep_position);
  Source memory_v = plan.source(params.grad_memory_v, params.memory_v_stride, p.num_slots, p.kv_heads, nullptr);
  const bool has_q = params.grad_q_rotated != nullptr && p.q_positions != nullptr;
  const bool has_k = params.grad_k_rotated != nullptr && p.positions != nullptr;
  if (has_q) q = plan.source(params.grad_q_rotated, params.q_stride, p.num_queries, p.q_heads, p.q_positions);
  if (has_k) k = plan.source(params.grad_k_rotated, params.k_stride, p.num_tokens, p.kv_heads, p.positions);
  plan.choose_block();

  memory_k.index = memory_v.index = params.slot_of_token;
  memory_k.position_by_source = true;
  bool fits = !has_q || add_job(plan, 0, q, {}, params.grad_q, p.num_queries, p.q_heads, p.half);
  fits = fits && add_job(plan, 2, has_k ? k : memory_k, has_k ? memory_k : Source{}, params.grad_k, p.num_tokens,
                         p.kv_heads, p.half);
  fits = fits && add_job(plan, 3, memory_v, {}, params.grad_v, p.num_tokens, p.kv_heads, 0);
  const int64_t blocks = (p.num_slots + kThreads - 1) / kThreads;
  if (!fits || blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;

  if (p.num_tokens > 0) {
    const cudaError_t status =
        cudaMemsetAsync(params.slot_of_token, 0xff, p.num_tokens * sizeof(*params.slot_of_token), stream);
    if (status != cudaSuccess) return status;
    if (blocks > 0) {
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(static_cast<unsigned>(blocks));
      config.blockDim = dim3(kThreads);
      config.stream = stream;
      const cudaError_t inverted =
          cudaLaunchKernelEx(&config, invert_keep_index, p.keep_index, p.num_slots, p.num_tokens, params.slot_of_token);
      if (inverted != cudaSuccess) return inverted;
    }
  }
  return launch<true>(plan, params.type, stream);
}

}  // namespace sharedllm

// Chunk compression on CUDA, forward and backward: checks, allocation and launch. Index values are not read here: the
// host never waits.
#include "kernels/chunk_compression.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "ops/common/cuda_checks.h"

namespace sharedllm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Heads and elements of a head, as the kernel counts them.
void check_sizes(const char* name, const Tensor& tensor) {
  check(tensor.size(1) <= kChunkCompressionMaxSize && tensor.size(2) <= kChunkCompressionMaxSize, name,
        ": expected at most ", kChunkCompressionMaxSize, " heads and elements of a head, got shape ",
        shape_text(tensor.sizes()));
}

// Address and strides of rows of heads; a tensor whose elements are not contiguous is replaced by its contiguous copy.
const void* rows_of(Tensor& tensor, int64_t (&stride)[2]) {
  tensor = with_dense_rows(tensor);
  stride[0] = tensor.stride(0);
  stride[1] = tensor.stride(1);
  return tensor.const_data_ptr();
}

// Owns the contiguous copies that ChunkCompressionIndices points into.
struct Indices {
  Tensor cos, sin, keep_index, keep_position;
  std::optional<Tensor> q_positions, positions;

  void check_all(const ChunkCompressionIndices& p, int32_t device) {
    check_cuda_tensor("cos", cos, {-1, -1}, ScalarType::Float, device);
    const int64_t rows = cos.size(0), half = cos.size(1);
    check_cuda_tensor("sin", sin, {rows, half}, ScalarType::Float, device);
    check_rotary_columns(half, p.head_size);
    const bool rotates = p.num_queries > 0 || p.num_tokens > 0 || p.num_slots > 0;
    check(rows > 0 || half == 0 || !rotates, "cos: expected at least 1 row, got 0");
    if (q_positions) check_cuda_tensor("q_positions", *q_positions, {p.num_queries}, ScalarType::Long, device);
    if (positions) check_cuda_tensor("positions", *positions, {p.num_tokens}, ScalarType::Long, device);
    check_cuda_tensor("keep_index", keep_index, {p.num_slots}, ScalarType::Long, device);
    check_cuda_tensor("keep_position", keep_position, {p.num_slots}, ScalarType::Long, device);
  }

  // Under the device guard, as copies are made.
  void fill(ChunkCompressionIndices& p) {
    for (Tensor* tensor : {&cos, &sin, &keep_index, &keep_position}) *tensor = dense(*tensor);
    if (q_positions) q_positions = dense(*q_positions);
    if (positions) positions = dense(*positions);
    p.cos = cos.const_data_ptr<float>();
    p.sin = sin.const_data_ptr<float>();
    p.num_positions = cos.size(0);
    p.half = static_cast<int32_t>(cos.size(1));
    p.q_positions = q_positions ? q_positions->const_data_ptr<int64_t>() : nullptr;
    p.positions = positions ? positions->const_data_ptr<int64_t>() : nullptr;
    p.keep_index = keep_index.const_data_ptr<int64_t>();
    p.keep_position = keep_position.const_data_ptr<int64_t>();
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(std::optional<Tensor> q, Tensor k, Tensor v, Tensor cos, Tensor sin,
                                                   std::optional<Tensor> q_positions, std::optional<Tensor> positions,
                                                   Tensor keep_index, Tensor keep_position) {
  check(k.is_cuda(), "k: expected a tensor on cuda, got one on another kind of device");
  const int32_t device = k.get_device_index();
  ChunkCompressionParams p{};
  p.type = float_type("k", k);
  check_shape("k", k, {-1, -1, -1});
  check_sizes("k", k);
  const ScalarType dtype = k.scalar_type();
  ChunkCompressionIndices& at = p.indices;
  at.num_tokens = k.size(0);
  at.kv_heads = static_cast<int32_t>(k.size(1));
  at.head_size = static_cast<int32_t>(k.size(2));
  check_cuda_tensor("v", v, {k.size(0), k.size(1), k.size(2)}, dtype, device);
  check(q.has_value() == q_positions.has_value(), "q_positions: expected a tensor exactly when q is given, got ",
        q_positions ? "one without q" : "none");
  if (q) {
    check_cuda_tensor("q", *q, {-1, -1, k.size(2)}, dtype, device);
    check_sizes("q", *q);
    at.num_queries = q->size(0);
    at.q_heads = static_cast<int32_t>(q->size(1));
  }
  check_shape("keep_index", keep_index, {-1});
  at.num_slots = keep_index.size(0);
  Indices indices{cos, sin, keep_index, keep_position, q_positions, positions};
  indices.check_all(at, device);

  const torch::stable::accelerator::DeviceGuard guard(device);
  indices.fill(at);
  Tensor q_rotated = allocate(k, {0}), k_rotated = allocate(k, {0});
  if (q) q_rotated = allocate(k, {at.num_queries, at.q_heads, at.head_size});
  if (positions) k_rotated = allocate(k, {at.num_tokens, at.kv_heads, at.head_size});
  Tensor memory_k = allocate(k, {at.num_slots, at.kv_heads, at.head_size});
  Tensor memory_v = allocate(k, {at.num_slots, at.kv_heads, at.head_size});
  if (q) p.q = rows_of(*q, p.q_stride);
  p.k = rows_of(k, p.k_stride);
  p.v = rows_of(v, p.v_stride);
  p.q_rotated = q_rotated.mutable_data_ptr();
  p.k_rotated = k_rotated.mutable_data_ptr();
  p.memory_k = memory_k.mutable_data_ptr();
  p.memory_v = memory_v.mutable_data_ptr();
  check_launch("chunk_compression", launch_chunk_compression(p, current_stream(device)));
  return {q_rotated, k_rotated, memory_k, memory_v};
}

std::tuple<Tensor, Tensor, Tensor> backward(std::optional<Tensor> grad_q_rotated, std::optional<Tensor> grad_k_rotated,
                                            Tensor grad_memory_k, Tensor grad_memory_v, Tensor cos, Tensor sin,
                                            std::optional<Tensor> q_positions, std::optional<Tensor> positions,
                                            Tensor keep_index, Tensor keep_position, int64_t num_tokens) {
  check(grad_memory_k.is_cuda(), "grad_memory_k: expected a tensor on cuda, got one on another kind of device");
  const int32_t device = grad_memory_k.get_device_index();
  ChunkCompressionBackwardParams p{};
  p.type = float_type("grad_memory_k", grad_memory_k);
  check_shape("grad_memory_k", grad_memory_k, {-1, -1, -1});
  check_sizes("grad_memory_k", grad_memory_k);
  check(num_tokens >= 0, "num_tokens: expected at least 0, got ", num_tokens);
  const ScalarType dtype = grad_memory_k.scalar_type();
  const int64_t heads = grad_memory_k.size(1), size = grad_memory_k.size(2);
  ChunkCompressionIndices& at = p.indices;
  at.num_tokens = num_tokens;
  at.num_slots = grad_memory_k.size(0);
  at.kv_heads = static_cast<int32_t>(heads);
  at.head_size = static_cast<int32_t>(size);
  check_cuda_tensor("grad_memory_v", grad_memory_v, {at.num_slots, heads, size}, dtype, device);
  // a gradient that did not arrive makes its positions useless, as in the reference
  if (!grad_q_rotated || !q_positions) grad_q_rotated = q_positions = std::nullopt;
  if (!grad_k_rotated || !positions) grad_k_rotated = positions = std::nullopt;
  if (grad_q_rotated) {
    check_cuda_tensor("grad_q_rotated", *grad_q_rotated, {-1, -1, size}, dtype, device);
    check_sizes("grad_q_rotated", *grad_q_rotated);
    at.num_queries = grad_q_rotated->size(0);
    at.q_heads = static_cast<int32_t>(grad_q_rotated->size(1));
  }
  if (grad_k_rotated) {
    check_cuda_tensor("grad_k_rotated", *grad_k_rotated, {num_tokens, heads, size}, dtype, device);
  }
  Indices indices{cos, sin, keep_index, keep_position, q_positions, positions};
  indices.check_all(at, device);

  const torch::stable::accelerator::DeviceGuard guard(device);
  indices.fill(at);
  Tensor grad_q = allocate(grad_memory_k, {0});
  if (grad_q_rotated) grad_q = allocate(grad_memory_k, {at.num_queries, at.q_heads, size});
  Tensor grad_k = allocate(grad_memory_k, {num_tokens, heads, size});
  Tensor grad_v = allocate(grad_memory_k, {num_tokens, heads, size});
  if (grad_q_rotated) p.grad_q_rotated = rows_of(*grad_q_rotated, p.q_stride);
  if (grad_k_rotated) p.grad_k_rotated = rows_of(*grad_k_rotated, p.k_stride);
  p.grad_memory_k = rows_of(grad_memory_k, p.memory_k_stride);
  p.grad_memory_v = rows_of(grad_memory_v, p.memory_v_stride);
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr();
  // freed when this returns: torch hands it only to work queued later on the same stream
  const Tensor slot_of_token = allocate(grad_memory_k, {num_tokens}, ScalarType::Long);
  p.slot_of_token = slot_of_token.mutable_data_ptr<int64_t>();
  check_launch("chunk_compression_backward", launch_chunk_compression_backward(p, current_stream(device)));
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sharedllm, CUDA, m) {
  m.impl("chunk_compression", TORCH_BOX(&forward));
  m.impl("chunk_compression_backward", TORCH_BOX(&backward));
}

}  // namespace sharedllm

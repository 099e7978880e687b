// Node vectors' attention on CUDA: checks, allocation and launch. Spans are not read here: the host never waits.
#include "kernels/node_vectors.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "ops/common/cuda_checks.h"

namespace sharedllm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whole 16-byte units: copying rows that are not aligned costs less than the kernel without tensor cores.
Tensor rows(const Tensor& x) {
  const bool whole = x.size(2) * static_cast<int64_t>(x.element_size()) % 16 == 0;
  return whole && x.numel() > 0 ? with_aligned_rows(x) : with_dense_rows(x);
}

// q: [leaves, Hq, D]. The tensors must outlive the launch, so those that had to be copied are replaced by their copies.
NodeVectorsParams params_of(Tensor* q, Tensor* k, Tensor* v, Tensor* spans, Tensor* cos, Tensor* sin, double scale) {
  for (Tensor* x : {q, k, v}) *x = rows(*x);
  for (Tensor* x : {spans, cos, sin}) *x = sharedllm::contiguous(*x);
  NodeVectorsParams p{};
  p.type = float_type("q", *q);
  p.q = q->const_data_ptr();
  p.k = k->const_data_ptr();
  p.v = v->const_data_ptr();
  p.spans = spans->const_data_ptr<int64_t>();
  p.cos = cos->const_data_ptr<float>();
  p.sin = sin->const_data_ptr<float>();
  for (int i = 0; i < 2; ++i) {
    p.q_stride[i] = q->stride(i);
    p.k_stride[i] = k->stride(i);
    p.v_stride[i] = v->stride(i);
  }
  p.num_roots = spans->size(0);
  p.num_tokens = k->size(0);
  p.num_positions = cos->size(0);
  p.q_heads = narrow_size("q", q->size(1));
  p.kv_heads = narrow_size("k", k->size(1));
  p.head_size = static_cast<int32_t>(q->size(2));
  p.rotary_half = static_cast<int32_t>(cos->size(1));
  p.scale = static_cast<float>(scale);
  return p;
}

void run(const char* name, Tensor q, Tensor k, Tensor v, Tensor spans, Tensor cos, Tensor sin, int64_t first_level,
         int64_t last_level, double scale, Tensor* out) {
  // tables without rows are only valid for empty nodes, and have no row for the kernels to read
  if (cos.size(0) == 0) {
    torch::stable::zero_(*out);
    return;
  }
  const int32_t device = q.get_device_index();
  NodeVectorsParams p = params_of(&q, &k, &v, &spans, &cos, &sin, scale);
  p.out = out->mutable_data_ptr();
  p.first_level = static_cast<int32_t>(first_level);
  p.last_level = static_cast<int32_t>(last_level);
  check_launch(name, plan_node_vectors(&p));
  // freed when this returns: torch hands it only to work queued later on the same stream
  const Tensor workspace = allocate(k, {p.workspace_size}, ScalarType::Byte);
  p.workspace = workspace.mutable_data_ptr();
  check_launch(name, launch_node_vectors(p, current_stream(device)));
}

// q's last two sizes are Hq and D.
void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& spans, const Tensor& cos,
                  const Tensor& sin, double scale) {
  check(q.is_cuda(), "q: expected a tensor on cuda, got one on another kind of device");
  const int32_t device = q.get_device_index();
  const int64_t heads = q.size(q.dim() - 2), size = q.size(q.dim() - 1);
  check_cuda_tensor("k", k, {-1, -1, size}, q.scalar_type(), device);
  check_cuda_tensor("v", v, {k.size(0), k.size(1), size}, q.scalar_type(), device);
  check(k.size(1) > 0 && heads % k.size(1) == 0, "q: expected a number of heads divisible by k's ", k.size(1), ", got ",
        heads);
  check(size <= kNodeVectorsMaxSize, "q: expected heads of at most ", kNodeVectorsMaxSize,
        " elements (limit of the CUDA kernel), got ", size);
  check_cuda_tensor("spans", spans, {q.size(0), 2}, ScalarType::Long, device);
  check_cuda_tensor("cos", cos, {-1, -1}, ScalarType::Float, device);
  check_cuda_tensor("sin", sin, {cos.size(0), cos.size(1)}, ScalarType::Float, device);
  check_rotary_columns(cos.size(1), size);
  check_scale(scale);
}

Tensor node_vectors(Tensor q, Tensor k, Tensor v, Tensor spans, Tensor cos, Tensor sin, double scale) {
  check_shape("q", q, {-1, -1, -1});
  check_inputs(q, k, v, spans, cos, sin, scale);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor out = allocate(q, {q.size(0), q.size(1), q.size(2)});
  if (out.numel() > 0) run("node_vectors", q, k, v, spans, cos, sin, 0, 0, scale, &out);
  return out;
}

Tensor tree_node_vectors(Tensor q, Tensor k, Tensor v, Tensor spans, Tensor cos, Tensor sin, int64_t levels,
                         double scale) {
  check(levels >= 1 && levels <= kNodeVectorsMaxLevel, "levels: expected 1 to ", kNodeVectorsMaxLevel, ", got ",
        levels);
  check_shape("q", q, {-1, int64_t{1} << levels, -1, -1});
  check_inputs(q, k, v, spans, cos, sin, scale);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const int64_t n = q.size(0), leaves = q.size(1), heads = q.size(2), size = q.size(3);
  Tensor out = allocate(q, {n, 2 * leaves - 2, heads, size});
  if (out.numel() > 0) {
    run("tree_node_vectors", torch::stable::reshape(q, {n * leaves, heads, size}), k, v, spans, cos, sin, 1, levels,
        scale, &out);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> node_vectors_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor spans,
                                                         Tensor cos, Tensor sin, double scale) {
  check_shape("q", q, {-1, -1, -1});
  check_inputs(q, k, v, spans, cos, sin, scale);
  const int32_t device = q.get_device_index();
  check_cuda_tensor("grad_out", grad_out, {q.size(0), q.size(1), q.size(2)}, q.scalar_type(), device);
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor grad_q = allocate(q, {q.size(0), q.size(1), q.size(2)});
  Tensor grad_k = allocate(k, {k.size(0), k.size(1), k.size(2)});
  Tensor grad_v = allocate(v, {v.size(0), v.size(1), v.size(2)});
  if (q.size(1) == 0 || q.size(2) == 0 || cos.size(0) == 0) {
    return {torch::stable::zero_(grad_q), torch::stable::zero_(grad_k), torch::stable::zero_(grad_v)};
  }
  grad_out = sharedllm::contiguous(grad_out);
  NodeVectorsBackwardParams b{};
  b.forward = params_of(&q, &k, &v, &spans, &cos, &sin, scale);
  b.grad_out = grad_out.const_data_ptr();
  b.grad_q = grad_q.mutable_data_ptr();
  b.grad_k = grad_k.mutable_data_ptr();
  b.grad_v = grad_v.mutable_data_ptr();
  const Tensor query = allocate(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  const Tensor stats = allocate(q, {q.size(0), q.size(1), 2}, ScalarType::Float);
  b.query = static_cast<float*>(query.mutable_data_ptr());
  b.stats = static_cast<float2*>(stats.mutable_data_ptr());
  check_launch("node_vectors_backward", launch_node_vectors_backward(b, current_stream(device)));
  return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sharedllm, CUDA, m) {
  m.impl("node_vectors", TORCH_BOX(&node_vectors));
  m.impl("node_vectors_backward", TORCH_BOX(&node_vectors_backward));
  m.impl("tree_node_vectors", TORCH_BOX(&tree_node_vectors));
}

}  // namespace sharedllm

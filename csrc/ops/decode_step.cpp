// Operators of one decoding step on CUDA: checks, allocation and launch. No value is read from the device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "kernels/decode_append.h"
#include "kernels/decode_linear.h"
#include "ops/common/cuda_checks.h"

namespace sharedllm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Largest part of a tensor that can be prefetched: whole 16-byte units.
void describe_prefetch(const std::optional<Tensor>& tensor, int64_t bytes, const void** from, int64_t* size) {
  *from = nullptr;
  *size = 0;
  if (!tensor || !tensor->is_cuda() || !tensor->is_contiguous()) return;
  const int64_t there = tensor->numel() * static_cast<int64_t>(tensor->element_size());
  const void* const data = tensor->const_data_ptr();
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return;
  *from = data;
  *size = std::max<int64_t>(std::min(bytes, there), 0) / 16 * 16;
}

Tensor decode_linear(Tensor x, Tensor weight, std::optional<Tensor> weight2, std::optional<Tensor> weight3,
                     std::optional<Tensor> bias, std::optional<Tensor> bias2, std::optional<Tensor> bias3,
                     std::optional<Tensor> norm_weight, double eps, std::optional<Tensor> residual, bool gated,
                     bool overlap, std::optional<Tensor> prefetch, int64_t prefetch_bytes) {
  check(x.is_cuda(), "x: expected a tensor on cuda, got one on another kind of device");
  const int32_t device = x.get_device_index();
  const ScalarType dtype = x.scalar_type();
  DecodeLinearParams p{};
  p.type = float_type("x", x);
  check_shape("x", x, {-1, -1});
  p.rows = x.size(0);
  p.inner = x.size(1);
  check_eps(eps);
  const torch::stable::accelerator::DeviceGuard guard(device);
  x = with_dense_rows(x);

  std::optional<Tensor> weights[kDecodeLinearMatrices] = {weight, weight2, weight3};
  std::optional<Tensor> biases[kDecodeLinearMatrices] = {bias, bias2, bias3};
  const char* const names[kDecodeLinearMatrices] = {"weight", "weight2", "weight3"};
  const char* const bias_names[kDecodeLinearMatrices] = {"bias", "bias2", "bias3"};
  bool copied = false;
  for (int i = 0; i < kDecodeLinearMatrices; ++i) {
    if (!weights[i]) {
      check(!biases[i], bias_names[i], ": expected none without ", names[i], ", got one");
      continue;
    }
    check_cuda_tensor(names[i], *weights[i], {-1, p.inner}, dtype, device);
    const void* const given = weights[i]->const_data_ptr();
    weights[i] = with_dense_rows(*weights[i]);
    p.weight[i] = weights[i]->const_data_ptr();
    copied |= p.weight[i] != given;
    p.weight_stride[i] = weights[i]->size(0) > 1 ? weights[i]->stride(0) : p.inner;
    p.outputs[i] = weights[i]->size(0);
    check(p.outputs[i] <= INT64_MAX - p.num_outputs, names[i], ": expected at most ", INT64_MAX - p.num_outputs,
          " rows, got ", p.outputs[i]);
    p.num_outputs += p.outputs[i];
    if (biases[i]) {
      check_cuda_tensor(bias_names[i], *biases[i], {p.outputs[i]}, dtype, device);
      biases[i] = dense(*biases[i]);
      p.bias[i] = biases[i]->const_data_ptr();
    }
  }
  check(!weights[2] || weights[1], "weight3: expected none without weight2, got one");
  if (gated) {
    check(weights[1] && !weights[2], "weight2: expected exactly two matrices with gated, got ", 1 + !!weights[2] * 2);
    check(p.outputs[0] == p.outputs[1], "weight2: expected ", p.outputs[0], " rows as weight, got ", p.outputs[1]);
    check(!residual, "residual: expected none with gated, got one");
    p.num_outputs = p.outputs[0];
  }
  if (norm_weight) {
    check_cuda_tensor("norm_weight", *norm_weight, {p.inner}, dtype, device);
    const void* const given = norm_weight->const_data_ptr();
    norm_weight = dense(*norm_weight);
    p.norm_weight = norm_weight->const_data_ptr();
    copied |= p.norm_weight != given;
  }
  if (residual) {
    check_cuda_tensor("residual", *residual, {p.rows, p.num_outputs}, dtype, device);
    residual = with_dense_rows(*residual);
    p.residual = residual->const_data_ptr();
    p.residual_stride = p.rows > 1 ? residual->stride(0) : p.num_outputs;
  }
  Tensor out = allocate(x, {p.rows, p.num_outputs});
  p.x = x.const_data_ptr();
  p.x_stride = p.rows > 1 ? x.stride(0) : p.inner;
  p.out = out.mutable_data_ptr();
  p.eps = static_cast<float>(eps);
  p.gated = gated;
  // what the kernel reads before it waits must not be a copy made by the previous kernel
  p.overlap = overlap && !copied;
  describe_prefetch(prefetch, prefetch_bytes, &p.prefetch, &p.prefetch_bytes);
  const cudaError_t status = launch_decode_linear(p, current_stream(device));
  check(status != cudaErrorInvalidValue, "x: expected rows that fit into shared memory, got ", p.inner, " elements");
  check_launch("decode_linear", status);
  return out;
}

std::tuple<Tensor, Tensor> decode_append(Tensor qkv, Tensor keys, Tensor values, Tensor length, Tensor first,
                                         Tensor cos, Tensor sin, std::optional<Tensor> q_norm,
                                         std::optional<Tensor> k_norm, double eps, int64_t window, bool overlap,
                                         std::optional<Tensor> prefetch, int64_t prefetch_bytes) {
  check(qkv.is_cuda(), "qkv: expected a tensor on cuda, got one on another kind of device");
  const int32_t device = qkv.get_device_index();
  const ScalarType dtype = qkv.scalar_type();
  DecodeAppendParams p{};
  p.type = float_type("qkv", qkv);
  check_shape("qkv", qkv, {-1, -1});
  p.rows = qkv.size(0);
  check_cuda_tensor("keys", keys, {p.rows, -1, -1, -1}, dtype, device);
  p.capacity = keys.size(1);
  const int64_t kv_heads = keys.size(2), size = keys.size(3);
  check_cuda_tensor("values", values, {p.rows, p.capacity, kv_heads, size}, dtype, device);
  check(size > 0 && qkv.size(1) % size == 0 && qkv.size(1) / size > 2 * kv_heads, "qkv: expected whole heads of ", size,
        ", more than ", 2 * kv_heads, ", got ", qkv.size(1), " columns");
  check_cuda_tensor("length", length, {p.rows}, ScalarType::Long, device);
  check_cuda_tensor("first", first, {p.rows}, ScalarType::Long, device);
  check_cuda_tensor("cos", cos, {-1, -1}, ScalarType::Float, device);
  check_cuda_tensor("sin", sin, {cos.size(0), cos.size(1)}, ScalarType::Float, device);
  check_rotary_columns(cos.size(1), size);
  check_eps(eps);
  check(window >= 0, "window: expected at least 0 tokens, got ", window);
  for (const Tensor* x : {&keys, &values}) {
    check(size == 1 || x->stride(3) == 1, x == &keys ? "keys" : "values",
          ": expected heads whose elements are neighbours in memory, got stride ", x->stride(3));
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  qkv = with_dense_rows(qkv);
  for (Tensor* x : {&length, &first, &cos, &sin}) *x = dense(*x);
  if (q_norm) {
    check_cuda_tensor("q_norm", *q_norm, {size}, dtype, device);
    q_norm = dense(*q_norm);
    p.q_norm = q_norm->const_data_ptr();
  }
  if (k_norm) {
    check_cuda_tensor("k_norm", *k_norm, {size}, dtype, device);
    k_norm = dense(*k_norm);
    p.k_norm = k_norm->const_data_ptr();
  }
  const int64_t q_heads = qkv.size(1) / size - 2 * kv_heads;
  Tensor q = allocate(qkv, {p.rows, q_heads, size});
  Tensor slot_range = allocate(length, {p.rows, 2});
  p.qkv = qkv.const_data_ptr();
  p.qkv_stride = p.rows > 1 ? qkv.stride(0) : qkv.size(1);
  p.length = length.const_data_ptr<int64_t>();
  p.first = first.const_data_ptr<int64_t>();
  p.cos = cos.const_data_ptr<float>();
  p.sin = sin.const_data_ptr<float>();
  p.keys = keys.mutable_data_ptr();
  p.values = values.mutable_data_ptr();
  p.q = q.mutable_data_ptr();
  p.slot_range = slot_range.mutable_data_ptr<int64_t>();
  for (int i = 0; i < 3; ++i) {
    p.key_stride[i] = keys.stride(i);
    p.value_stride[i] = values.stride(i);
  }
  p.num_positions = cos.size(0);
  p.window = window;
  p.q_heads = narrow_size("qkv", q_heads);
  p.kv_heads = narrow_size("keys", kv_heads);
  p.head_size = narrow_size("keys", size);
  p.rotary_half = static_cast<int32_t>(cos.size(1));
  p.eps = static_cast<float>(eps);
  p.overlap = overlap;
  describe_prefetch(prefetch, prefetch_bytes, &p.prefetch, &p.prefetch_bytes);
  check_launch("decode_append", launch_decode_append(p, current_stream(device)));
  return {q, slot_range};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sharedllm, CUDA, m) {
  m.impl("decode_linear", TORCH_BOX(&decode_linear));
  m.impl("decode_append", TORCH_BOX(&decode_append));
}

}  // namespace sharedllm

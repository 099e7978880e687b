// Head norms, RoPE and the append of a new token to the KV cache, on CUDA: checks, allocation and launch. No value is
// read from the device.
#include "kernels/decode_append.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "ops/common/cuda_checks.h"
#include "ops/common/prefetch.h"

namespace sharedllm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

STABLE_TORCH_LIBRARY_IMPL(sharedllm, CUDA, m) { m.impl("decode_append", TORCH_BOX(&decode_append)); }

}  // namespace sharedllm

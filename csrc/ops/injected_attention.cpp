// Injected attention on CUDA: checks, choice of the path, allocation and launch. Index values are not read here: the
// host never waits.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "kernels/injected_attention/backward.h"
#include "kernels/injected_attention/combine.h"
#include "kernels/injected_attention/decode/decode.h"
#include "kernels/injected_attention/decode/eight_bit.h"
#include "kernels/injected_attention/generic/backward.h"
#include "kernels/injected_attention/generic/forward.h"
#include "kernels/injected_attention/portable/backward.h"
#include "kernels/injected_attention/portable/forward.h"
#include "kernels/memory_quantization.h"
#include "ops/common/cuda_checks.h"
#if defined(SHAREDLLM_SM90A)
#include "kernels/injected_attention/hopper/backward.h"
#include "kernels/injected_attention/hopper/forward.h"
#endif

namespace sharedllm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The order of sharedllm_ext.ops.injected_attention.PATHS.
enum class Path : int { kAuto, kSm90, kPortable, kDecode, kGeneric };
std::atomic<int> forced_path{0};

// A row of at most this many queries on average is decoding: bound by reading the memory, not by arithmetic.
constexpr int64_t kDecodeQueries = 16;

bool is_hopper(int32_t device) {
#if defined(SHAREDLLM_SM90A)
  int major = 0, minor = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
#else
  return device < 0;
#endif
}

// Head size of the tensor-core kernel that takes a head: its own, or the next larger one, whose last columns are zeros.
// 0: the general kernel takes it.
int32_t kernel_columns(FloatType type, int64_t head_size) {
  if (type == FloatType::kFloat32) return 0;
  for (const int32_t columns : {64, 96, 128, 256}) {
    if (head_size <= columns) return columns;
  }
  return 0;
}

// Tensor-core kernels load 16 bytes at a time: heads of another size are copied into longer ones.
constexpr int64_t kUnit = 8;

bool has_whole_units(int64_t head_size) { return head_size > 0 && head_size % kUnit == 0; }

int64_t whole_units(int64_t head_size) { return head_size == 0 ? kUnit : (head_size + kUnit - 1) / kUnit * kUnit; }

// A copy with zeros after the elements of each head.
Tensor padded(const Tensor& x, int64_t head_size) {
  const std::initializer_list<int64_t> widths = {0, head_size - x.size(2)};
  return make_tensor(x.sizes(), x.scalar_type(), [&] { return torch::stable::pad(x, widths); });
}

// A copy of the first elements of each head.
Tensor narrowed(Tensor x, int64_t head_size) {
  return x.size(2) == head_size ? x : sharedllm::contiguous(torch::stable::narrow(x, 2, 0, head_size));
}

// The arguments that both passes share, kept alive.
struct Arguments {
  Tensor q, k, v, cu_q, slot_range, q_position, cos, sin;

  // Keys and values have the queries' element type, or are 8-bit codes.
  InjectedAttentionParams check_and_describe(double scale, bool codes = false) {
    check(q.is_cuda(), "q: expected a tensor on cuda, got one on another kind of device");
    const int32_t device = q.get_device_index();
    InjectedAttentionParams p{};
    p.type = float_type("q", q);
    const ScalarType dtype = codes ? ScalarType::Char : q.scalar_type();
    check_shape("q", q, {-1, -1, -1});
    check_cuda_tensor("k", k, {-1, -1, q.size(2)}, dtype, device);
    check_cuda_tensor("v", v, {k.size(0), k.size(1), k.size(2)}, dtype, device);
    check(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "q: expected a number of heads divisible by k's ", k.size(1),
          ", got ", q.size(1));
    check_cuda_tensor("q_position", q_position, {-1}, ScalarType::Long, device);
    p.num_rows = q_position.size(0);
    check_cuda_tensor("cu_q", cu_q, {p.num_rows + 1}, ScalarType::Long, device);
    check_cuda_tensor("slot_range", slot_range, {p.num_rows, 2}, ScalarType::Long, device);
    check_cuda_tensor("cos", cos, {-1, -1}, ScalarType::Float, device);
    check_cuda_tensor("sin", sin, {cos.size(0), cos.size(1)}, ScalarType::Float, device);
    check_rotary_columns(cos.size(1), q.size(2));
    check_scale(scale);
    check(cos.size(0) > 0 || cos.size(1) == 0 || p.num_rows == 0, "cos: expected at least 1 row, got 0");
    check(q.size(2) <= kGenericMaxHeadSize, "q: expected a head size of at most ", kGenericMaxHeadSize,
          " (limit of the CUDA kernels), got ", q.size(2));

    p.num_queries = q.size(0);
    p.num_slots = k.size(0);
    p.num_positions = cos.size(0);
    p.q_heads = narrow_size("q", q.size(1));
    p.kv_heads = narrow_size("k", k.size(1));
    p.head_size = static_cast<int32_t>(q.size(2));
    p.columns = kernel_columns(p.type, p.head_size);
    p.rotary_half = static_cast<int32_t>(cos.size(1));
    p.scale = static_cast<float>(scale);
    p.splits = 1;

    // TMA and 16-byte loads need aligned rows; the generic kernels only need dense ones
    const bool aligned = p.columns > 0 && has_whole_units(p.head_size);
    for (Tensor* x : {&q, &k, &v}) *x = aligned ? with_aligned_rows(*x) : with_dense_rows(*x);
    for (Tensor* x : {&cu_q, &slot_range, &q_position, &cos, &sin}) *x = dense(*x);
    p.q = q.const_data_ptr();
    p.k = k.const_data_ptr();
    p.v = v.const_data_ptr();
    p.cu_q = cu_q.const_data_ptr<int64_t>();
    p.slot_range = slot_range.const_data_ptr<int64_t>();
    p.q_position = q_position.const_data_ptr<int64_t>();
    p.cos = cos.const_data_ptr<float>();
    p.sin = sin.const_data_ptr<float>();
    head_strides(q, p.q_stride);
    head_strides(k, p.k_stride);
    head_strides(v, p.v_stride);
    return p;
  }
};

// Partial results, freed with this: torch hands the memory only to work queued later on the same stream.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t rows, InjectedAttentionParams* p)
      : out_(allocate(like, {rows * p->columns}, ScalarType::Float)), lse_(allocate(like, {rows}, ScalarType::Float)) {
    p->partial_out = out_.mutable_data_ptr<float>();
    p->partial_lse = lse_.mutable_data_ptr<float>();
  }

 private:
  Tensor out_, lse_;
};

bool is_forced(Path path) { return static_cast<Path>(forced_path.load()) == path; }

Path choose_path(const InjectedAttentionParams& p, int32_t device, bool backward) {
  if (p.columns == 0) return Path::kGeneric;
  const bool few = !backward && (is_forced(Path::kDecode) || p.num_queries <= kDecodeQueries * p.num_rows);
  if (is_forced(Path::kPortable) || !is_hopper(device)) return few ? Path::kDecode : Path::kPortable;
  return few && !is_forced(Path::kSm90) ? Path::kDecode : Path::kSm90;
}

std::tuple<Tensor, Tensor> injected_attention(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor slot_range,
                                              Tensor q_position, Tensor cos, Tensor sin, double scale) {
  Arguments arguments{q, k, v, cu_q, slot_range, q_position, cos, sin};
  InjectedAttentionParams p = arguments.check_and_describe(scale);
  const int32_t device = arguments.q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Path path = choose_path(p, device, false);
  if (path != Path::kGeneric && !has_whole_units(p.head_size)) {
    const int64_t size = whole_units(p.head_size);
    auto [out, lse] = injected_attention(padded(q, size), padded(k, size), padded(v, size), cu_q, slot_range,
                                         q_position, cos, sin, scale);
    return {narrowed(out, p.head_size), lse};
  }
  Tensor out = allocate(arguments.q, {p.num_queries, p.q_heads, p.head_size});
  Tensor lse = allocate(arguments.q, {p.num_queries, p.q_heads}, ScalarType::Float);
  if (p.num_queries == 0 || p.q_heads == 0) return {out, lse};
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  const cudaStream_t stream = current_stream(device);
  const char* const name = "injected_attention";

  if (path == Path::kGeneric) {
    check_launch(name, launch_injected_attention_generic(p, stream));
    return {out, lse};
  }
#if defined(SHAREDLLM_SM90A)
  if (path == Path::kSm90) {
    InjectedAttentionSm90Params planned{p};
    const cudaError_t status = plan_injected_attention_sm90(&planned);
    if (status != cudaErrorNotSupported) {
      check_launch(name, status);
      const Workspace workspace(arguments.q, planned.partial_rows, &planned);
      Tensor turned;
      if (planned.turned_rows > 0) {
        turned = allocate(arguments.q, {planned.turned_rows * p.head_size});
        planned.turned_keys = turned.mutable_data_ptr();
      }
      check_launch(name, launch_injected_attention_sm90(planned, stream));
      if (planned.splits > 1) check_launch(name, launch_injected_attention_combine(planned, stream));
      return {out, lse};
    }
  }
#endif
  if (path == Path::kDecode) {
    const bool portable = is_forced(Path::kPortable);
    check_launch(name, plan_injected_attention_decode(&p, portable));
    const Workspace workspace(arguments.q, injected_attention_decode_workspace_rows(p), &p);
    check_launch(name, launch_injected_attention_decode(p, stream, portable));
    return {out, lse};
  }
  check_launch(name, plan_injected_attention_portable(&p));
  const Workspace workspace(arguments.q, p.splits > 1 ? p.splits * p.num_queries * p.q_heads : 0, &p);
  check_launch(name, launch_injected_attention_portable(p, stream));
  if (p.splits > 1) check_launch(name, launch_injected_attention_combine(p, stream));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> injected_attention_backward(Tensor grad_out, std::optional<Tensor> grad_lse,
                                                               Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                                                               Tensor cu_q, Tensor slot_range, Tensor q_position,
                                                               Tensor cos, Tensor sin, double scale,
                                                               bool need_grad_kv) {
  Arguments arguments{q, k, v, cu_q, slot_range, q_position, cos, sin};
  InjectedAttentionBackwardParams p{};
  p.forward = arguments.check_and_describe(scale);
  InjectedAttentionParams& f = p.forward;
  const int32_t device = arguments.q.get_device_index();
  const ScalarType dtype = q.scalar_type();
  check_cuda_tensor("grad_out", grad_out, {f.num_queries, f.q_heads, f.head_size}, dtype, device);
  check_cuda_tensor("out", out, {f.num_queries, f.q_heads, f.head_size}, dtype, device);
  check_cuda_tensor("lse", lse, {f.num_queries, f.q_heads}, ScalarType::Float, device);
  if (grad_lse) {
    check_cuda_tensor("grad_lse", *grad_lse, {f.num_queries, f.q_heads}, ScalarType::Float, device);
    grad_lse = dense(*grad_lse);
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  Path path = choose_path(f, device, true);
  // the fused Hopper kernel keeps two gradients of a tile in registers, and the heads of a query together
  const bool fuses = f.columns < 256 && f.q_heads <= 64 * int64_t{f.kv_heads};
  if (path == Path::kSm90 && need_grad_kv && f.num_slots > 0 && !fuses) path = Path::kPortable;
  const auto through_longer_heads = [&](int64_t size) -> std::tuple<Tensor, Tensor, Tensor> {
    auto [long_q, long_k, long_v] = injected_attention_backward(
        padded(grad_out, size), grad_lse, padded(q, size), padded(k, size), padded(v, size), padded(out, size), lse,
        cu_q, slot_range, q_position, cos, sin, scale, need_grad_kv);
    if (!need_grad_kv) return {narrowed(long_q, f.head_size), long_k, long_v};
    return {narrowed(long_q, f.head_size), narrowed(long_k, f.head_size), narrowed(long_v, f.head_size)};
  };
  if (path != Path::kGeneric && !has_whole_units(f.head_size)) return through_longer_heads(whole_units(f.head_size));
  // the portable kernels have no form for a narrower head
  if (path == Path::kPortable && f.head_size < f.columns) return through_longer_heads(f.columns);
  for (Tensor* x : {&grad_out, &out}) *x = with_aligned_rows(dense(*x));
  lse = dense(lse);

  const Tensor& like = arguments.q;
  // Hopper's kernels write the gradients of heads of their own size, the sum of all parts of grad_q excepted.
  const int64_t written = path == Path::kSm90 ? f.columns : f.head_size;
  const bool nothing = f.num_queries == 0 || f.q_heads == 0 || f.num_rows == 0;
  const auto new_grad_kv = [&] {
    if (!need_grad_kv) return allocate(like, {0});
    Tensor grad = allocate(like, {f.num_slots, f.kv_heads, written});
    if (nothing) torch::stable::zero_(grad);
    return grad;
  };
  // without slots there are no gradients of them to write
  const bool slots_wanted = need_grad_kv && f.num_slots > 0;
  Tensor grad_q = allocate(like, {f.num_queries, f.q_heads, slots_wanted ? f.head_size : written});
  Tensor grad_k = new_grad_kv(), grad_v = new_grad_kv();
  const auto result = [&]() -> std::tuple<Tensor, Tensor, Tensor> {
    if (!need_grad_kv) return {narrowed(grad_q, f.head_size), grad_k, grad_v};
    return {narrowed(grad_q, f.head_size), narrowed(grad_k, f.head_size), narrowed(grad_v, f.head_size)};
  };
  if (nothing) return result();
  f.out = out.mutable_data_ptr();
  f.lse = lse.mutable_data_ptr<float>();
  p.grad_out = grad_out.const_data_ptr();
  p.grad_lse = grad_lse ? grad_lse->const_data_ptr<float>() : nullptr;
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = slots_wanted ? grad_k.mutable_data_ptr() : nullptr;
  p.grad_v = slots_wanted ? grad_v.mutable_data_ptr() : nullptr;
  const cudaStream_t stream = current_stream(device);
  const char* const name = "injected_attention_backward";

  if (path == Path::kGeneric) {
    check_launch(name, launch_injected_attention_backward_generic(p, stream));
    return result();
  }
  p.kv_splits = 1;
  Tensor turned_keys;
#if defined(SHAREDLLM_SM90A)
  if (path == Path::kSm90) {
    // scores have to be rounded as the forward pass rounded them
    const bool turned =
        f.rotary_half > 0 && choose_path(f, device, false) == Path::kSm90 && injected_attention_sm90_turns_keys(f);
    p.turns_keys = turned || f.rotary_half == 0;
    if (slots_wanted) {
      check_launch(name, plan_injected_attention_backward_sm90(&p));
    } else if (turned) {
      // the same problem without rotation
      turned_keys = allocate(like, {f.num_slots, f.kv_heads, f.head_size});
      check_launch(name, launch_injected_attention_turn_keys(f, 1.0f, turned_keys.mutable_data_ptr(), stream));
      f.k = turned_keys.const_data_ptr();
      head_strides(turned_keys, f.k_stride);
      f.rotary_half = 0;
    }
  }
#endif
  if (slots_wanted && path != Path::kSm90) check_launch(name, plan_injected_attention_backward_portable(&p));

  // freed when this returns: torch hands it only to work queued later on the same stream
  const int64_t rows = f.num_queries * f.q_heads;
  Tensor q_rotated, per_row, grad_q_float, partial_grad_kv;
  const auto prepare = [&] {
    if (!p.turns_keys) {
      q_rotated = allocate(like, {rows * f.head_size});
      p.q_rotated = q_rotated.mutable_data_ptr();
    }
    per_row = allocate(like, {2 * rows}, ScalarType::Float);
    p.delta = per_row.mutable_data_ptr<float>();
    p.lse_log2 = p.delta + rows;
    if (slots_wanted) {
      grad_q_float = allocate(like, {rows * f.columns}, ScalarType::Float);
      p.grad_q_float = grad_q_float.mutable_data_ptr<float>();
    }
    const int64_t partial = slots_wanted ? injected_attention_backward_partial_elements(p) : 0;
    if (partial > 0) {
      partial_grad_kv = allocate(like, {2 * partial}, ScalarType::Float);
      p.partial_grad_k = partial_grad_kv.mutable_data_ptr<float>();
      p.partial_grad_v = p.partial_grad_k + partial;
    }
    check_launch(name, launch_injected_attention_backward_prepare(p, stream));
  };

  cudaError_t status = cudaErrorNotSupported;
#if defined(SHAREDLLM_SM90A)
  if (path == Path::kSm90) {
    prepare();
    // some rotary sizes are left to the portable kernels
    status = launch_injected_attention_backward_sm90(p, stream);
  }
#endif
  if (status == cudaErrorNotSupported && f.head_size < f.columns) return through_longer_heads(f.columns);
  if (status == cudaErrorNotSupported) {
    // the portable kernel for the queries' gradient alone needs nothing prepared
    if (slots_wanted && (path != Path::kSm90 || p.turns_keys)) {
      p.turns_keys = false;
      p.tail_shares = 0;
      prepare();
    }
    status = launch_injected_attention_backward_portable(p, stream);
    if (slots_wanted && status == cudaSuccess) status = launch_injected_attention_backward_finish(p, stream);
  }
  check_launch(name, status);
  return result();
}

// 8-bit memory: read directly for a few queries, through a copy in the queries' type for many.
std::tuple<Tensor, Tensor> injected_attention_8bit(Tensor q, Tensor k, Tensor v, Tensor k_scale, Tensor v_scale,
                                                   Tensor cu_q, Tensor slot_range, Tensor q_position, Tensor cos,
                                                   Tensor sin, double scale) {
  Arguments arguments{q, k, v, cu_q, slot_range, q_position, cos, sin};
  InjectedAttention8BitParams p{};
  p.attention = arguments.check_and_describe(scale, true);
  InjectedAttentionParams& a = p.attention;
  const int32_t device = arguments.q.get_device_index();
  check_cuda_tensor("k_scale", k_scale, {a.num_slots, a.kv_heads}, ScalarType::Float, device);
  check_cuda_tensor("v_scale", v_scale, {a.num_slots, a.kv_heads}, ScalarType::Float, device);
  check(a.head_size % 8 == 0, "q: expected a head size that is a multiple of 8 (8-bit memory on CUDA), got ",
        a.head_size);
  const torch::stable::accelerator::DeviceGuard guard(device);
  arguments.k = with_aligned_rows(arguments.k);
  arguments.v = with_aligned_rows(arguments.v);
  a.k = arguments.k.const_data_ptr();
  a.v = arguments.v.const_data_ptr();
  head_strides(arguments.k, a.k_stride);
  head_strides(arguments.v, a.v_stride);
  k_scale = dense(k_scale);
  v_scale = dense(v_scale);
  const cudaStream_t stream = current_stream(device);
  const char* const name = "injected_attention_8bit";

  // codes are loaded 16 at a time
  const bool direct = choose_path(a, device, false) == Path::kDecode && a.head_size > 0 && a.head_size % 16 == 0;
  if (a.num_queries > 0 && a.q_heads > 0 && direct) {
    Tensor out = allocate(arguments.q, {a.num_queries, a.q_heads, a.head_size});
    Tensor lse = allocate(arguments.q, {a.num_queries, a.q_heads}, ScalarType::Float);
    a.out = out.mutable_data_ptr();
    a.lse = lse.mutable_data_ptr<float>();
    p.k_scale = k_scale.const_data_ptr<float>();
    p.v_scale = v_scale.const_data_ptr<float>();
    p.k_scale_stride[0] = p.v_scale_stride[0] = a.kv_heads;
    p.k_scale_stride[1] = p.v_scale_stride[1] = 1;
    check_launch(name, plan_injected_attention_decode(&a));
    const Workspace workspace(arguments.q, injected_attention_decode_workspace_rows(a), &a);
    check_launch(name, launch_injected_attention_decode_8bit(p, stream));
    return {out, lse};
  }

  const auto restored = [&](const Tensor& codes, const Tensor& scales, const int64_t (&strides)[2]) {
    Tensor x = allocate(arguments.q, {a.num_slots, a.kv_heads, a.head_size});
    MemoryDequantizationParams d{};
    d.codes = codes.const_data_ptr<int8_t>();
    d.scale = scales.const_data_ptr<float>();
    d.out = x.mutable_data_ptr();
    d.code_stride[0] = strides[0];
    d.code_stride[1] = strides[1];
    d.scale_stride[0] = a.kv_heads;
    d.scale_stride[1] = 1;
    d.num_slots = a.num_slots;
    d.heads = a.kv_heads;
    d.head_size = a.head_size;
    d.type = a.type;
    if (a.num_slots > 0) check_launch(name, launch_dequantize_memory(d, stream));
    return x;
  };
  return injected_attention(q, restored(arguments.k, k_scale, a.k_stride), restored(arguments.v, v_scale, a.v_stride),
                            cu_q, slot_range, q_position, cos, sin, scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sharedllm, CUDA, m) {
  m.impl("injected_attention", TORCH_BOX(&injected_attention));
  m.impl("injected_attention_backward", TORCH_BOX(&injected_attention_backward));
  m.impl("injected_attention_8bit", TORCH_BOX(&injected_attention_8bit));
}

}  // namespace sharedllm

// Forces a path where it can run, for tests and benchmarks; returns the one before. Called by the Python layer.
extern "C" __attribute__((visibility("default"))) int sharedllm_force_injected_attention_path(int path) {
  return sharedllm::forced_path.exchange(path);
}

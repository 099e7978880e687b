// Argument checks of the CPU operators: every failure names the tensor, what was expected and what came.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace sharedllm {

// std::invalid_argument arrives in Python as ValueError; STD_TORCH_CHECK would make it RuntimeError.
template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  throw std::invalid_argument(text.str());
}

// check(ok, "k: expected ", want, ", got ", have): the text is built only on failure.
template <class... Parts>
inline void check(bool ok, const Parts&... parts) {
  if (__builtin_expect(!ok, 0)) fail(parts...);
}

// A shape in a text. It is formatted where it is written, so that a check that holds costs no formatting.
template <class Sizes>
struct ShapeText {
  const Sizes& sizes;
};

template <class Sizes>
inline ShapeText<Sizes> shape_text(const Sizes& sizes) {
  return {sizes};
}

template <class Sizes>
inline std::ostream& operator<<(std::ostream& text, const ShapeText<Sizes>& shape) {
  text << '[';
  const char* separator = "";
  for (int64_t size : shape.sizes) {
    text << separator;
    if (size < 0) {
      text << '*';
    } else {
      text << size;
    }
    separator = ", ";
  }
  return text << ']';
}

inline const char* dtype_text(torch::headeronly::ScalarType dtype) { return torch::headeronly::toString(dtype); }

// What `make` returns, a new tensor. PyTorch's own calls only say "API call failed", mostly because memory ran out.
template <class Sizes, class Make>
inline torch::stable::Tensor make_tensor(const Sizes& shape, torch::headeronly::ScalarType dtype, const Make& make) {
  try {
    return make();
  } catch (const std::exception& error) {
#ifdef CUDART_VERSION
    // a kernel that failed before, or a capture that must not allocate
    const cudaError_t status = cudaPeekAtLastError();
    if (status != cudaSuccess && status != cudaErrorMemoryAllocation) throw;
#endif
    std::ostringstream text;
    text << "out of memory: expected room for a tensor of shape " << shape_text(shape) << " and dtype "
         << dtype_text(dtype) << ", got none (" << error.what() << ")";
    throw std::runtime_error(text.str());
  }
}

// Uninitialised, on like's device.
inline torch::stable::Tensor allocate(const torch::stable::Tensor& like, std::initializer_list<int64_t> shape,
                                      std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  return make_tensor(shape, dtype ? *dtype : like.scalar_type(),
                     [&] { return torch::stable::new_empty(like, shape, dtype); });
}

// Memory that torch borrowed from elsewhere may begin at any byte.
inline bool is_aligned(const torch::stable::Tensor& tensor) {
  const auto size = static_cast<uintptr_t>(tensor.element_size());
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % size == 0;
}

inline torch::stable::Tensor contiguous(const torch::stable::Tensor& tensor) {
  return make_tensor(tensor.sizes(), tensor.scalar_type(), [&] {
    const torch::stable::Tensor dense = torch::stable::contiguous(tensor);
    return is_aligned(dense) ? dense : torch::stable::clone(dense);
  });
}

// Asking first spares contiguous tensors a call through the dispatcher.
inline torch::stable::Tensor dense(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() && is_aligned(tensor) ? tensor : sharedllm::contiguous(tensor);
}

inline torch::stable::Tensor dense_as(const torch::stable::Tensor& tensor, torch::headeronly::ScalarType dtype) {
  return dense(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

// A size of -1 accepts any number.
inline void check_shape(const char* name, const torch::stable::Tensor& tensor, std::initializer_list<int64_t> shape) {
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) {
    const int64_t want = shape.begin()[i];
    same = want < 0 || want == sizes[i];
  }
  check(same, name, ": expected shape ", shape_text(shape), ", got ", shape_text(sizes));
}

inline void check_tensor(const char* name, const torch::stable::Tensor& tensor, std::initializer_list<int64_t> shape,
                         torch::headeronly::ScalarType dtype) {
  check(tensor.is_cpu(), name, ": expected a tensor on cpu, got one on another kind of device");
  check(tensor.scalar_type() == dtype, name, ": expected dtype ", dtype_text(dtype), ", got ",
        dtype_text(tensor.scalar_type()));
  check_shape(name, tensor, shape);
}

inline void check_float32_or_bfloat16(const char* name, const torch::stable::Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  check(dtype == torch::headeronly::ScalarType::Float || dtype == torch::headeronly::ScalarType::BFloat16, name,
        ": expected dtype Float or BFloat16, got ", dtype_text(dtype));
}

// A factor that float32 holds: with infinity or NaN every result would be NaN.
inline void check_scale(double scale) {
  check(std::abs(scale) <= FLT_MAX, "scale: expected a finite number (in float32), got ", scale);
}

// What a norm adds to its mean square.
inline void check_eps(double eps) {
  check(eps >= 0 && eps <= FLT_MAX, "eps: expected a finite number of at least 0, got ", eps);
}

// The lower bound of a norm that is divided by.
inline void check_lower_bound(double eps) {
  check(eps > 0 && eps <= FLT_MAX && static_cast<float>(eps) > 0,
        "eps: expected a finite number above 0 (in float32), got ", eps);
}

// Tables [P, R/2] rotate the first R of a head's elements.
inline void check_rotary_columns(int64_t columns, int64_t head_size) {
  check(columns <= head_size / 2, "cos: expected at most D/2 = ", head_size / 2, " columns, got ", columns);
}

// low <= values[i] < high for all i.
inline void check_range(const char* name, const int64_t* values, int64_t count, int64_t low, int64_t high) {
  bool inside = true;
  for (int64_t i = 0; i < count; ++i) inside &= (values[i] >= low) & (values[i] < high);
  if (__builtin_expect(inside, 1)) return;
  const int64_t* bad = std::find_if(values, values + count, [&](int64_t x) { return x < low || x >= high; });
  fail(name, "[", bad - values, "]: expected ", low, " <= value < ", high, ", got ", *bad);
}

// Cumulative counts: start at 0, never fall, end at total.
inline void check_cumulative(const char* name, const int64_t* values, int64_t count, int64_t total) {
  check(count >= 1, name, ": expected at least 1 element, got 0");
  check(values[0] == 0, name, "[0]: expected 0, got ", values[0]);
  for (int64_t i = 1; i < count; ++i) {
    check(values[i] >= values[i - 1], name, "[", i, "]: expected at least ", name, "[", i - 1, "] = ", values[i - 1],
          ", got ", values[i]);
  }
  check(values[count - 1] == total, name, "[", count - 1, "]: expected ", total, ", got ", values[count - 1]);
}

}  // namespace sharedllm

"""Element-wise work between a decoder layer's matmuls, one pass over memory each; rows as 8-bit floats."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._library import cuda_kernels
from ..reference import fused_layer as _reference
from ..reference.rotary import compute_dtype
from ._autocast import outside_autocast
from ._checks import FLOATS, check_eps, check_tensor

__all__ = [
    "add_rms_norm",
    "add_rms_norm_fp8",
    "quantize_rows_fp8",
    "rms_norm",
    "rms_norm_fp8",
    "silu_product",
    "silu_product_fp8",
]


@outside_autocast
def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, the gated activation, in float32 and rounded once.

    Args:
        gate, up: ``[T, n]`` float32, bfloat16, float16 or float64; rows may be parts of longer ones, such as the halves
            of one matmul's result. On CUDA rows of whole 16-byte units are fastest.

    Returns:
        ``[T, n]``, contiguous, in gate's dtype.

    Raises:
        TypeError: a dtype that is not gate's.
        ValueError: a shape or device that does not fit.

    Equivalent to ``torch.nn.functional.silu(gate) * up`` up to one rounding.
    """
    _check_product(gate, up)
    if _only_reference(gate):
        return _reference.silu_product(gate, up)
    return torch.ops.sharedllm.silu_product(gate, up)


@outside_autocast
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm of each row, ``x / sqrt(mean(x^2) + eps) * weight``, in float32 and rounded once.

    Args:
        x: ``[T, d]`` float32, bfloat16, float16 or float64. On CUDA rows of whole 16-byte units and at most 16384
            elements are read once; others are slower.
        weight: ``[d]``.
        eps: added to the mean square.

    Returns:
        ``[T, d]``, contiguous, in x's dtype.

    Raises:
        TypeError: a dtype that is not x's.
        ValueError: a shape or device that does not fit.

    Equivalent to ``torch.nn.functional.rms_norm(x, weight.shape, weight, eps)``.
    """
    _check_norm(x, weight, eps)
    if _only_reference(x):
        return _reference.rms_norm(x, weight, eps)
    return torch.ops.sharedllm.rms_norm(x, weight, eps)


@outside_autocast
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Residual sum and its root mean square norm in one pass.

    Args:
        x, residual: ``[T, d]``, as for :func:`rms_norm`.
        weight: ``[d]``.
        eps: added to the mean square.

    Returns:
        sum: ``x + residual``, rounded to their dtype.
        normed: :func:`rms_norm` of that sum.

    Raises:
        TypeError: a dtype that is not x's.
        ValueError: a shape or device that does not fit.
    """
    _check_norm(x, weight, eps, residual)
    if _only_reference(x):
        return _reference.add_rms_norm(x, residual, weight, eps)
    return torch.ops.sharedllm.add_rms_norm(x, residual, weight, eps)


@outside_autocast
def quantize_rows_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as 8-bit floats (e4m3) with one scale each, as ``torch._scaled_mm`` takes them: ``x ≈ codes * scale``.

    ``scale = max|x| / 448`` over a row, codes to the nearest number. Normally distributed rows read back with an error
    of 2.6% of their length. Not differentiable.

    Args:
        x: ``[T, n]`` float32, bfloat16, float16 or float64.

    Returns:
        codes: ``[T, n]`` ``torch.float8_e4m3fn``, contiguous.
        scale: ``[T, 1]`` float32. A row of zeros, or of magnitudes below ``2^-100``, has codes 0 and scale 1; one with
            NaN or inf reads back as NaN.

    Raises:
        TypeError: not a floating tensor.
        ValueError: another shape.
        NotImplementedError: in a backward pass.

    A matmul of quantised rows and weights, ``x @ weight.T`` on GPUs of compute capability 8.9 and newer, with both
    widths multiples of 16::

        (a, a_scale), (b, b_scale) = quantize_rows_fp8(x), quantize_rows_fp8(weight)
        torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
    """
    check_tensor("x", x, ("T", "n"), FLOATS)
    if _only_reference(x):
        return _reference.quantize_rows_fp8(x)
    return torch.ops.sharedllm.quantize_rows_fp8(x)


@outside_autocast
def silu_product_fp8(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`silu_product` and :func:`quantize_rows_fp8` in one pass, without the rounding between.

    Args:
        gate, up: as for :func:`silu_product`; on CUDA fastest up to 16384 columns.

    Returns:
        codes ``[T, n]`` and scale ``[T, 1]`` of :func:`quantize_rows_fp8`.

    Raises:
        TypeError: a dtype that is not gate's.
        ValueError: a shape or device that does not fit.
        NotImplementedError: in a backward pass.
    """
    _check_product(gate, up)
    if _only_reference(gate):
        return _reference.silu_product_fp8(gate, up)
    return torch.ops.sharedllm.silu_product_fp8(gate, up)


@outside_autocast
def rms_norm_fp8(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """:func:`rms_norm` and :func:`quantize_rows_fp8` in one pass, without the rounding between.

    Args:
        x, weight, eps: as for :func:`rms_norm`.

    Returns:
        codes ``[T, d]`` and scale ``[T, 1]`` of :func:`quantize_rows_fp8`.

    Raises:
        TypeError: a dtype that is not x's.
        ValueError: a shape or device that does not fit.
        NotImplementedError: in a backward pass.
    """
    _check_norm(x, weight, eps)
    if _only_reference(x):
        return _reference.rms_norm_fp8(x, weight, eps)
    return torch.ops.sharedllm.rms_norm_fp8(x, weight, eps)


@outside_autocast
def add_rms_norm_fp8(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Residual sum and :func:`rms_norm_fp8` of it in one pass.

    Args:
        x, residual, weight, eps: as for :func:`add_rms_norm`.

    Returns:
        sum: ``x + residual``, rounded to their dtype.
        codes, scale: :func:`rms_norm_fp8` of that sum.

    Raises:
        TypeError: a dtype that is not x's.
        ValueError: a shape or device that does not fit.
        NotImplementedError: in a backward pass.
    """
    _check_norm(x, weight, eps, residual)
    if _only_reference(x):
        return _reference.add_rms_norm_fp8(x, residual, weight, eps)
    return torch.ops.sharedllm.add_rms_norm_fp8(x, residual, weight, eps)


def _check_product(gate: Tensor, up: Tensor) -> None:
    check_tensor("gate", gate, ("T", "n"), FLOATS)
    check_tensor("up", up, gate.shape, gate.dtype, gate.device)


def _check_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> None:
    check_tensor("x", x, ("T", "d"), FLOATS)
    check_tensor("weight", weight, (x.shape[1],), x.dtype, x.device)
    if residual is not None:
        check_tensor("residual", residual, x.shape, x.dtype, x.device)
    check_eps(eps)


def _plain_norm(name: str) -> Callable[..., Any]:
    """The operator ``name`` in plain PyTorch, after the checks of the public function: torch.ops has none."""
    reference = getattr(_reference, name)

    def plain(x: Tensor, weight: Tensor, eps: float) -> Any:
        _check_norm(x, weight, eps)
        return reference(x, weight, eps)

    return plain


def _plain_add_norm(name: str) -> Callable[..., Any]:
    reference = getattr(_reference, name)

    def plain(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
        _check_norm(x, weight, eps, residual)
        return reference(x, residual, weight, eps)

    return plain


def _plain_product(name: str) -> Callable[..., Any]:
    reference = getattr(_reference, name)

    def plain(gate: Tensor, up: Tensor) -> Any:
        _check_product(gate, up)
        return reference(gate, up)

    return plain


def _plain_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    check_tensor("x", x, ("T", "n"), FLOATS)
    return _reference.quantize_rows_fp8(x)


def _only_reference(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.float64


@torch.library.register_fake("sharedllm::silu_product")
def _product_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.register_fake("sharedllm::rms_norm")
def _norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("sharedllm::add_rms_norm")
def _add_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.register_fake("sharedllm::quantize_rows_fp8")
def _codes_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), scale


@torch.library.register_fake("sharedllm::silu_product_fp8")
def _product_codes_fake(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _codes_fake(gate)


@torch.library.register_fake("sharedllm::rms_norm_fp8")
def _norm_codes_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _codes_fake(x)


@torch.library.register_fake("sharedllm::add_rms_norm_fp8")
def _add_codes_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_codes_fake(x)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.eps = inputs[-1]


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0], inputs[2])
    ctx.eps = inputs[3]


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = ctx.saved_tensors
    dtype = compute_dtype(gate.dtype)
    grad, wide = grad.to(dtype), gate.to(dtype)
    open_ = wide.sigmoid()
    grad_gate = grad * up.to(dtype) * open_ * (1 + wide * (1 - open_))
    return grad_gate.to(gate.dtype), (grad * wide * open_).to(up.dtype)


def _norm_gradients(x: Tensor, weight: Tensor, eps: float, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of x, in the accumulation dtype, and of weight."""
    dtype = compute_dtype(x.dtype)
    grad, wide = grad.to(dtype), x.to(dtype)
    factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    unit = wide * factor
    inner = grad * weight.to(dtype)
    grad_x = factor * (inner - unit * (inner * unit).mean(-1, keepdim=True))
    return grad_x, (grad * unit).sum(0).to(weight.dtype)


def _norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight = _norm_gradients(x, weight, ctx.eps, grad)
    return grad_x.to(x.dtype), grad_weight, None


def _add_norm_backward(ctx: Any, grad_sum: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    total, weight = ctx.saved_tensors
    grad_x, grad_weight = _norm_gradients(total, weight, ctx.eps, grad)
    grad_x = (grad_x + grad_sum.to(grad_x.dtype)).to(total.dtype)
    return grad_x, grad_x, grad_weight, None


def _no_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
    raise NotImplementedError("8-bit rows: expected to be computed without gradients, got a backward pass")


torch.library.register_autograd("sharedllm::silu_product", _product_backward, setup_context=_save_inputs)
torch.library.register_autograd("sharedllm::rms_norm", _norm_backward, setup_context=_save_inputs)
torch.library.register_autograd("sharedllm::add_rms_norm", _add_norm_backward, setup_context=_save_sum)
for _name in ("quantize_rows_fp8", "silu_product_fp8", "rms_norm_fp8"):
    torch.library.register_autograd(f"sharedllm::{_name}", _no_derivative)
torch.library.register_autograd("sharedllm::add_rms_norm_fp8", _no_derivative)

_PLAIN = {
    "quantize_rows_fp8": _plain_quantize,
    **{name: _plain_product(name) for name in ("silu_product", "silu_product_fp8")},
    **{name: _plain_norm(name) for name in ("rms_norm", "rms_norm_fp8")},
    **{name: _plain_add_norm(name) for name in ("add_rms_norm", "add_rms_norm_fp8")},
}

# the CPU has no kernels of its own for these
for _name in __all__:
    for _device in ("CPU", "CUDA"):
        if _device == "CPU" or _name not in cuda_kernels():
            torch.library.impl(f"sharedllm::{_name}", _device, _PLAIN[_name])

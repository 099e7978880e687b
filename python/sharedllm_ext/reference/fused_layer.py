"""References of the element-wise work between a decoder layer's matmuls."""

import torch
from torch import Tensor

from .rotary import compute_dtype

#: Largest number of float8 e4m3.
LARGEST_CODE = 448.0
# below this a row counts as zeros, so that 448 / largest stays finite in float32
SMALLEST = 2.0**-100


def _product(gate: Tensor, up: Tensor) -> Tensor:
    dtype = compute_dtype(gate.dtype)
    return torch.nn.functional.silu(gate.to(dtype)) * up.to(dtype)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(compute_dtype(x.dtype))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """``gate / (1 + exp(-gate)) * up``, in float32 and rounded once; gate and up ``[T, n]``."""
    return _product(gate, up).to(gate.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight``, in float32 and rounded once; x ``[T, d]``, weight ``[d]``."""
    return _normed(x, weight, eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``sum = x + residual``, rounded, and its root mean square norm; x and residual ``[T, d]``, weight ``[d]``."""
    total = x + residual
    return total, rms_norm(total, weight, eps)


def quantize_rows_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x ≈ codes * scale`` with ``scale = max|x| / 448`` over each row.

    Args:
        x: ``[T, n]``.

    Returns:
        codes ``[T, n]`` float8 e4m3, nearest values; scale ``[T, 1]`` float32. A row of zeros, or of magnitudes below
        ``2^-100``, has codes 0 and scale 1. A row with NaN or inf has codes 0 and that magnitude as its scale: it reads
        back as NaN.
    """
    x = x.to(torch.float32)
    if x.shape[-1] == 0:
        return x.to(torch.float8_e4m3fn), x.new_ones((x.shape[0], 1))
    largest = x.abs().amax(-1, keepdim=True)  # NaN if there is one
    finite, some = largest.isfinite(), largest >= SMALLEST
    codes = torch.where(finite & some, x * (largest.reciprocal() * LARGEST_CODE), 0).clamp(-LARGEST_CODE, LARGEST_CODE)
    scale = torch.where(finite, torch.where(some, largest * (1 / LARGEST_CODE), 1), largest)
    return codes.to(torch.float8_e4m3fn), scale


def silu_product_fp8(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`quantize_rows_fp8` of :func:`silu_product` without the rounding between."""
    return quantize_rows_fp8(_product(gate, up))


def rms_norm_fp8(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """:func:`quantize_rows_fp8` of :func:`rms_norm` without the rounding between."""
    return quantize_rows_fp8(_normed(x, weight, eps))


def add_rms_norm_fp8(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``sum = x + residual``, rounded, and codes and scale of :func:`rms_norm_fp8` of it."""
    total = x + residual
    return total, *rms_norm_fp8(total, weight, eps)

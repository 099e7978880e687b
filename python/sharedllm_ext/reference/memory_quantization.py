"""Reference of the 8-bit context memory: one scale for each slot and head."""

import torch
from torch import Tensor

from .rotary import compute_dtype

LARGEST_CODE = 127
# below this a vector counts as zeros, so that 127 / largest stays finite in float32
SMALLEST = 2.0**-100


def quantize_memory(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x ≈ codes * scale`` with ``scale = max|x| / 127`` over each head's vector, codes to the nearest integer.

    Args:
        x: ``[S, Hkv, D]`` keys (rotated) or values of the memory.

    Returns:
        codes ``[S, Hkv, D]`` int8, between -127 and 127; scale ``[S, Hkv]`` float32. A vector of zeros, or of
        magnitudes below ``2^-100``, has codes and scale 0. A vector with NaN or inf has codes 0 and that magnitude as
        its scale: it reads back as NaN.
    """
    x = x.to(torch.float32)
    if x.shape[-1] == 0:
        return x.to(torch.int8), x.new_zeros(x.shape[:-1])
    largest = x.abs().amax(-1)  # NaN if there is one
    used = largest.isfinite() & (largest >= SMALLEST)
    inverse = torch.where(used, largest.reciprocal() * LARGEST_CODE, 0)
    codes = torch.where(used.unsqueeze(-1), x * inverse.unsqueeze(-1), 0).round().to(torch.int8)
    scale = torch.where(used, largest * (1 / LARGEST_CODE), torch.where(largest.isfinite(), 0, largest))
    return codes, scale


def dequantize_memory(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes * scale`` in ``dtype``, rounded once; codes ``[S, Hkv, D]``, scale ``[S, Hkv]``."""
    compute = compute_dtype(dtype)
    return (codes.to(compute) * scale.to(compute).unsqueeze(-1)).to(dtype)

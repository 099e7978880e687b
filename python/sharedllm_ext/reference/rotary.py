"""Rotary position embedding on half tables, shared by the reference operators."""

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Accumulation dtype of an input dtype: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs ``(i, i + R/2)`` of the last dimension.

    Args:
        x: ``[..., heads, D]``.
        cos, sin: ``[..., R/2]``, one row for each token, broadcast over heads; ``R <= D``.

    Returns:
        ``[..., heads, D]``; elements from ``R`` on pass through.
    """
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)

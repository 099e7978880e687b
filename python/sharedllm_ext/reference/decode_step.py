"""References of the operators of one decoding step: fused linear for a few rows, and the KV cache's new entry."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .rotary import compute_dtype, rotate


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension, rounded to x's dtype before and after the weight."""
    wide = x.to(compute_dtype(x.dtype))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def decode_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """``norm(x) [W_0; W_1; …]^T + bias (+ residual)``, or ``silu(norm(x) W_0^T + b_0) * (norm(x) W_1^T + b_1)``.

    Args:
        x: ``[rows, K]``.
        weights: up to three matrices ``[N_i, K]``; gated: two of equal shape.
        biases: ``[N_i]`` or ``None`` for each.
        norm_weight: ``[K]``; the root mean square norm's weight, ``None`` for no norm.
        eps: the norm's.
        residual: ``[rows, sum N_i]``, added.
        gated: the gated form; no residual.

    Returns:
        ``[rows, sum N_i]``, gated ``[rows, N_0]``.
    """
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    biases = [None] * len(weights) if biases is None else biases
    parts = [functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    if gated:
        return functional.silu(parts[0]) * parts[1]
    out = torch.cat(parts, -1)
    return out if residual is None else residual + out


def decode_linear_fp8(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """:func:`decode_linear` with weights ``codes * scale``, which are rounded nowhere; nor is the sum before its end.

    Args:
        x: ``[rows, K]``.
        codes: up to three matrices ``[N_i, K]`` float8 e4m3; gated: two of equal shape.
        scales: ``[N_i, 1]`` float32 for each.
        biases, norm_weight, eps, residual, gated: as for :func:`decode_linear`.

    Returns:
        ``[rows, sum N_i]``, gated ``[rows, N_0]``.
    """
    dtype = compute_dtype(x.dtype)
    normed = (x if norm_weight is None else rms_norm(x, norm_weight, eps)).to(dtype)
    biases = [None] * len(codes) if biases is None else biases
    parts = [
        functional.linear(normed, rows.to(dtype)) * scale.to(dtype).T + (0 if bias is None else bias.to(dtype))
        for rows, scale, bias in zip(codes, scales, biases, strict=True)
    ]
    if gated:
        return (functional.silu(parts[0]) * parts[1]).to(x.dtype)
    out = torch.cat(parts, -1)
    return (out if residual is None else out + residual.to(dtype)).to(x.dtype)


def decode_append(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    first: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """Split the projections of one token a row, rotate queries and keys, write keys and values into the cache.

    Args:
        qkv: ``[B, (Hq + 2 Hkv) D]``: query heads, key heads, value heads.
        keys, values: ``[B, capacity, Hkv, D]``, written at token ``length[b]``; a full row stays as it is.
        length: ``[B]`` int64, tokens that the cache holds.
        first: ``[B]`` int64, how many of them are left padding; the token's position is ``length - first``.
        cos, sin: ``[P, R/2]`` float32.
        q_norm, k_norm: ``[D]``, weights of a norm over each head, before the rotation; ``None``: none.
        eps: the norms'.
        window: tokens that a query sees, including itself; 0: all.

    Returns:
        q ``[B, Hq, D]``; slot_range ``[B, 2]`` int64: what the token sees of the cache as ``[B * capacity, Hkv, D]``.
    """
    rows, capacity, heads, size = keys.shape
    dtype = compute_dtype(qkv.dtype)
    q, k, v = qkv.unflatten(-1, (-1, size)).split((qkv.shape[1] // size - 2 * heads, heads, heads), 1)
    q = q if q_norm is None else rms_norm(q, q_norm, eps)
    k = k if k_norm is None else rms_norm(k, k_norm, eps)
    length = length.clamp(0, capacity)
    first = first.clamp(min=0).minimum(length)
    if cos.shape[0]:
        position = (length - first).clamp(max=cos.shape[0] - 1)
        tables = cos[position], sin[position]
        q, k = (rotate(x.to(dtype), *tables).to(qkv.dtype) for x in (q, k))
    row = torch.arange(rows, device=qkv.device)
    # where there is no room the last entry is written again, unchanged
    at = length.clamp(max=max(capacity - 1, 0))
    room = (length < capacity)[:, None, None]
    if capacity:
        keys[row, at] = torch.where(room, k, keys[row, at])
        values[row, at] = torch.where(room, v, values[row, at])
    end = (length + 1).clamp(max=capacity)
    begin = first if window <= 0 else torch.maximum(first, end - window)
    return q.contiguous(), torch.stack((begin, end), 1) + row[:, None] * capacity

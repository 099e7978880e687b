"""Reference of chunk compression: rotary embedding, selection of the kept positions, packing into the memory."""

import torch
from torch import Tensor

from .rotary import compute_dtype, rotate


def _rotate_at(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> Tensor:
    dtype = compute_dtype(x.dtype)
    return rotate(x.to(dtype), cos[positions], sign * sin[positions]).to(x.dtype)


def _keep(x: Tensor, keep_index: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return x.new_zeros((keep_index.numel(), *x.shape[1:]))
    used = (keep_index >= 0).view(-1, 1, 1)
    return torch.where(used, x[keep_index.clamp(min=0)], torch.zeros((), dtype=x.dtype, device=x.device))


def chunk_compression(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_positions: Tensor | None,
    positions: Tensor | None,
    keep_index: Tensor,
    keep_position: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotate one layer's queries and keys for the nodes' own attention and pack its kept keys and values.

    Args:
        q: ``[Tq, Hq, D]`` raw queries, or ``None``.
        k, v: ``[T, Hkv, D]`` raw keys and values.
        cos, sin: ``[P, R/2]`` float32.
        q_positions: ``[Tq]`` int64; needed with ``q``.
        positions: ``[T]`` int64, position of each token in its node; ``None``: rotated keys are not wanted.
        keep_index: ``[S]`` int64, token kept in each slot (no token twice), -1 for a slot filled with zeros.
        keep_position: ``[S]`` int64, rotation of each slot's key: position in the node + chunk index.

    Returns:
        q_rotated ``[Tq, Hq, D]`` (empty without ``q``), k_rotated ``[T, Hkv, D]`` (empty without ``positions``),
        memory_k ``[S, Hkv, D]``, memory_v ``[S, Hkv, D]``.
    """
    q_rotated = k.new_empty(0) if q is None or q_positions is None else _rotate_at(q, q_positions, cos, sin)
    k_rotated = k.new_empty(0) if positions is None else _rotate_at(k, positions, cos, sin)
    memory_k = _rotate_at(_keep(k, keep_index), keep_position, cos, sin)
    return q_rotated, k_rotated, memory_k, _keep(v, keep_index)


def chunk_compression_backward(
    grad_q_rotated: Tensor | None,
    grad_k_rotated: Tensor | None,
    grad_memory_k: Tensor,
    grad_memory_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_positions: Tensor | None,
    positions: Tensor | None,
    keep_index: Tensor,
    keep_position: Tensor,
    num_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`chunk_compression` for q (empty without ``grad_q_rotated``), k and v (``num_tokens`` rows).

    The transpose of a rotation is the rotation by the opposite angle; a kept token adds its slot's gradient to its own.
    """
    empty = grad_memory_k.new_empty(0)
    has_q = grad_q_rotated is not None and q_positions is not None
    grad_q = _rotate_at(grad_q_rotated, q_positions, cos, sin, -1) if has_q else empty  # type: ignore[arg-type]
    dtype = compute_dtype(grad_memory_k.dtype)
    grad_k = torch.zeros((num_tokens, *grad_memory_k.shape[1:]), dtype=dtype, device=grad_memory_k.device)
    if grad_k_rotated is not None and positions is not None:
        grad_k = rotate(grad_k_rotated.to(dtype), cos[positions], -sin[positions])
    used = (keep_index >= 0).view(-1, 1, 1)
    target = keep_index.clamp(min=0)
    kept_k = rotate(grad_memory_k.to(dtype), cos[keep_position], -sin[keep_position])
    grad_v = torch.zeros_like(grad_k)
    if num_tokens:
        grad_k = grad_k.index_add(0, target, torch.where(used, kept_k, 0))
        grad_v = grad_v.index_add(0, target, torch.where(used, grad_memory_v.to(dtype), 0))
    return grad_q, grad_k.to(grad_memory_k.dtype), grad_v.to(grad_memory_v.dtype)

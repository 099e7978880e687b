"""Reference of the injected attention: running text reads the context memory, forward and backward."""

import torch
from torch import Tensor

from .rotary import compute_dtype, rotate


def _rows(cu_q: Tensor, slot_range: Tensor, q_position: Tensor) -> list[tuple[int, int, int, int, int]]:
    bounds = cu_q.tolist()
    ranges = zip(bounds[:-1], bounds[1:], slot_range.tolist(), q_position.tolist(), strict=True)
    return [(first, last, begin, end, position) for first, last, (begin, end), position in ranges]


def injected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    slot_range: Tensor,
    q_position: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``softmax(rope(q, position) k^T * scale) v`` for each row of a ragged batch; every query sees its whole memory.

    Args:
        q: ``[T, Hq, D]`` queries of all rows, packed, not rotated.
        k, v: ``[S, Hkv, D]`` memory slots, keys rotated; ``Hq`` a multiple of ``Hkv``.
        cu_q: ``[B + 1]`` int64, cumulative query counts.
        slot_range: ``[B, 2]`` int64, first slot and end of each row's memory; rows may share slots.
        q_position: ``[B]`` int64, the one rotary position of all queries of a row.
        cos, sin: ``[P, R/2]`` float32.
        scale: factor on the scores, usually ``D ** -0.5``.

    Returns:
        out ``[T, Hq, D]`` in q's dtype, zeros for a row without slots; lse ``[T, Hq]``, natural logarithm of the sum of
        exponentials (float32; float64 for float64 input), -inf for a row without slots.
    """
    dtype = compute_dtype(q.dtype)
    groups = q.shape[1] // k.shape[1]
    outs, sums = [q.new_empty((0, *q.shape[1:]))], [torch.empty((0, q.shape[1]), dtype=dtype, device=q.device)]
    for first, last, begin, end, position in _rows(cu_q, slot_range, q_position):
        query = rotate(q[first:last].to(dtype), cos[position], sin[position])
        keys = k[begin:end].to(dtype).repeat_interleave(groups, 1)
        values = v[begin:end].to(dtype).repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,shd->qhs", query, keys) * scale
        if begin == end:
            sums.append(torch.full(scores.shape[:2], -torch.inf, dtype=dtype, device=q.device))
            outs.append((query * 0).to(q.dtype))
            continue
        sums.append(torch.logsumexp(scores, -1))
        outs.append(torch.einsum("qhs,shd->qhd", torch.softmax(scores, -1), values).to(q.dtype))
    return torch.cat(outs), torch.cat(sums)


def injected_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    slot_range: Tensor,
    q_position: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    need_grad_kv: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`injected_attention`: ``dS = P * (dP - rowsum(dO * O) + dLSE)``.

    Returns:
        grad_q ``[T, Hq, D]``; grad_k, grad_v ``[S, Hkv, D]``, empty unless ``need_grad_kv``.
    """
    dtype = compute_dtype(q.dtype)
    heads, size = k.shape[1], k.shape[2]
    groups = q.shape[1] // heads
    grad_q = torch.zeros(q.shape, dtype=dtype, device=q.device)
    grad_k = torch.zeros(k.shape if need_grad_kv else (0,), dtype=dtype, device=q.device)
    grad_v = torch.zeros_like(grad_k)
    for first, last, begin, end, position in _rows(cu_q, slot_range, q_position):
        if begin == end or first == last:
            continue
        query = rotate(q[first:last].to(dtype), cos[position], sin[position])
        keys = k[begin:end].to(dtype).repeat_interleave(groups, 1)
        values = v[begin:end].to(dtype).repeat_interleave(groups, 1)
        upstream = grad_out[first:last].to(dtype)
        scores = torch.einsum("qhd,shd->qhs", query, keys) * scale
        weights = torch.exp(scores - lse[first:last].to(dtype).unsqueeze(-1))
        delta = (upstream * out[first:last].to(dtype)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[first:last].to(dtype).unsqueeze(-1)
        grad_scores = weights * (torch.einsum("qhd,shd->qhs", upstream, values) - delta) * scale
        grad_q[first:last] = rotate(torch.einsum("qhs,shd->qhd", grad_scores, keys), cos[position], -sin[position])
        if need_grad_kv:
            shape = (end - begin, heads, groups, size)
            grad_k[begin:end] += torch.einsum("qhs,qhd->shd", grad_scores, query).view(shape).sum(2)
            grad_v[begin:end] += torch.einsum("qhs,qhd->shd", weights, upstream).view(shape).sum(2)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)

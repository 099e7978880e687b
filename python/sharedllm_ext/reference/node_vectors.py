"""Reference of the node vectors' attention: a node's last token over the node's keys and values."""

import torch
from torch import Tensor

from .rotary import compute_dtype, rotate


def node_vectors(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """Attention of each node's last token over the whole node, rotary positions counted from the node's start.

    Args:
        q: ``[N, Hq, D]``, the last token's query projections, not rotated.
        k, v: ``[T, Hkv, D]``, key and value projections of all tokens, not rotated.
        spans: ``[N, 2]`` int64, (start, length) in tokens; spans may overlap.
        cos, sin: ``[P, R/2]`` float32 with ``P >= max length``.
        scale: factor on the scores, usually ``D ** -0.5``.

    Returns:
        ``[N, Hq, D]`` in q's dtype; zeros for an empty node.
    """
    dtype = compute_dtype(q.dtype)
    groups = q.shape[1] // k.shape[1]
    rows = []
    for i, (start, length) in enumerate(spans.tolist()):
        if length == 0:
            rows.append(torch.zeros(q.shape[1:], dtype=q.dtype, device=q.device))
            continue
        query = rotate(q[i].to(dtype), cos[length - 1], sin[length - 1])
        keys = rotate(k[start : start + length].to(dtype), cos[:length], sin[:length]).repeat_interleave(groups, 1)
        values = v[start : start + length].to(dtype).repeat_interleave(groups, 1)
        weights = torch.softmax(torch.einsum("hd,thd->ht", query, keys) * scale, -1)
        rows.append(torch.einsum("ht,thd->hd", weights, values).to(q.dtype))
    return torch.stack(rows) if rows else q * 1

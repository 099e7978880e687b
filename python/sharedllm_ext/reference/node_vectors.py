"""Reference of the node vectors' attention: a node's last token over the node's keys and values."""

import torch
from torch import Tensor

from .context_tree import context_tree_split
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


def tree_nodes(spans: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """All nodes of the first levels of trees, and whose query each takes.

    Args:
        spans: ``[n, 2]`` int64, (start, length) of the roots.
        levels: how often the roots are halved.

    Returns:
        ``[n, 2^(levels + 1) - 2, 2]`` int64 nodes, level by level, left to right, the roots themselves left out; for
        each of a root's nodes ``[2^(levels + 1) - 2]`` the leaf, 0 to ``2^levels - 1``, that ends where the node does.
    """
    level, nodes, leaf = spans.unsqueeze(1), [], []
    for i in range(1, levels + 1):
        level = context_tree_split(level.flatten(0, 1)).reshape(spans.shape[0], 2**i, 2)
        nodes.append(level)
        leaf.append((torch.arange(2**i, device=spans.device) + 1) * 2 ** (levels - i) - 1)
    return torch.cat(nodes, 1), torch.cat(leaf)


def tree_node_vectors(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, cos: Tensor, sin: Tensor, levels: int, scale: float
) -> Tensor:
    """:func:`node_vectors` of all nodes of the first levels of trees.

    Args:
        q: ``[n, 2^levels, Hq, D]``, the query projections at the last token of each leaf, not rotated.
        k, v: ``[T, Hkv, D]``, key and value projections of all tokens, not rotated.
        spans: ``[n, 2]`` int64, (start, length) of the roots.
        cos, sin: ``[P, R/2]`` float32 with ``2 P >= max length``.
        levels: how often the roots are halved, at least once.
        scale: factor on the scores, usually ``D ** -0.5``.

    Returns:
        ``[n, 2^(levels + 1) - 2, Hq, D]`` in q's dtype, in the order of :func:`tree_nodes`; zeros for an empty node.
    """
    nodes, leaf = tree_nodes(spans, levels)
    out = node_vectors(q[:, leaf].flatten(0, 1), k, v, nodes.flatten(0, 1), cos, sin, scale)
    return out.reshape(*nodes.shape[:2], *q.shape[2:])

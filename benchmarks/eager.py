"""The operators in eager PyTorch, as one would write them without this package: what the kernels have to beat."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half on full tables ``[..., 1, D]``."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def full_tables(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Half tables ``[P, R/2]`` as :func:`rotate` takes them: ``[P, 1, R]`` in the data's dtype."""
    wide = [torch.cat((x, x), -1).unsqueeze(1).to(dtype) for x in (cos, sin)]
    return wide[0], wide[1]


def compression(
    q: Tensor | None, k: Tensor, v: Tensor, tables: Any, q_positions: Any, positions: Any, keep: Tensor, at: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Chunk compression."""
    cos, sin = tables
    q_rotated = None if q is None else rotate(q, cos[q_positions], sin[q_positions])
    k_rotated = None if positions is None else rotate(k, cos[positions], sin[positions])
    return q_rotated, k_rotated, rotate(k.index_select(0, keep), cos[at], sin[at]), v.index_select(0, keep)


def compression_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_mk: Tensor,
    grad_mv: Tensor,
    tables: Any,
    positions: Tensor,
    keep: Tensor,
    at: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`compression` for q, k and v."""
    cos, sin = tables
    back = -sin[positions]
    grad_q = rotate(grad_q, cos[positions], back)
    grad_k = rotate(grad_k, cos[positions], back)
    grad_k.index_add_(0, keep, rotate(grad_mk, cos[at], -sin[at]))
    return grad_q, grad_k, torch.zeros_like(grad_k).index_copy_(0, keep, grad_mv)


def cosine(query: Tensor, nodes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of groups of one size: nodes ``[G, n, d]``, query ``[1, 1, d]``."""
    return torch.nn.functional.cosine_similarity(query, nodes, dim=-1, eps=1e-6).topk(k)


def products(query: Tensor, nodes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same with a matrix product, which eager PyTorch runs faster than cosine_similarity."""
    dots = torch.matmul(nodes, query.flatten())
    return (dots / (nodes.norm(dim=-1).clamp(min=1e-6) * query.norm().clamp(min=1e-6))).topk(k)


def tree(ops: SimpleNamespace, spans: Tensor, chunk_index: Tensor, depth: int, slots: int, tokens: int) -> Any:
    """Right children to the given depth, then the layout, with the functions ``split``, ``select`` and ``layout``."""
    retained, node = [], spans
    for level in range(depth):
        children = ops.split(node, None)
        if level == depth - 1:
            retained += children.unbind(1)
        else:
            node, kept = ops.select(children, None)
            retained.append(kept)
    nodes = torch.stack(retained, 1)
    return ops.layout(nodes, chunk_index, slots, tokens, len(spans) * (depth + 1) * slots)

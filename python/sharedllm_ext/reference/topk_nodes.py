"""Reference of top-k node retrieval: cosine similarity and the k best nodes of each group."""

import torch
from torch import Tensor

from .rotary import compute_dtype


def topk_nodes(
    queries: Tensor,
    nodes: Tensor,
    cu_groups: Tensor,
    group_query: Tensor,
    k: int,
    valid: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The ``k`` nodes of every group most similar to the group's query.

    Args:
        queries: ``[Q, d]``.
        nodes: ``[N, d]``, grouped: group ``g`` holds rows ``cu_groups[g] .. cu_groups[g+1]-1``.
        cu_groups: ``[G + 1]`` int64, cumulative group sizes (2 for siblings, any number for all nodes of a document).
        group_query: ``[G]`` int64, the query of each group.
        k: how many to return.
        valid: ``[N]`` bool; nodes that are not valid are never returned.
        eps: lower bound of each norm.

    Returns:
        indices ``[G, k]`` int64 into ``nodes``, best first, the lower index first among equals, -1 where a group has
        fewer than ``k`` valid nodes; similarity ``[G, k]`` (float32; float64 for float64 input), -inf at -1. A NaN
        similarity ranks below all numbers.
    """
    dtype = compute_dtype(nodes.dtype)
    groups = cu_groups.numel() - 1
    sizes = cu_groups[1:] - cu_groups[:-1]
    owner = torch.repeat_interleave(torch.arange(groups, device=nodes.device), sizes, output_size=nodes.shape[0])
    query, node = queries.to(dtype)[group_query[owner]], nodes.to(dtype)
    norms = query.norm(dim=-1).clamp(min=eps) * node.norm(dim=-1).clamp(min=eps)
    score = (query * node).sum(-1) / norms
    # NaN ranks last among the valid; what is not valid ranks after it and is cut off
    rank = torch.where(score.isnan(), -torch.inf, score).detach()
    usable = torch.ones_like(rank, dtype=torch.bool) if valid is None else valid
    # the keys' least significant criterion first: similarity descending, then usable, then group
    order = torch.argsort(rank, descending=True, stable=True)
    order = order[torch.argsort((~usable[order]).to(torch.int64), stable=True)]
    order = order[torch.argsort(owner[order], stable=True)]
    slot = cu_groups[:-1].unsqueeze(1) + torch.arange(k, device=nodes.device)
    inside = slot < cu_groups[1:].unsqueeze(1)
    if nodes.shape[0] == 0:
        missing = torch.full((groups, k), -1, dtype=torch.int64, device=nodes.device)
        return missing, torch.full((groups, k), -torch.inf, dtype=dtype, device=nodes.device)
    candidate = order[slot.clamp(max=nodes.shape[0] - 1)]
    inside = inside & usable[candidate]
    return torch.where(inside, candidate, -1), torch.where(inside, score[candidate], -torch.inf)

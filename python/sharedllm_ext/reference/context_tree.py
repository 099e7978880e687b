"""Reference of the context tree: splits, one level's selection, and the layout of the retained nodes."""

import torch
from torch import Tensor


def context_tree_split(spans: Tensor, offset: Tensor | None = None) -> Tensor:
    """Children of every span: left = first ``b`` tokens, right = the rest, ``b = floor(l/2 - e)``.

    Args:
        spans: ``[n, 2]`` int64, (start, length).
        offset: ``[n]`` float, the split noise ``e`` in tokens; ``None`` means 0.

    Returns:
        ``[n, 2, 2]`` int64: left and right child, each (start, length). With two or more tokens both children hold at
        least one; a single token goes right.
    """
    start, length = spans.unbind(-1)
    half = length // 2
    if offset is not None:
        half = (length.to(torch.float64) / 2 - offset.to(torch.float64)).floor().to(torch.int64)
    lowest = (length > 1).to(torch.int64)
    left = torch.minimum(torch.maximum(half, lowest), (length - 1).clamp(min=0))
    return torch.stack((torch.stack((start, left), -1), torch.stack((start + left, length - left), -1)), -2)


def context_tree_select(children: Tensor, choice: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pick one child of each node to be split further and retain the other.

    Args:
        children: ``[n, 2, 2]`` int64 from :func:`context_tree_split`.
        choice: ``[n]`` int64, 0 left, anything else right; ``None`` picks right everywhere. An empty child is never
            picked over one that holds tokens.

    Returns:
        picked ``[n, 2]``, retained ``[n, 2]``.
    """
    left, right = children.unbind(-2)
    pick_left = torch.zeros_like(left[:, 0], dtype=torch.bool) if choice is None else choice == 0
    pick_left = (pick_left & (left[:, 1] > 0)) | (right[:, 1] == 0)
    pick_left = pick_left.unsqueeze(-1)
    return torch.where(pick_left, left, right), torch.where(pick_left, right, left)


def context_tree_layout(
    nodes: Tensor, chunk_index: Tensor, slots_per_node: int, num_tokens: int, num_slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Positions of all tokens in their retained node, and which tokens each memory slot keeps.

    Args:
        nodes: ``[n, m, 2]`` int64, the retained nodes of every chunk in slot order; together they cover the tokens
            ``0 .. num_tokens-1`` exactly once, chunks in order.
        chunk_index: ``[n]`` int64, position of each chunk in its document.
        slots_per_node: ``s``; a node of length ``l`` keeps ``min(l, s)`` tokens, at ``floor(j * l / min(l, s))``.
        num_tokens: ``T``.
        num_slots: rows of the slot arrays, at least the number of kept tokens.

    Returns:
        positions ``[T]``: position of each token in its node;
        cu_nodes ``[n*m + 1]``: cumulative node lengths in token order (an empty node repeats a value);
        keep_index ``[num_slots]``: kept token of each slot, -1 for unused slots at the end;
        keep_position ``[num_slots]``: position in the node + chunk index (0 for unused slots);
        cu_slots ``[n + 1]``: cumulative slots by chunk.
    """
    n, m, _ = nodes.shape
    device = nodes.device
    start, length = nodes.reshape(n * m, 2).unbind(-1)
    # empty nodes share their start with a neighbour: they sort first so that the boundaries stay cumulative
    order = torch.argsort(start * 2 + (length > 0).to(torch.int64), stable=True)
    cu_nodes = torch.zeros(n * m + 1, dtype=torch.int64, device=device)
    cu_nodes[1:] = torch.cumsum(length[order], 0)
    token = torch.arange(num_tokens, device=device)
    owner = torch.searchsorted(cu_nodes[1:], token, right=True)
    positions = token - cu_nodes[owner]

    kept = length.clamp(max=slots_per_node)
    cu_kept = torch.zeros(n * m + 1, dtype=torch.int64, device=device)
    cu_kept[1:] = torch.cumsum(kept, 0)
    slot = torch.arange(num_slots, device=device)
    used = slot < cu_kept[-1]
    node = torch.searchsorted(cu_kept[1:], slot, right=True).clamp(max=max(n * m - 1, 0))
    if n * m == 0:
        unused = torch.full((num_slots,), -1, dtype=torch.int64, device=device)
        return positions, cu_nodes, unused, torch.zeros_like(unused), cu_kept[:1].clone()
    inside = (slot - cu_kept[node]) * length[node] // kept[node].clamp(min=1)
    keep_index = torch.where(used, start[node] + inside, -1)
    keep_position = torch.where(used, inside + chunk_index[node // m], 0)
    return positions, cu_nodes, keep_index, keep_position, cu_kept[::m].clone()

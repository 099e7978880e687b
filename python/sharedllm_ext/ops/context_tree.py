"""Context tree: children of spans, one level's choice, and the layout of the retained nodes."""

import torch
from torch import Tensor

from .. import _library, reference
from ._checks import FLOATS, check_tensor, check_that


def split_offsets(
    num: int, std: float, *, device: torch.device | str, generator: torch.Generator | None = None
) -> Tensor:
    """Split noise of ``num`` nodes: ``e ~ N(0, std^2)``, in tokens (paper, section 3.2).

    Args:
        num: how many nodes are split.
        std: standard deviation in tokens, 0 for none.
        device: where the result lives; ``generator`` must live there too.
        generator: seeds the noise; ``None`` takes the device's default generator.

    Returns:
        ``[num]`` float32, the ``offset`` of :func:`context_tree_split`.

    Raises:
        ValueError: negative ``num`` or ``std``.
    """
    check_that(num >= 0, "num", "at least 0", num)
    check_that(0 <= std < float("inf"), "std", "a finite number of tokens, at least 0", std)
    return torch.randn(num, device=device, generator=generator, dtype=torch.float32) * std


def context_tree_split(spans: Tensor, offset: Tensor | None = None) -> Tensor:
    """Children of every span: left = first ``b`` tokens, right = the rest, ``b = floor(l/2 - e)``.

    ``b`` is kept in ``1 .. l-1``: with two or more tokens both children hold at least one; a single token goes right.

    Args:
        spans: ``[n, 2]`` int64, (start, length), in tokens.
        offset: ``[n]`` floating, the split noise ``e`` in tokens (:func:`split_offsets`); ``None`` means 0.

    Returns:
        ``[n, 2, 2]`` int64: left and right child, each (start, length).

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or device is wrong; on the CPU also negative spans and an offset that is not finite.

    Equivalent to::

        left = (spans[:, 1] / 2 - offset).floor().long().clamp(1, spans[:, 1] - 1)
        children = [(start, left), (start + left, length - left)]
    """
    check_tensor("spans", spans, ("n", 2), torch.int64)
    if offset is not None:
        check_tensor("offset", offset, (spans.shape[0],), FLOATS, spans.device)
    return torch.ops.sharedllm.context_tree_split(spans, offset)


def context_tree_select(children: Tensor, choice: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pick one child of each node to be split further and retain the other.

    Args:
        children: ``[n, 2, 2]`` int64 from :func:`context_tree_split`.
        choice: ``[n]`` int64, 0 left, anything else right; ``None`` picks right everywhere. An empty child is never
            picked over one that holds tokens.

    Returns:
        picked ``[n, 2]``, retained ``[n, 2]``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or device is wrong.

    Equivalent to ``children[arange(n), choice], children[arange(n), 1 - choice]`` where no child is empty.
    """
    check_tensor("children", children, ("n", 2, 2), torch.int64)
    if choice is not None:
        check_tensor("choice", choice, (children.shape[0],), torch.int64, children.device)
    return torch.ops.sharedllm.context_tree_select(children, choice)


def context_tree_layout(
    nodes: Tensor, chunk_index: Tensor, slots_per_node: int, num_tokens: int, num_slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Positions of all tokens in their retained node, and which tokens each memory slot keeps.

    A node of length ``l`` keeps ``p = min(l, s)`` tokens, at ``floor(j * l / p)`` for ``j < p``.

    Args:
        nodes: ``[n, m, 2]`` int64, (start, length), the ``m >= 1`` retained nodes of every chunk in slot order;
            together they cover the tokens ``0 .. T-1`` exactly once, chunks in order.
        chunk_index: ``[n]`` int64, position of each chunk in its document.
        slots_per_node: ``s >= 1``.
        num_tokens: ``T``.
        num_slots: rows of the slot arrays, at least the number of kept tokens.

    Returns:
        positions ``[T]``: position of each token in its node;
        cu_nodes ``[n*m + 1]``: cumulative node lengths in token order (an empty node repeats a value);
        keep_index ``[num_slots]``: kept token of each slot, -1 for unused slots at the end;
        keep_position ``[num_slots]``: position in the node + chunk index (0 for unused slots);
        cu_slots ``[n + 1]``: cumulative slots by chunk.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, device or number is wrong; on the CPU also nodes that do not cover the tokens exactly once,
            more kept tokens than ``num_slots`` and a negative chunk index.
    """
    check_tensor("nodes", nodes, ("n", "m", 2), torch.int64)
    check_that(nodes.shape[1] >= 1, "nodes", "at least 1 node for each chunk", nodes.shape[1])
    check_tensor("chunk_index", chunk_index, (nodes.shape[0],), torch.int64, nodes.device)
    check_that(slots_per_node >= 1, "slots_per_node", "at least 1", slots_per_node)
    check_that(num_tokens >= 0, "num_tokens", "at least 0", num_tokens)
    check_that(num_slots >= 0, "num_slots", "at least 0", num_slots)
    return torch.ops.sharedllm.context_tree_layout(nodes, chunk_index, slots_per_node, num_tokens, num_slots)


@torch.library.register_fake("sharedllm::context_tree_split")
def _(spans: Tensor, offset: Tensor | None) -> Tensor:
    return spans.new_empty((spans.shape[0], 2, 2))


@torch.library.register_fake("sharedllm::context_tree_select")
def _(children: Tensor, choice: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (children.shape[0], 2)
    return children.new_empty(shape), children.new_empty(shape)


@torch.library.register_fake("sharedllm::context_tree_layout")
def _(
    nodes: Tensor, chunk_index: Tensor, slots_per_node: int, num_tokens: int, num_slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    chunks, m, _ = nodes.shape
    sizes = (num_tokens, chunks * m + 1, num_slots, num_slots, chunks + 1)
    positions, cu_nodes, keep_index, keep_position, cu_slots = (nodes.new_empty((size,)) for size in sizes)
    return positions, cu_nodes, keep_index, keep_position, cu_slots


for _name in ("context_tree_split", "context_tree_select", "context_tree_layout"):
    if _name not in _library.cuda_kernels():
        torch.library.impl(f"sharedllm::{_name}", "CUDA", getattr(reference, _name))

"""The context tree: chunks split level by level, and which of their nodes are retained."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import context_tree_select, context_tree_split, split_offsets, topk_nodes, tree_node_vectors
from .chunks import Chunk
from .families import sliding_window
from .layer_math import Products
from .lower_model import (
    Embedded,
    Layer,
    LowerModel,
    finish,
    last_token,
    last_token_vectors,
    project,
    project_embeddings,
)
from .managed_layers import call_layer
from .rotary import LayerTables
from .upload import upload


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """Sizes of the context tree."""

    depth: int
    slots_per_node: int
    split_noise: float = 0.0
    # whether a slot is its stride's last token; the first one, as published, leaves a node's last tokens unread
    slots_at_end: bool = False


class ContextTree(NamedTuple):
    """The tree of consecutive chunks.

    Attributes:
        nodes: ``[n, depth + 1, 2]`` int64 retained nodes in slot order, (start, length) in the packed tokens.
        similarity: ``[n, depth - 1, 2]`` cosine similarity of left and right child at each level, -inf for an empty
            child; ``None`` without a query.
    """

    nodes: Tensor
    similarity: Tensor | None


def nodes_of_levels(roots: Tensor, levels: int) -> list[Tensor]:
    """All nodes of each level below the roots ``[n, 2]``, split in halves: ``[n, 2^l, 2]`` for ``l = 1 … levels``."""
    nodes, found = roots, []
    for level in range(1, levels + 1):
        nodes = context_tree_split(nodes).flatten(0, 1)
        found.append(nodes.view(roots.shape[0], 2**level, 2))
    return found


def kept_tokens(chunks: Sequence[Chunk], shape: TreeShape, tree: ContextTree) -> list[int]:
    """Tokens that every retained node keeps, in slot order; waits for the device only if they depend on the choice."""
    per_chunk, slots = shape.depth + 1, shape.slots_per_node
    if shape.split_noise == 0 and all(chunk.length >> shape.depth >= slots for chunk in chunks):
        # no node is shorter than what it keeps
        return [slots] * (per_chunk * len(chunks))
    if shape.split_noise == 0 and all(chunk.length % 2**shape.depth == 0 for chunk in chunks):
        # both children of every node are equally long: the lengths do not depend on the choice
        halves = [2**shape.depth] + [2**level for level in range(shape.depth, 0, -1)]
        return [min(chunk.length // half, slots) for chunk in chunks for half in halves]
    return tree.nodes[..., 1].flatten().clamp(max=slots).tolist()


def grow_tree(
    model: LowerModel,
    embedded: Embedded,
    chunks: Sequence[Chunk],
    shape: TreeShape,
    tables: LayerTables,
    query: Tensor | None,
    has_query: Sequence[bool] | None,
    generator: torch.Generator | None = None,
) -> ContextTree:
    """Split every chunk level by level and retain the children that are not picked.

    Arguments as for :func:`compress_chunks`; ``embedded`` are the chunks' tokens.
    """
    device, count, noise = embedded.embeddings.device, len(chunks), shape.split_noise
    roots = torch.tensor([(chunk.start - chunks[0].start, chunk.length) for chunk in chunks], dtype=torch.int64)
    similarity: list[Tensor] = []

    def grow(spans: Tensor, choose: Callable[[Tensor], Tensor] | None) -> Tensor:
        retained = []
        for _ in range(shape.depth - 1):
            offset = split_offsets(count, noise, device=spans.device, generator=generator) if noise > 0 else None
            children = context_tree_split(spans, offset)
            spans, other = context_tree_select(children, None if choose is None else choose(children))
            retained.append(other)
        leaves = context_tree_split(spans)
        return torch.stack((leaves[:, 0], leaves[:, 1], *reversed(retained)), 1)

    if query is None:
        nodes = grow(roots, None)
        return ContextTree(upload(nodes, device), None)

    spans = upload(roots, device)
    document = upload(torch.tensor([chunk.document for chunk in chunks], dtype=torch.int64), device)
    siblings = torch.arange(count + 1, device=device) * 2
    counts = None
    if has_query is not None and not all(has_query):
        counts = upload(torch.tensor([has_query[chunk.document] for chunk in chunks]), device)
    candidates = None
    if _reads_once(model, chunks, shape, tables, device):
        with torch.no_grad():
            candidates = _attend_to_candidates(model, embedded, spans, shape.depth - 1, tables)

    def choose(children: Tensor) -> Tensor:
        if candidates is None:
            vectors = last_token_vectors(model, embedded, children.flatten(0, 1), tables)
        else:
            vectors = _candidate_vectors(model, embedded, candidates, children)
        valid = (children[..., 1] > 0).flatten()
        best, scores = topk_nodes(query.to(vectors.dtype), vectors, siblings, document, 2, valid)
        choice = best[:, 0] - siblings[:-1]
        similarity.append(torch.where((choice == 0).unsqueeze(1), scores, scores.flip(1)))
        return choice if counts is None else torch.where(counts, choice, 1)

    with torch.no_grad():
        nodes = grow(spans, choose)
    levels = torch.stack(similarity, 1) if similarity else None
    return ContextTree(nodes, levels)


@torch.no_grad()
def choose_nodes(model: LowerModel, embeddings: Tensor, *arguments: Any) -> ContextTree:
    """:func:`grow_tree` of embeddings ``[T, d]``, wherever layer 0 has its parameters."""

    def grow(layer: Layer, hidden: Tensor) -> ContextTree:
        inside = LowerModel(model.embed_tokens, [layer], model.norm)
        return grow_tree(inside, project_embeddings(inside, hidden), *arguments)

    # reentrant checkpointing converts it to a plain tuple
    return ContextTree(*call_layer(model.layers[0], grow, embeddings))


def vectors_of_levels(
    model: LowerModel,
    embedded: Embedded,
    chunks: Sequence[Chunk],
    shape: TreeShape,
    tables: LayerTables,
    nodes: Sequence[Tensor],
) -> list[Tensor]:
    """Vectors of all nodes that could be picked, as :func:`grow_tree` computes them.

    Args:
        model, embedded, chunks, shape, tables: as for :func:`grow_tree`.
        nodes: ``[n, 2^l, 2]`` those of levels ``l = 1 … depth - 1``.

    Returns:
        ``[n * 2^l, d]`` for each level.
    """
    if not _reads_once(model, chunks, shape, tables, embedded.embeddings.device):
        return [last_token_vectors(model, embedded, level.flatten(0, 1), tables) for level in nodes]
    roots = torch.stack((nodes[0][:, 0, 0], nodes[0][..., 1].sum(1)), 1)
    candidates = _attend_to_candidates(model, embedded, roots, len(nodes), tables)
    sizes = [level.shape[1] for level in nodes]
    return [
        _vectors(model, embedded, level.flatten(0, 1), attended.flatten(0, 1))
        for level, attended in zip(nodes, candidates.attended.split(sizes, 1), strict=True)
    ]


def _reads_once(
    model: LowerModel, chunks: Sequence[Chunk], shape: TreeShape, tables: LayerTables, device: torch.device
) -> bool:
    """Whether to compute the attention of every node that could be picked in one pass over keys and values.

    That takes one read of keys and values instead of up to two, but as many queries as there are leaves: from five
    levels on their projections cost more than the reads. The CPU is bound by arithmetic, which this increases.
    Noisy splits are not halves, and a window that cuts a node off would have to cut the shared read, too.
    """
    longest = max(chunk.length for chunk in chunks)
    half = longest - longest // 2
    window = sliding_window(model.layers[0])
    fits = half <= tables.of(model.layers[0])[0].shape[0] and (window is None or half <= window)
    return device.type == "cuda" and 2 <= shape.depth - 1 <= 4 and shape.split_noise == 0 and fits


class _Candidates(NamedTuple):
    """Every node that could be picked, and layer 0's attention at its last token.

    Attributes:
        nodes: ``[n, c, 2]`` int64, (start, length).
        attended: ``[n, c, Hq, D]``.
    """

    nodes: Tensor
    attended: Tensor


def _attend_to_candidates(
    model: LowerModel, embedded: Embedded, roots: Tensor, levels: int, tables: LayerTables
) -> _Candidates:
    layer = model.layers[0]
    nodes = nodes_of_levels(roots, levels)
    query = project(layer, embedded.normed.index_select(0, last_token(nodes[-1]).flatten()), "q")
    query = query.unflatten(0, nodes[-1].shape[:2])
    scale = layer.self_attn.scaling
    attended = tree_node_vectors(query, embedded.key, embedded.value, roots, *tables.of(layer), levels, scale=scale)
    return _Candidates(torch.cat(nodes, 1), attended)


def _candidate_vectors(model: LowerModel, embedded: Embedded, candidates: _Candidates, spans: Tensor) -> Tensor:
    """:func:`last_token_vectors` of ``[n, m, 2]`` spans that are candidates, ``m`` of each chunk."""
    # equal spans have equal vectors, so the first match is enough
    same = (spans.unsqueeze(2) == candidates.nodes.unsqueeze(1)).all(-1)
    index = same.to(torch.uint8).argmax(-1)
    row = index + torch.arange(spans.shape[0], device=spans.device).unsqueeze(1) * candidates.nodes.shape[1]
    # index_select copies whole rows, several times as fast as indexing
    attended = candidates.attended.flatten(0, 1).index_select(0, row.flatten())
    return _vectors(model, embedded, spans.flatten(0, 1), attended)


def _vectors(model: LowerModel, embedded: Embedded, spans: Tensor, attended: Tensor) -> Tensor:
    """Vectors ``[N, d]`` of spans ``[N, 2]`` from layer 0's attention at their last tokens ``[N, Hq, D]``."""
    hidden = embedded.embeddings.index_select(0, last_token(spans))
    return model.norm(finish(model.layers[0], hidden, attended.flatten(1), Products()))

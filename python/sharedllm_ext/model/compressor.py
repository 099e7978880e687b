"""The compressor: from packed context tokens to the keys and values of the context memory.

Everything here works on packed tokens, ``[T, …]`` without padding: the retained nodes of a chunk cover its tokens
exactly once, so the packed order is the text's own.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..ops import (
    chunk_compression,
    context_tree_layout,
    context_tree_select,
    context_tree_split,
    node_vectors,
    split_offsets,
    topk_nodes,
    tree_node_vectors,
)
from .stopwatch import Stopwatch

Tables = tuple[Tensor, Tensor]
# a Transformers decoder layer, whose submodules nn.Module's typing does not know
Layer = Any


class LowerModel(NamedTuple):
    """The compressor's modules: the embedding, the lowest layers, the final norm."""

    embed_tokens: Any
    layers: Sequence[Layer]
    norm: Any


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """Sizes of the context tree."""

    depth: int
    slots_per_node: int
    split_noise: float = 0.0


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One chunk of a document: its document, index in the document and first token and length in the packed context."""

    document: int
    index: int
    start: int
    length: int


def cut_into_chunks(lengths: Sequence[int], chunk_size: int) -> list[Chunk]:
    """Chunks of packed documents of the given lengths, in order; the last chunk of a document may be short."""
    chunks, first = [], 0
    for document, length in enumerate(lengths):
        chunks += [
            Chunk(document, index, first + begin, min(chunk_size, length - begin))
            for index, begin in enumerate(range(0, length, chunk_size))
        ]
        first += length
    return chunks


def micro_batches(chunks: Sequence[Chunk], tokens: int) -> Iterator[list[Chunk]]:
    """Runs of consecutive chunks of at most ``tokens`` tokens, at least one chunk each."""
    batch: list[Chunk] = []
    total = 0
    for chunk in chunks:
        if batch and total + chunk.length > tokens:
            yield batch
            batch, total = [], 0
        batch.append(chunk)
        total += chunk.length
    if batch:
        yield batch


def project(layer: Layer, normed: Tensor, name: str) -> Tensor:
    """One of the layer's query, key or value projections, with the family's norm on it: ``[T, heads, D]``."""
    attention = layer.self_attn
    out = getattr(attention, f"{name}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)
    return out if norm is None else norm(out)


def sliding_window(layer: Layer) -> int | None:
    """Tokens that a query of this layer may look back on, itself included; ``None`` without a limit."""
    attention = layer.self_attn
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return attention.config.sliding_window if attention.config.model_type == "mistral" else None


class Embedded(NamedTuple):
    """Layer 0 up to its key and value projections, which depend on the token alone.

    Attributes:
        embeddings, normed: ``[T, d]``, before and after the layer's first norm.
        key, value: ``[T, Hkv, D]``, not rotated.
    """

    embeddings: Tensor
    normed: Tensor
    key: Tensor
    value: Tensor


def embed(model: LowerModel, ids: Tensor) -> Embedded:
    """Embed tokens ``[T]`` and project layer 0's keys and values."""
    layer = model.layers[0]
    embeddings = model.embed_tokens(ids)
    normed = layer.input_layernorm(embeddings)
    return Embedded(embeddings, normed, project(layer, normed, "k"), project(layer, normed, "v"))


def last_token_vectors(model: LowerModel, embedded: Embedded, spans: Tensor, tables: Tables) -> Tensor:
    """Final-norm output of layer 0 at the last token of each span, positions counted from the span's start.

    Only the last token's query, attention output and MLP are computed; keys and values are shared by all spans.

    Args:
        embedded: the tokens.
        spans: ``[N, 2]`` int64, (start, length).

    Returns:
        ``[N, d]``.
    """
    layer = model.layers[0]
    start, length = spans.unbind(-1)
    window = sliding_window(layer)
    if window is not None:
        # rotary positions are relative, so dropping what lies outside the window changes nothing else
        visible = length.clamp(max=window)
        spans = torch.stack((start + length - visible, visible), -1)
    last = _last_token(spans)
    hidden = embedded.embeddings.index_select(0, last)
    query = project(layer, embedded.normed.index_select(0, last), "q")
    attended = node_vectors(query, embedded.key, embedded.value, spans, *tables, layer.self_attn.scaling)
    return model.norm(_finish(layer, hidden, attended))


def query_vectors(model: LowerModel, ids: Tensor, lengths: Sequence[int], tables: Tables) -> Tensor:
    """Query vector of each row: layer 0 of the decoder, without injection, at the row's last token.

    Args:
        ids: ``[T]`` packed query tokens of all rows.
        lengths: tokens of each row.

    Returns:
        ``[B, d]``.
    """
    sizes = torch.tensor(lengths, dtype=torch.int64)
    spans = torch.stack((sizes.cumsum(0) - sizes, sizes), -1).to(ids.device)
    return last_token_vectors(model, embed(model, ids), spans, tables)


def compress_chunks(
    model: LowerModel,
    ids: Tensor,
    chunks: Sequence[Chunk],
    shape: TreeShape,
    tables: Tables,
    query: Tensor | None,
    has_query: Sequence[bool] | None,
    generator: torch.Generator | None = None,
    checkpointing: bool = False,
    watch: Stopwatch | None = None,
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Compress consecutive chunks.

    Args:
        model: the lower model of ``M`` layers.
        ids: ``[T]`` the chunks' tokens.
        chunks: where each chunk lies; ``chunks[0].start`` is the packed position of ``ids[0]``.
        shape: the tree.
        tables: cos and sin, ``[P, R/2]``.
        query: ``[documents, d]`` query vectors, or ``None`` for the fixed policy (always the right child).
        has_query: for each document, whether its query counts; documents without one use the fixed policy.
        generator: source of the split noise.
        checkpointing: recompute the layers in the backward pass.
        watch: told when the choice of nodes is over.

    Returns:
        keys and values, ``M`` tensors ``[S, Hkv, D]`` each; slots of each chunk.
    """
    device = ids.device
    embedded = embed(model, ids)
    if watch is not None:
        watch.lap("compress")
    tree = grow_tree(model, embedded, chunks, shape, tables, query, has_query, generator)
    if watch is not None:
        watch.lap("retrieve")
    chunk_index = torch.tensor([chunk.index for chunk in chunks], dtype=torch.int64, device=device)
    kept = [min(length, shape.slots_per_node) for length in tree.lengths]
    num_slots = sum(kept)
    positions, _, keep_index, keep_position, _ = context_tree_layout(
        tree.nodes, chunk_index, shape.slots_per_node, ids.numel(), num_slots
    )
    groups = _group_nodes(tree.nodes.flatten(0, 1), tree.lengths, kept, device)
    keys, values = [], []

    def keep(key: Tensor, value: Tensor, query: Tensor | None, query_positions: Tensor | None) -> tuple[Tensor, Tensor]:
        rotated_query, rotated_key, memory_key, memory_value = chunk_compression(
            query, key, value, *tables, query_positions, positions, keep_index, keep_position
        )
        keys.append(memory_key)
        values.append(memory_value)
        return rotated_query, rotated_key

    hidden, normed, key, value = embedded
    for index, layer in enumerate(model.layers):
        remaining = len(model.layers) - index - 1
        if remaining == 0:
            # the last layer's keys and values are needed at the kept positions only
            if index == 0:
                key, value = key[keep_index], value[keep_index]
            else:
                normed = layer.input_layernorm(hidden)
                key, value = project(layer, normed, "k"), project(layer, normed, "v")
            every = torch.arange(num_slots, device=device)
            _, _, memory_key, memory_value = chunk_compression(
                None, key, value, *tables, None, None, every, keep_position
            )
            keys.append(memory_key)
            values.append(memory_value)
            continue
        if index > 0:
            normed = layer.input_layernorm(hidden)
            key, value = project(layer, normed, "k"), project(layer, normed, "v")
        only_kept = remaining == 1
        if only_kept:
            # the layer below the last one needs its output at the kept positions only
            hidden, normed = hidden[keep_index], normed[keep_index]
        where = positions[keep_index] if only_kept else positions
        rotated_query, rotated_key = keep(key, value, project(layer, normed, "q"), where)
        finish = _attend_and_finish
        if checkpointing and torch.is_grad_enabled():
            hidden = checkpoint(
                finish, layer, hidden, rotated_query, rotated_key, value, groups, only_kept, use_reentrant=False
            )
        else:
            hidden = finish(layer, hidden, rotated_query, rotated_key, value, groups, only_kept)
    per_chunk = shape.depth + 1
    slots = [sum(kept[i : i + per_chunk]) for i in range(0, len(kept), per_chunk)]
    return keys, values, slots


class ContextTree(NamedTuple):
    """The tree of consecutive chunks.

    Attributes:
        nodes: ``[n, depth + 1, 2]`` int64 retained nodes in slot order, (start, length) in the packed tokens.
        lengths: the nodes' lengths, on the host.
        similarity: ``[n, depth - 1, 2]`` cosine similarity of left and right child at each level, -inf for an empty
            child; ``None`` without a query.
    """

    nodes: Tensor
    lengths: list[int]
    similarity: Tensor | None


@dataclasses.dataclass(frozen=True)
class _NodeGroup:
    """Nodes of one length: their tokens ``[g, l]``, their slots ``[g, k]``, the kept positions in the node ``[k]``."""

    tokens: Tensor
    slots: Tensor
    kept: Tensor


def grow_tree(
    model: LowerModel,
    embedded: "Embedded",
    chunks: Sequence[Chunk],
    shape: TreeShape,
    tables: Tables,
    query: Tensor | None,
    has_query: Sequence[bool] | None,
    generator: torch.Generator | None = None,
) -> ContextTree:
    """Split every chunk level by level and retain what is not picked; arguments as for :func:`compress_chunks`."""
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
        return ContextTree(_upload(nodes, device), nodes[..., 1].flatten().tolist(), None)

    spans = _upload(roots, device)
    document = _upload(torch.tensor([chunk.document for chunk in chunks], dtype=torch.int64), device)
    siblings = torch.arange(count + 1, device=device) * 2
    counts = None
    if has_query is not None and not all(has_query):
        counts = _upload(torch.tensor([has_query[chunk.document] for chunk in chunks]), device)
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
        best, scores = topk_nodes(query, vectors, siblings, document, 2, valid)
        choice = best[:, 0] - siblings[:-1]
        similarity.append(torch.where((choice == 0).unsqueeze(1), scores, scores.flip(1)))
        return choice if counts is None else torch.where(counts, choice, 1)

    with torch.no_grad():
        nodes = grow(spans, choose)
    levels = torch.stack(similarity, 1) if similarity else None
    if noise == 0 and all(chunk.length % 2**shape.depth == 0 for chunk in chunks):
        # both children of every node are equally long: the lengths do not depend on the choice
        return ContextTree(nodes, grow(roots, None)[..., 1].flatten().tolist(), levels)
    return ContextTree(nodes, nodes[..., 1].flatten().tolist(), levels)


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor's copy on the device; from page-locked memory, so that the host does not wait for earlier work."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _reads_once(
    model: LowerModel, chunks: Sequence[Chunk], shape: TreeShape, tables: Tables, device: torch.device
) -> bool:
    """Whether to compute the attention of every node that could be picked in one pass over keys and values.

    That takes one read of keys and values instead of up to two, but as many queries as there are leaves: from five
    levels on their projections cost more than the reads. The CPU is bound by arithmetic, of which it takes more.
    Noisy splits are not halves, and a window that cuts a node off would have to cut the shared read, too.
    """
    longest = max(chunk.length for chunk in chunks)
    half = longest - longest // 2
    window = sliding_window(model.layers[0])
    fits = half <= tables[0].shape[0] and (window is None or half <= window)
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
    model: LowerModel, embedded: Embedded, roots: Tensor, levels: int, tables: Tables
) -> _Candidates:
    layer = model.layers[0]
    nodes = [roots.unsqueeze(1)]
    for _ in range(levels):
        nodes.append(context_tree_split(nodes[-1].flatten(0, 1)).reshape(roots.shape[0], -1, 2))
    query = project(layer, embedded.normed.index_select(0, _last_token(nodes[-1]).flatten()), "q")
    query = query.unflatten(0, nodes[-1].shape[:2])
    scale = layer.self_attn.scaling
    attended = tree_node_vectors(query, embedded.key, embedded.value, roots, *tables, levels, scale)
    return _Candidates(torch.cat(nodes[1:], 1), attended)


def _candidate_vectors(model: LowerModel, embedded: Embedded, candidates: _Candidates, spans: Tensor) -> Tensor:
    """:func:`last_token_vectors` of ``[n, m, 2]`` spans that are candidates, ``m`` of each chunk."""
    # equal spans have equal vectors, so the first match will do
    same = (spans.unsqueeze(2) == candidates.nodes.unsqueeze(1)).all(-1)
    index = same.to(torch.uint8).argmax(-1)
    row = index + torch.arange(spans.shape[0], device=spans.device).unsqueeze(1) * candidates.nodes.shape[1]
    # index_select copies whole rows, several times as fast as indexing
    attended = candidates.attended.flatten(0, 1).index_select(0, row.flatten())
    hidden = embedded.embeddings.index_select(0, _last_token(spans).flatten())
    return model.norm(_finish(model.layers[0], hidden, attended))


def _last_token(spans: Tensor) -> Tensor:
    return (spans.sum(-1) - 1).clamp(min=0)


def _group_nodes(nodes: Tensor, lengths: Sequence[int], kept: Sequence[int], device: torch.device) -> list[_NodeGroup]:
    by_length: dict[int, list[int]] = {}
    slot_starts, total = [], 0
    for node, (length, slots) in enumerate(zip(lengths, kept, strict=True)):
        if length:
            by_length.setdefault(length, []).append(node)
        slot_starts.append(total)
        total += slots
    groups = []
    for length, members in by_length.items():
        slots = kept[members[0]]
        node_starts = nodes[torch.tensor(members, device=device), 0]
        first_slots = torch.tensor([slot_starts[i] for i in members], device=device)
        groups.append(
            _NodeGroup(
                tokens=node_starts.unsqueeze(1) + torch.arange(length, device=device),
                slots=first_slots.unsqueeze(1) + torch.arange(slots, device=device),
                kept=torch.arange(slots, device=device) * length // slots,
            )
        )
    return groups


def _attend_and_finish(
    layer: Layer,
    hidden: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Sequence[_NodeGroup],
    only_kept: bool,
) -> Tensor:
    """Causal attention inside each node, output projection and MLP; of the kept tokens only, if asked."""
    outputs, places = [], []
    window = sliding_window(layer)
    for group in groups:
        rows = group.slots if only_kept else group.tokens
        length = group.tokens.shape[1]
        position = group.kept if only_kept else torch.arange(length, device=hidden.device)
        mask = None
        if only_kept or (window is not None and window < length):
            back = position.unsqueeze(1) - torch.arange(length, device=hidden.device)
            mask = (back >= 0) if window is None else (back >= 0) & (back < window)
        attended = F.scaled_dot_product_attention(
            query[rows].transpose(1, 2),
            key[group.tokens].transpose(1, 2),
            value[group.tokens].transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=layer.self_attn.scaling,
            enable_gqa=True,
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
        places.append(rows.flatten())
    # the groups' rows are a permutation of all rows: put them back in order
    order = torch.empty_like(all_places := torch.cat(places))
    order[all_places] = torch.arange(all_places.numel(), device=hidden.device)
    return _finish(layer, hidden, torch.cat(outputs)[order])


def _finish(layer: Layer, hidden: Tensor, attended: Tensor) -> Tensor:
    hidden = hidden + layer.self_attn.o_proj(attended.flatten(1))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

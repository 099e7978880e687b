"""The compressor: from packed context tokens to the keys and values of the context memory.

Everything here works on packed tokens, ``[T, …]`` without padding: the retained nodes of a chunk cover its tokens
exactly once, so the packed order is the text's own.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
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
from .families import attention_norm, embedding_factor, mlp_norm, mlp_width, projection, sliding_window
from .layer_math import Products, is_untouched, split_heads
from .managed_layers import call_layer, check_checkpointing, is_managed
from .rotary import LayerTables
from .stopwatch import Stopwatch

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


def micro_batch(chunks: Sequence[Chunk], first: int, tokens: int) -> Sequence[Chunk]:
    """Consecutive chunks from index ``first`` on of at most ``tokens`` tokens, at least one chunk."""
    end, total = first + 1, chunks[first].length
    while end < len(chunks) and total + chunks[end].length <= tokens:
        total += chunks[end].length
        end += 1
    return chunks[first:end]


def activation_bytes(model: LowerModel) -> int:
    """Bytes that :func:`compress_chunks` needs for each token of a micro-batch at its widest place, rounded up."""
    attention = model.layers[0].self_attn
    query, key = projection(attention, "q"), projection(attention, "k")
    hidden, width = query.in_features, query.out_features
    # gate, up and their product beside the residual stream, its norm and the attention's output; layer 0 adds what the
    # choice of nodes reads
    numbers = 5 * hidden + width + 2 * key.out_features + 3 * max(map(mlp_width, model.layers))
    return numbers * model.embed_tokens.weight.element_size()


def project(layer: Layer, normed: Any, name: str, products: Products | None = None) -> Tensor:
    """One of the layer's query, key or value projections, with the family's norm on it: ``[T, heads, D]``."""
    module = projection(layer.self_attn, name)
    out = module(normed) if products is None else products.linear(module, normed)
    return split_heads(layer.self_attn, out, name)


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


def embed_tokens(model: LowerModel, ids: Tensor) -> Tensor:
    """Embed tokens ``[T]``: ``[T, d]``, nobody else's."""
    # a row of tokens, as hooks of an embedding know it
    embeddings = model.embed_tokens(ids.unsqueeze(0)).squeeze(0)
    scaled = _scaled(model, embeddings)
    # a hook may have kept what the layers' sums will overwrite
    return scaled if scaled is not embeddings or is_untouched(model.embed_tokens) else embeddings.clone()


def _scaled(model: LowerModel, embeddings: Tensor) -> Tensor:
    """Embeddings as the first layer takes them."""
    factor = embedding_factor(model.layers[0])
    return embeddings if factor == 1.0 else embeddings * factor


def project_embeddings(model: LowerModel, embeddings: Tensor) -> Embedded:
    """Layer 0's keys and values of embeddings ``[T, d]``."""
    layer = model.layers[0]
    normed = attention_norm(layer)(embeddings)
    return Embedded(embeddings, normed, project(layer, normed, "k"), project(layer, normed, "v"))


def embed(model: LowerModel, ids: Tensor) -> Embedded:
    """Embed tokens ``[T]`` and project layer 0's keys and values."""
    return project_embeddings(model, embed_tokens(model, ids))


def last_token_vectors(model: LowerModel, embedded: Embedded, spans: Tensor, tables: LayerTables) -> Tensor:
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
    attended = node_vectors(
        query, embedded.key, embedded.value, spans, *tables.of(layer), scale=layer.self_attn.scaling
    )
    return model.norm(_finish(layer, hidden, attended.flatten(1), Products()))


@torch.no_grad()
def query_vectors(model: LowerModel, ids: Tensor, lengths: Sequence[int], tables: LayerTables) -> Tensor:
    """Query vector of each row: layer 0 of the decoder, without injection, at the row's last token.

    Args:
        ids: ``[T]`` packed query tokens of all rows, or ``[T, d]`` their embeddings.
        lengths: tokens of each row.

    Returns:
        ``[B, d]``.
    """
    sizes = torch.tensor(lengths, dtype=torch.int64)
    spans = upload(torch.stack((sizes.cumsum(0) - sizes, sizes), -1), ids.device)

    def vectors(layer: Layer, embeddings: Tensor) -> Tensor:
        inside = LowerModel(model.embed_tokens, [layer], model.norm)
        return last_token_vectors(inside, project_embeddings(inside, embeddings), spans, tables)

    given = None if ids.dim() == 1 else ids.to(model.norm.weight.dtype)
    embeddings = embed_tokens(model, ids) if given is None else _scaled(model, given)
    return call_layer(model.layers[0], vectors, embeddings)


def compress_chunks(
    model: LowerModel,
    ids: Tensor,
    chunks: Sequence[Chunk],
    shape: TreeShape,
    tables: LayerTables,
    query: Tensor | None,
    has_query: Sequence[bool] | None,
    generator: torch.Generator | None = None,
    checkpointing: bool = False,
    watch: Stopwatch | None = None,
    products: Products | None = None,
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Compress consecutive chunks.

    Args:
        model: the lower model of ``M`` layers.
        ids: ``[T]`` the chunks' tokens.
        chunks: where each chunk lies; ``chunks[0].start`` is the packed position of ``ids[0]``.
        shape: the tree.
        tables: cos and sin of each layer.
        query: ``[documents, d]`` query vectors, or ``None`` for the fixed policy (always the right child).
        has_query: for each document, whether its query counts; documents without one use the fixed policy.
        generator: source of the split noise.
        checkpointing: recompute the layers in the backward pass.
        watch: told when the choice of nodes is over.
        products: how the layers' products are computed; default: in the weights' dtype.

    Returns:
        keys and values, ``M`` tensors ``[S, Hkv, D]`` each; slots of each chunk.
    """
    device = ids.device
    managed = any(is_managed(layer) for layer in model.layers)
    if managed and torch.is_grad_enabled():
        check_checkpointing(model.layers[0])
    embeddings = embed_tokens(model, ids)
    # what a managed layer computes in another call is not worth keeping sharded parameters for
    first = [] if managed else [project_embeddings(model, embeddings)]
    if watch is not None:
        watch.lap("compress")
    if first:
        tree = grow_tree(model, first[0], chunks, shape, tables, query, has_query, generator)
    else:
        tree = choose_nodes(model, embeddings, chunks, shape, tables, query, has_query, generator)
    if watch is not None:
        watch.lap("retrieve")
    chunk_index = upload(torch.tensor([chunk.index for chunk in chunks], dtype=torch.int64), device)
    kept = _kept_tokens(chunks, shape, tree)
    num_slots = sum(kept)
    positions, cu_nodes, keep_index, keep_position, _ = context_tree_layout(
        tree.nodes, chunk_index, shape.slots_per_node, ids.numel(), num_slots
    )
    nodes = _Nodes(tree, positions, cu_nodes, keep_index, max(chunk.length for chunk in chunks), tables)
    packing = _Packing(
        nodes,
        positions,
        keep_index,
        keep_position,
        tables,
        Products() if products is None else products,
        checkpointing and not managed and torch.is_grad_enabled(),
    )
    keys, values = [], []
    hidden: Any = embeddings
    del embeddings
    for index, layer in enumerate(model.layers):
        place = _Place(index, len(model.layers) - index - 1)
        if managed:
            step = functools.partial(_compress_layer, packing=packing, place=place)
            hidden, memory_key, memory_value = call_layer(layer, step, hidden)
        else:
            hidden, memory_key, memory_value = _compress_layer(layer, hidden, first, packing=packing, place=place)
        keys.append(memory_key)
        values.append(memory_value)
    per_chunk = shape.depth + 1
    slots = [sum(kept[i : i + per_chunk]) for i in range(0, len(kept), per_chunk)]
    return keys, values, slots


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a layer stands: its index, and how many layers of the compressor lie above it."""

    index: int
    remaining: int


@dataclasses.dataclass(frozen=True)
class _Packing:
    """What all layers of one micro-batch share; indices and positions from :func:`context_tree_layout`."""

    nodes: "_Nodes"
    positions: Tensor
    keep_index: Tensor
    keep_position: Tensor
    tables: LayerTables
    products: Products
    checkpointing: bool

    def keep(
        self, layer: Layer, query: Tensor | None, key: Tensor, value: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rotated query and key (empty without a query), and the slots' keys and values, from tokens ``index``."""
        where = None if query is None else self.positions
        tables = self.tables.of(layer)
        return chunk_compression(query, key, value, *tables, where, where, index, self.keep_position)


def _compress_layer(
    layer: Layer, hidden: Tensor, first: list[Embedded] | None = None, *, packing: _Packing, place: _Place
) -> tuple[Tensor | None, Tensor, Tensor]:
    """One layer of the compressor.

    Args:
        layer: the decoder layer.
        hidden: ``[T, d]`` its input, above layer M-2 at the kept tokens ``[S, d]``; may be overwritten.
        first: layer 0 up to its keys and values, if they are there already; taken out, so that nobody keeps them alive.
        packing, place: the micro-batch, and where the layer stands.

    Returns:
        Its output (``None`` of the last layer, which nothing reads), the slots' keys and values ``[S, Hkv, D]``.
    """
    products, keep_index = packing.products, packing.keep_index
    if not first:
        rows = products.norm(attention_norm(layer), hidden)
        key, value = project(layer, rows, "k", products), project(layer, rows, "v", products)
    else:
        _, normed, key, value = first.pop()
        rows = products.rows(normed) if place.remaining > 1 else normed
        del normed
    if place.remaining == 0:
        # keys and values of the last layer are needed at the kept positions only; above layer 0 no others are left
        kept_alone = place.index > 0
        index = torch.arange(keep_index.shape[0], device=keep_index.device) if kept_alone else keep_index
        return None, *packing.keep(layer, None, key, value, index)[2:]
    if place.remaining == 1:
        # the layer below the last one needs its output at the kept positions only
        _, _, memory_key, memory_value = packing.keep(layer, None, key, value, keep_index)
        hidden = hidden.index_select(0, keep_index)
        query = project(layer, products.norm(attention_norm(layer), hidden), "q", products)
        attend = packing.nodes.attend_from_kept
    else:
        query = project(layer, rows, "q", products)
        query, key, memory_key, memory_value = packing.keep(layer, query, key, value, keep_index)
        attend = packing.nodes.attend
    if packing.checkpointing:
        arguments = (attend, layer, hidden, query, key, value, products)
        return checkpoint(_attend_and_finish, *arguments, use_reentrant=False), memory_key, memory_value
    attended = attend(layer, query, key, value)
    # room for the MLP
    del rows, query, key, value
    return _finish(layer, hidden, attended, products), memory_key, memory_value


class ContextTree(NamedTuple):
    """The tree of consecutive chunks.

    Attributes:
        nodes: ``[n, depth + 1, 2]`` int64 retained nodes in slot order, (start, length) in the packed tokens.
        similarity: ``[n, depth - 1, 2]`` cosine similarity of left and right child at each level, -inf for an empty
            child; ``None`` without a query.
    """

    nodes: Tensor
    similarity: Tensor | None


def _kept_tokens(chunks: Sequence[Chunk], shape: TreeShape, tree: ContextTree) -> list[int]:
    """Tokens that every retained node keeps, in slot order; waits for the device only where the choice decides."""
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
    """Split every chunk level by level and retain what is not picked.

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

    # reentrant checkpointing makes a plain tuple of it
    return ContextTree(*call_layer(model.layers[0], grow, embeddings))


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor's copy on the device; from page-locked memory, so that the host does not wait for earlier work."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def _reads_once(
    model: LowerModel, chunks: Sequence[Chunk], shape: TreeShape, tables: LayerTables, device: torch.device
) -> bool:
    """Whether to compute the attention of every node that could be picked in one pass over keys and values.

    That takes one read of keys and values instead of up to two, but as many queries as there are leaves: from five
    levels on their projections cost more than the reads. The CPU is bound by arithmetic, of which it takes more.
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
    nodes = [roots.unsqueeze(1)]
    for _ in range(levels):
        nodes.append(context_tree_split(nodes[-1].flatten(0, 1)).reshape(roots.shape[0], -1, 2))
    query = project(layer, embedded.normed.index_select(0, _last_token(nodes[-1]).flatten()), "q")
    query = query.unflatten(0, nodes[-1].shape[:2])
    scale = layer.self_attn.scaling
    attended = tree_node_vectors(query, embedded.key, embedded.value, roots, *tables.of(layer), levels, scale=scale)
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
    return model.norm(_finish(model.layers[0], hidden, attended.flatten(1), Products()))


def _last_token(spans: Tensor) -> Tensor:
    return (spans.sum(-1) - 1).clamp(min=0)


class _Nodes:
    """Attention inside the retained nodes of packed tokens.

    Args:
        tree: the nodes.
        positions, cu_nodes, keep_index: from :func:`context_tree_layout`; every slot is used.
        longest: no node has more tokens.
        tables: cos and sin of each layer.
    """

    def __init__(
        self,
        tree: ContextTree,
        positions: Tensor,
        cu_nodes: Tensor,
        keep_index: Tensor,
        longest: int,
        tables: LayerTables,
    ) -> None:
        # with a single query of each node FlashAttention would fold heads into rows, which it can't for packed nodes
        self._tree, self._tables, self._longest = tree, tables, max(longest, 2)
        self._cu_nodes = cu_nodes.to(torch.int32)
        last = positions.index_select(0, keep_index)
        # a kept token sees its node from the start to itself
        self._start, self._length = keep_index - last, last + 1
        self._groups: list[Tensor] | None = None

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of every token inside its node.

        Args:
            query: ``[T, Hq, D]`` and ``key [T, Hkv, D]``, rotated by the position in the node.
            value: ``[T, Hkv, D]``.

        Returns:
            ``[T, Hq * D]``.
        """
        if _takes_packed_nodes(query):
            attended = self._attend_packed(layer, query, key, value)
        else:
            attended = self._attend_by_length(layer, query, key, value)
        return attended.flatten(1)

    def attend_from_kept(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same at the kept tokens only: ``query [S, Hq, D]`` and ``key [T, Hkv, D]`` are not rotated yet."""
        start, length = self._start, self._length
        window = sliding_window(layer)
        if window is not None:
            # rotary positions are relative, so dropping what lies outside the window changes nothing else
            visible = length.clamp(max=window)
            start, length = start + length - visible, visible
        spans = torch.stack((start, length), 1)
        return node_vectors(query, key, value, spans, *self._tables.of(layer), scale=layer.self_attn.scaling).flatten(1)

    def _attend_packed(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        window = sliding_window(layer)
        out, *_ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            self._cu_nodes,
            self._cu_nodes,
            self._longest,
            self._longest,
            0.0,
            True,
            False,
            scale=layer.self_attn.scaling,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
        )
        return out

    def _attend_by_length(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._groups is None:
            self._groups = _group_nodes(self._tree.nodes.flatten(0, 1))
        window = sliding_window(layer)
        outputs, places = [], []
        for tokens in self._groups:
            length = tokens.shape[1]
            mask = None
            if window is not None and window < length:
                position = torch.arange(length, device=query.device)
                back = position.unsqueeze(1) - position
                mask = (back >= 0) & (back < window)
            attended = F.scaled_dot_product_attention(
                query[tokens].transpose(1, 2),
                key[tokens].transpose(1, 2),
                value[tokens].transpose(1, 2),
                attn_mask=mask,
                is_causal=mask is None,
                scale=layer.self_attn.scaling,
                enable_gqa=True,
            )
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
            places.append(tokens.flatten())
        # the groups' tokens are a permutation of all tokens: put them back in order
        order = torch.empty_like(all_places := torch.cat(places))
        order[all_places] = torch.arange(all_places.numel(), device=order.device)
        return torch.cat(outputs)[order]


def _takes_packed_nodes(query: Tensor) -> bool:
    """Whether PyTorch has an attention kernel for packed sequences of different lengths here (FlashAttention-2)."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and torch.backends.cuda.is_flash_attention_available()
    )


def _group_nodes(nodes: Tensor) -> list[Tensor]:
    """Tokens ``[g, l]`` of all nodes of one length ``l``, for every length."""
    lengths = nodes[:, 1].tolist()
    by_length: dict[int, list[int]] = {}
    for node, length in enumerate(lengths):
        if length:
            by_length.setdefault(length, []).append(node)
    return [
        nodes[torch.tensor(members, device=nodes.device), 0].unsqueeze(1) + torch.arange(length, device=nodes.device)
        for length, members in by_length.items()
    ]


def _attend_and_finish(
    attend: Callable[[Layer, Tensor, Tensor, Tensor], Tensor],
    layer: Layer,
    hidden: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    products: Products,
) -> Tensor:
    return _finish(layer, hidden, attend(layer, query, key, value), products)


def _finish(layer: Layer, hidden: Tensor, attended: Tensor, products: Products) -> Tensor:
    """Output projection and MLP with their residual sums; ``hidden`` may be overwritten."""
    hidden = products.add_attention(hidden, layer, products.rows(attended))
    norm = mlp_norm(layer)
    rows = products.norm(norm, hidden)
    if not is_untouched(norm):
        # a hook may have kept what the sum would overwrite
        hidden = hidden.clone()
    return products.add_mlp(hidden, layer, rows)

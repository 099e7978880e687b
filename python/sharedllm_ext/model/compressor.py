"""The compressor: from packed context tokens to the keys and values of the context memory.

Everything here works on packed tokens, ``[T, …]`` without padding: the retained nodes of a chunk cover its tokens
exactly once, so the packed order is the text's own.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..ops import chunk_compression, context_tree_layout, node_vectors
from .chunks import Chunk
from .families import attention_norm, sliding_window
from .layer_math import Products
from .lower_model import Embedded, Layer, LowerModel, embed_tokens, finish, project, project_embeddings
from .managed_layers import call_layer, check_checkpointing, is_managed
from .rotary import LayerTables
from .stopwatch import Stopwatch
from .tree import ContextTree, TreeShape, choose_nodes, grow_tree, kept_tokens
from .upload import upload


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
        watch: stopwatch, gets a lap when the choice of nodes is over.
        products: how the layers' matmuls are computed; default: in the weights' dtype.

    Returns:
        keys and values, ``M`` tensors ``[S, Hkv, D]`` each; slots of each chunk.
    """
    managed = any(is_managed(layer) for layer in model.layers)
    if managed and torch.is_grad_enabled():
        check_checkpointing(model.layers[0])
    embeddings = embed_tokens(model, ids)
    # a managed layer's results of another call are not worth keeping sharded parameters for
    first = [] if managed else [project_embeddings(model, embeddings)]
    if watch is not None:
        watch.lap("compress")
    if first:
        tree = grow_tree(model, first[0], chunks, shape, tables, query, has_query, generator)
    else:
        tree = choose_nodes(model, embeddings, chunks, shape, tables, query, has_query, generator)
    if watch is not None:
        watch.lap("retrieve")
    kept = kept_tokens(chunks, shape, tree)
    packing = pack_nodes(
        tree,
        chunks,
        shape,
        tokens=ids.numel(),
        slots=sum(kept),
        tables=tables,
        products=Products() if products is None else products,
        checkpointing=checkpointing and not managed and torch.is_grad_enabled(),
    )
    keys, values = [], []
    hidden: Any = embeddings
    del embeddings
    for index, layer in enumerate(model.layers):
        place = Place(index, len(model.layers) - index - 1)
        if managed:
            step = functools.partial(compress_layer, packing=packing, place=place)
            hidden, memory_key, memory_value = call_layer(layer, step, hidden)
        else:
            hidden, memory_key, memory_value = compress_layer(layer, hidden, first, packing=packing, place=place)
        keys.append(memory_key)
        values.append(memory_value)
    per_chunk = shape.depth + 1
    slots = [sum(kept[i : i + per_chunk]) for i in range(0, len(kept), per_chunk)]
    return keys, values, slots


def pack_nodes(
    tree: ContextTree,
    chunks: Sequence[Chunk],
    shape: TreeShape,
    *,
    tokens: int,
    slots: int,
    tables: LayerTables,
    products: Products,
    checkpointing: bool = False,
) -> "Packing":
    """Lay out the nodes of consecutive chunks for the layers.

    Args:
        tree: nodes that hold each of the chunks' tokens once.
        chunks: the chunks.
        shape: the tree's sizes.
        tokens: of all chunks.
        slots: that the nodes keep.
        tables: cos and sin of each layer.
        products: how the layers' matmuls are computed.
        checkpointing: recompute the layers in the backward pass.
    """
    chunk_index = upload(torch.tensor([chunk.index for chunk in chunks], dtype=torch.int64), tree.nodes.device)
    positions, cu_nodes, keep_index, keep_position, _ = context_tree_layout(
        tree.nodes, chunk_index, shape.slots_per_node, tokens, slots
    )
    if shape.slots_at_end:
        keep_index, keep_position = stride_ends(keep_index, keep_position, tokens)
    nodes = _Nodes(tree, positions, cu_nodes, keep_index, max(chunk.length for chunk in chunks), tables)
    return Packing(nodes, positions, keep_index, keep_position, tables, products, checkpointing)


def stride_ends(keep_index: Tensor, keep_position: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The last token of each stride in place of its first: index and position of the slots ``[S]``, in their order.

    Nodes hold every token once and keep their first, so a stride ends where the next one of the text begins.
    """
    order = keep_index.argsort()
    ends = F.pad(keep_index[order[1:]], (0, 1), value=tokens) - 1
    index = torch.empty_like(keep_index)
    index[order] = ends.to(index.dtype)
    return index, keep_position + (index - keep_index).to(keep_position.dtype)


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer's place: its index, and how many layers of the compressor are above it."""

    index: int
    remaining: int


@dataclasses.dataclass(frozen=True)
class Packing:
    """Shared by all layers of one micro-batch; indices and positions from :func:`context_tree_layout`."""

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


def compress_layer(
    layer: Layer, hidden: Tensor, first: list[Embedded] | None = None, *, packing: Packing, place: Place
) -> tuple[Tensor | None, Tensor, Tensor]:
    """One layer of the compressor.

    Args:
        layer: the decoder layer.
        hidden: ``[T, d]`` its input, above layer M-2 at the kept tokens ``[S, d]``; may be overwritten.
        first: layer 0 up to its keys and values, if computed already; popped from the list, so that nothing keeps them
            alive.
        packing, place: the micro-batch, and the layer's place.

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
    # the layer below the last one needs its output at the kept positions only
    at_kept = place.remaining == 1
    if at_kept and not _differentiated(hidden, key, value):
        _, _, memory_key, memory_value = packing.keep(layer, None, key, value, keep_index)
        hidden = hidden.index_select(0, keep_index)
        query = project(layer, products.norm(attention_norm(layer), hidden), "q", products)
        attend = packing.nodes.attend_from_kept
    else:
        query = project(layer, rows, "q", products)
        query, key, memory_key, memory_value = packing.keep(layer, query, key, value, keep_index)
        attend = packing.nodes.attend
        if at_kept:
            # more queries, but the gradients of attention inside nodes take far less than the other kernel's
            hidden = hidden.index_select(0, keep_index)
            attend = packing.nodes.attend_and_keep
    if packing.checkpointing:
        arguments = (attend, layer, hidden, query, key, value, products)
        return checkpoint(_attend_and_finish, *arguments, use_reentrant=False), memory_key, memory_value
    attended = attend(layer, query, key, value)
    # room for the MLP
    del rows, query, key, value
    return finish(layer, hidden, attended, products), memory_key, memory_value


def _differentiated(*tensors: Tensor) -> bool:
    """Whether gradients will go through a layer with these inputs."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


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
        # with a single query per node FlashAttention would fold heads into rows, which it cannot do for packed nodes
        self._tree, self._tables, self._longest = tree, tables, max(longest, 2)
        self._keep_index = keep_index
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

    def attend_and_keep(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What :meth:`attend` gives, at the kept tokens: ``[S, Hq * D]``."""
        return self.attend(layer, query, key, value).index_select(0, self._keep_index)

    def attend_from_kept(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same from ``query [S, Hq, D]`` of the kept tokens; neither it nor ``key [T, Hkv, D]`` is rotated yet."""
        start, length = self._start, self._length
        window = sliding_window(layer)
        if window is not None:
            # rotary positions are relative, so dropping tokens outside the window changes nothing else
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
    return finish(layer, hidden, attend(layer, query, key, value), products)

"""Every node of a chunk, whichever of them a question retains: their vectors, and what the slots of each level keep.

A node is compressed by itself, so its slots do not depend on which other nodes are retained. The nodes of one level
hold each token once, as the retained nodes do: every level is compressed like a chunk whose nodes are its own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .chunks import Chunk
from .compressor import Packing, Place, compress_layer, pack_nodes
from .layer_math import Products
from .lower_model import Embedded, Layer, LowerModel, activation_bytes, embed_tokens, project_embeddings
from .managed_layers import call_layer, is_managed
from .rotary import LayerTables
from .tree import ContextTree, TreeShape, nodes_of_levels, vectors_of_levels
from .upload import upload

# takes a layer, a level, and the keys and values of that level's slots
Write = Callable[[int, int, Tensor, Tensor], None]


class NodeTable(NamedTuple):
    """All nodes of some chunks, level by level below the chunks, and in a level from left to right.

    The children of the first level are nodes ``0 … 2n - 1``; those of node ``p`` are ``2 (p + n)`` and the next one.

    Attributes:
        spans: for each level ``l = 1 … depth`` its nodes ``[n, 2^l, 2]`` int64, (start, length) in the packed tokens.
        slots: ``[N, 2]`` int64, first slot and slots of every node.
    """

    spans: list[Tensor]
    slots: Tensor

    @classmethod
    def of(cls, chunks: Sequence[Chunk], shape: TreeShape) -> "NodeTable":
        """The nodes of consecutive chunks, on the CPU."""
        first = chunks[0].start if chunks else 0
        rows = [(chunk.start - first, chunk.length) for chunk in chunks]
        spans = nodes_of_levels(torch.tensor(rows, dtype=torch.int64).view(-1, 2), shape.depth)
        kept = torch.cat([level[..., 1].flatten() for level in spans]).clamp(max=shape.slots_per_node)
        return cls(spans, torch.stack((kept.cumsum(0) - kept, kept), 1))

    def slots_of_levels(self) -> list[int]:
        """Slots of each level."""
        return [int(part[:, 1].sum()) for part in self.slots.split([span[..., 0].numel() for span in self.spans])]


def level_bytes(model: LowerModel, depth: int) -> int:
    """Peak bytes that :func:`compress_levels` needs for each token of a micro-batch, rounded up."""
    # every level has a residual stream of its own
    embedding = model.embed_tokens.weight
    return activation_bytes(model) + (depth + 1) * embedding.shape[-1] * embedding.element_size()


@torch.no_grad()
def compress_levels(
    model: LowerModel,
    ids: Tensor,
    chunks: Sequence[Chunk],
    shape: TreeShape,
    tables: LayerTables,
    products: Products,
    write: Write,
) -> list[Tensor]:
    """Compress all nodes of consecutive chunks.

    Args:
        model: the lower model.
        ids: ``[T]`` the chunks' tokens.
        chunks, shape, tables, products: as for :func:`compress_chunks`.
        write: called with keys and values ``[S, Hkv, D]`` of each layer and level, slots in the text's order.

    Returns:
        For each level that a question chooses from, the nodes' vectors ``[n * 2^l, d]``.
    """
    table = NodeTable.of(chunks, shape)
    spans = [upload(level, ids.device) for level in table.spans]
    packings = [
        pack_nodes(
            ContextTree(level, None), chunks, shape, tokens=ids.numel(), slots=slots, tables=tables, products=products
        )
        for level, slots in zip(spans, table.slots_of_levels(), strict=True)
    ]

    def first_layer(layer: Layer, embeddings: Tensor) -> tuple[list[Tensor], list[_Output]]:
        inside = LowerModel(model.embed_tokens, [layer], model.norm)
        embedded = project_embeddings(inside, embeddings)
        vectors = vectors_of_levels(inside, embedded, chunks, shape, tables, spans[:-1])
        place = Place(0, len(model.layers) - 1)
        return vectors, _compress_layer(layer, [embeddings] * shape.depth, packings, place, embedded)

    # layer 0 up to its keys and values depends on the token alone: all levels and their vectors share it
    vectors, outputs = call_layer(model.layers[0], first_layer, embed_tokens(model, ids))
    for index in range(len(model.layers)):
        if index:
            layer, place = model.layers[index], Place(index, len(model.layers) - 1 - index)
            hidden = [output[0] for output in outputs]
            del outputs
            if is_managed(layer):
                step = functools.partial(
                    _compress_rows, sizes=[rows.shape[0] for rows in hidden], packings=packings, place=place
                )
                # the call of a layer hands on one tensor
                outputs = call_layer(layer, step, torch.cat(hidden))
            else:
                outputs = _compress_layer(layer, hidden, packings, place)
            del hidden
        for level, (_, key, value) in enumerate(outputs):
            write(index, level, key, value)
    return vectors


# the layer's output for each token, and its slots' keys and values
_Output = tuple[Tensor | None, Tensor, Tensor]


def _compress_rows(
    layer: Layer, hidden: Tensor, sizes: list[int], packings: Sequence[Packing], place: Place
) -> list[_Output]:
    """:func:`_compress_layer` of all levels' rows, one level after the other."""
    return _compress_layer(layer, list(hidden.split(sizes)), packings, place)


def _compress_layer(
    layer: Layer, hidden: list[Tensor], packings: Sequence[Packing], place: Place, embedded: Embedded | None = None
) -> list[_Output]:
    """One layer for all levels; ``embedded`` is layer 0 up to its keys and values."""
    outputs = []
    for level, packing in enumerate(packings):
        rows, last = hidden[level], level + 1 == len(packings)
        if embedded is not None and not last:
            # the layer's sums may overwrite what the next level reads
            rows = rows.clone()
        first = None if embedded is None else [embedded]
        outputs.append(compress_layer(layer, rows, first, packing=packing, place=place))
    return outputs

"""The compressor's modules, and computations with them on packed tokens ``[T, …]`` without padding."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import node_vectors
from .families import attention_norm, embedding_factor, mlp_norm, mlp_width, projection, sliding_window
from .hooks import is_untouched
from .layer_math import Products, split_heads
from .managed_layers import call_layer
from .rotary import LayerTables
from .upload import upload

# a Transformers decoder layer; nn.Module's types do not include its submodules
Layer = Any


class LowerModel(NamedTuple):
    """The compressor's modules: the embedding, the lowest layers, the final norm."""

    embed_tokens: Any
    layers: Sequence[Layer]
    norm: Any


def activation_bytes(model: LowerModel) -> int:
    """Peak bytes that :func:`compress_chunks` needs for each token of a micro-batch, rounded up."""
    attention = model.layers[0].self_attn
    query, key = projection(attention, "q"), projection(attention, "k")
    hidden, width = query.in_features, query.out_features
    # gate, up and their product, with the residual stream, its norm and the attention's output; layer 0 adds what the
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
    """Embed tokens ``[T]``: ``[T, d]``, which may be overwritten."""
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
        # rotary positions are relative, so dropping tokens outside the window changes nothing else
        visible = length.clamp(max=window)
        spans = torch.stack((start + length - visible, visible), -1)
    last = last_token(spans)
    hidden = embedded.embeddings.index_select(0, last)
    query = project(layer, embedded.normed.index_select(0, last), "q")
    attended = node_vectors(
        query, embedded.key, embedded.value, spans, *tables.of(layer), scale=layer.self_attn.scaling
    )
    return model.norm(finish(layer, hidden, attended.flatten(1), Products()))


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


def finish(layer: Layer, hidden: Tensor, attended: Tensor, products: Products) -> Tensor:
    """Output projection and MLP with their residual sums; ``hidden`` may be overwritten."""
    hidden = products.add_attention(hidden, layer, products.rows(attended))
    norm = mlp_norm(layer)
    rows = products.norm(norm, hidden)
    if not is_untouched(norm):
        # a hook may have kept what the sum would overwrite
        hidden = hidden.clone()
    return products.add_mlp(hidden, layer, rows)


def last_token(spans: Tensor) -> Tensor:
    """Last token of spans ``[…, 2]`` (start, length), ``[…]``; the first one of an empty span."""
    return (spans.sum(-1) - 1).clamp(min=0)

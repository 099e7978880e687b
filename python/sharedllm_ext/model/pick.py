"""The pick: which segments of a compressed context answer a question, by trained queries over its memory."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import context_tree_layout, context_tree_select, context_tree_split
from .compressor import stride_ends
from .families import attention_norm, projection
from .layer_math import linear_weight
from .rotary import Tables
from .word_index import Run

# numbers of one block of attention scores
_BLOCK = 1 << 26


class SlotPlaces(NamedTuple):
    """Where the slots of a document stand: ``[S]`` int64 each, in the memory's order.

    Attributes:
        token: the token of the document that a slot keeps.
        position: what its key is rotated by, the position in its node plus the chunk's index.
    """

    token: Tensor
    position: Tensor


def slot_places(length: int, config: Any) -> SlotPlaces:
    """The slots of a document of ``length`` tokens, compressed without a query."""
    tokens, positions = [], []
    for index, start in enumerate(range(0, length, config.chunk_size)):
        token, position = _places_in_chunk(
            min(config.chunk_size, length - start),
            config.chunk_size,
            config.tree_depth,
            config.slots_per_node,
            config.slot_position == "end",
        )
        tokens.append(token + start)
        positions.append(position + index)
    if not tokens:
        return SlotPlaces(*torch.empty((2, 0), dtype=torch.int64))
    return SlotPlaces(torch.cat(tokens), torch.cat(positions))


@functools.lru_cache(maxsize=64)
def _places_in_chunk(length: int, size: int, depth: int, slots: int, at_end: bool) -> tuple[Tensor, Tensor]:
    spans, retained = torch.tensor([[0, length]]), []
    for _ in range(depth - 1):
        spans, other = context_tree_select(context_tree_split(spans))
        retained.append(other)
    leaves = context_tree_split(spans)
    nodes = torch.stack((leaves[:, 0], leaves[:, 1], *reversed(retained)), 1)
    count = int(nodes[..., 1].clamp(max=slots).sum())
    _, _, index, position, _ = context_tree_layout(nodes, torch.tensor([0]), slots, length, count)
    if at_end:
        index, position = stride_ends(index, position, length)
    return index.long(), position.long()


def unrotated(keys: Tensor, tables: Tables, positions: Tensor) -> Tensor:
    """Keys ``[S, Hkv, D]`` before their rotation by ``positions [S]``; ``tables`` are cos and sin ``[P, R/2]``."""
    cos, sin = (table.index_select(0, positions).unsqueeze(1) for table in tables)
    # cos and sin may be scaled alike
    scale = cos.square() + sin.square()
    return rotated(keys, cos / scale, -sin / scale)


def rotated(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys ``[S, Hkv, D]`` rotated by cos and sin ``[S, 1, R/2]``, computed in float32 at least."""
    half = cos.shape[-1]
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    first, second = wide[..., :half], wide[..., half : 2 * half]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*turned, wide[..., 2 * half :]), -1).to(keys.dtype)


class Pick(nn.Module):
    """Trained queries that score the segments of a context.

    In each of ``config.pick_layers`` every token of the question asks, by a query projection of its own, the keys of
    all slots as they are before their rotation: no position takes part, so the score does not depend on the length of
    the document. The mass of the softmax, averaged over the heads, is summed by segments, ``mass(t, s)``, and a segment
    scores ``sum over layers and tokens of beta · sigmoid(weight · h + bias) · log(mass(t, s) · n + 1)`` over ``n``
    segments, plus the words that it shares with the question (:class:`WordIndex`), each token with a weight of the same
    form and each kind of run of ``config.word_runs`` with a factor.

    Args:
        config: a :class:`SharedLLMConfig` with ``pick_layers``.
        query_features: output features of the base checkpoint's query projection.

    State: ``queries.i.weight [Hq * D, d]``, ``token_weight``, ``word_weight [layers, d]``, ``token_bias``,
    ``word_bias``, ``beta [layers]``, ``word_beta [layers, len(word_runs)]``, and the buffer
    ``token_class [vocabulary]`` int32.
    """

    token_class: Tensor

    def __init__(self, config: Any, query_features: int) -> None:
        super().__init__()
        text_config, count = config.text_config, len(config.pick_layers)
        hidden = text_config.hidden_size
        self.layers = list(config.pick_layers)
        self.word_runs = tuple(Run(*run) for run in config.word_runs)
        self.queries: Any = nn.ModuleList([nn.Linear(hidden, query_features, bias=False) for _ in self.layers])
        self.token_weight, self.word_weight = (nn.Parameter(torch.empty(count, hidden)) for _ in range(2))
        self.token_bias, self.word_bias = (nn.Parameter(torch.empty(count)) for _ in range(2))
        self.beta = nn.Parameter(torch.empty(count))
        self.word_beta = nn.Parameter(torch.empty(count, len(self.word_runs)))
        self.register_buffer("token_class", torch.zeros(text_config.vocab_size, dtype=torch.int32))

    @torch.no_grad()
    def start_from(self, layers: Any) -> None:
        """Begin with the query projections of a compressor's layers, all tokens alike, and no search by words."""
        for query, layer in zip(self.queries, self.layers, strict=True):
            query.weight.copy_(linear_weight(projection(layers[layer].self_attn, "q")))
        for zero in (self.token_weight, self.word_weight, self.token_bias, self.word_bias, self.token_class):
            zero.zero_()
        self.beta.fill_(0.5)
        self.word_beta.fill_(0.15)

    def forward(
        self,
        inputs: list[Tensor],
        compressor: Any,
        keys: Sequence[list[Tensor]],
        segment: Tensor,
        count: int,
        words: Tensor,
    ) -> Tensor:
        """Scores of the segments of one document for one question, or of several documents as if they were one.

        Args:
            inputs: ``[L, d]`` what comes into each of the compressor's layers at the question's tokens.
            compressor: the compressor's layers.
            keys: of each document, for each of the pick's layers ``[S_i, Hkv, D]``, not rotated.
            segment: ``[S]`` int64, the segment of each slot of all documents, counted over all of them.
            count: ``n``, how many segments there are.
            words: ``[len(word_runs), n, L]`` evidence of the words that question and segments share, see
                :class:`WordIndex`.

        Returns:
            ``[n]`` float32.
        """
        total = torch.zeros(count, device=segment.device, dtype=torch.float32)
        word_weight = torch.zeros(len(self.word_runs), inputs[0].shape[0], device=segment.device, dtype=torch.float32)
        for i, (layer, query) in enumerate(zip(self.layers, self.queries, strict=True)):
            normed = attention_norm(compressor[layer])(inputs[layer])
            mass = self._mass(query(normed), [own[i] for own in keys], segment, count)
            seen = normed.float()
            weight = torch.sigmoid(seen @ self.token_weight[i].float() + self.token_bias[i].float())
            total = total + self.beta[i].float() * (torch.log(mass * count + 1) * weight.unsqueeze(1)).sum(0)
            weight = torch.sigmoid(seen @ self.word_weight[i].float() + self.word_bias[i].float())
            word_weight = word_weight + weight * self.word_beta[i].float().unsqueeze(1)
        return total + torch.einsum("gsl,gl->s", words, word_weight)

    def _mass(self, queries: Tensor, keys: list[Tensor], segment: Tensor, count: int) -> Tensor:
        """Share ``[L, n]`` of each token's attention by segment, mean over heads."""
        slots, (heads, size) = segment.shape[0], keys[0].shape[1:]
        grouped = queries.view(queries.shape[0], heads, -1, size)
        group, rows = grouped.shape[2], []
        for part in grouped.split(max(1, _BLOCK // max(1, slots * heads * group))):
            scores = [torch.einsum("thgd,shd->thgs", part, own).float() / math.sqrt(size) for own in keys]
            mass = (scores[0] if len(scores) == 1 else torch.cat(scores, -1)).softmax(-1).mean((1, 2))
            rows.append(
                torch.zeros(len(part), count, device=mass.device, dtype=torch.float32).index_add_(1, segment, mass)
            )
        return torch.cat(rows)

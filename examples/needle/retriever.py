"""A coarse memory of a long context, the pick over it, and the decoder that reads both: plain PyTorch, Llama layers.

Weights are dictionaries of tensors, named as in the base checkpoint without ``model.``. What is trained lies beside
them in modules; ``compressor_weights`` and ``decoder_weights`` make the dictionaries that the other methods take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from layout import Layout
from shared_words import RUNS, Run, WordIndex
from torch import Tensor, nn

Weights = dict[str, Tensor]
# of each of the lowest layers: keys and values [documents, slots, key/value heads, head_dim]
Memory = list[tuple[Tensor, Tensor]]
# keys before their rotation, by layer: [chunks, slots, key/value heads, head_dim]
RawKeys = dict[int, Tensor]
Rotation = tuple[Tensor, Tensor]

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PROJECTIONS = (*ATTENTION, *MLP)
LORA_SCALE = 2.0
# which of the decoder's layers read the memory
READING = ("lowest", "top", "interleaved")


@dataclass(frozen=True)
class Shape:
    """Sizes of the base checkpoint, and how many of its lowest layers compress and read the memory."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    norm_epsilon: float
    rope_theta: float
    memory_layers: int = 8
    reading: str = READING[0]

    @classmethod
    def of(cls, config: dict[str, Any], memory_layers: int, reading: str = READING[0]) -> Shape:
        """Sizes by a checkpoint's ``config.json``; ``reading`` says which layers read the memory.

        Raises:
            ValueError: it is no Llama with tied embeddings, no biases and plain rotary positions.
        """
        rope = config["rope_parameters"]
        found = (config["model_type"], config["tie_word_embeddings"], config["attention_bias"], rope["rope_type"])
        if found != ("llama", True, False, "default"):
            raise ValueError(f"base: expected a Llama with tied embeddings, no bias and default rotary, got {found}")
        if not 2 <= memory_layers < config["num_hidden_layers"]:
            layers = config["num_hidden_layers"]
            raise ValueError(f"memory_layers: expected at least 2 and less than {layers}, got {memory_layers}")
        if reading not in READING:
            raise ValueError(f"reading: expected one of {', '.join(READING)}, got {reading!r}")
        return cls(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            key_value_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            norm_epsilon=config["rms_norm_eps"],
            rope_theta=rope["rope_theta"],
            memory_layers=memory_layers,
            reading=reading,
        )

    @property
    def read_layers(self) -> list[int]:
        """The decoder's layer that reads the memory of each of the compressor's layers."""
        count = self.memory_layers
        if self.reading == "top":
            return list(range(self.layers - count, self.layers))
        if self.reading == "interleaved":
            return [i * self.layers // count for i in range(count)]
        return list(range(count))

    @property
    def pick_layers(self) -> list[int]:
        """The layers whose keys the pick asks: near the bottom, in the middle and the top of those with a memory."""
        return sorted({1, self.memory_layers // 2, self.memory_layers - 1})


class Ranks(NamedTuple):
    """Of the low-rank updates: all projections of the compressor, what reads the memory (its output twice that),
    and self-attention and MLP of the decoder's other layers."""

    compressor: int = 32
    injected: int = 32
    attention: int = 32
    mlp: int = 8


class LowRankUpdates(nn.Module):
    """LoRA of several layers' projections, stacked by name."""

    def __init__(self, base: Weights, layers: Iterable[int], names: Iterable[str], rank: int) -> None:
        super().__init__()
        self.layers, self.rank = list(layers), rank
        self.base = {n: torch.stack([base[f"layers.{i}.{n}.weight"] for i in self.layers]) for n in names}
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, stacked in self.base.items():
            count, outputs, inputs = stacked.shape
            # ParameterDict takes no dots
            key, device = name.replace(".", "/"), stacked.device
            self.down[key] = nn.Parameter(torch.randn(count, rank, inputs, device=device) / math.sqrt(inputs))
            self.up[key] = nn.Parameter(torch.zeros(count, outputs, rank, device=device))

    def apply_to(self, base: Weights) -> Weights:
        """``base`` with the updated projections in place of its own."""
        weights = dict(base)
        for name, stacked in self.base.items():
            key = name.replace(".", "/")
            up, down = self.up[key].to(stacked.dtype), self.down[key].to(stacked.dtype)
            updated = torch.baddbmm(stacked, up, down, alpha=LORA_SCALE)
            for layer, weight in zip(self.layers, updated.unbind(0), strict=True):
                weights[f"layers.{layer}.{name}.weight"] = weight
        return weights


class InjectedBlocks(nn.Module):
    """Attention to the memory: norm and query start as the layer's own, the output at zero; both of low rank.

    Query ``base + up down``, output ``output_up output_down``.
    """

    def __init__(self, shape: Shape, base: Weights, rank: int) -> None:
        super().__init__()
        layers = shape.read_layers
        self.norm = _copies(base, [f"layers.{i}.input_layernorm.weight" for i in layers])
        self.base = [base[f"layers.{i}.self_attn.q_proj.weight"] for i in layers]
        width, device = shape.heads * shape.head_dim, base["norm.weight"].device

        def matrices(outputs: int, inputs: int, zero: bool) -> nn.ParameterList:
            scale = 0.0 if zero else 1 / math.sqrt(inputs)
            return nn.ParameterList([nn.Parameter(scale * torch.randn(outputs, inputs, device=device)) for _ in layers])

        self.query_down = matrices(rank, shape.hidden, zero=False)
        self.query_up = matrices(width, rank, zero=True)
        self.output_down = matrices(2 * rank, width, zero=False)
        self.output_up = matrices(shape.hidden, 2 * rank, zero=True)

    def query(self, layer: int, x: Tensor) -> Tensor:
        low = F.linear(x, self.query_down[layer].to(x.dtype))
        return F.linear(x, self.base[layer]) + LORA_SCALE * F.linear(low, self.query_up[layer].to(x.dtype))

    def output(self, layer: int, x: Tensor) -> Tensor:
        low = F.linear(x, self.output_down[layer].to(x.dtype))
        return LORA_SCALE * F.linear(low, self.output_up[layer].to(x.dtype))


class Pick(nn.Module):
    """What asks the memory's keys: a query in each layer, a weight for each token, a factor for the layer."""

    def __init__(self, shape: Shape, base: Weights, runs: int) -> None:
        super().__init__()
        layers, device = shape.pick_layers, base["norm.weight"].device
        self.query = _copies(base, [f"layers.{i}.self_attn.q_proj.weight" for i in layers])
        self.token_weight = nn.ParameterList([nn.Parameter(torch.zeros(shape.hidden, device=device)) for _ in layers])
        self.token_bias = nn.Parameter(torch.zeros(len(layers), device=device))
        self.beta = nn.Parameter(torch.full((len(layers),), 0.5, device=device))
        self.word_weight = nn.ParameterList([nn.Parameter(torch.zeros(shape.hidden, device=device)) for _ in layers])
        self.word_bias = nn.Parameter(torch.zeros(len(layers), device=device))
        self.word_beta = nn.Parameter(torch.full((len(layers), runs), 0.15, device=device))


def _copies(base: Weights, names: list[str]) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(base[name].float().clone()) for name in names])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half].float(), x[..., half:].float()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), epsilon).to(x.dtype)


def picked_passages(documents: Tensor, segments: Tensor, ranks: Tensor, separators: Tensor, layout: Layout) -> Tensor:
    """The text of picked segments with the margin on both sides, each after a separator that tells its rank.

    Args:
        documents: ``[D, tokens]`` token ids.
        segments: ``[D, k]`` numbers of the segments, in the order in which they are to stand.
        ranks: ``[D, k]``, 0 for the best.
        separators: ``[k, n]`` token ids by rank.

    Returns:
        ``[D, k * (n + segment + 2 * margin)]`` token ids.
    """
    length = layout.segment + 2 * layout.margin
    first = (segments * layout.segment - layout.margin).clamp(0, documents.shape[1] - length)
    places = first[..., None] + torch.arange(length, device=documents.device)
    text = documents.gather(1, places.flatten(1)).view(*segments.shape, length)
    return torch.cat((separators[ranks], text), -1).flatten(1)


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Attention over ``[batch, length, heads, head_dim]``; query heads share key/value heads."""
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


class Retriever(nn.Module):
    """The frozen base with everything that is trained beside it.

    Args:
        shape: sizes of the base.
        layout: the memory's layout.
        base: the base's weights; their dtype is the one that is computed in.
        classes: ``[vocabulary]`` int64, the class of each token for the search by words; 0 has no part in it.
        ranks: of the low-rank updates.
        runs: what the search by words looks for.
    """

    def __init__(
        self,
        shape: Shape,
        layout: Layout,
        base: Weights,
        classes: Tensor,
        ranks: Ranks | None = None,
        runs: Sequence[Run] = RUNS,
    ) -> None:
        super().__init__()
        self.shape, self.layout, self.base, self.ranks = shape, layout, base, ranks or Ranks()
        self.runs = tuple(runs)
        self.classes, self.class_count = classes.to(base["norm.weight"].device), int(classes.max()) + 1
        lower, upper = range(shape.memory_layers), range(shape.memory_layers, shape.layers)
        self.injected = InjectedBlocks(shape, base, self.ranks.injected)
        self.pick = Pick(shape, base, len(self.runs))
        self.lower = LowRankUpdates(base, lower, PROJECTIONS, self.ranks.compressor)
        self.upper = LowRankUpdates(base, upper, ATTENTION, self.ranks.attention)
        self.mlp = LowRankUpdates(base, upper, MLP, self.ranks.mlp)
        self.device = base["norm.weight"].device
        exponents = torch.arange(0, shape.head_dim, 2, device=self.device).float() / shape.head_dim
        self.frequencies = 1.0 / shape.rope_theta**exponents
        self.rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = _rotate
        self.gated: Callable[[Tensor, Tensor], Tensor] = _gated
        self.rms_norm: Callable[[Tensor, Tensor, float], Tensor] = _rms_norm

    def compile_elementwise(self) -> None:
        """Compile what is not a product; for fixed shapes, as in training."""
        # packed, batched and single rows have shapes of different rank, each compiled once
        torch._dynamo.config.recompile_limit = 64
        self.rotate, self.gated, self.rms_norm = (
            torch.compile(function, dynamic=True) for function in (_rotate, _gated, _rms_norm)
        )

    def compressor_weights(self) -> Weights:
        return self.lower.apply_to(self.base)

    def decoder_weights(self) -> Weights:
        return self.mlp.apply_to(self.upper.apply_to(self.base))

    def rotation(self, positions: Tensor) -> Rotation:
        """Cosines and sines ``[..., 1, head_dim / 2]`` of the positions ``[...]``."""
        angles = positions.float()[..., None] * self.frequencies
        return angles.cos()[..., None, :], angles.sin()[..., None, :]

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.base["embed_tokens.weight"])

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits of the last layer's normalised output."""
        return F.linear(hidden, self.base["embed_tokens.weight"]).float()

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.rms_norm(x, weight, self.shape.norm_epsilon)

    def _queries(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.shape.heads, self.shape.head_dim))

    def _keys(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.shape.key_value_heads, self.shape.head_dim))

    def _mlp(self, weights: Weights, layer: int, x: Tensor) -> Tensor:
        prefix = f"layers.{layer}."
        h = self._norm(x, weights[f"{prefix}post_attention_layernorm.weight"])
        gate, up = (F.linear(h, weights[f"{prefix}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        return x + F.linear(self.gated(gate, up), weights[f"{prefix}mlp.down_proj.weight"])

    def _self_attention(self, weights: Weights, layer: int, x: Tensor, h: Tensor, rotation: Rotation) -> Tensor:
        """``x`` with causal self-attention of its normalised ``h [R, L, d]`` added."""
        prefix = f"layers.{layer}.self_attn."
        q, k, v = (F.linear(h, weights[f"{prefix}{name}_proj.weight"]) for name in ("q", "k", "v"))
        q, k, v = self.rotate(self._queries(q), *rotation), self.rotate(self._keys(k), *rotation), self._keys(v)
        return x + F.linear(attend(q, k, v, causal=True).flatten(-2), weights[f"{prefix}o_proj.weight"])

    def compress(self, weights: Weights, chunks: Tensor) -> tuple[Memory, RawKeys]:
        """The memory of chunks, each on its own.

        Args:
            weights: :meth:`compressor_weights`.
            chunks: ``[C, chunk_size]`` token ids.

        Returns:
            For each memory layer keys (rotated by the position in their node) and values
            ``[C, slots_per_chunk, key/value heads, head_dim]``, slots in the order of the text; and the keys of the
            pick's layers before their rotation.
        """
        count = len(chunks)
        lengths = [end - start for start, end in self.layout.nodes]
        ids = torch.cat([chunks[:, start:end].reshape(-1) for start, end in self.layout.nodes])
        positions = torch.cat([torch.arange(n, device=self.device).repeat(count) for n in lengths])
        rotation, x = self.rotation(positions), self.embed(ids)

        def by_node(packed: Tensor) -> list[Tensor]:
            parts = packed.split([n * count for n in lengths])
            return [part.unflatten(0, (count, n)) for part, n in zip(parts, lengths, strict=True)]

        def kept(packed: Tensor) -> Tensor:
            return torch.cat([p[:, self.layout.kept(n)] for p, n in zip(by_node(packed), lengths, strict=True)], 1)

        memory: Memory = []
        raw_keys: RawKeys = {}
        for layer in range(self.shape.memory_layers):
            prefix = f"layers.{layer}.self_attn."
            h = self._norm(x, weights[f"layers.{layer}.input_layernorm.weight"])
            keys = self._keys(F.linear(h, weights[f"{prefix}k_proj.weight"]))
            values = self._keys(F.linear(h, weights[f"{prefix}v_proj.weight"]))
            if layer in self.shape.pick_layers:
                raw_keys[layer] = kept(keys)
            keys = self.rotate(keys, *rotation)
            memory.append((kept(keys), kept(values)))
            if layer == self.shape.memory_layers - 1:
                break  # nothing reads what this layer would put out
            queries = self.rotate(self._queries(F.linear(h, weights[f"{prefix}q_proj.weight"])), *rotation)
            nodes = zip(by_node(queries), by_node(keys), by_node(values), strict=True)
            attended = torch.cat([attend(q, k, v, causal=True).flatten(0, 1).flatten(-2) for q, k, v in nodes])
            x = self._mlp(weights, layer, x + F.linear(attended, weights[f"{prefix}o_proj.weight"]))
        return memory, raw_keys

    def word_index(self, documents: Tensor) -> WordIndex:
        """The index of ``documents [D, tokens]``, whole segments each."""
        return WordIndex.of(self.classes[documents], self.layout, self.class_count, self.runs)

    def scores(
        self, weights: Weights, questions: Tensor, used: Tensor, raw_keys: RawKeys, words: WordIndex | None
    ) -> Tensor:
        """How well each segment answers each question, ``[R, chunks * segments_per_chunk]`` float32.

        The sum of :meth:`score_parts`, whose arguments these are.
        """
        hidden, shared = self.score_parts(weights, questions, used, raw_keys, words)
        return hidden if shared is None else hidden + shared

    def score_parts(
        self, weights: Weights, questions: Tensor, used: Tensor, raw_keys: RawKeys, words: WordIndex | None
    ) -> tuple[Tensor, Tensor | None]:
        """How well each segment answers each question, by the layers and by words; no position of a chunk takes part.

        A question's tokens run through the compressor's layers. In the pick's layers each token asks the raw keys of
        all slots; the softmax over them, averaged over heads and summed over a segment's slots, is the segment's share.
        The layers' score is the sum over layers and tokens of beta x weight(token) x log(share x segments + 1); the
        words' what the segment and the question share word by word, each by its rarity, with weights of their own.

        Args:
            weights: :meth:`compressor_weights`.
            questions: ``[R, L]`` token ids.
            used: ``[R, L]`` bool, false for padding at the end.
            raw_keys: from :meth:`compress`, of all chunks.
            words: from :meth:`word_index`, of the same tokens; ``None`` leaves the search by words out.

        Returns:
            ``[R, chunks * segments_per_chunk]`` float32 each.
        """
        total = torch.zeros((), device=self.device)
        word_weight = torch.zeros(len(self.runs), 1, 1, device=self.device)
        for i, h in enumerate(self.pick_inputs(weights, questions)):
            weight = torch.sigmoid(h.float() @ self.pick.token_weight[i] + self.pick.token_bias[i]) * used
            evidence = self.layer_evidence(i, h, raw_keys)
            total = total + self.pick.beta[i] * (evidence * weight[..., None]).sum(1)
            weight = torch.sigmoid(h.float() @ self.pick.word_weight[i] + self.pick.word_bias[i])
            word_weight = word_weight + weight * self.pick.word_beta[i][:, None, None]
        if words is None:
            return total, None
        found = words.evidence(self.classes[questions], used)
        return total, torch.einsum("gsrl,grl->rs", found, word_weight.to(found.dtype)).float()

    def pick_inputs(self, weights: Weights, questions: Tensor) -> Iterator[Tensor]:
        """What each of the pick's layers sees of questions ``[R, L]``: its normalised input ``[R, L, d]``."""
        rotation = self.rotation(torch.arange(questions.shape[1], device=self.device)[None])
        x = self.embed(questions)
        for layer in range(max(self.shape.pick_layers) + 1):
            h = self._norm(x, weights[f"layers.{layer}.input_layernorm.weight"])
            if layer in self.shape.pick_layers:
                yield h
            if layer < max(self.shape.pick_layers):
                x = self._mlp(weights, layer, self._self_attention(weights, layer, x, h, rotation))

    def layer_evidence(self, i: int, inputs: Tensor, raw_keys: RawKeys) -> Tensor:
        """``log(share x segments + 1)`` of the pick's layer ``i``: ``[R, L, segments]``, from :meth:`pick_inputs`."""
        query = F.linear(inputs, self.pick.query[i].to(inputs.dtype))
        share = self._segment_shares(query, raw_keys[self.shape.pick_layers[i]])
        return torch.log(share * share.shape[-1] + 1)

    def _segment_shares(self, queries: Tensor, raw_keys: Tensor) -> Tensor:
        """Shares ``[R, L, segments]`` of the attention of ``queries [R, L, heads * head_dim]``, mean over heads."""
        rows, length, _ = queries.shape
        chunks = len(raw_keys)
        grouped = queries.view(rows * length, self.shape.key_value_heads, -1, self.shape.head_dim)
        products = torch.einsum("tghd,sgd->tghs", grouped, raw_keys.flatten(0, 1)).float()
        mass = torch.softmax(products / math.sqrt(self.shape.head_dim), -1).mean((1, 2)).unflatten(-1, (chunks, -1))
        shares = []
        for part, (start, end) in zip(mass.split(self.layout.slots_per_node, -1), self.layout.nodes, strict=True):
            shares.append(part.unflatten(-1, ((end - start) // self.layout.segment, -1)).sum(-1))
        return torch.cat(shares, -1).view(rows, length, chunks * self.layout.segments_per_chunk)

    def turn(self, keys: Tensor, index: Tensor) -> Tensor:
        """Keys ``[C, slots, ...]`` rotated on by the index ``[C]`` of their chunk in the document."""
        cos, sin = self.rotation(index)
        return self.rotate(keys, cos[:, None], sin[:, None])

    def place(self, memory: Memory, index: Tensor, documents: int) -> Memory:
        """A memory for the decoder: chunks at their ``index [C]``, the slots of C / documents chunks joined."""
        return [
            (
                self.turn(keys, index).view(documents, -1, *keys.shape[2:]),
                values.reshape(documents, -1, *values.shape[2:]),
            )
            for keys, values in memory
        ]

    def decode(
        self,
        weights: Weights,
        ids: Tensor,
        memory: Memory | None,
        query_position: Tensor,
        gate: Tensor | None = None,
    ) -> Tensor:
        """The last layer's normalised output ``[R, L, d]``.

        Args:
            weights: :meth:`decoder_weights`, or the base's for comparison.
            ids: ``[R, L]`` token ids; padding stands at the end.
            memory: from :meth:`place`, or ``None``; ``R`` is a multiple of its documents, rows of one lie side by side.
            query_position: ``[1]``, the position from which the memory is read.
            gate: ``[R]`` factors of what is read from the memory; zero is no memory.
        """
        rotation = self.rotation(torch.arange(ids.shape[1], device=self.device)[None])
        x, reading = self.embed(ids), self.shape.read_layers
        for layer in range(self.shape.layers):
            h = self._norm(x, weights[f"layers.{layer}.input_layernorm.weight"])
            x = self._self_attention(weights, layer, x, h, rotation)
            if memory is not None and layer in reading:
                source = reading.index(layer)
                read = self._read(source, x, memory[source], query_position)
                x = x + (read if gate is None else read * gate[:, None, None].to(read.dtype))
            x = self._mlp(weights, layer, x)
        return self._norm(x, self.base["norm.weight"])

    def _read(self, layer: int, x: Tensor, slots: tuple[Tensor, Tensor], query_position: Tensor) -> Tensor:
        keys, values = slots
        h = self._norm(x, self.injected.norm[layer])
        queries = self._queries(self.injected.query(layer, h))
        queries = self.rotate(queries, *self.rotation(query_position))
        rows, length = x.shape[:2]
        by_document = queries.reshape(len(keys), rows // len(keys) * length, *queries.shape[2:])
        attended = attend(by_document, keys, values, causal=False).reshape(rows, length, -1)
        return self.injected.output(layer, attended)

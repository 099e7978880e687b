"""Floating-point operations of a training step, from the model's sizes, and what devices can do (docs/training.md)."""

from typing import Any, NamedTuple

import torch
from torch import nn

from ..model.families import has_experts, projection
from .data import Batch
from .prompt import PromptTokens
from .trained import is_update

#: FLOP/s of the tensor cores on bfloat16 without sparsity, accumulated in float32, by the begin of the device's name;
#: from the vendor's data sheets, which for Hopper and later print twice as much, with sparsity.
PEAKS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H800": 989e12,
    "NVIDIA H20": 148e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A800": 312e12,
    "NVIDIA A30": 165e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
}


def peak_flops(device: torch.device) -> float | None:
    """What the device can do in bfloat16; ``None`` where that is not known."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """The peak of a device by its name; ``None`` for one that is not listed."""
    # an A100 is no A10, and an H200 NVL no H200: whole words, the longest entry
    fits = [begin for begin in PEAKS if name.startswith(begin) and not name[len(begin) :][:1].isalnum()]
    return PEAKS[max(fits, key=len)] if fits else None


class Operations(NamedTuple):
    """Floating-point operations of matmuls with weights, and of attention."""

    weights: float
    attention: float


class StepFlops:
    """Counts a batch's operations: two for each weight and token, four for each attended pair and channel.

    A backward pass counts as much for the gradients of the activations that lie above something trained, and of weights
    what is trained of them; nothing that is computed again is counted, nor are padding and queries that no slot needs.
    """

    def __init__(self, model: Any, prompt: PromptTokens, passages: int) -> None:
        self.config, self.prompt = model.config, prompt
        layers = model.model.layers
        self.layer = _active_weights(layers[0])
        self.layers, self.lower = len(layers), model.config.injection_layers
        attention = layers[0].self_attn
        self.width = projection(attention, "q").out_features
        hidden = projection(attention, "k").in_features
        self.key_value = sum(projection(attention, n).out_features for n in "kv") * hidden
        self.attention = self.key_value + 2 * self.width * hidden
        self.block = sum(m.weight.numel() for m in model.injected_blocks[0].modules() if isinstance(m, nn.Linear))
        self.head = model.lm_head.weight.numel()
        self.passages = passages if model.pick is not None else 0
        self.pick_layers = len(model.config.pick_layers or [])
        self.pick_weights = self.pick_layers * self.width * hidden
        self.trained, self.updates = _trained_weights(layers)
        self.trained_lower = 0 if model.compressor is None else _trained_weights(model.compressor.layers)[0]

    def of(self, batch: Batch) -> float:
        """Operations of a batch, forward and backward."""
        return sum(self.operations(batch))

    def operations(self, batch: Batch) -> Operations:
        """The same by their kind."""
        parts = [self._compressor(batch), self._pick(batch), self._decoder(batch)]
        return Operations(sum(part.weights for part in parts), sum(part.attention for part in parts))

    def _slots(self, tokens: int) -> float:
        config = self.config
        return tokens / config.chunk_size * min(config.chunk_size, (config.tree_depth + 1) * config.slots_per_node)

    def _compressor(self, batch: Batch) -> Operations:
        depth, size = self.config.tree_depth, self.config.chunk_size
        tokens = sum(len(e.context) for e in batch.examples)
        slots = self._slots(tokens)
        # causal pairs of nodes of a half, a quarter, … and twice the last share of a chunk
        pairs = tokens * size / 2 * (sum(4.0**-level for level in range(1, depth + 1)) + 4.0**-depth)
        full, kept = max(0, self.lower - 2), min(1, self.lower - 1)
        weights = full * tokens * self.layer + kept * (tokens * self.key_value + slots * (self.layer - self.key_value))
        # of the last layer keys and values, at the slots alone where a layer is below it
        weights += (slots if self.lower > 1 else tokens) * self.key_value
        attention = 4 * self.width * (full * pairs + kept * pairs * slots / tokens)
        if not self.trained_lower:
            return Operations(2 * weights, attention)
        share = min(1.0, self.trained_lower / ((self.lower - 1) * self.layer + self.key_value))
        # its norms are trained too, so that every projection hands a gradient down
        return Operations(2 * weights * (2 + share), 3 * attention)

    def _pick(self, batch: Batch) -> Operations:
        if not self.pick_layers:
            return Operations(0.0, 0.0)
        asked = sum(len(q.question) for e in batch.examples for q in e.questions)
        slots = self._slots(sum(len(e.context) for e in batch.examples))
        # up to what comes into the compressor's last layer; the pick's own queries are trained
        through = (self.lower - 1) * self.layer * (3 if self.trained_lower else 1)
        # questions meet the slots of the whole batch; of attention there is the score alone
        attention = 2 * self.pick_layers * asked * slots * self.width * (3 if self.trained_lower else 2)
        return Operations(2 * asked * (through + 2 * self.pick_weights), attention)

    def _decoder(self, batch: Batch) -> Operations:
        passage = self.config.segment_size + 2 * self.config.segment_margin
        weights = attention = 0.0
        own_weights = self.layers * self.layer + self.lower * self.block + self.updates
        # nothing is trained below the first block, which stands after its layer's attention
        below = self.attention
        for example, gate in zip(batch.examples, batch.gates, strict=True):
            slots = self._slots(len(example.context)) if gate else 0
            turns = [example.questions[i] for i in example.turns]
            tail = sum(len(self.prompt.turn(q.question, q.answer, first=n == 0)[0]) for n, q in enumerate(turns))
            answers = sum(len(q.answer) + len(self.prompt.end) for q in turns)
            window = len(self.prompt.begin) + self.passages * passage + tail
            running = len(example.running)
            for length, predicted in ((window, answers), (running, running - 1)):
                weights += length * (2 * own_weights - below + self.trained) + 2 * predicted * self.head
                causal = length * (length + 1) / 2
                attention += 4 * self.width * causal * (3 * self.layers - 2)
                # keys and values have gradients where the compressor is trained
                attention += 4 * self.width * length * slots * self.lower * (3 if self.trained_lower else 2)
        return Operations(2 * weights, attention)


def batch_tokens(batch: Batch, prompt: PromptTokens, config: Any, passages: int) -> int:
    """Tokens of contexts, windows and running texts."""
    total = 0
    for example in batch.examples:
        total += len(example.context) + len(example.running)
        picked = min(passages, -(-len(example.context) // config.segment_size))
        total += picked * min(len(example.context), config.segment_size + 2 * config.segment_margin)
        for i in example.turns:
            question = example.questions[i]
            total += len(prompt.turn(question.question, question.answer, first=False)[0])
    return total


def _trained_weights(layers: Any) -> tuple[int, int]:
    """Weights of matmuls that are trained in layers, and how many of them are of low-rank updates."""
    sizes = {n: p.numel() for n, p in layers.named_parameters() if p.requires_grad and p.dim() > 1}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if is_update(name))


def _active_weights(layer: Any) -> int:
    """Weights of a decoder layer that a token meets; of experts those that it goes to."""
    weights = 0.0
    for name, parameter in layer.named_parameters():
        if name.startswith("injection.") or parameter.dim() < 2 or is_update(name):
            continue
        share = 1.0
        if has_experts(layer) and ".experts." in name:
            share = layer.mlp.gate.top_k / layer.self_attn.config.num_experts
        weights += share * parameter.numel()
    return int(weights)

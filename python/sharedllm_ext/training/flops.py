"""Floating-point operations of a training step, from the model's sizes, and what devices can do (docs/training.md)."""

from typing import Any

import torch
from torch import nn

from ..model.families import has_experts, projection
from .data import Batch
from .prompt import PromptTokens

#: Dense bfloat16 FLOP/s by the begin of the device's name, from the vendor's data sheets.
PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
}


def peak_flops(device: torch.device) -> float | None:
    """What the device can do in bfloat16; ``None`` where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for begin, peak in PEAKS.items() if name.startswith(begin)), None)


class StepFlops:
    """Counts a batch's operations: two for each weight and token, four for each attended pair and channel.

    A backward pass counts once for the activations, and once for the weights that are trained; nothing that is computed
    again is counted.
    """

    def __init__(self, model: Any, prompt: PromptTokens, passages: int) -> None:
        self.config, self.prompt = model.config, prompt
        layers = model.model.layers
        self.layer = _active_weights(layers[0])
        self.layers, self.lower = len(layers), model.config.injection_layers
        attention = layers[0].self_attn
        self.width = projection(attention, "q").out_features
        self.key_value = (
            sum(projection(attention, n).out_features for n in "kv") * projection(attention, "k").in_features
        )
        self.block = sum(m.weight.numel() for m in model.injected_blocks[0].modules() if isinstance(m, nn.Linear))
        self.head = model.lm_head.weight.numel()
        self.passages = passages if model.pick is not None else 0
        self.pick_layers = len(model.config.pick_layers or [])
        decoder = [p for name, p in model.named_parameters() if name.startswith("model.layers")]
        trained = sum(p.numel() for p in decoder if p.requires_grad)
        self.decoder_share = trained / max(1, sum(p.numel() for p in decoder))
        source = model.compressor if model.compressor is not None else None
        whole = source is not None and any(p.requires_grad and p.dim() > 1 for p in source.parameters())
        self.compressor_trained = whole

    def of(self, batch: Batch) -> float:
        """Operations of a batch, forward and backward."""
        config = self.config
        slots_of_chunk = min(config.chunk_size, (config.tree_depth + 1) * config.slots_per_node)
        decoder = compressor = 0.0
        tokens = sum(len(e.context) for e in batch.examples)
        slots = tokens / config.chunk_size * slots_of_chunk
        # nodes are half a chunk, a quarter, …
        pairs = tokens * config.chunk_size / 6
        compressor += max(0, self.lower - 2) * (2 * tokens * self.layer + 4 * self.width * pairs)
        compressor += 2 * tokens * self.key_value + 2 * slots * (self.layer - self.key_value)
        questions = [len(q.question) for e in batch.examples for q in e.questions] if self.pick_layers else []
        compressor += self.lower * 2 * sum(questions) * self.layer
        compressor += self.pick_layers * 2 * sum(questions) * slots * self.width
        passage = config.segment_size + 2 * config.segment_margin
        for example, gate in zip(batch.examples, batch.gates, strict=True):
            own = slots * len(example.context) / tokens if gate else 0
            turns = [example.questions[i] for i in example.turns]
            tail = sum(len(self.prompt.turn(q.question, q.answer, first=False)[0]) for q in turns)
            answers = sum(len(q.answer) + len(self.prompt.end) for q in turns)
            for length, predicted in (
                (self.passages * passage + tail, answers),
                (len(example.running), len(example.running)),
            ):
                decoder += self.layers * (2 * length * self.layer + 2 * self.width * length * length)
                decoder += self.lower * (2 * length * self.block + 4 * self.width * length * own)
                decoder += 2 * predicted * self.head
        return decoder * (2 + self.decoder_share) + compressor * (3 if self.compressor_trained else 1)


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


def _active_weights(layer: Any) -> int:
    """Weights of a decoder layer that a token meets; of experts those that it goes to."""
    weights = 0.0
    for name, parameter in layer.named_parameters():
        if name.startswith("injection.") or parameter.dim() < 2 or name.endswith((".up", ".down")):
            continue
        share = 1.0
        if has_experts(layer) and ".experts." in name:
            share = layer.mlp.gate.top_k / layer.self_attn.config.num_experts
        weights += share * parameter.numel()
    return int(weights)

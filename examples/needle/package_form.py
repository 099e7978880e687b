"""The package's form of an adapter: its fields, and how a retriever is made of one; without the package itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from adapter import Base, load_adapter
from layout import Layout
from retriever import Ranks, Retriever, Shape
from safetensors import safe_open
from safetensors.torch import load_file
from shared_words import RUNS, Run

# names of sharedllm_ext.model.adapter
FORMAT, DOWN, UP = "sharedllm_adapter", ":down", ":up"
# of sharedllm_ext.SharedLLMConfig; an adapter has only the fields that differ
DEFAULTS: dict[str, Any] = {
    "injection_layers": 4,
    "chunk_size": 1024,
    "tree_depth": 3,
    "slots_per_node": 32,
    "slot_position": "start",
    "query_aware": True,
    "tie_compressor": True,
    "pick_layers": None,
    "segment_size": 128,
    "segment_margin": 64,
    "word_runs": RUNS,
    "passage_prompt": None,
}
# the texts that questions.py puts around passages and questions
PROMPT = {
    "begin": "<|im_start|>user\n",
    "passage": "\n[{rank}]\n",
    "question": "\n\n",
    "answer": "<|im_end|>\n<|im_start|>assistant\n",
}


def fields_of(retriever: Retriever) -> dict[str, Any]:
    """The package's configuration of the same memory and pick."""
    layout = retriever.layout
    return {
        "injection_layers": retriever.shape.memory_layers,
        "chunk_size": layout.chunk_size,
        "tree_depth": layout.tree_depth,
        "slots_per_node": layout.slots_per_node,
        "slot_position": "end" if layout.keep_stride_ends else "start",
        "query_aware": False,
        "tie_compressor": False,
        "pick_layers": retriever.shape.pick_layers,
        "segment_size": layout.segment,
        "segment_margin": layout.margin,
        "word_runs": retriever.runs,
        "passage_prompt": PROMPT,
    }


def imported(path: Path, base: Base) -> Retriever:
    """The retriever of an adapter in the package's form: export.py backwards.

    Raises:
        ValueError: its fields are not those of a retriever of this example.
    """
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        config = DEFAULTS | json.loads(file.metadata()[FORMAT])["config"]
    config["word_runs"] = tuple(Run(*run) for run in config["word_runs"])
    layout = Layout(
        config["chunk_size"], config["tree_depth"], config["slots_per_node"], config["slot_position"] == "end"
    )

    def rank(name: str) -> int:
        return len(tensors[f"{name}.weight{DOWN}"])

    layers = config["injection_layers"]
    ranks = Ranks(
        rank("compressor.layers.0.self_attn.q_proj"),
        rank("model.layers.0.injection.q_proj"),
        rank(f"model.layers.{layers}.self_attn.q_proj"),
        rank(f"model.layers.{layers}.mlp.up_proj"),
    )
    classes = tensors["pick.token_class"].to(torch.int64)
    retriever = Retriever(Shape.of(base.config, layers), layout, base.weights, classes, ranks, config["word_runs"])
    expected = fields_of(retriever)
    if config != expected:
        raise ValueError(f"{path}: expected an adapter with the fields {expected}, got {config}")
    state = {}
    for name, part in (("lower", retriever.lower), ("upper", retriever.upper), ("mlp", retriever.mlp)):
        prefix = "compressor" if name == "lower" else "model"
        for key in part.down:
            for side, ending in (("down", DOWN), ("up", UP)):
                of = [tensors[f"{prefix}.layers.{i}.{key.replace('/', '.')}.weight{ending}"] for i in part.layers]
                state[f"{name}.{side}.{key}"] = torch.stack(of)
    for i in range(layers):
        block = f"model.layers.{i}.injection"
        state[f"injected.norm.{i}"] = tensors[f"{block}.norm.weight"]
        for ours, theirs in (("query", "q_proj"), ("output", "o_proj")):
            for side, ending in (("down", DOWN), ("up", UP)):
                state[f"injected.{ours}_{side}.{i}"] = tensors[f"{block}.{theirs}.weight{ending}"]
    for i in range(len(config["pick_layers"])):
        state[f"pick.query.{i}"] = tensors[f"pick.queries.{i}.weight"]
        for name in ("token_weight", "word_weight"):
            state[f"pick.{name}.{i}"] = tensors[f"pick.{name}"][i]
    state |= {f"pick.{name}": tensors[f"pick.{name}"] for name in ("token_bias", "word_bias", "beta", "word_beta")}
    retriever.load_state_dict(state)
    return retriever


def any_adapter(path: Path, base: Base) -> Retriever:
    """The retriever of an adapter of train.py or of one in the package's form."""
    with safe_open(path, framework="pt") as file:
        packaged = FORMAT in (file.metadata() or {})
    return imported(path, base) if packaged else load_adapter(path, base)

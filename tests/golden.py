"""Golden files: small random models with what a correct implementation computes for them."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig

from sharedllm_ext import SharedLLMConfig, SharedLLMForCausalLM, load_published_checkpoint

FOLDER = Path(os.environ.get("SHAREDLLM_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden"))


def names() -> list[str]:
    """Names of the golden files, empty where there are none."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Sizes and tensors of one golden file."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def build(sizes: dict[str, Any], tensors: dict[str, Tensor]) -> SharedLLMForCausalLM:
    """The golden model through the loader for published checkpoints."""
    text_config = LlamaConfig(
        hidden_size=sizes["hidden_size"],
        num_hidden_layers=sizes["num_hidden_layers"],
        num_attention_heads=sizes["num_attention_heads"],
        num_key_value_heads=sizes["num_key_value_heads"],
        intermediate_size=sizes["intermediate_size"],
        vocab_size=sizes["vocab_size"],
        rms_norm_eps=sizes["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": sizes["rope_theta"]},
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    config = SharedLLMConfig(
        text_config=text_config,
        injection_layers=sizes["injection_layers"],
        tree_depth=sizes["tree_depth"],
        chunk_size=sizes["chunk_size"],
        slots_per_node=sizes["slots_per_node"],
        query_aware=sizes["query_aware"],
        query_position_offset=1,
        tie_compressor=sizes["tied"],
    )
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    return load_published_checkpoint(weights, config)

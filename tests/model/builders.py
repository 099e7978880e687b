"""Tiny random base checkpoints of every supported family, and models built from them."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.model.decoding.support import FIXED_ROPE_TYPES
from sharedllm_ext.model.families import FAMILIES as ROWS
from sharedllm_ext.model.families import Family

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 12}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {"no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": False}),
    # layers without rotation have the window, the first one too
    "smollm3_window": (
        SmolLM3Config,
        SmolLM3ForCausalLM,
        {"no_rope_layers": [0, 1, 1, 0], "use_sliding_window": True, "sliding_window": 12},
    ),
    "granite": (
        GraniteConfig,
        GraniteForCausalLM,
        {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.15,
            "logits_scaling": 3.0,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "phi3": (
        Phi3Config,
        Phi3ForCausalLM,
        {
            "sliding_window": 12,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "phi3_longrope": (
        Phi3Config,
        Phi3ForCausalLM,
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
                "long_factor": [1.5, 2.0, 3.0, 5.0, 8.0, 13.0],
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "gemma3_text": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "head_dim": 32,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 4.0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            },
        },
    ),
    "llama_tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True, "attention_bias": True}),
    "llama_rope_scaling": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
}
# built with norms whose weights are one; a new family does not belong here
_UNIT_NORMS = ("llama", "mistral", "qwen2", "qwen3", "llama_tied", "llama_rope_scaling")


def _row(family: str) -> Family:
    return ROWS[FAMILIES[family][0].model_type]


def _rope_type(family: str) -> str:
    parameters = FAMILIES[family][2].get("rope_parameters", {})
    return str(parameters.get("rope_type", "default"))


#: Those with something of their own in layers, rotation or logits.
LATER = [family for family in FAMILIES if family not in _UNIT_NORMS]
#: Of these the ones in which no rounding error chooses an expert.
CONTINUOUS = [family for family in LATER if _row(family).experts is None]
#: Of these the ones whose rotation does not follow the length.
FIXED = [family for family in CONTINUOUS if _rope_type(family) in FIXED_ROPE_TYPES]
#: Those whose decoding steps run by their own operators.
DECODED = [family for family in FAMILIES if _row(family).not_decoded is None and _rope_type(family) in FIXED_ROPE_TYPES]
VOCABULARY = 128
TREE = {"injection_layers": 2, "chunk_size": 32, "tree_depth": 3, "slots_per_node": 4, "window": 24}


def base(family: str = "llama", **fields: Any) -> PreTrainedModel:
    """A random base checkpoint; projections large enough that attention is far from uniform."""
    config_class, model_class, own = FAMILIES[family]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    built = model_class(config_class(**{**sizes, **own, **fields})).eval()
    if family not in _UNIT_NORMS:
        for module in built.modules():
            if type(module).__name__.endswith("RMSNorm"):
                torch.nn.init.normal_(module.weight, mean=float(module.weight.detach().mean()), std=0.2)
    return built


def model(
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    base_fields: dict[str, Any] | None = None,
    **fields: Any,
) -> SharedLLMForCausalLM:
    """A SharedLLM model whose injected blocks matter."""
    checkpoint = base(family, **(base_fields or {})).to(dtype)
    if dtype == torch.float64 and checkpoint._can_set_experts_implementation():
        # the other ways have no products in float64
        checkpoint.set_experts_implementation("eager")
    built = SharedLLMForCausalLM.from_base(checkpoint, **{**TREE, **fields})
    for block in built.injected_blocks:
        torch.nn.init.normal_(block.o_proj.weight, std=0.1)
    return built


def ids(*shape: int) -> Tensor:
    """Random token ids without the special ones."""
    return torch.randint(3, VOCABULARY, shape)

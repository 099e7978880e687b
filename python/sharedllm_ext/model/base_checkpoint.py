"""Building a SharedLLM model from a base checkpoint."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .configuration import SharedLLMConfig

if TYPE_CHECKING:
    from .modeling import SharedLLMForCausalLM


def build_from_base(
    model_class: type[SharedLLMForCausalLM],
    base: str | os.PathLike[str] | PreTrainedModel,
    dtype: torch.dtype | str | None,
    fields: dict[str, Any],
) -> SharedLLMForCausalLM:
    """What :meth:`SharedLLMForCausalLM.from_base` does; arguments and errors as there."""
    if not isinstance(base, PreTrainedModel):
        base = AutoModelForCausalLM.from_pretrained(base, dtype="auto" if dtype is None else dtype)
    elif dtype is not None:
        raise ValueError(f"dtype: expected None with a model as base (it keeps its own), got {dtype}")
    unknown = sorted(set(fields) - set(SharedLLMConfig.__annotations__))
    if unknown:
        known = sorted(set(SharedLLMConfig.__annotations__) - {"text_config", "tie_word_embeddings"})
        raise ValueError(f"fields: expected fields of SharedLLMConfig ({', '.join(known)}), got {', '.join(unknown)}")
    config = SharedLLMConfig(text_config=copy.deepcopy(base.config), **fields)
    config.dtype = base.dtype
    with torch.device("meta"):
        model = model_class(config)
    model.model.rotary_emb = copy.deepcopy(base.model.rotary_emb)
    model.load_state_dict(base.state_dict(keep_vars=True), strict=False, assign=True)
    for layer in model.model.layers[: config.injection_layers]:
        layer.injection.to_empty(device=base.device).to(base.dtype)
        layer.injection.start_from(layer)
    if model.compressor is not None:
        state = {name: tensor.detach().clone() for name, tensor in base.model.state_dict().items()}
        model.compressor.rotary_emb = copy.deepcopy(base.model.rotary_emb)
        model.compressor.load_state_dict({name: state[name] for name in model.compressor.state_dict()}, assign=True)
        model.compressor.requires_grad_(True)
    model.tie_weights()
    if base.generation_config is not None:
        model.generation_config = copy.deepcopy(base.generation_config)
    return model.eval()

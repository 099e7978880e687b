"""Checkpoints in the parameter names of the published code."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..counted import counted
from .configuration import SharedLLMConfig
from .modeling import SharedLLMForCausalLM

_INJECTED = {
    "cross_attn.layernorm.": "injection.norm.",
    "cross_attn.q_proj.": "injection.q_proj.",
    "cross_attn.o_proj.": "injection.o_proj.",
}


def load_published_checkpoint(state_dict: Mapping[str, Tensor], config: SharedLLMConfig) -> SharedLLMForCausalLM:
    """Build a model from a state dict in the published code's names.

    ``model.*`` is the decoder, ``model.layers.i.cross_attn.{layernorm,q_proj,o_proj}`` its injected blocks,
    ``lm_head.*`` the output, and ``encoder.*`` the compressor where ``config.tie_compressor`` is false.

    Args:
        state_dict: the parameters.
        config: sizes; must fit the parameters.

    Returns:
        The model in eval mode, in the dtype of the parameters.

    Raises:
        ValueError: parameters are missing, unknown or of another shape than the configuration says.
    """
    model: Any = SharedLLMForCausalLM(config)
    expected = model.state_dict()
    renamed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        target = name
        if name.startswith("encoder."):
            if config.tie_compressor:
                raise ValueError(f"{name}: expected no encoder.* parameters with tie_compressor=True, got one")
            target = "compressor." + name.removeprefix("encoder.")
        for old, new in _INJECTED.items():
            target = target.replace(old, new)
        renamed[target] = tensor
    if config.tie_word_embeddings and "lm_head.weight" not in renamed and "model.embed_tokens.weight" in renamed:
        renamed["lm_head.weight"] = renamed["model.embed_tokens.weight"]
    missing = sorted(expected.keys() - renamed.keys())
    unknown = sorted(renamed.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"state_dict: expected the {counted(len(expected), 'parameter')} that the configuration names, got "
            f"{len(renamed)}; missing: {missing[:5]}, unknown: {unknown[:5]}"
        )
    for name, tensor in renamed.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name}: expected shape {tuple(expected[name].shape)}, got {tuple(tensor.shape)}")
    dtypes = {tensor.dtype for tensor in renamed.values()}
    model.to(dtypes.pop() if len(dtypes) == 1 else torch.float32)
    model.load_state_dict(renamed)
    return model.eval()

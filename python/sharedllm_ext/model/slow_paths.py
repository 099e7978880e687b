"""Which parts of a model take general code where faster code exists, and why."""

import logging
from typing import Any

import torch

from ..ops.injected_attention import head_size_obstacle
from .decoding.support import decoding_obstacle, say_slow
from .families import family_of
from .hooks import global_hook, is_untouched
from .layer_math import FUSED_DTYPES, FUSED_MIXINS
from .protocols import Decoder

#: Of the models that have faster code; for tests another one.
DEVICE = "cuda"
_logger = logging.getLogger("sharedllm_ext")


def slow_paths(model: Decoder) -> dict[str, str]:
    """Why a model is slower than it could be.

    Returns:
        Reasons, "what: expected …, got …", of what takes general code: ``decoding`` (of ``generate``), ``layers``
        (norms, attention and MLPs are not fused) and ``attention`` (to the memory, and in decoding steps). Empty if
        nothing does.
    """
    reasons = {
        "decoding": decoding_obstacle(model),
        "layers": fusing_obstacle(model),
        "attention": attention_obstacle(model),
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def say_slow_parts(model: Decoder) -> None:
    """Log, once in a process, what of a model on CUDA is not fused, takes the general kernel or copies."""
    if not _logger.isEnabledFor(logging.INFO) or model.model.embed_tokens.weight.device.type != DEVICE:
        return
    for what, reason in (
        ("norms, attention or MLPs are not fused", fusing_obstacle(model)),
        ("attention to the memory takes the general kernel or copies", attention_obstacle(model)),
    ):
        if reason is not None:
            say_slow(reason, what)


def fusing_obstacle(model: Decoder) -> str | None:
    """Why norms, attention or MLPs run by Transformers' own code in inference; ``None``: they are fused."""
    obstacle = _obstacle_of(model)
    if obstacle is not None:
        return obstacle
    hook = global_hook(backward=True)
    if hook is not None:
        return f"all modules: expected no hook, got {hook}; its handle's remove() ends it"
    implementation = model.config._attn_implementation
    if implementation != "sdpa":
        return f"attn_implementation: expected sdpa, got {implementation}"
    layers = model.model.layers
    family = family_of(layers[0])
    if family.not_fused:
        part, reason = next(iter(family.not_fused.items()))
        return f"{family.title} {part}: {reason}"
    for index, layer in enumerate(layers):
        parts: dict[str, Any] = {"attention": layer.self_attn, "mlp": layer.mlp}
        for name in (family.attention_norm, family.mlp_norm):
            parts[name] = getattr(layer, name)
        for name, module in parts.items():
            mixin = FUSED_MIXINS.get(name, FUSED_MIXINS["norm"])
            if not isinstance(module, mixin) or not is_untouched(module):
                expected = f"a {family.title} module without hooks"
                return f"model.layers.{index} {name}: expected {expected}, got {type(module).__name__}"
    return None


def attention_obstacle(model: Decoder) -> str | None:
    """Why attention to the memory takes the general kernel or copies; ``None``: tensor cores read it in place."""
    return _obstacle_of(model) or head_size_obstacle(model.model.layers[0].self_attn.head_dim)


def _obstacle_of(model: Decoder) -> str | None:
    """In device and dtype."""
    weight = model.model.embed_tokens.weight
    if weight.device.type != "cuda":
        return f"device: expected a CUDA device, got {weight.device}"
    if weight.dtype not in FUSED_DTYPES:
        return f"dtype: expected {' or '.join(map(str, FUSED_DTYPES))}, got {weight.dtype}"
    if torch.is_autocast_enabled("cuda"):
        return "autocast: expected none, got one on cuda"
    return None

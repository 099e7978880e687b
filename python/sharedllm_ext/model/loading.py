"""Checks that a loaded checkpoint was complete, so that no part of the model is silently random."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_loaded(model: Any, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise where Transformers only reports: otherwise the model would read its context through random weights.

    A checkpoint without the weights of an injected block is accepted: the block starts with a zero output projection.

    Args:
        model: the loaded :class:`~sharedllm_ext.SharedLLMForCausalLM`.
        missing: names of parameters that the checkpoint lacks.
        unexpected: names in the checkpoint that the model lacks.

    Raises:
        ValueError: weights of the compressor or parts of an injected block are missing; the checkpoint holds such
            weights that the configuration has no place for; or weights are not finite.
    """
    missing = set(missing)
    whole = [f"model.layers.{block.layer_index}.injection." for block in model.injected_blocks]
    zero = tuple(prefix for prefix in whole if f"{prefix}o_proj.weight" in missing)
    noise = {name for name in missing if name.startswith(("compressor.", "pick.")) or ".injection." in name}
    noise = {name for name in noise if not (zero and name.startswith(zero))}
    if noise:
        raise ValueError(
            f"checkpoint: expected all weights of compressor, pick and each injected block, got none for {_some(noise)}"
        )
    homeless = {name for name in unexpected if name.startswith(("compressor.", "pick.")) or ".injection." in name}
    if homeless:
        config = model.config
        raise ValueError(
            f"checkpoint: expected weights for injection_layers={config.injection_layers} and "
            f"tie_compressor={config.tie_compressor} as in its configuration, got others besides: {_some(homeless)}"
        )
    broken = _not_finite(model)
    if broken:
        raise ValueError(f"checkpoint: expected finite weights, got infinities or NaN in {_some(broken)}")


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


@torch.no_grad()
def _not_finite(model: Any) -> list[str]:
    """Names of parameters with infinities or NaN; quantised and offloaded ones are not checked."""
    bounds: dict[torch.device, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        plain = type(parameter.data) is Tensor and parameter.dtype in _FLOATS
        if plain and parameter.numel() and not parameter.is_meta:
            low, high = torch.aminmax(parameter)
            # NaN and infinities survive the sum of the bounds' magnitudes
            bounds.setdefault(parameter.device, {})[name] = low.double().abs() + high.double().abs()
    broken: list[str] = []
    for named in bounds.values():
        # one wait for each device
        finite = torch.stack(list(named.values())).isfinite().tolist()
        broken += [name for name, right in zip(named, finite, strict=True) if not right]
    return broken

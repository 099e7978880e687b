"""What a memory must share with the model that reads it: sizes, tree, and a fingerprint of the compressor."""

import hashlib
from typing import Any

import torch

from ..ops._autocast import outside_autocast
from .compressor import LowerModel
from .layer_math import version_of
from .managed_layers import stored_parameters
from .memory_file import shorten

_SIZES = (
    "hidden_size",
    "injection_layers",
    "num_key_value_heads",
    "head_dim",
    "chunk_size",
    "tree_depth",
    "slots_per_node",
)


class Fingerprint:
    """Digest of evenly spaced elements of the compressor's parameters, rounded to bfloat16.

    Taken again when a parameter is replaced or changed in place; a change through ``parameter.data`` is not seen.
    """

    def __init__(self) -> None:
        self._state: tuple[int, ...] | None = None
        self._digest = ""

    @outside_autocast
    def of(self, lower: LowerModel) -> str:
        """The compressor's digest, 32 hexadecimal digits."""
        modules = (lower.embed_tokens, lower.norm, *lower.layers)
        # the injected block is the decoder's, not the compressor's
        parameters = [p for m in modules for name, p in m.named_parameters() if not name.startswith("injection.")]
        state = tuple(number for p in parameters for number in (p.data_ptr() or id(p), version_of(p)))
        if self._state != state:
            picks = []
            for parameter in (p for m in modules for p in stored_parameters(m, skip="injection")):
                flat = parameter.detach().reshape(-1)
                index = torch.linspace(0, flat.numel() - 1, min(64, flat.numel()), dtype=torch.float64).long()
                picks.append(flat[index.to(flat.device)].to(torch.bfloat16).cpu())
            sample = torch.cat(picks).view(torch.int16).cpu().numpy().tobytes()
            self._state, self._digest = state, hashlib.sha256(sample).hexdigest()[:32]
        return self._digest


def memory_signature(config: Any, lower: LowerModel, fingerprint: Fingerprint | None) -> dict[str, Any]:
    """What a memory of this compressor must share with its reader; without a fingerprint one of a model in training."""
    text_config, attention = config.text_config, lower.layers[0].self_attn
    return {
        "model_type": text_config.model_type,
        "hidden_size": text_config.hidden_size,
        "injection_layers": config.injection_layers,
        "num_key_value_heads": attention.k_proj.out_features // attention.head_dim,
        "head_dim": attention.head_dim,
        "chunk_size": config.chunk_size,
        "tree_depth": config.tree_depth,
        "slots_per_node": config.slots_per_node,
        "weights": "in training" if fingerprint is None else fingerprint.of(lower),
    }


def describe_difference(expected: dict[str, Any], got: dict[str, Any]) -> str | None:
    """The first entry in which two signatures differ, as 'name: expected …, got …'; ``None`` if they are equal."""
    for key, value in expected.items():
        if got.get(key) != value:
            return f"{key}: expected {value}, got {got.get(key)}"
    return None


def check_signature(name: str, signature: Any) -> None:
    """Check that a signature, such as a file's, is one.

    Raises:
        ValueError: 'name: expected …, got …'.
    """
    texts = ("model_type", "weights")
    expected = (*_SIZES, *texts)
    if not isinstance(signature, dict) or set(signature) != set(expected):
        got = ", ".join(map(str, signature)) if isinstance(signature, dict) else signature
        raise ValueError(f"{name}: expected a signature of {', '.join(expected)}, got {shorten(got)}")
    for key in expected:
        value = signature[key]
        if key in texts and not isinstance(value, str):
            raise ValueError(f"{name}: expected the signature's {key} to be a text, got {shorten(value)}")
        if key in _SIZES and (type(value) is not int or not 1 <= value < 2**31):
            raise ValueError(
                f"{name}: expected the signature's {key} to be an integer from 1 to {2**31 - 1}, got {shorten(value)}"
            )

"""What a memory must share with the model that reads it: sizes, tree, and what the compressor computes.

:mod:`signature_fields` says what a signature holds.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..ops._autocast import outside_autocast
from .chunks import Chunk
from .compressor import compress_chunks
from .families import (
    attention_norm,
    family_of,
    has_experts,
    mlp_norm,
    norm_eps,
    projection,
    residual_factor,
    rotation_of,
    sliding_window,
)
from .fp8_linear import Fp8Linear
from .layer_math import version_of
from .lower_model import LowerModel, query_vectors
from .managed_layers import device_of, is_managed, is_sharded, stored_parameters
from .module_facts import ModuleFacts
from .rotary import LayerTables, Rotation
from .signature_fields import SIGNS
from .tree import TreeShape

# enough that every module sees attention; the compressor's matmuls read their weights once for as many tokens
_PROBE_TOKENS = 16
# attributes of nn.Module itself, of which only the hooks could change what it computes
_MACHINERY = tuple(vars(nn.Module()))
_OTHER_MACHINERY = {*_MACHINERY, "_is_hf_initialized", "gradient_checkpointing", "_gradient_checkpointing_func"}
_HOOKS = tuple(name for name in _MACHINERY if "hooks" in name)
_SIMPLE = frozenset((int, float, str, bool, type(None), torch.dtype, torch.device))


@dataclasses.dataclass(frozen=True)
class Subject:
    """The compressor that a signature describes.

    Attributes:
        lower: the compressor's modules.
        rope: the layers' rotations by name.
        tables: gives cos and sin for a number of positions on a device.
        chunk_size: tokens in a chunk; no node is longer.
        slot_position: which token of its stride a slot keeps.
    """

    lower: LowerModel
    rope: dict[str, Rotation]
    tables: Callable[[int, torch.device], LayerTables]
    chunk_size: int
    slot_position: str = "start"


class Fingerprint:
    """What the compressor computes, summarised in a few numbers; recomputed when anything in it changes.

    That is a parameter or buffer that is replaced or changed in place, or any other attribute of its modules. A change
    through ``parameter.data`` alone is not seen. Hooks are not part of it: they neither count nor run here.
    """

    def __init__(self) -> None:
        # replaced as a whole: other threads may read it at any time
        self._known: _Known | None = None

    # a copy of the model computes its own
    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return Fingerprint, ()

    @outside_autocast
    def of(self, subject: Subject, *, details: bool, facts: ModuleFacts | None = None) -> dict[str, Any]:
        """``weights``, a digest of 32 digits, and with ``details`` also ``rope``, ``settings`` and ``probe``.

        ``facts`` are those of the modules as they are now, the same object for as long as they stay so.
        """
        known, around = self._known, tuple(_around(subject))
        if known is None or known.facts is None or known.facts is not facts or known.around != around:
            state = state_of(subject)
            if known is None or known.state != state:
                known = _Known(state, _digest(subject.lower))
            self._known = known = dataclasses.replace(known, facts=facts, around=around)
        if not details:
            return {"weights": known.weights}
        if known.told is None:
            told = {
                "rope": [_rounded(value) for rotation in subject.rope.values() for value in _numbers_of(rotation)],
                "settings": _settings(subject),
                "probe": _probe(subject),
            }
            self._known = known = dataclasses.replace(known, told=told)
        return {"weights": known.weights, **(known.told or {})}


@dataclasses.dataclass(frozen=True, eq=False)
class _Known:
    """A summary of a state; ``facts`` and ``around`` are what the state can be told by without looking it up."""

    state: tuple[Any, ...]
    weights: str
    told: dict[str, Any] | None = None
    facts: ModuleFacts | None = None
    around: tuple[Any, ...] = ()


def _numbers_of(rotation: Rotation) -> list[float]:
    return [rotation.scaling, *rotation.frequencies.tolist()] if rotation.turns else []


def memory_signature(config: Any, subject: Subject, identity: dict[str, Any]) -> dict[str, Any]:
    """What a memory of this compressor must share with its reader: sizes, tree, and the contents of ``identity``."""
    text_config, attention = config.text_config, subject.lower.layers[0].self_attn
    return {
        "model_type": text_config.model_type,
        "hidden_size": text_config.hidden_size,
        "injection_layers": config.injection_layers,
        "num_key_value_heads": projection(attention, "k").out_features // attention.head_dim,
        "head_dim": attention.head_dim,
        "chunk_size": config.chunk_size,
        "tree_depth": config.tree_depth,
        "slots_per_node": config.slots_per_node,
        **identity,
    }


# -- what the compressor is -------------------------------------------------------------------------------------------


def state_of(subject: Subject) -> tuple[Any, ...]:
    """Equal as long as nothing has changed that could change what the compressor computes."""
    lower, configs = subject.lower, set()
    state: list[Any] = list(_around(subject))
    add = state.append
    # all processes must check again at the same time: their parameters change together, FSDP's own state may not
    sharded = any(is_sharded(layer) for layer in lower.layers)
    stack: list[nn.Module] = [lower.embed_tokens, lower.norm, *lower.layers]
    while stack:
        module = stack.pop()
        fields = module.__dict__
        add(type(module))
        # attributes of nn.Module come first, unless something was set before its own __init__
        first = len(_MACHINERY) if tuple(islice(fields, len(_MACHINERY))) == _MACHINERY else 0
        for name, value in islice(fields.items(), first, None):
            if sharded or name in _OTHER_MACHINERY:
                continue
            add(name)
            if type(value) in _SIMPLE:
                add(value)
            elif isinstance(value, PreTrainedConfig):
                # one for all layers
                if id(value) not in configs:
                    configs.add(id(value))
                    add(_key(value.__dict__))
            else:
                add(_key(value))
        for tensors in (fields["_parameters"], fields["_buffers"]):
            for tensor in tensors.values():
                add(None if tensor is None else _identity(tensor))
        for name, child in fields["_modules"].items():
            # the injected block is the decoder's, not the compressor's
            if child is not None and name != "injection":
                stack.append(child)
    return tuple(state)


def _around(subject: Subject) -> Iterator[Any]:
    """What is not in the modules."""
    for name, (frequencies, *rest) in subject.rope.items():
        yield (name, _identity(frequencies), *rest)
    yield from (subject.chunk_size, subject.slot_position, torch.get_float32_matmul_precision())


def _key(value: Any) -> Any:
    if type(value) in _SIMPLE:
        return value
    if isinstance(value, Tensor):
        return _identity(value)
    if isinstance(value, (list, tuple)):
        return tuple(_key(entry) for entry in value)
    if isinstance(value, dict):
        return tuple((_key(name), _key(entry)) for name, entry in value.items())
    if isinstance(value, (set, frozenset)):
        return frozenset(_key(entry) for entry in value)
    return id(value)


def _identity(tensor: Tensor) -> tuple[int, int]:
    # tensors without storage, such as quantised ones, are known by the object
    return tensor.data_ptr() or id(tensor), version_of(tensor)


def _digest(lower: LowerModel) -> str:
    picks: list[Tensor] = []

    def pick(tensor: Tensor) -> None:
        flat = tensor.reshape(-1)
        index = torch.linspace(0, flat.numel() - 1, min(64, flat.numel()), dtype=torch.float64).long()
        picks.append(flat[index.to(flat.device)].to(torch.bfloat16).cpu())

    for module in (lower.embed_tokens, lower.norm, *lower.layers):
        # the injected block is the decoder's, not the compressor's
        for parameter in stored_parameters(module, skip="injection"):
            pick(parameter.detach())
    for layer in lower.layers:
        # weights in 8 bits are no parameters; the injected block is the decoder's
        for name, child in layer.named_modules():
            if type(child) is Fp8Linear and not name.startswith("injection."):
                pick(child.codes.view(torch.uint8))
    sample = torch.cat(picks).view(torch.int16).numpy().tobytes()
    return hashlib.sha256(sample).hexdigest()[:32]


def _settings(subject: Subject) -> str:
    """The layers' configuration, as text; for differences that the probe's precision may hide."""
    lines = [_settings_of(layer, subject.chunk_size) for layer in subject.lower.layers]
    if len(set(lines)) > 1:
        lines = [f"layer {index}: {line}" for index, line in enumerate(lines)]
    if subject.slot_position != "start":
        lines.append(f"slots at the {subject.slot_position} of their strides")
    return "; ".join([f"final norm {_epsilon_of(subject.lower.norm)}", *dict.fromkeys(lines)])


def _settings_of(layer: Any, chunk_size: int) -> str:
    window = sliding_window(layer)
    entries = {
        "norms": f"{_epsilon_of(attention_norm(layer))} and {_epsilon_of(mlp_norm(layer))}",
        "activation": getattr(getattr(layer.mlp, "config", layer.self_attn.config), family_of(layer).activation),
        "scale": f"{layer.self_attn.scaling:.6g}",
        # no node is longer than this window
        "window": window if window is not None and window < chunk_size else None,
    }
    if rotation_of(layer):
        entries["rotation"] = rotation_of(layer)
    if residual_factor(layer) != 1.0:
        entries["residual"] = f"{residual_factor(layer):.6g}"
    adapters = _adapters(layer)
    if adapters:
        entries["adapters"] = adapters
    return ", ".join(f"{name} {value}" for name, value in entries.items())


def _epsilon_of(norm: Any) -> str:
    return f"{norm_eps(norm)}"


def _adapters(layer: Any) -> str:
    """Digest of which adapters are active or merged and by what factors, for modules that say so as PEFT's do."""
    lines = []
    for name, module in layer.named_modules():
        if name.startswith("injection.") or not hasattr(module, "active_adapters"):
            continue
        active = [] if getattr(module, "disable_adapters", False) else list(module.active_adapters)
        scaling = getattr(module, "scaling", {})
        factors = {key: scaling.get(key) for key in active} if isinstance(scaling, dict) else scaling
        merged = getattr(module, "merged_adapters", [])
        if active or merged:
            lines.append(f"{name}: {factors}, merged {merged}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] if lines else ""


# -- what the compressor computes -------------------------------------------------------------------------------------


@torch.no_grad()
def _probe(subject: Subject) -> dict[str, Any] | None:
    """The compressor's output for a few fixed tokens, by random projections, and the precision of its numbers.

    ``None`` for sharded layers, which run only where all processes run them.
    """
    lower = subject.lower
    if any(is_sharded(layer) for layer in lower.layers):
        return None
    if not any(is_managed(layer) for layer in lower.layers):
        lower = LowerModel(_still(lower.embed_tokens), [_still(layer) for layer in lower.layers], _still(lower.norm))
    device = device_of(subject.lower.embed_tokens)
    vocabulary = lower.embed_tokens.weight.shape[0]
    ids = (torch.arange(_PROBE_TOKENS) * 7919 + 13).remainder(vocabulary).to(device)
    tables = subject.tables(2 * _PROBE_TOKENS, device)
    chunk = Chunk(document=0, index=1, start=0, length=_PROBE_TOKENS)
    keys, values, _ = compress_chunks(lower, ids, [chunk], TreeShape(1, _PROBE_TOKENS), tables, None, None)
    vector = query_vectors(lower, ids, [_PROBE_TOKENS], tables)
    sketches = torch.stack([_sketch(tensor).cpu() for tensor in (*keys, *values, vector)])
    # a rounding error may choose another expert, after which no outputs can be compared
    chosen = [any(map(has_experts, lower.layers[:index])) for index in range(len(keys))]
    sketches[torch.tensor([*chosen, *chosen, has_experts(lower.layers[0])])] = math.nan
    return {
        "epsilon": _rounded(_epsilon(keys[0].dtype)),
        "values": [[_rounded(value) if math.isfinite(value) else None for value in row] for row in sketches.tolist()],
    }


def _still(module: Any) -> Any:
    """The module in evaluation mode and without hooks; it shares everything else with the original."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(vars(module))
    twin.__dict__.update({name: type(vars(module)[name])() for name in _HOOKS if name in vars(module)})
    twin.__dict__["_modules"] = {
        name: None if child is None or name == "injection" else _still(child) for name, child in module._modules.items()
    }
    twin.__dict__["training"] = False
    twin.__dict__["_compiled_call_impl"] = None
    return twin


def _sketch(tensor: Tensor) -> Tensor:
    """Norm, and sums of all elements with fixed pseudo-random signs, ``[9]`` float32: distances survive."""
    flat = tensor.float().flatten()
    index = torch.arange(flat.numel() * SIGNS, device=flat.device)
    for factor in (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9):
        index = index * factor
        index = index ^ (index >> 29)
    signs = ((index >> 17) & 1).view(SIGNS, -1).to(torch.float32) * 2 - 1
    return torch.cat((flat.norm().view(1), (signs * flat).sum(1) / SIGNS**0.5))


def _epsilon(dtype: torch.dtype) -> float:
    """Unit roundoff of the matmuls; for float32 it may be larger than that of the dtype."""
    reduced = {"high": 2.0**-10, "medium": 2.0**-7}.get(torch.get_float32_matmul_precision(), 0.0)
    return max(torch.finfo(dtype).eps, reduced if dtype == torch.float32 else 0.0)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")

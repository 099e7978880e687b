"""What a memory must share with the model that reads it: sizes, tree, and what the compressor computes.

A signature is a dictionary that JSON can hold: the sizes of model and tree, ``weights`` (a digest of picked elements),
``rope`` and ``settings`` (what the layers are configured to), and ``probe``, the compressor's output for a few fixed
tokens. Files of version 1 end with ``weights``, and so do memories of a model in training.
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
from .memory_file import shorten
from .module_facts import ModuleFacts
from .rotary import LayerTables, Rotation
from .tree import TreeShape

_SIZES = (
    "hidden_size",
    "injection_layers",
    "num_key_value_heads",
    "head_dim",
    "chunk_size",
    "tree_depth",
    "slots_per_node",
)
_TEXTS = ("model_type", "weights")
_DETAILS = ("rope", "settings", "probe")
# enough that every module sees attention; the compressor's matmuls read their weights once for as many tokens
_PROBE_TOKENS = 16
# sums kept of each of the probe's tensors, in addition to its norm
_SIGNS = 8
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


def has_details(signature: dict[str, Any]) -> bool:
    """Whether a signature holds more than sizes and weights: those of old files and of models in training do not."""
    return all(name in signature for name in _DETAILS)


def describe_difference(expected: dict[str, Any], got: dict[str, Any]) -> str | None:
    """The first entry in which two signatures differ, as 'name: expected …, got …'; ``None`` if they are equal."""
    for key, value in expected.items():
        if key == "probe":
            difference = _difference_of_probes(value, got.get(key))
            if difference is not None:
                return difference
        elif key == "rope":
            difference = _difference_of_rope(value, got.get(key))
            if difference is not None:
                return difference
        elif got.get(key) != value:
            return f"{key}: expected {value}, got {got.get(key)}"
    return None


def check_signature(name: str, signature: Any) -> None:
    """Check that a signature, such as a file's, is one.

    Raises:
        ValueError: 'name: expected …, got …'.
    """
    expected = (*_SIZES, *_TEXTS)
    if not isinstance(signature, dict) or set(signature) not in (set(expected), {*expected, *_DETAILS}):
        got = ", ".join(map(str, signature)) if isinstance(signature, dict) else signature
        raise ValueError(f"{name}: expected a signature of {', '.join(expected)}, got {shorten(got)}")

    def expect(right: bool, key: str, what: str) -> None:
        if not right:
            raise ValueError(f"{name}: expected the signature's {key} to be {what}, got {shorten(signature[key])}")

    for key in _SIZES:
        value = signature[key]
        expect(type(value) is int and 1 <= value < 2**31, key, f"an integer from 1 to {2**31 - 1}")
    for key in _TEXTS:
        expect(isinstance(signature[key], str), key, "a text")
    if "probe" in signature:
        expect(isinstance(signature["settings"], str), "settings", "a text")
        expect(_are_numbers(signature["rope"]), "rope", "a list of numbers")
        probe = signature["probe"]
        if probe is None:
            return
        right = isinstance(probe, dict) and set(probe) == {"epsilon", "values"} and _are_numbers([probe["epsilon"]])
        right = right and isinstance(probe["values"], list)
        right = right and all(_are_numbers(row, nothing=True) and len(row) == 1 + _SIGNS for row in probe["values"])
        expect(
            right and len(probe["values"]) == 2 * signature["injection_layers"] + 1, "probe", "numbers of all layers"
        )


def _are_numbers(values: Any, *, nothing: bool = False) -> bool:
    """Whether a value is a list of finite numbers; with ``nothing``, ``None`` may stand for one that is not finite."""
    return isinstance(values, list) and all(
        (type(value) in (int, float) and math.isfinite(value)) or (nothing and value is None) for value in values
    )


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
    index = torch.arange(flat.numel() * _SIGNS, device=flat.device)
    for factor in (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9):
        index = index * factor
        index = index ^ (index >> 29)
    signs = ((index >> 17) & 1).view(_SIGNS, -1).to(torch.float32) * 2 - 1
    return torch.cat((flat.norm().view(1), (signs * flat).sum(1) / _SIGNS**0.5))


def _epsilon(dtype: torch.dtype) -> float:
    """Unit roundoff of the matmuls; for float32 it may be larger than that of the dtype."""
    reduced = {"high": 2.0**-10, "medium": 2.0**-7}.get(torch.get_float32_matmul_precision(), 0.0)
    return max(torch.finfo(dtype).eps, reduced if dtype == torch.float32 else 0.0)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _difference_of_rope(expected: list[float], got: Any) -> str | None:
    if not isinstance(got, list) or len(got) != len(expected):
        return f"rope: expected {len(expected) - 1} frequencies, got {shorten(got)}"
    for index, (a, b) in enumerate(zip(expected, got, strict=True)):
        # two devices may differ in a float32's last digits
        if not math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-12):
            what = f"frequency {index - 1}" if index else "a factor of cos and sin"
            return f"rope: expected {what} of {a:g}, got {b:g}"
    return None


def distances(one: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """Relative distance of two probes' outputs: keys by layer, values by layer, the vector that picks nodes."""
    found = []
    for a, b in zip(one["values"], other["values"], strict=True):
        if [value is None for value in a] != [value is None for value in b]:
            found.append(math.inf)
            continue
        (size, *sums), (other_size, *other_sums) = ([value or 0.0 for value in row] for row in (a, b))
        change = max(abs(size - other_size), math.dist(sums, other_sums))
        found.append(change / size if size else math.inf if change else 0.0)
    return found


def _tolerances(one: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """What rounding may do to each of the distances; it adds up from layer to layer."""
    epsilon, layers = max(one["epsilon"], other["epsilon"]), len(one["values"]) // 2
    # random models of 16 layers in bfloat16: at most 1, 2 and 5 roundoffs in layers 0, 1 and beyond
    by_layer = [max(1e-4, min(8, 2 + 2 * layer) * epsilon) for layer in range(layers)]
    return [*by_layer, *by_layer, max(1e-4, 8 * epsilon)]


def _difference_of_probes(expected: dict[str, Any] | None, got: dict[str, Any] | None) -> str | None:
    if expected is None or got is None:
        # sharded when it was made, or now
        return None
    if expected == got and not any(None in row for row in expected["values"]):
        # one that this model has made, as most are
        return None
    found, most = distances(expected, got), _tolerances(expected, got)
    layers = len(found) // 2
    for index, distance in enumerate(found):
        if distance > most[index]:
            what = "the vector that picks nodes" if index == 2 * layers else ("keys", "values")[index // layers]
            where = "" if index == 2 * layers else f" of layer {index % layers}"
            return (
                f"probe: expected this compressor's output for a few fixed tokens, got one whose {what}{where} are off "
                f"by {distance:.2g} (at most {most[index]:.2g})"
            )
    return None

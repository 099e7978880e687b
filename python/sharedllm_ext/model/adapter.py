"""Adapters: what was trained of a model, in one safetensors file that names its base checkpoint.

A tensor of the file is a parameter or buffer of the model under its own name, or a low-rank update of one:
``NAME:up [out, r]`` and ``NAME:down [r, in]``, added as ``scale · up @ down`` to what the base checkpoint gives.
The metadata hold ``sharedllm_adapter``, a JSON object: ``version``, ``base`` (a name), ``digests`` (of the base's
tensors), ``config`` (fields of :class:`SharedLLMConfig`), ``scale``, and ``about``, free words on its training.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from ..counted import counted

FORMAT, VERSION = "sharedllm_adapter", 1
UP, DOWN = ":up", ":down"
# of a configuration: what the base checkpoint says
_NOT_OWN = {"text_config", "tie_word_embeddings"}
_FIELDS = {"version", "base", "digests", "config", "scale", "about"}
_SHIPPED = Path(__file__).resolve().parent.parent / "adapters"
# elements of a tensor that its digest is of, evenly spread
_SAMPLES = 4096
_DIGITS = 4


def shipped_adapters() -> dict[str, Path]:
    """The adapters that the package ships, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.safetensors"))}


def find_adapter(adapter: str | os.PathLike[str]) -> str:
    """The path of an adapter, a file or the name of one that the package ships.

    Raises:
        FileNotFoundError: neither; names those that are shipped.
    """
    name, shipped = os.fsdecode(adapter), shipped_adapters()
    if not os.path.isfile(name) and name in shipped:
        return str(shipped[name])
    if not os.path.isfile(name):
        names = ", ".join(shipped) or "none"
        raise FileNotFoundError(f"adapter: expected a file or one of those that are shipped ({names}), got {name!r}")
    return name


def base_tensors(model: Any) -> dict[str, Tensor]:
    """The parameters of a model that are its base checkpoint's, by name in the order of the names."""
    names = dict(model.model.named_parameters(prefix="model"))
    if not model.config.tie_word_embeddings:
        names["lm_head.weight"] = model.lm_head.weight
    return {name: names[name] for name in sorted(names) if ".injection." not in name}


def digest(tensor: Tensor) -> str:
    """Hexadecimal digits that tell a tensor from another one: of its shape and of some elements as bfloat16."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() > _SAMPLES:
        flat = flat[torch.arange(_SAMPLES, device=flat.device) * (flat.numel() - 1) // (_SAMPLES - 1)]
    data = flat.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tuple(tensor.shape)}".encode() + data).hexdigest()[:_DIGITS]


def base_digests(model: Any) -> str:
    """Digests of a model's base parameters, one after the other in the order of their names."""
    return "".join(digest(tensor) for tensor in base_tensors(model).values())


def adapter_fields(config: Any) -> dict[str, Any]:
    """The fields of a configuration that are this package's own and not at their defaults."""
    own = set(type(config).__annotations__) - _NOT_OWN
    fields = {name: getattr(config, name) for name in sorted(own)}
    return {name: value for name, value in fields.items() if value != getattr(type(config), name)}


def write_adapter(
    path: str | os.PathLike[str],
    model: Any,
    tensors: Mapping[str, Tensor],
    *,
    base: str,
    scale: float = 1.0,
    about: str = "",
    digests: str | None = None,
) -> None:
    """Write an adapter.

    Args:
        path: the file, replaced as a whole.
        model: a :class:`SharedLLMForCausalLM` whose base parameters are still the base checkpoint's, or ``digests``.
        tensors: parameters and low-rank updates by name, see above.
        base: the base checkpoint's name.
        scale: of the low-rank updates.
        about: free words on the training.
        digests: :func:`base_digests` of the model before it was trained.

    Raises:
        ValueError: a tensor has no place in the model.
    """
    check_places(str(path), model, tensors)
    header = {
        "version": VERSION,
        "base": base,
        "digests": base_digests(model) if digests is None else digests,
        "config": adapter_fields(model.config),
        "scale": scale,
        "about": about,
    }
    target = Path(path)
    part = target.with_name(f"{target.name}.part")
    held = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    save_file(held, part, metadata={FORMAT: json.dumps(header)})
    part.replace(target)


@torch.no_grad()
def changed_tensors(model: Any, fresh: Any) -> dict[str, Tensor]:
    """Parameters and buffers of a model that differ from those of one that was just made of its base.

    Raises:
        ValueError: the models have other tensors.
    """
    tensors, others = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model, fresh))
    if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in others.items()}:
        names = sorted({n for n, t in {**tensors, **others}.items() if n not in tensors or n not in others})
        raise ValueError(
            "save_adapter: expected the model's own base, got one with other tensors"
            + (f", such as {names[0]}" if names else " of other sizes")
        )
    return {name: tensor for name, tensor in tensors.items() if not torch.equal(tensor, others[name].to(tensor))}


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of an adapter.

    Raises:
        ValueError: it is no adapter, or one of another version.
    """
    name = os.fsdecode(path)
    try:
        with safe_open(name, framework="pt") as file:
            text = (file.metadata() or {}).get(FORMAT)
        header = json.loads(text) if text is not None else None
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{name}: expected an adapter (safetensors), got a damaged or foreign file: {error}") from None
    if not isinstance(header, dict) or not isinstance(header.get("version"), int):
        raise ValueError(f"{name}: expected an adapter, got a safetensors file without that header")
    if header["version"] != VERSION or set(header) != _FIELDS:
        got = header["version"] if header["version"] != VERSION else ", ".join(sorted(set(header) ^ _FIELDS))
        raise ValueError(f"{name}: expected an adapter of version {VERSION} with its fields, got {got}")
    right = isinstance(header["digests"], str) and isinstance(header["config"], dict)
    right = right and isinstance(header["scale"], (int, float)) and isinstance(header["base"], str)
    if not right:
        raise ValueError(f"{name}: expected digests, config, scale and base of an adapter, got other kinds of values")
    return header


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an adapter, of whatever version."""
    # opening a FIFO would wait for its writer
    if not os.path.isfile(path):
        return False
    try:
        with safe_open(os.fsdecode(path), framework="pt") as file:
            return FORMAT in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def describe_adapter(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What an adapter holds, told by its header: no tensor is read.

    Returns:
        ``format``, ``version``, ``file``, ``file_bytes``, ``base`` (its name), ``base_tensors`` (how many), ``about``,
        ``config`` (the fields that differ from the defaults), ``scale`` (of low-rank updates), ``tensors``, ``updates``
        (how many of the tensors are pairs' halves) and ``parameters`` (what was trained: elements of all tensors of
        floating point).

    Raises:
        ValueError: it is no adapter, or one of another version.
    """
    name, header = os.fsdecode(path), read_header(path)
    with safe_open(name, framework="pt") as file:
        names = list(file.keys())
        slices = [file.get_slice(key) for key in names]
        # the pick's classes of tokens are whole numbers
        parameters = sum(math.prod(one.get_shape()) for one in slices if one.get_dtype().startswith(("F", "BF")))
    return {
        "format": FORMAT,
        "version": header["version"],
        "file": name,
        "file_bytes": os.path.getsize(name),
        "base": header["base"],
        "base_tensors": len(header["digests"]) // _DIGITS,
        "about": header["about"],
        "config": header["config"],
        "scale": header["scale"],
        "tensors": len(names),
        "updates": sum(key.endswith((UP, DOWN)) for key in names),
        "parameters": parameters,
    }


def check_base(name: str, header: Mapping[str, Any], model: Any) -> None:
    """Refuse a base checkpoint that the adapter was not trained on.

    Raises:
        ValueError: names how many tensors differ and the first of them.
    """
    tensors = base_tensors(model)
    got = {tensor: digest(value) for tensor, value in tensors.items()}
    digests = header["digests"]
    if len(digests) != _DIGITS * len(got):
        raise ValueError(
            f"{name}: expected the base {header['base']} of {counted(len(digests) // _DIGITS, 'tensor')}, got one of "
            f"{len(got)}"
        )
    expected = [digests[i : i + _DIGITS] for i in range(0, len(digests), _DIGITS)]
    other = [tensor for tensor, digits in zip(got, expected, strict=True) if got[tensor] != digits]
    if other:
        raise ValueError(
            f"{name}: expected the base {header['base']}, got one of which {len(other)} of "
            f"{counted(len(got), 'tensor')} differ, the first is {other[0]}"
        )


def check_places(name: str, model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that have no place in the model, or another shape than it.

    Raises:
        ValueError: names the first.
    """
    places: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for key, tensor in tensors.items():
        target = key.removesuffix(UP).removesuffix(DOWN)
        place, shape = places.get(target), tuple(tensor.shape)
        if place is None:
            raise ValueError(f"{name}: expected parameters of the model, got {target!r}, which it lacks")
        if key == target:
            right = shape == tuple(place.shape)
        else:
            pair = tensors.get(target + (DOWN if key.endswith(UP) else UP))
            side = 0 if key.endswith(UP) else 1
            right = False
            if pair is not None and place.dim() == len(shape) == pair.dim() == 2:
                right = shape[side] == place.shape[side] and shape[1 - side] == pair.shape[side]
        if not right:
            # of a field that is easily forgotten
            runs = f", a column for each of word_runs {model.config.word_runs}" if target == "pick.word_beta" else ""
            raise ValueError(f"{name}: expected {key!r} to fit {tuple(place.shape)}{runs}, got {shape}")


@torch.no_grad()
def apply_adapter(path: str | os.PathLike[str], header: Mapping[str, Any], model: Any) -> None:
    """Put an adapter's tensors into a model that was just made of its base.

    Raises:
        ValueError: a tensor has no place in the model, is not finite, or the file is damaged.
    """
    name = os.fsdecode(path)
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # read, not mapped: a file that changes meanwhile cannot take the process with it
    tensors = load(Path(name).read_bytes())
    check_places(name, model, tensors)
    broken = [key for key, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if broken:
        raise ValueError(f"{name}: expected finite weights, got infinities or NaN in {broken[0]}")
    for key, tensor in tensors.items():
        if key.endswith(DOWN):
            continue
        target = key.removesuffix(UP)
        place = places[target]
        if key == target:
            place.copy_(tensor.to(place.device))
            continue
        up, down = (tensors[target + side].to(place.device, torch.float32) for side in (UP, DOWN))
        place.copy_(place.float() + header["scale"] * (up @ down))

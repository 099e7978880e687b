"""The file from which a stopped training goes on: what is trained, the optimiser's state, how far it was.

Safetensors, ``parameter.NAME`` and for each field of AdamW's state ``FIELD.NAME``; the metadata hold a JSON object. It
is written under another name and renamed when it is whole, so that the one before stands until then.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

_KEY, _VERSION = "sharedllm_training", 1
_STATE = ("step", "exp_avg", "exp_avg_sq")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what stands on the disk."""


def checkpoint_tensors(
    parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds, by its name there: parameters, and AdamW's state of each."""
    for name, parameter in parameters.items():
        yield f"parameter.{name}", parameter
        state = optimizer.state.get(parameter, {})
        for field in _STATE:
            if field in state:
                yield f"{field}.{name}", state[field]


def write_checkpoint(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write a checkpoint.

    Args:
        path: the file.
        tensors: those of :func:`checkpoint_tensors`, whole and on the CPU.
        header: what ``json`` can write.

    Raises:
        TrainingError: it cannot be written; the checkpoint before stands.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        save_file(tensors, part, metadata={_KEY: json.dumps({"version": _VERSION, **header})})
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            part.unlink()
        reason = " ".join(str(error).split())
        stands = "the one before stands" if path.exists() else "there is none yet"
        raise TrainingError(f"{path}: the checkpoint cannot be written: {reason}; {stands}") from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Parameters by name, the optimiser's state by name, and the header.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged, or no checkpoint of this version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a checkpoint to go on from, found none")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
        tensors = load(path.read_bytes())
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: expected a checkpoint, got a damaged or foreign file: {error}") from None
    if not isinstance(header, dict) or header.get("version") != _VERSION:
        raise ValueError(f"{path}: expected a checkpoint of version {_VERSION}, got another file")
    parameters: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        field, _, name = key.partition(".")
        if field == "parameter":
            parameters[name] = tensor
        else:
            states.setdefault(name, {})[field] = tensor
    return parameters, states, header

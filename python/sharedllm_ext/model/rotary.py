"""Rotary tables of a model's layers, which need not all rotate in the same way."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .families import STILL, rotation_of
from .layer_math import version_of

Tables = tuple[Tensor, Tensor]


class Rotation(NamedTuple):
    """One way of rotating queries and keys.

    Attributes:
        frequencies: ``[R/2]`` radians per position.
        scaling: factor of cos and sin.
        turns: whether it rotates anything; if not, the frequencies only give the width of its tables.
    """

    frequencies: Tensor
    scaling: float
    turns: bool = True


def rotations_of(rotary: Any, layers: Iterable[Any]) -> dict[str, Rotation]:
    """The rotations of decoder layers by name, from the rotary embedding of their model."""
    return {name: _rotation(rotary, name) for name in dict.fromkeys(map(rotation_of, layers))}


def _rotation(rotary: Any, name: str) -> Rotation:
    prefix = f"{name}_" if name not in ("", STILL) else ""
    # rope types that follow the sequence length start from the original frequencies
    frequencies = getattr(rotary, f"{prefix}original_inv_freq", None)
    if frequencies is None:
        frequencies = getattr(rotary, f"{prefix}inv_freq")
    if name == STILL:
        return Rotation(frequencies, 1.0, turns=False)
    return Rotation(frequencies, float(getattr(rotary, f"{prefix}attention_scaling")))


def switch_of(rotary: Any) -> int | None:
    """Tokens beyond which a rotary embedding rotates all of them by other frequencies (longrope), or ``None``."""
    if getattr(rotary, "rope_type", None) != "longrope":
        return None
    parameters = rotary.config.rope_parameters
    if list(parameters["short_factor"]) == list(parameters["long_factor"]):
        return None
    return int(parameters["original_max_position_embeddings"])


class LayerTables:
    """cos and sin by layer, float32 ``[P, R/2]`` each, of at least as many positions as requested."""

    def __init__(self, tables: Mapping[str, Tables]) -> None:
        self._tables = tables

    def of(self, layer: Any) -> Tables:
        """cos and sin of a decoder layer."""
        return self._tables[rotation_of(layer)]


class TablesOf(Protocol):
    """Gives the tables of decoder layers; default: of those that read the memory."""

    def __call__(self, rows: int, device: torch.device, layers: Iterable[Any] | None = None) -> LayerTables:
        """cos and sin of at least ``rows`` positions on a device."""


class RopeTables:
    """Keeps the tables of a model's rotations, which grow with the requested positions."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[tuple[Any, ...], Tables]] = {}

    # a copy of the model computes its own
    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return RopeTables, ()

    def get(self, rotations: Mapping[str, Rotation], rows: int, device: torch.device) -> LayerTables:
        """Tables of at least ``rows`` positions on a device."""
        if torch.compiler.is_compiling():
            # whether kept tables are still right is decided on the host
            return LayerTables({name: _tables_of(rotation, rows, device) for name, rotation in rotations.items()})
        return LayerTables({name: self._of(name, rotation, rows, device) for name, rotation in rotations.items()})

    def _of(self, name: str, rotation: Rotation, rows: int, device: torch.device) -> Tables:
        source = rotation.frequencies
        origin = (source.data_ptr(), version_of(source), *rotation[1:])
        kept = self._kept.get(name)
        if kept is not None and kept[0] == origin and kept[1][0].shape[0] >= rows and kept[1][0].device == device:
            return kept[1]
        # also usable in training, even if first called in inference mode
        with torch.inference_mode(False):
            tables = _tables_of(rotation, 1 << (rows - 1).bit_length(), device)
        self._kept[name] = (origin, tables)
        return tables


@torch.no_grad()
def _tables_of(rotation: Rotation, rows: int, device: torch.device) -> Tables:
    """cos and sin of one rotation at positions ``0 .. rows-1``."""
    frequencies = rotation.frequencies.to(device=device, dtype=torch.float32)
    angles = torch.outer(torch.arange(rows, device=device, dtype=torch.float32), frequencies * rotation.turns)
    return angles.cos() * rotation.scaling, angles.sin() * rotation.scaling

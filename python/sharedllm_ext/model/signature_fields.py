"""A signature as a file holds it: whether it is one, and in what two of them differ.

A signature is a dictionary that JSON can hold: the sizes of model and tree, ``weights`` (a digest of picked elements),
``rope`` and ``settings`` (what the layers are configured to), and ``probe``, the compressor's output for a few fixed
tokens. Files of version 1 end with ``weights``, and so do memories of a model in training.
"""

import math
from typing import Any

from ..counted import counted
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
_TEXTS = ("model_type", "weights")
_DETAILS = ("rope", "settings", "probe")
#: Sums kept of each of the probe's tensors, in addition to its norm.
SIGNS = 8


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
        right = right and all(_are_numbers(row, nothing=True) and len(row) == 1 + SIGNS for row in probe["values"])
        expect(
            right and len(probe["values"]) == 2 * signature["injection_layers"] + 1, "probe", "numbers of all layers"
        )


def _are_numbers(values: Any, *, nothing: bool = False) -> bool:
    """Whether a value is a list of finite numbers; with ``nothing``, ``None`` may stand for one that is not finite."""
    return isinstance(values, list) and all(
        (type(value) in (int, float) and math.isfinite(value)) or (nothing and value is None) for value in values
    )


def _difference_of_rope(expected: list[float], got: Any) -> str | None:
    if not isinstance(got, list) or len(got) != len(expected):
        return f"rope: expected {counted(len(expected) - 1, 'frequency')}, got {shorten(got)}"
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

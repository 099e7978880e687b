"""Rows of JSON files that others wrote: each fault is one line that names the file, what was expected and what came."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sharedllm_ext.evaluation.texts import TextError, _read_file, half_surrogate, parse, shown

Row = Mapping[str, Any]


def read_json(path: Path, expected: str) -> Any:
    """The value in a JSON file."""
    return parse(_read_file(path, shown(path)), shown(path), expected)


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(name of the line, object) of every line of a JSON lines file that is not empty.

    Raises:
        TextError: bytes that are not UTF-8, a line that is no JSON object, or no line at all.
        OSError: the system does not let the file be read.
    """
    found = False
    # a line may hold U+2028 and the like, at which splitlines would cut
    for number, line in enumerate(_read_file(path, shown(path)).split("\n"), 1):
        if line.strip():
            found = True
            name = f"{shown(path)} line {number}"
            yield name, as_object(parse(line, name, "a JSON object"), name)
    if not found:
        raise TextError(f"{shown(path)}: expected JSON lines, got none")


def as_object(value: Any, name: str) -> Row:
    """``value``, a JSON object."""
    if not isinstance(value, dict):
        raise TextError(f"{name}: expected a JSON object, got {_came(value)}")
    return value


def as_list(value: Any, name: str) -> list[Any]:
    """``value``, a JSON array."""
    if not isinstance(value, list):
        raise TextError(f"{name}: expected a JSON array, got {_came(value)}")
    return value


def _came(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + " …"


def text_of(row: Row, key: str, name: str) -> str:
    """A string of the row that a tokenizer can read."""
    value = row.get(key)
    if not isinstance(value, str):
        came = f"the keys {_came(sorted(row))}" if key not in row else _came(value)
        raise TextError(f'{name}: expected a string "{key}", got {came}')
    if (place := half_surrogate(value)) >= 0:
        raise TextError(
            f'{name}: expected text in "{key}", got half of a surrogate pair '
            f"(\\u{ord(value[place]):04x} at character {place})"
        )
    return value


def texts_of(row: Row, key: str, name: str) -> list[str]:
    """A list of at least one string."""
    value = row.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        came = f"the keys {_came(sorted(row))}" if key not in row else _came(value)
        raise TextError(f'{name}: expected "{key}", a list of at least one string, got {came}')
    return value


def scalars_of(row: Row, key: str, name: str) -> list[str]:
    """A string or a number, or a list of at least one of them, as strings."""
    value = row.get(key)
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in items):
        came = f"the keys {_came(sorted(row))}" if key not in row else _came(value)
        raise TextError(f'{name}: expected "{key}", a string, a number or a list of them, got {came}')
    return [str(item) for item in items]


def number_of(row: Row, key: str, name: str) -> int:
    """A whole number of at least 0."""
    value = row.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        came = f"the keys {_came(sorted(row))}" if key not in row else _came(value)
        raise TextError(f'{name}: expected a whole number "{key}" of at least 0, got {came}')
    return value

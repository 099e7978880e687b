"""Pieces of text put into other text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Tokens = list[int]
IntArray = np.ndarray


def in_order(value: str | list[str], places: Sequence[int]) -> str:
    """Several values in the order in which the text has them."""
    if isinstance(value, str):
        return value
    return ", ".join(v for _, v in sorted(zip(places, value, strict=True)))


def insert(hay: IntArray, pieces: Sequence[Tokens], cuts: IntArray) -> tuple[IntArray, list[int]]:
    """``hay`` with piece ``i`` put in before its token ``cuts[i]``, and the first token of each piece in the result."""
    parts, places, last, length = [], [0] * len(pieces), 0, 0
    for i in np.argsort(cuts, kind="stable"):
        length += int(cuts[i]) - last
        places[i] = length
        parts += [hay[last : cuts[i]], np.array(pieces[i], dtype=np.int64)]
        length += len(pieces[i])
        last = int(cuts[i])
    return np.concatenate([*parts, hay[last:]]), places

"""BM25 over token ids: what a search by words finds, for comparison with the pick."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from layout import Layout

SATURATION = 1.2


def bm25(context: np.ndarray, question: Sequence[int], layout: Layout) -> np.ndarray:
    """Score ``[segments]`` of each segment with its margins; all have the same length, so there is no length term."""
    segments = len(context) // layout.segment
    scores = np.zeros(segments)
    for token in sorted(set(question)):
        counts = _counts(np.nonzero(context == token)[0], segments, layout)
        holding = int((counts > 0).sum())
        if holding:
            rarity = math.log(1 + (segments - holding + 0.5) / (holding + 0.5))
            scores += rarity * counts * (SATURATION + 1) / (counts + SATURATION)
    return scores


def best(scores: np.ndarray, count: int) -> list[int]:
    """The best segments, the earlier one of two that are equal."""
    order: list[int] = np.argsort(-scores, kind="stable")[:count].tolist()
    return order


def _counts(places: np.ndarray, segments: int, layout: Layout) -> np.ndarray:
    """How often each segment, read with its margins, holds a token that stands at ``places``."""
    segment, within = places // layout.segment, places % layout.segment
    # a token near a segment's end is also in the margin of the next one, near its begin in that of the one before
    following = segment[within >= layout.segment - layout.margin] + 1
    preceding = segment[within < layout.margin] - 1
    reading = np.concatenate((segment, following, preceding))
    return np.bincount(reading[(reading >= 0) & (reading < segments)], minlength=segments).astype(float)

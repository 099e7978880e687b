"""BM25 over token ids: which passages of a text share rare tokens with a question."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from sharedllm_ext.evaluation.texts import Tokens

Scores = np.ndarray[Any, np.dtype[np.float64]]

#: Saturation of repeated tokens, and penalty of long passages (Robertson and Zaragoza 2009).
SATURATION, LENGTH_SHARE = 1.2, 0.75


def scores(context: Tokens, question: Iterable[int], size: int) -> Scores:
    """Scores ``[passages]`` of consecutive passages of ``size`` tokens; the last one may be shorter.

    ``sum over different tokens t of the question of idf(t) f (k + 1) / (f + k (1 - b + b n / mean n))`` with ``f`` the
    count of t in the passage, ``n`` its tokens, k = 1.2, b = 0.75 and
    ``idf = log(1 + (N - N_t + 0.5) / (N_t + 0.5))`` for the ``N_t`` of ``N`` passages that hold t.
    """
    passages = -(-len(context) // size)
    total = np.zeros(passages)
    if not passages:
        return total
    lengths = np.full(passages, float(size))
    lengths[-1] = len(context) - (passages - 1) * size
    held_back = SATURATION * (1 - LENGTH_SHARE + LENGTH_SHARE * lengths / lengths.mean())
    for token in sorted(set(question)):
        counts = np.bincount(np.flatnonzero(context == token) // size, minlength=passages).astype(float)
        holding = int((counts > 0).sum())
        if holding:
            rarity = math.log(1 + (passages - holding + 0.5) / (holding + 0.5))
            total += rarity * counts * (SATURATION + 1) / (counts + held_back)
    return total


def best(found: Scores, count: int) -> list[int]:
    """The ``count`` best passages, best first; the earlier one of two that are equal."""
    order: list[int] = np.argsort(-found, kind="stable")[:count].tolist()
    return order

"""BM25 against scores computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sharedllm_ext.evaluation.bm25 import best, scores


def test_scores_by_hand() -> None:
    # passages [1 1 2 3], [4 5 6 7], [1 8]: lengths 4, 4, 2, mean 10 / 3
    context = np.array([1, 1, 2, 3, 4, 5, 6, 7, 1, 8])
    one = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    eight = math.log(1 + (3 - 1 + 0.5) / (1 + 0.5))
    long, short = 1.2 * (0.25 + 0.75 * 4 / (10 / 3)), 1.2 * (0.25 + 0.75 * 2 / (10 / 3))
    expected = [one * 2 * 2.2 / (2 + long), 0.0, one * 2.2 / (1 + short) + eight * 2.2 / (1 + short)]
    # a token of the question counts once, and one that is nowhere not at all
    assert scores(context, [8, 1, 1, 99], 4) == pytest.approx(expected)
    assert best(scores(context, [8, 1], 4), 2) == [2, 0]


def test_equal_passages_come_in_their_order() -> None:
    assert best(scores(np.zeros(12, dtype=int), [0], 4), 3) == [0, 1, 2]
    assert best(scores(np.arange(12), [99], 4), 2) == [0, 1]


def test_no_context() -> None:
    assert scores(np.zeros(0, dtype=int), [1], 4).shape == (0,)

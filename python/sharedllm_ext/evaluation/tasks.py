"""What a task of generated questions is: its texts, its parameters and its sources."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sharedllm_ext.evaluation.haystacks import NOISE_HAYSTACK, Haystack


class Made(NamedTuple):
    """A record's texts, before they are known to fit."""

    context: str
    question: str
    answer_prefix: str
    answers: list[str]


class Question(NamedTuple):
    """A question of a data set of documents: its answers and the numbers of the documents that hold them."""

    text: str
    answers: list[str]
    documents: list[int]


@dataclass(frozen=True)
class Documents:
    """A data set of questions about documents, in the form of SQuAD or HotpotQA."""

    questions: list[Question]
    documents: list[str]


@dataclass(frozen=True)
class Sources:
    """Sources of contexts: text for haystacks, data sets by the names of their tasks."""

    haystack: Haystack = NOISE_HAYSTACK
    documents: Mapping[str, Documents] = field(default_factory=dict)


@dataclass(frozen=True)
class Ask:
    """Parameters of one record."""

    length: int
    index: int
    depth: float
    seed: int
    sources: Sources


@dataclass(frozen=True)
class Task:
    """A kind of question.

    ``make(generator, units, ask)`` gives the texts with ``units`` pieces of context around the answer; ``least`` and
    ``most`` bound them. ``has_depth`` says that the answer is in one place, chosen by the depth.
    """

    make: Callable[[random.Random, int, Ask], Made]
    metric: str
    max_new_tokens: int
    has_depth: bool = True
    least: int = 1
    most: Callable[[Ask], int] | None = None
    needs: str = ""

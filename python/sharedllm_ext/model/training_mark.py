"""Identifies a memory of a model in training: its weights change with every step, too often for a digest."""

import uuid
from typing import Any

from .signature import Subject, state_of

_KIND = "in training"


class TrainingMark:
    """Names the present compressor in this process, until a step or a setting changes it.

    A change through ``parameter.data`` is not seen.
    """

    def __init__(self) -> None:
        self._name = uuid.uuid4().hex[:16]
        self._state: tuple[Any, ...] | None = None
        self._changes = 0

    # a copy of the model gets its own mark
    def __deepcopy__(self, _: Any) -> "TrainingMark":
        return TrainingMark()

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return TrainingMark, ()

    def of(self, subject: Subject) -> str:
        """The mark: the same one as long as nothing that could change the compressor's output is changed."""
        state = state_of(subject)
        if state != self._state:
            self._state = state
            self._changes += 1
        return f"{_KIND}, {self._name}, {self._changes}"


def is_training_mark(weights: Any) -> bool:
    """Whether a signature's entry for the weights is that of a model in training."""
    return isinstance(weights, str) and weights.startswith(_KIND)

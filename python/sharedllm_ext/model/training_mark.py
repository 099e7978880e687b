"""What a memory of a model in training is known by: its weights change with every step, too often for a digest."""

import uuid
from typing import Any

from .compressor import LowerModel
from .layer_math import version_of

_KIND = "in training"


class TrainingMark:
    """Names the present weights of one compressor in this process, until a step changes them.

    A change through ``parameter.data`` is not seen.
    """

    def __init__(self) -> None:
        self._name = uuid.uuid4().hex[:16]
        self._state: tuple[int, ...] | None = None
        self._changes = 0

    # a copy of the model goes its own way
    def __deepcopy__(self, _: Any) -> "TrainingMark":
        return TrainingMark()

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return TrainingMark, ()

    def of(self, lower: LowerModel) -> str:
        """The mark: the same one as long as no parameter is replaced or changed in place."""
        parameters = [lower.embed_tokens.weight, lower.norm.weight]
        for layer in lower.layers:
            # the injected block is the decoder's, not the compressor's
            parameters += [p for name, p in layer.named_parameters() if not name.startswith("injection.")]
        state = tuple(number for p in parameters for number in (p.data_ptr(), version_of(p)))
        if state != self._state:
            self._state = state
            self._changes += 1
        return f"{_KIND}, {self._name}, {self._changes}"


def is_training_mark(weights: Any) -> bool:
    """Whether a signature's entry for the weights is that of a model in training."""
    return isinstance(weights, str) and weights.startswith(_KIND)

"""What has been found out about a model, for as long as the model stays as it is."""

import dataclasses
import weakref
from typing import Any

from .module_facts import ModuleFacts
from .protocols import Decoder


@dataclasses.dataclass(eq=False)
class Examined:
    """What is known of a model's modules.

    Attributes:
        facts: what the modules were; ``None`` if that cannot be told, and nothing stays known.
        plain: whether a decoding step can run the modules.
        fixed: what a step fixes of them, see :func:`~.decoding.step.state_of_step`.
        rotations: the same of their rotations.
    """

    facts: ModuleFacts | None
    plain: bool = False
    fixed: "Fixed | None" = None
    rotations: tuple[Any, ...] = ()


class Fixed(tuple[Any, ...]):
    """A tuple that computes its hash once."""

    _hash: int | None = None

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = super().__hash__()
        return self._hash


# entries are replaced as a whole: other threads may read them at any time
_EXAMINED: "weakref.WeakKeyDictionary[Decoder, Examined]" = weakref.WeakKeyDictionary()


def examined(model: Decoder, *, just_now: bool = False) -> Examined:
    """What is known of a model as it is now; nothing if it has changed.

    Args:
        model: the model.
        just_now: whether the caller has asked before and knows that nothing has happened to the model since.
    """
    known, roots = _EXAMINED.get(model), [model.model, model.lm_head]
    if model.compressor is not None:
        roots.append(model.compressor)
    if known is None or known.facts is None or not (just_now or known.facts.hold_for(roots)):
        known = _EXAMINED[model] = Examined(ModuleFacts.of(roots))
    return known

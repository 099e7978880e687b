"""What training draws, as numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mix:
    """What training texts and windows are made of: shares from 0 to 1, but for ``asked``.

    Attributes:
        items: of hidden items: needles, needles whose question gives the key's meaning, several values, facts; the rest
            are events in everyday words.
        many, crowd: of the needles: those with 7 to 16, and with 17 to 64 statements of one form; the others have 6 at
            most.
        alike: of the needles: those whose keys are put together from few words.
        distractors: statements of the form of several values, about other keys, at most; at least two.
        asked: questions about one item, at most.
        whole: whether a paragraph that is asked about always stands whole in the context, not cut at its end.
        more: whether ``more_wordings.py`` is used, too.
        by_words: of the windows: those that read the best segments of a search by words in place of the pick's.
        shuffled, fewer: of the windows: those whose passages stand in random order; those with fewer than 8.
        absent: of the windows: those without a passage that holds the answer, in which the model has to say so.
    """

    items: tuple[float, float, float, float] = (0.22, 0.16, 0.22, 0.28)
    many: float = 0.35
    crowd: float = 0.1
    alike: float = 0.5
    distractors: int = 12
    asked: int = 3
    whole: bool = True
    more: bool = True
    by_words: float = 0.3
    shuffled: float = 0.3
    fewer: float = 0.4
    absent: float = 0.04

    @classmethod
    def run_c(cls) -> Mix:
        """What run C was trained with."""
        return cls(
            items=(0.34, 0.12, 0.16, 0.30),
            many=0,
            crowd=0,
            alike=0,
            distractors=2,
            asked=99,
            whole=False,
            more=False,
            by_words=0,
            shuffled=0,
            fewer=0,
            absent=0,
        )

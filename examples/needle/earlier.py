"""Segments of earlier batches, which the pick has to tell from the right ones, too."""

from __future__ import annotations

from typing import Any

import torch
from retriever import RawKeys
from shared_words import WordIndex
from torch import Tensor


class Earlier:
    """A queue of the last batches' raw keys and words, at most ``batches`` of them; their keys take no gradient.

    While it fills, what it gives grows; once it is full all sizes stay, and its tensors stay in place, so that a CUDA
    graph can hold a step. Keys are as the compressor made them then, up to ``batches`` steps ago.
    """

    def __init__(self, batches: int) -> None:
        if batches < 0:
            raise ValueError(f"queue: expected at least 0 batches, got {batches}")
        self.batches, self.count = batches, 0
        self.keys: RawKeys = {}
        self.words: list[Tensor] = []

    @property
    def full(self) -> bool:
        return self.count == self.batches

    def joined(self, raw_keys: RawKeys, words: WordIndex) -> tuple[RawKeys, WordIndex]:
        """A batch's keys and words, and those of the queue after them."""
        if not self.count:
            return raw_keys, words
        return {layer: torch.cat((keys, self.keys[layer])) for layer, keys in raw_keys.items()}, words.joined(
            self.words
        )

    def remember(self, raw_keys: RawKeys, words: WordIndex) -> None:
        """Put a batch at the front; the oldest one leaves a full queue."""
        if not self.batches:
            return
        new = {layer: keys.detach() for layer, keys in raw_keys.items()}
        if self.full:
            for layer, keys in new.items():
                _push(self.keys[layer], keys)
            for held, codes in zip(self.words, words.held, strict=True):
                _push(held, codes)
            return
        if self.count:
            new = {layer: torch.cat((keys, self.keys[layer])) for layer, keys in new.items()}
            self.words = [torch.cat(pair) for pair in zip(words.held, self.words, strict=True)]
        else:
            self.words = [codes.contiguous() for codes in words.held]
        # not the batch's own tensors, which a graph may overwrite
        self.keys = {layer: keys.clone() for layer, keys in new.items()}
        self.count += 1

    def state(self) -> dict[str, Any]:
        return {"batches": self.batches, "count": self.count, "keys": self.keys, "words": self.words}

    def load(self, state: dict[str, Any]) -> None:
        """Go on with :meth:`state`.

        Raises:
            ValueError: that of a queue of another length.
        """
        if state["batches"] != self.batches:
            raise ValueError(f"queue: expected {self.batches} batches as in this run, got {state['batches']}")
        self.count, self.keys, self.words = state["count"], state["keys"], state["words"]


def _push(held: Tensor, new: Tensor) -> None:
    """``new`` in front of what is ``held``, in place; as much at the end is dropped."""
    held.copy_(torch.cat((new, held[: len(held) - len(new)])))

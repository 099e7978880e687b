"""The search by words: which runs of tokens segments hold, and how rare what they share with a question is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from layout import Layout
from torch import Tensor

RUN_CODES = 32768


class Run(NamedTuple):
    """What the search by words looks for: runs of so many tokens, in a segment with so many tokens on both sides."""

    length: int
    margin: int


RUNS = (Run(1, 16), Run(2, 16), Run(4, 16))
# all that is read with a segment: words of a paragraph that stand around its answer
WIDE = Run(1, 64)


class WordIndex(NamedTuple):
    """The runs of tokens in each segment, read with a margin: for each of ``runs`` ``[segments, places]`` codes.

    Single tokens are told apart by their class (case and leading space do not count; there are ``class_count``), runs
    of several by a hash. 0 is no run.
    """

    held: list[Tensor]
    class_count: int
    runs: Sequence[Run] = RUNS

    @staticmethod
    def codes(classes: Tensor, length: int) -> Tensor:
        """Code ``[..., L]`` of the run of ``length`` classes that ends at each place; 0 where there is none."""
        code = classes
        for back in range(1, length):
            earlier = F.pad(classes[..., :-back], (back, 0))
            code = torch.where(
                (code > 0) & (earlier > 0), code * 31 + earlier * (7919 + 2 * back), torch.zeros_like(code)
            )
        return code if length == 1 else torch.where(code > 0, code % (RUN_CODES - 1) + 1, code)

    @classmethod
    def of(cls, classes: Tensor, layout: Layout, count: int, runs: Sequence[Run] = RUNS) -> WordIndex:
        """The index of documents ``classes [documents, tokens]``, whose segments follow each other.

        ``count`` is the number of classes.
        """
        size, held = layout.segment, []
        for length, margin in runs:
            windows = F.pad(classes, (margin, margin)).unfold(-1, size + 2 * margin, size).flatten(0, 1)
            held.append(cls.codes(windows, length))
        return cls(held, count, runs)

    def evidence(self, classes: Tensor, used: Tensor) -> Tensor:
        """How rare what a segment shares with a question is: ``[runs, segments, R, L]`` for questions ``[R, L]``.

        Its sizes depend on no value, so a CUDA graph can hold it: a table gives each code that is asked for a column.
        """
        parts, last = [], classes.numel()
        for (length, _), held in zip(self.runs, self.held, strict=True):
            codes = self.codes(classes, length)
            asked = codes.flatten()
            # equal codes share a column; what is not asked for, and what is no run, has the last one
            column = torch.full((self.class_count if length == 1 else RUN_CODES,), last, device=asked.device)
            column.scatter_(0, asked, torch.arange(last, device=asked.device))
            column[:1] = last
            found = torch.zeros(len(held), last + 1, dtype=torch.bool, device=asked.device)
            found.scatter_(1, column[held], True)
            found[:, last:] = False
            found = found.index_select(1, column[asked]).view(len(held), *codes.shape)
            found = found.to(torch.bfloat16 if found.is_cuda else torch.float32)
            holding = found.sum(0, dtype=torch.float32)
            rarity = torch.log(1 + (len(held) - holding + 0.5) / (holding + 0.5)) * (used & (codes > 0))
            parts.append(found * rarity.to(found.dtype))
        return torch.stack(parts)

"""Search by words: which runs of tokens a text's segments hold, and how rare they are among them."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Codes that runs of several tokens are hashed to.
RUN_CODES = 32768
#: Tokens of the longest run: the code of nine tokens of 262144 classes no longer fits 64 bits.
LONGEST_RUN = 8


class Run(NamedTuple):
    """What is looked for: runs of ``length`` tokens, in a segment with ``margin`` tokens on both sides."""

    length: int
    margin: int


#: The default of ``config.word_runs``.
RUNS = (Run(1, 16), Run(2, 16), Run(4, 16))


@dataclasses.dataclass(frozen=True)
class WordIndex:
    """The runs of tokens in every segment of one document.

    A run that reaches over the begin of a segment's margin, or over an end of the document, is not in it. What a
    segment holds is read from the codes of the whole document, so a wider margin takes no more bytes.

    Attributes:
        codes: for each length of a run ``[T]`` int32, the code of the run that ends at each token; 0 for none.
        segment: tokens of a segment; the last one may be shorter.
        runs: what is looked for.
    """

    codes: dict[int, Tensor]
    segment: int
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, classes: Tensor, segment: int, runs: Sequence[tuple[int, int]] = RUNS) -> "WordIndex":
        """The index of a document.

        Args:
            classes: ``[T]`` int64, the class of each token; 0 has no part in the search.
            segment: tokens of a segment.
            runs: a length and a margin each, in tokens.
        """
        own = tuple(Run(*run) for run in runs)
        codes = {length: run_codes(classes, length).int() for length in sorted({run.length for run in own})}
        return cls(codes, segment, own)

    @property
    def count(self) -> int:
        """How many segments there are."""
        return -(-next(iter(self.codes.values())).numel() // self.segment)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes."""
        return sum(codes.nbytes for codes in self.codes.values())

    def evidence(self, classes: Tensor) -> Tensor:
        """How much each token of a question says about each segment.

        A run of tokens that ends there and that the segment holds counts ``log(1 + (n - h + 1/2) / (h + 1/2))``, where
        ``h`` of ``n`` segments hold it; one that it does not hold counts nothing.

        Args:
            classes: ``[L]`` int64, the classes of the question's tokens.

        Returns:
            ``[len(runs), n, L]`` float32.
        """
        return joint_evidence([self], classes)

    def _held(self, run: Run, columns: Tensor, length: int) -> Tensor:
        """Which of ``length`` columns each segment holds, ``[n, length + 1]`` bool; the last one is always false.

        Args:
            run: whose length the columns are of.
            columns: ``[T]`` int64, of the run that ends at each token; ``length`` for what is in no column.
            length: ``L``, tokens of the question.
        """
        count, width = self.count, self.segment + 2 * run.margin - (run.length - 1)
        held = torch.zeros(count, length + 1, dtype=torch.bool, device=columns.device)
        if count and width > 0:
            missing = count * self.segment - columns.numel()
            padded = F.pad(columns, (run.margin, run.margin + missing), value=length)
            # a run's first token is a segment's or its margin's, too
            held.scatter_(1, padded[run.length - 1 :].unfold(0, width, self.segment), True)
            held[:, length] = False
        return held


def joint_evidence(indexes: Sequence[WordIndex], classes: Tensor) -> Tensor:
    """:meth:`WordIndex.evidence` over the segments of several documents, one after the other.

    One pass over the codes whatever ``L`` is: beside them it takes twice the bytes of those of one length, and a byte
    for each segment, run and token of the question.

    Args:
        indexes: with the same runs; no word reaches from one document into the next.
        classes: ``[L]`` int64, the classes of the question's tokens.

    Returns:
        ``[len(runs), n, L]`` float32, rarities over all ``n`` segments.
    """
    runs, length = indexes[0].runs, classes.numel()
    count = sum(index.count for index in indexes)
    if not length:
        return torch.zeros(len(runs), count, 0, device=classes.device)
    parts: dict[Run, Tensor] = {}
    for size in indexes[0].codes:
        asked = run_codes(classes, size)
        # the column of each code; equal codes share one, and what is not asked for (or no run) has the last
        above = int(asked.max()) + 1
        column = torch.full((above + 1,), length, dtype=torch.int64, device=asked.device)
        column[asked] = torch.arange(length, device=asked.device)
        column[0] = length
        columns = [column[index.codes[size].clamp(max=above)] for index in indexes]
        for run in runs:
            if run.length == size:
                held = [index._held(run, own, length) for index, own in zip(indexes, columns, strict=True)]
                parts[run] = _rarities(torch.cat(held)[:, column[asked]])
    return torch.stack([parts[run] for run in runs])


def _rarities(found: Tensor) -> Tensor:
    """``[n, L]`` float32: of each run that is ``found [n, L]`` in a segment, how rare it is among the segments."""
    holding = found.sum(0, dtype=torch.float32)
    return found * torch.log(1 + (found.shape[0] - holding + 0.5) / (holding + 0.5))


def run_codes(classes: Tensor, length: int) -> Tensor:
    """Code ``[…, L]`` of the run of ``length`` tokens that ends at each place of ``classes [..., L]``; 0 for none.

    Runs do not reach over a class of 0.
    """
    code = classes
    for back in range(1, length):
        # also of fewer tokens than a run has
        earlier = F.pad(classes, (back, 0))[..., : classes.shape[-1]]
        whole = (code > 0) & (earlier > 0)
        code = torch.where(whole, code * 31 + earlier * (7919 + 2 * back), torch.zeros_like(code))
    return code if length == 1 else torch.where(code > 0, code % (RUN_CODES - 1) + 1, code)

"""Search by words: which runs of tokens a text's segments hold, and how rare they are among them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Lengths of the runs of tokens that are looked for.
RUN_LENGTHS = (1, 2, 4)
#: Codes that runs of several tokens are hashed to.
RUN_CODES = 32768
#: Tokens on both sides of a segment that are searched with it.
MARGIN = 16


class WordIndex(NamedTuple):
    """The runs of tokens in every segment of one document.

    Attributes:
        codes: for each of RUN_LENGTHS ``[n, segment + 2 * MARGIN]`` int64, the code of the run that ends at each place
            of a segment with its margins; 0 where there is none.
    """

    codes: list[Tensor]

    @classmethod
    def of(cls, classes: Tensor, segment: int) -> "WordIndex":
        """The index of a document.

        Args:
            classes: ``[T]`` int64, the class of each token; 0 has no part in the search.
            segment: tokens of a segment; the last one may be shorter.
        """
        missing, width = -classes.numel() % segment, segment + 2 * MARGIN
        padded = F.pad(classes, (MARGIN, MARGIN + missing))
        windows = padded.unfold(0, width, segment) if classes.numel() else classes.new_empty(0, width)
        return cls([run_codes(windows, length) for length in RUN_LENGTHS])

    def evidence(self, classes: Tensor) -> Tensor:
        """How much each token of a question says about each segment.

        A run of tokens that ends there and that the segment holds counts ``log(1 + (n - h + 1/2) / (h + 1/2))``, where
        ``h`` of ``n`` segments hold it; one that it does not hold counts nothing.

        Args:
            classes: ``[L]`` int64, the classes of the question's tokens.

        Returns:
            ``[len(RUN_LENGTHS), n, L]`` float32.
        """
        return torch.stack(
            [
                _rarities(codes, run_codes(classes.unsqueeze(0), length)[0])
                for length, codes in zip(RUN_LENGTHS, self.codes, strict=True)
            ]
        )


def _rarities(codes: Tensor, asked: Tensor) -> Tensor:
    """``[n, L]``: the rarity of each of the codes ``asked [L]`` where a segment ``codes [n, W]`` holds it.

    One pass over the codes whatever ``L`` is: beside them it takes an index as large as they are and ``[n, L + 1]``
    bytes, never ``n W L``.
    """
    segments, length = codes.shape[0], asked.numel()
    if not length:
        return torch.zeros(segments, 0, device=codes.device)
    # the column of each code; equal codes share one, and what is not asked for (or no run) has the last
    above = int(asked.max()) + 1
    column = torch.full((above + 1,), length, dtype=torch.int64, device=codes.device)
    column[asked] = torch.arange(length, device=codes.device)
    column[0] = length
    held = torch.zeros(segments, length + 1, dtype=torch.bool, device=codes.device)
    held.scatter_(1, column[codes.clamp(max=above)], True)
    held[:, length] = False
    found = held[:, column[asked]]
    holding = found.sum(0, dtype=torch.float32)
    return found * torch.log(1 + (segments - holding + 0.5) / (holding + 0.5))


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

"""Which chunks each process compresses."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple


class Share(NamedTuple):
    """One process's chunks: for each document the first one, and the first token and the end of them all."""

    first_chunks: list[int]
    tokens: list[tuple[int, int]]

    @property
    def total(self) -> int:
        """Tokens of the share."""
        return sum(end - begin for begin, end in self.tokens)


def shares_of(lengths: Sequence[int], chunk_size: int, processes: int) -> list[Share]:
    """Contiguous slices of all documents' chunks, one a process, as equal in tokens as whole chunks allow.

    Args:
        lengths: tokens of each document.
        chunk_size: tokens of a full chunk.
        processes: how many shares; there may be more of them than chunks.

    Returns:
        The shares; put one after the other they are all chunks in their order.
    """
    total = sum(lengths)
    # first token of every process's slice, where the documents are laid end to end
    starts, begin = [0], 0
    for length in lengths:
        for first in range(0, length, chunk_size):
            middle = begin + first + min(chunk_size, length - first) / 2
            # a chunk is of the process that its middle falls to
            while len(starts) <= middle * processes / total:
                starts.append(begin + first)
        begin += length
    starts += [total] * (processes + 1 - len(starts))
    shares = []
    for low, high in itertools.pairwise(starts):
        firsts, tokens, begin = [], [], 0
        for length in lengths:
            inside = [min(max(edge - begin, 0), length) for edge in (low, high)]
            firsts.append(inside[0] // chunk_size if inside[0] < inside[1] else 0)
            tokens.append((inside[0], inside[1]) if inside[0] < inside[1] else (0, 0))
            begin += length
        shares.append(Share(firsts, tokens))
    return shares

"""Chunks of packed documents, and which of them are compressed together."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One chunk of a document: its document, index in the document and first token and length in the packed context."""

    document: int
    index: int
    start: int
    length: int


def cut_into_chunks(lengths: Sequence[int], chunk_size: int, first_chunks: Sequence[int] | None = None) -> list[Chunk]:
    """Chunks of packed documents of the given lengths, in order; the last chunk of a document may be short.

    Args:
        lengths: tokens of each document, or of its part that begins with chunk ``first_chunks[i]``.
        chunk_size: tokens of a full chunk.
        first_chunks: index of each part's first chunk in its document; default: 0, whole documents.
    """
    chunks, first = [], 0
    for document, length in enumerate(lengths):
        number = 0 if first_chunks is None else first_chunks[document]
        chunks += [
            Chunk(document, number + index, first + begin, min(chunk_size, length - begin))
            for index, begin in enumerate(range(0, length, chunk_size))
        ]
        first += length
    return chunks


def micro_batch(chunks: Sequence[Chunk], first: int, tokens: int) -> Sequence[Chunk]:
    """Consecutive chunks from index ``first`` on of at most ``tokens`` tokens, at least one chunk."""
    end, total = first + 1, chunks[first].length
    while end < len(chunks) and total + chunks[end].length <= tokens:
        total += chunks[end].length
        end += 1
    return chunks[first:end]

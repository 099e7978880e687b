"""Which documents of a memory each batch row reads: one, or several one after the other."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

#: What a batch row reads: a document, or several in the order of the text that they make.
Row = int | tuple[int, ...]


class Span(NamedTuple):
    """A document as a batch row reads it.

    Attributes:
        slots: first slot and end.
        position: rotary position of the row's queries, seen from this document's first chunk.
    """

    slots: tuple[int, int]
    position: int


def documents_of(row: Row) -> tuple[int, ...]:
    """The documents of a row, in the order of the text that they make."""
    return row if isinstance(row, tuple) else (row,)


def document_of(rows: Sequence[Row], row: int) -> int:
    """The one document that a batch row reads.

    Raises:
        ValueError: it reads several.
    """
    own = rows[row]
    if isinstance(own, tuple):
        raise ValueError(
            f"memory: expected batch rows that read one document each, got row {row}, which reads documents {list(own)}"
        )
    return own


def expect_document(document: Any) -> None:
    """Refuse a list of documents where each gets a row of its own.

    Raises:
        TypeError: no integer.
    """
    try:
        operator.index(document)
    except TypeError:
        raise TypeError(
            f"documents: expected a document for each row, got {document!r}; with_rows gives a row several documents"
        ) from None


def rows_of(documents: Sequence[int | Sequence[int]], count: int) -> list[Row]:
    """What is given for each batch row, checked against a memory of ``count`` documents.

    Raises:
        IndexError: a document is not in ``0 .. count-1``.
        TypeError: something that is no document and no list of documents.
        ValueError: no row, a row without documents, or one that names a document twice.
    """
    if not len(documents):
        raise ValueError("documents: expected at least one batch row, got none")
    rows: list[Row] = []
    for row, given in enumerate(documents):
        own = _integers(given)
        if own is None:
            raise TypeError(f"documents[{row}]: expected a document, or a list of documents, got {given!r}")
        if not own:
            raise ValueError(f"documents[{row}]: expected at least one document, got none")
        for document in own:
            if not 0 <= document < count:
                raise IndexError(f"documents[{row}]: expected documents 0 to {count - 1}, got {document}")
        twice = next((document for document in own if own.count(document) > 1), None)
        if twice is not None:
            raise ValueError(f"documents[{row}]: expected each document once, got document {twice} twice")
        rows.append(own if len(own) > 1 else own[0])
    return rows


def _integers(given: Any) -> tuple[int, ...] | None:
    try:
        return (operator.index(given),)
    except TypeError:
        pass
    if isinstance(given, (str, bytes)):
        return None
    try:
        return tuple(map(operator.index, given))
    except TypeError:
        return None


def beside(rows: Sequence[Row], begin: int) -> list[Row]:
    """The rows of a memory whose first document becomes document ``begin`` of another."""
    return [tuple(document + begin for document in row) if isinstance(row, tuple) else row + begin for row in rows]


def spans_of(row: Row, cu_slots: Sequence[int], num_chunks: Sequence[int], offset: int) -> tuple[Span, ...]:
    """What a batch row reads: at least one document, of several those that have slots.

    Keys are rotated by the chunk's index in its own document, and attention knows differences of positions alone. So
    queries that are ``n`` chunks behind the begin of a document stand at ``n + offset``, seen from there, whatever
    comes before or between: the documents are read as if their chunks stood in one document.

    Args:
        row: its documents.
        cu_slots, num_chunks: of the memory.
        offset: added to the number of chunks it is the position of queries behind a document.
    """
    spans: list[Span] = []
    behind = 0
    for document in reversed(documents_of(row)):
        behind += num_chunks[document]
        spans.append(Span((cu_slots[document], cu_slots[document + 1]), behind + offset))
    held = [span for span in reversed(spans) if span.slots[0] < span.slots[1]]
    return tuple(held or spans[:1])

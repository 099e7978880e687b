"""Where tokens of a context stand in its texts: documents and lines."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sharedllm_ext.evaluation.texts import Texts, Tokens

if TYPE_CHECKING:
    from sharedllm_ext.model.sources import Source


@dataclass(frozen=True)
class Place:
    """Lines ``first`` to ``last`` of a text, from 1; both ``None`` where its tokens do not tell lines."""

    source: str
    first: int | None
    last: int | None

    def __str__(self) -> str:
        return in_words(self.source, self.first, self.last)


def in_words(source: str, first: int | None, last: int | None) -> str:
    """A :class:`Place` for people."""
    if first is None:
        return source
    return f"{source} line {first}" if first == last else f"{source} lines {first} to {last}"


@dataclass(frozen=True)
class Document:
    """Tokens ``start`` to ``end`` of a context that are one text with ``line_ends``, ``None`` for token ids.

    ``heading`` counts the lines that were put before the text's own.
    """

    source: str
    start: int
    end: int
    line_ends: int | None
    heading: int


class Places:
    """The texts of a context.

    Args:
        tokenizer: the one that made the ids.
        ids: the context's token ids, ``[C]``.
    """

    def __init__(self, tokenizer: Any, ids: Tokens) -> None:
        self.tokenizer, self.ids = tokenizer, ids
        self.documents: list[Document] = []

    def add(self, source: str, start: int, end: int, line_ends: int | None, heading: int = 0) -> None:
        """Tokens ``start`` to ``end`` are the text of that name; see :class:`Document`."""
        self.documents.append(Document(source, start, end, line_ends, heading))

    def add_texts(
        self,
        texts: Texts,
        documents: Sequence[Tokens],
        start: int,
        *,
        headings: bool,
        only: bool = True,
        gap: int = 0,
    ) -> None:
        """Add what one path holds: ``documents`` are the tokens of each of its texts and begin at ``start``.

        With ``headings`` each text begins with a line of its path; ``only``: the path need not be named; ``gap``
        tokens divide the texts.
        """
        if len(documents) != len(texts.documents):
            # some have no tokens, by a tokenizer that leaves characters out
            self.add(texts.source, start, start + sum(map(len, documents)) + gap * (len(documents) - 1), None)
            return
        for name, text, tokens in zip(texts.names, texts.documents, documents, strict=True):
            within = name if only else f"{texts.source}: {name}"
            source = texts.source if texts.kind in ("text", "ids") else within
            line_ends = text.count("\n") if isinstance(text, str) else None
            self.add(source, start, start + len(tokens), line_ends, int(headings))
            start += len(tokens) + gap

    def cut_last(self) -> None:
        """The last text was cut: its line ends are those of its tokens."""
        last = self.documents[-1]
        self.documents[-1] = replace(last, line_ends=self._decode(last.start, last.end).count("\n"))

    def of(self, start: int, end: int) -> list[Place]:
        """Where the tokens from ``start`` to ``end`` stand, a place for each text that they touch."""
        return [
            self._in(document, max(start, document.start), min(end, document.end))
            for document in self.documents
            if start < document.end and document.start < end
        ]

    def _in(self, document: Document, start: int, end: int) -> Place:
        if document.line_ends is None:
            return Place(document.source, None, None)
        before, inside, after = (
            self._decode(*span).count("\n") for span in ((document.start, start), (start, end), (end, document.end))
        )
        if before + inside + after != document.line_ends:
            # a tokenizer that does not keep line ends
            return Place(document.source, None, None)
        # a line end that closes the passage begins no further line of it
        closed = inside > 0 and self._decode(end - 1, end).endswith("\n")
        first = before + 1 - document.heading
        return Place(document.source, max(1, first), max(1, first + inside - closed))

    def _decode(self, start: int, end: int) -> str:
        return str(self.tokenizer.decode(self.ids[start:end].tolist(), clean_up_tokenization_spaces=False))


def kept_places(source: Source, tokenizer: Any) -> Places:
    """Where the texts of a document, whose token ids are known, stand in it, as far as its source tells.

    Lines are those that the source tells; of a text without them they are those of its tokens, if these give the text
    back, and it is the only one of its name.
    """
    ids, names = source.token_ids, source.names
    assert ids is not None  # see above
    places = Places(tokenizer, ids.numpy())
    # beside texts, what is known by its tokens alone divides them, or has followed them
    texts = [text.name is not None or text.sha256 is not None or text.offsets is not None for text in source.texts]
    held = [number for number, is_text in enumerate(texts) if is_text or not any(texts)]
    begins = [0, *itertools.accumulate(text.tokens for text in source.texts)]
    of_name: dict[str | None, list[int]] = {}
    for number in range(len(names)):
        of_name.setdefault(names[number], []).append(number)
    kept = set(held)
    alone = {own[0] for own in of_name.values() if own[0] in kept and not kept.intersection(own[1:])}
    for number in held:
        text, name, start, end = source.texts[number], names[number], begins[number], begins[number + 1]
        if name is None:
            continue
        line_ends = text.line_ends
        if line_ends is None and text.sha256 is not None and number in alone:
            whole = str(tokenizer.decode(ids[start:end].tolist(), clean_up_tokenization_spaces=False))
            if hashlib.sha256(whole.encode(errors="surrogatepass")).hexdigest() == text.sha256:
                line_ends = whole.count("\n")
        last = places.documents[-1] if places.documents else None
        if last is not None and line_ends is None and (last.source, last.line_ends, last.end) == (name, None, start):
            # one place for all of a text
            places.documents[-1] = replace(last, end=end)
        else:
            places.add(name, start, end, line_ends, text.heading)
    return places

"""What training reads: plain texts, token arrays, and JSON lines of contexts with questions and answers."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..evaluation.json_rows import Row, read_rows, text_of
from ..evaluation.texts import TextError, Texts, read_texts, shown, text_files
from ..evaluation.tokenising import encode, read_tokens, text_only

Tokens = np.ndarray[Any, np.dtype[np.integer[Any]]]
#: An answer that occurs more often says nothing on where its evidence is.
MOST_PLACES = 8
# files of a folder that are no plain text
_OWN = (".jsonl", ".npy")


class Record(NamedTuple):
    """A question about a context, in tokens.

    Attributes:
        context: ``[T]``.
        question, answer: token ids.
        places: (first token, tokens) of the evidence in the context; empty where that is not known.
    """

    context: Tokens
    question: list[int]
    answer: list[int]
    places: list[tuple[int, int]]


class Sources(NamedTuple):
    """All that is read: documents of plain text as token arrays, and records."""

    documents: list[Tokens]
    records: list[Record]


def read_sources(paths: Sequence[str], tokenizer: Any, vocabulary: int) -> Sources:
    """Read text files, ``.npy`` arrays of token ids, ``.jsonl`` files, and folders of all of them.

    A line of a ``.jsonl`` file holds ``text``, or ``context``, ``question`` and ``answer``, and optionally ``place``,
    ``[first, end]`` of the evidence in the context or a list of such pairs: characters, or tokens where the context is
    a list of token ids. Without a place, the evidence is where the answer occurs in the context.

    Raises:
        TextError: a line of another kind, a place outside of its context, ids outside the vocabulary, text without a
            tokenizer.
        OSError: a file that cannot be read.
    """
    documents: list[Tokens] = []
    records: list[Record] = []
    reader = _Reader(tokenizer, vocabulary)
    for path in paths:
        folder = Path(path).is_dir()
        own = [file for file in text_files(Path(path)) if file.suffix in _OWN] if folder else []
        for file in own if folder else [Path(path)]:
            if file.suffix == ".jsonl" and file.is_file():
                found = reader.rows(file, records)
            else:
                # as it was given: - is standard input
                found = read_texts(file if folder else path)
            documents += read_tokens(found, tokenizer, vocabulary, join=False) if found is not None else []
        if folder:
            found = _texts_of_folder(path, among=bool(own))
            documents += read_tokens(found, tokenizer, vocabulary, join=False) if found is not None else []
    return Sources(documents, records)


def _texts_of_folder(path: str, among: bool) -> Texts | None:
    """The text files of a folder that are no JSON lines; ``None`` if there are none ``among`` other files of ours."""
    try:
        texts = read_texts(path)
    except TextError:
        if among:
            return None
        raise
    kept = [i for i, name in enumerate(texts.names) if not name.endswith(".jsonl")]
    if not kept:
        return None
    documents: Any = [texts.documents[i] for i in kept]
    return dataclasses.replace(texts, documents=documents, names=[texts.names[i] for i in kept])


class _Reader:
    """Makes records of the rows of a file."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.twin = None if tokenizer is None else text_only(tokenizer)

    def rows(self, path: Path, records: list[Record]) -> Texts | None:
        """Add the questions of a file to ``records``; its plain texts, if there are any."""
        texts: list[str] = []
        for name, row in read_rows(path):
            if "question" in row:
                records.append(self.record(row, name))
            else:
                texts.append(text_of(row, "text", name))
        texts = [text for text in texts if text.strip()]
        names = [f"text {i + 1}" for i in range(len(texts))]
        return Texts(shown(path), texts, names, kind="lines") if texts else None

    def record(self, row: Row, name: str) -> Record:
        context, spans = self._context(row, name)
        question, answer = (self._ids(row, key, name) for key in ("question", "answer"))
        if not len(context) or not question or not answer:
            raise TextError(
                f"{name}: expected context, question and answer of at least one token each, got none of one"
            )
        return Record(context, question, answer, spans)

    def _context(self, row: Row, name: str) -> tuple[Tokens, list[tuple[int, int]]]:
        if isinstance(row.get("context"), list):
            tokens: Tokens = np.asarray(self._ids(row, "context", name), dtype=np.int32)
            given = _places(row, len(tokens), "tokens", name)
            if given is None:
                given = _occurrences(tokens.tolist(), self._ids(row, "answer", name))
            return tokens, [(first, end - first) for first, end in given]
        text = text_of(row, "context", name)
        self._need_tokenizer(name)
        given = _places(row, len(text), "characters", name)
        if given is None:
            answer = row.get("answer")
            given = _occurrences(text, answer) if isinstance(answer, str) else []
        if not getattr(self.tokenizer, "is_fast", False):
            # without offsets: by the lengths of what stands before
            tokens = encode(self.tokenizer, [text], names=[name])[0]
            ends = [[len(encode(self.tokenizer, [text[:place]])[0]) for place in pair] for pair in given]
            return tokens, [(min(a, len(tokens) - 1), max(1, b - a)) for a, b in ends]
        assert self.twin is not None
        found = self.twin(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        offsets = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        spans = []
        for first, end in given:
            (inside,) = np.nonzero((offsets[:, 1] > first) & (offsets[:, 0] < end))
            if len(inside):
                spans.append((int(inside[0]), int(inside[-1] - inside[0] + 1)))
        return np.asarray(found["input_ids"], dtype=np.int32), spans

    def _ids(self, row: Row, key: str, name: str) -> list[int]:
        value = row.get(key)
        if not isinstance(value, list):
            text = text_of(row, key, name)
            self._need_tokenizer(name)
            return encode(self.tokenizer, [text], names=[name])[0].tolist() if text else []
        if not all(type(token) is int and 0 <= token < self.vocabulary for token in value):
            wrong = next(token for token in value if type(token) is not int or not 0 <= token < self.vocabulary)
            raise TextError(f'{name}: expected token ids from 0 to {self.vocabulary - 1} in "{key}", got {wrong!r}')
        return value

    def _need_tokenizer(self, name: str) -> None:
        if self.tokenizer is None:
            raise TextError(f"{name}: expected lists of token ids, because the base has no tokenizer; got text")


def _places(row: Row, length: int, unit: str, name: str) -> list[tuple[int, int]] | None:
    """The spans of a row, checked; ``None`` if it has none."""
    place = row.get("place")
    if place is None:
        return None
    pairs = place if isinstance(place, list) and place and isinstance(place[0], list) else [place]
    for pair in pairs:
        whole = isinstance(pair, list) and len(pair) == 2 and all(type(end) is int for end in pair)
        if not whole or not 0 <= pair[0] < pair[1] <= length:
            came = json.dumps(pair)[:60]
            raise TextError(f'{name}: expected "place" as [first, end] in 0 to {length} {unit}, got {came}')
    return [(first, end) for first, end in pairs]


def _occurrences(text: Any, wanted: Any) -> list[tuple[int, int]]:
    """(first, end) of all places where a sequence occurs in another; none if there are more than ``MOST_PLACES``."""
    size = len(wanted)
    found: list[tuple[int, int]] = []
    if isinstance(text, str):
        start = text.find(wanted) if wanted else -1
        while start >= 0 and len(found) <= MOST_PLACES:
            found.append((start, start + size))
            start = text.find(wanted, start + 1)
    else:
        found = [(i, i + size) for i in range(len(text) - size + 1) if text[i : i + size] == wanted] if size else []
    return found if len(found) <= MOST_PLACES else []

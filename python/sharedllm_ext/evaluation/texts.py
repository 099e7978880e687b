"""Texts from files, folders, JSON lines and token arrays, and their token ids."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

#: Characters handed to the tokenizer at once: one long string is slow, and many pieces run in parallel.
PIECE_CHARACTERS = 32768
#: Pieces in one call of the tokenizer, so that a progress bar moves.
PIECES_PER_CALL = 16
#: Folders that hold no text of the user's own.
SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})

Tokens = np.ndarray[Any, np.dtype[np.integer[Any]]]
Progress = Callable[[int], object]


class TextError(ValueError):
    """A text that cannot be read; the message names the file, what was expected and what came."""


@dataclass(frozen=True)
class Texts:
    """Documents read from one path.

    ``documents`` holds texts, or token ids where the file held those; ``names`` one name for each; ``skipped`` counts
    the files of a folder that are not text.
    """

    source: str
    documents: list[str] | list[Tokens]
    names: list[str] = field(default_factory=list)
    skipped: int = 0


def decode(data: bytes, name: str) -> str:
    """UTF-8 text with ``\\n`` line ends; raises :class:`TextError` on bytes that are not text."""
    zero = data.find(b"\0")
    if zero >= 0:
        raise TextError(f"{name}: expected text, got a binary file (a zero byte at offset {zero})")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{name}: expected UTF-8 text, got byte 0x{error.object[error.start]:02x} at offset {error.start}"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def text_files(folder: Path) -> Iterator[Path]:
    """Files below ``folder``, ordered by their path; hidden files and folders of caches are left out."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in SKIPPED_FOLDERS]
        found += [Path(root) / name for name in names if not name.startswith(".")]
    yield from sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(folder).as_posix())


def _read_folder(folder: Path) -> Texts:
    documents, names, skipped = [], [], 0
    for path in text_files(folder):
        name = path.relative_to(folder).as_posix()
        try:
            text = decode(path.read_bytes(), name)
        except TextError:
            # a folder of source code holds images and archives too: they are counted, not fatal
            skipped += 1
            continue
        if text.strip():
            documents.append(under_heading(name, text))
            names.append(name)
    if not documents:
        also = f" ({skipped} other files)" if skipped else ""
        raise TextError(f"{folder}: expected a folder with text files, found none{also}")
    return Texts(str(folder), documents, names, skipped)


def under_heading(name: str, text: str) -> str:
    """A file's text under a line with its path, as the files of a folder are joined."""
    return f"# {name}\n{text.rstrip()}\n\n"


def _read_json_lines(path: Path) -> Texts:
    documents, names = [], []
    for number, line in enumerate(decode(path.read_bytes(), str(path)).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TextError(f"{path} line {number}: expected a JSON object, got {error.msg.lower()}") from None
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            came = f"the keys {sorted(row)}" if isinstance(row, dict) and "text" not in row else repr(row)[:60]
            raise TextError(f'{path} line {number}: expected an object with a string "text", got {came}')
        if text.strip():
            documents.append(text)
            names.append(f"line {number}")
    if not documents:
        raise TextError(f"{path}: expected text, got none in any line")
    return Texts(str(path), documents, names)


def _read_token_array(path: Path) -> Texts:
    try:
        tokens = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise TextError(f"{path}: expected a .npy array of token ids: {str(error).splitlines()[0]}") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        shape = list(getattr(tokens, "shape", []))
        raise TextError(
            f"{path}: expected a 1-d array of integers, got shape {shape} of {getattr(tokens, 'dtype', '?')}"
        )
    if not len(tokens):
        raise TextError(f"{path}: expected token ids, got an empty array")
    return Texts(str(path), [tokens], [path.name])


def read_texts(path: str | os.PathLike[str]) -> Texts:
    """Read a text file, a folder of them, a ``.jsonl`` file with ``text`` or a ``.npy`` file of token ids.

    A folder is read recursively in the order of the paths, text files only, each under a line ``# path``.

    Raises:
        FileNotFoundError: nothing there.
        TextError: no text, bytes that are not UTF-8, or a line or an array of another kind.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix == ".npy":
        return _read_token_array(path)
    if path.suffix == ".jsonl":
        return _read_json_lines(path)
    text = decode(path.read_bytes(), str(path))
    if not text.strip():
        raise TextError(f"{path}: expected text, got an empty file")
    return Texts(str(path), [text], [path.name])


def split_pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Pieces of at most ``size`` characters, cut where tokenizers cut as well.

    A line end before a letter or a digit is such a place for byte-level tokenizers: there the ids equal those of the
    whole text. Where no such line end is near, the cut falls on another line end, on a space, or anywhere.
    """
    start = 0
    while len(text) - start > size:
        limit = start + size
        cut = text.rfind("\n", start, limit)
        while cut > start and not text[cut + 1].isalnum():
            cut = text.rfind("\n", start, cut)
        if cut <= start:
            cut = max(text.rfind("\n", start, limit), text.rfind(" ", start, limit) - 1)
        if cut <= start:
            cut = limit - 1
        yield text[start : cut + 1]
        start = cut + 1
    if start < len(text):
        yield text[start:]


def encode(
    tokenizer: Any, texts: Iterable[str], *, limit: int | None = None, progress: Progress | None = None
) -> list[Tokens]:
    """Token ids of every text, without special tokens, in pieces.

    Args:
        tokenizer: a Transformers tokenizer.
        texts: the documents.
        limit: stop after this many tokens in all; the last document is cut there.
        progress: called with the characters done since the last call.

    Returns:
        One int32 array for each text read.
    """
    documents: list[Tokens] = []
    total = 0
    for text in texts:
        ids: list[Tokens] = []
        pieces = list(split_pieces(text))
        for first in range(0, len(pieces), PIECES_PER_CALL):
            group = pieces[first : first + PIECES_PER_CALL]
            # verbose=False: no warning about the length of the text, which is the point here
            rows = tokenizer(group, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            ids += [np.asarray(row, dtype=np.int32) for row in rows]
            total += sum(len(row) for row in rows)
            if progress is not None:
                progress(sum(len(piece) for piece in group))
            if limit is not None and total >= limit:
                break
        document = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int32)
        if limit is not None and total >= limit:
            documents.append(document[: len(document) - (total - limit)])
            break
        documents.append(document)
    return documents


def check_ids(tokens: Tokens, vocabulary: int, name: str) -> None:
    """Raise :class:`TextError` unless every id lies in ``0 .. vocabulary - 1``."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise TextError(f"{name}: expected token ids from 0 to {vocabulary - 1}, got {low if low < 0 else high}")


def read_tokens(
    texts: Texts,
    tokenizer: Any,
    vocabulary: int,
    *,
    join: bool = True,
    progress: Progress | None = None,
) -> list[Tokens]:
    """Token ids of the documents, checked against the vocabulary.

    Args:
        texts: from :func:`read_texts`.
        tokenizer: a Transformers tokenizer; ``None`` is enough where the file holds token ids.
        vocabulary: number of ids the model knows.
        join: return all documents as one array. The documents of a ``.jsonl`` file are then divided by the
            tokenizer's end token, where it has one.
        progress: called with the characters done since the last call.

    Raises:
        TextError: no tokens, ids outside the vocabulary, or text without a tokenizer.
    """
    documents: Sequence[Tokens]
    if isinstance(texts.documents[0], np.ndarray):
        documents = [np.asarray(document) for document in texts.documents]
    elif tokenizer is None:
        raise TextError(
            f"{texts.source}: expected a .npy file of token ids, because the model has no tokenizer; got text"
        )
    else:
        documents = encode(tokenizer, (str(document) for document in texts.documents), progress=progress)
    kept = [document for document in documents if len(document)]
    if not kept:
        raise TextError(f"{texts.source}: expected text, got 0 tokens")
    if join and len(kept) > 1:
        end = getattr(tokenizer, "eos_token_id", None) if texts.source.endswith(".jsonl") else None
        parts = []
        for document in kept:
            parts += [document] if end is None else [document, np.asarray([end], dtype=document.dtype)]
        kept = [np.concatenate(parts if end is None else parts[:-1])]
    for document in kept:
        check_ids(document, vocabulary, texts.source)
    return kept

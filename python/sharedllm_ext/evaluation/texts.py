"""Texts from files, folders, pipes, JSON lines and token arrays."""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sharedllm_ext.counted import counted
from sharedllm_ext.evaluation.formats import binary_format, encoding_hint, zero_byte_hint

#: Bytes read at once: a binary file is refused after the first of them.
BLOCK_BYTES = 1 << 20
#: Most bytes taken from standard input or a pipe, whose end cannot be known.
PIPE_BYTES = 256 << 20
#: The path that stands for standard input.
STANDARD_INPUT = "-"
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
    the files of a folder that are not text; ``unreadable`` says of each that the system would not read, why; ``kind``
    is ``text`` (a file or a pipe), ``folder``, ``lines`` (JSON) or ``ids``.
    """

    source: str
    documents: list[str] | list[Tokens]
    names: list[str] = field(default_factory=list)
    skipped: int = 0
    unreadable: list[str] = field(default_factory=list)
    kind: str = "text"


def shown(path: str | os.PathLike[str]) -> str:
    """A path as text: bytes of its name that are not UTF-8 become ``\\xe9``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def decode(data: bytes, name: str) -> str:
    """UTF-8 text with ``\\n`` line ends; raises :class:`TextError` on bytes that are not text."""
    return _read_text(io.BytesIO(data), name)


def _read_text(file: BinaryIO, name: str, limit: int | None = None, progress: Progress | None = None) -> str:
    """Decode block after block, so that what is not text is refused before all of it is read."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    parts: list[str] = []
    offset = 0
    while block := file.read(BLOCK_BYTES):
        if limit is not None and offset + len(block) > limit:
            raise TextError(
                f"{name}: expected at most {limit >> 20} MiB from a pipe, got more (write it to a file and name that)"
            )
        if offset == 0 and (came := binary_format(block)) is not None:
            raise TextError(f"{name}: expected text, got {came}")
        zero = block.find(b"\0")
        if zero >= 0:
            hint = zero_byte_hint(block) if offset == 0 else ""
            raise TextError(f"{name}: expected text, got a binary file (a zero byte at offset {offset + zero}){hint}")
        # bytes of a character that the block before began
        held = len(decoder.getstate()[0])
        try:
            parts.append(decoder.decode(block))
        except UnicodeDecodeError as error:
            raise _not_utf8(name, error, offset - held) from None
        offset += len(block)
        if progress is not None:
            progress(len(block))
    held = len(decoder.getstate()[0])
    try:
        parts.append(decoder.decode(b"", final=True))
    except UnicodeDecodeError as error:
        raise _not_utf8(name, error, offset - held) from None
    text = "".join(parts).removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _not_utf8(name: str, error: UnicodeDecodeError, offset: int) -> TextError:
    byte, place = error.object[error.start], offset + error.start
    return TextError(f"{name}: expected UTF-8 text, got byte 0x{byte:02x} at offset {place}{encoding_hint()}")


def _read_file(path: Path | int, name: str, progress: Progress | None = None, limit: int | None = None) -> str:
    """A file's text; errors of the system name the file."""
    try:
        with open(path, "rb", closefd=not isinstance(path, int)) as file:
            return _read_text(file, name, limit, progress)
    except OSError as error:
        # errors while reading, unlike those while opening, do not name the file
        raise OSError(error.errno, error.strerror, name if isinstance(path, int) else shown(path)) from None


def _read_pipe(path: Path | None, name: str, progress: Progress | None) -> Texts:
    if path is None:
        if sys.stdin is None:
            raise TextError(f"{name}: expected text on standard input, got a closed one")
        # a fresh reader: nothing of this program reads standard input before
        text = _read_file(sys.stdin.fileno(), name, progress, PIPE_BYTES)
    else:
        text = _read_file(path, name, progress, PIPE_BYTES)
    if not text.strip():
        raise TextError(f"{name}: expected text, got {'none' if not text else 'white space'}")
    return Texts(name, [text], [name])


def text_files(folder: Path, failed: Callable[[OSError], object] | None = None) -> Iterator[Path]:
    """Files below ``folder``, ordered by their path; hidden files and folders of caches are left out.

    Links to files are followed, links to folders are not. Pipes and devices are left out. A broken link is not: reading
    it raises an error. ``failed`` is called with folders that cannot be listed.
    """
    found: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=failed):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in SKIPPED_FOLDERS]
        found += [Path(root) / name for name in names if not name.startswith(".")]
    for path in sorted(found, key=lambda path: path.relative_to(folder).as_posix()):
        try:
            regular = stat.S_ISREG(path.stat().st_mode)
        except OSError:
            regular = True
        if regular:
            yield path


def _read_folder(folder: Path, progress: Progress | None) -> Texts:
    documents: list[str] = []
    names: list[str] = []
    unreadable: list[str] = []
    skipped = 0

    def note(error: OSError) -> None:
        # the folder itself must be readable, what lies in it need not be
        if error.filename is not None and Path(error.filename) == folder:
            raise error
        unreadable.append(f"{shown(error.filename or folder)}: {(error.strerror or 'cannot be read').lower()}")

    for path in text_files(folder, note):
        name = shown(path.relative_to(folder).as_posix())
        try:
            text = _read_file(path, name, progress)
        except TextError:
            # a folder of source code holds images and archives too: they are counted, not fatal
            skipped += 1
            continue
        except OSError as error:
            note(error)
            continue
        if text.strip():
            documents.append(under_heading(name, text))
            names.append(name)
    if not documents:
        counts = [counted(skipped, "other file")] if skipped else []
        counts += [f"{len(unreadable)} that cannot be read, the first is {unreadable[0]}"] if unreadable else []
        also = f" ({', '.join(counts)})" if counts else ""
        raise TextError(f"{shown(folder)}: expected a folder with text files, found none{also}")
    return Texts(shown(folder), documents, names, skipped, unreadable, kind="folder")


def under_heading(name: str, text: str) -> str:
    """A file's text under a line with its path, as the files of a folder are joined."""
    return f"# {name}\n{text.rstrip()}\n\n"


def half_surrogate(text: str) -> int:
    """Index of the first half of a surrogate pair, which is no character; -1 for none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return -1


def parse(text: str, name: str, expected: str) -> Any:
    """The value of a JSON text; raises :class:`TextError` that says what was ``expected``."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise TextError(f"{name}: expected {expected}, got {error.msg.lower()}") from None
    except (RecursionError, ValueError) as error:
        came = "one nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"
        raise TextError(f"{name}: expected {expected}, got {came}") from None
    return value


def _read_json_lines(path: Path, progress: Progress | None) -> Texts:
    documents, names, source = [], [], shown(path)
    for number, line in enumerate(_read_file(path, source, progress).split("\n"), 1):
        if not line.strip():
            continue
        row = parse(line, f"{source} line {number}", "a JSON object")
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            came = f"the keys {sorted(row)}" if isinstance(row, dict) and "text" not in row else repr(row)
            raise TextError(f'{source} line {number}: expected an object with a string "text", got {came[:60]}')
        if (place := half_surrogate(text)) >= 0:
            raise TextError(
                f'{source} line {number}: expected text in "text", got half of a surrogate pair '
                f"(\\u{ord(text[place]):04x} at character {place})"
            )
        if text.strip():
            documents.append(text)
            names.append(f"line {number}")
    if not documents:
        raise TextError(f"{source}: expected text, got none in any line")
    return Texts(source, documents, names, kind="lines")


def _read_token_array(path: Path) -> Texts:
    source = shown(path)
    with open(path, "rb") as file:
        start = file.read(6)
        if start != b"\x93NUMPY":
            came = binary_format(start) or "another file"
            advice = " (np.savez writes several arrays; np.save writes one)" if start[:2] == b"PK" else ""
            raise TextError(f"{source}: expected a .npy array of token ids, got {came}{advice}")
        file.seek(0)
        try:
            tokens = np.load(file, allow_pickle=False)
        except OSError as error:
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), source) from None
        except Exception as error:
            # numpy evaluates the header: a damaged one can raise any error
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TextError(f"{source}: expected a .npy array of token ids: {reason}") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise TextError(
            f"{source}: expected a 1-d array of integers, got shape {list(tokens.shape)} of {str(tokens.dtype)[:60]}"
        )
    if not len(tokens):
        raise TextError(f"{source}: expected token ids, got an empty array")
    return Texts(source, [tokens], [shown(path.name)], kind="ids")


def size_of(path: str | os.PathLike[str]) -> int | None:
    """Bytes to read at ``path``, the total of a progress bar; ``None`` where that is not known beforehand."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) and found.st_size else None


def read_texts(path: str | os.PathLike[str], *, progress: Progress | None = None) -> Texts:
    """Read a text file, a folder of them, a pipe, a ``.jsonl`` file with ``text`` or a ``.npy`` file of token ids.

    A folder is read recursively in the order of the paths, text files only, each under a line ``# path``. ``-`` is
    standard input; it and pipes are read as text, up to ``PIPE_BYTES``.

    Args:
        path: what to read.
        progress: called with the bytes of text read since the last call.

    Raises:
        FileNotFoundError: nothing there.
        OSError: the system does not let the file be read.
        TextError: no text, bytes that are not UTF-8, a line or an array of another kind, or a pipe without end.
    """
    if os.fspath(path) == STANDARD_INPUT:
        return _read_pipe(None, STANDARD_INPUT, progress)
    path = Path(path)
    source = shown(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{source}: no such file or folder") from None
    if stat.S_ISDIR(mode):
        return _read_folder(path, progress)
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        return _read_pipe(path, source, progress)
    if not stat.S_ISREG(mode):
        came = "a socket" if stat.S_ISSOCK(mode) else "a block device"
        raise TextError(f"{source}: expected a regular file, a folder or a pipe, got {came}")
    if path.suffix == ".npy":
        return _read_token_array(path)
    if path.suffix == ".jsonl":
        return _read_json_lines(path, progress)
    text = _read_file(path, source, progress)
    if not text.strip():
        raise TextError(f"{source}: expected text, got an empty file")
    return Texts(source, [text], [shown(path.name)])

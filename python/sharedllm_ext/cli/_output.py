"""Results on stdout, everything else on stderr: no result is lost where either cannot be written."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any


class CommandError(Exception):
    """The command cannot be done; the message is one line for the user."""


class UsageError(CommandError):
    """The arguments contradict each other."""


def say(message: str = "") -> None:
    """Write one line to stderr, as everything that is not the result."""
    # print would take stdout where stderr is closed
    if sys.stderr is not None:
        # a full disk under the notes must not end the work
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr, flush=True)


def print_error(message: str) -> None:
    """One line on stderr."""
    say(f"sharedllm: error: {message}")


def emit(text: str, end: str = "\n") -> None:
    """Write a result to stdout; characters that its encoding lacks become escapes.

    Raises:
        BrokenPipeError: the reader has closed.
        CommandError: stdout is closed or its disk is full; the text is then on stderr.
    """
    if sys.stdout is None:
        say(text)
        raise CommandError("stdout: expected an open file, got a closed one (the result stands above)")
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        abandon_stdout()
        say(text)
        raise CommandError(f"stdout: {_reason(error)} (the result stands above)") from error


def flush_stdout() -> None:
    """Flush stdout while an error can still be reported; raises :class:`CommandError` if that fails."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        abandon_stdout()
        raise CommandError(f"stdout: {_reason(error)}") from error


def abandon_stdout() -> None:
    """Discard what is left of stdout: the interpreter must not write to it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def print_json(value: Any, *, lines: bool = False) -> None:
    """The one JSON document of ``--json``, or one of many with a line each."""
    indent = None if lines else 2
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent, allow_nan=False)
    emit(text)


class Table:
    """Columns aligned to the right, printed row by row; the header comes with the first row."""

    def __init__(self, header: Sequence[str], widths: Sequence[int]) -> None:
        self.header: Sequence[str] | None = header
        self.widths = [max(len(name), width) for name, width in zip(header, widths, strict=True)]

    def row(self, cells: Sequence[str]) -> str:
        """The lines to print: the row, before the first one the header too."""
        rows = [cells] if self.header is None else [self.header, cells]
        self.header = None
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, self.widths, strict=True)) for row in rows
        )

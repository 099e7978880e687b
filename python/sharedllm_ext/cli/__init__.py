"""The command line: ``sharedllm``, also ``python -m sharedllm_ext``.

torch and Transformers are imported by the commands that need them, so that help is instant.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from sharedllm_ext import __version__
from sharedllm_ext.cli import ask, chat, demo, info, init, perplexity, train
from sharedllm_ext.cli import eval as evaluation
from sharedllm_ext.cli._common import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE, one_line
from sharedllm_ext.cli._output import UsageError, abandon_stdout, flush_stdout, print_error, say
from sharedllm_ext.cli._parser import Parser

COMMANDS = (init, train, ask, chat, perplexity, evaluation, demo, info)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog="sharedllm",
        description="Long contexts for short-context language models by multi-scale self-injection.",
        epilog="exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted; SHAREDLLM_DEBUG=1 shows tracebacks",
    )
    parser.add_argument("--version", action="version", version=f"sharedllm_ext {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def _say_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    """A warning in one line, without the line of code that it came from."""
    say(f"sharedllm: warning: {' '.join(str(message).split())}")


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = build_parser().parse_args(argv)
        with warnings.catch_warnings():
            warnings.showwarning = _say_warning
            return int(args.run(args))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_ERROR if stop.code else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; default: the process's own.

    Returns:
        The exit code: 0 done, 1 error, 2 wrong usage, 130 interrupted.
    """
    debug = os.environ.get("SHAREDLLM_DEBUG", "") not in ("", "0")
    try:
        code = _run(argv)
        flush_stdout()
        return code
    except KeyboardInterrupt:
        say("\nsharedllm: interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader (head, less) has closed
        abandon_stdout()
        return EXIT_ERROR
    except UsageError as error:
        print_error(str(error))
        return EXIT_USAGE
    except Exception as error:
        if debug:
            raise
        print_error(one_line(error))
        return EXIT_ERROR


def program() -> NoReturn:
    """Run one command as a process's whole life, and end the process with its exit code.

    One of several processes ends without Python's own ending, but for what was registered to run at exit: a thread of
    a process group can still hold the last exchange's tensors then, and aborts the process when Python no longer lets
    it free them. Such threads can outlive a destroyed group, which PyTorch itself keeps in default arguments.
    """
    code = main()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError, ValueError):
            stream.flush()
    os._exit(code)

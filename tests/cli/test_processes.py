"""``sharedllm ask`` in two processes: one process's answer, printed once; one message for an error of any of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sharedllm_ext.cli import main

from ..distributed.processes import free_port
from ..support import environment_of_package
from .conftest import sentences

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)


def ask(*arguments: object, others: list[object] | None = None, launcher: bool = False) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each of two processes; ``others`` are the second one's arguments.

    With ``launcher`` torchrun starts them: then there is one code, and one output of both.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_CPP_LOG_LEVEL": "FATAL"}
    if launcher:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        command += ["sharedllm_ext", "ask", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        return [(done.returncode, done.stdout, done.stderr)]
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "sharedllm_ext", "ask", *map(str, own)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate((arguments, arguments if others is None else others))
    ]
    try:
        results = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *result) for process, result in zip(processes, results, strict=True)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(sentences(60))
    return path


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_answer_as_one(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sharded: bool
) -> None:
    arguments = [checkpoint, "alpha?", "--context", text, "--max-new-tokens", 6, "--device", "cpu", "--json"]
    assert main(["ask", *map(str, arguments)]) == 0
    one = json.loads(capsys.readouterr().out)
    saving = [] if sharded else ["--save-memory", tmp_path / "memory.safetensors"]
    (code, out, err), (other, silence, errors) = ask(*arguments, *(["--sharded-memory"] if sharded else saving))
    assert code == 0 and other == 0, err + errors
    found = json.loads(out)
    assert silence == ""
    for name in ("answer", "context_tokens", "chunks", "memory_slots", "memory_bytes", "question_tokens"):
        assert found[name] == one[name], name
    assert (tmp_path / "memory.safetensors").exists() is not sharded


def test_under_torchrun(checkpoint: Path, text: Path) -> None:
    arguments = [checkpoint, "alpha?", "--context", text, "--max-new-tokens", 3, "--device", "cpu", "--sharded-memory"]
    ((code, out, err),) = ask(*arguments, launcher=True)
    assert code == 0, err
    assert err.count("times: ") == 1 and err.count("context: ") == 1 and len(out) > 0


def test_one_message_for_an_error_of_another_process(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    good = [checkpoint, "alpha?", "--context", text, "--device", "cpu", "--timeout", 60]
    missing = [tmp_path / "missing", *good[1:]]
    (code, out, err), (code_of_other, silence, nothing) = ask(*good, others=missing)
    assert (code, code_of_other, out, silence) == (1, 1, "", ""), err + nothing
    lines = [line for line in (err + nothing).splitlines() if "sharedllm: error: " in line]
    assert len(lines) == 1 and lines[0].startswith("sharedllm: error: process 1 of 2: ") and "missing" in lines[0]


def test_an_error_of_the_first_process_ends_the_other(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    good = [checkpoint, "alpha?", "--context", text, "--device", "cpu", "--timeout", 60]
    (code, out, err), (code_of_other, silence, _) = ask(*good[:3], tmp_path / "missing.txt", *good[4:], others=good)
    assert (code, code_of_other, out, silence) == (1, 1, "", "")
    assert err.count("sharedllm: error: ") == 1 and "missing.txt" in err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--sharded-memory"],
            "--sharded-memory: expected several processes (torchrun",
        ),
        (["--timeout", "5"], "--timeout: expected several processes"),
        (["--timeout", "0"], "expected seconds above 0, got '0'"),
    ],
)
def test_options_of_several_processes(
    checkpoint: Path, text: Path, options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", str(checkpoint), "alpha?", "--context", str(text), *options]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--memory", "x"], "--memory: expected --context alone with several processes, got --memory"),
        (["--device", "cuda:1"], "--device: expected cpu or cuda with several processes, got 'cuda:1'"),
        (["--sharded-memory", "--save-memory", "x"], "--save-memory: expected no --sharded-memory with it, got both"),
    ],
)
def test_what_does_not_go_with_several_processes(
    checkpoint: Path,
    text: Path,
    options: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["ask", str(checkpoint), "alpha?", "--context", str(text), *options]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("processes", [1, 2])
def test_one_of_several_processes_ends_without_pythons_ending(processes: int) -> None:
    """A thread of a process group that frees a tensor while Python ends aborts the process after its last result."""
    script = """
import atexit, sys
from sharedllm_ext.cli import program

class Last:
    def __del__(self):
        print("Python has ended")

last = Last()
atexit.register(print, "registered")
sys.argv = ["sharedllm", *sys.argv[1:]]
program()
"""
    for arguments, code in (["--version"], 0), (["nothing"], 2):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env=environment_of_package(WORLD_SIZE=str(processes), RANK="1"),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        lines = done.stdout.splitlines()
        assert lines[-1:] == ["Python has ended" if processes == 1 else "registered"]
        assert "registered" in lines and (code == 0) == any(line.startswith("sharedllm_ext ") for line in lines)
        assert (code == 2) == ("sharedllm: error: " in done.stderr)

"""One process is killed, stopped, slow or in error: every other one ends with the reason, in the stated time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sharedllm_ext.distributed import RankError, join
from sharedllm_ext.distributed.ranks import GRACE

from .failures_program import LOST, TIMEOUT

ROOT = Path(__file__).parents[2]
#: Seconds that a busy machine may need for what takes milliseconds.
SLACK = 15.0
Ends = dict[str, list[dict[str, Any]]]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)


@pytest.fixture(scope="module")
def ends() -> Ends:
    command = [sys.executable, "-m", "tests.distributed.failures_program"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: Ends = json.loads(done.stdout)
    return found


def _expect(ends: list[dict[str, Any]], lost: int, text: str, code: int | None) -> None:
    for rank, end in enumerate(ends):
        assert "terminate called" not in end["stderr"]
        if rank != lost:
            assert end["code"] == 1 and text in end["error"], end
            assert end["known"] <= TIMEOUT + 2 * GRACE + SLACK
        elif code is not None:
            assert end["code"] == code, end


@pytest.mark.parametrize("case", ["killed", "killed in generate"])
def test_a_killed_process_ends_all(ends: Ends, case: str) -> None:
    size = len(ends[case])
    text = f": expected an answer of all {size} processes within {TIMEOUT:g} s, got none of process {LOST}"
    _expect(ends[case], LOST, text, -9)


def test_the_first_process_holds_the_store_and_its_loss_is_named_all_the_same(ends: Ends) -> None:
    text = f"RankError: attention: expected an answer of all 3 processes within {TIMEOUT:g} s, got none of process 0"
    _expect(ends["first killed"], 0, text, -9)


def test_a_stopped_process_ends_all_in_time(ends: Ends) -> None:
    _expect(ends["stopped"], LOST, f"got none of process {LOST}", 1)
    _expect(ends["first stopped"], 0, "got none of process 0", 1)
    # the stopped one, which goes on when the others are gone, does not hang either
    assert ends["stopped"][LOST]["error"].startswith("RankError: ")
    assert ends["first stopped"][0]["error"].startswith("RankError: ")


def test_a_slow_process_is_waited_for(ends: Ends) -> None:
    assert [end["result"] for end in ends["slow"]] == ["done", "done"]
    assert [end["code"] for end in ends["slow"]] == [0, 0]


@pytest.mark.parametrize("case", ["raises", "raises in a step"])
def test_the_error_of_one_process_reaches_all(ends: Ends, case: str) -> None:
    _expect(ends[case], LOST, "RankError: process 1 of 3: the disk of this node is gone", 1)
    assert ends[case][LOST]["error"] == "OSError: the disk of this node is gone"


def test_bad_input_of_one_process_ends_all(ends: Ends) -> None:
    _expect(ends["bad input"], LOST, "RankError: process 1 of 2: mat1 and mat2 shapes cannot be multiplied", 1)


def test_what_cannot_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="join: expected processes started by torchrun, got none of its RANK, WORLD_S"):
        join("cpu")
    with pytest.raises(ValueError, match="timeout: expected seconds above 0, got 0"):
        join("cpu", timeout=0)
    assert issubclass(RankError, RuntimeError)

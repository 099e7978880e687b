"""Parameters sharded over two processes on the CPU: gradients and memories equal to one process's."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sharedllm_ext.model.managed_layers import recomputes_whole_calls

from ..support import environment_of_package
from . import builders

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.model.sharded_step"]
    done = subprocess.run(command, cwd=ROOT, env=environment_of_package(), capture_output=True, text=True, timeout=300)
    lines = [line.removeprefix("RUN ") for line in done.stdout.splitlines() if line.startswith("RUN ")]
    found = dict(line.split(" = ", 1) for line in lines)
    assert done.returncode == 0 and found, done.stdout + done.stderr
    return found


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_a_sharded_step(results: dict[str, str], tied: bool, reentrant: bool | None, half: bool) -> None:
    result = results[f"gradients tied={tied} reentrant={reentrant} half={half}"]
    if reentrant and recomputes_whole_calls():
        assert result.startswith("ValueError: gradient_checkpointing_kwargs: expected use_reentrant=False")
        return
    assert float(result) < (0.1 if half else 1e-5)


@pytest.mark.parametrize("family", builders.LATER)
def test_gradients_of_every_family(results: dict[str, str], family: str) -> None:
    assert float(results[f"gradients of {family}"]) < 1e-5


def test_the_older_wrapper(results: dict[str, str]) -> None:
    assert float(results["fsdp1"]) < 1e-5
    assert "gradient_checkpointing_kwargs: expected use_reentrant=False" in results["fsdp1 reentrant"]


def test_compress_outside_of_forward(results: dict[str, str]) -> None:
    assert results["outside"].startswith(
        "ValueError: compress: expected whole parameters, got ones that FSDP has shard"
    )
    assert "register_fsdp_forward_method(model, 'compress')" in results["outside"]
    assert float(results["outside registered"]) < 1e-5

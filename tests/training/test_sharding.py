"""FSDP2 in two processes: the steps of one process, whole checkpoints, resuming in another number of processes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sharedllm_ext.training import Options, Trained, Trainer, parse_parts
from sharedllm_ext.training.checkpoint import read_checkpoint
from sharedllm_ext.training.loop import CHECKPOINT

from ..support import environment_of_package
from .sharded_run import train

ROOT = Path(__file__).resolve().parents[2]
PAIRS = "injected,upper:2,compressor:2"

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this PyTorch has no gloo",
)


class Runs:
    """Results of all runs by name, and their folder."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.folder = folder
        self.of: dict[str, dict[str, Any]] = {"one": train(str(base), folder / "one", accumulate=2)}
        self.of["one stopped"] = train(str(base), folder / "one stopped", accumulate=2, stop=2)
        self.of["one pairs"] = train(str(base), folder / "one pairs", accumulate=2, parts=PAIRS)
        wanted: list[dict[str, Any]] = [
            {"name": "two", "sharding": "fsdp"},
            {"name": "two stopped", "sharding": "fsdp", "stop": 2},
            {"name": "two resumed", "sharding": "fsdp", "source": "two stopped"},
            {"name": "two after one", "sharding": "fsdp", "source": "one stopped"},
            {"name": "two pairs", "sharding": "fsdp", "parts": PAIRS, "checkpointing": True},
            {"name": "two half", "sharding": "fsdp", "bfloat16": True},
            {"name": "ddp stopped", "stop": 2},
        ]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "tests.training.sharded_run", str(base), str(folder), json.dumps(wanted)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment_of_package(), capture_output=True, text=True, timeout=300
        )
        lines = [json.loads(x.removeprefix("RUN ")) for x in done.stdout.splitlines() if x.startswith("RUN ")]
        assert done.returncode == 0 and len(lines) == len(wanted), done.stdout + done.stderr
        for run, found in zip(wanted, lines, strict=True):
            self.of[run["name"]] = found

    def file(self, name: str) -> Path:
        return self.folder / name / CHECKPOINT


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base, tmp_path_factory.mktemp("sharding"))


def close(one: Path, other: Path) -> None:
    (got, states, _), (expected, other_states, _) = read_checkpoint(one), read_checkpoint(other)
    assert got.keys() == expected.keys() == states.keys()
    for name, tensor in got.items():
        # AdamW's first steps hardly depend on a gradient's size: its rounding may turn up anywhere near zero
        assert torch.isclose(tensor, expected[name], rtol=1e-3, atol=1e-5).float().mean() > 0.999, name
        # which they do not tell, the mean gradients do
        mean, wanted = states[name]["exp_avg"], other_states[name]["exp_avg"]
        assert (mean - wanted).norm() <= 1e-2 * wanted.norm(), name


def flat(losses: list[list[float]]) -> list[float]:
    return [value for row in losses for value in row]


@pytest.mark.parametrize(("name", "expected"), [("two", "one"), ("two pairs", "one pairs")])
def test_losses_are_those_of_one_process(runs: Runs, name: str, expected: str) -> None:
    got, wanted = runs.of[name], runs.of[expected]
    assert got["steps"] == wanted["steps"] == [1, 2, 3, 4]
    assert flat(got["losses"]) == pytest.approx(flat(wanted["losses"]), rel=1e-4)
    # losses of other steps are further apart than that
    assert flat(got["losses"])[:3] != pytest.approx(flat(wanted["losses"])[3:6], rel=1e-3)
    close(runs.file(name), runs.file(expected))


def test_each_process_holds_a_share(runs: Runs) -> None:
    one, two = runs.of["one"], runs.of["two"]
    assert one["all"] == one["held"] == one["states"] == two["all"]
    # vectors of odd lengths are not halved
    assert 0.49 < two["held"] / two["all"] < 0.52 and 0.49 < two["states"] / two["all"] < 0.52


def test_checkpoints_hold_what_is_trained(runs: Runs) -> None:
    sizes = [{name: t.shape for name, t in load_file(runs.file(name)).items()} for name in ("one", "two")]
    assert sizes[0] == sizes[1]
    names = {name.removeprefix("parameter.") for name in sizes[1] if name.startswith("parameter.")}
    assert "model.layers.2.self_attn.q_proj.weight" in names and "pick.beta" in names
    assert not any("embed_tokens" in name or "lm_head" in name or "layers.2.mlp" in name for name in names)
    assert sorted(path.name for path in (runs.folder / "two").iterdir()) == [CHECKPOINT]


def test_a_resumed_run_is_the_same_bit_for_bit(runs: Runs) -> None:
    stopped, resumed = runs.of["two stopped"], runs.of["two resumed"]
    assert stopped["code"] == signal.SIGTERM and stopped["steps"] == [1, 2] and resumed["steps"] == [3, 4]
    assert stopped["losses"] + resumed["losses"] == runs.of["two"]["losses"]
    one, other = load_file(runs.file("two resumed")), load_file(runs.file("two"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("source", ["two stopped", "ddp stopped"])
def test_one_process_goes_on_from_two(runs: Runs, base: Path, tmp_path: Path, source: str) -> None:
    shutil.copytree(runs.folder / source, tmp_path / "on")
    found = train(str(base), tmp_path / "on", accumulate=2, resume=True)
    assert found["steps"] == [3, 4]
    losses = runs.of[source]["losses"] + found["losses"]
    assert flat(losses) == pytest.approx(flat(runs.of["one"]["losses"]), rel=1e-4)
    close(tmp_path / "on" / CHECKPOINT, runs.file("one"))


def test_two_processes_go_on_from_one(runs: Runs) -> None:
    losses = runs.of["one stopped"]["losses"] + runs.of["two after one"]["losses"]
    assert flat(losses) == pytest.approx(flat(runs.of["one"]["losses"]), rel=1e-4)
    close(runs.file("two after one"), runs.file("one"))


def test_bfloat16_computes_over_float32_shares(runs: Runs) -> None:
    rounded = flat(runs.of["two half"]["losses"])
    assert rounded == pytest.approx(flat(runs.of["one"]["losses"]), rel=0.05)
    assert rounded != flat(runs.of["two"]["losses"])
    assert all(t.dtype == torch.float32 for t in load_file(runs.file("two half")).values())


def test_one_process_cannot_shard(build: Any, mix: Any, losses: Any, tmp_path: Path) -> None:
    model = build()
    trained = Trained(model, parse_parts("injected"))
    with pytest.raises(ValueError, match=r"sharding: expected several processes .torchrun. for fsdp, got one"):
        Trainer(trained, losses(model), mix(), Options(steps=1, sharding="fsdp"), tmp_path)
    with pytest.raises(ValueError, match="sharding: expected one of ddp, fsdp, got 'zero3'"):
        Options(steps=1, sharding="zero3")

"""The loop: exact resuming, checkpoints that survive, steps without a finite loss, signals, several processes."""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sharedllm_ext.training import Options, Report, Trained, Trainer, TrainingError, checkpoint, parse_parts
from sharedllm_ext.training.checkpoint import read_checkpoint
from sharedllm_ext.training.loop import CHECKPOINT

from ..support import environment_of_tests

OPTIONS = Options(steps=6, warmup=2, report_seconds=0.0)


@pytest.fixture
def start(build: Any, mix: Any, losses: Any, tmp_path: Path) -> Any:
    """Makes a trainer of a fresh model."""

    def make(folder: Path = tmp_path, parts: str = "injected,upper:2,compressor", **options: Any) -> Trainer:
        model = build(random=False)
        own = {name: options.pop(name) for name in ("report", "say", "settings") if name in options}
        trained = Trained(model, parse_parts(parts), seed=1)
        chosen = dataclasses.replace(OPTIONS, **options)
        return Trainer(trained, losses(model), mix(), chosen, folder, **own)

    return make


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.trained.parameters.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def stopped_after(trainer: Trainer, steps: int) -> int:
    """Run a training that gets SIGTERM in a step."""
    update = trainer._update

    def once(*args: Any) -> Any:
        if trainer.step == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args)

    trainer._update = once  # type: ignore[method-assign]
    return trainer.run()


def test_a_resumed_run_is_the_same_bit_for_bit(start: Any, tmp_path: Path) -> None:
    whole = start(tmp_path)
    assert whole.run() == 0 and whole.step == 6
    (tmp_path / "b").mkdir()
    first = start(tmp_path / "b")
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert stopped_after(first, 3) == signal.SIGTERM and first.step == 3
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not equal(state(first), state(whole))
    second = start(tmp_path / "b")
    second.resume()
    assert second.step == 3 and equal(state(second), state(first))
    assert second.run() == 0
    assert equal(state(second), state(whole))
    assert equal(load_file(second.path), load_file(whole.path))


def test_reports_and_rates(start: Any) -> None:
    reports: list[Report] = []
    trainer = start(report=reports.append, settings={"seed": 0})
    trainer.run()
    assert [r.step for r in reports] == [1, 2, 3, 4, 5, 6]
    assert all(r.answer > 0 and r.pick > 0 and r.text > 0 and 0 <= r.found <= 1 for r in reports)
    assert all(r.tokens_per_second > 0 and r.mfu is None for r in reports)
    options = Options(steps=100, warmup=10, floor=0.1)
    assert options.rate(0, 0) == pytest.approx(0.1) and options.rate(50, 0) == pytest.approx(0.55)
    assert options.rate(100, 0) == pytest.approx(0.1)
    assert Options(minutes=1).rate(30, 60) == pytest.approx(0.02) and Options(minutes=1).over(3, 61)
    with pytest.raises(ValueError, match="steps, minutes: expected at least one of them, got none"):
        Options()
    with pytest.raises(ValueError, match="lr: expected a number above 0, got nan"):
        Options(steps=1, lr=float("nan"))


def test_another_run_is_not_gone_on_from(start: Any, tmp_path: Path) -> None:
    start(settings={"seed": 0, "chunks": 6}, steps=1).run()
    with pytest.raises(ValueError, match="of the same settings, got seed 0 instead of 1"):
        start(settings={"seed": 1, "chunks": 6}).resume()
    with pytest.raises(ValueError, match="expected the trained parameters of this run, got others, such as"):
        start(settings={"seed": 0, "chunks": 6}, parts="injected").resume()
    whole = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="expected a checkpoint, got a damaged or foreign file"):
        start().resume()
    (tmp_path / CHECKPOINT).unlink()
    with pytest.raises(FileNotFoundError, match="expected a checkpoint to go on from, found none"):
        start().resume()


def test_a_full_disk_leaves_the_checkpoint_before(start: Any, tmp_path: Path, monkeypatch: Any) -> None:
    first = start(steps=2)
    first.run()
    before = (tmp_path / CHECKPOINT).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # what a file may hold; the system refuses to write more
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"cannot be written: .*too large.*; the one before stands"):
            first.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(TrainingError, match="No space left on device; the one before stands"):
        start(steps=2).run()
    (tmp_path / CHECKPOINT).unlink()
    with pytest.raises(TrainingError, match="there is none yet"):
        start(steps=2).run()


def test_steps_without_a_finite_loss_are_skipped(start: Any, tmp_path: Path) -> None:
    lines: list[str] = []
    trainer = start(say=lines.append, most_skipped=2)
    losses, calls, seen = trainer.losses.__call__, [0], []

    def sometimes(batch: Any) -> Any:
        calls[0] += 1
        seen.append(state(trainer))
        sums = losses(batch)
        broken = calls[0] in (2, 4, 5)
        return sums._replace(pick=sums.pick * float("nan")) if broken else sums

    for name in ("prompt", "passages"):
        setattr(sometimes, name, getattr(trainer.losses, name))
    trainer.losses = sometimes  # type: ignore[assignment]
    trainer.save()
    stands = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(TrainingError, match=r"step 5: .*NaN or infinity in pick, as in 2 steps in a row; .* stands"):
        trainer.run()
    assert [line for line in lines if "skipped" in line] == [
        "step 2: expected finite losses, got NaN or infinity in pick; skipped",
        "step 4: expected finite losses, got NaN or infinity in pick; skipped",
    ]
    # the second step changed nothing, the third one did
    assert equal(seen[1], seen[2]) and not equal(seen[2], seen[3]) and equal(seen[3], seen[4])
    assert all(p.isfinite().all() for p in state(trainer).values())
    assert (tmp_path / CHECKPOINT).read_bytes() == stands


SCRIPT = """
import faulthandler
import os, sys
import numpy as np, torch, torch.distributed as dist
from pathlib import Path
from transformers import AutoTokenizer
from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.training import *
base, folder, accumulate, steps, save = sys.argv[1:]
# where it hangs, if it does: before the test gives up
faulthandler.dump_traceback_later(200, exit=True)
torch.set_num_threads(1)
rank = os.environ.get("RANK")
if rank is not None:
    # a file, where a port that was free may be another test's by now
    dist.init_process_group("gloo", store=dist.FileStore(os.environ["STORE"], 2), rank=int(rank), world_size=2)
tokenizer = AutoTokenizer.from_pretrained(base)
fields = dict(injection_layers=2, chunk_size=64, slots_per_node=4, query_aware=False, tie_compressor=False,
              pick_layers=[0, 1], segment_size=8, segment_margin=4, passage_prompt=default_prompt(tokenizer))
model = SharedLLMForCausalLM.from_base(base, **fields)
model.pick.token_class.copy_(token_classes(tokenizer, 320))
prompt = PromptTokens.of(model.config, tokenizer, 4)
text = np.random.default_rng(0).integers(1, 320, 4000).astype(np.int32)
sizes = Sizes(contexts=1, chunks=6, questions=3, running=24, tail=256)
mix = Mix(Sources([text], []), tokenizer, prompt, model.config, sizes, 0)
options = Options(steps=int(steps), warmup=1, accumulate=int(accumulate), save_minutes=float(save))
trainer = Trainer(Trained(model, parse_parts("injected,compressor")), Losses(model, prompt, 4), mix, options,
                  Path(folder), say=lambda line: print(line, flush=True))
trainer.run()
if rank is not None:
    from tests.support import end_of_rank
    end_of_rank()
"""


def script(tmp_path: Path, base: Path, folder: str, *args: object, **environment: str) -> subprocess.Popen[str]:
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "run.py"), str(base), str(tmp_path / folder), *map(str, args)]
    return subprocess.Popen(command, env={**environment_of_tests(), **environment}, stdout=subprocess.PIPE, text=True)


def test_two_processes_are_one_with_twice_the_batches(base: Path, tmp_path: Path) -> None:
    place = {"STORE": str(tmp_path / "store"), "WORLD_SIZE": "2"}
    running = [script(tmp_path, base, "two", 1, 3, 10, RANK=str(rank), **place) for rank in range(2)]
    running.append(script(tmp_path, base, "one", 2, 3, 10))
    try:
        assert [process.wait(timeout=240) for process in running] == [0, 0, 0]
    finally:
        for process in running:
            process.kill()
    (two, _, header), (one, *_) = (read_checkpoint(tmp_path / name / CHECKPOINT) for name in ("two", "one"))
    assert header["step"] == 3 and two.keys() == one.keys()
    for name, tensor in two.items():
        # AdamW's first steps hardly depend on a gradient's size: its rounding may turn up anywhere near zero
        close = torch.isclose(tensor, one[name], rtol=1e-3, atol=1e-5)
        assert close.float().mean() > 0.999, name


def test_a_killed_process_leaves_a_whole_checkpoint(base: Path, tmp_path: Path, start: Any) -> None:
    process = script(tmp_path, base, "killed", 1, 100000, 0)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    # at any moment, also while the next one is written
    threading.Event().wait(0.05)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    parameters, states, header = read_checkpoint(tmp_path / "killed" / CHECKPOINT)
    assert header["step"] >= 3 and parameters.keys() == states.keys()
    assert all(tensor.isfinite().all() for tensor in parameters.values())


def test_the_next_batches_are_made_ahead(start: Any) -> None:
    trainer, threads = start(steps=3), set()
    batches = trainer.batches

    def noted(step: int) -> Any:
        threads.add((step, threading.current_thread().name.split("_")[0]))
        return batches(step)

    trainer.batches = noted
    begin = time.monotonic()
    trainer.run()
    assert {step for step, _ in threads} >= {0, 1, 2} and {name for _, name in threads} == {"batches"}
    assert 0 < trainer.seconds <= time.monotonic() - begin

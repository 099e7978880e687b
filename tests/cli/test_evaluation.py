"""The perplexity engine: which tokens it reads and scores, its intervals, and the memory it measures."""

from __future__ import annotations

import itertools
import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.evaluation import evaluate_perplexity, measure_peak, pick_points, running_losses
from sharedllm_ext.evaluation.perplexity import mean_interval, t95

from .conftest import VOCABULARY, WINDOW


class RecordingModel(torch.nn.Module):
    """Stands in for a model: notes what it is given; all tokens are equally likely, a context favours token 7."""

    def __init__(self, vocabulary: int = 50, window: int = 16) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(window=window, vocab_size=vocabulary)
        self.contexts: list[list[int]] = []
        self.running: list[list[int]] = []

    def compress(self, context_ids: Tensor, progress: Callable[[int], None]) -> Any:
        progress(context_ids.numel() // 2)
        self.contexts.append(context_ids[0].tolist())
        return SimpleNamespace(nbytes=context_ids.numel(), cu_slots=[0, context_ids.numel() // 2], boost=2.0)

    def forward(self, input_ids: Tensor, logits_to_keep: int, use_cache: bool, memory: Any = None) -> Any:
        self.running.append(input_ids[0].tolist())
        logits = torch.zeros(1, logits_to_keep, self.config.vocab_size)
        if memory is not None:
            logits[..., 7] = memory.boost
        return SimpleNamespace(logits=logits)


def test_same_running_tokens_after_contexts_cut_from_the_left() -> None:
    tokens = np.arange(200) % 50
    model = RecordingModel()
    done: list[int] = []
    report = evaluate_perplexity(model, [tokens], [0, 10, 40], running=16, points=3, progress=done.append)
    assert len(report.points) == 3
    starts = [start for _, start in report.points]
    assert starts == sorted(set(starts)) and starts[0] >= 40 and starts[-1] + 16 <= 200
    assert model.running == [tokens[s : s + 16].tolist() for s in starts] * 3
    assert model.contexts == [tokens[s - c : s].tolist() for c in (10, 40) for s in starts]
    assert sum(done) == 3 * (0 + 10 + 40) + 3 * 3 * 16
    assert [r.slots for r in report.results] == [0, 5, 20]
    assert [r.memory_bytes for r in report.results] == [0, 10, 40]
    assert report.results[0].perplexity == pytest.approx(50, rel=1e-6)


def test_perplexity_and_change_are_those_of_the_scored_tokens() -> None:
    tokens = np.full(100, 3)
    # token 7 is likely with a context: only what is scored may count, so it stands among the last 4 of 16 once
    starts = [start for _, start in pick_points([100], 8, 16, points=2)]
    for start in starts:
        tokens[start + 1] = 7
        tokens[start + 15] = 7
    report = evaluate_perplexity(RecordingModel(), [tokens], [0, 8], running=16, scored=4, points=2)
    other = math.log(49 + math.exp(2.0))
    loss = (3 * other + (other - 2.0)) / 4
    assert report.results[1].tokens_scored == 8
    assert report.results[1].perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    assert report.results[1].change == pytest.approx(math.exp(loss) / 50 - 1, rel=1e-5)
    # both points changed by the same amount: the paired interval has no width
    assert report.results[1].change_interval == pytest.approx((report.results[1].change,) * 2, abs=1e-6)


def test_losses_are_those_of_the_model(checkpoint: Path) -> None:
    model = SharedLLMForCausalLM.from_pretrained(checkpoint).eval()
    tokens = torch.randint(1, VOCABULARY, (1, 150))
    running, context = tokens[:, -WINDOW:], tokens[:, :-WINDOW]
    with torch.no_grad():
        memory = model.compress(context)
        logits = model(input_ids=running, memory=memory).logits[0].double()
        losses = running_losses(model, running, 20, memory)
        bare = running_losses(model, running, 20)
    expected = torch.stack([-logits[i - 1].log_softmax(-1)[running[0, i]] for i in range(WINDOW - 20, WINDOW)])
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(losses, bare, atol=1e-3)


def test_no_query_reads_the_scored_tokens(checkpoint: Path) -> None:
    """A query from the running text's last token would choose nodes by what is to be predicted."""
    model = SharedLLMForCausalLM.from_pretrained(checkpoint).eval()
    assert model.config.query_aware
    tokens = torch.randint(1, VOCABULARY, (300,)).numpy()
    report = evaluate_perplexity(model, [tokens], [200], running=WINDOW, points=1)
    start = report.points[0][1]
    with torch.no_grad():
        ids = torch.from_numpy(tokens).unsqueeze(0)
        fixed = model.compress(ids[:, start - 200 : start])
        losses = running_losses(model, ids[:, start : start + WINDOW], WINDOW - 1, fixed)
    assert report.results[0].losses[0] == pytest.approx(float(losses.mean()), rel=1e-5)


def test_the_model_returns_to_the_modes_it_had() -> None:
    class Stops(Exception):
        pass

    def stop(_: int) -> None:
        raise Stops

    model = RecordingModel()
    model.inner = torch.nn.ModuleList([torch.nn.Dropout(), torch.nn.Dropout()])
    model.train()
    # somebody may have frozen a part of it
    model.inner[1].eval()
    seen: list[bool] = []
    settings = {"running": 16, "points": 1}
    tokens = np.zeros(100, np.int64)
    evaluate_perplexity(model, [tokens], [8], progress=lambda _: seen.append(model.training), **settings)
    assert seen and not any(seen)
    with pytest.raises(Stops):
        evaluate_perplexity(model, [tokens], [8], progress=stop, **settings)
    assert [module.training for module in model.modules()] == [True, True, True, False]


@pytest.mark.parametrize("points", [1, 2, 3, 7, 10])
def test_points_do_not_overlap_and_stay_inside(points: int) -> None:
    places = pick_points([95, 10, 60], 20, 10, points=points)
    assert len(places) == min(points, 7 + 4)
    assert len(set(places)) == len(places)
    for document, start in places:
        assert start >= 20 and start + 10 <= [95, 10, 60][document]
    for (d0, s0), (d1, s1) in itertools.pairwise(places):
        assert d1 > d0 or s1 - s0 >= 10


def test_points_by_stride() -> None:
    assert pick_points([40], 10, 10, points=None, stride=5) == [(0, 10), (0, 15), (0, 20), (0, 25), (0, 30)]
    assert pick_points([40], 10, 10, points=2, stride=5) == [(0, 10), (0, 15)]


def test_texts_that_are_too_short_say_by_how_much() -> None:
    with pytest.raises(ValueError, match=r"the text has 99 tokens, and 120 are needed: 100 of context \+ 20 running"):
        pick_points([99], 100, 20, points=3)
    with pytest.raises(ValueError, match=r"the longest document has 50 tokens, and 120 are needed"):
        pick_points([10, 50], 100, 20, points=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_lengths": []}, r"context_lengths: expected numbers of at least 0, got \[\]"),
        ({"context_lengths": [-1]}, r"context_lengths: expected numbers of at least 0, got \[-1\]"),
        ({"running": 17}, r"running: expected 2 to 16 tokens \(the model's window\), got 17"),
        ({"running": 1}, r"running: expected 2 to 16 tokens"),
        ({"scored": 16}, r"scored: expected 1 to 15 tokens \(one less than running\), got 16"),
        ({"scored": 0}, r"scored: expected 1 to 15 tokens"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], message: str) -> None:
    settings = {"context_lengths": [0], "running": 16, **options}
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(RecordingModel(), [np.zeros(100, np.int64)], settings.pop("context_lengths"), **settings)


def test_loss_that_is_not_a_number() -> None:
    class Broken(RecordingModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits[:] = math.nan
            return output

    with pytest.raises(ValueError, match=r"loss: expected a number, got nan at token \d+ with 0 tokens of context"):
        evaluate_perplexity(Broken(), [np.zeros(100, np.int64)], [0], running=16, points=1)


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.706), (5, 2.5706), (30, 2.0423), (31, 2.0395), (60, 2.0003), (120, 1.9799)]
)
def test_student_t(freedom: int, value: float) -> None:
    assert t95(freedom) == pytest.approx(value, abs=6e-4 if freedom == 1 else 6e-5)


def test_interval_of_the_mean() -> None:
    assert mean_interval([1.0]) is None
    low, high = mean_interval([1.0, 2.0, 3.0]) or (0.0, 0.0)
    half = 4.3027 * 1.0 / math.sqrt(3)
    assert (low, high) == pytest.approx((2 - half, 2 + half), rel=1e-4)


def test_interval_covers_what_it_should() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        low, high = mean_interval(generator.normal(1.0, 2.0, 5).tolist()) or (0.0, 0.0)
        hits += low <= 1.0 <= high
    # 950 expected, standard deviation 7
    assert 920 <= hits <= 980


def test_peak_memory_starts_again_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    with measure_peak(device) as large:
        block = torch.ones(50_000_000)
        del block
    with measure_peak(device) as small:
        block = torch.ones(1_000_000)
    assert large.bytes - small.bytes > 150e6
    # the way taken where the kernel's mark cannot be reset
    monkeypatch.setattr("sharedllm_ext.evaluation.peak_memory._RESET", Path("/proc/self/no_such_file/x"))
    with measure_peak(device) as sampled:
        block = torch.ones(50_000_000)
        for _ in range(20):
            block += 1
    assert "sampled" in sampled.kind
    assert abs(sampled.bytes - large.bytes) < 100e6


FREED = """
import sys, torch
from sharedllm_ext.evaluation.peak_memory import _resident_bytes, keep_no_freed_blocks
if sys.argv[1] == "exact":
    keep_no_freed_blocks()
block = torch.ones(6_000_000)
del block
before = _resident_bytes()
blocks = [torch.ones(n) for _ in range(8) for n in (5_000_000, 100)]
blocks = blocks[1::2]
print(_resident_bytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_freed_blocks_go_back_at_once() -> None:
    kept = [
        int(subprocess.run([sys.executable, "-c", FREED, mode], capture_output=True, check=True, timeout=60).stdout)
        for mode in ("default", "exact")
    ]
    # of the freed blocks of 20 MB those below one still in use are kept by default
    assert kept[0] > 20e6
    assert kept[1] < 5e6


def test_peak_memory_does_not_grow_with_the_context(checkpoint: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", torch.randint(1, VOCABULARY, (140_000,)).numpy())
    # a process of its own: what earlier tests left in the allocator counts as resident too
    command = [sys.executable, "-m", "sharedllm_ext", "perplexity", str(checkpoint), str(tmp_path / "ids.npy")]
    command += ["--context-lengths", "16k,32k,128k", "--points", "1", "--exact-memory", "--json"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=120)
    _, middle, long = json.loads(done.stdout)["results"]
    grown = long["peak_memory_bytes"] - middle["peak_memory_bytes"]
    # the ids themselves are 0.8 MB; one layer's activations of all tokens would be 19 MB, the logits 126 MB
    assert grown < (long["context_memory_bytes"] - middle["context_memory_bytes"]) + 8e6

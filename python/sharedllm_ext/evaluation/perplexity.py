"""Perplexity of the same running text with more and more context before it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sharedllm_ext.counted import counted
from sharedllm_ext.evaluation.peak_memory import measure_peak
from sharedllm_ext.evaluation.texts import Tokens

#: Positions whose logits are raised to float32 at once.
LOGIT_ROWS = 512
# two-sided 95% points of Student's t for 1 to 30 degrees of freedom
_T95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


def t95(freedom: int) -> float:
    """Two-sided 95% point of Student's t."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = 1.959964
    # Fisher's expansion around the normal point: right to 1e-5 from here on
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95% confidence interval of the mean of independent values (Student's t); ``None`` for fewer than two."""
    if len(values) < 2:
        return None
    mean = float(np.mean(values))
    half = t95(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


@dataclass(frozen=True)
class LengthResult:
    """Result of one context length.

    ``losses`` is the mean loss (nats for each scored token) of every point; ``change`` the perplexity over that of the
    first length, less 1, and ``change_interval`` its paired 95% confidence interval over the points.
    """

    context_length: int
    perplexity: float
    change: float
    change_interval: tuple[float, float] | None
    tokens_scored: int
    seconds: float
    peak_bytes: int
    memory_bytes: int
    slots: int
    losses: list[float]


@dataclass(frozen=True)
class PerplexityReport:
    """Results in the order of the context lengths, and what they were measured on."""

    results: list[LengthResult]
    points: list[tuple[int, int]]
    running: int
    scored: int
    peak_kind: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "running_tokens": self.running,
            "scored_tokens_per_point": self.scored,
            "points": [{"document": document, "running_starts_at": start} for document, start in self.points],
            "peak_memory_is": self.peak_kind,
            "results": [
                {
                    "context_tokens": result.context_length,
                    "perplexity": result.perplexity,
                    "change": result.change,
                    "change_interval_95": result.change_interval,
                    "tokens_scored": result.tokens_scored,
                    "seconds": result.seconds,
                    "seconds_per_point": result.seconds / len(self.points),
                    "peak_memory_bytes": result.peak_bytes,
                    "context_memory_bytes": result.memory_bytes,
                    "memory_slots": result.slots,
                    "losses": result.losses,
                }
                for result in self.results
            ],
        }


def pick_points(
    lengths: Sequence[int], context: int, running: int, *, points: int | None, stride: int | None = None
) -> list[tuple[int, int]]:
    """Where running texts start: (document, position), each with ``context`` tokens before it.

    Without ``stride``, up to ``points`` running texts that do not overlap, spread evenly over all documents that are
    long enough. With it, one every ``stride`` tokens from the first possible place, the first ``points`` of them.

    Raises:
        ValueError: no document has ``context + running`` tokens.
    """
    spare = [length - context - running for length in lengths]
    if all(room < 0 for room in spare):
        longest = max(lengths, default=0)
        which = "the text has" if len(lengths) == 1 else "the longest document has"
        raise ValueError(
            f"{which} {counted(longest, 'token')}, and {context + running} are needed: {context} of context + "
            f"{running} running"
        )
    step = running if stride is None else stride
    places = [(document, context + i * step) for document, room in enumerate(spare) for i in range(room // step + 1)]
    if points is None or points >= len(places):
        return places
    if stride is not None:
        return places[:points]
    # evenly spread, and the same for every count: the middle of each of `points` equal parts
    return [places[(2 * i + 1) * len(places) // (2 * points)] for i in range(points)]


def running_losses(model: Any, running: Tensor, scored: int, memory: Any = None) -> Tensor:
    """Loss (nats) of each of the last ``scored`` tokens of ``running`` ``[1, W]``: ``[scored]`` float32."""
    options = {} if memory is None else {"memory": memory}
    logits = model(input_ids=running, logits_to_keep=scored + 1, use_cache=False, **options).logits[0, :-1]
    targets = running[0, -scored:]
    parts = [
        F.cross_entropy(rows.float(), wanted, reduction="none")
        for rows, wanted in zip(logits.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    ]
    return torch.cat(parts)


def _ids(tokens: Tokens, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64)).unsqueeze(0).to(device)


def check_lengths(context_lengths: Sequence[int], running: int, scored: int | None, window: int) -> int:
    """The scored tokens of a point, by default all that can be predicted; ``ValueError`` for impossible lengths."""
    scored = running - 1 if scored is None else scored
    if not context_lengths or min(context_lengths) < 0:
        raise ValueError(f"context_lengths: expected numbers of at least 0, got {list(context_lengths)}")
    if not 2 <= running <= window:
        raise ValueError(f"running: expected 2 to {counted(window, 'token')} (the model's window), got {running}")
    if not 1 <= scored < running:
        raise ValueError(f"scored: expected 1 to {counted(running - 1, 'token')} (one less than running), got {scored}")
    return scored


@torch.inference_mode()
def evaluate_perplexity(
    model: Any,
    documents: Sequence[Tokens],
    context_lengths: Sequence[int],
    *,
    running: int,
    scored: int | None = None,
    points: int | None = 20,
    stride: int | None = None,
    progress: Callable[[int], object] | None = None,
    on_result: Callable[[LengthResult], object] | None = None,
) -> PerplexityReport:
    """Perplexity of the same running tokens with each of several context lengths before them.

    The context of a point is the text right before its running text, cut from the left. It is compressed without
    a query: the last running token would tell the tree about tokens that are scored.

    Args:
        model: a ``SharedLLMForCausalLM``.
        documents: arrays of token ids; no context or running text crosses from one to the next.
        context_lengths: tokens of context, 0 for none; the first is what the others are compared with.
        running: tokens of running text at every point, at most the model's window.
        scored: how many of its last tokens count, at most ``running - 1`` (the default).
        points: running texts, fewer where the text has no room for them; ``None`` for all.
        stride: tokens from one running text to the next (default: evenly spread, not overlapping).
        progress: called with the tokens done since the last call; there are
            ``len(points) * (length + running)`` for each length.
        on_result: called with the result of each length as soon as it is known.

    Raises:
        ValueError: impossible lengths, or a loss that is not a number.
    """
    scored = check_lengths(context_lengths, running, scored, int(model.config.window))
    places = pick_points(
        [len(document) for document in documents], max(context_lengths), running, points=points, stride=stride
    )
    with _evaluating(model):
        results, kind = _measure(model, documents, context_lengths, places, running, scored, progress, on_result)
    return PerplexityReport(results, places, running, scored, kind)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode; each of its modules then returns to the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _measure(
    model: Any,
    documents: Sequence[Tokens],
    context_lengths: Sequence[int],
    places: Sequence[tuple[int, int]],
    running: int,
    scored: int,
    progress: Callable[[int], object] | None,
    on_result: Callable[[LengthResult], object] | None,
) -> tuple[list[LengthResult], str]:
    """Results of all context lengths, and what their peak memory measures."""
    device = next(model.parameters()).device
    results: list[LengthResult] = []
    peak_kind = ""
    for length in context_lengths:
        losses, memory_bytes, slots = [], 0, 0
        with measure_peak(device) as peak:
            begin = time.perf_counter()
            for document, start in places:
                tokens = documents[document]
                memory, told = None, 0

                def tell(done: int) -> None:
                    nonlocal told
                    if progress is not None:
                        progress(done - told)
                    told = done

                if length:
                    memory = model.compress(_ids(tokens[start - length : start], device), progress=tell)
                    memory_bytes, slots = int(memory.nbytes), int(memory.cu_slots[-1])
                loss = running_losses(model, _ids(tokens[start : start + running], device), scored, memory)
                del memory
                # float64: the mean over thousands of tokens is compared in its fourth digit
                losses.append(float(loss.double().mean()))
                if not math.isfinite(losses[-1]):
                    raise ValueError(
                        f"loss: expected a number, got {losses[-1]} at token {start} with {counted(length, 'token')} "
                        "of context"
                    )
                tell(length + running)
            seconds = time.perf_counter() - begin
        peak_kind = peak.kind
        base = results[0].losses if results else losses
        pairs = [new - old for new, old in zip(losses, base, strict=True)]
        bounds = mean_interval(pairs) if results else None
        results.append(
            LengthResult(
                context_length=length,
                perplexity=math.exp(float(np.mean(losses))),
                change=math.expm1(float(np.mean(pairs))),
                change_interval=None if bounds is None else (math.expm1(bounds[0]), math.expm1(bounds[1])),
                tokens_scored=scored * len(places),
                seconds=seconds,
                peak_bytes=peak.bytes,
                memory_bytes=memory_bytes,
                slots=slots,
                losses=losses,
            )
        )
        if on_result is not None:
            on_result(results[-1])
    return results, peak_kind

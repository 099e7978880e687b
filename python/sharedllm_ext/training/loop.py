"""The training loop: steps, reports, checkpoints, signals, one process or several."""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..counted import counted
from .checkpoint import TrainingError, checkpoint_tensors, read_checkpoint, write_checkpoint
from .data import Batch, Mix
from .flops import StepFlops, batch_tokens, peak_flops
from .losses import Counts, Losses, Sums, Weights, count
from .sharding import SHARDINGS, gathered, like, shard, whole
from .trained import Trained

CHECKPOINT = "checkpoint.safetensors"
# bytes of gradients that are summed over processes at a time
_BUCKET = 1 << 26


@dataclasses.dataclass(frozen=True)
class Options:
    """How to train.

    Attributes:
        steps, minutes: when to end; at least one of them. The rates decline over whichever comes first.
        lr: peak rate of the blocks, the pick and low-rank updates.
        base_lr: of the base checkpoint's own weights.
        warmup: steps of a linear rise.
        floor: share of the peak that is left at the end.
        clip: largest norm of all gradients together.
        weight_decay: AdamW's, of matrices.
        accumulate: batches of a step in each process.
        save_minutes: between checkpoints.
        report_seconds: between reports.
        bfloat16: compute in it, over parameters that stay as they are.
        most_skipped: steps without a finite loss in a row that end the training.
        sharding: of several processes: ``ddp``, all parameters in each, or ``fsdp``, a share of them in each.
    """

    steps: int | None = None
    minutes: float | None = None
    lr: float = 1e-3
    base_lr: float = 3e-4
    warmup: int = 20
    floor: float = 0.02
    clip: float = 1.0
    weight_decay: float = 0.01
    accumulate: int = 1
    save_minutes: float = 10.0
    report_seconds: float = 10.0
    bfloat16: bool = False
    most_skipped: int = 5
    sharding: str = "ddp"

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("steps, minutes: expected at least one of them, got none")
        for name in ("steps", "minutes", "lr", "base_lr", "clip", "accumulate", "most_skipped"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {value!r}")
        if self.sharding not in SHARDINGS:
            raise ValueError(f"sharding: expected one of {', '.join(SHARDINGS)}, got {self.sharding!r}")

    def rate(self, step: int, seconds: float) -> float:
        """The factor of the peak rates in a step: a linear rise, then half a cosine."""
        done = 0.0 if self.steps is None else step / self.steps
        if self.minutes is not None:
            done = max(done, seconds / (60 * self.minutes))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return min(1.0, (step + 1) / max(1, self.warmup)) * (self.floor + (1 - self.floor) * cosine)

    def over(self, step: int, seconds: float) -> bool:
        """Whether the training has come to its end."""
        by_steps = self.steps is not None and step >= self.steps
        return by_steps or (self.minutes is not None and seconds >= 60 * self.minutes)


@dataclasses.dataclass(frozen=True)
class Report:
    """Means over the steps since the last report; ``found`` is the share of questions whose segment is among the best.

    A mean is ``None`` where nothing was counted; ``mfu`` where the device's peak is not known.
    """

    step: int
    seconds: float
    answer: float | None
    pick: float | None
    text: float | None
    found: float | None
    tokens_per_second: float
    mfu: float | None


class Trainer:
    """Trains a model.

    Args:
        trained: what is trained.
        losses: of the model.
        mix: gives the batches.
        options: how to train.
        folder: where checkpoints are written; must exist.
        weights: of the losses.
        settings: what must be equal for a checkpoint to be gone on from; JSON.
        device: where to compute; default: the model's. A model that ``fsdp`` shards need not be there yet.
        report: called with each :class:`Report` in the first process.
        say: called there with lines on skipped steps and checkpoints.

    With ``torch.distributed`` initialised, every process takes its share of the step's batches, and gradients are
    summed over the processes: the step equals that of one process with as many accumulated batches. Checkpoints hold
    whole tensors and can be gone on from with any division of a step's batches.
    """

    def __init__(
        self,
        trained: Trained,
        losses: Losses,
        mix: Mix,
        options: Options,
        folder: Path,
        *,
        weights: Weights | None = None,
        settings: dict[str, Any] | None = None,
        device: torch.device | None = None,
        report: Callable[[Report], object] = lambda report: None,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.trained, self.losses, self.mix, self.options = trained, losses, mix, options
        self.weights, self.settings, self.path = weights or Weights(), settings or {}, folder / CHECKPOINT
        self.several = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if self.several else (0, 1)
        self._tells = self.rank == 0
        self._report, self._say = report, say
        self.model = trained.model
        self.device: torch.device = self.model.device if device is None else device
        self._flops = StepFlops(self.model, losses.prompt, losses.passages)
        self._sharded: Callable[[Batch], Sums] | None = None
        if options.sharding == "fsdp":
            if not self.several:
                raise ValueError("sharding: expected several processes (torchrun) for fsdp, got one without a group")
            self._sharded = shard(self.model, losses, self.device)
            trained.find_parameters()
        self.parameters = list(trained.parameters.values())
        self.optimizer = self._optimizer()
        self.step, self.seconds, self.skipped = 0, 0.0, 0
        self._peak = peak_flops(self.device)
        self._signal = 0
        self._last: Report | None = None

    def _optimizer(self) -> torch.optim.AdamW:
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, parameter in self.trained.parameters.items():
            groups.setdefault((self.trained.new(name), parameter.dim() > 1), []).append(parameter)
        options = self.options
        return torch.optim.AdamW(
            [
                {
                    "params": own,
                    "peak": options.lr if new else options.base_lr,
                    "weight_decay": options.weight_decay * wide,
                }
                for (new, wide), own in groups.items()
            ],
            lr=options.lr,
            betas=(0.9, 0.95),
            fused=self.device.type == "cuda",
        )

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint, in the first process.

        Raises:
            TrainingError: it cannot be written, in all processes.
        """
        failure: TrainingError | None = None
        tensors = gathered(checkpoint_tensors(self.trained.parameters, self.optimizer), self.rank == 0)
        if self.rank == 0:
            header = {
                "step": self.step,
                "seconds": self.seconds,
                "skipped": self.skipped,
                "settings": self.settings,
            }
            try:
                write_checkpoint(self.path, tensors, header)
            except TrainingError as error:
                failure = error
        if self._largest([float(failure is not None)])[0]:
            raise failure or TrainingError("checkpoint: the first process could not write it")
        self.say(f"checkpoint of step {self.step}: {self.path}")

    def resume(self) -> None:
        """Go on from the checkpoint: the next step is what it would have been.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or of a run with other settings; the message names them.
        """
        parameters, states, header = read_checkpoint(self.path)
        before = header["settings"]
        other = sorted(k for k in {*before, *self.settings} if before.get(k) != self.settings.get(k))
        if other:
            raise ValueError(
                f"{self.path}: expected a checkpoint of the same settings, got "
                + ", ".join(f"{k} {before.get(k)!r} instead of {self.settings.get(k)!r}" for k in other)
            )
        self.trained.load(parameters)
        stored = self.optimizer.state_dict()
        names = {id(parameter): name for name, parameter in self.trained.parameters.items()}
        numbers = [
            (number, names[id(parameter)])
            for group, kept in zip(self.optimizer.param_groups, stored["param_groups"], strict=True)
            for number, parameter in zip(kept["params"], group["params"], strict=True)
        ]
        places = self.trained.parameters
        stored["state"] = {
            number: {
                # the count of steps is a number, not shared out
                field: like(value, places[name]) if value.dim() else value
                for field, value in states[name].items()
            }
            for number, name in numbers
            if name in states
        }
        self.optimizer.load_state_dict(stored)
        self.step, self.seconds, self.skipped = header["step"], header["seconds"], header["skipped"]

    # -- steps --------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train until the end, or until SIGTERM or SIGINT; a checkpoint is written in every case.

        Returns:
            0, or the signal's number.

        Raises:
            TrainingError: too many steps without a finite loss, or a checkpoint that cannot be written.
        """
        self.model.train()
        begin, saved = time.monotonic() - self.seconds, time.monotonic()
        meter = _Meter(time.monotonic())
        with _signals(self._note), _Ahead(self) as ahead:
            while not self.options.over(self.step, self.seconds):
                batches = ahead.take(self.step)
                counts = self._sum_counts(batches)
                sums = self._update(batches, counts)
                meter.add(sums, counts, sum(map(self._flops.of, batches)), sum(map(self._tokens, batches)))
                self.step += 1
                now = time.monotonic()
                due = [now - begin, float(now - saved >= 60 * self.options.save_minutes), float(self._signal)]
                self.seconds, save, stop = self._largest(due)
                if save and not stop and not self.options.over(self.step, self.seconds):
                    self.save()
                    saved = now
                if now - meter.begin >= self.options.report_seconds:
                    self._tell(meter)
                    meter = _Meter(now)
                if stop:
                    if meter.steps:
                        self._tell(meter)
                    self.save()
                    return int(stop)
        if meter.steps:
            self._tell(meter)
        self.save()
        return 0

    @property
    def last_report(self) -> Report | None:
        """The latest report, of this process."""
        return self._last

    def batches(self, step: int) -> list[Batch]:
        """The batches of a step in this process."""
        first = self.rank * self.options.accumulate
        return [self.mix.batch(step, first + i) for i in range(self.options.accumulate)]

    def _update(self, batches: list[Batch], counts: Counts) -> Tensor:
        """One step of the optimiser; sums ``[4]`` of the losses and of what was found, over all processes."""
        reported = torch.zeros(4, dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches):
            # what dropout draws follows from the batch, so that a resumed run draws the same
            part = self.rank * self.options.accumulate + number
            torch.manual_seed(int(np.random.SeedSequence([self.mix.seed, self.step, part]).generate_state(1)[0]))
            with self._precision():
                sums = (self._sharded or self.losses)(batch)
            loss = sums.total(counts, self.weights)
            # fully_shard divides the sum over the processes by their number
            loss = loss if self._sharded is None else loss * self.world
            loss.backward()  # type: ignore[no-untyped-call]
            reported += torch.stack([term.detach().double() for term in sums])
        self._sum_gradients()
        if self.several:
            dist.all_reduce(reported)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.options.clip, foreach=True))
        wrong = [n for n, value in zip(Sums._fields, reported.tolist(), strict=True) if not math.isfinite(value)]
        if not wrong and not bool(norm.isfinite()):
            wrong = ["gradient"]
        if wrong:
            self._skip(wrong)
            reported.fill_(math.nan)
        else:
            self.skipped = 0
            factor = self.options.rate(self.step, self.seconds)
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return reported

    def _skip(self, wrong: list[str]) -> None:
        self.skipped += 1
        line = f"step {self.step + 1}: expected finite losses, got NaN or infinity in {', '.join(wrong)}"
        if self.skipped >= self.options.most_skipped:
            stands = f"{self.path} stands" if self.path.exists() else "there is no checkpoint"
            raise TrainingError(f"{line}, as in {counted(self.skipped, 'step')} in a row; {stands}")
        self.say(f"{line}; skipped")

    def _precision(self) -> Any:
        if not self.options.bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _tokens(self, batch: Batch) -> int:
        losses = self.losses
        passages = losses.passages if self.model.pick is not None else 0
        return batch_tokens(batch, losses.prompt, self.model.config, passages)

    def _tell(self, meter: "_Meter") -> None:
        self._last = meter.report(self.step, self.seconds, self.world, self._peak)
        if self._tells:
            self._report(self._last)

    def say(self, line: str) -> None:
        """A line for people, in the first process."""
        if self._tells:
            self._say(line)

    def _note(self, number: int) -> None:
        self._signal = number

    # -- several processes --------------------------------------------------------------------------------------------

    def _sum_counts(self, batches: list[Batch]) -> Counts:
        counts = [count(batch, self.losses.prompt, self.model.pick is not None) for batch in batches]
        total = [sum(column) for column in zip(*counts, strict=True)]
        if self.several:
            shared = torch.tensor(total, dtype=torch.int64, device=self.device)
            dist.all_reduce(shared)
            total = shared.tolist()
        return Counts(*total)

    def _largest(self, values: list[float]) -> list[float]:
        """The largest over the processes of each value, so that all decide alike."""
        if not self.several:
            return values
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()

    def _sum_gradients(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if not self.several or self._sharded is not None:
            return
        bucket: list[Tensor] = []
        for following in [*self.parameters, None]:
            full = sum(g.nbytes for g in bucket) >= _BUCKET
            if bucket and (following is None or full or following.dtype != bucket[0].dtype):
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                dist.all_reduce(flat)
                for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    gradient.copy_(part.view_as(gradient))
                bucket = []
            if following is not None:
                assert following.grad is not None
                bucket.append(following.grad)


class _Meter:
    """Sums since the last report."""

    def __init__(self, begin: float) -> None:
        self.begin, self.steps, self.tokens, self.flops = begin, 0, 0, 0.0
        self.sums: list[Tensor] = []
        self.counts: list[Counts] = []

    def add(self, sums: Tensor, counts: Counts, flops: float, tokens: int) -> None:
        self.steps += 1
        self.tokens += tokens
        self.flops += flops
        self.sums.append(sums)
        self.counts.append(counts)

    def report(self, step: int, seconds: float, world: int, peak: float | None) -> Report:
        sums = [row.tolist() for row in self.sums]
        kept = [(row, n) for row, n in zip(sums, self.counts, strict=True) if all(map(math.isfinite, row))]

        def mean(column: int) -> float | None:
            # the last column counts questions, as the pick's loss does
            total = sum(n[1 if column == 3 else column] for _, n in kept)
            return sum(row[column] for row, _ in kept) / total if total else None

        passed = max(1e-9, time.monotonic() - self.begin)
        mfu = None if peak is None else self.flops / passed / peak
        return Report(step, seconds, mean(0), mean(1), mean(2), mean(3), world * self.tokens / passed, mfu)


class _Ahead:
    """Makes the next step's batches while the present one is computed."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self.next: tuple[int, Future[list[Batch]]] | None = None

    def __enter__(self) -> "_Ahead":
        return self

    def __exit__(self, *error: Any) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def take(self, step: int) -> list[Batch]:
        if self.next is None or self.next[0] != step:
            self.next = step, self.pool.submit(self.trainer.batches, step)
        batches = self.next[1].result()
        self.next = step + 1, self.pool.submit(self.trainer.batches, step + 1)
        return batches


@contextlib.contextmanager
def _signals(note: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM and SIGINT are noted, the same one again acts as before; only the main thread can do so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: Any) -> None:
        note(number)
        signal.signal(number, kept[signal.Signals(number)])

    for number in kept:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, before in kept.items():
            signal.signal(number, before)

"""Asks systems the same records, keeps every prediction, and computes scores."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from sharedllm_ext.evaluation.json_rows import as_object, parse
from sharedllm_ext.evaluation.metrics import score
from sharedllm_ext.evaluation.perplexity import mean_interval
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.systems import System
from sharedllm_ext.evaluation.texts import TextError, _read_file, shown

#: Two-sided 95% point of the normal distribution.
_Z95 = 1.959964
# how every row of a prediction file begins
_ROW_BEGIN = '{"key": "'


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95% interval of a share of ``count`` questions (Wilson 1927)."""
    z = _Z95**2 / count
    middle = (share + z / 2) / (1 + z)
    half = _Z95 * math.sqrt(share * (1 - share) / count + z / (4 * count)) / (1 + z)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Prediction:
    """Prediction of one system for one record, in ``seconds``; ``kept``: it is from an earlier run."""

    system: str
    task: str
    length: int | str
    depth: float | None
    labels: dict[str, str]
    id: str
    prediction: str
    answers: list[str]
    score: float
    seconds: float
    kept: bool = False


@dataclass(frozen=True)
class Share:
    """Mean score of a group of predictions, from 0 to 1, and its 95% interval (``None`` for one graded score).

    The interval is Wilson's where every score is 0 or 1; otherwise that of the mean by Student's t, within 0 and 1.
    """

    count: int
    mean: float
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, scores: Sequence[float]) -> Share:
        """Share of at least one score."""
        mean = math.fsum(scores) / len(scores)
        if all(value in (0.0, 1.0) for value in scores):
            return cls(len(scores), mean, wilson_interval(mean, len(scores)))
        bounds = mean_interval(scores)
        return cls(len(scores), mean, bounds and (max(0.0, bounds[0]), min(1.0, bounds[1])))


Group = tuple[Any, ...]


def shares(predictions: Iterable[Prediction], key: Callable[[Prediction], Group | None]) -> dict[Group, Share]:
    """Shares by group, in the order in which groups come; ``None`` leaves a prediction out."""
    groups: dict[Group, list[float]] = {}
    for prediction in predictions:
        group = key(prediction)
        if group is not None:
            groups.setdefault(group, []).append(prediction.score)
    return {group: Share.of(scores) for group, scores in groups.items()}


def _label_group(name: str, prediction: Prediction) -> Group:
    return name, prediction.labels[name], prediction.system


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class PredictionFile:
    """Predictions as JSON lines: each is written as it comes, and existing ones are not computed again.

    A row's ``key`` identifies record, model and system; rows of other keys are left as they are. A last line
    that was cut off, as by a full disk or a killed process, is left out.

    Raises:
        TextError: a file of another kind.
        OSError: the system does not let it be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Mapping[str, Any]] = {}
        whole = True
        if path.exists():
            text = _read_file(path, shown(path))
            *lines, last = text.split("\n")
            for number, line in enumerate(lines, 1):
                if line.strip():
                    self._take(line, f"{shown(path)} line {number}")
            whole = not last
            if last and last[: len(_ROW_BEGIN)] != _ROW_BEGIN[: len(last)]:
                raise TextError(f"{shown(path)} line {len(lines) + 1}: expected a prediction, got {last[:60]!r}")
        if not whole:
            # rows are ASCII, so what came before the cut row has as many bytes as characters
            os.truncate(path, len(text) - len(last))
        self._file = open(path, "a", encoding="ascii")  # noqa: SIM115

    def _take(self, line: str, name: str) -> None:
        row = as_object(parse(line, name, "a prediction"), name)
        if not isinstance(row.get("key"), str) or not isinstance(row.get("prediction"), str):
            raise TextError(
                f'{name}: expected a prediction with "key" and "prediction", got the keys {sorted(row)}'[:300]
            )
        self.rows[row["key"]] = row

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row and hand it to the system at once."""
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, shown(self.path)) from None
        self.rows[row["key"]] = row

    def __enter__(self) -> PredictionFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


@dataclass
class Evaluation:
    """The predictions so far."""

    predictions: list[Prediction] = field(default_factory=list)

    def by_length(self) -> dict[Group, Share]:
        """Shares by (task, length, system)."""
        return shares(self.predictions, lambda p: (p.task, p.length, p.system))

    def by_depth(self, system: str) -> dict[Group, Share]:
        """Shares of one system by (depth, length), of the predictions that have a depth."""
        return shares(
            self.predictions, lambda p: (p.depth, p.length) if p.system == system and p.depth is not None else None
        )

    def by_label(self) -> dict[Group, Share]:
        """Shares by (label, its value, system)."""
        result: dict[Group, Share] = {}
        for name in dict.fromkeys(name for p in self.predictions for name in p.labels):
            labelled = [p for p in self.predictions if name in p.labels]
            result |= shares(labelled, partial(_label_group, name))
        return result

    def means(self) -> dict[Group, float]:
        """Mean over the tasks by (length, system): each task counts the same, as in RULER and LongBench."""
        groups: dict[Group, list[float]] = {}
        for (_, length, system), share in self.by_length().items():
            groups.setdefault((length, system), []).append(share.mean)
        return {group: math.fsum(values) / len(values) for group, values in groups.items()}


def evaluate(
    records: Iterable[Record],
    systems: Sequence[System],
    *,
    model: Any = None,
    file: PredictionFile | None = None,
    batch: int = 1,
    progress: Callable[[int], object] | None = None,
    on_result: Callable[[Prediction], object] | None = None,
) -> Evaluation:
    """Ask every system every record.

    Args:
        records: the questions, in this order.
        systems: the systems to ask, in this order.
        model: plain values that identify the model; kept predictions of another one are not used.
        file: keeps the predictions.
        batch: most records of one task and length that a system is asked at once. The time of an answer is then its
            share of theirs, unless the system tells it (``seconds(record)``).
        progress: called with the answers given since the last call.
        on_result: called with every prediction, old or new.

    Raises:
        Exception: what a system raises; predictions before that are in the file.
    """
    result = Evaluation()
    for prediction in _predictions(records, systems, model, file, batch):
        result.predictions.append(prediction)
        if on_result is not None:
            on_result(prediction)
        if progress is not None:
            progress(1)
    return result


def _batches(records: Iterable[Record], most: int) -> Iterator[list[Record]]:
    """Neighbours of one task and length."""
    waiting: list[Record] = []
    for record in records:
        if waiting and (len(waiting) == most or (record.task, record.length) != (waiting[0].task, waiting[0].length)):
            yield waiting
            waiting = []
        waiting.append(record)
    if waiting:
        yield waiting


def _predictions(
    records: Iterable[Record], systems: Sequence[System], model: Any, file: PredictionFile | None, batch: int
) -> Iterator[Prediction]:
    for group in _batches(records, batch):
        marks = [record.fingerprint() for record in group]
        for system in systems:
            keys = [
                _digest([model, system.settings, record.task, record.id, mark])
                for record, mark in zip(group, marks, strict=True)
            ]
            kept = {} if file is None else {key: file.rows[key] for key in keys if key in file.rows}
            open_ones = [record for record, key in zip(group, keys, strict=True) if key not in kept]
            begin = time.perf_counter()
            said = iter(system.answer(open_ones) if open_ones else [])
            each = (time.perf_counter() - begin) / max(len(open_ones), 1)
            told: Callable[[Record], float] | None = getattr(system, "seconds", None)
            for record, key in zip(group, keys, strict=True):
                old = kept.get(key)
                answer = next(said) if old is None else old["prediction"]
                seconds = float(old.get("seconds") or 0.0) if old is not None else told(record) if told else each
                prediction = Prediction(
                    system=system.name,
                    task=record.task,
                    length=record.length,
                    depth=record.depth,
                    labels=record.labels,
                    id=record.id,
                    prediction=answer,
                    answers=record.answers,
                    score=score(record, answer),
                    seconds=seconds,
                    kept=old is not None,
                )
                if file is not None and old is None:
                    row = {"key": key, "model": model, "settings": system.settings, **asdict(prediction)}
                    del row["kept"]
                    if record.all_classes is not None:
                        row["all_classes"] = record.all_classes
                    file.append(row)
                yield prediction

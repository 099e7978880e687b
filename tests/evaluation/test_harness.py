"""Predictions are kept as they come, none is asked for twice, and shares have their intervals."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sharedllm_ext.evaluation.harness import (
    Evaluation,
    Prediction,
    PredictionFile,
    Share,
    evaluate,
    wilson_interval,
)
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.texts import TextError


class Parrot:
    """Answers with the question, and counts."""

    def __init__(self, name: str = "parrot", fails_after: int = 1000) -> None:
        self.name, self.fails_after = name, fails_after
        self.settings: dict[str, Any] = {"system": name}
        self.asked: list[str] = []

    def answer(self, records: Sequence[Record]) -> list[str]:
        if len(self.asked) >= self.fails_after:
            raise RuntimeError("no more")
        self.asked += [record.id for record in records]
        return [record.question for record in records]


def record(number: int, **more: Any) -> Record:
    fields: dict[str, Any] = {"task": "t", "context": "c", "question": f"naïve {number}", "answer_prefix": ""}
    fields |= {"answers": [str(number % 2)], "max_new_tokens": 3, "metric": "part", "id": f"t/{number}", "length": 8}
    return Record(**{**fields, **more})


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    # by hand: z^2 = 3.8415
    [(0.0, 10, 0.0, 0.27753), (1.0, 10, 0.72247, 1.0), (0.5, 20, 0.29930, 0.70070), (0.8, 5, 0.37554, 0.96378)],
)
def test_wilson(share: float, count: int, low: float, high: float) -> None:
    assert wilson_interval(share, count) == pytest.approx((low, high), abs=2e-5)


def test_intervals_of_shares() -> None:
    assert Share.of([1.0, 0.0]) == Share(2, 0.5, wilson_interval(0.5, 2))
    # mean 0.5, standard deviation 0.25: 4.3027 * 0.25 / sqrt(3) = 0.62103 on either side
    graded = Share.of([0.25, 0.5, 0.75])
    assert (graded.count, graded.mean, graded.interval) == (3, 0.5, (0.0, 1.0))
    narrow = Share.of([0.49, 0.5, 0.51])
    assert narrow.interval == pytest.approx((0.5 - 4.3027 * 0.01 / 3**0.5, 0.5 + 4.3027 * 0.01 / 3**0.5))
    assert Share.of([0.5]).interval is None


def prediction(**more: Any) -> Prediction:
    fields: dict[str, Any] = {"system": "s", "task": "t", "length": 8, "depth": None, "labels": {}, "id": "1"}
    return Prediction(**{**fields, "prediction": "", "answers": [], "score": 1.0, "seconds": 0.0, **more})


def test_groups() -> None:
    result = Evaluation(
        [
            prediction(depth=0.0),
            prediction(depth=0.0, score=0.0),
            prediction(depth=50.0, labels={"difficulty": "hard"}),
            prediction(task="u", score=0.0, labels={"difficulty": "easy"}),
            prediction(system="r", depth=0.0),
        ]
    )
    assert {key: share.mean for key, share in result.by_length().items()} == {
        ("t", 8, "s"): 2 / 3,
        ("u", 8, "s"): 0.0,
        ("t", 8, "r"): 1.0,
    }
    assert {key: share.mean for key, share in result.by_depth("s").items()} == {(0.0, 8): 0.5, (50.0, 8): 1.0}
    assert {key: share.mean for key, share in result.by_label().items()} == {
        ("difficulty", "hard", "s"): 1.0,
        ("difficulty", "easy", "s"): 0.0,
    }
    # tasks count the same, however many questions they have
    assert result.means() == {(8, "s"): 1 / 3, (8, "r"): 1.0}


def test_every_system_is_asked_and_every_answer_kept(tmp_path: Path) -> None:
    systems = [Parrot("one"), Parrot("two")]
    told: list[Prediction] = []
    done: list[int] = []
    with PredictionFile(tmp_path / "p.jsonl") as file:
        result = evaluate(
            map(record, range(3)), systems, model="m", file=file, progress=done.append, on_result=told.append
        )
    assert [(p.system, p.id, p.score) for p in result.predictions] == [
        (name, f"t/{number}", float(str(number % 2) in f"naïve {number}"))
        for number in range(3)
        for name in ("one", "two")
    ]
    assert told == result.predictions and sum(done) == 6
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in rows] == [p.prediction for p in result.predictions]
    assert len({row["key"] for row in rows}) == 6
    assert rows[0]["model"] == "m" and rows[0]["settings"] == {"system": "one"} and rows[0]["task"] == "t"


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with PredictionFile(path) as file, pytest.raises(RuntimeError, match="no more"):
        evaluate(map(record, range(5)), [Parrot(fails_after=3)], file=file)
    assert path.read_text().count("\n") == 3
    later = Parrot()
    with PredictionFile(path) as file:
        result = evaluate(map(record, range(5)), [later], file=file)
    assert later.asked == ["t/3", "t/4"]
    assert [p.kept for p in result.predictions] == [True] * 3 + [False] * 2
    assert len(result.predictions) == path.read_text().count("\n") == 5


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"record": {"context": "d"}},
        {"record": {"question": "x"}},
        {"record": {"answer_prefix": "x"}},
        {"record": {"max_new_tokens": 4}},
        {"record": {"id": "t/9"}},
        {"record": {"task": "u"}},
        {"record": {"chat": False}},
        {"system": "other"},
    ],
)
def test_another_question_is_asked_again(tmp_path: Path, change: dict[str, Any]) -> None:
    def ask(model: str = "m", record_: dict[str, Any] | None = None, system: str = "parrot") -> int:
        parrot = Parrot(system)
        with PredictionFile(tmp_path / "p.jsonl") as file:
            evaluate([record(1, **(record_ or {}))], [parrot], model=model, file=file)
        return len(parrot.asked)

    assert (ask(), ask()) == (1, 0)
    changed = {("record_" if name == "record" else name): value for name, value in change.items()}
    assert (ask(**changed), ask(**changed), ask()) == (1, 0, 0)


def test_scores_are_counted_anew(tmp_path: Path) -> None:
    for answers, expected in ((["1"], 1.0), (["2"], 0.0)):
        with PredictionFile(tmp_path / "p.jsonl") as file:
            result = evaluate([record(1, answers=answers)], [Parrot()], file=file)
        assert result.predictions[0].score == expected


@pytest.mark.parametrize("cut", [1, 5, 9, 40, -1])
def test_a_row_that_was_cut_off_is_left_out(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "p.jsonl"
    with PredictionFile(path) as file:
        evaluate(map(record, range(2)), [Parrot()], file=file)
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first + second[:cut])
    # also where nothing is asked before the next cut
    PredictionFile(path).__exit__(None, None, None)
    parrot = Parrot()
    with PredictionFile(path) as file:
        evaluate(map(record, range(2)), [parrot], file=file)
    assert parrot.asked == ["t/1"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["t/0", "t/1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"words\n", r"p.jsonl line 1: expected a prediction, got expecting value"),
        (b"words", r"p.jsonl line 1: expected a prediction, got 'words'"),
        (b'{"text": 1}\n', r'line 1: expected a prediction with "key" and "prediction", got the keys \[\'text\'\]'),
        (b'{"key": "1", "prediction": "x"}\n[]\n', r"line 2: expected a JSON object, got \[\]"),
        (b"\xff\n", r"expected UTF-8 text, got byte 0xff"),
    ],
)
def test_another_file_is_left_as_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(TextError, match=message):
        PredictionFile(path)
    assert path.read_bytes() == content


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PredictionFile(tmp_path / "p.jsonl") as file:

        def full(text: str) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(file._file, "write", full, raising=False)
        with pytest.raises(OSError, match=re.escape(f"No space left on device: '{tmp_path}/p.jsonl'")):
            evaluate([record(1)], [Parrot()], file=file)
        monkeypatch.undo()


def test_half_surrogates_are_kept(tmp_path: Path) -> None:
    with PredictionFile(tmp_path / "p.jsonl") as file:
        evaluate([record(1, answers=["\ud83d"])], [Parrot()], file=file)
    assert json.loads((tmp_path / "p.jsonl").read_text())["answers"] == ["\ud83d"]


def test_neighbours_of_a_task_and_length_are_asked_at_once(tmp_path: Path) -> None:
    records = [record(n) for n in range(3)] + [record(3, length=16)] + [record(4, task="u"), record(5, task="u")]
    sizes: list[int] = []

    class Noting(Parrot):
        def answer(self, records: Sequence[Record]) -> list[str]:
            sizes.append(len(records))
            return super().answer(records)

    with PredictionFile(tmp_path / "kept.jsonl") as file:
        first = evaluate(records[1:2], [Noting()], file=file)
        assert first.predictions[0].score == 1.0 and sizes == [1]
        result = evaluate(records, [Noting(), Parrot("other")], file=file, batch=2)
    # of the first two one is there already
    assert sizes == [1, 1, 1, 1, 2]
    assert [(p.system, p.id, p.kept) for p in result.predictions] == [
        ("parrot", "t/0", False),
        ("parrot", "t/1", True),
        ("other", "t/0", False),
        ("other", "t/1", False),
        *((name, f"t/{number}", False) for number in (2, 3) for name in ("parrot", "other")),
        *((name, f"t/{number}", False) for name in ("parrot", "other") for number in (4, 5)),
    ]
    assert all(p.prediction == f"naïve {p.id[2:]}" for p in result.predictions)
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 12


def test_a_system_may_tell_how_long_it_took() -> None:
    class Telling(Parrot):
        def seconds(self, record: Record) -> float:
            return float(record.id[2:]) + 0.5

    result = evaluate([record(0), record(1)], [Telling()], batch=2)
    assert [p.seconds for p in result.predictions] == [0.5, 1.5]

"""Records go to a file and come back; the answers of other programs are a system."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sharedllm_ext.evaluation.exchange import GivenAnswers, export_records, read_records
from sharedllm_ext.evaluation.harness import evaluate
from sharedllm_ext.evaluation.prompts import Prompts
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.suites import read_suite
from sharedllm_ext.evaluation.texts import TextError

HALF = "\ud83d"


def record(number: int, **more: Any) -> Record:
    fields: dict[str, Any] = {"task": "t", "context": "amber bold\u2028calm", "question": f" naïve {number}?"}
    fields |= {"answer_prefix": " It is", "answers": [str(number)], "max_new_tokens": 3, "metric": "part"}
    return Record(**{**fields, "id": f"t/{number}", "length": 8, **more})


@pytest.fixture
def records() -> list[Record]:
    full = record(2, task="u", length="8k+", depth=12.5, all_classes=["a", "b"], chat=False, first_line=True)
    return [
        record(0),
        record(1),
        Record(**{**full.__dict__, "stop_at_newline": True, "labels": {"difficulty": "hard"}}),
    ]


def test_records_come_back_as_they_were(records: list[Record], tokenizer: Any, tmp_path: Path) -> None:
    prompts, path = Prompts(tokenizer), tmp_path / "questions.jsonl"
    told: list[int] = []
    assert export_records(records, prompts, path, progress=told.append) == 3
    assert told == [1, 1, 1] and [file.name for file in tmp_path.iterdir()] == ["questions.jsonl"]
    assert read_records(path) == read_suite("records", path) == read_suite("records", tmp_path) == records
    assert read_suite("records", path, ["u"]) == records[2:]
    assert read_suite("records", path, None, 1) == [records[0], records[2]]
    for row, known in zip(map(json.loads, path.read_text().split("\n")[:-1]), records, strict=True):
        assert row["fingerprint"] == known.fingerprint()
        ids = prompts.ids(known)
        assert (row["begin_ids"], row["context_ids"]) == (ids.begin, ids.context.tolist())
        assert row["question_ids"] == ids.question


def test_an_export_that_fails_leaves_the_file_as_it_was(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("old")
    with pytest.raises(TextError, match="t/1: question: expected text"):
        export_records([record(0), record(1, question=HALF)], Prompts(tokenizer), path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


FAULTS = {
    "no metric": ({"metric": None}, 'line 2: expected a string "metric", got None'),
    "unknown metric": ({"metric": "guess"}, """line 2: expected "metric", one of .*part.*, got 'guess'"""),
    "answers": ({"answers": []}, 'line 2: expected "answers", a list of at least one string'),
    "tokens": ({"max_new_tokens": -1}, 'line 2: expected a whole number "max_new_tokens" of at least 0, got -1'),
    "length": ({"length": None}, 'line 2: expected "length", a whole number or a text, got None'),
    "depth": ({"depth": "begin"}, """line 2: expected "depth", a number or null, got 'begin'"""),
    "labels": ({"labels": {"a": 1}}, """line 2: expected "labels", an object of texts, got {'a': 1}"""),
    "chat": ({"chat": 1}, 'line 2: expected "chat", true or false, got 1'),
    "same id": ({"id": "t/0"}, "line 2: expected records of different ids, got 't/0' twice"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_other_rows_are_refused(fault: str, tokenizer: Any, tmp_path: Path) -> None:
    changed, text = FAULTS[fault]
    path = tmp_path / "questions.jsonl"
    export_records([record(0), record(1)], Prompts(tokenizer), path)
    first, second = path.read_text().splitlines()
    path.write_text(first + "\n" + json.dumps({**json.loads(second), **changed}) + "\n")
    with pytest.raises(TextError, match=re.escape(f"{path} ") + text.replace("{", r"\{")):
        read_records(path)


def test_lacking_keys_tasks_and_files(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"expected \*.jsonl files of exported records, found none"):
        read_records(tmp_path)
    path = tmp_path / "questions.jsonl"
    path.write_text('{"task": "t"}\n')
    with pytest.raises(TextError, match="""line 1: expected a string "context", got the keys"""):
        read_records(path)
    export_records([record(0)], Prompts(tokenizer), path)
    with pytest.raises(TextError, match="tasks: expected some of t, got 'u'"):
        read_records(path, ["t", "u"])
    row = json.loads(path.read_text())
    del row["chat"]
    path.write_text(json.dumps(row))
    with pytest.raises(TextError, match='line 1: expected "chat", true or false, got none'):
        read_records(path)


def answers(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_of_another_program_are_scored_as_any_other(tmp_path: Path) -> None:
    asked = [record(0), record(1), record(2)]
    given = [
        {"fingerprint": one.fingerprint(), "prediction": f"it is {number}", "seconds": number / 4, "more": None}
        for number, one in zip((0, 7, 2), asked, strict=True)
    ]
    system = GivenAnswers("snapkv", answers(tmp_path / "a.jsonl", *given))
    for batch in (1, 3):
        result = evaluate(asked, [system], batch=batch)
        assert [(p.system, p.score, p.seconds) for p in result.predictions] == [
            ("snapkv", 1.0, 0.0),
            ("snapkv", 0.0, 1.75),
            ("snapkv", 1.0, 0.5),
        ]
    other = GivenAnswers("snapkv", answers(tmp_path / "b.jsonl", *given[:2]))
    assert other.settings != system.settings
    with pytest.raises(ValueError, match=r"b.jsonl: expected an answer to t/2 \(fingerprint [0-9a-f]{12}…\), got none"):
        evaluate(asked, [other])


def test_answers_in_another_form(tmp_path: Path) -> None:
    one = {"fingerprint": "f", "prediction": "p"}
    for rows, text in (
        ([{"prediction": "p"}], 'line 1: expected a string "fingerprint"'),
        ([{"fingerprint": "f", "prediction": 3}], 'line 1: expected a string "prediction", got 3'),
        ([one, one], "line 2: expected one answer to each record, got another one to f"),
        ([{**one, "seconds": "1"}], """line 1: expected a number "seconds", got '1'"""),
        ([], "expected JSON lines, got none"),
    ):
        with pytest.raises(TextError, match=text):
            GivenAnswers("x", answers(tmp_path / "a.jsonl", *rows))

"""Questions for programs of other environments, and their answers: JSON lines both ways."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sharedllm_ext.evaluation.json_rows import Row, number_of, read_rows, text_of, texts_of
from sharedllm_ext.evaluation.metrics import METRICS
from sharedllm_ext.evaluation.prompts import Prompts
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.suite_files import first_of_each
from sharedllm_ext.evaluation.texts import TextError, shown

#: The token ids of an exported row, one after the other the prompt that full attention reads.
TOKENS = ("begin_ids", "context_ids", "question_ids")


def export_records(
    records: Iterable[Record], prompts: Prompts, path: Path, *, progress: Callable[[int], object] | None = None
) -> int:
    """Write records as JSON lines, and return how many.

    A row has the fields of :class:`Record`, its ``fingerprint``, and the token ids ``begin_ids``, ``context_ids`` and
    ``question_ids`` of its prompt. The file is in place when it is complete.

    Raises:
        OSError: the system does not let it be written.
    """
    count = 0
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w", encoding="ascii") as file:
            for record in records:
                ids = prompts.ids(record)
                tokens = (ids.begin, ids.context.tolist(), ids.question)
                row = {**asdict(record), "fingerprint": record.fingerprint(), **dict(zip(TOKENS, tokens, strict=True))}
                file.write(json.dumps(row) + "\n")
                count += 1
                if progress is not None:
                    progress(1)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count


def read_records(root: Path, tasks: Sequence[str] | None = None, questions: int | None = None) -> list[Record]:
    """Records of a file that :func:`export_records` wrote, or of all ``*.jsonl`` files of a folder.

    Raises:
        TextError: other rows, a task that is not there, no files, or two records of one id.
    """
    files = sorted(root.glob("*.jsonl")) if root.is_dir() else [root]
    if not files:
        raise TextError(f"{shown(root)}: expected *.jsonl files of exported records, found none")
    found: dict[str, str] = {}

    def rows() -> Iterator[Record]:
        for path in files:
            for name, row in read_rows(path):
                record = _record(row, name)
                if record.id in found:
                    raise TextError(f"{name}: expected records of different ids, got {record.id!r} twice")
                found[record.id] = record.task
                if tasks is None or record.task in tasks:
                    yield record

    kept = first_of_each(rows(), questions)
    here = list(dict.fromkeys(found.values()))
    lacking = [task for task in tasks or () if task not in here]
    if lacking:
        raise TextError(f"tasks: expected some of {', '.join(here)}, got {lacking[0]!r}")
    return kept


def _record(row: Row, name: str) -> Record:
    for key in ("task", "context", "question", "answer_prefix", "metric", "id"):
        text_of(row, key, name)
    texts_of(row, "answers", name)
    number_of(row, "max_new_tokens", name)
    if row["metric"] not in METRICS:
        raise TextError(f'{name}: expected "metric", one of {", ".join(METRICS)}, got {row["metric"]!r}')
    kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "length": ("a whole number or a text", lambda value: isinstance(value, (int, str)) and value is not True),
        "depth": ("a number or null", lambda value: value is None or isinstance(value, (int, float))),
        "all_classes": ("a list of texts or null", lambda value: value is None or _texts(value)),
        "labels": ("an object of texts", lambda value: isinstance(value, dict) and _texts(list(value.values()))),
        **{
            key: ("true or false", lambda value: isinstance(value, bool))
            for key in ("chat", "first_line", "stop_at_newline")
        },
    }
    for key, (expected, right) in kinds.items():
        if key not in row or not right(row[key]):
            came = repr(row[key])[:60] if key in row else "none"
            raise TextError(f'{name}: expected "{key}", {expected}, got {came}')
    return Record(**{field.name: row[field.name] for field in fields(Record)})


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


class GivenAnswers:
    """A system of another environment: its answers to exported records are read from a file of JSON lines.

    A row has ``fingerprint`` (the record's), ``prediction``, and may have ``seconds``, the time of the answer.

    Raises:
        TextError: other rows, or two answers to one record.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.answers: dict[str, str] = {}
        self.times: dict[str, float] = {}
        for place, row in read_rows(path):
            mark = text_of(row, "fingerprint", place)
            if mark in self.answers:
                raise TextError(f"{place}: expected one answer to each record, got another one to {mark}")
            self.answers[mark] = text_of(row, "prediction", place)
            seconds = row.get("seconds", 0.0)
            if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
                raise TextError(f'{place}: expected a number "seconds", got {seconds!r}')
            self.times[mark] = float(seconds)
        # other answers are another system
        self.settings: dict[str, Any] = {"system": name, "answers": hashlib.sha256(path.read_bytes()).hexdigest()}

    def answer(self, records: Sequence[Record]) -> list[str]:
        """The file's answers; raises ``ValueError`` for a record that it has none to."""
        marks = [record.fingerprint() for record in records]
        for record, mark in zip(records, marks, strict=True):
            if mark not in self.answers:
                raise ValueError(
                    f"{shown(self.path)}: expected an answer to {record.id} (fingerprint {mark[:12]}…), got none"
                )
        return [self.answers[mark] for mark in marks]

    def seconds(self, record: Record) -> float:
        """The time that the file gives of an answer, 0 where it gives none."""
        return self.times[record.fingerprint()]

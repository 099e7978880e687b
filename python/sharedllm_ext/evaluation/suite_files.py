"""What the readers of the suites' files share: prompts, and which tasks and rows are taken."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sharedllm_ext.evaluation.json_rows import Row, text_of
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.texts import TextError, shown

#: Length of records that a suite does not group by length.
ALL = "all"


class Prompt(NamedTuple):
    """Text before the context, after it, and how the answer begins; ``{input}`` is the row's ``input``."""

    before: str
    after: str
    answer_prefix: str = ""


def filled(prompt: Prompt, context: str, fields: Mapping[str, str]) -> tuple[str, str, str]:
    """Context, question and answer prefix; braces in the row's own texts stay as they are."""

    def fill(text: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), text)

    return fill(prompt.before) + context, fill(prompt.after), fill(prompt.answer_prefix)


def first_of_each(rows: Iterator[Record], questions: int | None) -> list[Record]:
    """The first ``questions`` records of every task and length."""
    kept: list[Record] = []
    counts: dict[tuple[str, int | str], int] = {}
    for record in rows:
        key = record.task, record.length
        counts[key] = counts.get(key, 0) + 1
        if questions is None or counts[key] <= questions:
            kept.append(record)
    return kept


def input_of(row: Row, name: str) -> str:
    return text_of(row, "input", name) if row.get("input") is not None else ""


def place_of_task(name: str, known: Mapping[str, Any]) -> tuple[int, str]:
    """Order of the tasks as they are listed."""
    names = list(known)
    return (names.index(name) if name in known else len(names)), name


def pick_tasks(
    suite: str, folder: Path, here: Sequence[str], known: Mapping[str, Any], tasks: Sequence[str] | None
) -> list[str]:
    """The tasks to read: those asked for, or all that are known and here."""
    unknown = [name for name in tasks or () if name not in known]
    if unknown:
        raise TextError(f"tasks: expected tasks of {suite} ({', '.join(known)}), got {unknown[0]!r}")
    found = sorted({name for name in here if name in known}, key=lambda name: place_of_task(name, known))
    if not found:
        also = f", got files of {', '.join(sorted(set(here)))[:80]}" if here else ", found none"
        raise TextError(f"{shown(folder)}: expected files of {suite} tasks{also}")
    lacking = [name for name in tasks or () if name not in found]
    if lacking:
        raise TextError(f"{shown(folder)}: expected a file of the task {lacking[0]}, found {', '.join(found)}")
    return found if tasks is None else list(tasks)

"""Records from the files that RULER's own generators write."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sharedllm_ext.evaluation.json_rows import Row, number_of, read_rows, text_of, texts_of
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.suite_files import first_of_each, pick_tasks, place_of_task
from sharedllm_ext.evaluation.texts import TextError

_RULER_QUESTION = re.compile(r"\s(?=Question: )")
_RULER_NEEDLE = re.compile(r"\s(?=What (?:is|are all) the special magic )")
_RULER_DOCUMENTS = re.compile(r"\s+(?=Answer the question based on the given documents\.)")


class RulerTask(NamedTuple):
    """Where the question of a RULER prompt begins (the last match's end), and how it is scored."""

    begin: re.Pattern[str]
    metric: str
    max_new_tokens: int


_NIAH = RulerTask(_RULER_NEEDLE, "part", 128)
#: The tasks of RULER (arXiv 2404.06654) by the names of their folders.
RULER: dict[str, RulerTask] = {
    **{f"niah_single_{number}": _NIAH for number in (1, 2, 3)},
    **{f"niah_multikey_{number}": _NIAH for number in (1, 2, 3)},
    "niah_multivalue": _NIAH,
    "niah_multiquery": _NIAH,
    "vt": RulerTask(_RULER_QUESTION, "part", 30),
    "cwe": RulerTask(_RULER_QUESTION, "part", 120),
    "fwe": RulerTask(_RULER_QUESTION, "part", 50),
    "qa_1": RulerTask(_RULER_DOCUMENTS, "any", 32),
    "qa_2": RulerTask(_RULER_DOCUMENTS, "any", 32),
}


def split_ruler(task: str, text: str, name: str) -> tuple[str, str]:
    """Context and question of a RULER prompt: the question begins at the last place that its task's rule finds.

    The white space before the question goes with it, so that the two parts make up the prompt.

    Raises:
        TextError: no such place.
    """
    places = [match.start() for match in RULER[task].begin.finditer(text)]
    if not places or not text[: places[-1]].strip():
        raise TextError(
            f"{name}: expected a prompt of {task}, whose question begins at {RULER[task].begin.pattern!r}, got none"
        )
    return text[: places[-1]], text[places[-1] :]


def _ruler_length(path: Path, root: Path, row: Row, name: str) -> int:
    """The length in the names of the folders (``4096``, ``4k``), or the row's own up to the next power of two."""
    for part in reversed(path.relative_to(root).parts[:-1]):
        if match := re.fullmatch(r"(\d+)([kKmM]?)", part):
            return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()]
    length = number_of(row, "length", name)
    return 1 << max(length - 1, 0).bit_length()


def read_ruler(root: Path, tasks: Sequence[str] | None = None, questions: int | None = None) -> list[Record]:
    """RULER's ``TASK/validation.jsonl`` files, at any depth below ``root``."""
    files = sorted(root.rglob("validation.jsonl"), key=lambda path: (path.parent.name, path.as_posix()))
    names = pick_tasks("ruler", root, [path.parent.name for path in files], RULER, tasks)

    def rows() -> Iterator[Record]:
        for path in sorted(files, key=lambda path: place_of_task(path.parent.name, RULER)):
            task = path.parent.name
            if task not in names:
                continue
            for number, (name, row) in enumerate(read_rows(path)):
                context, question = split_ruler(task, text_of(row, "input", name), name)
                length = _ruler_length(path, root, row, name)
                yield Record(
                    task=task,
                    context=context,
                    question=question,
                    answer_prefix=text_of(row, "answer_prefix", name) if "answer_prefix" in row else "",
                    answers=texts_of(row, "outputs", name),
                    max_new_tokens=RULER[task].max_new_tokens,
                    metric=RULER[task].metric,
                    id=f"{task}/{path.relative_to(root).as_posix()}/{number}",
                    length=length,
                )

    return first_of_each(rows(), questions)

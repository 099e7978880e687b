"""Records from the file of LongBench v2: questions of four options."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from sharedllm_ext.evaluation.json_rows import as_list, as_object, read_json, text_of
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.suite_files import first_of_each
from sharedllm_ext.evaluation.texts import TextError, _read_file, shown

#: How LongBench v2 is asked; ``--prompts`` takes its own ``0shot.txt``.
V2_PROMPT = (
    "Read this text. A question about it follows.\n\n$DOC$\n\nQuestion: $Q$\n"
    "(A) $C_A$\n(B) $C_B$\n(C) $C_C$\n(D) $C_D$\n\n"
    'Which one is right? Answer in the form: "The correct answer is (A)".\n'
)
V2_MAX_NEW_TOKENS = 128
_V2_FIELD = re.compile(r"\$(?:Q|C_[ABCD])\$")


def _v2_value(fields: Mapping[str, str], match: re.Match[str]) -> str:
    return fields[match[0]].strip()


def read_longbench_v2(
    root: Path, tasks: Sequence[str] | None = None, questions: int | None = None, *, prompts: Path | None = None
) -> list[Record]:
    """LongBench v2's ``data.json``, a file or in the folder ``root``; its domains are the tasks."""
    path = root / "data.json" if root.is_dir() else root
    template = V2_PROMPT if prompts is None else _read_file(prompts, shown(prompts))
    before, mark, after = template.partition("$DOC$")
    if not mark:
        raise TextError(f"{shown(prompts or '')}: expected a prompt with $DOC$, $Q$ and $C_A$ to $C_D$, got no $DOC$")
    records = []
    table = as_list(read_json(path, "a JSON array"), shown(path))
    for number, value in enumerate(table):
        name = f"{shown(path)} item {number}"
        row = as_object(value, name)
        fields = {"$Q$": text_of(row, "question", name)}
        fields |= {f"$C_{letter}$": text_of(row, f"choice_{letter}", name) for letter in "ABCD"}
        question = _V2_FIELD.sub(partial(_v2_value, fields), after)
        answer = text_of(row, "answer", name)
        if answer not in ("A", "B", "C", "D"):
            raise TextError(f'{name}: expected "answer" A, B, C or D, got {answer[:60]!r}')
        length = text_of(row, "length", name)
        records.append(
            Record(
                task=text_of(row, "domain", name),
                context=before + text_of(row, "context", name),
                question=question,
                answer_prefix="",
                answers=[answer],
                max_new_tokens=V2_MAX_NEW_TOKENS,
                metric="choice_v2",
                id=str(number),
                length=length,
                labels={"difficulty": text_of(row, "difficulty", name), "length": length},
            )
        )
    if not records:
        raise TextError(f"{shown(path)}: expected at least one question, got none")
    here = list(dict.fromkeys(record.task for record in records))
    names = here if tasks is None else list(tasks)
    lacking = [name for name in names if name not in here]
    if lacking:
        raise TextError(f"{shown(path)}: expected a question of the domain {lacking[0]!r}, got {', '.join(here)}")
    order = {"short": 0, "medium": 1, "long": 2}
    chosen = [record for record in records if record.task in names]
    chosen.sort(key=lambda record: (names.index(record.task), order.get(str(record.length), 3)))
    return first_of_each(iter(chosen), questions)

"""Records from the files of InfiniteBench: the metric and prompt of each task."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sharedllm_ext.evaluation.json_rows import Row, read_rows, scalars_of, text_of, texts_of
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.suite_files import ALL, Prompt, filled, first_of_each, input_of, pick_tasks
from sharedllm_ext.evaluation.texts import TextError


class InfiniteBenchTask(NamedTuple):
    """How a task of InfiniteBench is asked and scored."""

    metric: str
    max_new_tokens: int
    prompt: Prompt


_LETTERS = "\n{options}\n\nAnswer with the letter of the right option.\n"

#: The tasks of InfiniteBench (arXiv 2402.13718) by the names of their files.
INFINITEBENCH: dict[str, InfiniteBenchTask] = {
    "passkey": InfiniteBenchTask(
        "first_number",
        6,
        Prompt("A pass key is hidden in this text. Remember it.\n\n", "\n\n{input}\n\n", "The pass key is"),
    ),
    "number_string": InfiniteBenchTask(
        "first_number",
        12,
        Prompt(
            "A sequence of digits is hidden in this text. Remember it.\n\n",
            "\n\n{input}\n\n",
            "The sequence of digits is",
        ),
    ),
    "kv_retrieval": InfiniteBenchTask(
        "among_words", 50, Prompt("Find the value of a key in this JSON object.\n\n", "\n\n{input}\n")
    ),
    "longbook_qa_eng": InfiniteBenchTask(
        "f1", 40, Prompt("Read the book and answer the question about it.\n\n", "\n\nQuestion: {input}\nAnswer:")
    ),
    "longbook_sum_eng": InfiniteBenchTask("rouge_lsum", 1200, Prompt("Summarise this book.\n\n", "\n\nThe summary:")),
    "longbook_choice_eng": InfiniteBenchTask(
        "multiple_choice",
        40,
        Prompt("Read the book and answer the question about it.\n\n", "\n\nQuestion: {input}\n" + _LETTERS, "Answer:"),
    ),
    "longdialogue_qa_eng": InfiniteBenchTask(
        "name_among_words",
        40,
        Prompt(
            "In one place of this dialogue a character's name is $$MASK$$.\n\n",
            "\n\nWhich character's name is $$MASK$$? Answer with the name alone.\n",
            "The name is",
        ),
    ),
    "math_find": InfiniteBenchTask("math_find", 3, Prompt("{find}\n\n", "\n\n{input}\n", "The answer is")),
    "math_calc": InfiniteBenchTask(
        "right_begin",
        30000,
        Prompt(
            "Calculate this expression from left to right, and give the value after each operation.\n\n",
            "\n\nGive the values after each operation, as a list of numbers.\n",
            "[",
        ),
    ),
    "code_run": InfiniteBenchTask(
        "last_whole_number",
        5,
        Prompt("Here are functions in Python.\n\n", "\n\n{input} Answer with the number alone.\n", "The value is"),
    ),
    "code_debug": InfiniteBenchTask(
        "code_debug",
        5,
        Prompt(
            "One function of this code has a fault that was put in by purpose.\n\n",
            "\n\nWhich function is it?" + _LETTERS,
            "Answer:",
        ),
    ),
}


def sought_number(text: str) -> str:
    """``What is the second largest number in the following list?``, from an input about ``The second largest number``.

    The prompt says before the list what will be asked of it; the words between "the" and "of" are the input's.
    """
    found = re.search(r"\b[Tt]he (.+?) (?:of|in|from)\b", text)
    words = found[1].lower() if found else re.sub(r"\s+", " ", text).strip().rstrip(".?").lower()
    return f"What is the {words.removeprefix('the ')} in the following list?"


def _infinitebench_answers(task: str, row: Row, name: str) -> list[str]:
    answers = scalars_of(row, "answer", name)
    if task == "math_find":
        try:
            float(answers[0])
        except ValueError:
            raise TextError(f'{name}: expected a number "answer", got {answers[0][:60]!r}') from None
    if task not in ("longbook_choice_eng", "code_debug"):
        return answers
    options = texts_of(row, "options", name)
    if len(answers) == 2 and answers[1] in "ABCD" and answers[0] in options:
        return answers
    if len(answers) != 1 or answers[0] not in options[:4]:
        raise TextError(f'{name}: expected "answer", one of the four options, got {", ".join(answers)[:60]}')
    return [answers[0], "ABCD"[options.index(answers[0])]]


def read_infinitebench(root: Path, tasks: Sequence[str] | None = None, questions: int | None = None) -> list[Record]:
    """InfiniteBench's ``TASK.jsonl`` files in the folder ``root``."""
    here = [path.stem for path in sorted(root.glob("*.jsonl"))]
    names = pick_tasks("infinitebench", root, here, INFINITEBENCH, tasks)

    def rows() -> Iterator[Record]:
        for task in names:
            known = INFINITEBENCH[task]
            for number, (name, row) in enumerate(read_rows(root / f"{task}.jsonl")):
                answers = _infinitebench_answers(task, row, name)
                asked = input_of(row, name)
                fields = {"input": asked}
                if task == "math_find":
                    fields["find"] = sought_number(asked)
                if "{options}" in known.prompt.after:
                    options = texts_of(row, "options", name)
                    fields["options"] = "\n".join(
                        f"{letter}. {text}" for letter, text in zip("ABCD", options, strict=False)
                    )
                context, question, prefix = filled(known.prompt, text_of(row, "context", name), fields)
                yield Record(
                    task=task,
                    context=context,
                    question=question,
                    answer_prefix=prefix,
                    answers=answers,
                    max_new_tokens=known.max_new_tokens,
                    metric=known.metric,
                    id=f"{task}/{number}",
                    length=ALL,
                )

    return first_of_each(rows(), questions)

"""Records from the files of RULER, LongBench and InfiniteBench, which the user has in a local folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sharedllm_ext.evaluation.json_rows import (
    Row,
    as_list,
    as_object,
    number_of,
    read_json,
    read_rows,
    scalars_of,
    text_of,
    texts_of,
)
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.texts import TextError, _read_file, shown

#: Upper ends of LongBench-E's groups of lengths, in the words or characters that its rows count.
E_BUCKETS = ((4000, "0-4k"), (8000, "4-8k"))
#: Length of records that a suite does not group by length.
ALL = "all"


class Prompt(NamedTuple):
    """Text before the context, after it, and how the answer begins; ``{input}`` is the row's ``input``."""

    before: str
    after: str
    answer_prefix: str = ""


class LongBenchTask(NamedTuple):
    """How a task of LongBench is asked and scored."""

    metric: str
    max_new_tokens: int
    prompt: Prompt
    chat: bool = True
    first_line: bool = False
    stop_at_newline: bool = False


def _reading(what: str) -> Prompt:
    return Prompt(
        f"Read {what} and answer the question about it, as briefly as you can.\n\n", "\n\nQuestion: {input}\nAnswer:"
    )


def _summary(what: str) -> Prompt:
    return Prompt(f"Write a summary of {what} of at most one page.\n\n", "\n\nNow write the summary of it.\nSummary:")


_PASSAGES = _reading("these passages")
_CODE = Prompt("Complete this code.\n", "{input}Next line of code:\n")

#: The tasks of LongBench v1 (https://github.com/THUDM/LongBench), without those of ``UNSCORED``.
LONGBENCH: dict[str, LongBenchTask] = {
    "narrativeqa": LongBenchTask("f1", 128, _reading("this story")),
    "qasper": LongBenchTask("f1", 128, _reading("this scientific article")),
    "multifieldqa_en": LongBenchTask("f1", 64, _reading("this text")),
    "hotpotqa": LongBenchTask("f1", 32, _PASSAGES),
    "2wikimqa": LongBenchTask("f1", 32, _PASSAGES),
    "musique": LongBenchTask("f1", 32, _PASSAGES),
    "gov_report": LongBenchTask("rouge_l", 512, _summary("this government report")),
    "qmsum": LongBenchTask(
        "rouge_l",
        512,
        Prompt("Read this transcript of a meeting and answer the query about it.\n\n", "\n\nQuery: {input}\nAnswer:"),
    ),
    "multi_news": LongBenchTask("rouge_l", 512, _summary("these news articles")),
    "trec": LongBenchTask(
        "classification",
        64,
        Prompt("Give the type of the question, as in these examples.\n", "\n{input}"),
        chat=False,
        first_line=True,
    ),
    "triviaqa": LongBenchTask(
        "f1",
        32,
        Prompt("Answer the question about the passage, as briefly as these examples do.\n\n", "\n\n{input}"),
        chat=False,
        first_line=True,
    ),
    "samsum": LongBenchTask(
        "rouge_l",
        128,
        Prompt("Summarise the dialogue in a few short sentences, as in these examples.\n\n", "\n\n{input}"),
        chat=False,
        first_line=True,
        stop_at_newline=True,
    ),
    "lsht": LongBenchTask(
        "classification",
        64,
        Prompt("Give the type of the news text, as in these examples.\n\n", "\n{input}"),
        chat=False,
        first_line=True,
    ),
    "passage_count": LongBenchTask(
        "count",
        32,
        Prompt(
            "Here are numbered paragraphs, some of which are the same. Count the different ones.\n\n",
            "\n\nHow many different paragraphs are there? Answer with the number alone.\nAnswer:",
        ),
    ),
    "passage_retrieval_en": LongBenchTask(
        "paragraph",
        32,
        Prompt(
            "Here are numbered paragraphs, and after them an abstract of one of them.\n\n",
            "\n\nThe abstract:\n\n{input}\n\nWhich paragraph is it of? Answer as in: Paragraph 1\nAnswer:",
        ),
    ),
    "passage_retrieval_zh": LongBenchTask(
        "paragraph",
        32,
        Prompt(
            "Here are numbered paragraphs in Chinese, and after them an abstract of one of them.\n\n",
            "\n\nThe abstract:\n\n{input}\n\nWhich paragraph is it of? Answer as in: 段落1\nAnswer:",
        ),
    ),
    "lcc": LongBenchTask("code_similarity", 64, _CODE, chat=False),
    "repobench-p": LongBenchTask("code_similarity", 64, _CODE, chat=False),
}
#: Tasks of LongBench v1 whose metric needs a Chinese word segmentation.
UNSCORED = ("dureader", "multifieldqa_zh", "vcsum")


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


def _filled(prompt: Prompt, context: str, fields: Mapping[str, str]) -> tuple[str, str, str]:
    """Context, question and answer prefix; braces in the row's own texts stay as they are."""

    def fill(text: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), text)

    return fill(prompt.before) + context, fill(prompt.after), fill(prompt.answer_prefix)


def _taken(rows: Iterator[Record], questions: int | None) -> list[Record]:
    """The first ``questions`` records of every task and length."""
    kept: list[Record] = []
    counts: dict[tuple[str, int | str], int] = {}
    for record in rows:
        key = record.task, record.length
        counts[key] = counts.get(key, 0) + 1
        if questions is None or counts[key] <= questions:
            kept.append(record)
    return kept


# -- RULER ------------------------------------------------------------------------------------------------------------


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
    names = _pick("ruler", root, [path.parent.name for path in files], RULER, tasks)

    def rows() -> Iterator[Record]:
        for path in sorted(files, key=lambda path: _place(path.parent.name, RULER)):
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

    return _taken(rows(), questions)


# -- LongBench --------------------------------------------------------------------------------------------------------


def read_prompts(path: Path) -> dict[str, Prompt]:
    """Prompts by task from a JSON object of templates with one ``{context}`` and perhaps ``{input}``.

    That is the form of LongBench's own ``dataset2prompt.json``.
    """
    expected = "a JSON object of templates by task"
    prompts = {}
    table = as_object(read_json(path, expected), shown(path))
    for task in table:
        template = text_of(table, task, shown(path))
        before, mark, after = template.partition("{context}")
        if not mark:
            raise TextError(f"{shown(path)}: expected {{context}} in the template of {task}, got none")
        prompts[task] = Prompt(before, after)
    return prompts


def read_longbench(
    root: Path,
    tasks: Sequence[str] | None = None,
    questions: int | None = None,
    *,
    by_length: bool = False,
    prompts: Path | None = None,
) -> list[Record]:
    """LongBench v1's ``TASK.jsonl`` files in ``root`` or its folder ``data``; ``TASK_e.jsonl`` with ``by_length``."""
    folder = root / "data" if (root / "data").is_dir() else root
    ending = "_e.jsonl" if by_length else ".jsonl"
    here = [path.name.removesuffix(ending) for path in sorted(folder.glob(f"*{ending}"))]
    if not by_length:
        here = [name for name in here if not name.endswith("_e")]
    unscored = sorted(set(tasks or ()) & set(UNSCORED))
    if unscored:
        raise TextError(f"{unscored[0]}: expected a task scored without a Chinese word segmentation, got one with it")
    suite = "longbench-e" if by_length else "longbench"
    names = _pick(suite, folder, here, LONGBENCH, tasks)
    templates = read_prompts(prompts) if prompts is not None else {}
    lacking = [name for name in names if prompts is not None and name not in templates]
    if lacking:
        raise TextError(f"{shown(prompts or '')}: expected a template for {lacking[0]}, got none")

    def rows() -> Iterator[Record]:
        for task in names:
            known = LONGBENCH[task]
            for number, (name, row) in enumerate(read_rows(folder / f"{task}{ending}")):
                context, question, prefix = _filled(
                    templates.get(task, known.prompt), text_of(row, "context", name), {"input": _input(row, name)}
                )
                classes = row.get("all_classes")
                length = number_of(row, "length", name) if by_length or "length" in row else 0
                yield Record(
                    task=task,
                    context=context,
                    question=question,
                    answer_prefix=prefix,
                    answers=texts_of(row, "answers", name),
                    max_new_tokens=known.max_new_tokens,
                    metric=known.metric,
                    id=f"{task}/{number}",
                    length=next((label for end, label in E_BUCKETS if length < end), "8k+") if by_length else ALL,
                    all_classes=texts_of(row, "all_classes", name) if classes else None,
                    chat=known.chat,
                    first_line=known.first_line,
                    stop_at_newline=known.stop_at_newline,
                )

    records = _taken(rows(), questions)
    for record in records:
        if record.metric == "classification" and not record.all_classes:
            raise TextError(f'{record.id}: expected "all_classes", a list of at least one string, got none')
    return records


def _input(row: Row, name: str) -> str:
    return text_of(row, "input", name) if row.get("input") is not None else ""


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
    return _taken(iter(chosen), questions)


# -- InfiniteBench ----------------------------------------------------------------------------------------------------


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
    names = _pick("infinitebench", root, here, INFINITEBENCH, tasks)

    def rows() -> Iterator[Record]:
        for task in names:
            known = INFINITEBENCH[task]
            for number, (name, row) in enumerate(read_rows(root / f"{task}.jsonl")):
                answers = _infinitebench_answers(task, row, name)
                asked = _input(row, name)
                fields = {"input": asked}
                if task == "math_find":
                    fields["find"] = sought_number(asked)
                if "{options}" in known.prompt.after:
                    options = texts_of(row, "options", name)
                    fields["options"] = "\n".join(
                        f"{letter}. {text}" for letter, text in zip("ABCD", options, strict=False)
                    )
                context, question, prefix = _filled(known.prompt, text_of(row, "context", name), fields)
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

    return _taken(rows(), questions)


# -- all of them ------------------------------------------------------------------------------------------------------


def _place(name: str, known: Mapping[str, Any]) -> tuple[int, str]:
    """Order of the tasks as they are listed."""
    names = list(known)
    return (names.index(name) if name in known else len(names)), name


def _pick(
    suite: str, folder: Path, here: Sequence[str], known: Mapping[str, Any], tasks: Sequence[str] | None
) -> list[str]:
    """The tasks to read: those asked for, or all that are known and here."""
    unknown = [name for name in tasks or () if name not in known]
    if unknown:
        raise TextError(f"tasks: expected tasks of {suite} ({', '.join(known)}), got {unknown[0]!r}")
    found = sorted({name for name in here if name in known}, key=lambda name: _place(name, known))
    if not found:
        also = f", got files of {', '.join(sorted(set(here)))[:80]}" if here else ", found none"
        raise TextError(f"{shown(folder)}: expected files of {suite} tasks{also}")
    lacking = [name for name in tasks or () if name not in found]
    if lacking:
        raise TextError(f"{shown(folder)}: expected a file of the task {lacking[0]}, found {', '.join(found)}")
    return found if tasks is None else list(tasks)


@dataclass(frozen=True)
class Suite:
    """A suite that is read from files: what reads it, and whether it takes prompts from a file."""

    read: Callable[..., list[Record]]
    takes_prompts: bool = False


def _read_longbench_e(root: Path, *args: Any, **options: Any) -> list[Record]:
    return read_longbench(root, *args, by_length=True, **options)


#: Suites by the names that ``sharedllm eval --suite`` takes.
SUITES: dict[str, Suite] = {
    "ruler": Suite(read_ruler),
    "longbench": Suite(read_longbench, takes_prompts=True),
    "longbench-e": Suite(_read_longbench_e, takes_prompts=True),
    "longbench-v2": Suite(read_longbench_v2, takes_prompts=True),
    "infinitebench": Suite(read_infinitebench),
}


def read_suite(
    suite: str,
    root: Path,
    tasks: Sequence[str] | None = None,
    questions: int | None = None,
    prompts: Path | None = None,
) -> list[Record]:
    """Records of a suite from local files, in the order of tasks and files.

    Args:
        suite: a name in :data:`SUITES`.
        root: the folder that holds them.
        tasks: which tasks (default: all that are there).
        questions: most records of a task and length, the first of each (default: all).
        prompts: a file of prompts instead of this package's own: LongBench's ``dataset2prompt.json`` or LongBench
            v2's ``0shot.txt``.

    Raises:
        FileNotFoundError: nothing there.
        TextError: a file, a row or a task that is not the suite's; the message names it.
    """
    if suite not in SUITES:
        raise TextError(f"suite: expected one of {', '.join(SUITES)}, got {suite!r}")
    if not root.exists():
        raise FileNotFoundError(f"{shown(root)}: no such file or folder")
    if not root.is_dir() and suite != "longbench-v2":
        raise TextError(f"{shown(root)}: expected a folder with files of {suite}, got a file")
    if prompts is None:
        return SUITES[suite].read(root, tasks, questions)
    if not SUITES[suite].takes_prompts:
        takers = ", ".join(name for name, known in SUITES.items() if known.takes_prompts)
        raise TextError(f"prompts: expected one of the suites {takers} with it, got {suite}")
    return SUITES[suite].read(root, tasks, questions, prompts=prompts)

"""Records from the files of LongBench v1 and LongBench-E: the metric and prompt of each task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sharedllm_ext.evaluation.json_rows import as_object, number_of, read_json, read_rows, text_of, texts_of
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.suite_files import ALL, Prompt, filled, first_of_each, input_of, pick_tasks
from sharedllm_ext.evaluation.texts import TextError, shown

#: Upper ends of LongBench-E's groups of lengths, in the words or characters that its rows count.
E_BUCKETS = ((4000, "0-4k"), (8000, "4-8k"))


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
    names = pick_tasks(suite, folder, here, LONGBENCH, tasks)
    templates = read_prompts(prompts) if prompts is not None else {}
    lacking = [name for name in names if prompts is not None and name not in templates]
    if lacking:
        raise TextError(f"{shown(prompts or '')}: expected a template for {lacking[0]}, got none")

    def rows() -> Iterator[Record]:
        for task in names:
            known = LONGBENCH[task]
            for number, (name, row) in enumerate(read_rows(folder / f"{task}{ending}")):
                context, question, prefix = filled(
                    templates.get(task, known.prompt), text_of(row, "context", name), {"input": input_of(row, name)}
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

    records = first_of_each(rows(), questions)
    for record in records:
        if record.metric == "classification" and not record.all_classes:
            raise TextError(f'{record.id}: expected "all_classes", a list of at least one string, got none')
    return records

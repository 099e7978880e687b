"""The questions of ``sharedllm eval``: generated ones, or those of a suite's files."""

from __future__ import annotations

import argparse
from pathlib import Path

from sharedllm_ext.cli._output import UsageError
from sharedllm_ext.cli._progress import Progress
from sharedllm_ext.evaluation.generators import TASKS, check_tasks, default_tasks, make_record
from sharedllm_ext.evaluation.haystacks import NOISE_HAYSTACK, haystack_of
from sharedllm_ext.evaluation.prompts import Prompts
from sharedllm_ext.evaluation.questions import read_hotpotqa, read_squad
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.suites import read_suite
from sharedllm_ext.evaluation.tasks import Sources
from sharedllm_ext.evaluation.texts import read_texts, size_of

DEFAULT_TASKS = ("niah_single_1",)
# lengths that suites have names for, in the order of tables
_LENGTH_NAMES = ("0-4k", "4-8k", "8k+", "short", "medium", "long", "all")


def read_sources(args: argparse.Namespace, progress: Progress) -> Sources:
    """The haystack and the data sets of documents that the options name."""
    haystack = NOISE_HAYSTACK
    if args.haystack is not None:
        with progress.bar(f"reading {args.haystack}", size_of(args.haystack), "B") as update:
            haystack = haystack_of(read_texts(args.haystack, progress=update))
    documents = {}
    for name, read in (("squad", read_squad), ("hotpotqa", read_hotpotqa)):
        path = getattr(args, name)
        if path is not None:
            documents[f"qa_{name}"] = read(Path(path))
    return Sources(haystack, documents)


def pick_tasks(args: argparse.Namespace, sources: Sources) -> list[str]:
    """Names of groups become their tasks; raises :class:`UsageError` for others that are unknown."""
    own = ("passkey", "number", "kv")
    here = default_tasks(sources)
    groups = {"ruler": [name for name in here if name not in own], "infinitebench": list(own)}
    names = [task for name in args.tasks or DEFAULT_TASKS for task in groups.get(name, [name])]
    try:
        check_tasks(names, sources)
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    if args.plot is not None and not any(TASKS[name].has_depth for name in names):
        raise UsageError(f"--plot: expected a task with one place of the answer, got {', '.join(names)}")
    return list(dict.fromkeys(names))


def suite_records(args: argparse.Namespace) -> list[Record]:
    """Records of a suite, those of one task and length one after the other."""
    prompts = None if args.prompts is None else Path(args.prompts)
    records = read_suite(args.suite, Path(args.data), args.tasks, args.questions, prompts)
    if args.plot is not None and all(record.depth is None for record in records):
        raise UsageError(f"--plot: expected generated contexts, whose depths are known, got --suite {args.suite}")
    tasks = list(dict.fromkeys(record.task for record in records))

    def place(record: Record) -> tuple[int, int, int]:
        named = isinstance(record.length, str)
        order = _LENGTH_NAMES.index(record.length) if record.length in _LENGTH_NAMES else len(_LENGTH_NAMES)
        return tasks.index(record.task), 0 if named else int(record.length), order

    # a table's row is printed when its group is over
    return sorted(records, key=place)


def check_room(task: str, length: int, prompts: Prompts, sources: Sources, seed: int) -> None:
    """Raise :class:`UsageError` for a length that has no room for the task's shortest context."""
    try:
        make_record(task, length, 0, prompts, sources=sources, seed=seed)
    except ValueError as error:
        raise UsageError(f"--lengths: {str(error).removeprefix('length: ')}") from None

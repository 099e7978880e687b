"""Questions about contexts of a given length: RULER's tasks and three of InfiniteBench's, written anew.

Sources of the tasks: RULER (arXiv 2404.06654) and InfiniteBench (arXiv 2402.13718). ``docs/evaluation.md`` says what is
equal and what differs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from sharedllm_ext.counted import counted
from sharedllm_ext.evaluation.counting import common_words, frequent_words, tracking
from sharedllm_ext.evaluation.needles import Needles, key_value, pass_key, repeated_digits
from sharedllm_ext.evaluation.prompts import Prompts
from sharedllm_ext.evaluation.questions import document_task
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.tasks import Ask, Sources, Task
from sharedllm_ext.evaluation.words import ADJECTIVES, NOUNS

#: Default depths at which answers are hidden, in per cent of the context.
DEFAULT_DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)
#: Share of a length that a context may leave free: each try tokenises the whole of it.
SLACK = 1 / 512

#: The tasks by name, in RULER's order; then those in the manner of InfiniteBench.
TASKS: dict[str, Task] = {
    "niah_single_1": Needles("noise").task(),
    "niah_single_2": Needles("text").task(),
    "niah_single_3": Needles("text", values="uuids").task(),
    "niah_multikey_1": Needles("text", count=4).task(),
    "niah_multikey_2": Needles("needles").task(),
    "niah_multikey_3": Needles("needles", keys="uuids", values="uuids").task(),
    "niah_multivalue": Needles("text", values_each=4).task(),
    "niah_multiquery": Needles("text", count=4, asked=4).task(),
    "vt": Task(tracking, "part", 30, has_depth=False, least=5),
    "cwe": Task(
        common_words, "part", 120, has_depth=False, most=lambda ask: len(ADJECTIVES) * len(NOUNS) - 10, least=10
    ),
    "fwe": Task(frequent_words, "part", 50, has_depth=False, least=60),
    "qa_squad": document_task("qa_squad", True),
    "qa_hotpotqa": document_task("qa_hotpotqa", False),
    "passkey": Task(pass_key, "first_number", 6),
    "number": Task(repeated_digits, "first_number", 12),
    "kv": Task(key_value, "among_words", 50),
}


def default_tasks(sources: Sources) -> list[str]:
    """All tasks for which these sources suffice."""
    return [name for name, task in TASKS.items() if not task.needs or task.needs in sources.documents]


def check_tasks(tasks: Iterable[str], sources: Sources) -> None:
    """Raise ``ValueError`` for a task that is unknown or whose source is not there."""
    for name in tasks:
        if name not in TASKS:
            raise ValueError(f"tasks: expected some of {', '.join(TASKS)}, got {name!r}")
        if TASKS[name].needs and TASKS[name].needs not in sources.documents:
            raise ValueError(f"tasks: expected a file of {name.removeprefix('qa_')} questions for {name}, got none")


def _largest(
    tokens: Callable[[int], int], limit: int, least: int, most: int | None, guess: int | None
) -> tuple[int, int]:
    """The most units whose ``tokens`` are at most ``limit``, to a unit or to ``SLACK`` of it, and their tokens.

    ``tokens`` grows nearly evenly; only a number that was tried is returned.
    """
    slack = limit * SLACK
    low, used = least, tokens(least)
    high = None if most is None else most + 1
    if used > limit:
        return low, used
    probe = low + 8 if guess is None else guess
    while high is None or high - low > 1:
        probe = max(probe, low + 1)
        if high is not None:
            probe = min(probe, high - 1)
        came = tokens(probe)
        each = max((came - used) / (probe - low), 0.1)
        if came <= limit:
            low, used = probe, came
        else:
            high = probe
        if limit - used < max(each / 2, slack):
            break
        # in the middle of what is close enough, where that is more than a unit
        aim = limit - (slack / 2 if slack > each else 0)
        probe = low + int((aim - used) / each)
    return low, used


def make_record(
    task: str,
    length: int,
    index: int,
    prompts: Prompts,
    *,
    sources: Sources | None = None,
    seed: int = 0,
    depth: float = 50.0,
    guess: int | None = None,
) -> tuple[Record, int]:
    """One record whose prompt and longest answer are at most ``length`` tokens, and the units of its context.

    Args:
        task: a name in :data:`TASKS`.
        length: most tokens of ``prompts``' tokenizer, ``task``'s ``max_new_tokens`` among them, as in RULER.
        index: the record's number; another one gives another record of the same seed.
        prompts: turns records into tokens.
        sources: sources of the context (default: the noise sentences; tasks about documents need theirs).
        seed: another one gives other records.
        depth: place of the answer in the context, 0 to 100 per cent, for tasks that have one.
        guess: units to try first, such as those of another record; it may decide how full the length is.

    Raises:
        ValueError: an unknown task, or a length that has no room for the shortest context.
    """
    sources = Sources() if sources is None else sources
    check_tasks([task], sources)
    known = TASKS[task]
    ask = Ask(length, index, depth, seed, sources)
    key = f"{seed} {task} {length} {index}"
    records: dict[int, Record] = {}

    def record(units: int) -> Record:
        if units not in records:
            # the same random numbers for every size, so that sizes differ by their units alone
            made = known.make(random.Random(key), units, ask)
            records.clear()
            records[units] = Record(
                task,
                *made,
                max_new_tokens=known.max_new_tokens,
                metric=known.metric,
                id=f"{task}/{length}/{index}",
                length=length,
                depth=depth if known.has_depth else None,
            )
        return records[units]

    most = None if known.most is None else known.most(ask)
    units, used = _largest(lambda units: prompts.length(record(units)), length, known.least, most, guess)
    if used > length:
        raise ValueError(
            f"length: expected at least {counted(used, 'token')} for {task} with this tokenizer, got {length}"
        )
    return record(units), units


def generate_records(
    tasks: Sequence[str],
    lengths: Sequence[int],
    prompts: Prompts,
    *,
    questions: int = 20,
    depths: Sequence[float] = DEFAULT_DEPTHS,
    sources: Sources | None = None,
    seed: int = 0,
) -> Iterator[Record]:
    """``questions`` records of every task and length, one after the other as they are asked for.

    The depths alternate. Arguments and errors as for :func:`make_record`.
    """
    sources = Sources() if sources is None else sources
    check_tasks(tasks, sources)
    for task in tasks:
        for length in lengths:
            guess = None
            for index in range(questions):
                # one guess for all, so that a record does not depend on those before it
                record, units = make_record(
                    task,
                    length,
                    index,
                    prompts,
                    sources=sources,
                    seed=seed,
                    depth=depths[index % len(depths)],
                    guess=guess,
                )
                guess = units if guess is None else guess
                yield record

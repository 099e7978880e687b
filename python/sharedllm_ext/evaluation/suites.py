"""Records from the files of RULER, LongBench and InfiniteBench, which the user has in a local folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharedllm_ext.evaluation.exchange import read_records
from sharedllm_ext.evaluation.infinitebench import read_infinitebench
from sharedllm_ext.evaluation.longbench import read_longbench
from sharedllm_ext.evaluation.longbench_v2 import read_longbench_v2
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.ruler_files import read_ruler
from sharedllm_ext.evaluation.texts import TextError, shown


@dataclass(frozen=True)
class Suite:
    """A suite that is read from files: what reads it, and whether it takes prompts from a file, or may be one file."""

    read: Callable[..., list[Record]]
    takes_prompts: bool = False
    may_be_file: bool = False


def _read_longbench_e(root: Path, *args: Any, **options: Any) -> list[Record]:
    return read_longbench(root, *args, by_length=True, **options)


#: Suites by the names that ``sharedllm eval --suite`` takes.
SUITES: dict[str, Suite] = {
    "ruler": Suite(read_ruler),
    "longbench": Suite(read_longbench, takes_prompts=True),
    "longbench-e": Suite(_read_longbench_e, takes_prompts=True),
    "longbench-v2": Suite(read_longbench_v2, takes_prompts=True, may_be_file=True),
    "infinitebench": Suite(read_infinitebench),
    "records": Suite(read_records, may_be_file=True),
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
        root: the folder that holds them, or a single file of longbench-v2 or of exported records.
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
    if not root.is_dir() and not SUITES[suite].may_be_file:
        raise TextError(f"{shown(root)}: expected a folder with files of {suite}, got a file")
    if prompts is None:
        return SUITES[suite].read(root, tasks, questions)
    if not SUITES[suite].takes_prompts:
        takers = ", ".join(name for name, known in SUITES.items() if known.takes_prompts)
        raise TextError(f"prompts: expected one of the suites {takers} with it, got {suite}")
    return SUITES[suite].read(root, tasks, questions, prompts=prompts)

"""``sharedllm eval``: questions about long contexts, asked of several systems."""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from pathlib import Path
from typing import Any

from sharedllm_ext.cli._base_package import ADAPTER, BASE_PACKAGE
from sharedllm_ext.cli._common import add_model_options, count, counts, positive, some_path, writable_target
from sharedllm_ext.cli._output import CommandError, UsageError

SYSTEMS = ("memory", "pick", "pick-bm25", "pick-embedding", "full", "yarn", "ntk", "window", "bm25", "embedding")
SUITE_NAMES = ("ruler", "longbench", "longbench-e", "longbench-v2", "infinitebench", "records")
DEFAULT_PREDICTIONS = "predictions.jsonl"
PLOT_SUFFIXES = (".png", ".pdf", ".svg")


def add_parser(commands: Any) -> None:
    """Add the command."""
    text = (
        "ask questions about long contexts of a SharedLLM model, and of its base with full attention, with stretched "
        "positions, with a sliding window or with passages found by words or by embeddings; contexts are generated or "
        "a suite's files"
    )
    parser = commands.add_parser(
        "eval", help="questions about long contexts, asked of several systems", description=text
    )
    parser.add_argument(
        "model",
        type=some_path,
        metavar="MODEL",
        help="SharedLLM checkpoint folder (demo: the shipped one), or a base: its folder, .gguf file, or the installed "
        f"Python package {BASE_PACKAGE}",
    )
    parser.add_argument(
        "--adapter",
        type=some_path,
        metavar="NAME_OR_FILE",
        help=f"put this adapter on MODEL, its base checkpoint; {BASE_PACKAGE} is that of {ADAPTER}",
    )
    parser.add_argument(
        "--systems", type=_names, metavar="S,S,…", help=f"of {', '.join(SYSTEMS)} (default: memory; full for a base)"
    )
    parser.add_argument(
        "--base",
        type=some_path,
        metavar="PATH",
        help="base checkpoint that the other systems read with (default: MODEL's own decoder)",
    )
    made = parser.add_argument_group("generated contexts")
    made.add_argument(
        "--tasks",
        type=_names,
        metavar="T,T,…",
        help="ruler, infinitebench or single tasks, also of a suite (default: niah_single_1)",
    )
    made.add_argument(
        "--lengths", type=counts, metavar="N,N,…", help="tokens of prompt and answer, 8k is 8192 (default: 4096)"
    )
    made.add_argument(
        "--depths", type=_depths, metavar="D,D,…", help="where the answer stands, in per cent (default: 0,25,50,75,100)"
    )
    made.add_argument(
        "--questions", type=positive, metavar="N", help="for each task and length (default: 20; all of a suite)"
    )
    made.add_argument("--seed", type=count, metavar="N", help="default: 0")
    made.add_argument(
        "--haystack",
        type=some_path,
        metavar="FILE_OR_FOLDER",
        help="text of the contexts (default: sentences of noise)",
    )
    made.add_argument("--squad", type=some_path, metavar="FILE", help="questions of qa_squad, in SQuAD's form")
    made.add_argument("--hotpotqa", type=some_path, metavar="FILE", help="questions of qa_hotpotqa, in HotpotQA's form")
    suite = parser.add_argument_group("contexts of a suite")
    suite.add_argument(
        "--suite", choices=SUITE_NAMES, help="read --data instead of generating; records: what --export wrote"
    )
    suite.add_argument("--data", type=some_path, metavar="FOLDER", help="the suite's files")
    suite.add_argument(
        "--prompts",
        type=some_path,
        metavar="FILE",
        help="LongBench's own dataset2prompt.json, or 0shot.txt of version 2",
    )
    systems = parser.add_argument_group("systems")
    systems.add_argument(
        "--window",
        type=positive,
        metavar="W",
        help="tokens that window, bm25 and embedding read, answer included (default: the model's)",
    )
    systems.add_argument(
        "--sinks", type=count, default=4, metavar="N", help="first tokens that window keeps (default: %(default)s)"
    )
    systems.add_argument(
        "--passages",
        type=positive,
        default=8,
        metavar="K",
        help="that bm25, embedding and pick read (default: %(default)s)",
    )
    systems.add_argument("--passage-tokens", type=positive, default=128, metavar="N", help="default: %(default)s")
    systems.add_argument(
        "--embedder",
        type=some_path,
        metavar="FOLDER",
        help="Sentence Transformers model of embedding and pick-embedding (needs sentence-transformers)",
    )
    systems.add_argument(
        "--answers",
        type=_named_file,
        action="append",
        metavar="NAME=FILE.jsonl",
        help="answers that another program gave to records of --export, as one more system; may be given again",
    )
    systems.add_argument(
        "--rope-factor", type=positive, metavar="F", help="of yarn (default: what the longest length needs)"
    )
    systems.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help="wrap questions in the tokenizer's chat template (default: where there is one)",
    )
    parser.add_argument(
        "--predictions",
        type=some_path,
        default=DEFAULT_PREDICTIONS,
        metavar="FILE.jsonl",
        help="where every answer is kept, and taken from in a later run (default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        default=1,
        metavar="N",
        help="questions of a task and length that the systems of the base answer at once (default: %(default)s)",
    )
    parser.add_argument(
        "--export",
        type=some_path,
        metavar="FILE.jsonl",
        help="write the questions with their token ids, for programs of other environments, and ask nothing",
    )
    parser.add_argument("--plot", type=some_path, metavar="FILE.png", help="draw depth by length (needs matplotlib)")
    add_model_options(parser)
    parser.set_defaults(run=run)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected different names divided by commas, got {text!r}")
    return names


def _named_file(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name.strip() or not path:
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, got {text!r}")
    return name.strip(), path


def _depths(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(0 <= value <= 100 for value in values) or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"expected different numbers from 0 to 100, got {text!r}")
    return values


def _check(args: argparse.Namespace) -> None:
    if (args.suite is None) != (args.data is None):
        given, other = ("--suite", "--data") if args.data is None else ("--data", "--suite")
        raise UsageError(f"{given}: expected {other} with it, got none")
    if args.suite is None and args.prompts is not None:
        raise UsageError("--prompts: expected --suite with it, got none")
    for name in ("lengths", "depths", "seed", "haystack", "squad", "hotpotqa"):
        if args.suite is not None and getattr(args, name) is not None:
            raise UsageError(f"--{name}: expected no --suite with it, got {args.suite}")
    unknown = [name for name in args.systems or () if name not in SYSTEMS]
    if unknown:
        raise UsageError(f"--systems: expected some of {', '.join(SYSTEMS)}, got {unknown[0]!r}")
    others = [name for name, _ in args.answers or ()]
    taken = next((name for i, name in enumerate(others) if name in SYSTEMS or name in others[:i]), None)
    if taken is not None:
        raise UsageError(f"--answers: expected a name of its own for each file, got {taken!r}")
    searching = [name for name in args.systems or () if name.endswith("embedding")]
    if searching and args.embedder is None:
        raise UsageError(f"--systems {searching[0]}: expected --embedder with it, got none")
    if args.export is not None and args.plot is not None:
        raise UsageError("--plot: expected no --export with it, which asks nothing")
    if args.lengths is not None and 0 in args.lengths:
        raise UsageError("--lengths: expected whole numbers of at least 1, got 0")
    read = [path for path in (args.haystack, args.squad, args.hotpotqa, args.prompts) if path is not None]
    read += [path for _, path in args.answers or ()]
    read += [path for path in (args.model, args.base, args.embedder) if path is not None and Path(path).is_dir()]
    read += [args.data] if args.data is not None and Path(args.data).is_file() else []
    keep = [path for path in read if Path(path).exists()]
    if args.export is not None:
        writable_target("--export", args.export, (".jsonl",), keep=keep)
        return
    writable_target("--predictions", args.predictions, keep=keep)
    if args.plot is not None:
        writable_target("--plot", args.plot, PLOT_SUFFIXES, keep=[*keep, args.predictions])
        if importlib.util.find_spec("matplotlib") is None:
            raise CommandError("--plot: matplotlib is not installed (pip install matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    _check(args)
    begin = time.perf_counter()
    from sharedllm_ext.cli._eval_run import evaluate_systems, export_questions

    return evaluate_systems(args, begin) if args.export is None else export_questions(args)

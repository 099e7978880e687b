"""``sharedllm eval``: questions about long contexts, asked of several systems."""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharedllm_ext.cli._common import (
    EXIT_ERROR,
    _fast_on_cpu,
    add_model_options,
    checkpoint_type,
    count,
    counts,
    gguf_tokenizer,
    load_model,
    load_tokenizer,
    model_path,
    one_line,
    pick_device,
    positive,
    quiet_transformers,
    seconds,
    some_path,
    warn_if_silent,
    writable_target,
)
from sharedllm_ext.cli._output import CommandError, Table, UsageError, print_error, print_json, say
from sharedllm_ext.cli._progress import Progress

if TYPE_CHECKING:
    from sharedllm_ext.evaluation.harness import Evaluation, Prediction, Share
    from sharedllm_ext.evaluation.prompts import Prompts
    from sharedllm_ext.evaluation.records import Record
    from sharedllm_ext.evaluation.systems import System
    from sharedllm_ext.evaluation.tasks import Sources

SYSTEMS = ("memory", "pick", "full", "yarn", "ntk", "window", "bm25")
SUITE_NAMES = ("ruler", "longbench", "longbench-e", "longbench-v2", "infinitebench")
DEFAULT_TASKS = ("niah_single_1",)
DEFAULT_LENGTHS = (4096,)
DEFAULT_QUESTIONS = 20
DEFAULT_PREDICTIONS = "predictions.jsonl"
PLOT_SUFFIXES = (".png", ".pdf", ".svg")
# lengths that suites have names for, in the order of tables
_LENGTH_NAMES = ("0-4k", "4-8k", "8k+", "short", "medium", "long", "all")


def add_parser(commands: Any) -> None:
    """Add the command."""
    text = (
        "ask questions about long contexts of a SharedLLM model, and of its base with full attention, with stretched "
        "positions, with a sliding window or with passages found by words; contexts are generated or a suite's files"
    )
    parser = commands.add_parser(
        "eval", help="questions about long contexts, asked of several systems", description=text
    )
    parser.add_argument(
        "model",
        type=some_path,
        metavar="MODEL",
        help="SharedLLM checkpoint folder (demo: the shipped one), base checkpoint folder, or .gguf file of a base",
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
    suite.add_argument("--suite", choices=SUITE_NAMES, help="read --data instead of generating")
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
        help="tokens that window and bm25 read, answer included (default: the model's)",
    )
    systems.add_argument(
        "--sinks", type=count, default=4, metavar="N", help="first tokens that window keeps (default: %(default)s)"
    )
    systems.add_argument(
        "--passages",
        type=positive,
        default=8,
        metavar="K",
        help="that bm25 and pick read (default: %(default)s)",
    )
    systems.add_argument("--passage-tokens", type=positive, default=128, metavar="N", help="default: %(default)s")
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
    parser.add_argument("--plot", type=some_path, metavar="FILE.png", help="draw depth by length (needs matplotlib)")
    add_model_options(parser)
    parser.set_defaults(run=run)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected different names divided by commas, got {text!r}")
    return names


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
    if args.lengths is not None and 0 in args.lengths:
        raise UsageError("--lengths: expected whole numbers of at least 1, got 0")
    read = [path for path in (args.haystack, args.squad, args.hotpotqa, args.prompts) if path is not None]
    read += [path for path in (args.model, args.base) if path is not None and Path(path).is_dir()]
    keep = [path for path in read if Path(path).exists()]
    writable_target("--predictions", args.predictions, keep=keep)
    if args.plot is not None:
        writable_target("--plot", args.plot, PLOT_SUFFIXES, keep=[*keep, args.predictions])
        if importlib.util.find_spec("matplotlib") is None:
            raise CommandError("--plot: matplotlib is not installed (pip install matplotlib)")


def _read_sources(args: argparse.Namespace, progress: Progress) -> Sources:
    from sharedllm_ext.evaluation.haystacks import NOISE_HAYSTACK, haystack_of
    from sharedllm_ext.evaluation.questions import read_hotpotqa, read_squad
    from sharedllm_ext.evaluation.tasks import Sources
    from sharedllm_ext.evaluation.texts import read_texts, size_of

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


def _pick_tasks(args: argparse.Namespace, sources: Sources) -> list[str]:
    """Names of groups become their tasks; raises :class:`UsageError` for others that are unknown."""
    from sharedllm_ext.evaluation.generators import TASKS, check_tasks, default_tasks

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


def _suite_records(args: argparse.Namespace) -> list[Record]:
    from sharedllm_ext.evaluation.suites import read_suite

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


def _load(path: str, dtype: str, device: Any, progress: Progress) -> tuple[Any, Any, bool]:
    """Model, tokenizer, and whether it is a base checkpoint without a compressor."""
    import torch

    from sharedllm_ext.model import SharedLLMForCausalLM
    from sharedllm_ext.model.families import FAMILIES

    gguf = Path(path).suffix.lower() == ".gguf"
    family = None if gguf else checkpoint_type(path)
    if not gguf and family not in FAMILIES:
        model = load_model(path, dtype, device, progress=progress)
        return model, load_tokenizer(path), False
    quiet_transformers(progress.terminal)
    try:
        with progress.bar(f"loading {path}", None, "", lines_only=True), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model = SharedLLMForCausalLM.from_base(
                path, dtype=None if dtype == "auto" else getattr(torch, dtype), injection_layers=1
            )
    except Exception as error:
        # damaged files end in errors of any kind
        raise CommandError(f"{path}: the checkpoint cannot be loaded: {one_line(error)}") from error
    if dtype == "auto" and device.type == "cpu":
        model = _fast_on_cpu(path, model)
    tokenizer = gguf_tokenizer(path) if gguf else load_tokenizer(path)
    return model.to(device).eval(), tokenizer, True


def _identity(path: str) -> list[Any]:
    """What identifies a model: its path, and name, size and time of its files."""
    place = Path(path)
    files = sorted(file for file in place.iterdir() if file.is_file()) if place.is_dir() else [place]
    stats = [(file.name, file.stat()) for file in files if file.exists()]
    return [str(place.resolve()), *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]


def _systems(args: argparse.Namespace, names: Sequence[str], model: Any, base: Any, prompts: Prompts) -> list[System]:
    from sharedllm_ext.evaluation.systems import (
        FullSystem,
        MemorySystem,
        NtkSystem,
        PassagesSystem,
        PickSystem,
        WindowSystem,
        YarnSystem,
        plain_decoder,
        yarn_parameters,
    )

    positions = base.config.text_config.max_position_embeddings
    factor = args.rope_factor
    if "yarn" in names and factor is None:
        if args.suite is not None:
            raise UsageError("--systems yarn: expected --rope-factor with --suite, got none")
        factor = math.ceil(max(args.lengths) / positions)
        if factor == 1:
            raise UsageError(
                f"--systems yarn: expected --rope-factor, or --lengths above the model's {positions} positions, got "
                f"{max(args.lengths)}"
            )
    plain = plain_decoder(base) if set(names) - {"memory", "pick", "yarn", "ntk"} else None
    found: list[System] = []
    for name in names:
        if name == "memory":
            found.append(MemorySystem(model, prompts))
        elif name == "pick":
            found.append(PickSystem(model, prompts, count=args.passages))
        elif name == "full":
            found.append(FullSystem(plain, prompts))
        elif name == "yarn":
            found.append(YarnSystem(plain_decoder(base, rope=yarn_parameters(base.config, factor)), prompts))
        elif name == "ntk":
            found.append(NtkSystem(plain_decoder(base, rope={}), prompts))
        elif name == "window":
            found.append(WindowSystem(plain, prompts, window=args.window, sinks=args.sinks))
        else:
            found.append(
                PassagesSystem(plain, prompts, window=args.window, count=args.passages, size=args.passage_tokens)
            )
    return found


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    _check(args)
    begin = time.perf_counter()
    progress = Progress(not args.json)
    # questions are read before the model: a wrong path must not cost the loading of gigabytes
    records: list[Record] = []
    tasks: list[str] = []
    sources: Any = None
    if args.suite is None:
        sources = _read_sources(args, progress)
        tasks = _pick_tasks(args, sources)
        args.lengths = sorted(args.lengths or DEFAULT_LENGTHS)
        args.questions = args.questions or DEFAULT_QUESTIONS
    else:
        with progress.bar(f"reading {args.data}", None, ""):
            records = _suite_records(args)

    from sharedllm_ext.evaluation.generators import DEFAULT_DEPTHS, generate_records, make_record
    from sharedllm_ext.evaluation.harness import PredictionFile, evaluate
    from sharedllm_ext.evaluation.prompts import Prompts

    with PredictionFile(Path(args.predictions)) as file:
        device = pick_device(args.device)
        path = model_path(args.model)
        model, tokenizer, is_base = _load(path, args.dtype, device, progress)
        names = args.systems or (["full"] if is_base else ["memory"])
        if is_base and "memory" in names:
            raise UsageError(f"--systems memory: expected a SharedLLM checkpoint, got a base one: {args.model}")
        if "pick" in names and (model.pick is None or model.config.passage_prompt is None):
            raise UsageError(f"--systems pick: expected a model with a trained pick, got one without: {args.model}")
        if "memory" in names:
            warn_if_silent(model, path)
        base = model
        if args.base is not None:
            base, _, _ = _load(args.base, args.dtype, device, progress)
            if base.config.vocab_size != model.config.vocab_size:
                raise CommandError(
                    f"--base: expected a vocabulary of {model.config.vocab_size} tokens as MODEL has, got "
                    f"{base.config.vocab_size}"
                )
        if args.window is None:
            args.window = base.config.max_position_embeddings if is_base else model.config.window
        try:
            prompts = Prompts(tokenizer, chat=args.chat_template)
        except ValueError as error:
            raise CommandError(f"--chat-template: {error}") from error
        systems = _systems(args, names, model, base, prompts)
        asked: Iterable[Record] = records
        if args.suite is None:
            seed, depths = args.seed or 0, args.depths or DEFAULT_DEPTHS
            with progress.bar("making contexts", len(tasks) * len(args.lengths), "kinds") as update:
                for task in tasks:
                    for length in args.lengths:
                        # records without room are reported before the first answer
                        _made(make_record, task, length, prompts, sources, seed)
                        update(1)
            asked = generate_records(
                tasks, args.lengths, prompts, questions=args.questions, depths=depths, sources=sources, seed=seed
            )
            total = len(tasks) * len(args.lengths) * args.questions
            rows = [(task, length) for task in tasks for length in args.lengths]
        else:
            total = len(records)
            rows = list(dict.fromkeys((record.task, record.length) for record in records))
        table = EvaluationTable(rows, names, None if args.json else progress)
        identity = [_identity(path), None if args.base is None else _identity(args.base), str(model.dtype)]
        with progress.bar("evaluating", total * len(systems), "answers") as update:
            result = evaluate(asked, systems, model=identity, file=file, progress=update, on_result=table.take)
        table.finish(result)
    if args.json:
        print_json(_document(args, result, systems, str(device), model, time.perf_counter() - begin))
    else:
        kept = sum(prediction.kept for prediction in result.predictions)
        also = f", {kept} of them kept from an earlier run" if kept else ""
        say(f"predictions: {args.predictions}, {len(result.predictions)} answers{also}")
    if args.plot is not None:
        try:
            plot(result, names, args.plot)
        except Exception as error:
            # the result is complete, whatever error matplotlib or the disk raises
            print_error(f"--plot: {one_line(error)}")
            return EXIT_ERROR
        if not args.json:
            say(f"plot: {args.plot}")
    return 0


def _made(make_record: Any, task: str, length: int, prompts: Prompts, sources: Any, seed: int) -> None:
    try:
        make_record(task, length, 0, prompts, sources=sources, seed=seed)
    except ValueError as error:
        raise UsageError(f"--lengths: {str(error).removeprefix('length: ')}") from None


def per_cent(value: float) -> str:
    """A share for people."""
    return f"{100 * value:.1f}"


def _interval(share: Share) -> str:
    return "" if share.interval is None else f"{per_cent(share.interval[0])} … {per_cent(share.interval[1])}"


class EvaluationTable:
    """Task by length by system; the rows of a task and length are printed when they are complete."""

    def __init__(
        self, rows: Sequence[tuple[str, int | str]], systems: Sequence[str], progress: Progress | None
    ) -> None:
        self.progress = progress
        self.group: tuple[str, int | str] | None = None
        self.waiting: list[Prediction] = []
        names = [task for task, _ in rows] + ["mean of tasks"]
        lengths = [_length(length) for _, length in rows]
        header = ["task", "length", "system", "questions", "score", "95% interval", "time/answer"]
        widths = [max(map(len, names)), max(map(len, lengths)), max(map(len, systems)), 9, 5, 13, 11]
        self.table = Table(header, widths)

    def take(self, prediction: Prediction) -> None:
        """Note a prediction."""
        group = prediction.task, prediction.length
        if self.group is not None and group != self.group:
            self._print()
        self.group = group
        self.waiting.append(prediction)

    def _print(self) -> None:
        from sharedllm_ext.evaluation.harness import shares

        for (task, length, system), share in shares(self.waiting, lambda p: (p.task, p.length, p.system)).items():
            spent = [p.seconds for p in self.waiting if p.system == system]
            cells = [task, _length(length), system, str(share.count), per_cent(share.mean), _interval(share)]
            self._write([*cells, seconds(sum(spent) / len(spent))])
        self.waiting = []

    def _write(self, cells: Sequence[str]) -> None:
        if self.progress is not None:
            self.progress.write(self.table.row(cells))

    def finish(self, result: Evaluation) -> None:
        """Print what is left, labels, and the means over several tasks."""
        self._print()
        for (name, value, system), share in result.by_label().items():
            if name != "length":
                cells = [f"{name} {value}", "", system, str(share.count), per_cent(share.mean), _interval(share), ""]
                self._write(cells)
        if len({prediction.task for prediction in result.predictions}) > 1:
            for (length, system), mean in result.means().items():
                self._write(["mean of tasks", _length(length), system, "", per_cent(mean), "", ""])


def _length(length: int | str) -> str:
    return f"{length:,}" if isinstance(length, int) else length


def _share(share: Share) -> dict[str, Any]:
    return {"questions": share.count, "score": share.mean, "interval_95": share.interval}


def _document(
    args: argparse.Namespace, result: Evaluation, systems: Sequence[System], device: str, model: Any, spent: float
) -> dict[str, Any]:
    from sharedllm_ext.evaluation.generators import DEFAULT_DEPTHS

    made = args.suite is None
    return {
        "model": args.model,
        "base": args.base,
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "suite": args.suite,
        "data": args.data,
        "haystack": args.haystack,
        "seed": args.seed or 0 if made else None,
        "depths": list(args.depths or DEFAULT_DEPTHS) if made else None,
        "systems": {system.name: system.settings for system in systems},
        "results": [
            {"task": task, "length": length, "system": system, **_share(share)}
            for (task, length, system), share in result.by_length().items()
        ],
        "by_depth": [
            {"system": system.name, "depth": depth, "length": length, **_share(share)}
            for system in systems
            for (depth, length), share in result.by_depth(system.name).items()
        ],
        "by_label": [
            {"label": name, "value": value, "system": system, **_share(share)}
            for (name, value, system), share in result.by_label().items()
        ],
        "means": [
            {"length": length, "system": system, "score": mean} for (length, system), mean in result.means().items()
        ],
        "predictions": args.predictions,
        "answers": len(result.predictions),
        "answers_kept": sum(prediction.kept for prediction in result.predictions),
        "seconds": spent,
    }


def plot(result: Evaluation, systems: Sequence[str], path: str) -> None:
    """A heat map of depth by length for every system, over all tasks whose answer is in one place."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {system: result.by_depth(system) for system in systems}
    places = [group for groups in found.values() for group in groups]
    depths = sorted({depth for depth, _ in places})
    lengths = sorted({length for _, length in places})
    width = 1.6 + len(systems) * (1.2 + 0.8 * len(lengths))
    figure, panels = pyplot.subplots(
        1, len(systems), figsize=(width, 1.6 + 0.5 * len(depths)), squeeze=False, layout="constrained"
    )
    for axes, (system, groups) in zip(panels[0], found.items(), strict=True):
        values = [
            [100 * groups[depth, length].mean if (depth, length) in groups else math.nan for length in lengths]
            for depth in depths
        ]
        image: Any = axes.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if not math.isnan(value):
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center")
        axes.set_xticks(range(len(lengths)), [_length(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes.set_xlabel("tokens")
        axes.set_ylabel("depth, %")
        axes.set_title(system)
    figure.colorbar(image, ax=panels[0].tolist(), label="score, %")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)

"""``sharedllm perplexity``: the same running text with more and more context before it."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sharedllm_ext.cli._common import (
    EXIT_ERROR,
    add_model_options,
    characters,
    counts,
    find_tokenizer,
    load_model,
    mebibytes,
    model_path,
    one_line,
    pick_device,
    positive,
    say_left_out,
    seconds,
    some_path,
    warn_if_silent,
    writable_target,
)
from sharedllm_ext.cli._output import CommandError, Table, UsageError, print_error, print_json, say
from sharedllm_ext.cli._progress import Progress
from sharedllm_ext.counted import counted

if TYPE_CHECKING:
    from sharedllm_ext.evaluation import LengthResult, PerplexityReport, Texts

#: Context lengths where none are given, as far as the text has room for them.
DEFAULT_LENGTHS = (8192, 32768)
#: Running texts that a shorter text should have room for.
FEWEST_POINTS = 4
PLOT_SUFFIXES = (".png", ".pdf", ".svg")


def add_parser(commands: Any) -> None:
    """Add the command."""
    text = (
        "perplexity of the same running tokens with different lengths of context right before them; intervals are "
        "paired: the mean change of the points' losses against the first length, Student's t, 95%"
    )
    parser = commands.add_parser("perplexity", help="perplexity with growing context", description=text)
    parser.add_argument(
        "model", type=some_path, metavar="MODEL", help="SharedLLM checkpoint folder; demo: the shipped one"
    )
    parser.add_argument(
        "text",
        type=some_path,
        metavar="FILE_OR_FOLDER",
        help="text file, folder of text files, pipe, - for stdin, .jsonl with text, or .npy token ids",
    )
    parser.add_argument(
        "--context-lengths",
        type=counts,
        metavar="N,N,…",
        help="tokens of context, 8k is 8192; the first is compared with (default: of 0,8192,32768 what the text has)",
    )
    parser.add_argument("--points", type=positive, default=20, metavar="N", help="running texts (default: %(default)s)")
    parser.add_argument("--running", type=positive, metavar="W", help="running tokens (default: at most the window)")
    parser.add_argument("--scored", type=positive, metavar="K", help="last tokens that count (default: W - 1)")
    parser.add_argument(
        "--stride", type=positive, metavar="N", help="tokens between running texts (default: evenly spread)"
    )
    parser.add_argument(
        "--separate", action="store_true", help="do not join the files of a folder or the lines of a .jsonl file"
    )
    parser.add_argument(
        "--exact-memory",
        action="store_true",
        help="on a CPU, let the allocator keep no freed memory: a lower, repeatable peak for a quarter of the speed",
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw the table (needs matplotlib)")
    add_model_options(parser)
    parser.set_defaults(run=run)


def fit(
    longest: int, window: int, lengths: list[int] | None, running: int | None, scored: int | None
) -> tuple[list[int], int]:
    """Context lengths and running tokens: those given, and for the others what a text of ``longest`` tokens has."""
    largest = max(lengths) if lengths else DEFAULT_LENGTHS[0] if lengths is None else 0
    if running is None:
        running = window
        if longest < largest + window:
            # a few running texts, and as much again before them
            room = longest - largest if lengths is not None else longest // 2
            shorter = max(room // FEWEST_POINTS, 2, 0 if scored is None else scored + 1)
            running = min(window, shorter) if lengths is None or room >= shorter else window
    if lengths is None:
        lengths = [0, *(length for length in DEFAULT_LENGTHS if length + running <= longest)]
        room = longest - FEWEST_POINTS * running
        if len(lengths) == 1 and room >= 1:
            lengths.append(1 << (room.bit_length() - 1))
    return lengths, running


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.running is not None and args.scored is not None and args.scored >= args.running:
        raise UsageError(f"--scored: expected less than --running {args.running}, got {args.scored}")
    if args.plot is not None:
        writable_target("--plot", args.plot, PLOT_SUFFIXES, keep=[args.text])
        if importlib.util.find_spec("matplotlib") is None:
            raise CommandError("--plot: matplotlib is not installed (pip install matplotlib)")
    from sharedllm_ext.evaluation.texts import read_texts, size_of
    from sharedllm_ext.evaluation.tokenising import read_tokens

    progress = Progress(not args.json)
    with progress.bar(f"reading {args.text}", size_of(args.text), "B") as update:
        texts = read_texts(args.text, progress=update)

    from sharedllm_ext.evaluation.peak_memory import keep_no_freed_blocks
    from sharedllm_ext.evaluation.perplexity import check_lengths, evaluate_perplexity, pick_points

    device = pick_device(args.device)
    if args.exact_memory:
        keep_no_freed_blocks()
    path = model_path(args.model)
    model = load_model(path, args.dtype, device, progress=progress)
    tokenizer = find_tokenizer(path)
    warn_if_silent(model, path)
    with progress.bar("tokenising", characters(texts), "characters") as update:
        documents = read_tokens(texts, tokenizer, model.config.vocab_size, join=not args.separate, progress=update)
    sizes = [len(document) for document in documents]
    lengths, running = fit(max(sizes), model.config.window, args.context_lengths, args.running, args.scored)
    scored = check_lengths(lengths, running, args.scored, model.config.window)
    try:
        places = pick_points(sizes, max(lengths), running, points=args.points, stride=args.stride)
    except ValueError as error:
        raise CommandError(f"{args.text}: {error}") from None
    if not args.json:
        _say_text(args, texts, sizes, len(places))
    table = PerplexityTable(lengths, len(places), scored)
    total = sum(len(places) * (length + running) for length in lengths)
    with progress.bar("perplexity", total, "tokens") as update:
        report = evaluate_perplexity(
            model,
            documents,
            lengths,
            running=running,
            scored=scored,
            points=args.points,
            stride=args.stride,
            progress=update,
            on_result=None if args.json else lambda result: progress.write(table.row(result)),
        )
    if args.json:
        print_json(
            {
                "model": args.model,
                "text": texts.source,
                "text_tokens": sum(sizes),
                "files_skipped": texts.skipped,
                "files_unreadable": texts.unreadable,
                "device": str(device),
                "dtype": str(model.dtype).removeprefix("torch."),
                **report.as_dict(),
            }
        )
    else:
        progress.write(table_note(report))
    if args.plot is not None:
        try:
            plot(report, args.plot)
        except Exception as error:
            # the result is complete, whatever error matplotlib or the disk raises
            print_error(f"--plot: {one_line(error)}")
            return EXIT_ERROR
        if not args.json:
            say(f"plot: {args.plot}")
    return 0


def _say_text(args: argparse.Namespace, texts: Texts, sizes: list[int], points: int) -> None:
    say_left_out(f"{args.text}:", texts.skipped, texts.unreadable)
    if points < args.points:
        say(
            f"{args.text}: {counted(sum(sizes), 'token', ',')} have room for {points} of "
            f"{counted(args.points, 'point')}"
        )


class PerplexityTable:
    """The table of a report, row by row."""

    def __init__(self, lengths: Sequence[int], points: int, scored: int) -> None:
        self.points = points
        self.begun = False
        header = ["context", "perplexity", f"against {lengths[0]:,}", "95% interval"]
        header += ["scored", "memory", "time/point", "peak"]
        widths = [len(f"{max(lengths):,}"), 10, 8, 19, len(f"{points * scored:,}"), 9, 9, 9]
        self.table = Table(header, widths)

    def row(self, result: LengthResult) -> str:
        """The lines of one context length, in the order of the lengths."""
        base, self.begun = not self.begun, True
        bounds = result.change_interval
        return self.table.row(
            [
                f"{result.context_length:,}",
                f"{result.perplexity:.4f}",
                "" if base else f"{100 * result.change:+.2f}%",
                "" if bounds is None else f"{100 * bounds[0]:+.2f}% … {100 * bounds[1]:+.2f}%",
                f"{result.tokens_scored:,}",
                mebibytes(result.memory_bytes),
                seconds(result.seconds / self.points),
                mebibytes(result.peak_bytes),
            ]
        )


def table_note(report: PerplexityReport) -> str:
    """How the table was made, in one line."""
    return (
        f"{counted(len(report.points), 'point')} of {counted(report.running, 'running token', ',')}, the last "
        f"{report.scored:,} scored; peak: {report.peak_kind}"
    )


def plot(report: PerplexityReport, path: str) -> None:
    """Perplexity over context length, with the paired interval against the first length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = report.results[0]
    values = [result.perplexity for result in report.results]
    bounds = [result.change_interval or (result.change, result.change) for result in report.results]
    # the interval is of the change, so its ends are the first length's perplexity times 1 + change
    low = [value - base.perplexity * (1 + bound[0]) for value, bound in zip(values, bounds, strict=True)]
    high = [base.perplexity * (1 + bound[1]) - value for value, bound in zip(values, bounds, strict=True)]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.errorbar(
        range(len(values)),
        values,
        yerr=[[max(x, 0.0) if math.isfinite(x) else 0.0 for x in side] for side in (low, high)],
        marker="o",
        capsize=4,
    )
    axes.set_xticks(range(len(values)), [f"{result.context_length:,}" for result in report.results])
    axes.set_xlabel("context tokens")
    axes.set_ylabel("perplexity")
    axes.set_title(
        f"{counted(len(report.points), 'point')}, {counted(report.running, 'running token', ',')}; 95% against "
        f"{base.context_length:,}"
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)

"""``sharedllm perplexity``: the same running text with more and more context before it."""

from __future__ import annotations

import argparse
import importlib.util
from typing import TYPE_CHECKING, Any

from sharedllm_ext.cli._common import (
    CommandError,
    Progress,
    UsageError,
    add_model_options,
    characters,
    counts,
    find_tokenizer,
    load_model,
    mebibytes,
    pick_device,
    positive,
    print_json,
    say,
    seconds,
    table,
    writable_target,
)

if TYPE_CHECKING:
    from sharedllm_ext.evaluation import PerplexityReport

PLOT_SUFFIXES = (".png", ".pdf", ".svg")


def add_parser(commands: Any) -> None:
    """Add the command."""
    text = (
        "perplexity of the same running tokens with different lengths of context right before them; intervals are "
        "paired: the mean change of the points' losses against the first length, Student's t, 95%"
    )
    parser = commands.add_parser("perplexity", help="perplexity with growing context", description=text)
    parser.add_argument("model", metavar="MODEL", help="SharedLLM checkpoint folder")
    parser.add_argument(
        "text", metavar="FILE_OR_FOLDER", help="text file, folder of text files, .jsonl with text, or .npy token ids"
    )
    parser.add_argument(
        "--context-lengths",
        type=counts,
        default=[0, 8192, 32768],
        metavar="N,N,…",
        help="tokens of context, 8k is 8192; the first is compared with (default: 0,8192,32768)",
    )
    parser.add_argument("--points", type=positive, default=20, metavar="N", help="running texts (default: %(default)s)")
    parser.add_argument("--running", type=positive, metavar="W", help="tokens of running text (default: the window)")
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


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.running is not None and args.scored is not None and args.scored >= args.running:
        raise UsageError(f"--scored: expected less than --running {args.running}, got {args.scored}")
    if args.plot is not None:
        writable_target("--plot", args.plot, PLOT_SUFFIXES)
        if importlib.util.find_spec("matplotlib") is None:
            raise CommandError("--plot: matplotlib is not installed (pip install matplotlib)")
    from sharedllm_ext.evaluation import read_texts, read_tokens

    texts = read_texts(args.text)

    from sharedllm_ext.evaluation.peak_memory import keep_no_freed_blocks
    from sharedllm_ext.evaluation.perplexity import evaluate_perplexity, pick_points

    device = pick_device(args.device)
    if args.exact_memory:
        keep_no_freed_blocks()
    progress = Progress(not args.json)
    model = load_model(args.model, args.dtype, device, progress=progress.enabled)
    tokenizer = find_tokenizer(args.model)
    with progress.bar("tokenising", characters(texts), "char") as update:
        documents = read_tokens(texts, tokenizer, model.config.vocab_size, join=not args.separate, progress=update)
    running = model.config.window if args.running is None else args.running
    sizes = [len(document) for document in documents]
    longest = max(args.context_lengths)
    try:
        places = pick_points(sizes, longest, running, points=args.points, stride=args.stride)
    except ValueError as error:
        raise CommandError(f"{args.text}: {error}") from None
    total = sum(len(places) * (length + running) for length in args.context_lengths)
    with progress.bar("perplexity", total, "tok") as update:
        report = evaluate_perplexity(
            model,
            documents,
            args.context_lengths,
            running=running,
            scored=args.scored,
            points=args.points,
            stride=args.stride,
            progress=update,
        )
    if len(places) < args.points and not args.json:
        say(f"{args.text}: {sum(sizes):,} tokens have room for {len(places)} of {args.points} points")
    if args.plot is not None:
        plot(report, args.plot)
    if args.json:
        print_json(
            {
                "model": args.model,
                "text": args.text,
                "text_tokens": sum(sizes),
                "files_skipped": texts.skipped,
                "device": str(device),
                "dtype": str(model.dtype).removeprefix("torch."),
                **report.as_dict(),
            }
        )
        return 0
    print_report(report)
    if args.plot is not None:
        say(f"plot: {args.plot}")
    return 0


def print_report(report: PerplexityReport) -> None:
    """The table, and one line on how it was made."""
    first = report.results[0].context_length
    header = ["context", "perplexity", f"against {first:,}", "95% interval", "scored", "memory", "time/point", "peak"]
    rows = []
    for result in report.results:
        bounds = result.change_interval
        base = result.context_length == first
        rows.append(
            [
                f"{result.context_length:,}",
                f"{result.perplexity:.4f}",
                "" if base else f"{100 * result.change:+.2f}%",
                "" if bounds is None else f"{100 * bounds[0]:+.2f}% … {100 * bounds[1]:+.2f}%",
                f"{result.tokens_scored:,}",
                mebibytes(result.memory_bytes),
                seconds(result.seconds / len(report.points)),
                mebibytes(result.peak_bytes),
            ]
        )
    print(table(header, rows))
    print(
        f"{len(report.points)} points of {report.running:,} running tokens, the last {report.scored:,} scored; "
        f"peak: {report.peak_kind}"
    )


def plot(report: PerplexityReport, path: str) -> None:
    """Perplexity over context length, with the paired interval against the first length."""
    import math

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
        f"{len(report.points)} points, {report.running:,} running tokens; 95% against {base.context_length:,}"
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)

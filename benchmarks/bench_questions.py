"""Many questions over one memory: time of a decoding step for a number of rows, and to a question's first token.

python benchmarks/bench_questions.py                           # Llama-3.1-8B's shape, M = 16, 131072 tokens
python benchmarks/bench_questions.py --rows 1 64 --layers 4 --json questions.json
python benchmarks/bench_questions.py --stored questions.json --plot questions.svg    # the same numbers, and a plot

Random weights and a random memory (times do not depend on their values), bfloat16 on CUDA; wall-clock times with the
device synchronised. --cpu runs it on the CPU, in float32: to try the script, or for small shapes.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_end_to_end import SHAPES, built, digits, lacks_device, random_ids, seconds
from line_plot import line_plot
from run_gpu import header

from sharedllm_ext import ContextMemory, ContinuousBatch

COLUMNS = (
    "rows",
    "generate, ms a step",
    "tokens/s",
    "ContinuousBatch, ms a step",
    "tokens/s",
    "one question joins, ms",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=16, metavar="M", help="injection layers (default %(default)s)")
    parser.add_argument("--context", type=int, default=131072, help="tokens of the memory (default %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--question", type=int, default=64, help="tokens of a question (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="decoded tokens that are timed (default %(default)s)")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU where torch sees no CUDA device")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="tokens a second against questions, as SVG")
    parser.add_argument("--stored", type=Path, metavar="FILE", help="measure nothing, take what --json wrote")
    arguments = parser.parse_args(argv)
    if arguments.stored:
        found = json.loads(arguments.stored.read_text())
        for name, value in found["arguments"].items():
            setattr(arguments, name, value)
        tell(found, arguments)
        return 0
    if lacks_device("bench_questions", arguments.cpu):
        return 2
    about = header()
    # what `built` reads
    arguments.running, arguments.micro_batch = 4096, None
    with built(arguments.shape, arguments.layers, arguments) as model:
        memory = random_memory(model, arguments.context)
        first = first_token(model, memory, arguments)
        rows = [measure(model, memory, count, arguments) for count in arguments.rows]
    kept = {name: getattr(arguments, name) for name in ("shape", "layers", "context", "question")}
    found = {"header": about, "arguments": kept, "first token": first, "rows": rows}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    tell(found, arguments)
    return 0


def tell(found: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print the table, and draw the plot where one is asked for."""
    print(table(found["rows"], found["first token"], found["header"], arguments))
    if arguments.plot:
        lines = {
            label: [(row["rows"], row["rows"] / row[name]) for row in found["rows"]]
            for name, label in (("generate", "generate"), ("batch", "ContinuousBatch"))
        }
        title = f"{arguments.shape}, M = {arguments.layers}, one memory of {arguments.context} tokens"
        title += f", {found['header']['gpu']}"
        arguments.plot.write_text(line_plot(lines, title, "questions at once", "tokens a second"))


@torch.no_grad()
def random_memory(model: Any, tokens: int) -> ContextMemory:
    """A memory of a context of so many tokens, with random keys and values."""
    config = model.config
    small = model.compress(random_ids(config.chunk_size, config.vocab_size, 1))
    chunks = -(-tokens // config.chunk_size)
    slots = chunks * small.num_slots
    keys, values = ([torch.randn_like(x).repeat(chunks, 1, 1) for x in part] for part in (small.keys, small.values))
    return ContextMemory(keys, values, [0, slots], [chunks], [tokens], [0], small.signature)


@torch.no_grad()
def first_token(model: Any, memory: ContextMemory, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds to the first token of one question: the first over a memory, later ones, and by the ordinary forward."""

    def ask(seed: int, **settings: Any) -> None:
        text = random_ids(arguments.question, model.config.vocab_size, seed)
        model.generate(text, memory=memory, max_new_tokens=1, do_sample=False, **settings)

    times = [seconds(partial(ask, seed)) for seed in range(12)]
    ordinary = [seconds(partial(ask, seed, disable_compile=True)) for seed in range(6)]
    return {"first": times[0], "later": statistics.median(times[4:]), "ordinary": statistics.median(ordinary[1:])}


@torch.no_grad()
def measure(model: Any, memory: ContextMemory, rows: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step of ``generate`` and of a batch, and until a question has joined that batch."""
    text = torch.cat([random_ids(arguments.question, model.config.vocab_size, seed) for seed in range(rows)])
    least = {}
    for tokens in (1, 1 + arguments.tokens):
        generate = partial(model.generate, text, memory=memory, max_new_tokens=tokens, do_sample=False)
        least[tokens] = min(seconds(generate) for _ in range(3))
    generated = (least[1 + arguments.tokens] - least[1]) / arguments.tokens
    room = arguments.question + 3 * arguments.tokens + 16
    batch = ContinuousBatch(model, rows=rows, tokens=room)
    batch.add_all(list(text.cpu()), memory, eos_token_id=[])

    def steps(count: int) -> Callable[[], None]:
        return lambda: [batch.step() for _ in range(count)] and None

    # the kernels are loaded, and the graph is made
    steps(4)()
    stepped = seconds(steps(arguments.tokens)) / arguments.tokens
    joins = []
    for row in range(4):
        batch.remove(batch.live[0])
        joins.append(seconds(lambda row=row: batch.add(text[row % rows].cpu(), memory, eos_token_id=[])))
        batch.step()
    return {"rows": rows, "generate": generated, "batch": stepped, "join": min(joins)}


def table(
    rows: list[dict[str, float]], first: dict[str, float], about: dict[str, str], arguments: argparse.Namespace
) -> str:
    """What was measured, in Markdown."""
    lines = [
        f"{', '.join(about.values())}. {arguments.shape}, M = {arguments.layers}, questions of {arguments.question} "
        f"tokens over one memory of {arguments.context} tokens, random weights.",
        "",
        f"One question's first token: {first['later'] * 1e3:.1f} ms ({first['first'] * 1e3:.1f} ms for the first "
        f"over a memory, {first['ordinary'] * 1e3:.1f} ms by the ordinary forward).",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{' ---: |' * len(COLUMNS)}",
    ]
    for row in rows:
        per_second = [row["rows"] / row[name] for name in ("generate", "batch")]
        cells = (
            f"{row['rows']:.0f}",
            digits(row["generate"] * 1e3, 2),
            digits(per_second[0], 0),
            digits(row["batch"] * 1e3, 2),
            digits(per_second[1], 0),
            digits(row["join"] * 1e3, 1),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

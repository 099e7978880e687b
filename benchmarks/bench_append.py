"""Appending to a memory: what 1024 more tokens cost, by the length of the memory.

python benchmarks/bench_append.py                                       # Llama-3.1-8B's shape, M = 4, 8K to 10M tokens
python benchmarks/bench_append.py --layers 16 --tokens 8192 1048576 --plot append.svg
python benchmarks/bench_append.py --cpu --shape demo --layers 4         # on the CPU
python benchmarks/bench_append.py --stored append.json --plot append.svg

Random weights and a random memory (times do not depend on their values), bfloat16 on CUDA, float32 on the CPU;
wall-clock medians with the device synchronised. "Making room" is the first append, which copies the memory into a room
twice as large; the next copy comes when that is full.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from bench_documents import demo
from bench_end_to_end import SHAPES, built, digits, lacks_device, random_ids, seconds
from bench_questions import random_memory
from line_plot import line_plot
from run_gpu import header

COLUMNS = ("tokens of the memory", "append, ms", "beside compressing the same tokens alone", "making room, ms")
TOKENS = [8192, 32768, 131072, 524288, 1048576, 10485760]
APPENDED = 1024


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "demo"], default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=4, metavar="M", help="injection layers (default %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="of the memory")
    parser.add_argument("--repeats", type=int, default=5, help="appends that are timed (default %(default)s)")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU where torch sees no CUDA device")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="milliseconds against tokens, as SVG")
    parser.add_argument("--stored", type=Path, metavar="FILE", help="measure nothing, take what --json wrote")
    arguments = parser.parse_args(argv)
    if arguments.stored:
        tell(json.loads(arguments.stored.read_text()), arguments.plot)
        return 0
    if lacks_device("bench_append", arguments.cpu):
        return 2
    # what `built` reads
    arguments.running, arguments.micro_batch = 4096, None
    about = header()
    with built(arguments.shape, arguments.layers, arguments) if arguments.shape != "demo" else demo() as model:
        rows = [measure(model, tokens, arguments.repeats) for tokens in arguments.tokens]
        layers = model.config.injection_layers
    found = {"header": about, "shape": arguments.shape, "layers": layers, "rows": rows}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    tell(found, arguments.plot)
    return 0


@torch.no_grad()
def measure(model: Any, tokens: int, repeats: int) -> dict[str, float]:
    """Seconds of an append to a memory of so many tokens, of making room, and of compressing the tokens alone."""
    vocabulary = model.config.vocab_size
    more = [random_ids(APPENDED, vocabulary, seed) for seed in range(repeats + 1)]
    model.compress(more[0])
    alone = statistics.median(seconds(lambda ids=ids: model.compress(ids)) for ids in more)
    memory = random_memory(model, tokens)

    def append(ids: torch.Tensor) -> None:
        nonlocal memory
        memory = model.append(memory, ids)

    room = seconds(lambda: append(more[0]))
    appended = statistics.median(seconds(lambda ids=ids: append(ids)) for ids in more[1:])
    assert memory.num_tokens[0] == tokens + APPENDED * (repeats + 1)
    return {"tokens": tokens, "append": appended, "alone": alone, "room": room}


def tell(found: dict[str, Any], plot: Path | None) -> None:
    """Print the table, and draw the plot where one is asked for."""
    print(f"{', '.join(found['header'].values())}. {found['shape']}, M = {found['layers']}, random weights.\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{' ---: |' * len(COLUMNS)}")
    for row in found["rows"]:
        cells = (digits(row["append"] * 1e3, 2), f"{row['append'] / row['alone']:.2f}x", digits(row["room"] * 1e3, 1))
        print(f"| {row['tokens']} | {' | '.join(cells)} |")
    if plot:
        lines = {
            "append 1024 tokens": [(row["tokens"], row["append"] * 1e3) for row in found["rows"]],
            "compress them alone": [(row["tokens"], row["alone"] * 1e3) for row in found["rows"]],
        }
        title = f"{found['shape']}, M = {found['layers']}, {found['header']['gpu']}"
        plot.write_text(line_plot(lines, title, "tokens of the memory", "ms"))


if __name__ == "__main__":
    raise SystemExit(main())

"""A training step of whole models, beside the base's own with full attention over as many tokens.

python benchmarks/bench_training.py                                  # both cases
python benchmarks/bench_training.py --cases smollm2-135m --profile training.txt
python benchmarks/bench_training.py --cpu --cases smollm2-135m --rows 1 --context 1024     # to try the script

Random weights (times do not depend on their values), bfloat16 on CUDA. A step is forward, backward and AdamW, timed by
the wall clock with the device synchronised; medians. "Host" is when the last call of a step has returned: near the
step's own time, the device waits for launches.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_end_to_end import DEVICE, GB, built, digits, kernel_table, lacks_device, random_ids, seconds, synchronize
from run_gpu import header
from torch import nn

COLUMNS = ("case", "trained", "system", "ms a step", "host, ms", "tokens/s", "peak, GB")
SETS = ("paper", "all")


class Size(NamedTuple):
    """A case: rows of context and running text, and what is trained."""

    layers: int
    rows: int
    context: int
    running: int
    trained: str
    peer: bool


CASES = {
    # many documents and a short question to each
    "smollm2-135m": Size(layers=8, rows=16, context=4096, running=64, trained="all", peer=False),
    # the published setting
    "llama-3.1-8b": Size(layers=4, rows=1, context=4096, running=4096, trained="paper", peer=True),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=6, help="that are timed (default %(default)s)")
    for name in ("layers", "rows", "context", "running"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help="in place of the case's own number")
    parser.add_argument("--trained", choices=SETS, help="in place of the case's own set")
    parser.add_argument("--no-peer", action="store_true", help="this package alone")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="kernel tables of our steps go to its end (CUDA)")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU where torch sees no CUDA device")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    arguments = parser.parse_args(argv)
    # what `built` reads
    arguments.micro_batch = None
    if lacks_device("bench_training", arguments.cpu):
        return 2
    about = header()
    rows = [row for name in arguments.cases for row in measure(name, arguments)]
    print(f"{', '.join(about.values())}. A step is forward, backward and AdamW; random weights.\n")
    print(f"| {' | '.join(COLUMNS)} |\n| --- | --- | --- |{' ---: |' * 4}")
    for row in rows:
        cells = [row["case"], row["trained"], row["system"], digits(row["step"] * 1e3, 1), digits(row["host"] * 1e3, 1)]
        cells += [digits(row["tokens"] / row["step"], 0), digits(row["peak"] / GB, 1)]
        print(f"| {' | '.join(cells)} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"header": about, "rows": rows}, indent=2) + "\n")
    return 0


def measure(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Our step of a case, and the base's with full attention over all of its tokens."""
    own = {key: value for key in Size._fields if (value := getattr(arguments, key, None)) is not None}
    size = CASES[name]._replace(**own)
    arguments.running = size.running
    found = []
    with built(name, size.layers, arguments) as model:
        model.train()
        vocabulary = model.config.vocab_size
        context, text = (
            torch.cat([random_ids(count, vocabulary, 10 * seed + place) for seed in range(size.rows)])
            for place, count in enumerate((size.context, size.running))
        )
        choose(model, size.trained)
        system = f"M = {size.layers}, {size.rows} x ({size.context} + {size.running})"

        def ours() -> Any:
            return model(input_ids=text, context_ids=context, labels=text).loss

        found.append(timed(ours, model, arguments))
        found[-1] |= {"system": system}
        if size.peer and not arguments.no_peer:
            whole = torch.cat((context, text), 1)
            labels = torch.cat((torch.full_like(context, -100), text), 1)
            choose(model, size.trained, injected=False)

            def full() -> Any:
                return model(input_ids=whole, labels=labels, split_window=False).loss

            found.append(timed(full, model, arguments, profiled=False))
            found[-1] |= {"system": f"full attention, {size.rows} x {size.context + size.running}"}
    tokens = size.rows * (size.context + size.running)
    return [{"case": name, "trained": size.trained, "tokens": tokens, **row} for row in found]


def choose(model: Any, trained: str, injected: bool = True) -> None:
    """What is trained: everything, or as published the injected blocks and the self-attention above them."""
    model.requires_grad_(trained == "all")
    if trained == "paper":
        for layer in model.model.layers[model.config.injection_layers :]:
            layer.self_attn.requires_grad_(True)
    for block in model.injected_blocks:
        block.requires_grad_(injected)


def timed(loss: Callable[[], Any], model: nn.Module, arguments: argparse.Namespace, profiled: bool = True) -> Any:
    """Seconds of a step, seconds until its calls have returned, and the peak memory in bytes."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=DEVICE == "cuda")
    host = []

    def step() -> None:
        begin = time.perf_counter()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        host.append(time.perf_counter() - begin)

    for _ in range(2):
        step()
    synchronize()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    host.clear()
    times = [seconds(step) for _ in range(arguments.steps)]
    found = {"step": statistics.median(times), "host": statistics.median(host)}
    found["peak"] = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    if profiled and arguments.profile and DEVICE == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            elapsed = seconds(step)
        with arguments.profile.open("a") as file:
            file.write(f"{elapsed * 1e3:.1f} ms with the profiler\n{kernel_table(recorded, elapsed)}\n\n")
    return found


if __name__ == "__main__":
    raise SystemExit(main())

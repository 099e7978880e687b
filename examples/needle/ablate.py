"""Short trainings that differ in one thing each, evaluated alike, in one JSON file.

    python ablate.py --data data --out ablations.json --seconds 90

What the file has is not repeated, so the same command goes on; ``--limit`` is the time of one call. Results of short
trainings say which change to try first, not what a long training will gain.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GO_ON = 75
# name: flags of train.py
RUNS: dict[str, list[str]] = {
    "run E": [],
    "run C": ["--mix", "c", "--hidden-weight", "0", "--question-tokens", "96"],
    "texts and windows of run C": ["--mix", "c"],
    "words of 64 tokens around": ["--wide"],
    "pick with its words only": ["--hidden-weight", "0"],
    "pick without words only": ["--hidden-weight", "1"],
    "memory read by the top layers": ["--reading", "top"],
    "memory read by interleaved layers": ["--reading", "interleaved"],
    "slots at the starts of strides": ["--slot-position", "start"],
    "4 memory layers": ["--memory-layers", "4"],
    "12 memory layers": ["--memory-layers", "12"],
    "chunks split twice": ["--depth", "2"],
    "16 slots a node": ["--slots", "16"],
    "learning rate 5e-4": ["--rate", "5e-4"],
    "learning rate 2e-3": ["--rate", "2e-3"],
    "12 contexts": ["--contexts", "12"],
    "512 tokens of running text": ["--running-tokens", "512"],
}


def call(script: str, flags: list[Any]) -> None:
    """Run one of the scripts beside this one.

    Raises:
        subprocess.CalledProcessError: it failed; its last lines are printed.
    """
    command = [sys.executable, str(HERE / script), *map(str, flags)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", flush=True)
        raise subprocess.CalledProcessError(done.returncode, command)


def ablation(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one of RUNS."""
    from safetensors import safe_open

    adapter, results = folder / "adapter.safetensors", folder / "results.json"
    device = ["--device", arguments.device] if arguments.device else []
    steps = ["--max-steps", arguments.max_steps] if arguments.max_steps else []
    files = ["--data", arguments.data, "--out", adapter]
    limits = ["--seconds", arguments.seconds, "--seed", arguments.seed, "--workers", arguments.workers]
    call("train.py", [*files, *limits, *steps, *device, *RUNS[name], *arguments.train])
    files = ["--data", arguments.data, "--adapter", adapter, "--out", results]
    asked = ["--questions", arguments.questions, "--squad", arguments.questions, "--lengths", *arguments.lengths]
    less = ["--squad-lengths", *arguments.lengths, "--counting", 0, "--points", arguments.points]
    call("evaluate.py", [*files, *asked, *less, *device])
    with safe_open(adapter, framework="pt") as file:
        training = json.loads(file.metadata()["training"])
    return {"training": training, **json.loads(results.read_text())}


def main() -> None:
    own, train = sys.argv[1:], []
    if "--" in own:
        own, train = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder written by prepare.py")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of all runs")
    parser.add_argument("--runs", nargs="*", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--seconds", type=float, default=90.0, help="of each training")
    parser.add_argument("--max-steps", type=int, help="end each training earlier (for a quick trial)")
    parser.add_argument("--questions", type=int, default=50, help="of each task")
    parser.add_argument("--points", type=int, default=0, help="windows of which perplexity is taken")
    parser.add_argument("--lengths", type=int, nargs="*", default=[32])
    parser.add_argument("--limit", type=float, default=1800.0, help="begin no run after so many seconds")
    parser.add_argument("--workers", type=int, default=13)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="CUDA where there is one, by default")
    arguments = parser.parse_args(own)
    arguments.train = train
    start = time.monotonic()
    results: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    for name in arguments.runs:
        if name in results:
            continue
        if time.monotonic() - start > arguments.limit:
            print(f"stopped before {name!r}: the same command goes on", flush=True)
            raise SystemExit(GO_ON)
        with tempfile.TemporaryDirectory() as folder:
            results[name] = ablation(name, Path(folder), arguments)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
        print(f"{name}: {time.monotonic() - start:.0f} s so far", flush=True)


if __name__ == "__main__":
    main()

"""Everything for one adapter on one GPU: prepare, train, fit, evaluate, export. The same command goes on.

    python run.py --downloads downloads --data data --out run --seconds 800 --limit 560

Each stage writes into the folders and is not repeated: training goes on from its state, evaluation with the parts that
are missing. ``--limit`` is the time of one call, for machines that end a command; the exit status is 75 while there is
more to do. Only the downloads need a network, and they are not made here. What follows ``--`` goes to train.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

STAGES = ("prepare", "train", "fit", "evaluate", "export")
HERE = Path(__file__).resolve().parent
GO_ON = 75
# seconds of a call that are kept for what a training does beside its steps: starting, compiling, saving
TRAINING_MARGIN = 60.0
# what the last file that prepare.py writes is
PREPARED = "test.npy"


def package_is_there() -> bool:
    """Whether sharedllm_ext can be imported, with its compiled module."""
    try:
        return importlib.util.find_spec("sharedllm_ext._C") is not None
    except ImportError:
        return False


class Run:
    """The files of a run, and the time that is left in this call."""

    def __init__(self, arguments: argparse.Namespace, train_flags: Sequence[str]) -> None:
        self.arguments, self.train_flags = arguments, list(train_flags)
        self.data, self.out = arguments.data, arguments.out
        self.adapter, self.state = self.out / "adapter.safetensors", self.out / "state.pt"
        self.fitted = self.out / "fitted.safetensors"
        self.progress, self.results = self.out / "progress.json", self.out / "results.json"
        self.exported = self.out / "package.safetensors"
        self.end = time.monotonic() + arguments.limit

    def left(self) -> float:
        return self.end - time.monotonic()

    def call(self, script: str, *flags: object) -> int:
        """Run one of the scripts beside this one; its exit status, 0 or GO_ON.

        Raises:
            SystemExit: any other status.
        """
        command = [sys.executable, str(HERE / script), *map(str, flags)]
        print("$", " ".join(command), flush=True)
        status = subprocess.run(command, check=False).returncode
        if status not in (0, GO_ON):
            raise SystemExit(f"{script}: expected exit status 0 or {GO_ON}, got {status}")
        return status

    def prepare(self) -> bool:
        """Whether the data are there."""
        if not (self.data / PREPARED).is_file():
            if self.arguments.downloads is None:
                raise SystemExit(f"{self.data / PREPARED} is missing: give --downloads")
            self.call("prepare.py", "--downloads", self.arguments.downloads, "--out", self.data)
        questions = self.arguments.counting
        if questions and package_is_there() and not (self.data / "counting.json.gz").is_file():
            self.call("counting.py", "--data", self.data, "--questions", questions)
        return True

    def trained(self) -> float:
        """Seconds of training so far."""
        return float(json.loads(self.progress.read_text())["seconds"]) if self.progress.is_file() else 0.0

    def train(self) -> bool:
        """Whether the training has had its time."""
        wanted, before = self.arguments.seconds, self.trained()
        if before >= wanted:
            return True
        stop = min(wanted, before + self.left() - self.arguments.margin)
        if stop <= before:
            return False
        flags = ["--seconds", wanted, "--stop", stop, "--state", self.state, "--workers", self.arguments.workers]
        if self.arguments.max_steps:
            flags += ["--max-steps", self.arguments.max_steps]
        self.call("train.py", "--data", self.data, "--out", self.adapter, *flags, *self.device(), *self.train_flags)
        # steps end the training of a quick trial, whatever time it took
        seconds = wanted if self.arguments.max_steps else stop
        self.progress.write_text(json.dumps({"seconds": seconds, "flags": self.train_flags}) + "\n")
        return seconds >= wanted

    def fit(self) -> bool:
        """Whether the pick's weights of words are fitted at full length."""
        if not self.fitted.is_file():
            if self.left() <= 0:
                return False
            a = self.arguments
            flags = ["--texts", a.texts, "--chunks", a.chunks, "--questions", a.text_questions]
            files = ("--data", self.data, "--adapter", self.adapter, "--out", self.fitted)
            self.call("fit_words.py", *files, *flags, *self.device())
        return True

    def last(self) -> Path:
        """The adapter that is evaluated and exported."""
        return self.fitted if self.fitted.is_file() else self.adapter

    def evaluate(self) -> bool:
        """Whether all parts are evaluated."""
        if self.left() <= 0:
            return False
        a = self.arguments
        flags: list[object] = ["--limit", max(1.0, self.left() - a.margin), "--questions", a.questions]
        flags += ["--squad", a.questions, "--counting", a.counting, "--points", a.points]
        for name, values in (("lengths", a.lengths), ("squad-lengths", a.squad_lengths), ("seeds", a.seeds)):
            flags += [f"--{name}", *values]
        files = ("--data", self.data, "--adapter", self.last(), "--out", self.results)
        return self.call("evaluate.py", *files, *flags, *self.device()) == 0

    def export(self) -> bool:
        """Whether the package's adapter is written, which needs the package."""
        if not package_is_there():
            print("export: sharedllm_ext is not there; run this stage where it is", flush=True)
            return True
        if not self.exported.is_file():
            self.call("export.py", "--data", self.data, "--adapter", self.last(), "--out", self.exported)
        return True

    def device(self) -> list[str]:
        return ["--device", self.arguments.device] if self.arguments.device else []


def main() -> None:
    own, train_flags = sys.argv[1:], []
    if "--" in own:
        own, train_flags = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of prepare.py; made if it is not there")
    parser.add_argument("--downloads", type=Path, help="folder of the wheels and .deb files, for prepare.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds of this call")
    parser.add_argument("--margin", type=float, default=TRAINING_MARGIN, help="seconds kept for starting and saving")
    parser.add_argument("--seconds", type=float, default=800.0, help="of training, over all calls")
    parser.add_argument("--max-steps", type=int, help="end the training earlier (for a quick trial)")
    parser.add_argument("--workers", type=int, default=13, help="processes that make batches")
    parser.add_argument("--texts", type=int, default=16, help="to which the words are fitted")
    parser.add_argument("--chunks", type=int, default=126, help="of such a text")
    parser.add_argument("--text-questions", type=int, default=200, help="about such a text")
    parser.add_argument("--lengths", type=int, nargs="*", default=[7, 32, 128, 512, 1024], help="evaluated, in chunks")
    parser.add_argument("--squad-lengths", type=int, nargs="*", default=[32, 128])
    parser.add_argument("--questions", type=int, default=100, help="of each task")
    parser.add_argument("--counting", type=int, default=20, help="questions of each task of counting.py")
    parser.add_argument("--points", type=int, default=24, help="windows of which perplexity is taken")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="of the evaluation")
    parser.add_argument("--device", help="CUDA where there is one, by default")
    run = Run(parser.parse_args(own), train_flags)
    run.out.mkdir(parents=True, exist_ok=True)
    if run.progress.is_file() and json.loads(run.progress.read_text())["flags"] != run.train_flags:
        known = json.loads(run.progress.read_text())["flags"]
        raise SystemExit(f"--: expected {known} as this run was begun with, got {run.train_flags}; give another --out")
    for stage in run.arguments.stages:
        start = time.monotonic()
        done = getattr(run, stage)()
        print(f"{stage}: {'done' if done else 'not done'}, {time.monotonic() - start:.0f} s", flush=True)
        if not done:
            print("the same command goes on", flush=True)
            raise SystemExit(GO_ON)


if __name__ == "__main__":
    main()

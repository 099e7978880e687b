"""Benchmarks on the GPU: first every result against float64, then times beside the peers and this GPU's ceilings.

python benchmarks/run_gpu.py                    # tables of everything
python benchmarks/run_gpu.py --only decoding    # cases whose name matches
python benchmarks/run_gpu.py --write            # the tables into RESULTS.md too
python benchmarks/run_gpu.py --save-baseline    # times into baselines/<GPU>.json
python benchmarks/run_gpu.py --compare          # exit code 1 if a kernel is slower than there

Cold L2 cache, medians of CUDA-event times of one call; see docs/benchmarks.md.
"""

import argparse
import datetime
import gc
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import baseline
import cases
import torch
from cases import Case, Unavailable
from device_time import ceilings, graph_us, median_us

from sharedllm_ext import _library

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
#: Time of a function that is called often enough for a steady median.
ENOUGH_SECONDS = 0.5


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: all right; 1: a wrong result, a failed case or a slowdown; 2: nothing could be measured."""
    arguments = parse(argv)
    chosen = [case for case in cases.CASES if re.search(arguments.only, case.name)]
    if arguments.list or not chosen:
        print("\n".join(case.name for case in chosen or cases.CASES))
        return 0 if chosen else 2
    if not torch.cuda.is_available():
        print("run_gpu: expected a CUDA device, got none that torch sees", file=sys.stderr)
        return 2
    before = None
    try:
        if arguments.compare is not None:
            before = baseline.load(Path(arguments.compare or baseline.path_of(torch.cuda.get_device_name())))
    except ValueError as error:
        print(f"run_gpu: {error}", file=sys.stderr)
        return 2
    session = Session(chosen, arguments.seconds, peers=not (arguments.no_peers or before))
    session.check()
    session.time()
    report = session.report()
    print(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(session.document(), indent=2) + "\n")
    if arguments.write:
        write_section(RESULTS, f"run_gpu.py: {session.header['gpu']}", report)
    if arguments.save_baseline and session.failures == 0:
        path = baseline.path_of(session.header["gpu"])
        baseline.save(path, session.header, session.ceilings, session.times())
        print(f"baseline written to {path}")
    slower = session.compare(before) if before else 0
    print(session.verdict(slower))
    return 1 if session.failures or slower else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150, help="budget of the whole run (default %(default)s)")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches, see --list")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--no-peers", action="store_true", help="time this package alone")
    parser.add_argument("--write", action="store_true", help="put the tables into benchmarks/RESULTS.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--save-baseline", action="store_true", help="write benchmarks/baselines/<GPU>.json")
    parser.add_argument(
        "--compare", nargs="?", const="", metavar="FILE", help="compare with the baseline of this GPU, or with FILE"
    )
    arguments = parser.parse_args(argv)
    if arguments.save_baseline and (arguments.only or arguments.compare is not None):
        parser.error("--save-baseline: expected neither --only nor --compare: a baseline holds every case")
    return arguments


class Session:
    """One run: checks, times and what went wrong.

    Attributes:
        results: for each case, microseconds of ``ours``, of its peers and of replays (``graph``, ``graph of …``).
        notes: for each case without a time, why.
        red: for each operator with a wrong result, what is wrong.
        failures: red operators and cases that failed.
    """

    def __init__(self, chosen: Sequence[Case], seconds: float, peers: bool) -> None:
        self.chosen, self.peers = chosen, peers
        self.end = time.monotonic() + seconds
        self.header = header()
        self.ceilings = ceilings()
        self.results: dict[str, dict[str, float]] = {case.name: {} for case in chosen}
        self.notes: dict[str, str] = {}
        self.red: dict[str, str] = {}
        self.failures = 0

    def check(self) -> None:
        """Compare the result of every case with float64 or eager PyTorch."""
        for case in self.chosen:
            wrong = self.guarded(case, lambda case=case: case.build().check())  # type: ignore[misc]
            if wrong:
                self.red.setdefault(case.operator, f"{case.name}: {wrong}")
        for operator in dict.fromkeys(case.operator for case in self.chosen):
            blocked = self.red.get(operator)
            self.failures += blocked is not None
            print(f"{operator}: {'red: ' + blocked if blocked else 'result ok'}", file=sys.stderr)

    def time(self) -> None:
        """Time ours of every case, then the peers as far as the budget goes."""
        for number, case in enumerate(self.chosen):
            if case.operator in self.red:
                self.notes[case.name] = "red"
            if case.name in self.notes:
                continue
            left = self.end - time.monotonic()
            share = left / (len(self.chosen) - number) / (len(case.peers) + 1 if self.peers else 1)
            seconds = min(max(share, 0.05), ENOUGH_SECONDS)
            wrong = self.guarded(case, lambda case=case, seconds=seconds: self.time_case(case, seconds))  # type: ignore[misc]
            if wrong:
                self.notes[case.name] = wrong
                self.failures += 1

    def guarded(self, case: Case, action: Callable[[], str | None]) -> str | None:
        """The action's message, or that of its exception; the case's tensors are freed."""
        try:
            return action()
        except Unavailable as reason:
            self.notes[case.name] = f"not here: {reason}"
            return None
        except Exception as error:  # one case that fails must not hide the others
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        finally:
            gc.collect()
            torch.cuda.empty_cache()

    def time_case(self, case: Case, seconds: float) -> None:
        """Time ours, then each peer; a peer that cannot run here has no time."""
        built, found = case.build(), self.results[case.name]
        for name in ("ours", *case.peers) if self.peers else ("ours",):
            if name != "ours" and time.monotonic() > self.end:
                break
            try:
                call = built.prepare[name]()
                found[name] = median_us(call, seconds=seconds)
                if case.graph and self.peers and name not in ("eager", "cosine", "products"):
                    found["graph" if name == "ours" else f"graph of {name}"] = graph_time(call)
            except Exception as error:
                if name == "ours":
                    raise
                found[name] = math.nan
                print(
                    f"{case.name}: no time of {name}: {str(error).splitlines()[0] if str(error) else error!r}",
                    file=sys.stderr,
                )

    def times(self) -> dict[str, float]:
        """Microseconds of ours, by case."""
        return {name: found["ours"] for name, found in self.results.items() if "ours" in found}

    def compare(self, before: dict[str, Any]) -> int:
        """Print what is slower than the baseline; the number of these cases."""
        by_name = {case.name: case for case in self.chosen}
        old = {name: us for name, us in before["microseconds"].items() if name in by_name}
        unknown = [name for name in before["microseconds"] if name not in {case.name for case in cases.CASES}]

        def again(name: str) -> float:
            found: dict[str, float] = {}

            def measure() -> None:
                found["us"] = median_us(by_name[name].build().prepare["ours"](), seconds=ENOUGH_SECONDS)

            self.guarded(by_name[name], measure)
            return found.get("us", math.nan)

        found = baseline.compare(old, self.times(), again)
        for finding in found:
            print(f"slower: {finding}")
        for name in unknown:
            print(f"slower: {name}: expected a case of this name (it is in the baseline), got none")
        for change in baseline.ceiling_changes(before.get("ceilings", {}), self.ceilings):
            print(f"the machine differs from the baseline's: {change}")
        return len(found) + len(unknown)

    def report(self) -> str:
        """Header and tables as markdown."""
        h, c = self.header, self.ceilings
        lines = [
            f"{h['gpu']}, driver {h['driver']}, CUDA {h['cuda']}, torch {h['torch']}, commit {h['commit']},"
            f" {h['date']}.",
            f"Ceilings of this run: copy {c['copy'] / 1e12:.2f} TB/s read + written, read {c['read'] / 1e12:.2f} TB/s,"
            f" bf16 GEMM 8192 {c['gemm'] / 1e12:.0f} TFLOP/s.",
        ]
        table = None
        for case in self.chosen:
            if case.table != table:
                table = case.table
                lines += ["", f"### {table}", ""]
                lines.append("| shape | us | TFLOP/s | GB/s | % ceiling | x best peer | us from a graph | peers, us |")
                lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
            lines.append(self.line(case))
        return "\n".join(lines)

    def line(self, case: Case) -> str:
        """One line of a table."""
        found = self.results[case.name]
        us = found.get("ours", math.nan)
        if math.isnan(us):
            return f"| {case.shape} | {self.notes.get(case.name, '-')} | - | - | - | - | - | - |"
        tflops = f"{case.flops / us / 1e6:,.1f}" if case.flops else "-"
        known = {name: found.get(name, math.nan) for name in case.peers} if self.peers else {}
        best = min((x for x in known.values() if not math.isnan(x)), default=math.nan)
        factor = "-" if math.isnan(best) else f"{best / us:.2f}"
        peers = ", ".join(f"{name} {number(x)}" for name, x in known.items()) or "-"
        replayed = [f"{name.removeprefix('graph of ')} {number(x)}" for name, x in found.items() if "graph of" in name]
        graph = ", ".join([number(found["graph"]), *replayed]) if "graph" in found else "-"
        return (
            f"| {case.shape} | {number(us)} | {tflops} | {case.bytes / us / 1e3:,.0f} |"
            f" {case.floor_us(self.ceilings) / us:.0%} | {factor} | {graph} | {peers} |"
        )

    def document(self) -> dict[str, Any]:
        """Everything measured, for JSON."""
        rows = [
            {
                "case": case.name,
                "operator": case.operator,
                "flops": case.flops,
                "bytes": case.bytes,
                "floor_us": case.floor_us(self.ceilings),
                "microseconds": {
                    name: None if math.isnan(us) else round(us, 2) for name, us in self.results[case.name].items()
                },
                "note": self.notes.get(case.name),
            }
            for case in self.chosen
        ]
        return {**self.header, "ceilings": self.ceilings, "red": self.red, "cases": rows}

    def verdict(self, slower: int) -> str:
        """Last line."""
        parts = [f"{len(self.times())} of {len(self.chosen)} cases timed"]
        parts += [f"red: {', '.join(self.red)}"] if self.red else []
        failed = [name for name, note in self.notes.items() if note != "red" and not note.startswith("not here")]
        parts += [f"failed: {'; '.join(f'{name} ({self.notes[name]})' for name in failed)}"] if failed else []
        parts += [f"{slower} slower than the baseline"] if slower else []
        return ". ".join(parts)


def graph_time(call: Callable[[], object]) -> float:
    """Time of a graph replay; NaN for a call that cannot be captured."""
    try:
        return graph_us(call)
    except Exception:
        torch.cuda.synchronize()
        return math.nan


def number(us: float) -> str:
    """Microseconds for a table."""
    return "-" if math.isnan(us) else f"{us:,.1f}" if us < 1000 else f"{us:,.0f}"


def commit() -> str:
    """Revision of the build, or of the checkout if the build recorded none."""
    built = str(_library.build_info()["revision"])
    if built != "unknown":
        return built
    return output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12") or built


def header() -> dict[str, str]:
    """Where and when."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0") or "unknown",
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        # of the build that runs, which may be older than the checkout
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def output(*command: str) -> str | None:
    """First line that a program prints; ``None`` if it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return result.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def write_section(path: Path, name: str, text: str, title: str = "GPU kernels beside their peers") -> None:
    """Replace the text between a section's marks, or append the section."""
    begin, end = f"<!-- {name}: begin, written by --write -->", f"<!-- {name}: end -->"
    section = f"{begin}\n{text}\n{end}"
    content = path.read_text()
    if begin in content and end in content:
        head, rest = content.split(begin, 1)
        content = head + section + rest.split(end, 1)[1]
    else:
        content = f"{content.rstrip()}\n\n## {title}\n\n{section}\n"
    path.write_text(content)


if __name__ == "__main__":
    sys.exit(main())

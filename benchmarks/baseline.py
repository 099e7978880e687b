"""Stored times of one GPU model, and the comparison with them. Plain Python: no GPU and no torch needed."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent / "baselines"
#: A case is slower if it takes more than this share longer …
TOLERANCE = 0.05
#: … and this many microseconds: below some 20 us the events' resolution and the clocks move a time by more than 5%.
SLACK_US = 1.0
#: How often a case that looks slower is measured again; the fastest of all its medians counts.
REPEATS = 3


class Finding(NamedTuple):
    """One case that is slower than its baseline, or was not measured (``now`` is NaN)."""

    case: str
    before: float
    now: float

    def __str__(self) -> str:
        if math.isnan(self.now):
            return f"{self.case}: expected a time (baseline {self.before:.1f} us), got none"
        return f"{self.case}: {self.now:.1f} us, baseline {self.before:.1f} us ({self.now / self.before - 1:+.1%})"


def path_of(gpu: str) -> Path:
    """File of a GPU model's baseline, by the name that CUDA reports."""
    return FOLDER / f"{re.sub(r'[^A-Za-z0-9.]+', '-', gpu).strip('-')}.json"


def is_slower(before: float, now: float, tolerance: float = TOLERANCE, slack_us: float = SLACK_US) -> bool:
    """Whether ``now`` is a slowdown and not noise; a time that is not a number counts as one."""
    return not now <= before + max(before * tolerance, slack_us)


def compare(
    before: Mapping[str, float],
    now: Mapping[str, float],
    measure_again: Callable[[str], float],
    tolerance: float = TOLERANCE,
    slack_us: float = SLACK_US,
    repeats: int = REPEATS,
) -> list[Finding]:
    """Cases that stay slower than the baseline when measured again.

    Args:
        before: microseconds of each case in the baseline.
        now: microseconds of each case in this run; cases that the baseline does not know are no finding.
        measure_again: microseconds of a case, measured once more.

    Returns:
        Findings in the baseline's order; a case of the baseline without a time in this run is one.
    """
    found = []
    for case, old in before.items():
        new = now.get(case, math.nan)
        if math.isnan(new):
            found.append(Finding(case, old, math.nan))
            continue
        for _ in range(repeats):
            if not is_slower(old, new, tolerance, slack_us):
                break
            again = measure_again(case)
            new = new if math.isnan(again) else min(new, again)
        if is_slower(old, new, tolerance, slack_us):
            found.append(Finding(case, old, new))
    return found


def save(path: Path, header: Mapping[str, Any], ceilings: Mapping[str, float], times: Mapping[str, float]) -> None:
    """Write a baseline: where and when it was measured, the ceilings of that run, microseconds of each case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        **header,
        "ceilings": {name: float(f"{rate:.4g}") for name, rate in ceilings.items()},
        "microseconds": {case: round(us, 2) for case, us in times.items() if not math.isnan(us)},
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def load(path: Path) -> dict[str, Any]:
    """Read a baseline.

    Raises:
        ValueError: the file is missing or is none; the message says how to write one.
    """
    try:
        content = json.loads(path.read_text())
        times = {str(case): float(us) for case, us in content["microseconds"].items()}
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        remedy = "python benchmarks/run_gpu.py --save-baseline"
        raise ValueError(f"{path}: expected a baseline, got {error!r}; write one with: {remedy}") from error
    if not times or not all(us > 0 for us in times.values()):
        raise ValueError(f"{path}: expected microseconds above 0 for at least one case, got {times}")
    return {**content, "microseconds": times}


def ceiling_changes(before: Mapping[str, float], now: Mapping[str, float], tolerance: float = TOLERANCE) -> list[str]:
    """Ceilings that differ from the baseline's: then the machine changed, not (only) the code."""
    return [
        f"{name}: {now[name]:.4g}, baseline {rate:.4g} ({now[name] / rate - 1:+.1%})"
        for name, rate in before.items()
        if name in now and abs(now[name] / rate - 1) > tolerance
    ]

"""Table of a pytest-benchmark run: the operator beside the same expression in eager PyTorch, and the best peer.

python -m pytest benchmarks --benchmark-json=benchmarks.json
python benchmarks/report.py benchmarks.json
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

EAGER = ("eager", "cosine")


def main(argv: list[str] | None = None) -> int:
    """Print the table as markdown; exit code 1 if a case is slower than eager PyTorch."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("results", type=Path, help="file written by --benchmark-json")
    arguments = parser.parse_args(argv)
    try:
        document = json.loads(arguments.results.read_text())
        table = rows(document["benchmarks"])
    except (OSError, json.JSONDecodeError, KeyError) as error:
        text = f"report: {arguments.results}: expected the JSON file of a pytest-benchmark run, got {error!r}"
        print(text, file=sys.stderr)
        return 2
    machine, commit = document["machine_info"], document["commit_info"]
    print(f"{machine['cpu'].get('brand_raw', machine['machine'])}, {machine['cpu']['count']} cores,")
    print(f"commit {str(commit.get('id'))[:12]}, {document['datetime'][:10]}. Medians; x = their time over ours.\n")
    print("| case | ours, us | eager, us | x eager | x best peer |")
    print("| --- | ---: | ---: | ---: | ---: |")
    slow = 0
    for case, ours, eager, best in table:
        slow += eager < ours
        print(f"| {case} | {ours:,.1f} | {eager:,.1f} | {eager / ours:.2f} | {best / ours:.2f} |")
    return 1 if slow else 0


def rows(benchmarks: list[dict[str, Any]]) -> list[tuple[str, float, float, float]]:
    """(case, ours, eager, best other) medians in microseconds, in the order of the run."""
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for benchmark in benchmarks:
        found = re.search(r"\b(ours|eager|cosine|products|fused|flash|cudnn|padded|compile)\b", benchmark["name"])
        if found:
            groups[benchmark["group"]][found[1]] = benchmark["stats"]["median"] * 1e6
    table = []
    for group, times in groups.items():
        eager = next((times[name] for name in EAGER if name in times), None)
        if "ours" in times and eager is not None:
            best = min(time for name, time in times.items() if name != "ours")
            table.append((group.replace("torch.", ""), times["ours"], eager, best))
    return table


if __name__ == "__main__":
    sys.exit(main())

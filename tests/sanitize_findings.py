"""What compute-sanitizer found, by kernel: reads the logs of one tool of ``sanitize.sh``.

python tests/sanitize_findings.py TOOL LOG [LOG ...]

One line for each kernel and kind of finding. Exits with 1 if there is one that no entry of :data:`SUPPRESSIONS` covers,
if the tool counted more than a log shows, or if it did not come to its end.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

CALL = "call: "
BEGINNING = re.compile(r"=+ (Error|Warning|Uninitialized|Invalid|Misaligned|Barrier|Program hit|Leaked|Host API)")
PLACE = re.compile(
    r"(?:\bat|\bin|\(block rank \d+\)) (?:void )?(?P<kernel>\S.*?)\+(?P<offset>0x[0-9a-f]+)(?: in (?P<source>\S+))?"
)
SUMMARY = re.compile(r"SUMMARY: (?P<count>\d+) (?:errors?|hazards? displayed)")


@dataclasses.dataclass(frozen=True)
class Suppression:
    """Findings that the tool is known to be wrong about."""

    tool: str
    kernel: str  # regular expressions
    kind: str
    reason: str


# The tool (2025.3) follows an mbarrier only from the lane that arrives. Where a warp's lanes read a stage, meet in
# __syncwarp or in a vote that needs what they read, and lane 0 arrives for all of them, it takes the other lanes' reads
# for unordered against what the producer writes into the stage next: in a ring of twenty lines for all bytes but those
# of lane 0, and for none where every lane arrives. The first kernel has no finding either where every lane arrives. The
# release notes list false positives with mbarriers that are mended in later versions (2025.4, 2026.1).
_ACCESSES = r"Race reported between (Read access and Write|Write access and Read) access$"
_LANE_ZERO = "one lane arrives at the mbarrier for its warp, which the tool does not follow"
SUPPRESSIONS: tuple[Suppression, ...] = (
    Suppression("racecheck", r"injected_attention_backward_kernel<", _ACCESSES, _LANE_ZERO),
    # with bulk copies (the last argument), where the scales of 8-bit keys and values go by ordinary copies
    Suppression("racecheck", r"decode::attend<decode::Config<\w+, signed char, .*, 1>>$", _ACCESSES, _LANE_ZERO),
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """A kernel, what is wrong, where in its machine code or source, and the call that ran it."""

    kernel: str
    kind: str
    places: tuple[str, ...]
    call: str


def short(kernel: str) -> str:
    """A kernel's name and template arguments."""
    kernel = re.sub(r"\((?:int|unsigned int|long|bool|__half|__nv_bfloat16)\)", "", kernel)
    kernel = re.sub(r"sharedllm::|<unnamed>::|\(anonymous namespace\)::", "", kernel)
    return kernel.split("(")[0]


def finding(block: list[str], call: str) -> Finding:
    """One block of a log."""
    places = [match for match in map(PLACE.search, block) if match]
    kind = re.sub(r"^=+ (?:(?:Error|Warning): )?", "", block[0])
    kind = re.sub(r"(?<=access) at .*| at __shared__ 0x.*", "", kind).strip(" :.")
    if kind.startswith("Race reported between"):
        kind += "".join(re.findall(r" and (?:Read|Write) access(?= at)", " ".join(block[1:2])))
    where = tuple(match["source"] or "+" + match["offset"] for match in places)
    return Finding(short(places[0]["kernel"]) if places else "?", kind, where, call)


def findings(lines: Iterable[str]) -> Iterator[Finding]:
    """All findings of a log."""
    call, block = "before the first call", list[str]()
    for line in lines:
        begins = BEGINNING.match(line)
        inside = line.startswith("=====") and line.strip("= \n")
        if block and (begins or not inside):
            yield finding(block, call)
            block = []
        if line.startswith(CALL):
            call = line[len(CALL) :].strip()
        elif begins or (block and inside):
            block.append(line.rstrip())
    if block:
        yield finding(block, call)


def names(values: Iterable[str], most: int = 2) -> str:
    """The first of these and how many more there are."""
    distinct = list(dict.fromkeys(values))
    more = len(distinct) - most
    return "; ".join(distinct[:most]) + (f"; {more} more" if more > 0 else "")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("tool", help="memcheck, racecheck, initcheck or synccheck")
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG")
    arguments = parser.parse_args(argv)
    groups: dict[tuple[str, str], list[Finding]] = {}
    complaints = []
    for log in arguments.logs:
        lines = log.read_text(errors="replace").splitlines()
        shown = list(findings(lines))
        for found in shown:
            groups.setdefault((found.kernel, found.kind), []).append(found)
        counts = [int(match["count"]) for match in map(SUMMARY.search, lines) if match]
        if not counts:
            complaints.append(f"  {log}: no summary, the tool did not come to its end")
        elif max(counts) > len(shown):
            complaints.append(f"  {log}: {max(counts) - len(shown)} more that the log does not show")

    wrong = len(complaints)
    for (kernel, kind), group in groups.items():
        known = next(
            (
                x
                for x in SUPPRESSIONS
                if x.tool == arguments.tool and re.match(x.kernel, kernel) and re.match(x.kind, kind)
            ),
            None,
        )
        places, calls = names((place for x in group for place in x.places), 4), names(x.call for x in group)
        print(f"  {'suppressed: ' if known else ''}{kernel}: {len(group)} x {kind}, at {places} ({calls})")
        if known:
            print(f"    {known.reason}")
        else:
            wrong += len(group)

    for complaint in complaints:
        print(complaint)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

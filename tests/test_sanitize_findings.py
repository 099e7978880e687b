"""Reading compute-sanitizer's logs."""

from pathlib import Path

import pytest

from tests import sanitize_findings
from tests.sanitize_findings import Suppression

KERNEL = "void sharedllm::ns::rows<__half, (int)64>(sharedllm::Params, CUtensorMap_st)"
LOG = f"""========= COMPUTE-SANITIZER
call: first
========= Error: Race reported between Write access at {KERNEL}+0x10
=========     and Read access at {KERNEL}+0x20 [64 hazards]
=========     and Read access at {KERNEL}+0x30 [64 hazards]
=========
========= Error: Race reported between Write access at {KERNEL}+0x10
=========     and Read access at {KERNEL}+0x20 [8 hazards]
=========
call: second
========= Uninitialized __global__ memory read of size 8 bytes
=========     at sharedllm::<unnamed>::sums(long)+0x4e70 in sums.cu:12
=========     by thread (160,0,0) in block (16,0,0)
=========     Address 0x7f2b7da000b0
=========
calls made: 2, left out: 0, failed: 0
"""


def log(folder: Path, end: str) -> list[str]:
    path = folder / "racecheck.log"
    path.write_text(LOG + end)
    return ["racecheck", str(path)]


def test_findings_by_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        sanitize_findings.main(
            log(tmp_path, "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n")
        )
        == 1
    )
    assert capsys.readouterr().out.splitlines() == [
        "  ns::rows<__half, 64>: 2 x Race reported between Write access and Read access, at +0x10; +0x20; +0x30"
        " (first)",
        "  sums: 1 x Uninitialized __global__ memory read of size 8 bytes, at sums.cu:12 (second)",
    ]


@pytest.mark.parametrize(
    ("end", "code", "last"),
    [
        ("========= ERROR SUMMARY: 3 errors\n", 0, "    because"),
        ("========= ERROR SUMMARY: 30 errors\n", 1, "27 more that the log does not show"),
        ("", 1, "no summary, the tool did not come to its end"),
    ],
)
def test_suppressed_findings(
    end: str, code: int, last: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = Suppression("racecheck", ".*", ".*", "because")
    monkeypatch.setattr(sanitize_findings, "SUPPRESSIONS", (everything,))
    assert sanitize_findings.main(log(tmp_path, end)) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith(last)
    assert sum(line.startswith("  suppressed: ") for line in lines) == 2
    monkeypatch.setattr(sanitize_findings, "SUPPRESSIONS", (Suppression("memcheck", ".*", ".*", "because"),))
    assert sanitize_findings.main(log(tmp_path, end)) == 1


def test_a_clean_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "memcheck.log"
    path.write_text("========= COMPUTE-SANITIZER\ncall: first\n========= ERROR SUMMARY: 0 errors\n")
    assert sanitize_findings.main(["memcheck", str(path)]) == 0
    assert not capsys.readouterr().out

"""Peak memory of a piece of work."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_STATM = Path("/proc/self/statm")
# from glibc's malloc.h
_M_MMAP_THRESHOLD = -3


def _status_bytes(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {key}")


def _resident_bytes() -> int:
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _give_back_freed() -> None:
    """Return freed memory to the system, so that a length does not pay for what an earlier one held."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def keep_no_freed_blocks() -> None:
    """Make the allocator return every freed block of 1 MiB or more at once, for the rest of the process (glibc only).

    glibc otherwise keeps blocks of up to 32 MiB for later, and the peak then varies by a hundred MB from run to run.
    Costs about a quarter of the compressor's speed on a CPU, because the system clears the pages again each time.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 1 << 20)


@dataclass
class PeakMemory:
    """The highest memory of a measured piece of work in bytes, 0 until it is over, and what was measured."""

    bytes: int
    kind: str


@contextlib.contextmanager
def measure_peak(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the peak memory of the ``with`` block.

    CUDA: torch's allocated peak on the device. CPU: the process's resident memory, through the kernel's high-water
    mark where it can be reset (Linux), else sampled every 5 ms. Elsewhere the mark of the whole process, which cannot
    be reset.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        peak = PeakMemory(0, "CUDA memory allocated")
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    _give_back_freed()
    if not _STATUS.exists():
        peak = PeakMemory(0, "high-water mark of the whole process")
        yield peak
        peak.bytes = _process_mark()
        return
    try:
        _RESET.write_text("5")
    except OSError:
        with _sampled() as peak:
            yield peak
        return
    peak = PeakMemory(0, "resident memory of the process")
    yield peak
    peak.bytes = _status_bytes("VmHWM")


@contextlib.contextmanager
def _sampled() -> Iterator[PeakMemory]:
    peak = PeakMemory(0, "resident memory of the process, sampled")
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.005):
            peak.bytes = max(peak.bytes, _resident_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        stop.set()
        sampler.join()
        peak.bytes = max(peak.bytes, _resident_bytes())


def _process_mark() -> int:
    import resource

    # macOS counts bytes, the others kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""Device time of a call: CUDA events around it, nothing of the last call left in the L2 cache; ceilings of the GPU."""

import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

#: Calls timed unless the caller wants fewer, and those before them that are not counted.
ITERATIONS, WARMUP = 15, 3
#: A median this many times the fastest call is of a host that could not keep up: it is taken once more.
STALLED = 1.25
#: Bytes written, and as many read, between two calls: several times the L2 cache of any GPU so far.
FLUSH_BYTES = 256 * 2**20


@lru_cache(maxsize=1)
def _flush_buffers() -> tuple[Tensor, Tensor]:
    return tuple(torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda") for _ in range(2))  # type: ignore[return-value]


def flush_l2() -> None:
    """Drive everything out of the L2 cache.

    The reads after the write matter: written lines that stay in the cache are written back during the next call, which
    would charge it for up to an L2 cache of traffic that is not its own. Several, to keep the device busy for longer
    than a slow host needs to enqueue a call of several kernels through autograd.
    """
    written, read = _flush_buffers()
    written.zero_()
    for _ in range(9):
        read.max()


def _timed(function: Callable[[], object]) -> tuple[Any, Any]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # the device is busy with this while the host enqueues the call: launches are not part of the time
    flush_l2()
    start.record()
    function()
    end.record()
    return start, end


def one_time_us(function: Callable[[], object]) -> float:
    """Device time of one call; waits for it."""
    start, end = _timed(function)
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def median_us(function: Callable[[], object], iterations: int = ITERATIONS, seconds: float = 1.0) -> float:
    """Median device time of some calls: ``iterations`` of them, or at least 3 in about ``seconds``.

    Where the host stalls, the device waits between the call's kernels. Then the lower one of two medians counts.
    """
    for _ in range(WARMUP):
        begin = time.perf_counter()
        function()
        torch.cuda.synchronize()
        lasted = time.perf_counter() - begin
        if lasted > seconds / 4:
            break
    # the flush takes some hundred microseconds
    count = max(3, min(iterations, int(seconds / (lasted + 3e-4))))
    medians: list[float] = []
    for _ in range(2):
        events = [_timed(function) for _ in range(count)]
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) * 1e3 for start, end in events]
        medians.append(statistics.median(times))
        if medians[-1] <= STALLED * min(times):
            break
    return min(medians)


def graph_us(function: Callable[[], object], iterations: int = ITERATIONS) -> float:
    """Median device time of a replay of the call captured into a CUDA graph: what is left without launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return median_us(graph.replay, iterations)


class DeviceClock:
    """A timer for pytest-benchmark that advances by the device time of what :meth:`run` calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def run(self, function: Callable[[], object]) -> None:
        self.seconds += one_time_us(function) * 1e-6


def ceilings() -> dict[str, float]:
    """What this GPU reaches today, measured: bytes/s of a copy and of a read, floating-point operations/s in bf16."""
    return {"copy": _copy_rate(), "read": _read_rate(), "gemm": _gemm_rate()}


def _copy_rate() -> float:
    source = torch.randint(0, 100, (2**29,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_us(lambda: target.copy_(source)) * 1e6


def _read_rate() -> float:
    source = torch.randint(0, 100, (2**29,), dtype=torch.int32, device="cuda")
    # several formulations, as no single reduction is sure to reach the memory's rate
    reductions: list[Callable[[], object]] = [
        source.max,
        source.view(torch.float32).max,
        lambda: source.view(2**15, -1).amax(1),
        lambda: source.view(torch.float32).view(2**15, -1).sum(1),
    ]
    return source.nbytes / min(median_us(function) for function in reductions) * 1e6


def _gemm_rate() -> float:
    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = torch.empty_like(a)
    return 2 * size**3 / median_us(lambda: torch.mm(a, b, out=product)) * 1e6

"""The GPU cases of ``cases.py`` in pytest-benchmark: device time of one call with a cold L2 cache.

python -m pytest benchmarks/bench_gpu.py -k ours --benchmark-save=before
python -m pytest benchmarks/bench_gpu.py -k ours --benchmark-compare=0001_before --benchmark-compare-fail=median:5%
"""

import gc
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from cases import CASES, Built, Case, Unavailable
from device_time import ITERATIONS, WARMUP, DeviceClock

from tests.support import needs_cuda

clock = DeviceClock()
pytestmark = [
    needs_cuda,
    pytest.mark.benchmark(timer=clock),
]


@lru_cache(maxsize=1)
def built(case: Case) -> Built:
    """The case's tensors; those of the last case are freed."""
    gc.collect()
    torch.cuda.empty_cache()
    return case.build()


@pytest.fixture(scope="module", autouse=True)
def _free_the_last_case() -> Iterator[None]:
    yield
    built.cache_clear()


@pytest.mark.parametrize(
    ("case", "how"),
    [pytest.param(case, how, id=f"{case.name}-{how}") for case in CASES for how in ("ours", *case.peers)],
)
def test_gpu(benchmark: Any, case: Case, how: str) -> None:
    try:
        call = built(case).prepare[how]()
        call()
        torch.cuda.synchronize()
    except Unavailable as reason:
        pytest.skip(str(reason))
    except Exception as error:
        if how == "ours":
            raise
        pytest.skip(f"{how} cannot run this shape: {error}")
    benchmark.group = case.name
    benchmark.extra_info.update(flops=case.flops, bytes=case.bytes)
    benchmark.pedantic(clock.run, args=(call,), rounds=ITERATIONS, warmup_rounds=WARMUP)

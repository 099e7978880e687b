"""What the benchmarks share: their file names, the device, and one benchmark of an expression."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# "pytest benchmarks" looks into that folder alone, and the tests are no installed package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support import device

__all__ = ["device"]


def pytest_configure(config: pytest.Config) -> None:
    """Collect ``bench_*.py`` when the folder is given to pytest."""
    config.addinivalue_line("python_files", "bench_*.py")


def pytest_report_header() -> list[str]:
    """The machine, as figures mean nothing without it."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    capability = torch.backends.cpu.get_cpu_capability()
    return [f"torch {torch.__version__}, {torch.get_num_threads()} threads, {capability}, {device}"]


@pytest.fixture
def measure(benchmark: Any, device: torch.device) -> Callable[[str, Callable[[], object]], None]:
    """``measure(group, function)``: time ``function()``, finished work included; cases of one group are compared."""

    def run(group: str, function: Callable[[], object]) -> None:
        def finished() -> None:
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{group} {device.type}"
        benchmark(finished)

    return run

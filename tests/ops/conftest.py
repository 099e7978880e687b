"""Fixtures of the operator tests: devices, and uninitialised memory filled with NaN."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that the operators run on."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill fresh memory with NaN (integers: the largest value), so that leftovers never pass for results."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded CPU generator."""
    return torch.Generator().manual_seed(20260304)

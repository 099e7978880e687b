"""Fixtures of all tests: seeds, devices, fresh memory filled with NaN."""

from collections.abc import Iterator

import pytest
import torch

from .support import device, poisoned_memory

__all__ = ["device"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded CPU generator."""
    return torch.Generator().manual_seed(20260304)

"""Fixtures of all tests: seeds, devices, fresh memory filled with NaN."""

from collections.abc import Iterator

import pytest
import torch

from .support import device, poisoned_memory

__all__ = ["device"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _poison_from_the_start() -> Iterator[None]:
    # fixtures of modules are made before those of a test
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    # again for each test: one may have switched it off
    with poisoned_memory():
        yield


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded CPU generator."""
    return torch.Generator().manual_seed(20260304)

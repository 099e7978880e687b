"""Fixtures of several tests of the model."""

from collections.abc import Iterator

import pytest
from torch import Tensor

from sharedllm_ext.model.decoding import DecodeRunner, PreallocatedCache, support


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Turns decoding steps on for the CPU; lengths of the cache at which one ran."""
    lengths: list[int] = []
    end = DecodeRunner._end

    def counting(self: DecodeRunner, cache: PreallocatedCache) -> Tensor:
        lengths.append(cache.get_seq_length())
        return end(self, cache)

    monkeypatch.setattr(support, "RUN_ON_CPU", True)
    monkeypatch.setattr(DecodeRunner, "_end", counting)
    yield lengths

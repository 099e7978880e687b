"""The chunks of each process, and attention over parts of a memory put together."""

import itertools
import random

import pytest
import torch

from sharedllm_ext.distributed.sharded_memory import merge_parts
from sharedllm_ext.distributed.shares import shares_of
from sharedllm_ext.model.chunks import cut_into_chunks
from sharedllm_ext.reference import injected_attention


@pytest.mark.parametrize("seed", range(30))
def test_shares_are_all_chunks_in_order(seed: int) -> None:
    draw = random.Random(seed)
    size, processes = draw.choice([1, 4, 32]), draw.randint(1, 9)
    lengths = [draw.choice([0, 1, size, draw.randint(0, 40 * size)]) for _ in range(draw.randint(0, 5))]
    found = []
    for share in shares_of(lengths, size, processes):
        assert len(share.tokens) == len(share.first_chunks) == len(lengths)
        for document, (first, (begin, end)) in enumerate(zip(share.first_chunks, share.tokens, strict=True)):
            if begin < end:
                assert begin == first * size
                found += [(document, chunk) for chunk in range(first, -(-end // size))]
    assert found == [(chunk.document, chunk.index) for chunk in cut_into_chunks(lengths, size)]


@pytest.mark.parametrize("processes", [1, 2, 4, 7, 64])
def test_shares_are_balanced(processes: int) -> None:
    totals = [share.total for share in shares_of([1 << 20, 123_456, 0, 999], 1024, processes)]
    assert sum(totals) == (1 << 20) + 123_456 + 999
    assert max(totals) - min(totals) <= 2 * 1024


def test_more_processes_than_chunks() -> None:
    shares = shares_of([70], 32, 5)
    assert sorted(share.total for share in shares) == [0, 0, 6, 32, 32]
    assert [share.total for share in shares_of([], 32, 3)] == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_parts_are_put_together_as_if_they_were_one(dtype: torch.dtype) -> None:
    heads, shared, size, slots = 4, 2, 16, [0, 40, 0, 7, 1]
    tokens, total = 5, sum(slots)
    q, k, v = (
        torch.randn(rows, count, size, dtype=torch.float64)
        for rows, count in ((tokens, heads), (total, shared), (total, shared))
    )
    cos, sin = torch.ones(1, size // 2), torch.zeros(1, size // 2)
    cu_q, position = torch.tensor([0, tokens]), torch.tensor([0])

    def attend(low: int, high: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = (3 * q.to(dtype), k.to(dtype), v.to(dtype))
        return injected_attention(*inputs, cu_q, torch.tensor([[low, high]]), position, cos, sin, scale=0.5)

    edges = torch.tensor([0, *slots]).cumsum(0).tolist()
    parts = [attend(low, high, dtype) for low, high in itertools.pairwise(edges)]
    merged = merge_parts(*zip(*parts, strict=True))
    assert merged.dtype == dtype
    oracle, alone = attend(0, total, torch.float64)[0], attend(0, total, dtype)[0]
    error, own = ((one.double() - oracle).abs().max().item() for one in (merged, alone))
    assert error <= max(2 * own, 1e-12)


def test_rows_without_any_slot_give_zeros() -> None:
    outs, lses = [torch.zeros(2, 3, 4)] * 2, [torch.full((2, 3), -torch.inf)] * 2
    assert torch.equal(merge_parts(outs, lses), outs[0])

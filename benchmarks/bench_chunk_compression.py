"""Chunk compression: the C++ kernels against rotate-half and index_select in eager PyTorch."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import eager
import pytest
import torch
from torch import Tensor

from sharedllm_ext.ops.chunk_compression import chunk_compression, chunk_compression_backward

# short runs: these files together stay under 40 seconds on two cores
pytestmark = pytest.mark.benchmark(max_time=0.25, min_rounds=3, warmup=True, warmup_iterations=2)

HQ, HKV, D, CHUNK, SLOTS = 32, 8, 128, 1024, 128


@lru_cache(maxsize=2)
def arguments(chunks: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Queries, keys and values; half tables and the eager expression's full ones; positions, kept tokens, rotations."""
    tokens = chunks * CHUNK
    angle = torch.outer(torch.arange(2 * CHUNK), 10000.0 ** (-torch.arange(D // 2) / (D // 2)))
    half = (angle.cos(), angle.sin())
    full = eager.full_tables(*half, dtype)
    positions = torch.arange(tokens) % CHUNK
    keep = torch.arange(0, tokens, CHUNK // SLOTS)
    data = (torch.randn(tokens, HQ, D), torch.randn(tokens, HKV, D), torch.randn(tokens, HKV, D))
    return tuple(x.to(dtype) for x in data), (*half, *full), (positions, keep, positions[keep] + keep // CHUNK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("chunks", "what"), [(1, "all"), (3, "all"), (4, "kept")])
@pytest.mark.parametrize("how", ["ours", "eager"])
def test_forward(benchmark: Callable[..., Any], how: str, chunks: int, what: str, dtype: torch.dtype) -> None:
    parts = "queries, keys, memory" if what == "all" else "memory alone"
    benchmark.group = (
        f"chunk_compression: {chunks} x {CHUNK} tokens, {HQ}/{HKV} heads of {D}, {parts}, {str(dtype)[6:]}"
    )
    (q, k, v), (cos, sin, *full), (positions, keep, at) = arguments(chunks, dtype)
    given = (q, positions) if what == "all" else (None, None)
    if how == "ours":
        benchmark(chunk_compression, given[0], k, v, cos, sin, given[1], given[1], keep, at)
    else:
        benchmark(eager.compression, given[0], k, v, full, given[1], given[1], keep, at)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["ours", "eager"])
def test_backward(benchmark: Callable[..., Any], how: str, dtype: torch.dtype) -> None:
    benchmark.group = f"chunk_compression_backward: 2 x {CHUNK} tokens, {HQ}/{HKV} heads of {D}, {str(dtype)[6:]}"
    (q, k, v), (cos, sin, *full), (positions, keep, at) = arguments(2, dtype)
    grads = (q, k, k[keep], v[keep])
    if how == "ours":
        benchmark(chunk_compression_backward, *grads, cos, sin, positions, positions, keep, at, len(k))
    else:
        benchmark(eager.compression_backward, *grads, full, positions, keep, at)

"""Operators compute in their arguments' dtypes under autocast too."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sharedllm_ext import ops


def _tables() -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(32.0), 0.5 ** torch.arange(4))
    return angles.cos(), angles.sin()


def _injected_attention(dtype: torch.dtype) -> Tensor:
    q, k, v = (torch.randn(6, heads, 8, dtype=dtype) for heads in (4, 2, 2))
    rows = torch.tensor([0, 6]), torch.tensor([[0, 6]]), torch.tensor([3])
    return ops.injected_attention(q, k, v, *rows, *_tables(), scale=0.3)[0]


def _node_vectors(dtype: torch.dtype) -> Tensor:
    q, k, v = torch.randn(2, 4, 8, dtype=dtype), *torch.randn(2, 9, 2, 8, dtype=dtype)
    return ops.node_vectors(q, k, v, torch.tensor([[0, 5], [5, 4]]), *_tables(), scale=0.3)


def _topk_nodes(dtype: torch.dtype) -> Tensor:
    queries, nodes = torch.randn(1, 8, dtype=dtype), torch.randn(6, 8, dtype=dtype)
    return ops.topk_nodes(queries, nodes, torch.tensor([0, 6]), torch.tensor([0]), 3)[1]


def _rms_norm(dtype: torch.dtype) -> Tensor:
    return ops.rms_norm(torch.randn(5, 16, dtype=dtype), torch.randn(16, dtype=dtype), 1e-6)


def _decode_linear(dtype: torch.dtype) -> Tensor:
    return ops.decode_linear(torch.randn(1, 16, dtype=dtype), [torch.randn(8, 16, dtype=dtype)])


def _decode_linear_fp8(dtype: torch.dtype) -> Tensor:
    codes, scale = ops.quantize_rows_fp8(torch.randn(8, 16, dtype=dtype))
    return ops.decode_linear_fp8(torch.randn(1, 16, dtype=dtype), [codes], [scale])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "operator",
    [_injected_attention, _node_vectors, _topk_nodes, _rms_norm, _decode_linear, _decode_linear_fp8],
)
def test_autocast_changes_no_bit(operator: Callable[[torch.dtype], Tensor], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    want = operator(dtype)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = operator(dtype)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)

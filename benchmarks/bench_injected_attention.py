"""Injected attention: the kernels against the same expression in eager PyTorch, and PyTorch's fused attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sharedllm_ext.ops.injected_attention import _plain, _plain_backward

# short runs: all benchmarks together stay under two minutes on two cores
pytestmark = pytest.mark.benchmark(max_time=0.2, min_rounds=3, warmup=True, warmup_iterations=1)

# queries, slots, Hq, Hkv, D of one row
SHAPES = {
    "prefill, 32/8 heads of 128": (128, 1024, 32, 8, 128),
    "prefill, 4/2 heads of 64": (512, 4096, 4, 2, 64),
    "decode, 32/8 heads of 128": (1, 4096, 32, 8, 128),
    "decode, 4/2 heads of 64": (1, 16384, 4, 2, 64),
}


def problem(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, ...], float]:
    """Arguments of one row."""
    queries, slots, q_heads, kv_heads, size = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(queries, q_heads, size, generator=generator).to(dtype)
    k, v = (torch.randn(slots, kv_heads, size, generator=generator).to(dtype) for _ in range(2))
    angle = torch.arange(129).unsqueeze(1) * torch.logspace(0, -4, size // 2)
    rows = (torch.tensor([0, queries]), torch.tensor([[0, slots]]), torch.tensor([128]))
    return tuple(x.to(device) for x in (q, k, v, *rows, angle.cos(), angle.sin())), size**-0.5


# rows of one query that share a memory, slots, Hq, Hkv, D
SHARED = {
    f"{rows} rows of one memory, {q_heads}/{kv_heads} heads of {size}": (rows, 16384, q_heads, kv_heads, size)
    for q_heads, kv_heads, size in ((9, 3, 64), (32, 8, 128))
    for rows in (8, 64, 256)
}


def one_by_one(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[tuple[Tensor, Tensor]]:
    """Every row in a call of its own: each reads the whole memory."""
    _, slot_range, position, *tables = rest
    one = torch.tensor([0, 1])
    return [
        torch.ops.sharedllm.injected_attention(
            q[row : row + 1], k, v, one, slot_range[row : row + 1], position[row : row + 1], *tables
        )
        for row in range(q.shape[0])
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHARED)
@pytest.mark.parametrize("how", ["ours", "eager", "one by one"])
def test_rows_of_one_memory(
    measure: Callable[[str, Callable[[], object]], None], how: str, shape: str, dtype: torch.dtype, device: torch.device
) -> None:
    if how == "one by one" and SHARED[shape][0] > 64:
        pytest.skip("proportional to the rows")
    tensors, scale = problem(SHARED[shape], dtype, device)
    rows = SHARED[shape][0]
    shared = (torch.arange(rows + 1), torch.tensor([[0, SHARED[shape][1]]] * rows), torch.full((rows,), 128))
    arguments = (*tensors[:3], *(x.to(device) for x in shared), *tensors[6:], scale)
    functions: dict[str, Callable[..., object]] = {
        "ours": torch.ops.sharedllm.injected_attention,
        "eager": _plain,
        "one by one": one_by_one,
    }
    measure(f"injected_attention {shape}, {dtype}", lambda: functions[how](*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["ours", "eager", "fused"])
def test_forward(
    measure: Callable[[str, Callable[[], object]], None], how: str, shape: str, dtype: torch.dtype, device: torch.device
) -> None:
    tensors, scale = problem(SHAPES[shape], dtype, device)
    # without lse and rotation, which it cannot do
    heads_first = [x.transpose(0, 1).unsqueeze(0) for x in tensors[:3]]
    functions: dict[str, Callable[[], object]] = {
        "ours": lambda: torch.ops.sharedllm.injected_attention(*tensors, scale),
        "eager": lambda: _plain(*tensors, scale),
        "fused": lambda: torch.nn.functional.scaled_dot_product_attention(*heads_first, enable_gqa=True),
    }
    measure(f"injected_attention {shape}, {dtype}", functions[how])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [name for name in SHAPES if name.startswith("prefill")])
@pytest.mark.parametrize("need_grad_kv", [False, True], ids=["grad_q", "grad_qkv"])
@pytest.mark.parametrize("how", ["ours", "eager"])
def test_backward(
    measure: Callable[[str, Callable[[], object]], None],
    how: str,
    need_grad_kv: bool,
    shape: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    (q, k, v, *rest), scale = problem(SHAPES[shape], dtype, device)
    out, lse = torch.ops.sharedllm.injected_attention(q, k, v, *rest, scale)
    function = torch.ops.sharedllm.injected_attention_backward if how == "ours" else _plain_backward
    group = f"injected_attention_backward {shape}, {dtype}, {'grad_qkv' if need_grad_kv else 'grad_q'}"
    grad_out = torch.ones_like(out)
    measure(group, lambda: function(grad_out, None, q, k, v, out, lse, *rest, scale, need_grad_kv))

"""Host time of one eager call of injected attention: one query and eight slots, so that the kernel takes next to none.

On CUDA nothing waits for the device: its work on this problem is shorter than the host's.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sharedllm_ext.ops import injected_attention

SLOTS, SIZE = 8, 64


@pytest.mark.parametrize("how", ["without gradients", "with gradients", "operator alone"])
def test_injected_attention(benchmark: Any, how: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, heads, SIZE, generator=generator) for n, heads in ((1, 4), (SLOTS, 2), (SLOTS, 2)))
    rows = (torch.tensor([0, 1]), torch.tensor([[0, SLOTS]]), torch.tensor([1]))
    tables = (torch.ones(4, SIZE // 2), torch.zeros(4, SIZE // 2))
    tensors: list[Tensor] = [x.to(device) for x in (q, k, v, *rows, *tables)]
    tensors[0].requires_grad_(how == "with gradients")
    functions: dict[str, Callable[..., object]] = {"operator alone": torch.ops.sharedllm.injected_attention}
    function = functions.get(how, injected_attention)
    with torch.set_grad_enabled(how == "with gradients"):
        benchmark.group = f"host time of injected_attention, {device.type}"
        # many short rounds: the smallest of them is free of whatever else the machine does
        benchmark.pedantic(lambda: function(*tensors, scale=0.125), rounds=200, iterations=50, warmup_rounds=5)

"""Node vectors: the kernel against the same expression in eager PyTorch, with nodes of one length and no padding."""

from collections.abc import Callable

import pytest
import torch

from sharedllm_ext.ops.node_vectors import _plain, node_vectors

# short runs: all benchmarks together stay under two minutes on two cores
pytestmark = pytest.mark.benchmark(max_time=0.2, min_rounds=3, warmup=True, warmup_iterations=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("nodes", "length", "q_heads", "kv_heads", "size"),
    [(16, 512, 32, 8, 128), (64, 128, 32, 8, 128), (64, 512, 4, 2, 64)],
)
@pytest.mark.parametrize("how", ["ours", "eager"])
def test_node_vectors(
    measure: Callable[[str, Callable[[], object]], None],
    how: str,
    nodes: int,
    length: int,
    q_heads: int,
    kv_heads: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(nodes, q_heads, size, generator=generator).to(device, dtype)
    k, v = (torch.randn(nodes * length, kv_heads, size, generator=generator).to(device, dtype) for _ in range(2))
    start = torch.arange(nodes, device=device) * length
    spans = torch.stack((start, torch.full_like(start, length)), -1)
    angle = torch.arange(length, device=device).unsqueeze(1) * torch.logspace(0, -4, size // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    function = node_vectors if how == "ours" else _plain
    group = f"node_vectors {nodes} nodes of {length}, {q_heads}/{kv_heads} heads of {size}, {dtype}"
    measure(group, lambda: function(q, k, v, spans, cos, sin, scale=size**-0.5))

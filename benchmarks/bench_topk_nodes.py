"""Top-k node retrieval: the C++ kernel against cosine similarity and topk in eager PyTorch."""

from collections.abc import Callable
from typing import Any

import eager
import pytest
import torch

from sharedllm_ext.ops.topk_nodes import topk_nodes

# short runs: these files together stay under 40 seconds on two cores
pytestmark = pytest.mark.benchmark(max_time=0.25, min_rounds=3, warmup=True, warmup_iterations=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("groups", "size", "d", "k"), [(4, 2, 2048, 1), (128, 2, 4096, 1), (1, 4096, 1024, 32)])
@pytest.mark.parametrize("how", ["ours", "cosine", "products"])
def test_topk(
    benchmark: Callable[..., Any], how: str, groups: int, size: int, d: int, k: int, dtype: torch.dtype
) -> None:
    benchmark.group = f"topk_nodes: {k} of {size} in {groups} groups, d {d}, {str(dtype)[6:]}"
    generator = torch.Generator().manual_seed(0)
    nodes = torch.randn(groups, size, d, generator=generator).to(dtype)
    query = torch.randn(1, 1, d, generator=generator).to(dtype)
    if how == "ours":
        cu_groups, group_query = torch.arange(groups + 1) * size, torch.zeros(groups, dtype=torch.int64)
        benchmark(topk_nodes, query[0], nodes.view(-1, d), cu_groups, group_query, k)
    else:
        benchmark(eager.cosine if how == "cosine" else eager.products, query, nodes, k)

"""Context tree: the C++ kernels against the same steps in eager PyTorch (the vectorised reference)."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import eager
import pytest
import torch

from sharedllm_ext import reference
from sharedllm_ext.ops.context_tree import context_tree_layout, context_tree_select, context_tree_split

# short runs: these files together stay under 40 seconds on two cores
pytestmark = pytest.mark.benchmark(max_time=0.25, min_rounds=3, warmup=True, warmup_iterations=2)

OURS = SimpleNamespace(split=context_tree_split, select=context_tree_select, layout=context_tree_layout)
EAGER = SimpleNamespace(
    split=reference.context_tree_split, select=reference.context_tree_select, layout=reference.context_tree_layout
)


@pytest.mark.parametrize("chunks", [4, 128, 1024])
@pytest.mark.parametrize("ops", [OURS, EAGER], ids=["ours", "eager"])
def test_tree(benchmark: Callable[..., Any], ops: SimpleNamespace, chunks: int) -> None:
    benchmark.group = f"context_tree: {chunks} chunks of 1024, depth 3, 32 slots"
    spans = torch.tensor([[1024 * i, 1024] for i in range(chunks)])
    benchmark(eager.tree, ops, spans, torch.arange(chunks), 3, 32, 1024 * chunks)

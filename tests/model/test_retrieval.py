"""Retrieval in one pass over keys and values picks what the level-by-level computation picks."""

import pytest
import torch
from torch import Tensor

from sharedllm_ext.model import chunks, lower_model, tree
from sharedllm_ext.model.rotary import LayerTables

from ..support import needs_cuda
from .builders import ids, model


@pytest.mark.parametrize("tokens", [96, 75, 33, 65])
@pytest.mark.parametrize("depth", [3, 4])
@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "llama_rope_scaling", "smollm3", "granite", "qwen3_moe", "phi3_longrope"]
)
def test_one_pass_equals_level_by_level(family: str, depth: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(tokens)
    shared = model(family, tree_depth=depth)
    context, query = ids(3, tokens), ids(3, 9)
    # the second context is shorter, so that its last chunk is too, and the third has no query
    context_mask, query_mask = torch.ones_like(context), torch.ones_like(query)
    context_mask[1, tokens - 20 :] = 0
    query_mask[2] = 0
    results: list[list[tuple[Tensor, Tensor | None]]] = []
    for once in (False, True):
        monkeypatch.setattr(tree, "_reads_once", lambda *_, once=once: once)
        with torch.no_grad():
            results.append(shared.retrieve(context, context_mask, query, query_mask))
    for (nodes, similarity), (want_nodes, want) in zip(*results, strict=True):
        assert torch.equal(nodes, want_nodes)
        assert (similarity is None) == (want is None)
        if similarity is not None:
            torch.testing.assert_close(similarity, want)


@needs_cuda
def test_choosing_nodes_never_waits() -> None:
    shared = model(tree_depth=3).cuda().bfloat16()
    lower, device = shared.lower_model, torch.device("cuda")
    pieces = chunks.cut_into_chunks([96, 64], 32)
    query = torch.randn(2, 64, device=device, dtype=torch.bfloat16)
    tables = LayerTables({"": (torch.randn(64, 8, device=device), torch.randn(64, 8, device=device))})
    with torch.no_grad():
        embedded = lower_model.embed(lower, ids(160).to(device))
        torch.cuda.set_sync_debug_mode("error")
        try:
            tree.grow_tree(lower, embedded, pieces, tree.TreeShape(3, 4), tables, query, [True, False])
        finally:
            torch.cuda.set_sync_debug_mode("default")

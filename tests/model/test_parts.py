"""Parts of a document compressed alone: put one after the other, they are the whole document's memory."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from sharedllm_ext import ContextMemory

from . import builders

CHUNK = builders.TREE["chunk_size"]


def _joined(parts: list[ContextMemory], kind: str) -> list[Tensor]:
    return [torch.cat(layer) for layer in zip(*(getattr(part, kind) for part in parts), strict=True)]


@pytest.mark.parametrize("family", ["llama", "smollm3", "gemma3_text"])
@pytest.mark.parametrize("asks", [False, True])
@torch.no_grad()
def test_parts_of_one_document(family: str, asks: bool) -> None:
    # a micro-batch of one chunk, so that matmuls have the same rows
    model = builders.model(family, query_aware=asks, micro_batch_tokens=CHUNK)
    context, query = builders.ids(1, 5 * CHUNK + 11), builders.ids(1, 6) if asks else None
    whole = model.compress(context, query_ids=query)
    cuts = [0, 1, 4, 6]
    parts = [
        model._compress_part(context[:, a * CHUNK : b * CHUNK], query_ids=query, first_chunks=[a])
        for a, b in itertools.pairwise(cuts)
    ]
    assert [part.num_chunks for part in parts] == [[1], [3], [2]]
    assert parts[-1].num_tokens == [CHUNK + 11]
    for kind in ("keys", "values"):
        assert all(map(torch.equal, _joined(parts, kind), getattr(whole, kind)))
    # the index is what sets a part apart from a document of its own
    own = model.compress(context[:, CHUNK : 4 * CHUNK], query_ids=query)
    assert torch.equal(own.values[0], parts[1].values[0]) and not torch.equal(own.keys[0], parts[1].keys[0])


@torch.no_grad()
def test_parts_of_several_documents_have_their_own_queries() -> None:
    model = builders.model(query_aware=True, micro_batch_tokens=CHUNK)
    context, query = builders.ids(2, 4 * CHUNK), builders.ids(2, 6)
    mask = torch.ones_like(context)
    mask[1, 3 * CHUNK + 5 :] = 0
    whole = model.compress(context, mask, query)
    a, b = whole.cu_slots[:2]
    # the end of the first document and the whole second one, in one call
    ids = torch.zeros_like(context)
    ids[0, -2 * CHUNK :], ids[1] = context[0, 2 * CHUNK :], context[1]
    used = mask.clone()
    used[0, : 2 * CHUNK] = 0
    part = model._compress_part(ids, used, query, first_chunks=[2, 0])
    assert part.num_tokens == [2 * CHUNK, 3 * CHUNK + 5]
    begin = a + (b - a) // 2
    for kind in ("keys", "values"):
        for got, want in zip(getattr(part, kind), getattr(whole, kind), strict=True):
            assert torch.equal(got, want[begin:])


@torch.no_grad()
def test_a_part_far_into_a_document() -> None:
    model = builders.model()
    ids, first = builders.ids(1, CHUNK), 1000
    near, far = model._compress_part(ids), model._compress_part(ids, first_chunks=[first])
    # angles are float32, some 6e-5 off at that position
    tables = model._rope_tables(first + CHUNK, ids.device)
    for index, layer in enumerate(model.lower_model.layers):
        cos, sin = (table[first].double() for table in tables.of(layer))
        half = cos.shape[0]
        low, high = near.keys[index][..., :half].double(), near.keys[index][..., half:].double()
        want = torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
        torch.testing.assert_close(far.keys[index].double(), want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("first", "got"), [([0, 0], r"\[0, 0\]"), ([-1], r"\[-1\]"), ([], r"\[\]")])
def test_first_chunks_are_checked(first: Any, got: str) -> None:
    model = builders.model()
    with pytest.raises(ValueError, match=f"first_chunks: expected 1 integer of at least 0, got {got}"):
        model._compress_part(builders.ids(1, 40), first_chunks=first)

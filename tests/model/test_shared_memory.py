"""Batch rows that read the same document: one row of the operator, in forward passes, gradients and decoding steps."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sharedllm_ext.model.decoding import support
from sharedllm_ext.model.injection import InjectedContext
from sharedllm_ext.model.memory import ContextMemory

from . import builders

STEPS: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
ORDERS = ([0] * 5, [0, 1, 0, 0, 1], [1, 0, 1, 2, 0], [2, 1, 0, 1, 2])


def reading(memory: ContextMemory, documents: Sequence[int]) -> ContextMemory:
    return memory.select(list(documents))


def three_documents(model: Any) -> ContextMemory:
    mask = torch.ones(3, 70, dtype=torch.long)
    # of different lengths: positions differ too
    mask[1, :40] = 0
    with torch.no_grad():
        return model.compress(builders.ids(3, 70), mask)


def context_of(model: Any, memory: ContextMemory, length: int) -> InjectedContext:
    return InjectedContext.of(
        memory,
        memory.batch_size,
        length,
        model.device,
        offset=model.config.query_position_offset,
        tables=model._rope_tables,
        layers=model.model.layers[: model.config.injection_layers],
    )


def test_rows_of_the_operator() -> None:
    model = builders.model()
    memory = three_documents(model)
    ranges = memory.slot_ranges()
    context = context_of(model, reading(memory, [1, 0, 1, 2, 0]), 7)
    assert context.cu_q.tolist() == [0, 14, 28, 35]
    assert context.slot_range.tolist() == [list(ranges[i]) for i in (1, 0, 2)]
    assert context.order is not None and context.order.tolist() == [0, 2, 1, 4, 3]
    assert context.place is not None and context.place[context.order].tolist() == list(range(5))
    adjacent = context_of(model, reading(memory, [0, 0, 2, 2, 2]), 1)
    assert adjacent.cu_q.tolist() == [0, 2, 5] and adjacent.order is None and adjacent.place is None
    alone = context_of(model, memory, 3)
    assert alone.cu_q.tolist() == [0, 3, 6, 9] and alone.order is None


@pytest.mark.parametrize("documents", ORDERS, ids=str)
def test_logits_and_gradients_as_of_single_rows(documents: list[int]) -> None:
    model = builders.model()
    memory = three_documents(model)
    text = builders.ids(5, 9)
    weight = model.injected_blocks[0].q_proj.weight
    together = model(input_ids=text, memory=reading(memory, documents)).logits
    (gradient,) = torch.autograd.grad(together.square().sum(), weight)
    rows, sums = [], torch.zeros_like(weight)
    for row, document in enumerate(documents):
        logits = model(input_ids=text[row : row + 1], memory=reading(memory, [document])).logits
        sums += torch.autograd.grad(logits.square().sum(), weight)[0]
        rows.append(logits.detach())
    torch.testing.assert_close(together.detach(), torch.cat(rows), rtol=0, atol=2e-5)
    assert sums.abs().max() > 0
    torch.testing.assert_close(gradient, sums, rtol=1e-3, atol=1e-4 * float(sums.abs().max()))


@pytest.mark.parametrize("as_on_cuda", [False, True])
@pytest.mark.parametrize("documents", ORDERS, ids=str)
def test_decoding_as_of_single_rows(documents: list[int], as_on_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "RUN_ON_CPU", as_on_cuda)
    model = builders.model()
    memory = three_documents(model)
    text = builders.ids(5, 9)
    together = model.generate(text, memory=reading(memory, documents), **STEPS)
    ordinary = model.generate(text, memory=reading(memory, documents), disable_compile=True, **STEPS)
    assert torch.equal(together, ordinary)
    for row, document in enumerate(documents):
        alone = model.generate(text[row : row + 1], memory=reading(memory, [document]), **STEPS)
        assert torch.equal(together[row], alone[0])

"""Decoding steps of many rows: the tokens and logits of the ordinary path, and of each row alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharedllm_ext import ContextMemory
from sharedllm_ext.model.cache_name import cache_of
from sharedllm_ext.model.decoding import DecodeRunner, PreallocatedCache, layers, support
from sharedllm_ext.model.decoding.step import RUNNERS
from sharedllm_ext.ops import decode_linear

from ..support import needs_cuda
from . import builders
from .recorded import Recorded, use_recordings

STEPS = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(params=[(1, False), (0, False), (0, True)], ids=["fused", "matmuls", "graphs"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Turns the steps on for the CPU, with either way of multiplying where rows are few, and what stands for graphs.

    Gives the rows of each step.
    """
    factor, graphs = request.param
    if graphs:
        use_recordings(monkeypatch)
    rows: list[int] = []
    end = DecodeRunner._end

    def counting(self: DecodeRunner, cache: PreallocatedCache) -> Tensor:
        rows.append(self.batch)
        return end(self, cache)

    monkeypatch.setattr(support, "RUN_ON_CPU", True)
    monkeypatch.setattr(DecodeRunner, "_end", counting)
    monkeypatch.setattr(layers, "FEW_ROWS", {kind: few * factor for kind, few in layers.FEW_ROWS.items()})
    before = Recorded.replays
    yield rows
    # the first step of its kind loads the kernels
    assert (Recorded.replays > before) == (graphs and len(rows) > 1)


def _both(model: Any, text: Tensor, **settings: Any) -> tuple[Any, Any]:
    """By steps, and by the model's own forward."""
    return tuple(
        model.generate(text, **{**STEPS, **LOGITS, **settings}, disable_compile=slow) for slow in (False, True)
    )


def _same(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=0, atol=3e-5)


@pytest.mark.parametrize("family", builders.DECODED)
@pytest.mark.parametrize("rows", [3, 20])
def test_ragged_rows_over_one_memory(steps: list[int], family: str, rows: int) -> None:
    model, text = builders.model(family), builders.ids(rows, 10)
    mask = torch.ones_like(text)
    for row in range(rows):
        mask[row, : row % 7] = 0
    memory = model.compress(builders.ids(1, 70))
    got, expected = _both(model, text, attention_mask=mask, memory=memory)
    assert steps == [rows] * 7
    _same(got, expected)


@pytest.mark.parametrize("rows", [9, 17, 33, 64, 200, 256])
def test_numbers_of_rows(steps: list[int], rows: int) -> None:
    model, text = builders.model(), builders.ids(rows, 6)
    got, expected = _both(model, text, memory=model.compress(builders.ids(1, 70)), max_new_tokens=4)
    assert steps == [rows] * 3
    _same(got, expected)


def test_more_rows_take_the_ordinary_path(steps: list[int]) -> None:
    model, text = builders.model(), builders.ids(support.MAX_BATCH + 1, 4)
    got, expected = _both(model, text, max_new_tokens=3)
    assert not steps
    _same(got, expected)


def test_rows_of_different_memories(steps: list[int]) -> None:
    model, text = builders.model(), builders.ids(18, 9)
    documents = ContextMemory.concat([model.compress(builders.ids(1, tokens)) for tokens in (40, 100, 70)])
    memory = documents.select([0, 2, 1, 1, 0, 2] * 3)
    got, expected = _both(model, text, memory=memory)
    assert len(steps) == 7
    _same(got, expected)
    for row in (0, 5, 8):
        alone = model.generate(text[row : row + 1], memory=memory.select([row]), **STEPS)
        assert torch.equal(alone[0], got.sequences[row])


def test_rows_that_end_early(steps: list[int]) -> None:
    model, text = builders.model(), builders.ids(20, 9)
    memory = model.compress(builders.ids(1, 70))
    free = model.generate(text, memory=memory, **STEPS)
    ends = sorted({int(free[row, 9 + row % 6]) for row in range(12)})
    got, expected = _both(model, text, memory=memory, eos_token_id=ends)
    assert steps
    assert torch.equal(got.sequences, expected.sequences)
    assert (got.sequences[:, -1] == 0).any()


def test_returned_sequences_and_sampling(steps: list[int]) -> None:
    model, text = builders.model(), builders.ids(4, 9)
    outs = []
    for slow in (False, True):
        torch.manual_seed(5)
        settings = {**STEPS, "do_sample": True, "num_return_sequences": 5, "disable_compile": slow}
        outs.append(model.generate(text, context_ids=builders.ids(4, 70) * 0 + 5, **settings))
    assert torch.equal(*outs) and set(steps) == {20}


def test_bfloat16(steps: list[int]) -> None:
    model, text = builders.model(dtype=torch.bfloat16), builders.ids(20, 9)
    memory = model.compress(builders.ids(1, 70))
    got = model.generate(text, memory=memory, **STEPS, **LOGITS)
    with torch.no_grad():
        expected = model(got.sequences[:, :-1], memory=memory).logits[:, 8:].float()
    assert steps
    assert (torch.stack(got.logits, 1) - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["plain", "bias", "residual", "residual bias", "gated", "gated bias", "joined"])
def test_both_ways_of_multiplying(dtype: torch.dtype, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gated = "gated" in what
    outputs = (48, 48) if gated else (40,) if "residual" in what else (64, 16, 16)
    whole = torch.randn(sum(outputs), 32).to(dtype)
    modules = []
    for part in whole.split(outputs):
        module = nn.Linear(32, part.shape[0], bias="bias" in what, dtype=dtype).requires_grad_(False)
        module.weight.data = part if what == "joined" else part.clone()
        modules.append(module)
    norm = nn.Module()
    norm.weight, norm.variance_epsilon = torch.randn(32).to(dtype), 1e-5
    x = torch.randn(20, 32).to(dtype)
    residual = torch.randn(20, 40).to(dtype) if "residual" in what else None
    joined = layers._joined([module.weight for module in modules])
    assert len(joined) == (1 if what == "joined" or len(modules) == 1 else len(modules))
    assert torch.equal(torch.cat(joined), whole)
    monkeypatch.setattr(layers, "FEW_ROWS", {"cpu": 0})
    kept = None if residual is None else residual.clone()
    got = layers.product(x, modules, norm, residual=kept, gated=gated)
    wide = (
        [module.weight.double() for module in modules],
        [None if module.bias is None else module.bias.double() for module in modules],
    )
    exact = decode_linear(
        x.double(),
        *wide,
        norm_weight=norm.weight.double(),
        eps=1e-5,
        residual=None if residual is None else residual.double(),
        gated=gated,
    )
    fused = decode_linear(
        x,
        [module.weight for module in modules],
        [module.bias for module in modules],
        norm_weight=norm.weight,
        eps=1e-5,
        residual=residual,
        gated=gated,
    )
    assert got.shape == exact.shape and got.dtype == dtype
    error, its = ((result.double() - exact).norm() for result in (got, fused))
    assert error <= 2 * its + 1e-6 * exact.norm()


@needs_cuda
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "granite", "phi3"])
@pytest.mark.parametrize("rows", [1, 3, 9, 33, 64, 200])
def test_graphs_on_cuda(family: str, rows: int) -> None:
    own = builders.FAMILIES[family][2]
    sizes = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": own.get("num_attention_heads", 4)}
    base = builders.base(family, **{**own, **sizes}).to("cuda", torch.bfloat16)
    model = builders.SharedLLMForCausalLM.from_base(base, **builders.TREE)
    for block in model.injected_blocks:
        nn.init.normal_(block.o_proj.weight, std=0.1)
    text, mask = builders.ids(rows, 10).cuda(), torch.ones(rows, 10, dtype=torch.long, device="cuda")
    for row in range(rows):
        mask[row, : row % 7] = 0
    documents = ContextMemory.concat([model.compress(builders.ids(1, tokens).cuda()) for tokens in (40, 100, 70)])
    for memory in (documents.select([0]), documents.select([row % 3 for row in range(rows)])):
        settings = {"attention_mask": mask, "memory": memory, **STEPS, **LOGITS}
        for _ in range(2):
            got = model.generate(text, **settings)
            runner = RUNNERS[cache_of(got)]
            with torch.no_grad():
                whole = torch.cat((mask, mask.new_ones(rows, 7)), 1)
                expected = model(got.sequences[:, :-1], attention_mask=whole, memory=memory).logits[:, 9:].float()
            error = torch.stack(got.logits, 1) - expected
            assert error.norm() / expected.norm() < 0.05
        assert runner._graph is not None and runner.batch == rows

"""A model whose injected blocks add nothing says so, once, and never in training."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.model import reading
from sharedllm_ext.model.reading import can_read_context

from . import builders

STEPS: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
TEXT = r"context: expected injected blocks that read it, got 2 whose output projections are all zero"


@pytest.fixture
def new() -> SharedLLMForCausalLM:
    return SharedLLMForCausalLM.from_base(builders.base(), **builders.TREE)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("call", ["generate", "forward", "memory", "split"])
@torch.no_grad()
def test_a_new_model_says_once_that_it_cannot_read(new: SharedLLMForCausalLM, call: str) -> None:
    text, context = builders.ids(1, 8), builders.ids(1, 70)

    def use() -> Any:
        if call == "generate":
            return new.generate(text, context_ids=context, **STEPS)
        if call == "forward":
            return new(text, context_ids=context)
        return new(text, memory=new.compress(context)) if call == "memory" else new(context)

    with pytest.warns(UserWarning, match=TEXT) as told:
        use()
    assert len([warning for warning in told if "output projections" in str(warning.message)]) == 1
    with silence():
        use()


@torch.no_grad()
def test_nothing_to_say(new: SharedLLMForCausalLM) -> None:
    text, context = builders.ids(1, 8), builders.ids(1, 70)
    with silence():
        new.generate(text, **STEPS)
        new(text)
        new.train()
        new(text, context_ids=context, labels=text)
        new.eval()
        builders.model().generate(text, context_ids=context, **STEPS)
        # one block is enough
        new.injected_blocks[1].o_proj.weight[0, 0] = 1e-4
        new.generate(text, context_ids=context, **STEPS)


@torch.no_grad()
def test_changed_weights_are_looked_at_again(new: SharedLLMForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, find = [], torch.Tensor.any
    monkeypatch.setattr(torch.Tensor, "any", lambda *args: looked.append(1) or find(*args))
    assert not can_read_context(new) and not can_read_context(new)
    assert len(looked) == 2
    new.injected_blocks[0].o_proj.weight.fill_(1.0)
    assert can_read_context(new) and can_read_context(new)
    new.load_state_dict(SharedLLMForCausalLM.from_base(builders.base(), **builders.TREE).state_dict())
    assert not can_read_context(new)


def test_what_stands_in_for_a_projection_may_read(new: SharedLLMForCausalLM) -> None:
    new.injected_blocks[0].o_proj = torch.nn.Sequential(new.injected_blocks[0].o_proj)
    assert can_read_context(new)


def test_steps_do_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = builders.model(), []
    look = reading.can_read_context
    monkeypatch.setattr(reading, "can_read_context", lambda model: calls.append(1) or look(model))
    model.generate(builders.ids(1, 8), context_ids=builders.ids(1, 70), **{**STEPS, "max_new_tokens": 10})
    # generate and its first forward
    assert len(calls) <= 2

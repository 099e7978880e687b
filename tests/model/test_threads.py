"""Threads that use one model at the same time."""

import sys
import threading
from typing import Any

import pytest
import torch

from . import builders

THREADS, ROUNDS = 8, 2
STEPS: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}


@pytest.fixture(autouse=True)
def busy_switches() -> Any:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def _run(work: Any) -> None:
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.filterwarnings("ignore:running text")
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_generate_with_a_context(training: bool, split: bool) -> None:
    model = builders.model(split_noise=0.5).train(training)
    # a part of the model in the other mode stays there
    model.model.layers[3].train(not training)
    modes = [module.training for module in model.modules()]
    texts, contexts = builders.ids(THREADS, 1, 10), builders.ids(THREADS, 1, 70)

    def given(number: int) -> dict[str, Any]:
        if split:
            return {"inputs": torch.cat((contexts[number], texts[number]), 1)}
        return {"inputs": texts[number], "context_ids": contexts[number]}

    expected = [model.generate(**given(number), **STEPS) for number in range(THREADS)]

    def work(number: int) -> None:
        for _ in range(ROUNDS):
            assert [module.training for module in model.modules()] == modes
            assert torch.equal(model.generate(**given(number), **STEPS), expected[number])

    _run(work)
    assert [module.training for module in model.modules()] == modes


def test_training_mode_generates_what_evaluation_does() -> None:
    model, text, context = builders.model(split_noise=0.5), builders.ids(2, 10), builders.ids(2, 70)
    expected = model.generate(text, context_ids=context, **STEPS)
    assert torch.equal(model.train().generate(text, context_ids=context, **STEPS), expected)

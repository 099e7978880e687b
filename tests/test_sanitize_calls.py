"""The calls of the sanitizer, which otherwise run on a GPU only: their arguments are those of the operators."""

from contextlib import nullcontext

import pytest
import torch

from sharedllm_ext import ops

from . import sanitize

# 132,000 slots: seconds on a CPU
LONG = "66000 slots"


@pytest.mark.parametrize("name", [name for name in sanitize.CALLS if LONG not in name])
def test_calls_run_on_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize, "DEVICE", torch.device("cpu"))
    # the CPU has one path
    monkeypatch.setattr(ops, "injected_attention_path", lambda _: nullcontext())
    # the operator itself, without what turns to the reference for types that the CPU has no kernel of
    no_kernel = name.startswith("injected_attention ") and "float16" in name.split(", ")
    with pytest.raises(ValueError, match="got Half") if no_kernel else nullcontext():
        sanitize.CALLS[name].prepare()()

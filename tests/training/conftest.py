"""A tiny base with a tokenizer, plain text, and what trains a model of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.training import Losses, Mix, PromptTokens, Sizes, Sources, default_prompt, token_classes

from ..cli.conftest import VOCABULARY, sentences
from ..cli.conftest import base as base
from ..cli.conftest import cli as cli
from ..cli.conftest import tokenizer as tokenizer

FIELDS: dict[str, Any] = {
    "injection_layers": 2,
    "chunk_size": 64,
    "slots_per_node": 4,
    "query_aware": False,
    "tie_compressor": False,
    "pick_layers": [0, 1],
    "segment_size": 8,
    "segment_margin": 4,
    "slot_position": "end",
}
SIZES = Sizes(contexts=2, chunks=6, questions=3, running=24, tail=256)
PASSAGES = 4


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text() -> np.ndarray:
    return np.random.default_rng(0).integers(1, VOCABULARY, 4000).astype(np.int32)


@pytest.fixture(scope="session")
def build(base: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    """Makes a model of the tiny base, in training mode; its blocks and its pick say something."""

    def make(*, random: bool = True, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
        own = {**FIELDS, **fields}
        if own["pick_layers"] is not None:
            own.setdefault("passage_prompt", default_prompt(tokenizer))
        model: Any = SharedLLMForCausalLM.from_base(base, dtype=dtype, **own)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            if random:
                for block in model.injected_blocks:
                    block.o_proj.weight.copy_(torch.randn(block.o_proj.weight.shape, generator=generator) * 0.2)
            if model.pick is not None:
                model.pick.token_class.copy_(token_classes(tokenizer, VOCABULARY))
        return model.train()

    return make


@pytest.fixture(scope="session")
def mix(tokenizer: PreTrainedTokenizerFast, text: np.ndarray, build: Callable[..., Any]) -> Callable[..., Mix]:
    """Makes a mix over plain text and the given records."""
    config = build().config

    def make(*, sizes: Sizes = SIZES, seed: int = 0, records: Any = (), tokens: bool = False) -> Mix:
        words = None if tokens else tokenizer
        prompt = PromptTokens.of(config, words, PASSAGES)
        return Mix(Sources([text], list(records)), words, prompt, config, sizes, seed)

    return make


@pytest.fixture(scope="session")
def losses(tokenizer: PreTrainedTokenizerFast) -> Callable[[Any], Losses]:
    return lambda model: Losses(model, PromptTokens.of(model.config, tokenizer, PASSAGES), PASSAGES)


def text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(sentences(200, seed=2), encoding="utf-8")
    return path

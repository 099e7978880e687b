"""Transformers has two names for the cache, by its version: this model takes both and answers by Transformers' own."""

import warnings
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from sharedllm_ext.model.cache_name import CACHE_NAME, cache_of

from . import builders

NAMES = ("past_key_values", "cache")


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        yield


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_forward_takes_either_name(name: str) -> None:
    model, text, context = builders.model(), builders.ids(1, 10), builders.ids(1, 70)
    memory = model.compress(context)
    whole = model(text, memory=memory, use_cache=True)
    assert CACHE_NAME in whole and cache_of(whole).get_seq_length() == 10
    first = model(text[:, :6], memory=memory, use_cache=True)
    rest = model(text[:, 6:], memory=memory, **{name: cache_of(first)})
    torch.testing.assert_close(rest.logits, whole.logits[:, 6:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_generate_takes_either_name(name: str) -> None:
    model, text = builders.model(), builders.ids(1, 10)
    settings: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    expected = model.generate(text, **settings)
    cache = DynamicCache(config=model.config.text_config)
    assert torch.equal(model.generate(text, **{name: cache}, **settings), expected)
    assert cache.get_seq_length() == 14
    out = model.generate(text, return_dict_in_generate=True, **settings)
    assert cache_of(out).get_seq_length() == 14


@pytest.mark.parametrize("call", ["__call__", "generate"])
def test_two_caches_are_refused(call: str) -> None:
    model, text = builders.model(), builders.ids(1, 10)
    caches = {name: DynamicCache(config=model.config.text_config) for name in NAMES}
    with pytest.raises(ValueError, match=r"past_key_values, cache: expected one of them .*, got two caches"):
        getattr(model, call)(text, **caches)

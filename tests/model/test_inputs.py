"""Keywords that others send, and caches that are read without the memory they were made with."""

import copy
import inspect
import warnings

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache
from transformers.utils import TransformersKwargs

from sharedllm_ext.model.inputs import check_keywords

from . import builders

WINDOW = builders.TREE["window"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return builders.model()


def test_keywords_of_others_are_taken() -> None:
    names = set(TransformersKwargs.__annotations__)
    # the supported families, and those of other families whose arguments come nearest
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        names |= set(inspect.signature(getattr(transformers, f"{name}ForCausalLM").forward).parameters)
    for name in ("T5", "InstructBlip", "Musicgen", "Florence2"):
        names |= set(inspect.signature(getattr(transformers, f"{name}ForConditionalGeneration").forward).parameters)
    assert len(names) > 25
    check_keywords(names)
    try:
        import peft
    except ImportError:
        return
    for name in dir(peft):
        if name.startswith("PeftModel"):
            check_keywords(inspect.signature(getattr(peft, name).forward).parameters)


@pytest.mark.parametrize(
    "name", ["output_attentions", "encoder_attention_mask", "text_ids", "task_ids", "token_type_ids", "cache_position"]
)
@torch.no_grad()
def test_a_keyword_without_a_value_changes_nothing(model, name: str) -> None:
    text, context = builders.ids(1, 6), builders.ids(1, 40)
    assert torch.equal(model(text, context_ids=context, **{name: None}).logits, model(text, context_ids=context).logits)


@pytest.mark.parametrize(
    "name",
    ["context", "contexts", "contxt_ids", "contex_ids", "context_id", "context_input_ids", "context_mask", "memmory",
     "memories", "query_id", "quary_ids", "query_mask", "query_attention_masks", "contex_attention_mask"],
)  # fmt: skip
def test_misspelt_keywords_are_refused(model, name: str) -> None:
    with pytest.raises(TypeError, match=rf"forward: expected context_ids, .*query_ids.* got '{name}'"):
        model(builders.ids(1, 6), **{name: None})


@pytest.mark.parametrize("kind", ["split", "padded", "context"])
@torch.no_grad()
def test_a_cache_is_read_with_the_memory_it_was_made_with(model, kind: str) -> None:
    text, more = builders.ids(2, 8 if kind == "context" else 100), builders.ids(2, 3)
    given = {"context_ids": builders.ids(2, 70)} if kind == "context" else {}
    mask = torch.ones_like(text)
    if kind == "padded":
        mask[1, 60:] = 0
        given = {"attention_mask": mask}
    first = model(text, use_cache=True, **given)
    assert first.memory is not None
    caches = [copy.deepcopy(first.past_key_values) for _ in range(3)]
    assert caches[0]._sharedllm_memory.memory is first.memory
    want = model(more, past_key_values=caches[0], memory=first.memory).logits
    got = model(more, past_key_values=caches[1])
    assert torch.equal(got.logits, want) and got.memory is first.memory
    again = model(more, past_key_values=caches[1])
    assert again.memory is first.memory
    # an empty cache has read nothing, and what fills it then is another text
    caches[2].crop(-caches[2].get_seq_length())
    assert model(more, past_key_values=caches[2]).memory is None
    assert model(more, past_key_values=caches[2]).memory is None


@torch.no_grad()
def test_a_memory_over_a_foreign_cache_is_looked_at(model) -> None:
    text = builders.ids(1, 8)
    cache = model(text, use_cache=True).past_key_values
    foreign = builders.model().compress(builders.ids(1, 40))
    with pytest.raises(ValueError, match="made by another model"):
        model(text[:, :1], past_key_values=cache, memory=foreign)


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
@torch.no_grad()
def test_running_text_past_the_window_says_so_once(cache) -> None:
    model = builders.model()
    past = DynamicCache(config=model.config.text_config)
    if cache is StaticCache:
        past = StaticCache(config=model.config.text_config, max_cache_len=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(builders.ids(1, WINDOW), past_key_values=past)
        mask = torch.ones(2, WINDOW + 4)
        mask[:, :6] = 0
        model(builders.ids(2, WINDOW + 4), attention_mask=mask)
        model(builders.ids(1, 100))
    with pytest.warns(UserWarning, match=r"running text: expected at most 24 tokens \(config.window\), got 25"):
        model(builders.ids(1, 1), past_key_values=past)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(builders.ids(1, 1), past_key_values=past)


@torch.no_grad()
def test_a_context_beside_too_much_running_text_says_so() -> None:
    with pytest.warns(UserWarning, match=r"expected at most 24 tokens \(config.window\), got 30"):
        builders.model()(builders.ids(1, 30), context_ids=builders.ids(1, 40))

"""Rotary frequencies that change at a length (Phi's longrope): what is cached before is read again beyond it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sharedllm_ext.model.cache_name import CACHE_NAME
from sharedllm_ext.model.rotary import switch_of

from . import builders

SWITCH = 64
STEPS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def _model(**fields: Any) -> Any:
    model = builders.model("phi3_longrope", **fields)
    assert switch_of(model.model.rotary_emb) == SWITCH
    return model


def _without_cache(model: Any, text: Tensor, **options: Any) -> Tensor:
    for _ in range(STEPS["max_new_tokens"]):
        with torch.no_grad():
            logits = model(text, use_cache=False, split_window=False, **options).logits[:, -1]
        text = torch.cat((text, logits.argmax(-1, keepdim=True)), 1)
    return text


def test_frequencies_change_at_all() -> None:
    model, text = _model(window=128), builders.ids(1, SWITCH + 1)
    with torch.no_grad():
        short = model(text[:, :SWITCH]).logits[0, -1]
        beyond = model(text).logits[0, SWITCH - 1]
    assert (short - beyond).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:running text")
@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_generate_goes_on_as_without_a_cache(padding: str, with_memory: bool) -> None:
    model, text = _model(window=128), builders.ids(2, SWITCH - 4)
    memory = model.compress(builders.ids(2, 70)) if with_memory else None
    expected = _without_cache(model, text, memory=memory)
    options: dict[str, Any] = {} if memory is None else {"memory": memory}
    given = text
    if padding != "none":
        empty = text.new_zeros(2, 6)
        order = (empty, text) if padding == "left" else (text, empty)
        given = torch.cat(order, 1)
        options["attention_mask"] = torch.cat([torch.full_like(part, part is text) for part in order], 1)
    got = model.generate(given, **options, **STEPS)
    assert torch.equal(got[:, -STEPS["max_new_tokens"] :], expected[:, -STEPS["max_new_tokens"] :])


@pytest.mark.filterwarnings("ignore:running text")
def test_a_prompt_that_is_split() -> None:
    model, text = _model(window=SWITCH - 4), builders.ids(2, 150)
    memory = model.compress(text[:, : -(SWITCH - 4)], query_ids=text[:, -(SWITCH - 4) :])
    expected = _without_cache(model, text[:, -(SWITCH - 4) :], memory=memory)
    got = model.generate(text, **STEPS)
    assert torch.equal(got[:, 150:], expected[:, -STEPS["max_new_tokens"] :])


@pytest.mark.filterwarnings("ignore:running text")
def test_embeddings_cannot_be_read_again() -> None:
    model, text = _model(window=128), builders.ids(1, SWITCH - 4)
    embeds = model.get_input_embeddings()(text)
    assert model.generate(inputs_embeds=embeds, **{**STEPS, "max_new_tokens": 4}).shape == (1, 4)
    with pytest.raises(ValueError, match=r"inputs_embeds: expected at most 64 tokens of prompt and answer, .*, got 65"):
        model.generate(inputs_embeds=embeds, **STEPS)


@pytest.mark.filterwarnings("ignore:running text")
@pytest.mark.parametrize("whole", [True, False])
def test_a_second_turn_beyond_the_length(whole: bool) -> None:
    model, text, more = _model(window=128), builders.ids(1, SWITCH - 8), builders.ids(1, 12)
    first = model.generate(text, return_dict_in_generate=True, **{**STEPS, "max_new_tokens": 4})
    turn = torch.cat((first.sequences, more), 1)
    cache: Any = {CACHE_NAME: first.past_key_values}
    if whole:
        expected = _without_cache(model, turn)
        assert torch.equal(model.generate(turn, **cache, **STEPS), expected)
        return
    # the cache holds all but the last token
    new, mask = turn[:, SWITCH - 5 :], torch.ones_like(turn)
    with pytest.raises(
        ValueError, match=r"input_ids: expected the whole text, .*, got 13 tokens that follow the 59 of"
    ):
        model.generate(new, attention_mask=mask, **cache, **STEPS)


def test_equal_factors_change_nothing() -> None:
    parameters = dict(builders.FAMILIES["phi3_longrope"][2]["rope_parameters"])
    parameters["long_factor"] = parameters["short_factor"]
    model = builders.model("phi3_longrope", base_fields={"rope_parameters": parameters})
    assert switch_of(model.model.rotary_emb) is None
    assert switch_of(builders.model().model.rotary_emb) is None

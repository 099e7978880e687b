"""A prompt longer than the window: generate's loop sees all of it, the model reads a memory and the running text."""

import contextlib
import copy
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer

from sharedllm_ext.model.cache_name import CACHE_NAME, cache_of

from . import builders

PROMPT, WINDOW = 60, builders.TREE["window"]
STEPS: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
FREE: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}

pytestmark = pytest.mark.filterwarnings("ignore:running text")


@pytest.fixture
def model():
    return builders.model()


@pytest.fixture
def text() -> Tensor:
    return builders.ids(1, PROMPT)


@contextlib.contextmanager
def _no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def _answer(model: Any, text: Tensor, **settings: Any) -> Tensor:
    """What follows a text that is split by hand."""
    settings = {**STEPS, **settings}
    running = text[:, -WINDOW:]
    if text.shape[1] <= WINDOW:
        return model.generate(text, **settings)[:, text.shape[1] :]
    return model.generate(running, context_ids=text[:, :-WINDOW], **settings)[:, WINDOW:]


WAYS: list[dict[str, Any]] = [
    {},
    {"use_cache": False},
    {"prefill_chunk_size": 5},
    {"cache_implementation": "static"},
    {"num_beams": 3},
    {"num_beams": 3, "use_cache": False},
    {"prompt_lookup_num_tokens": 3},
    {"assistant_early_exit": 2},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_ways_of_generating(model, text: Tensor, way: dict[str, Any]) -> None:
    beams = {"num_beams": way["num_beams"]} if "num_beams" in way else {}
    out = model.generate(text, **way, **STEPS)
    assert torch.equal(out, torch.cat((text, _answer(model, text, **beams)), 1))


def _places(name: str, value: int, model: Any, place: str) -> dict[str, Any]:
    """The arguments of generate with a length set in one of three places."""
    if place == "keyword":
        return {**FREE, name: value}
    if place == "model":
        setattr(model.generation_config, name, value)
        return dict(FREE)
    return {"generation_config": GenerationConfig(**{**FREE, name: value})}


@pytest.mark.parametrize("place", ["keyword", "config", "model"])
def test_the_longest_length_counts_the_whole_prompt(model, text: Tensor, place: str) -> None:
    assert model.generate(text, **_places("max_length", 67, model, place)).shape[1] == 67


@pytest.mark.parametrize("place", ["keyword", "config", "model"])
def test_the_least_length_counts_the_whole_prompt(model, text: Tensor, place: str) -> None:
    stop = int(_answer(model, text)[0, 0])
    settings = _places("min_length", 64, model, place)
    (settings.get("generation_config") or model.generation_config).eos_token_id = stop
    settings.pop("eos_token_id", None)
    limit = {} if place == "config" else {"max_new_tokens": 8}
    if place == "config":
        settings["generation_config"].max_new_tokens = 8
    new = model.generate(text, **settings, **limit)[0, PROMPT:].tolist()
    assert len(new) >= 4 and stop not in new[:4]


def test_the_default_length_is_of_new_tokens_within_the_positions_of_the_running_text(text: Tensor) -> None:
    model = builders.model()
    model.config.text_config.max_position_embeddings = 64
    assert model.generate(text, **FREE).shape[1] == PROMPT + 20
    assert model.generate(text[:, :10], **FREE).shape[1] == 30


class _Seen(LogitsProcessor, BaseStreamer):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.texts: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        self.texts.append(input_ids.clone())
        return scores

    def put(self, value: Tensor) -> None:
        self.texts.append(value)

    def end(self) -> None:
        pass


class _Watching(StoppingCriteria):
    def __init__(self) -> None:
        self.texts: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.texts.append(input_ids.clone())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("way", [{}, {"use_cache": False}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_processors_and_criteria_see_the_whole_text(model, text: Tensor, way: dict[str, Any]) -> None:
    processor, criterion, allowed = _Seen(), _Watching(), []

    def every_token(_: int, seen: Tensor) -> list[int]:
        allowed.append(seen.clone())
        return list(range(builders.VOCABULARY))

    out = model.generate(
        text,
        logits_processor=LogitsProcessorList([processor]),
        stopping_criteria=StoppingCriteriaList([criterion]),
        prefix_allowed_tokens_fn=every_token,
        **way,
        **STEPS,
    )
    assert torch.equal(out[:, PROMPT:], _answer(model, text, **{k: v for k, v in way.items() if k == "num_beams"}))
    for seen in (*processor.texts, *criterion.texts, *(x[None] for x in allowed)):
        assert torch.equal(seen[:1, :PROMPT], text)
    assert processor.texts[0].shape[1] == PROMPT and criterion.texts[-1].shape[1] == PROMPT + 6
    assert allowed


def test_a_criterion_of_length_and_a_streamer(model, text: Tensor) -> None:
    criteria, streamer = StoppingCriteriaList([MaxLengthCriteria(63)]), _Seen()
    out = model.generate(text, stopping_criteria=criteria, streamer=streamer, max_new_tokens=20, **FREE)
    assert out.shape[1] == 63
    assert torch.equal(streamer.texts[0], text)
    assert torch.equal(torch.cat([x.view(1, -1) for x in streamer.texts], 1), out)


def test_penalties_count_the_whole_text(model, text: Tensor) -> None:
    # every token but one is in the part that becomes context
    rest = torch.arange(3, 127)[torch.randperm(124)][None]
    out = model.generate(torch.cat((rest, text), 1), repetition_penalty=1e9, suppress_tokens=[0, 1, 2], **STEPS)
    assert out[0, rest.shape[1] + PROMPT] == 127


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("way", WAYS[:5], ids=str)
def test_rows_equal_single_rows(model, side: str, masked: bool, way: dict[str, Any]) -> None:
    if way.get("cache_implementation"):
        way = {"num_beams": 2, "num_return_sequences": 2}
    lengths, text = (PROMPT, 40, 20), builders.ids(3, PROMPT)
    ids, mask = torch.zeros_like(text), torch.zeros_like(text)
    for row, length in enumerate(lengths):
        place = slice(PROMPT - length, PROMPT) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = text[row, :length], 1
    out = model.generate(ids, **({"attention_mask": mask} if masked else {}), **way, **STEPS)
    count = way.get("num_return_sequences", 1)
    assert torch.equal(out[:, :PROMPT], ids.repeat_interleave(count, 0))
    for row, length in enumerate(lengths):
        alone = model.generate(text[row : row + 1, :length], **way, **STEPS)
        assert torch.equal(out[row * count : (row + 1) * count, PROMPT:], alone[:, length:])


# newer ones are given the length of each row's padding
_PADDING_IS_KNOWN = "Tensor" in str(inspect.signature(RepetitionPenaltyLogitsProcessor))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("columns", [PROMPT, WINDOW], ids=["split", "short"])
def test_penalties_of_repetition_are_of_a_rows_own_tokens(model, side: str, columns: int) -> None:
    if (columns, side) == (WINDOW, "left") and not _PADDING_IS_KNOWN:
        pytest.skip("this Transformers penalises the padding in front of any model's prompt")
    # padding is a token that may come next, too: a penalty on it would be seen
    lengths, text = (columns, columns // 2, 5), builders.ids(3, columns)
    ids, mask = torch.full_like(text, 50), torch.zeros_like(text)
    for row, length in enumerate(lengths):
        place = slice(columns - length, columns) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = text[row, :length], 1
    settings: dict[str, Any] = {**STEPS, "max_new_tokens": 3, "repetition_penalty": 3.0}
    settings |= {"return_dict_in_generate": True, "output_scores": True, "pad_token_id": 50}
    for beams in (1, 2):
        out = model.generate(ids, attention_mask=mask, num_beams=beams, **settings)
        for row, length in enumerate(lengths):
            own = text[row : row + 1, :length]
            alone = model.generate(own, attention_mask=torch.ones_like(own), num_beams=beams, **settings)
            got, want = out.scores[0][row * beams : (row + 1) * beams], alone.scores[0]
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
            assert torch.equal(out.sequences[row, columns:], alone.sequences[0, length:])


@pytest.mark.parametrize("given", ["nothing", "context", "memory"])
def test_short_rows_padded_on_the_right(model, given: str) -> None:
    lengths, text, context = (12, 7, 1), builders.ids(3, 12), builders.ids(3, 70)
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    memory = model.compress(context)

    def read(rows: slice) -> dict[str, Any]:
        if given == "memory":
            return {"memory": model.compress(context[rows]) if rows.stop else memory}
        return {"context_ids": context[rows]} if given == "context" else {}

    out = model.generate(text * mask, attention_mask=mask, **read(slice(None)), **STEPS)
    assert torch.equal(out[:, :12], text * mask)
    for row, length in enumerate(lengths):
        alone = model.generate(text[row : row + 1, :length], **read(slice(row, row + 1)), **STEPS)
        assert torch.equal(out[row : row + 1, 12:], alone[:, length:])


def test_a_text_that_grows_past_the_window_is_not_split(model) -> None:
    text = builders.ids(1, WINDOW - 2)
    expected = model.generate(text, split_window=False, **STEPS)
    assert torch.equal(model.generate(text, use_cache=False, **STEPS), expected)
    assert torch.equal(model.generate(text, prompt_lookup_num_tokens=8, **STEPS), expected)


def test_a_text_may_be_read_as_it_is(model, text: Tensor) -> None:
    base = builders.base()
    base.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model.generate(text, split_window=False, **STEPS), base.generate(text, **STEPS))
    with torch.no_grad():
        torch.testing.assert_close(model(text, split_window=False).logits, base(text).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "another", "same"])
@pytest.mark.parametrize("split", [True, False])
def test_assistants(model, text: Tensor, kind: str, split: bool) -> None:
    assistant = {"plain": builders.base, "another": builders.model, "same": lambda: copy.deepcopy(model)}[kind]()
    settings: dict[str, Any] = {"assistant_model": assistant, **STEPS}
    seen = _Seen()
    if split:
        got = model.generate(text, logits_processor=LogitsProcessorList([seen]), **settings)[:, PROMPT:]
        assert all(torch.equal(x[:, :PROMPT], text) for x in seen.texts)
    else:
        running = text[:, -WINDOW:]
        got = model.generate(running, context_ids=text[:, :-WINDOW], **settings)[:, WINDOW:]
    assert torch.equal(got, _answer(model, text))


def test_an_assistant_that_can_reads_the_memory(model, text: Tensor) -> None:
    assistant, read = copy.deepcopy(model), []
    assistant.register_forward_pre_hook(lambda _, __, kwargs: read.append(kwargs.get("memory")), with_kwargs=True)
    out = model.generate(text, assistant_model=assistant, return_dict_in_generate=True, **STEPS)
    assert read and all(memory is out.memory for memory in read)


@pytest.mark.parametrize("own_cache", [True, False])
def test_the_cache_of_a_split_prompt_goes_on(model, text: Tensor, own_cache: bool) -> None:
    cache = {CACHE_NAME: DynamicCache(config=model.config.text_config)} if own_cache else {}
    first = model.generate(text, return_dict_in_generate=True, **cache, **STEPS)
    turn = torch.cat((first.sequences, builders.ids(1, 5)), 1)
    running = torch.cat((text[:, -WINDOW:], turn[:, PROMPT:]), 1)
    expected = model.generate(running, memory=first.memory, split_window=False, **STEPS)[:, running.shape[1] :]

    def go_on(given: Tensor, **settings: Any) -> Tensor:
        copied = {CACHE_NAME: copy.deepcopy(cache_of(first))}
        return model.generate(given, **copied, **settings, **STEPS)[:, given.shape[1] :]

    assert torch.equal(go_on(turn), expected)
    assert torch.equal(go_on(turn, memory=first.memory), expected)
    assert torch.equal(go_on(running), expected)
    new = turn[:, PROMPT + 5 :]
    assert torch.equal(go_on(new, attention_mask=torch.ones_like(turn)), expected)
    assert torch.equal(go_on(new, attention_mask=torch.ones_like(running)), expected)
    with pytest.raises(ValueError, match=rf"input_ids: expected .* begins with the {PROMPT} tokens .* another text"):
        go_on(builders.ids(1, 80))
    with pytest.raises(ValueError, match=r"attention_mask: expected 35 columns .*, or 71 .*, got 50"):
        go_on(new, attention_mask=torch.ones(1, 50))

    with pytest.raises(ValueError, match=rf"input_ids: expected 1 row as in {CACHE_NAME}, got 2"):
        go_on(turn.expand(2, -1))

    second = model.generate(turn, **{CACHE_NAME: cache_of(first)}, return_dict_in_generate=True, **STEPS)
    third = torch.cat((second.sequences, builders.ids(1, 3)), 1)
    running = torch.cat((text[:, -WINDOW:], third[:, PROMPT:]), 1)
    expected = model.generate(running, memory=first.memory, split_window=False, **STEPS)[:, running.shape[1] :]
    got = model.generate(third, **{CACHE_NAME: cache_of(second)}, **STEPS)
    assert torch.equal(got[:, third.shape[1] :], expected)


def test_ragged_rows_go_on(model) -> None:
    lengths, text = (PROMPT, 40), builders.ids(2, PROMPT)
    mask = torch.ones_like(text)
    mask[1, : PROMPT - lengths[1]] = 0
    ids = text * mask
    first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **STEPS)
    turn = torch.cat((first.sequences, builders.ids(2, 4)), 1)
    seen = torch.cat((mask, torch.ones(2, turn.shape[1] - PROMPT, dtype=torch.int64)), 1)
    got = model.generate(turn, attention_mask=seen, **{CACHE_NAME: cache_of(first)}, **STEPS)[:, turn.shape[1] :]
    for row, length in enumerate(lengths):
        alone = model.generate(text[row : row + 1, -length:], return_dict_in_generate=True, **STEPS)
        its = torch.cat((alone.sequences, turn[row : row + 1, PROMPT + 6 :]), 1)
        more = model.generate(its, **{CACHE_NAME: cache_of(alone)}, **STEPS)[:, its.shape[1] :]
        assert torch.equal(got[row : row + 1], more)


@torch.no_grad()
def test_forward_and_generate_share_a_cache(model, text: Tensor) -> None:
    out = model.generate(text, **STEPS)
    first = model(text, use_cache=True)
    token = first.logits[:, -1:].argmax(-1)
    copied = {CACHE_NAME: copy.deepcopy(cache_of(first))}
    step = model(token, attention_mask=torch.ones(1, PROMPT + 1), **copied)
    assert torch.equal(torch.cat((token, step.logits.argmax(-1)), 1), out[:, PROMPT : PROMPT + 2])
    settings = {**STEPS, "max_new_tokens": 5}
    rest = model.generate(torch.cat((text, token), 1), **{CACHE_NAME: cache_of(first)}, **settings)
    assert torch.equal(rest, out)


@torch.no_grad()
def test_a_cache_that_starts_again_forgets(model, text: Tensor) -> None:
    out = model.generate(text, return_dict_in_generate=True, **STEPS)
    cache, short = cache_of(out), builders.ids(1, 9)
    expected = model.generate(short, **STEPS)
    for layer in cache.layers:
        layer.reset()
    if cache.get_seq_length():
        pytest.skip("this Transformers' reset keeps the cache's length")
    cached = {CACHE_NAME: cache}
    model(short[:, :5], **cached)
    got = model.generate(short, **cached, **STEPS)
    assert torch.equal(got, expected)


def test_outputs_carry_the_memory(model, text: Tensor) -> None:
    memory = model.compress(text)
    for settings in ({}, {"num_beams": 2}):
        out = model.generate(text, return_dict_in_generate=True, **settings, **STEPS)
        assert out.memory.num_tokens == [PROMPT - WINDOW] and out["memory"] is out.memory
    assert model.generate(text[:, :8], memory=memory, return_dict_in_generate=True, **STEPS).memory is memory
    assert "memory" not in model.generate(text[:, :8], return_dict_in_generate=True, **STEPS)


def test_growing_past_the_window_is_said_once(text: Tensor) -> None:
    for given in (text, text[:, : WINDOW - 2]):
        model = builders.model()
        with pytest.warns(UserWarning, match=rf"running text: expected at most {WINDOW} tokens"):
            model.generate(given, **STEPS)
        with _no_warning():
            model.generate(given, **STEPS)
    with _no_warning():
        builders.model().generate(text[:, : WINDOW - 6], **STEPS)


def test_healed_tokens_are_refused(model, text: Tensor) -> None:
    with pytest.raises(ValueError, match=r"token_healing: expected False where input_ids are longer than"):
        model.generate(text, token_healing=True, **STEPS)


def test_settings_stay_as_they_were(model, text: Tensor) -> None:
    config = GenerationConfig(max_length=66, **FREE)
    before = config.to_dict(), model.generation_config.to_dict()
    model.generate(text, generation_config=config)
    assert (config.to_dict(), model.generation_config.to_dict()) == before

"""A text without an end: after every step the state is that of compressing anew, and its size is what is said."""

import gc
import itertools
import random
import re
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria

from sharedllm_ext import ContextMemory, Conversation, SharedLLMForCausalLM
from sharedllm_ext.model.cache_name import cache_of

from . import builders
from .test_append import assert_same

CHUNK = builders.TREE["chunk_size"]
WINDOW = 80
PAGE = Path(__file__).resolve().parents[2] / "docs" / "conversations.md"


def _model(family: str = "llama", **fields: Any) -> SharedLLMForCausalLM:
    """A micro-batch is one chunk, so that all matmuls have the same rows whatever they are computed with."""
    own = {"micro_batch_tokens": CHUNK, "query_aware": False, "window": WINDOW, **fields}
    model = builders.model(family, **own)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def model() -> SharedLLMForCausalLM:
    return _model()


class Rebuilt:
    """The same by definition, for a text of which all tokens are kept."""

    def __init__(self, model: SharedLLMForCausalLM, window: int = WINDOW, keep_first: int = 0) -> None:
        self.model, self.window, self.keep = model, window, keep_first
        self.before = builders.ids(1, 0)
        self.text = builders.ids(1, 0)
        self.query: Tensor | None = None

    def parts(self) -> tuple[Tensor, Tensor]:
        """What was absorbed, and the running text."""
        absorbed = 0
        while self.text.shape[1] - absorbed > self.window:
            absorbed += CHUNK
        end = self.keep + absorbed if absorbed else 0
        if not absorbed:
            return self.before, self.text
        running = torch.cat((self.text[:, : self.keep], self.text[:, end:]), 1)
        return torch.cat((self.before, self.text[:, self.keep : end]), 1), running

    def memory(self) -> ContextMemory | None:
        absorbed, _ = self.parts()
        return self.model.compress(absorbed, query_ids=self.query) if absorbed.shape[1] else None

    @torch.no_grad()
    def logits(self) -> Tensor:
        return self.model(self.parts()[1], memory=self.memory(), split_window=False).logits[0, -1]

    def greedy(self, count: int) -> list[int]:
        """The next tokens, everything computed anew for each."""
        found = []
        for _ in range(count):
            found.append(int(self.logits().argmax()))
            self.text = torch.cat((self.text, torch.tensor([found[-1:]])), 1)
        return found

    def assert_state(self, conversation: Conversation) -> None:
        absorbed, running = self.parts()
        assert torch.equal(conversation.running_ids, running)
        assert conversation.num_tokens == absorbed.shape[1] + running.shape[1]
        if conversation.memory is None:
            assert not absorbed.shape[1]
        else:
            want = self.memory()
            assert want is not None
            assert_same(conversation.memory, want)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("window", "keep"), [(WINDOW, 0), (CHUNK, 0), (WINDOW, 7), (CHUNK + 3, 3)])
@torch.no_grad()
def test_every_step_is_as_if_compressed_anew(model: SharedLLMForCausalLM, seed: int, window: int, keep: int) -> None:
    generator, rebuilt = random.Random(seed), Rebuilt(model, window, keep)
    conversation = Conversation(model, window=window, keep_first=keep)
    for step in range(14):
        if step % 3 == 2 and conversation.running_ids.shape[1]:
            new = conversation.generate(max_new_tokens=generator.randrange(1, 20), do_sample=True)
        else:
            new = builders.ids(1, generator.choice((0, 1, 2, CHUNK, generator.randrange(60), 3 * WINDOW + 5)))
            conversation.add(new)
        rebuilt.text = torch.cat((rebuilt.text, new), 1)
        rebuilt.assert_state(conversation)
        stays = conversation.running_ids.shape[1]
        assert stays <= window and (conversation.memory is None or stays > window - CHUNK)


@pytest.mark.parametrize("asks", [False, True])
@torch.no_grad()
def test_a_given_memory_goes_on_and_stays_readable(asks: bool) -> None:
    model = _model(query_aware=True)
    rebuilt = Rebuilt(model)
    rebuilt.query, rebuilt.before = builders.ids(1, 5) if asks else None, builders.ids(1, 45)
    # one with spare room, into which another could write
    given = model.compress(rebuilt.before[:, :20], query_ids=rebuilt.query)
    given = model.append(given, rebuilt.before[:, 20:], query_ids=rebuilt.query)
    conversation = Conversation(model, given, query_ids=rebuilt.query)
    for length in (30, 70, 1, 150):
        new = builders.ids(1, length)
        conversation.add(new)
        rebuilt.text = torch.cat((rebuilt.text, new), 1)
        rebuilt.assert_state(conversation)
    assert_same(given, model.compress(rebuilt.before, query_ids=rebuilt.query))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "phi3_longrope"])
@pytest.mark.parametrize("keep", [0, 5])
def test_greedy_tokens_are_those_of_rebuilding(family: str, keep: int) -> None:
    model = _model(family, dtype=torch.float64)
    rebuilt, conversation = Rebuilt(model, WINDOW, keep), Conversation(model, keep_first=keep)
    rebuilt.text = builders.ids(1, WINDOW - 7)
    conversation.add(rebuilt.text)
    # the second break comes CHUNK tokens after the first one
    got = conversation.generate(max_new_tokens=CHUNK + 12)
    assert got[0].tolist() == rebuilt.greedy(CHUNK + 12)
    rebuilt.assert_state(conversation)
    with torch.no_grad():
        again = model(conversation.running_ids, memory=conversation.memory).logits[0, -1]
    torch.testing.assert_close(again, rebuilt.logits())


@pytest.mark.parametrize("lengths", [(1, 1), (40, 40), (7, 73)])
def test_one_answer_or_several(model: SharedLLMForCausalLM, lengths: tuple[int, int]) -> None:
    text, answers = builders.ids(1, WINDOW), []
    for parts in (lengths, (sum(lengths),)):
        conversation = Conversation(model)
        conversation.add(text)
        answers.append(torch.cat([conversation.generate(max_new_tokens=n) for n in parts], 1))
    assert torch.equal(*answers)


class Seen(LogitsProcessor):
    """Lengths and latest text that a logits processor is called with."""

    def __init__(self) -> None:
        self.texts: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.texts.append(input_ids)
        return scores


class Stream:
    """A streamer that keeps what it is told."""

    def __init__(self) -> None:
        self.put_: list[list[int]] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        assert not self.ends
        self.put_.append(value.flatten().tolist())

    def end(self) -> None:
        self.ends += 1


@pytest.mark.parametrize("keep", [0, 5])
def test_streamers_and_processors_see_one_text(model: SharedLLMForCausalLM, keep: int) -> None:
    stream, seen, text = Stream(), Seen(), builders.ids(1, WINDOW - 3)
    conversation = Conversation(model, keep_first=keep)
    conversation.add(text)
    new: Any = conversation.generate(max_new_tokens=50, streamer=stream, logits_processor=LogitsProcessorList([seen]))
    assert stream.ends == 1 and stream.put_[0] == text[0].tolist()
    assert list(itertools.chain(*stream.put_[1:])) == new[0].tolist() and len(new[0]) == 50
    whole = torch.cat((text, new), 1)
    assert len(seen.texts) == 50
    assert all(torch.equal(seen_, whole[:, : WINDOW - 3 + i]) for i, seen_ in enumerate(seen.texts))


class After(StoppingCriteria):
    """Stops at a length of the text that it sees."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


# the first part of an answer after WINDOW - 3 tokens ends with its 4th, the second with its 36th
@pytest.mark.parametrize("count", [1, 3, 4, 5, 35, 36, 37])
def test_stopping_criteria_end_the_answer_where_they_say(model: SharedLLMForCausalLM, count: int) -> None:
    text = builders.ids(1, WINDOW - 3)

    def answer(**kwargs: Any) -> Tensor:
        conversation = Conversation(model)
        conversation.add(text)
        stream = Stream()
        new = conversation.generate(max_new_tokens=60, streamer=stream, **kwargs)
        assert conversation.num_tokens == text.shape[1] + new.shape[1] and stream.ends == 1
        return new

    free = answer()
    assert torch.equal(answer(stopping_criteria=[After(WINDOW - 3 + count)]), free[:, :count])
    last, before = int(free[0, count - 1]), free[0, : count - 1].tolist()
    if last not in before:
        assert torch.equal(answer(eos_token_id=[1, last]), free[:, :count])
    # every token ends the answer but one, which is repeated until it may end
    last = builders.VOCABULARY - 1
    least = answer(eos_token_id=list(range(last)), min_new_tokens=count)
    assert (least[0, :count] == last).all() and int(least[0, -1]) != last
    assert count < least.shape[1] < count + 20


def test_the_model_s_own_stop_tokens_end_an_answer(model: SharedLLMForCausalLM) -> None:
    conversation = Conversation(model)
    conversation.add(builders.ids(1, WINDOW))
    model.generation_config.eos_token_id = list(range(builders.VOCABULARY))
    assert conversation.generate(max_new_tokens=9).shape == (1, 1)
    model.generation_config.max_new_tokens = 3
    assert conversation.generate(eos_token_id=None).shape == (1, 3)
    assert conversation.generate(GenerationConfig(max_new_tokens=4)).shape == (1, 1)


def test_max_time_counts_from_the_first_part(model: SharedLLMForCausalLM) -> None:
    class Slow(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
            time.sleep(0.06)
            return scores

    conversation = Conversation(model, window=CHUNK)
    conversation.add(builders.ids(1, CHUNK - 2))
    new = conversation.generate(max_new_tokens=90, max_time=0.3, logits_processor=LogitsProcessorList([Slow()]))
    # a part would have all of it
    assert new.shape[1] <= 6


def test_prompt_lookup_and_a_repetition_penalty(model: SharedLLMForCausalLM) -> None:
    text = builders.ids(1, 20).repeat(1, 3)
    answers = []
    for options in ({}, {"prompt_lookup_num_tokens": 4}):
        conversation = Conversation(model)
        conversation.add(text)
        answers.append(conversation.generate(max_new_tokens=50, repetition_penalty=1.3, **options))
    assert torch.equal(*answers)


def test_samples_of_a_seed_do_not_depend_on_breaks() -> None:
    model = _model(window=CHUNK)
    conversation = Conversation(model)
    conversation.add(builders.ids(1, CHUNK))
    first = conversation.running_ids
    torch.manual_seed(2)
    new = conversation.generate(max_new_tokens=40, do_sample=True)
    again = Conversation(model)
    again.add(first)
    torch.manual_seed(2)
    assert torch.equal(new, torch.cat([again.generate(max_new_tokens=1, do_sample=True) for _ in range(40)], 1))


def _bytes_beside(conversation: Conversation) -> int:
    """Bytes of all tensors of this process but the memory's."""
    gc.collect()
    memory = conversation.memory
    assert memory is not None
    kept = [] if memory.version is None else memory.version.storage.tensors
    own = {tensor.untyped_storage().data_ptr() for tensor in (*memory.keys, *memory.values, *kept)}
    found = [one.untyped_storage() for one in gc.get_objects() if type(one) in (Tensor, torch.nn.Parameter)]
    return sum({one.data_ptr(): one.nbytes() for one in found if one.data_ptr() not in own}.values())


def test_state_is_bounded(model: SharedLLMForCausalLM) -> None:
    window, generator = CHUNK + 8, random.Random(3)
    conversation = Conversation(model, window=window, keep_first=4)
    cached: list[int] = []
    handle = model.register_forward_hook(lambda *call: cached.append(cache_of(call[-1]).get_seq_length()))
    total, bytes_at = 0, []
    while total < 50 * window:
        new = builders.ids(1, generator.randrange(1, 4 * window))
        conversation.add(new)
        # some answers pass the window
        total += new.shape[1] + conversation.generate(max_new_tokens=12).shape[1]
        memory, stays = conversation.memory, conversation.running_ids.shape[1]
        assert conversation.num_tokens == total and stays <= window
        if memory is not None:
            chunks = -(-(total - window) // CHUNK)
            assert memory.num_chunks == [chunks] and stays == total - chunks * CHUNK > window - CHUNK
            assert memory.num_slots == chunks * (builders.TREE["tree_depth"] + 1) * builders.TREE["slots_per_node"]
            if total // (10 * window) > len(bytes_at):
                bytes_at.append(_bytes_beside(conversation))
    handle.remove()
    assert window - 3 <= max(cached) <= window
    # token ids, and the rotations of chunk indices; a cache would be 40 KB, and the whole text 16
    assert len(bytes_at) == 5 and max(bytes_at) - min(bytes_at) <= 8192


def test_no_cache_and_no_older_memory_is_kept(model: SharedLLMForCausalLM) -> None:
    conversation = Conversation(model)
    conversation.add(builders.ids(1, 3 * WINDOW))
    assert conversation.memory is not None
    old = weakref.ref(conversation.memory)
    conversation.generate(max_new_tokens=2 * CHUNK)
    gc.collect()
    assert old() is None


def test_a_row_of_padding_tokens_is_text(model: SharedLLMForCausalLM) -> None:
    text = builders.ids(1, 20)
    text[0, -1] = text[0, 0] = 0
    conversation = Conversation(model)
    conversation.add(text)
    rebuilt = Rebuilt(model)
    rebuilt.text = text
    assert conversation.generate(max_new_tokens=3)[0].tolist() == rebuilt.greedy(3)


def test_training_mode_is_left_alone(model: SharedLLMForCausalLM) -> None:
    text, answers = builders.ids(1, 3 * WINDOW), []
    for training in (False, True):
        conversation = Conversation(model.train(training))
        conversation.add(text)
        answers.append(conversation.generate(max_new_tokens=20))
    assert model.training and torch.equal(*answers)


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"window": CHUNK - 1},
        r"window: expected 32 \(keep_first and a chunk of 32\) to 80 \(config.window\) tokens, got 31",
    ),
    ({"window": WINDOW + 1}, "window: expected 32 .* to 80 .*, got 81"),
    ({"keep_first": WINDOW}, "window: expected 112 .* to 80 .*, got 80"),
    ({"keep_first": -1}, "keep_first: expected an integer of at least 0, got -1"),
    ({"window": 40.0}, "window: expected an integer of at least 1, got 40.0"),
    ({"query_ids": torch.zeros(2, 3, dtype=torch.int64)}, "query_ids: expected one row, got 2"),
]


@pytest.mark.parametrize(("options", "text"), WRONG)
def test_wrong_options(model: SharedLLMForCausalLM, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Conversation(model, **options)


def test_a_memory_that_cannot_go_on(model: SharedLLMForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"memory: expected one batch row .*, got 2"):
        Conversation(model, model.compress(builders.ids(2, 40)))
    memory = model.compress(builders.ids(1, 40))
    memory.tails = None
    with pytest.raises(ValueError, match="expected the token ids of the last 8 tokens of document 0"):
        Conversation(model, memory)
    with pytest.raises(ValueError, match="memory: "):
        Conversation(model, _model("qwen3").compress(builders.ids(1, 40)))


@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        ([1, 2], TypeError, "ids: expected a tensor, got list"),
        (torch.zeros(1, 2), ValueError, "ids: expected integer token ids"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"ids: expected shape \[batch, tokens\]"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            ValueError,
            r"ids: expected one row \(a conversation is one text\), got 2",
        ),
        (torch.full((1, 200), builders.VOCABULARY), ValueError, "ids: expected token ids from 0 to 127, got 128"),
    ],
)
def test_wrong_ids_change_nothing(model: SharedLLMForCausalLM, ids: Any, error: type[Exception], text: str) -> None:
    conversation, begin = Conversation(model), builders.ids(1, 2 * WINDOW)
    conversation.add(begin)
    memory, running = conversation.memory, conversation.running_ids
    with pytest.raises(error, match=text):
        conversation.add(ids)
    assert conversation.memory is memory and conversation.running_ids is running


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"memory": None}, TypeError, "expected no memory, which the conversation gives itself"),
        ({"attention_mask": torch.ones(1, 5)}, TypeError, "expected no attention_mask"),
        ({"max_length": 200}, TypeError, "expected no max_length"),
        ({"num_beams": 2}, ValueError, "num_beams: expected 1 in a conversation, got 2"),
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences: expected 1 in a conversation, got 2"),
        ({"return_dict_in_generate": True}, ValueError, "return_dict_in_generate: expected False .*, got True"),
        ({"guidance_scale": 1.5}, ValueError, "guidance_scale: expected 1 .*, got 1.5"),
        ({"min_length": 5}, ValueError, "min_length: expected 0 .*, got 5"),
        ({"forced_eos_token_id": 2}, ValueError, "forced_eos_token_id: expected None .*, got 2"),
        ({"max_new_tokens": None}, ValueError, "max_new_tokens: expected the most tokens of an answer, got none"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: expected an integer of at least 1, got 0"),
    ],
)
def test_refused_settings_change_nothing(
    model: SharedLLMForCausalLM, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    conversation = Conversation(model)
    conversation.add(builders.ids(1, 5))
    with pytest.raises(error, match=text):
        conversation.generate(**{"max_new_tokens": 4, **options})
    assert conversation.num_tokens == 5


def test_an_answer_needs_a_text(model: SharedLLMForCausalLM) -> None:
    with pytest.raises(ValueError, match=re.escape("expected some text (add) before generate, got none")):
        Conversation(model).generate(max_new_tokens=4)


@torch.no_grad()
def test_a_conversation_goes_on_from_what_was_saved(model: SharedLLMForCausalLM, tmp_path: Path) -> None:
    conversation = Conversation(model, keep_first=6)
    conversation.add(builders.ids(1, 3 * WINDOW))
    assert conversation.memory is not None
    conversation.memory.save(tmp_path / "memory.safetensors")
    again = Conversation(model, ContextMemory.load(tmp_path / "memory.safetensors", model), keep_first=6)
    again.add(conversation.running_ids)
    answers = [one.generate(max_new_tokens=2 * CHUNK) for one in (conversation, again)]
    assert torch.equal(*answers) and torch.equal(conversation.running_ids, again.running_ids)
    assert again.memory is not None and conversation.memory is not None
    assert_same(again.memory, conversation.memory)


def test_the_page_s_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(example, str(PAGE), "exec"), names)
    total, running, slots = map(int, capsys.readouterr().out.splitlines()[-1].split())
    config = names["model"].config
    chunks = -(-(total - config.window) // config.chunk_size)
    assert running == total - chunks * config.chunk_size <= config.window
    assert slots == chunks * (config.tree_depth + 1) * config.slots_per_node > 0
    assert (tmp_path / "conversation.safetensors").is_file()

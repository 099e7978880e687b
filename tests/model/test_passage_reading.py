"""``generate(…, passages=…)`` gives what the three steps give one after the other, in every form of call."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sharedllm_ext import ContextMemory, decoding_obstacle
from sharedllm_ext.model.decoding import support
from sharedllm_ext.model.decoding.step import DecodeRunner
from sharedllm_ext.model.sources import Source
from sharedllm_ext.model.split_prompt import SplitPrompt, without_padding

from . import builders
from .test_pick import CHUNK, build, tokens

PARTS = {"begin": "B", "passage": "[{rank}]", "question": "Q", "answer": "A"}
FIELDS: dict[str, Any] = {"passage_prompt": PARTS, "window": 128}
STEPS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
COUNT = 3


class Letters:
    """A tokenizer whose tokens are characters; 1 and 2 are special, 3 is unknown."""

    all_special_ids = (1, 2, 3)
    unk_token_id = 3

    def __call__(self, text: str, add_special_tokens: bool, split_special_tokens: bool = False) -> Any:
        assert not add_special_tokens
        return type("Encoded", (), {"input_ids": [ord(c) for c in text]})

    def decode(self, ids: list[int]) -> str:
        return f"<{ids[0]}>"


def ready(model: Any) -> Any:
    """With blocks that read the memory."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in model.injected_blocks:
            weight = block.o_proj.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return ready(build(**FIELDS))


@pytest.fixture(scope="module")
def context() -> Tensor:
    return tokens(1, 3 * CHUNK + 9, seed=1)


@torch.no_grad()
def in_steps(model: Any, question: Tensor, context: Tensor, begin: str = "", asked: Any = None, **how: Any) -> Tensor:
    """The answer to one question ``[1, L]`` in three steps, ``[R, n]``."""
    memory = model.compress(context)
    (found,) = model.find_passages(question if asked is None else asked, context, memory=memory, count=COUNT)
    words = "".join(map(chr, question[0].tolist()))
    prompt = model.passage_prompt(Letters(), context[0], found, words, begin)
    result: Tensor = model.generate(prompt, memory=memory, **{**STEPS, **how})
    return result[:, prompt.shape[1] :]


def at_once(model: Any, question: Tensor, **how: Any) -> Any:
    return model.generate(question, passages=COUNT, tokenizer=Letters(), **{**STEPS, **how})


def test_one_call_equals_three_steps(model: Any, context: Tensor) -> None:
    answers = set()
    for seed in range(4):
        question = tokens(1, 5 + seed, seed=20 + seed)
        result = at_once(model, question, context_ids=context)
        assert torch.equal(result[:, : question.shape[1]], question)
        assert torch.equal(result[:, question.shape[1] :], in_steps(model, question, context))
        answers.add(tuple(result[0, question.shape[1] :].tolist()))
        # which passages it reads matters
        other = model.generate(question, passages=1, tokenizer=Letters(), context_ids=context, **STEPS)
        answers.add(tuple(other[0, question.shape[1] :].tolist()))
    assert len(answers) > 4


@torch.no_grad()
def test_a_memory_that_has_kept_its_tokens_needs_no_context(model: Any, context: Tensor) -> None:
    other = tokens(1, 2 * CHUNK + 5, seed=2)
    known = [model.compress(text).with_sources([Source.of_ids(text[0])]) for text in (context, other)]
    questions = torch.cat([tokens(1, 6, seed=20), tokens(1, 6, seed=21)])
    # one memory for all questions
    one = at_once(model, questions, memory=known[0])
    assert torch.equal(one, at_once(model, questions, memory=known[0], context_ids=context))
    # a document for each, beside one that nobody reads and whose tokens are not known
    third = model.compress(tokens(1, 9, seed=5))
    memory = ContextMemory.concat([*known, third]).select([1, 0])
    both = at_once(model, questions, memory=memory)
    for row, text in enumerate((other, context)):
        assert torch.equal(both[row, 6:], in_steps(model, questions[row : row + 1], text)[0])
    # passages that were found before
    found = model.find_passages(questions[:1], memory=known[0], count=COUNT)
    again = model.generate(questions[:1], passages=found, memory=known[0], tokenizer=Letters(), **STEPS)
    assert torch.equal(again, one[:1])
    for unknown in (third, ContextMemory.concat([*known, third]).select([0, 2])):
        with pytest.raises(ValueError, match=r"passages: expected context_ids with it, .* kept its token ids"):
            at_once(model, questions, memory=unknown)


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 1.3, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"use_cache": False},
        {"min_new_tokens": 4, "eos_token_id": [5, 6, 7, 8, 9, 40]},
        {"prefill_chunk_size": 16},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda how: "-".join(map(str, how)),
)
def test_every_way_of_decoding(model: Any, context: Tensor, how: dict[str, Any]) -> None:
    question = tokens(1, 6, seed=30)
    torch.manual_seed(1)
    expected = in_steps(model, question, context, **how)
    torch.manual_seed(1)
    result = at_once(model, question, context_ids=context, **how)
    assert torch.equal(result[:, :6], question.expand(len(result), -1))
    assert torch.equal(result[:, 6:], expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("drafts", ["assistant", "itself"])
def test_an_assistant_drafts_from_passages_too(context: Tensor, drafts: str, attention: str) -> None:
    question, model = tokens(1, 6, seed=30), ready(build(**FIELDS))
    model.set_attn_implementation(attention)
    other = model if drafts == "itself" else ready(build(**FIELDS))
    expected = in_steps(model, question, context)
    seen: list[Any] = []
    handle = other.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    result = at_once(model, question, context_ids=context, assistant_model=other)
    handle.remove()
    assert torch.equal(result[:, 6:], expected)
    assert seen and any(ids.shape[1] > 60 for ids in seen)


def test_a_mask_of_the_loops_text_is_made_that_of_the_running_text() -> None:
    """Where Transformers' assisted generation keeps a mask of ones, it cuts it to the text that its loop has."""
    whole, running = tokens(1, 3), tokens(1, 7)
    padded = torch.tensor([[0, 1, 1, 1, 1, 1, 1]])
    for own, expected in ((None, [1] * 9), (padded, [0, *[1] * 8])):
        prompt = SplitPrompt(whole, running, own, inserted=True)
        for given in (5, 9, 12):
            mask = torch.tensor([expected + [1] * 3])[:, :given]
            assert prompt.fit_mask(mask, 2).tolist() == [expected]


def test_padding_adds_nothing_to_what_is_penalised() -> None:
    """Of a padded row its own tokens alone: neither padding nor the last token of the prompt that is read."""
    whole, mask = torch.tensor([[0, 0, 7, 8], [9, 8, 0, 0]]), torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]])
    prompt = SplitPrompt(whole, torch.tensor([[5, 6, 65]] * 2), None, mask, inserted=True)
    (processor,) = without_padding(LogitsProcessorList([RepetitionPenaltyLogitsProcessor(2.0)]), prompt)
    scores = processor(torch.cat((whole, torch.tensor([[3], [4]])), 1), torch.ones(2, 70))
    assert [row.nonzero()[:, 0].tolist() for row in scores != 1] == [[3, 7, 8], [4, 8, 9]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mask_given", [True, False])
def test_ragged_rows_equal_single_ones(model: Any, side: str, mask_given: bool) -> None:
    """Questions and texts of other lengths, padded on either side; the mask inferred from pad_token_id too."""
    questions = [tokens(n, seed=40 + n) for n in (7, 3, 5)]
    texts = [tokens(n, seed=50 + n) for n in (3 * CHUNK, CHUNK + 7, 2 * CHUNK)]

    def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for row, values in zip(ids, rows, strict=True):
            row[slice(ids.shape[1] - len(values), None) if side == "left" else slice(len(values))] = values
        return ids, (ids != 0).long()

    (ids, mask), (context, context_mask) = padded(questions), padded(texts)
    masks = {"attention_mask": mask} if mask_given else {}
    result = at_once(
        model, ids, context_ids=context, context_attention_mask=context_mask, repetition_penalty=1.3, **masks
    )
    assert torch.equal(result[:, : ids.shape[1]], ids)
    for row, question, text in zip(result, questions, texts, strict=True):
        single = at_once(model, question[None], context_ids=text[None], repetition_penalty=1.3)
        assert torch.equal(row[ids.shape[1] :], single[0, question.numel() :])
    # passages have other ranks in other rows, so that prompts are of other lengths
    plain = at_once(model, ids, context_ids=context, context_attention_mask=context_mask, **masks)
    for row, question, text in zip(plain, questions, texts, strict=True):
        assert torch.equal(row[ids.shape[1] :], in_steps(model, question[None], text[None])[0])


def test_several_questions_over_one_memory(model: Any, context: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, questions = model.compress(context), tokens(3, 6, seed=9)
    monkeypatch.setattr(type(model), "compress", lambda *args, **how: pytest.fail("compressed again"))
    result = at_once(model, questions, context_ids=context, memory=memory)
    beams = at_once(model, questions, context_ids=context, memory=memory, num_beams=2)
    selected = at_once(model, questions[:2], context_ids=context.expand(2, -1), memory=memory.select([0, 0]))
    monkeypatch.undo()
    for row, question in enumerate(questions):
        assert torch.equal(result[row, 6:], in_steps(model, question[None], context)[0])
        assert torch.equal(beams[row, 6:], in_steps(model, question[None], context, num_beams=2)[0])
    assert torch.equal(selected, result[:2])


def test_the_result_tells_what_was_read(model: Any, context: Tensor) -> None:
    questions = tokens(2, 6, seed=9)
    memory = model.compress(context)
    expected = model.find_passages(questions, context, memory=memory, count=COUNT)
    for beams in (1, 2):
        result = at_once(
            model, questions, context_ids=context, memory=memory, return_dict_in_generate=True, num_beams=beams
        )
        assert result.passages == expected
        assert result.memory.keys[0] is memory.keys[0]
    plain = model.generate(questions, memory=memory, return_dict_in_generate=True, **STEPS)
    assert plain.passages is None


def test_passages_that_were_found_before(model: Any, context: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    question = tokens(1, 6, seed=9)
    memory = model.compress(context)
    found = model.find_passages(question, context, memory=memory, count=5)
    expected = in_steps(model, question, context)
    monkeypatch.setattr(type(model), "find_passages", lambda *args, **how: pytest.fail("searched again"))
    result = model.generate(
        question, passages=[found[0][:COUNT]], tokenizer=Letters(), context_ids=context, memory=memory, **STEPS
    )
    assert torch.equal(result[:, 6:], expected)


def test_another_text_may_choose_and_the_answer_may_be_begun(model: Any, context: Tensor) -> None:
    question, asked = tokens(1, 6, seed=9), tokens(1, 4, seed=70)
    result = at_once(model, question, context_ids=context, query_ids=asked, answer_begin="so")
    assert torch.equal(result[:, 6:], in_steps(model, question, context, "so", asked))
    assert not torch.equal(result, at_once(model, question, context_ids=context, answer_begin="so"))
    padded, mask = torch.cat((torch.zeros(1, 2, dtype=torch.int64), asked), 1), torch.tensor([[0, 0, 1, 1, 1, 1]])
    masked = at_once(
        model, question, context_ids=context, query_ids=padded, query_attention_mask=mask, answer_begin="so"
    )
    assert torch.equal(masked, result)


def test_lengths_processors_and_criteria_are_of_the_question(model: Any, context: Tensor) -> None:
    question, lengths = tokens(1, 6, seed=9), []

    class Watch(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            lengths.append(input_ids.shape[1])
            return torch.zeros(len(input_ids), dtype=torch.bool)

    how = {"stopping_criteria": StoppingCriteriaList([Watch()]), "max_new_tokens": None, "max_length": 10}
    result = at_once(model, question, context_ids=context, **how)
    assert result.shape == (1, 10) and lengths == [7, 8, 9, 10]
    config = GenerationConfig(max_length=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    short = model.generate(question, config, passages=COUNT, tokenizer=Letters(), context_ids=context)
    assert torch.equal(short, result[:, :9])


def test_a_conversation_goes_on_over_the_cache(model: Any, context: Tensor) -> None:
    """The whole text again, or only what is new: what follows reads passages, question and answer."""
    question, more = tokens(1, 6, seed=9), tokens(1, 4, seed=71)
    first = at_once(model, question, context_ids=context, return_dict_in_generate=True)
    both = torch.cat((first.sequences, more), 1)
    cache = getattr(first, "cache", None) or first.past_key_values
    with warnings.catch_warnings():
        # the running text is within the window, and so is nothing counted twice
        warnings.simplefilter("error", UserWarning)
        second = model.generate(both, past_key_values=cache, **STEPS)
    assert torch.equal(second[:, : both.shape[1]], both)
    (found,) = first.passages
    words = "".join(map(chr, question[0].tolist()))
    prompt = model.passage_prompt(Letters(), context[0], found, words)
    whole = torch.cat((prompt, first.sequences[:, 6:], more), 1)
    expected = model.generate(whole, memory=first.memory, split_window=False, **STEPS)
    assert torch.equal(second[:, both.shape[1] :], expected[:, whole.shape[1] :])


def test_a_text_without_tokens_leaves_the_question(model: Any) -> None:
    question = tokens(1, 6, seed=9)
    result = at_once(model, question, context_ids=tokens(1, 3), context_attention_mask=torch.zeros(1, 3))
    prompt = torch.tensor([[ord("B"), ord("Q"), *question[0].tolist(), ord("A")]])
    assert torch.equal(result[:, 6:], model.generate(prompt, **STEPS)[:, prompt.shape[1] :])


def test_the_unknown_token_is_no_special_one(model: Any, context: Tensor) -> None:
    question = tokens(1, 6, seed=9)
    question[0, 2] = 3
    assert torch.equal(at_once(model, question, context_ids=context)[:, 6:], in_steps(model, question, context))


def test_tokens_are_decoded_in_fused_steps(monkeypatch: pytest.MonkeyPatch, context: Tensor) -> None:
    """As on CUDA, without its graph: every token after the first, over prompts of other lengths, padded on the left."""
    model = ready(build(**FIELDS).float())
    texts = torch.cat((context, context.flip(1)))
    mask = torch.ones_like(texts)
    # of 80 tokens 5 segments are found, of 9 there are 2
    mask[1, 9:] = 0
    ids = torch.tensor([[0, 0, 10, 11, 12], [13, 14, 15, 16, 17]])
    how = {"context_ids": texts, "context_attention_mask": mask, "return_dict_in_generate": True}
    expected = at_once(model, ids, **how)
    lengths: list[int] = []
    end = DecodeRunner._end
    monkeypatch.setattr(support, "RUN_ON_CPU", True)
    monkeypatch.setattr(
        DecodeRunner, "_end", lambda self, cache: lengths.append(cache.get_seq_length()) or end(self, cache)
    )
    assert decoding_obstacle(model, rows=2, memory=expected.memory) is None
    got = at_once(model, ids, **how)
    assert torch.equal(got.sequences, expected.sequences)
    prompt = 1 + COUNT * (3 + 16) + 1 + 3 + 1
    assert lengths == [prompt + step for step in range(5)]


@dataclasses.dataclass
class Bad:
    how: Callable[[Any, Tensor], dict[str, Any]]
    message: str
    kind: type[Exception] = ValueError


LONG = torch.arange(4, 124)[None]
BAD = [
    Bad(lambda m, c: {"passages": 0}, "passages: expected an integer of at least 1, or what find_passages .* got 0"),
    Bad(lambda m, c: {"passages": True}, "passages: expected an integer of at least 1, or .* got True"),
    Bad(lambda m, c: {"passages": "8"}, "passages: expected an integer of at least 1, or .* got '8'"),
    Bad(lambda m, c: {"passages": [[1]]}, r"passages: expected an integer of at least 1, or .* got \[\[1\]\]"),
    Bad(lambda m, c: {"passages": [[], []]}, "passages: expected those of 1 row as in input_ids, got those of 2"),
    Bad(
        lambda m, c: {"passages": m.find_passages(LONG[:, :5], torch.cat((c, c), 1), count=40)},
        r"expected ones within the \d+ tokens of row 0's text, got one up to",
    ),
    Bad(lambda m, c: {"passages": [[]], "query_ids": c[:, :3]}, "query_ids: expected none with passages that"),
    Bad(lambda m, c: {"query_ids": c[:, :3].expand(2, -1)}, "query_ids: expected 1 row as in input_ids, got 2"),
    Bad(lambda m, c: {"tokenizer": None}, "passages: expected tokenizer with it, for the texts of config.passage_pro"),
    Bad(lambda m, c: {"context_ids": None, "memory": m.compress(c)}, "passages: expected context_ids with it, the tex"),
    Bad(lambda m, c: {"input_ids": None}, "passages: expected input_ids with it, the questions, got none"),
    Bad(lambda m, c: {"position_ids": torch.arange(6)[None]}, "position_ids: expected none with passages"),
    Bad(lambda m, c: {"answer_begin": 3}, "answer_begin: expected a string, got int", TypeError),
    Bad(lambda m, c: {"passages": None, "answer_begin": "x"}, "answer_begin: expected passages with it, got 'x' alone"),
    Bad(lambda m, c: {"passages": 9}, r"passages: expected passages and question of at most 128 tokens \(config.windo"),
    Bad(lambda m, c: {"input_ids": torch.tensor([[1, 7, 8]])}, "got the special token '<1>' in row 0"),
    Bad(lambda m, c: {"input_ids": torch.tensor([[7, 8, 2]])}, "got the special token '<2>' in row 0"),
    Bad(lambda m, c: {"token_healing": True}, "token_healing: expected False where .* or passages are read, got True"),
    Bad(lambda m, c: {"context_ids": c[:, 1:], "memory": m.compress(c)}, "expected the 201 tokens of the memory's doc"),
    Bad(lambda m, c: {"context_ids": c.flip(1), "memory": m.compress(c)}, "expected the text that the memory was made"),
    Bad(lambda m, c: {"context_ids": c.expand(2, -1)}, "context_ids: expected 1 row as in question_ids, or 1, got 2"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.message[:40])
def test_bad_input_is_refused(model: Any, context: Tensor, bad: Bad) -> None:
    how: dict[str, Any] = {"input_ids": tokens(1, 6), "context_ids": context, "passages": 2, "tokenizer": Letters()}
    how |= bad.how(model, context)
    with pytest.raises(bad.kind, match=bad.message):
        model.generate(**{name: value for name, value in how.items() if value is not None}, **STEPS)


def test_models_and_caches_that_cannot_read_passages(model: Any, context: Tensor) -> None:
    question = tokens(1, 6)
    with pytest.raises(ValueError, match=r"expected config\.passage_prompt, got None"):
        at_once(build(window=128), question, context_ids=context)
    with pytest.raises(ValueError, match=r"passages: expected a model with a pick"):
        at_once(builders.model(), question, context_ids=context)
    first = at_once(model, question, context_ids=context, return_dict_in_generate=True)
    cache = getattr(first, "cache", None) or first.past_key_values
    with pytest.raises(ValueError, match=r"passages: expected an empty cache, got one of \d+ tokens"):
        at_once(model, first.sequences, context_ids=context, past_key_values=cache)
    with pytest.raises(ValueError, match="position_ids: expected none where passages stand in front of input_ids"):
        model.generate(
            first.sequences, past_key_values=cache, position_ids=torch.arange(first.sequences.shape[1])[None], **STEPS
        )

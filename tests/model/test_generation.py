"""Transformers' ways of generating, with a context."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, TextStreamer, pipeline
from transformers.cache_utils import DynamicCache

from . import builders

STEPS = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def model():
    return builders.model()


@pytest.fixture
def greedy(model):
    text, context = builders.ids(2, 10), builders.ids(2, 70)
    return text, context, model.generate(text, context_ids=context, do_sample=False, **STEPS)


def _tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<bos>", "<eos>"]
    vocabulary = {name: i for i, name in enumerate(special + [f"w{i}" for i in range(3, builders.VOCABULARY)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def test_compresses_once(model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, compress = [], model.compress
    monkeypatch.setattr(model, "compress", lambda *args, **kwargs: calls.append(1) or compress(*args, **kwargs))
    model.generate(builders.ids(2, 5), context_ids=builders.ids(2, 70), num_beams=2, **STEPS)
    assert len(calls) == 1


def test_static_cache(model, greedy) -> None:
    text, context, expected = greedy
    out = model.generate(text, context_ids=context, do_sample=False, cache_implementation="static", **STEPS)
    assert torch.equal(out, expected)


def test_without_cache(model, greedy) -> None:
    text, context, expected = greedy
    assert torch.equal(model.generate(text, context_ids=context, do_sample=False, use_cache=False, **STEPS), expected)


def test_chunked_prefill(model, greedy) -> None:
    text, context, expected = greedy
    out = model.generate(text, context_ids=context, do_sample=False, prefill_chunk_size=4, **STEPS)
    assert torch.equal(out, expected)


def test_prompt_lookup(model, greedy) -> None:
    text, context, expected = greedy
    out = model.generate(text[:1], context_ids=context[:1], do_sample=False, prompt_lookup_num_tokens=2, **STEPS)
    assert torch.equal(out, expected[:1])


def test_sampling_is_seeded_and_returns_sequences(model) -> None:
    text, context = builders.ids(2, 5), builders.ids(2, 70)
    outs = []
    for _ in range(2):
        torch.manual_seed(7)
        outs.append(model.generate(text, context_ids=context, do_sample=True, num_return_sequences=3, **STEPS))
    assert outs[0].shape == (6, 11)
    assert torch.equal(outs[0], outs[1])


def test_beams_read_their_own_memory(model) -> None:
    text, context = builders.ids(2, 5), builders.ids(2, 70)
    together = model.generate(text, context_ids=context, num_beams=3, do_sample=False, **STEPS)
    for i in range(2):
        alone = model.generate(text[i : i + 1], context_ids=context[i : i + 1], num_beams=3, do_sample=False, **STEPS)
        assert torch.equal(together[i], alone[0])


def test_dictionary_output_and_scores(model) -> None:
    long = builders.ids(1, 60)
    out = model.generate(long, return_dict_in_generate=True, output_scores=True, do_sample=False, **STEPS)
    assert torch.equal(out.sequences[:, :60], long)
    assert len(out.scores) == 6


def test_turns_share_a_cache(model) -> None:
    first, second, context = builders.ids(1, 8), builders.ids(1, 5), builders.ids(1, 70)
    memory = model.compress(context, query_ids=first)
    cache = DynamicCache(config=model.config.text_config)
    answer = model.generate(first, memory=memory, past_key_values=cache, do_sample=False, **STEPS)
    turn = torch.cat((answer, second), 1)
    continued = model.generate(turn, memory=memory, past_key_values=cache, do_sample=False, **STEPS)
    fresh = model.generate(turn, memory=memory, do_sample=False, **STEPS)
    assert torch.equal(continued, fresh)


def test_streamer(model, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = _tokenizer()
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    text = builders.ids(1, 40)
    out = model.generate(text, streamer=streamer, do_sample=False, **STEPS)
    assert capsys.readouterr().out.split() == tokenizer.decode(out[0, 40:]).split()


def test_text_generation_pipeline(model) -> None:
    tokenizer = _tokenizer()
    prompt = " ".join(f"w{i}" for i in builders.ids(80).tolist())
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    [result] = generator(prompt, do_sample=False, return_full_text=False, **STEPS)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    expected = model.generate(ids, do_sample=False, **STEPS)
    assert result["generated_text"].split() == tokenizer.decode(expected[0, 80:], skip_special_tokens=True).split()


def test_hidden_states_and_attentions(model) -> None:
    with torch.no_grad():
        out = model(builders.ids(1, 6), context_ids=builders.ids(1, 40), output_hidden_states=True)
    assert len(out.hidden_states) == 5
    assert all(state.shape == (1, 6, 64) for state in out.hidden_states)


def test_logits_to_keep(model) -> None:
    text, context = builders.ids(2, 6), builders.ids(2, 40)
    with torch.no_grad():
        full, last = model(text, context_ids=context).logits, model(text, context_ids=context, logits_to_keep=2).logits
    torch.testing.assert_close(last, full[:, -2:])


def test_bfloat16(model) -> None:
    text, context = builders.ids(2, 10), builders.ids(2, 70)
    with torch.no_grad():
        expected = model(text, context_ids=context).logits
        half = model.to(torch.bfloat16)(text, context_ids=context)
    assert half.memory.dtype == torch.bfloat16
    assert (half.logits.float() - expected).norm() / expected.norm() < 0.05

"""What each system reads, and that the decoder alone is the base."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.evaluation.decoding_rows import decode_rows, read_prompt
from sharedllm_ext.evaluation.prompts import Prompts
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.systems import (
    FullSystem,
    MemorySystem,
    NtkSystem,
    PassagesSystem,
    PickSystem,
    System,
    WindowSystem,
    YarnSystem,
    plain_decoder,
    yarn_parameters,
)
from sharedllm_ext.model.passages import Passage, passage_span

from ..model import builders

POSITIONS = 64


def llama(**fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **ids, "initializer_range": 0.2, **fields})).eval()


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return llama()


@pytest.fixture(scope="module")
def model(base: LlamaForCausalLM) -> Any:
    tree = {"chunk_size": 32, "slots_per_node": 4, "injection_layers": 2, "window": 64}
    made = SharedLLMForCausalLM.from_base(base, **tree)
    torch.manual_seed(1)
    for block in made.injected_blocks:
        torch.nn.init.normal_(block.o_proj.weight, std=0.3)
    return made.eval()


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> Prompts:
    return Prompts(tokenizer)


def record(words: int = 40, **more: Any) -> Record:
    context = " ".join(f"amber{number}" for number in range(words))
    fields: dict[str, Any] = {"context": context, "question": " amber3?", "answer_prefix": " It is", "id": "t/0"}
    return Record(**{"task": "t", "answers": ["x"], "max_new_tokens": 6, "metric": "part", **fields, **more})


def greedy(model: Any, ids: Sequence[int], count: int) -> list[int]:
    """Greedy tokens without a cache."""
    tokens = torch.tensor([list(ids)])
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), 1)
    return tokens[0, len(ids) :].tolist()


def test_decoder_alone_is_the_base_and_shares_its_weights(base: Any, model: Any) -> None:
    plain = plain_decoder(model)
    ids = torch.arange(100).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, base(ids).logits)
    assert type(plain) is LlamaForCausalLM
    assert plain.model.layers[2].mlp.up_proj.weight.data_ptr() == model.model.layers[2].mlp.up_proj.weight.data_ptr()
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", sorted(builders.FAMILIES))
def test_decoder_alone_of_every_family(family: str) -> None:
    base = builders.base(family)
    plain = plain_decoder(SharedLLMForCausalLM.from_base(base, **builders.TREE))
    ids = builders.ids(1, 40)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, base.eval()(ids).logits)
    assert type(plain) is type(base)


def test_decoder_alone_with_tied_embeddings() -> None:
    base = llama(tie_word_embeddings=True)
    plain = plain_decoder(SharedLLMForCausalLM.from_base(base, injection_layers=1))
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    ids = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, base(ids).logits)


def test_full_attention_reads_everything(base: Any, model: Any, prompts: Prompts, tokenizer: Any) -> None:
    one = record()
    ids = prompts.ids(one)
    system: System = FullSystem(plain_decoder(model), prompts)
    whole = [*ids.context.tolist(), *ids.question]
    assert len(whole) > POSITIONS
    assert system.answer([one, record(2)]) == [
        tokenizer.decode(greedy(base, whole, 6), skip_special_tokens=True),
        system.answer([record(2)])[0],
    ]


def test_memory_is_of_the_context_and_the_question_is_running_text(
    model: Any, prompts: Prompts, tokenizer: Any
) -> None:
    one = record()
    ids = prompts.ids(one)
    running = torch.tensor([ids.question])
    context = torch.from_numpy(ids.context.astype("int64")).unsqueeze(0)
    expected = model.generate(running, context_ids=context, query_ids=running, max_new_tokens=6, do_sample=False)
    system = MemorySystem(model, prompts)
    assert system.answer([one]) == [tokenizer.decode(expected[0, running.shape[1] :], skip_special_tokens=True)]
    assert system.answer([one]) != system.answer([record(39)])
    # nothing to compress
    assert system.answer([record(0)]) == FullSystem(plain_decoder(model), prompts).answer([record(0)])


def test_question_longer_than_the_window(model: Any, prompts: Prompts) -> None:
    with pytest.raises(ValueError, match=r"t/0: expected at most 64 tokens in the window for the question, got \d+"):
        MemorySystem(model, prompts).answer([record(question=" why?" * 100)])


def test_window_reads_the_first_and_the_last_tokens(model: Any, prompts: Prompts) -> None:
    one = record()
    ids = prompts.ids(one)
    whole = [*ids.context.tolist(), *ids.question]
    system = WindowSystem(plain_decoder(model), prompts, window=40, sinks=4)
    read = system.read(one, ids)
    assert read == whole[:4] + whole[-30:]
    assert len(read) + one.max_new_tokens == 40
    short = record(1)
    assert system.read(short, prompts.ids(short)) == [
        *prompts.ids(short).context.tolist(),
        *prompts.ids(short).question,
    ]
    expected = FullSystem(system.model, prompts)._generate(one, read)
    assert system.answer([one]) == [expected]
    with pytest.raises(ValueError, match="t/0: expected at most 12 tokens in the window for sinks, question"):
        WindowSystem(system.model, prompts, window=12).answer([one])


def test_passages_with_the_question_s_words_are_read_in_their_order(model: Any, prompts: Prompts) -> None:
    one = record(100)
    ids = prompts.ids(one)
    system = PassagesSystem(plain_decoder(model), prompts, window=64, count=4, size=8)
    read = system.read(one, ids)
    assert len(read) == 4 * 8 + len(ids.question)
    assert read[-len(ids.question) :] == ids.question
    passages = [ids.context[i : i + 8].tolist() for i in range(0, len(ids.context), 8)]
    places = [passages.index(read[i : i + 8]) for i in range(0, 32, 8)]
    assert places == sorted(places)
    wanted = prompts.encode(" amber3").tolist()
    assert any(read[i : i + len(wanted)] == wanted for i in range(32))
    # as many as have room: 64 - 6 of the answer - the question
    many = PassagesSystem(system.model, prompts, window=64, count=100, size=8).read(one, ids)
    assert len(many) + 6 <= 64 < len(many) + 6 + 8
    # a context that fits is read whole
    short = record(3)
    own = prompts.ids(short)
    assert system.read(short, own) == [*own.context.tolist(), *own.question]
    with pytest.raises(ValueError, match="t/0: expected at most 12 tokens in the window for a passage, question and"):
        PassagesSystem(system.model, prompts, window=12).answer([one])


def test_pick_reads_the_passages_that_the_model_finds(prompts: Prompts, tokenizer: Any) -> None:
    fields = {"injection_layers": 2, "chunk_size": 64, "slots_per_node": 4, "query_aware": False, "window": 96}
    fields |= {"pick_layers": [0, 1], "segment_size": 8, "segment_margin": 4, "slot_position": "end"}
    parts = {"begin": "amber", "passage": " {rank}:", "question": " bold", "answer": " calm"}
    made = SharedLLMForCausalLM.from_base(llama(), passage_prompt=parts, **fields).eval()
    one = record(60)
    context = torch.from_numpy(prompts.encode(one.context).astype("int64")).unsqueeze(0)
    asked = torch.tensor([prompts.encode("amber3?").tolist()])
    memory = made.compress(context)
    (found,) = made.find_passages(asked, context, memory=memory, count=3)
    running = made.passage_prompt(tokenizer, context[0], found, "amber3?", "It is")
    expected = made.generate(running, memory=memory, max_new_tokens=6, do_sample=False)
    assert PickSystem(made, prompts, count=3).answer([one]) == [
        tokenizer.decode(expected[0, running.shape[1] :], skip_special_tokens=True)
    ]
    # more than have room are cut to those that have
    read: list[int] = []
    system = PickSystem(made, prompts, count=50)
    original = system._generate
    system._generate = lambda record, ids, **more: read.append(len(ids)) or original(record, ids, **more)  # type: ignore
    system.answer([one])
    assert 60 < read[0] <= 90
    assert len(PickSystem(made, prompts).answer([record(0)])) == 1
    with pytest.raises(ValueError, match="t/0: expected at most 96 tokens in the window for a passage, question"):
        system.answer([record(question=" why?" * 100)])


def test_pick_needs_one(model: Any, prompts: Prompts) -> None:
    with pytest.raises(ValueError, match="model: expected one with a pick and a passage_prompt, got one without"):
        PickSystem(model, prompts)


def test_yarn_is_transformers_own(model: Any, base: Any, prompts: Prompts, tokenizer: Any) -> None:
    rope = yarn_parameters(model.config, 4)
    system = YarnSystem(plain_decoder(model, rope=rope), prompts)
    theta = base.config.rope_parameters["rope_theta"]
    stretched = llama(rope_parameters={**rope, "rope_theta": theta}, max_position_embeddings=POSITIONS)
    stretched.load_state_dict(base.state_dict())
    one = record()
    ids = prompts.ids(one)
    whole = [*ids.context.tolist(), *ids.question]
    assert system.answer([one]) == [tokenizer.decode(greedy(stretched, whole, 6), skip_special_tokens=True)]
    assert not torch.equal(system.model.model.rotary_emb.inv_freq, base.model.rotary_emb.inv_freq)
    assert system.settings["factor"] == 4.0
    # the model itself is as it was
    assert model.config.text_config.rope_parameters["rope_type"] == "default"


def test_ntk_frequencies_are_transformers_dynamic_ones(
    model: Any, base: Any, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = NtkSystem(plain_decoder(model, rope={}), prompts)
    used: list[torch.Tensor] = []
    original = FullSystem._generate

    def noting(self: Any, *args: Any, **more: Any) -> str:
        used.append(self.model.model.rotary_emb.inv_freq.clone())
        return original(self, *args, **more)

    monkeypatch.setattr(FullSystem, "_generate", noting)
    long, short = record(), record(1)
    alone = [*system.answer([long]), *system.answer([short])]
    theta = base.config.rope_parameters["rope_theta"]
    dynamic = llama(rope_parameters={"rope_type": "dynamic", "factor": 1.0, "rope_theta": theta})
    length = len(prompts.ids(long)) + long.max_new_tokens
    rotary = dynamic.model.rotary_emb
    rotary(torch.zeros(1), torch.tensor([[length - 1]]))
    assert torch.allclose(used[0], rotary.inv_freq, rtol=1e-6)
    # within the trained positions nothing is stretched, also after a long prompt
    assert torch.equal(used[1], base.model.rotary_emb.inv_freq)
    assert torch.equal(system.model.model.rotary_emb.inv_freq, base.model.rotary_emb.inv_freq)
    # answered together, every row keeps its own
    assert system.answer([long, short]) == alone and len(used) == 2
    assert torch.equal(system.model.model.rotary_emb.inv_freq, base.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("family", ["phi3_longrope", "llama"])
def test_records_are_answered_together_where_rotations_allow(family: str, tokenizer: Any) -> None:
    plain = plain_decoder(SharedLLMForCausalLM.from_base(builders.base(family), **builders.TREE))
    seen: list[int] = []
    original = plain.generate
    plain.generate = lambda **more: seen.append(1) or original(**more)  # type: ignore[func-returns-value]

    class Few(Prompts):
        """Tokens that the small models know."""

        def encode(self, text: str, name: str = "text") -> Any:
            return super().encode(text, name) % builders.VOCABULARY

    system = FullSystem(plain, Few(tokenizer))
    records = [record(count, id=f"t/{count}") for count in (30, 2, 11)]
    together = system.answer(records)
    assert len(seen) == (3 if family == "phi3_longrope" else 0)
    assert together == [answer for one in records for answer in system.answer([one])]


class Lengths:
    """Finds longer passages better, and the last ones of a length first."""

    name = "lengths"

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"way": "last"}

    def scores(self, record: Record, context: Any, size: int) -> Any:
        return np.arange(-(-len(context) // size), dtype=np.float64)


def test_passages_of_another_search(model: Any, prompts: Prompts) -> None:
    one = record(100)
    ids = prompts.ids(one)
    system = PassagesSystem(plain_decoder(model), prompts, window=64, count=2, size=8, search=Lengths())
    context = ids.context.tolist()
    start = (len(context) - 1) // 8 * 8 - 8
    assert system.read(one, ids) == [*ids.begin, *context[start:], *ids.question]
    assert (system.name, system.settings["system"], system.settings["way"]) == ("lengths", "lengths", "last")


def test_pick_reads_the_segments_of_another_search(prompts: Prompts) -> None:
    fields = {"injection_layers": 2, "chunk_size": 64, "slots_per_node": 4, "query_aware": False, "window": 96}
    fields |= {"pick_layers": [0, 1], "segment_size": 8, "segment_margin": 4, "slot_position": "end"}
    parts = {"begin": "amber", "passage": " {rank}:", "question": " bold", "answer": " calm"}
    made = SharedLLMForCausalLM.from_base(llama(), passage_prompt=parts, **fields).eval()
    one = record(60)
    context = prompts.encode(one.context)
    system = PickSystem(made, prompts, count=2, search=Lengths())
    read: list[list[int]] = []
    system._generate = lambda record, ids, **more: read.append(list(ids)) or str(more["memory"].num_tokens)  # type: ignore
    assert system.answer([one]) == [str([len(context)])]
    assert (system.name, system.settings) == (
        "pick-lengths",
        {"system": "pick-lengths", "passages": 2, "way": "last"},
    )
    last = (len(context) - 1) // 8
    found = [Passage(*passage_span(last - rank, len(context), 8, 4), last - rank, rank, 0.0) for rank in range(2)]
    ids = torch.from_numpy(context.astype("int64"))
    assert read == [made.passage_prompt(prompts.tokenizer, ids, found, "amber3?", "It is")[0].tolist()]


@pytest.mark.parametrize("family", sorted(set(builders.FAMILIES) - {"phi3_longrope"}))
def test_rows_are_answered_together_as_alone(family: str) -> None:
    plain = plain_decoder(SharedLLMForCausalLM.from_base(builders.base(family), **builders.TREE))
    torch.manual_seed(3)
    texts = [builders.ids(1, count) for count in (37, 5, 90)]
    alone = [greedy(plain, text[0].tolist(), 7) for text in texts]
    rows = [read_prompt(plain, text) for text in texts]
    assert [row.position for row in rows] == [37, 5, 90]
    assert decode_rows(plain, rows, [7] * 3, [()] * 3) == alone
    # each row has limits and ends of its own
    ends = {alone[0][2]}
    cut = alone[0][: alone[0].index(alone[0][2]) + 1]
    assert decode_rows(plain, rows, [7, 1, 4], [ends, (), ()]) == [cut, alone[1][:1], alone[2][:4]]


def test_answers_end_where_the_record_says(model: Any, prompts: Prompts, tokenizer: Any) -> None:
    plain = plain_decoder(model)
    newline = prompts.encode("\n").tolist()[-1]
    seen: list[Any] = []
    plain.generate = lambda **more: seen.append(more) or more["input_ids"]  # type: ignore[func-returns-value]
    system = FullSystem(plain, prompts)
    assert [system.answer([one])[0] for one in (record(), record(stop_at_newline=True))] == ["", ""]
    assert [more["eos_token_id"] for more in seen] == [[0], [0, newline]]
    assert {more["max_new_tokens"] for more in seen} == {6}
    assert not any(more["do_sample"] for more in seen)


def test_what_no_decoder_is_made_of(model: Any) -> None:
    scaled = copy.deepcopy(model.config)
    scaled.text_config.rope_parameters = {**scaled.text_config.rope_parameters, "rope_type": "linear", "factor": 2.0}
    with pytest.raises(ValueError, match="rope: expected a model with rope_type 'default' to stretch, got 'linear'"):
        plain_decoder(SharedLLMForCausalLM(scaled), rope={})
    gemma = SharedLLMForCausalLM.from_base(builders.base("gemma3_text"), **builders.TREE)
    with pytest.raises(
        ValueError, match="rope: expected one rotation for all layers to stretch, got one each of sliding_"
    ):
        plain_decoder(gemma, rope={})
    offloaded = copy.deepcopy(model)
    offloaded.model.norm.to("meta")
    with pytest.raises(ValueError, match=r"expected plain weights .*offloaded ones \(model.norm.weight\)"):
        plain_decoder(offloaded)

"""Continuous batching: questions that join and leave get the tokens that each gets alone.

``python -m tests.model.test_continuous_batch 1000`` runs that many random mixes.
"""

import gc
import random
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sharedllm_ext
from sharedllm_ext import ContextMemory, ContinuousBatch
from sharedllm_ext.model.decoding import Question, layers, support

from ..support import needs_cuda
from . import builders
from .recorded import Recorded, use_recordings

CAPACITY, LONGEST = 24, 9
ALONE: dict[str, Any] = {"max_new_tokens": LONGEST, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Pool:
    """Texts and memories of one model, and the answer of each text over each memory."""

    def __init__(self, family: str = "llama", texts: int = 12, dtype: torch.dtype = torch.float32) -> None:
        self.model = builders.model(family, dtype=dtype)
        self.texts = [builders.ids(1 + number % 11) for number in range(texts)]
        documents = ContextMemory.concat([self.model.compress(builders.ids(1, tokens)) for tokens in (40, 100)])
        one, two = documents.select([0]), documents.select([1])
        self.memories = [None, one, two, self.model.compress(builders.ids(1, 70)), two]
        # rows of several documents, which share tensors with rows of one, and of another memory
        three = ContextMemory.concat([self.model.compress(builders.ids(1, tokens)) for tokens in (10, 64, 33)])
        self.memories += [documents.with_rows([row]) for row in ([0, 1], [1, 0])]
        self.memories += [three.with_rows([row]) for row in ([2, 0, 1], [1])]
        self._answers: dict[tuple[int, int], list[int]] = {}

    def answer(self, text: int, memory: int) -> list[int]:
        """All tokens of a question alone, by the model's own forward."""
        if (text, memory) not in self._answers:
            ids, read = self.texts[text][None], self.memories[memory]
            out = self.model.generate(ids, memory=read, disable_compile=True, **ALONE)
            self._answers[text, memory] = out[0, ids.shape[1] :].tolist()
        return self._answers[text, memory]


def run_mix(pool: Pool, seed: int) -> int:
    """A random mix of questions that join, end, and are removed; returns how many there were."""
    choose = random.Random(seed)
    batch = ContinuousBatch(pool.model, rows=choose.choice([1, 2, 3, 5, 9, 20]), tokens=CAPACITY)
    asked: list[tuple[Question, int, int, int, set[int]]] = []
    memories = choose.choice([[1], [0], [1, 2], list(range(5)), [5], [1, 5, 6, 7], list(range(9))])

    def join() -> None:
        count = choose.randint(1, batch.free)
        texts = [choose.randrange(len(pool.texts)) for _ in range(count)]
        read = [choose.choice(memories) for _ in texts]
        if 0 in read or choose.random() < 0.5:
            read = [read[0]] * count
        most = choose.randint(1, LONGEST)
        ends = set() if choose.random() < 0.5 else {pool.answer(texts[0], read[0])[choose.randrange(LONGEST)]}
        given: Any = pool.memories[read[0]]
        if len(set(read)) > 1:
            given = ContextMemory.concat([pool.memories[memory] for memory in read])
        settings: dict[str, Any] = {"max_new_tokens": most, "eos_token_id": sorted(ends)}
        questions = batch.add_all([pool.texts[text] for text in texts], given, **settings)
        asked.extend((q, text, m, most, ends) for q, text, m in zip(questions, texts, read, strict=True))

    for _ in range(choose.randint(5, 30)):
        if batch.free and choose.random() < 0.4:
            join()
        if batch.live and choose.random() < 0.1:
            batch.remove(choose.choice(batch.live))
        live = batch.live
        before = {question: list(question.tokens) for question in live}
        got = batch.step()
        assert list(got) == live
        for question, token in got.items():
            assert question.tokens == [*before[question], token]
    while batch.live:
        batch.step()
    for question, text, memory, most, ends in asked:
        expected = pool.answer(text, memory)[:most]
        end = next((index for index, token in enumerate(expected) if token in ends), None)
        if question.finished == "removed":
            expected = expected[: len(question.tokens)]
            assert end is None or end >= len(expected)
        elif end is not None:
            assert question.finished == "end"
            expected = expected[: end + 1]
        else:
            assert question.finished == "length"
        assert question.tokens == expected, (seed, text, memory)
    return len(asked)


@pytest.fixture(scope="module")
def pool() -> Pool:
    torch.manual_seed(11)
    return Pool()


@pytest.fixture(params=["few", "matmuls", "ahead", "graphs", "graphs of few"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Fused kernels, a library's matmuls, the latter with steps that start ahead, either as what stands for graphs."""
    if "graphs" in request.param:
        use_recordings(monkeypatch)
    if "few" not in request.param:
        monkeypatch.setattr(layers, "FEW_ROWS", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr(support, "RUN_ON_CPU", request.param in ("ahead", "graphs"))
    before = Recorded.replays
    yield request.param
    assert (Recorded.replays > before) == ("graphs" in request.param)


@pytest.mark.parametrize("seed", range(7, 19))
def test_random_mixes(pool: Pool, way: str, seed: int) -> None:
    assert run_mix(pool, seed) > 0


@pytest.mark.parametrize("family", builders.DECODED)
def test_families(family: str, way: str) -> None:
    pool = Pool(family, texts=4)
    run_mix(pool, 3)


def test_answers(pool: Pool, way: str) -> None:
    for memory in (0, 1):
        batch = ContinuousBatch(pool.model, rows=5, tokens=CAPACITY)
        got = batch.answer(pool.texts, pool.memories[memory], max_new_tokens=LONGEST, eos_token_id=[])
        assert got == [pool.answer(text, memory) for text in range(len(pool.texts))]
    batch = ContinuousBatch(pool.model, rows=5, tokens=CAPACITY)
    got = batch.answer(pool.texts, pool.memories[7], max_new_tokens=LONGEST, eos_token_id=[])
    assert got == [pool.answer(text, 7) for text in range(len(pool.texts))]
    several = ContextMemory.concat([pool.memories[1 + text % 3] for text in range(12)])
    got = batch.answer([text.tolist() for text in pool.texts], several, max_new_tokens=LONGEST, eos_token_id=[])
    assert got == [pool.answer(text, 1 + text % 3) for text in range(12)]
    assert batch.free == 5


def test_a_row_of_many_documents_beside_rows_of_one(pool: Pool, way: str) -> None:
    """More reads than a step has rows, and tables for positions that no document alone has."""
    many = ContextMemory.concat([pool.model.compress(builders.ids(1, 20 + number)) for number in range(40)])
    memory = many.with_rows([list(range(40)), 3, [7, 2]])
    batch = ContinuousBatch(pool.model, rows=3, tokens=CAPACITY)
    got = batch.answer(pool.texts[4:7], memory, max_new_tokens=LONGEST, eos_token_id=[])
    for row, answer in enumerate(got):
        ids = pool.texts[4 + row][None]
        alone = pool.model.generate(ids, memory=memory.select([row]), disable_compile=True, **ALONE)
        assert answer == alone[0, ids.shape[1] :].tolist()


def test_more_rows_than_the_kernels_are_made_for(pool: Pool, way: str) -> None:
    batch = ContinuousBatch(pool.model, rows=40, tokens=CAPACITY)
    got = batch.answer(pool.texts * 5, pool.memories[1], max_new_tokens=LONGEST, eos_token_id=[])
    assert got == [pool.answer(text, 1) for text in range(12)] * 5


def test_bfloat16() -> None:
    torch.manual_seed(2)
    model = builders.model(dtype=torch.bfloat16)
    memory, texts = model.compress(builders.ids(1, 70)), [builders.ids(5 + number) for number in range(4)]
    seen: list[Tensor] = []

    def choose(logits: Tensor, questions: list[Question]) -> Tensor:
        seen.append(logits.clone())
        return logits.argmax(-1)

    batch = ContinuousBatch(model, rows=4, tokens=CAPACITY, choose=choose)
    answers = batch.answer(texts, memory, max_new_tokens=6, eos_token_id=[])
    for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        whole = torch.cat((text, torch.tensor(answer[:-1])))
        with torch.no_grad():
            expected = model(whole[None], memory=memory).logits[0, len(text) - 1 :].float()
        got = torch.stack([logits[row] for logits in seen]).float()
        assert (got - expected).norm() / expected.norm() < 0.05


def test_who_chooses(pool: Pool) -> None:
    def second(logits: Tensor, questions: list[Question]) -> Tensor:
        assert logits.shape == (len(questions), builders.VOCABULARY)
        return logits.topk(2).indices[:, 1]

    batch = ContinuousBatch(pool.model, rows=2, tokens=CAPACITY, choose=second)
    question = batch.add(pool.texts[4], pool.memories[1], max_new_tokens=3)
    while batch.live:
        batch.step()
    ids = pool.texts[4]
    for token in question.tokens:
        with torch.no_grad():
            assert int(pool.model(ids[None], memory=pool.memories[1]).logits[0, -1].topk(2).indices[1]) == token
        ids = torch.cat((ids, torch.tensor([token])))
    batch = ContinuousBatch(pool.model, rows=2, tokens=CAPACITY, choose=lambda logits, _: logits[:, :2].argmax(-1)[:1])
    batch.add_all(pool.texts[:2])
    with pytest.raises(ValueError, match=r"choose: expected tokens of shape \(2,\), got \(1,\)"):
        batch.step()


def test_weights_that_change(way: str) -> None:
    model = builders.model()
    memory, text = model.compress(builders.ids(1, 70)), builders.ids(6)
    batch = ContinuousBatch(model, rows=3, tokens=CAPACITY)
    question = batch.add(text, memory, max_new_tokens=8, eos_token_id=[])
    expected, ids = [], text
    cache = None
    for step in range(8):
        if step == 4:
            with torch.no_grad():
                model.lm_head.weight.copy_(model.lm_head.weight.roll(3, 0))
        batch.step()
        with torch.no_grad():
            out = model(ids[None], memory=memory, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        expected.append(int(out.logits[0, -1].argmax()))
        ids = torch.tensor(expected[-1:])
    assert question.tokens == expected
    # other tensors are noticed when a question joins
    state = {name: x.clone() for name, x in model.state_dict().items()}
    state["lm_head.weight"] = state["lm_head.weight"].roll(5, 0)
    model.load_state_dict(state, assign=True)
    fresh = batch.add(text, memory, max_new_tokens=8, eos_token_id=[])
    while batch.live:
        batch.step()
    alone = {**ALONE, "max_new_tokens": 8, "disable_compile": True}
    assert fresh.tokens == model.generate(text[None], memory=memory, **alone)[0, 6:].tolist()


def test_default_ends(pool: Pool) -> None:
    answer = pool.answer(5, 1)
    batch = ContinuousBatch(pool.model, rows=2, tokens=CAPACITY)
    own = pool.model.generation_config.eos_token_id
    try:
        pool.model.generation_config.eos_token_id = [answer[3], 2]
        question = batch.add(pool.texts[5], pool.memories[1])
    finally:
        pool.model.generation_config.eos_token_id = own
    assert question.ends == {answer[3], 2} and question.max_new_tokens == CAPACITY - len(pool.texts[5])
    while batch.live:
        batch.step()
    assert question.finished == "end" and question.tokens == answer[: answer.index(answer[3]) + 1]


def test_a_full_batch_says_what_makes_room(pool: Pool) -> None:
    text = pool.texts[4]
    batch = ContinuousBatch(pool.model, rows=2, tokens=10)
    batch.add(text)
    with pytest.raises(ValueError, match=r"texts: expected at most 1 \(the free rows of 2\); got 2"):
        batch.add_all([text] * 2)
    other = batch.add(text)
    with pytest.raises(
        ValueError,
        match="texts: expected none while all rows are taken: step until a question ends, or remove one; got 1",
    ):
        batch.add(text)
    # as it says
    batch.remove(other)
    batch.add(text)
    assert batch.free == 0


def test_what_is_refused(pool: Pool) -> None:
    model, text = pool.model, pool.texts[4]
    for settings, error in (
        ({"rows": 0}, "rows: expected 1 to 256, got 0"),
        ({"rows": 257}, "rows: expected 1 to 256, got 257"),
        ({"tokens": 1}, "tokens: expected at least 2, for a question and an answer, got 1"),
    ):
        with pytest.raises(ValueError, match=error):
            ContinuousBatch(model, **settings)
    batch = ContinuousBatch(model, rows=2, tokens=10)
    cases: list[tuple[list[Any], dict[str, Any], str]] = [
        ([text] * 3, {}, r"texts: expected at most 2 \(the free rows of 2\); got 3"),
        ([text[:0]], {}, r"text: expected token ids of shape \[tokens\], got torch.int64 \(0,\)"),
        ([[]], {}, r"text: expected token ids of shape \[tokens\], got torch.int64 \(0,\)"),
        (["def f("], {}, r"text: expected token ids of shape \[tokens\], got 'def f\('; a tokenizer makes them"),
        ([["f", None]], {}, r"text: expected token ids of shape \[tokens\], got \['f', None\]"),
        ([text.float()], {}, r"got torch.float32 \(5,\)"),
        ([text], {"max_new_tokens": 6}, "text: expected at most 10 tokens with its answer, got 5 and 6 more"),
        ([text], {"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ([text] * 2, {"memory": pool.memories[1].expand(3)}, "memory: expected 1 or 2 rows, one for each text, got 3"),
        ([text], {"memory": pool.memories[1].expand(3)}, "memory: expected 1 row, got 3"),
        ([text], {"memory": pool.memories[1].to(torch.bfloat16)}, "memory: expected torch.float32 on cpu"),
        ([text * 0 + builders.VOCABULARY], {}, "input_ids"),
    ]
    for texts, settings, error in cases:
        with pytest.raises(ValueError, match=error):
            batch.add_all(texts, **settings)
    with pytest.raises(ValueError, match=r"text: expected token ids of shape \[tokens\], got 'def f\('"):
        batch.add("def f(")  # type: ignore[arg-type]
    assert batch.free == 2 and not batch.step()
    handle = model.model.norm.register_forward_hook(print)
    with pytest.raises(ValueError, match=r"model: expected one that decodes by steps; model.norm: expected no hook"):
        batch.add(text)
    handle.remove()
    question = batch.add(text, max_new_tokens=1)
    assert list(batch.step()) == [question]
    with pytest.raises(ValueError, match="question: expected a live one of this batch, got one that is length"):
        batch.remove(question)


def test_an_answer_that_fails_leaves_no_question(pool: Pool) -> None:
    batch = ContinuousBatch(pool.model, rows=1, tokens=CAPACITY)
    with pytest.raises(ValueError, match="text: expected at most"):
        batch.answer([pool.texts[3], builders.ids(CAPACITY)], max_new_tokens=2)
    assert batch.free == 1


def test_memories_go_when_others_come(pool: Pool) -> None:
    model = pool.model
    batch = ContinuousBatch(model, rows=2, tokens=CAPACITY)
    memory = model.compress(builders.ids(1, 70))
    held = weakref.ref(memory.keys[0])
    batch.answer([pool.texts[3]], memory, max_new_tokens=2)
    del memory
    batch.answer([pool.texts[3]], pool.memories[1], max_new_tokens=2)
    gc.collect()
    assert held() is None


def test_in_the_package() -> None:
    assert sharedllm_ext.ContinuousBatch is ContinuousBatch


@needs_cuda
@pytest.mark.parametrize("seed", range(4))
def test_graphs_on_cuda(seed: int) -> None:
    """Logits of mixes on CUDA are those of a whole forward pass; graphs are replayed."""
    base = builders.base("llama", hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    model = builders.SharedLLMForCausalLM.from_base(base.to("cuda", torch.bfloat16), **builders.TREE)
    for block in model.injected_blocks:
        nn.init.normal_(block.o_proj.weight, std=0.1)
    memories = [None, *(model.compress(builders.ids(1, tokens).cuda()) for tokens in (40, 100, 70))]
    if seed > 1:
        both = ContextMemory.concat(memories[1:])
        memories += [both.with_rows([row]) for row in ([2, 0], [0, 1, 2], [1])]
    seen: dict[Question, list[Tensor]] = {}

    def choose(logits: Tensor, questions: list[Question]) -> Tensor:
        for row, question in enumerate(questions):
            seen.setdefault(question, []).append(logits[row].float().clone())
        return logits.argmax(-1)

    pick = random.Random(seed)
    batch = ContinuousBatch(model, rows=40, tokens=64, choose=choose)
    asked: list[tuple[Question, Tensor, Any]] = []
    for step in range(40):
        if batch.free and (pick.random() < 0.5 or not step):
            memory = pick.choice(memories[1:2] if seed % 2 else memories)
            texts = [builders.ids(pick.randint(1, 20)) for _ in range(pick.randint(1, batch.free))]
            most = pick.randint(1, 30)
            asked += [
                (question, text, memory)
                for question, text in zip(
                    batch.add_all(texts, memory, max_new_tokens=most, eos_token_id=[]), texts, strict=True
                )
            ]
        batch.step()
    while batch.live:
        batch.step()
    assert any(step._graph is not None for step in batch._steps.values())
    for question, text, memory in asked:
        whole = torch.cat((text, torch.tensor(question.tokens[:-1], dtype=torch.int64)))[None].cuda()
        with torch.no_grad():
            expected = model(whole, memory=memory, split_window=False).logits[0, len(text) - 1 :].float()
        got = torch.stack(seen[question])
        assert (got - expected).norm() / expected.norm() < 0.05


def main(count: int) -> None:
    """Runs mixes, each way of multiplying and with steps ahead in turn."""
    torch.manual_seed(11)
    pool, questions = Pool(), 0
    few = dict(layers.FEW_ROWS)
    for seed in range(count):
        layers.FEW_ROWS.update(few if seed % 3 == 0 else {"cpu": 0})
        support.RUN_ON_CPU = seed % 3 == 2
        questions += run_mix(pool, 1000 + seed)
    print(f"{count} mixes, {questions} questions: each as alone")


if __name__ == "__main__":
    main(int(sys.argv[1]))

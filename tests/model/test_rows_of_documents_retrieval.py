"""Passages of a row's several documents: ranked together, named by their document, read from memories and tiers."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sharedllm_ext import ContextMemory, TieredMemory
from sharedllm_ext.model.passages import Passage
from sharedllm_ext.model.pick import slot_places
from sharedllm_ext.model.sources import Place, Source, SourceText
from sharedllm_ext.model.word_index import WordIndex, joint_evidence

from .test_passage_reading import FIELDS, STEPS, Letters, ready
from .test_pick import CHUNK, SEGMENT, build, tokens
from .test_rows_of_documents import in_one
from .test_tiered_memory import tiers_of

#: Of whole chunks, of a partial last one, and shorter than a segment.
LENGTHS = (2 * CHUNK, CHUNK + 21, 5, 3 * CHUNK, 0)
ROWS: list[Any] = [[0, 1], 2, [3, 2, 4, 0], [1, 0]]


@pytest.fixture(scope="module")
def model() -> Any:
    return ready(build(**FIELDS))


@pytest.fixture(scope="module")
def texts() -> list[Tensor]:
    return [tokens(length, seed=30 + number) for number, length in enumerate(LENGTHS)]


def source_of(text: Tensor, name: str) -> Source:
    """A token is a character."""
    offsets = torch.stack((torch.arange(len(text)), torch.arange(len(text)) + 1), 1).to(torch.int32)
    return Source((SourceText(len(text), text.to(torch.int32), offsets, len(text), "0"),), name)


def kept(model: Any, texts: list[Tensor]) -> ContextMemory:
    memory = ContextMemory.concat([model.compress(text[None]) for text in texts])
    return memory.with_sources([source_of(text, f"{i}.txt") for i, text in enumerate(texts)])


@torch.no_grad()
def test_scores_are_those_of_one_document(model: Any, texts: list[Tensor]) -> None:
    """One softmax over the slots of all documents, and mass and words counted over the segments of all of them."""
    memory, question = kept(model, texts).with_rows([[0, 3, 1]]), tokens(6, seed=3)
    (scored,) = model._scored("", question[None], None, (None, None), memory)
    own = [texts[i] for i in (0, 3, 1)]
    whole = torch.cat(own)
    # segments do not cross the ends of these documents
    assert all(text.numel() % SEGMENT == 0 for text in own[:2])
    one = model.compress(whole[None])
    index = model._pick_index(whole, one, 0)
    # words do not reach over the ends of documents
    classes = model.pick.token_class
    words = [WordIndex.of(classes[text].long(), SEGMENT, model.config.word_runs) for text in own]
    inputs = [state[0] for state in model._layer_inputs(question[None])]
    expected = model.pick(
        inputs,
        model.lower_model.layers,
        [index.keys],
        index.segment,
        index.count,
        joint_evidence(words, classes[question].long()),
    )
    assert scored.scores.numel() == -(-whole.numel() // SEGMENT)
    torch.testing.assert_close(scored.scores, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_passages_name_their_document(model: Any, texts: list[Tensor]) -> None:
    memory, questions = kept(model, texts).with_rows(ROWS), tokens(len(ROWS), 6, seed=4)
    found = model.find_passages(questions, memory=memory, count=60)
    for number, (row, passages) in enumerate(zip(ROWS, found, strict=True)):
        own = [row] if isinstance(row, int) else row
        assert len(passages) == sum(-(-LENGTHS[document] // SEGMENT) for document in own)
        assert [passage.rank for passage in passages] == list(range(len(passages)))
        assert [p.score for p in passages] == sorted((p.score for p in passages), reverse=True)
        assert {passage.document for passage in passages} == {i for i, d in enumerate(own) if LENGTHS[d]}
        for passage in passages:
            document = own[passage.document]
            assert passage.place == Place(f"{document}.txt", passage.start, passage.end)
            assert passage.start <= passage.segment * SEGMENT < passage.end <= LENGTHS[document]
        # a row alone finds the same
        assert model.find_passages(questions[number : number + 1], memory=memory.select([number]), count=60) == [
            passages
        ]


@torch.no_grad()
def test_words_of_one_document_are_found_among_all(texts: list[Tensor]) -> None:
    """Without trained queries (beta 0) the segment that holds the question's words comes first."""
    plain = build()
    plain.pick.beta.zero_()
    plain.pick.word_beta.fill_(1.0)
    question, own = torch.tensor([91, 92, 93, 94]), [text.clone() for text in texts]
    own[3][100:104] = question
    for row in ([1, 3, 0], [3, 0], [0, 1, 3]):
        (found,) = plain.find_passages(question[None], memory=kept(plain, own).with_rows([row]))
        assert row[found[0].document] == 3 and found[0].place is not None and found[0].place.name == "3.txt"
        assert abs(found[0].segment * SEGMENT + SEGMENT // 2 - 102) <= SEGMENT // 2 + 16


def test_answers_from_passages_of_several_documents(model: Any, texts: list[Tensor]) -> None:
    memory, questions = kept(model, texts).with_rows(ROWS), tokens(len(ROWS), 6, seed=5)
    how: dict[str, Any] = {"tokenizer": Letters(), "return_dict_in_generate": True, **STEPS}
    out = model.generate(questions, memory=memory, passages=3, **how)
    assert any(passage.document for row in out.passages for passage in row)
    given = model.generate(questions, memory=memory, passages=out.passages, **how)
    assert torch.equal(out.sequences, given.sequences)
    for row, own in enumerate(ROWS):
        documents = [texts[i] for i in ([own] if isinstance(own, int) else own)]
        words = "".join(map(chr, questions[row].tolist()))
        prompt = model.passage_prompt(Letters(), documents, out.passages[row], words)
        # in the order of the documents
        first = sorted(out.passages[row], key=lambda p: (p.document, p.start))[0]
        place = prompt[0].tolist().index(ord("]")) + 1
        text = documents[first.document][first.start : first.end].tolist()
        assert prompt[0, place : place + len(text)].tolist() == text
        for one in (memory.select([row]), in_one(model, texts, [own])):
            alone = model.generate(prompt, memory=one, **STEPS)
            assert alone[0, prompt.shape[1] :].tolist() == out.sequences[row, questions.shape[1] :].tolist()


def test_bad_input(model: Any, texts: list[Tensor]) -> None:
    memory, question = kept(model, texts).with_rows([[0, 1]]), tokens(1, 5)
    with pytest.raises(ValueError, match="context_ids: expected none with batch rows that read several documents"):
        model.find_passages(question, texts[0][None], memory=memory)
    wrong = [Passage(0, 4, 0, 0, 1.0, None, 2)]
    with pytest.raises(ValueError, match="passages: expected passages of documents 0 to 1, got one of 2"):
        model.generate(question, memory=memory, passages=[wrong], tokenizer=Letters(), **STEPS)
    with pytest.raises(ValueError, match="passages: expected passages of documents 0 to 0, got one of 2"):
        model.passage_prompt(Letters(), texts[0], wrong, "ab")
    late = [Passage(80, 99, 0, 0, 1.0, None, 1)]
    with pytest.raises(ValueError, match="expected ones within the 85 tokens of row 0's text, got one up to 99"):
        model.generate(question, memory=memory, passages=[late], tokenizer=Letters(), **STEPS)
    bare = memory.with_sources([*memory.sources[:1], None, *memory.sources[2:]])  # type: ignore[index]
    with pytest.raises(ValueError, match="expected the tokens of the memory's document 1"):
        model.find_passages(question, memory=bare)
    # only what is read has to be known
    assert model.find_passages(question, memory=bare.with_rows([[0, 3]]))[0]


# -- tiers ------------------------------------------------------------------------------------------------------------


def tiered(model: Any, texts: list[Tensor], folder: Path) -> TieredMemory:
    tiers = tiers_of(model, folder, pages=3)
    parts = []
    for i, text in enumerate(texts):
        memory = model.compress(text[None]).with_sources([source_of(text, f"{i}.txt")])
        parts.append(model.offload(memory, tiers))
    return TieredMemory.concat(parts)


@torch.no_grad()
def test_tiers(model: Any, texts: list[Tensor], tmp_path: Path) -> None:
    memory, want = tiered(model, texts, tmp_path).with_rows(ROWS), kept(model, texts).with_rows(ROWS)
    questions = tokens(len(ROWS), 6, seed=6)
    assert memory.memory_index == want.memory_index == memory.gather().memory_index
    assert model.find_passages(questions, memory=memory) == model.find_passages(questions, memory=want)
    # all chunks: the whole memory
    whole = model.memory_for(memory, questions)
    torch.testing.assert_close(model(questions, memory=whole).logits, model(questions, memory=want).logits)
    how: dict[str, Any] = {"passages": 3, "tokenizer": Letters(), "return_dict_in_generate": True, **STEPS}
    got, expected = model.generate(questions, memory=memory, **how), model.generate(questions, memory=want, **how)
    assert got.passages == expected.passages and torch.equal(got.sequences, expected.sequences)
    # files, beside those of an ordinary memory
    memory.save(tmp_path / "a")
    want.save(tmp_path / "b")
    for path in ("a", "b"):
        loaded = TieredMemory.load(tmp_path / path, model, tiers_of(model, tmp_path, pages=3))
        assert loaded.memory_index == want.memory_index
        assert ContextMemory.load(tmp_path / path, model).memory_index == want.memory_index
        assert model.find_passages(questions, memory=loaded) == model.find_passages(questions, memory=want)
    # what a document of a row has more
    more = tokens(1, 40, seed=9)
    grown = model.append(memory, more, documents=[1], keep=True)
    longer = [torch.cat((text, more[0])) if i == 1 else text for i, text in enumerate(texts)]
    by_hand = kept(model, longer).with_rows(ROWS)
    torch.testing.assert_close(
        model(questions, memory=grown.gather()).logits, model(questions, memory=by_hand).logits, atol=1e-6, rtol=1e-6
    )


@torch.no_grad()
def test_some_chunks_of_several_documents(model: Any, texts: list[Tensor], tmp_path: Path) -> None:
    """Chunks are counted over the documents of a row; a chunk stands where it stands in the text of all of them."""
    memory, choose = tiered(model, texts, tmp_path), random.Random(2)
    per_chunk = slot_places(CHUNK, model.config).token.numel()
    for _ in range(12):
        row = choose.sample(range(len(texts)), choose.randrange(2, len(texts) + 1))
        counts = [-(-LENGTHS[i] // CHUNK) for i in row]
        chosen = sorted(choose.sample(range(sum(counts)), choose.randrange(sum(counts) + 1)))
        got = memory.with_rows([row]).select_chunks([chosen[::-1]])
        one = in_one(model, texts, [row])
        # where each chunk begins in the memory of one document
        begins, at = [], 0
        for document in row:
            slots = slot_places(LENGTHS[document], model.config).token.numel()
            begins += [(at + first, min(at + first + per_chunk, at + slots)) for first in range(0, slots, per_chunk)]
            at += slots
        index = torch.tensor([slot for chunk in chosen for slot in range(*begins[chunk])], dtype=torch.int64)
        by_hand = dataclasses.replace(
            one,
            keys=[key[index] for key in one.keys],
            values=[value[index] for value in one.values],
            cu_slots=[0, len(index)],
        )
        text = tokens(1, 5, seed=8)
        torch.testing.assert_close(
            model(text, memory=got).logits, model(text, memory=by_hand).logits, atol=1e-5, rtol=1e-5
        )
    rows = memory.with_rows([[0, 1], 3])
    with pytest.raises(IndexError, match=r"chunks\[0\]: expected chunks 0 to 3 of documents \[0, 1\], got 4"):
        rows.select_chunks([[0, 4], []])
    with pytest.raises(IndexError, match=r"chunks\[1\]: expected chunks 0 to 2 of document 3, got 3"):
        rows.select_chunks([[0, 3], [3]])
    with pytest.raises(TypeError, match="with_rows gives a row several documents"):
        memory.select_documents([[0, 1]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"documents\[0\]: expected at least one document, got none"):
        memory.with_rows([[]])


@torch.no_grad()
def test_the_best_chunks_of_several_documents(model: Any, texts: list[Tensor], tmp_path: Path) -> None:
    memory, question = tiered(model, texts, tmp_path).with_rows([[1, 0, 3]]), tokens(1, 6, seed=12)
    (scored,) = model._scored("", question, None, (None, None), memory)
    best: dict[int, float] = {}
    begin, scores = 0, scored.scores.tolist()
    for document in (1, 0, 3):
        count = -(-LENGTHS[document] // SEGMENT)
        for segment, score in enumerate(scores[:count]):
            chunk = begin + segment * SEGMENT // CHUNK
            best[chunk] = max(best.get(chunk, -1e9), score)
        scores, begin = scores[count:], begin + -(-LENGTHS[document] // CHUNK)
    for count in (1, 2, 3, 99):
        expected = sorted(best, key=lambda chunk: -best[chunk])[:count]
        near = model.memory_for(memory, question, chunks=count)
        want = memory.select_chunks([expected])
        assert [near.chunks, near.memory_index] == [want.chunks, want.memory_index]

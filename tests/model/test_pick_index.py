"""What find_passages keeps between questions: made once, bounded, freed with its memory, never of an older state."""

import copy
import gc
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from sharedllm_ext.model import passages, pick_index
from sharedllm_ext.model.pick_index import PickIndexes
from sharedllm_ext.model.word_index import Run

from .test_pick import CHUNK, build, tokens


@pytest.fixture
def model() -> Any:
    return build()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the texts that an index was made of."""
    found: list[int] = []
    places = passages.slot_places
    monkeypatch.setattr(passages, "slot_places", lambda length, config: found.append(length) or places(length, config))
    return found


def anew(model: Any, question: Tensor, ids: Tensor, memory: Any) -> Any:
    """The passages that a model finds which has kept nothing."""
    return copy.deepcopy(model).find_passages(question, ids, memory=memory)


@torch.no_grad()
def test_an_index_is_made_once(model: Any, made: list[int]) -> None:
    ids = tokens(1, 3 * CHUNK)
    memory = model.compress(ids)
    for seed in range(3):
        question = tokens(1, 5, seed=seed)
        found = model.find_passages(question, ids, memory=memory)
        assert len(made) == 1
        assert found == anew(model, question, ids, memory)
        made.pop()
    keys, slots = memory.keys[0], memory.num_slots
    # two layers, 4 bytes a token, 8 a slot, three codes of 4 bytes a token
    words = 3 * 4 * 3 * CHUNK
    assert model._pick_indexes.nbytes == 2 * keys.nbytes + 4 * 3 * CHUNK + 8 * slots + words


@torch.no_grad()
def test_other_rows_read_the_same_index_and_other_tensors_their_own(model: Any, made: list[int]) -> None:
    texts = tokens(2, 3 * CHUNK)
    mask = torch.ones_like(texts)
    mask[1, CHUNK + 3 :] = 0
    memory, question = model.compress(texts, mask), tokens(2, 5, seed=7)
    found = model.find_passages(question, texts, mask, memory=memory)
    assert made == [3 * CHUNK, CHUNK + 3]
    rows = [1, 0, 1]
    assert model.find_passages(question[rows], texts[rows], mask[rows], memory=memory.select(rows)) == [
        found[row] for row in rows
    ]
    twice = [0, 0, 1, 1]
    assert model.find_passages(question[twice], texts[twice], mask[twice], memory=memory.expand(2)) == [
        found[row] for row in twice
    ]
    assert len(made) == 2
    held = model._pick_indexes.nbytes
    rounded = memory.to(torch.bfloat16).to(memory.dtype)
    other = model.find_passages(question, texts, mask, memory=rounded)
    assert len(made) == 4 and model._pick_indexes.nbytes == 2 * held
    assert other != found and other == copy.deepcopy(model).find_passages(question, texts, mask, memory=rounded)
    # a memory that does not change is still itself
    model.find_passages(question, texts, mask, memory=memory.to(memory.dtype))
    assert len(made) == 6  # of the copy alone


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("what", ["keys", "last keys", "values", "classes", "runs of words", "a new list entry"])
def test_what_has_changed_is_made_again(model: Any, made: list[int], what: str, inference: bool) -> None:
    ids, question = tokens(1, 3 * CHUNK), tokens(1, 5, seed=2)
    with torch.inference_mode(inference):
        memory = model.compress(ids)
        assert memory.keys[0].is_inference() == inference
        before = model.find_passages(question, ids, memory=memory)
        assert model.find_passages(question, ids, memory=memory) == before
        assert len(made) == 1
        if what == "keys":
            memory.keys[0][5] *= -3
        elif what == "last keys":
            memory.keys[2][memory.num_slots - 1] *= -9
        elif what == "values":
            memory.values[0] += 1.0
        elif what == "classes":
            model.pick.token_class.copy_(model.pick.token_class.flip(0))
        elif what == "runs of words":
            model.pick.word_runs = (Run(1, 16), Run(2, 1), Run(1, 40))
        else:
            memory.keys[2] = memory.keys[2] * -1
        if what == "values":
            with pytest.raises(ValueError, match="expected the text that the memory was made of"):
                model.find_passages(question, ids, memory=memory)
            return
        after = model.find_passages(question, ids, memory=memory)
        assert len(made) == 2
        assert after != before or what == "classes"
        assert after == anew(model, question, ids, memory)


@torch.no_grad()
def test_another_text_is_looked_at(model: Any, made: list[int]) -> None:
    ids, question = tokens(1, 3 * CHUNK), tokens(1, 5, seed=2)
    memory = model.compress(ids)
    model.find_passages(question, ids, memory=memory)
    with pytest.raises(ValueError, match="expected the text that the memory was made of, got another"):
        model.find_passages(question, tokens(1, 3 * CHUNK, seed=1), memory=memory)
    # the caller's own tensor is not what is compared with
    ids.copy_(tokens(1, 3 * CHUNK, seed=1))
    with pytest.raises(ValueError, match="expected the text that the memory was made of, got another"):
        model.find_passages(question, ids, memory=memory)
    assert len(made) == 3


@torch.no_grad()
def test_one_text_for_documents_of_other_texts_is_refused(model: Any) -> None:
    """Of the same length: each document is compared with the text, not the first alone."""
    ids = tokens(2, 3 * CHUNK)
    memory = model.compress(ids)
    with pytest.raises(ValueError, match="expected the text that the memory was made of, got another"):
        model.find_passages(tokens(2, 5, seed=2), ids[:1], memory=memory)


@torch.no_grad()
@pytest.mark.parametrize("keep", [True, False])
def test_a_memory_that_has_grown_makes_its_own(model: Any, keep: bool) -> None:
    """Also in place, in the storage of the one before."""
    ids, question = tokens(1, 6 * CHUNK), tokens(1, 5, seed=2)
    memory = model.compress(ids[:, : CHUNK + 9])
    before = model.find_passages(question, ids[:, : CHUNK + 9], memory=memory)
    first = memory
    for end in (2 * CHUNK, 3 * CHUNK + 5, 5 * CHUNK):
        memory = model.append(memory, ids[:, memory.num_tokens[0] : end], keep=keep)
        found = model.find_passages(question, ids[:, :end], memory=memory)
        assert found == anew(model, question, ids[:, :end], memory)
        assert found == model.find_passages(question, ids[:, :end])
    if keep:
        assert model.find_passages(question, ids[:, : CHUNK + 9], memory=first) == before


@torch.no_grad()
def test_an_index_goes_with_its_memory(model: Any) -> None:
    ids, question = tokens(1, 3 * CHUNK), tokens(1, 5, seed=2)
    model.find_passages(question, ids)
    gc.collect()
    assert model._pick_indexes.nbytes == 0
    memory = model.compress(ids)
    model.find_passages(question, ids, memory=memory)
    selected = memory.select([0])
    del memory
    gc.collect()
    assert model._pick_indexes.nbytes > 0
    del selected
    gc.collect()
    assert model._pick_indexes.nbytes == 0


@torch.no_grad()
def test_bytes_are_bounded(model: Any, made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    ids, question = tokens(1, 3 * CHUNK), tokens(1, 5, seed=2)
    memories = [model.compress(ids) for _ in range(3)]
    ask = lambda i: model.find_passages(question, ids, memory=memories[i])  # noqa: E731
    ask(0)
    one = model._pick_indexes.nbytes
    monkeypatch.setattr(pick_index, "KEPT_BYTES", 2 * one + 1)
    ask(1)
    ask(0)
    ask(2)
    assert len(made) == 3 and model._pick_indexes.nbytes == 2 * one
    ask(0)
    assert len(made) == 3, "the one that was used last is kept"
    ask(1)
    assert len(made) == 4
    monkeypatch.setattr(pick_index, "KEPT_BYTES", one - 1)
    other = model.compress(ids)
    for _ in range(2):
        assert model.find_passages(question, ids, memory=other) == ask(0)
    # one that is too large does not take the place of others
    short = ids[:, :CHUNK]
    small = model.compress(short)
    model.find_passages(question, short, memory=small)
    held = model._pick_indexes.nbytes
    assert 0 < held < one
    model.find_passages(question, ids, memory=other)
    assert model._pick_indexes.nbytes == held
    # rows of one call share even what is not kept
    del made[:]
    model.find_passages(question.expand(3, -1), ids, memory=other)
    assert len(made) == 1


@torch.no_grad()
def test_copies_of_a_model_keep_nothing(model: Any) -> None:
    ids = tokens(1, 3 * CHUNK)
    memory = model.compress(ids)
    model.find_passages(tokens(1, 5), ids, memory=memory)
    for other in (copy.deepcopy(model)._pick_indexes, pickle.loads(pickle.dumps(model._pick_indexes))):
        assert type(other) is PickIndexes and other.nbytes == 0
    assert model._pick_indexes.nbytes > 0


def test_threads_share_an_index(model: Any) -> None:
    ids, questions = tokens(1, 3 * CHUNK), tokens(8, 5, seed=3)
    memory = model.compress(ids)
    expected = [model.find_passages(question[None], ids, memory=memory)[0] for question in questions]
    found: dict[int, Any] = {}

    def ask(row: int) -> None:
        for _ in range(5):
            found[row] = model.find_passages(questions[row : row + 1], ids, memory=memory)[0]

    threads = [threading.Thread(target=ask, args=(row,)) for row in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[row] for row in range(8)] == expected


@torch.no_grad()
def test_a_model_in_another_dtype_makes_its_own(model: Any, made: list[int]) -> None:
    ids, question = tokens(1, 3 * CHUNK), tokens(1, 5, seed=2)
    memory = model.compress(ids)
    model.find_passages(question, ids, memory=memory)
    model.bfloat16()
    own = model.compress(ids)
    del made[:]
    rounded = model.find_passages(question, ids, memory=own)
    model.float()
    assert model.find_passages(question, ids, memory=own) == anew(model, question, ids, own)
    assert rounded and len(made) == 3

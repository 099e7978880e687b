"""Memories beside each other, documents taken out of them, and random sequences of everything against rebuilding."""

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sharedllm_ext import ContextMemory
from sharedllm_ext.model.sources import Source

from . import builders
from .test_append import USED_UP, _model, assert_same, tensors

CHUNK = builders.TREE["chunk_size"]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return _model()


def compressed(model: Any, texts: list[Tensor]) -> ContextMemory:
    longest = max((text.numel() for text in texts), default=0)
    ids, mask = (torch.zeros((len(texts), longest), dtype=torch.int64) for _ in range(2))
    for row, text in enumerate(texts):
        ids[row, : text.numel()], mask[row, : text.numel()] = text, 1
    return model.compress(ids, mask).with_sources([Source.of_ids(text, f"{text.numel()} tokens") for text in texts])


def texts_of(*lengths: int) -> list[Tensor]:
    return [builders.ids(length) for length in lengths]


@torch.no_grad()
def test_documents_of_several_memories(model: Any) -> None:
    texts = texts_of(40, 7, 0, 64)
    one, other = compressed(model, texts[:1]).expand(2), compressed(model, texts[1:])
    joined = ContextMemory.concat([one, other])
    assert joined.memory_index == [0, 0, 1, 2, 3]
    assert [source.name for source in joined.sources] == ["40 tokens", "7 tokens", "0 tokens", "64 tokens"]
    assert_same(joined.select([0, 2, 3, 4]), compressed(model, texts))
    text = builders.ids(5, 4)
    apart = torch.cat([model(text[:2], memory=one).logits, model(text[2:], memory=other).logits])
    torch.testing.assert_close(model(text, memory=joined).logits, apart, atol=2e-5, rtol=1e-5)
    assert ContextMemory.concat([one]) is one


@torch.no_grad()
def test_consecutive_documents_are_views(model: Any) -> None:
    texts = texts_of(40, 50, 33, 70)
    memory = compressed(model, texts)
    places = [t.data_ptr() for t in tensors(memory)]
    middle = memory.select_documents([1, 2])
    assert_same(middle, compressed(model, texts[1:3]))
    first = memory.cu_slots[1] * memory.keys[0][0].nbytes
    assert [t.data_ptr() - first for t in tensors(middle)] == places
    # put together again where they lie
    again = ContextMemory.concat([memory.select_documents([0]), middle, memory.select_documents([3])])
    assert [t.data_ptr() for t in tensors(again)] == places
    assert_same(again, memory)
    other = ContextMemory.concat([middle, memory.select_documents([0])])
    assert other.keys[0].data_ptr() not in (places[0], middle.keys[0].data_ptr())
    assert_same(other, compressed(model, [texts[1], texts[2], texts[0]]))
    mixed = memory.select_documents([3, 0, 0])
    assert_same(mixed, compressed(model, [texts[3], texts[0], texts[0]]))
    assert memory.select_documents([]).num_slots == 0
    with pytest.raises(IndexError, match="documents: expected 0 to 3, got 4"):
        memory.select_documents([4])


@torch.no_grad()
def test_views_of_documents_and_growing(model: Any) -> None:
    texts, more = texts_of(40, 50), builders.ids(1, 30)
    memory = compressed(model, texts)
    memory = model.append(memory, more, rows=[1])
    begin = memory.select_documents([0])
    # a view that begins where the storage does must not be written over the document after it
    grown = model.append(begin, more)
    assert_same(grown, compressed(model, [torch.cat((texts[0], more[0]))]))
    assert_same(memory, compressed(model, [texts[0], torch.cat((texts[1], more[0]))]))
    end, joined = memory.select_documents([1]), ContextMemory.concat([begin, memory.select_documents([1])])
    longer = model.append(memory, more, rows=[1])
    for stale in (memory, end, joined):
        with pytest.raises(ValueError, match=USED_UP):
            model(builders.ids(stale.batch_size, 3), memory=stale)
    assert_same(longer, compressed(model, [texts[0], torch.cat((texts[1], more[0], more[0]))]))


@torch.no_grad()
def test_neighbours_of_two_versions_are_copied(model: Any) -> None:
    texts = texts_of(40, 2 * CHUNK)
    older = model.append(compressed(model, [texts[0], texts[1][:CHUNK]]), texts[1][None, CHUNK:], rows=[1])
    newer = model.append(older, builders.ids(1, 3), rows=[1])
    joined = ContextMemory.concat([older.select_documents([0]), newer.select_documents([1])])
    kept = [t.clone() for t in tensors(joined)]
    model.append(newer, builders.ids(1, 3), rows=[1])
    assert joined.version is None and all(map(torch.equal, tensors(joined), kept))


def test_what_does_not_go_together(model: Any) -> None:
    memory = compressed(model, texts_of(40))
    for others, message in (
        ([], "memories: expected at least one, got none"),
        (
            [memory, memory.to(torch.float64)],
            r"memories\[1\]: expected cpu and torch.float32 as the first, got cpu and",
        ),
        ([memory, _model().compress(builders.ids(1, 5))], r"memories\[1\]: expected one of the same model .*weights:"),
    ):
        with pytest.raises(ValueError, match=message):
            ContextMemory.concat(others)


def test_description(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = builders.ids(70)
    memory = compressed(model, [text, text[:5]])
    told = memory.describe()
    assert json.loads(json.dumps(told)) == told
    assert [document["name"] for document in told["documents"]] == ["70 tokens", "5 tokens"]
    assert (told["rows"], told["tokens"], told["chunks"], told["slots"]) == (2, 75, 4, memory.num_slots)
    assert told["key_bytes"] == told["value_bytes"] == memory.nbytes // 2 and told["source_bytes"] == 4 * 75
    assert told["reserved_bytes"] == memory.nbytes and told["device"] == "cpu" and told["dtype"] == "float32"
    assert told["model"]["weights"] == memory.signature["weights"]
    grown = model.append(memory, builders.ids(2, 5))
    assert grown.describe()["reserved_bytes"] == 2 * grown.nbytes
    assert grown.cpu().keys[0].device.type == "cpu"
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor + 1)
    assert torch.equal(memory.pin().values[1], memory.values[1] + 1)


@torch.no_grad()
def test_random_sequences_equal_rebuilding(model: Any, tmp_path: Path) -> None:
    """Each step's result is compared, bit by bit, with compressing its documents anew.

    ``SHAREDLLM_SEQUENCES`` says how many sequences; 1,000 take some minutes.
    """
    for seed in range(int(os.environ.get("SHAREDLLM_SEQUENCES", "40"))):
        generator = random.Random(seed)
        torch.manual_seed(seed)

        def some(generator: random.Random = generator) -> int:
            return generator.choice((0, 1, 5, CHUNK - 1, CHUNK, CHUNK + 1, generator.randrange(3 * CHUNK)))

        texts = texts_of(*(some() for _ in range(generator.randrange(1, 4))))
        memory = compressed(model, texts)
        for step in range(6):
            before, old_texts = memory, list(texts)
            what = generator.choice(("append", "append", "append", "row", "concat", "select", "file", "move"))
            keep = False
            if what == "append":
                keep = generator.random() < 0.3
                more = texts_of(*(some() for _ in texts))
                longest = max(text.numel() for text in more)
                ids, mask = (torch.zeros((len(more), longest), dtype=torch.int64) for _ in range(2))
                for row, text in enumerate(more):
                    ids[row, longest - text.numel() :], mask[row, longest - text.numel() :] = text, 1
                memory = model.append(memory, ids, mask, keep=keep)
                texts = [torch.cat(pair) for pair in zip(texts, more, strict=True)]
            elif what == "row":
                row, more = generator.randrange(len(texts)), builders.ids(1, some())
                memory = model.append(memory, more, rows=[row])
                texts = [torch.cat((text, more[0])) if i == row else text for i, text in enumerate(texts)]
            elif what == "concat" and len(texts) < 6:
                other = texts_of(some(), some())
                pair = [(memory, texts), (compressed(model, other), other)]
                generator.shuffle(pair)
                memory = ContextMemory.concat([one for one, _ in pair])
                texts = [text for _, own in pair for text in own]
            elif what == "select":
                first = generator.randrange(len(texts))
                chosen = generator.choice(
                    (
                        list(range(first, len(texts))),
                        [generator.randrange(len(texts)) for _ in range(2)],
                    )
                )
                memory, texts = memory.select_documents(chosen), [texts[i] for i in chosen]
            elif what == "file":
                size = generator.choice((None, 1, 20_000))
                memory.save(tmp_path / "memory", max_shard_size=size)
                memory = ContextMemory.load(tmp_path / "memory", model, mmap=generator.random() < 0.5)
            else:
                memory = pickle.loads(pickle.dumps(memory)) if generator.random() < 0.5 else memory.to("cpu", copy=True)
            want = compressed(model, texts)
            assert_same(memory, want)
            for source, text in zip(memory.sources, texts, strict=True):
                assert torch.equal(source.token_ids.long(), text), (seed, step, what)
            # the memory of before is as it was, or refuses every use
            if keep or before.version is None or not before.version.overwritten:
                assert_same(before, compressed(model, old_texts))
            else:
                with pytest.raises(ValueError, match=USED_UP):
                    before.keys[0].sum()

"""A memory that grows: equal to compressing anew, at the cost of one chunk, and no version reads another's slots."""

import copy
import dataclasses
import itertools
import pickle
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sharedllm_ext import ContextMemory, SharedLLMForCausalLM
from sharedllm_ext.model import storage

from . import builders

CHUNK = builders.TREE["chunk_size"]
USED_UP = "expected the memory that append has returned, got the one given to it"


def _model(family: str = "llama", **fields: Any) -> SharedLLMForCausalLM:
    """A micro-batch is one chunk, so that all matmuls have the same rows whatever they are computed with."""
    return builders.model(family, **{"micro_batch_tokens": 1, "query_aware": False, **fields})


@pytest.fixture
def model() -> SharedLLMForCausalLM:
    return _model()


def tensors(memory: ContextMemory) -> list[Tensor]:
    return [*memory.keys, *memory.values]


def assert_same(got: ContextMemory, want: ContextMemory) -> None:
    """Equal in every field and every bit."""
    for name in ("cu_slots", "num_chunks", "num_tokens", "memory_index", "signature"):
        assert getattr(got, name) == getattr(want, name), name
    assert all(map(torch.equal, tensors(got), tensors(want)))
    assert got.tails is not None and want.tails is not None
    for one, other in zip(got.tails, want.tails, strict=True):
        assert one is not None and other is not None
        assert one.slots == other.slots and torch.equal(one.token_ids, other.token_ids)


@pytest.mark.parametrize("family", ["llama", "smollm3_window", "gemma3_text", "phi3_longrope", "qwen3_moe"])
@pytest.mark.parametrize("asks", [False, True])
@torch.no_grad()
def test_a_document_grows_as_if_compressed_anew(family: str, asks: bool) -> None:
    model, generator = _model(family, query_aware=asks), random.Random(0)
    context, text = builders.ids(1, 9 * CHUNK), builders.ids(1, 5)
    query = text if asks else None
    memory, end = model.compress(context[:, :0], query_ids=query), 0
    for length in [3, CHUNK - 3, CHUNK, 1, CHUNK - 1, 2 * CHUNK + 5, *(generator.randrange(40) for _ in range(6))]:
        memory = model.append(memory, context[:, end : end + length], query_ids=query)
        end += length
        assert_same(memory, model.compress(context[:, :end], query_ids=query))
    whole = model.compress(context[:, :end], query_ids=query)
    assert torch.equal(model(text, memory=memory).logits, model(text, memory=whole).logits)


@pytest.mark.parametrize("size", [1, 5, 29, 37])
@torch.no_grad()
def test_chunks_whose_slots_depend_on_the_choice(size: int) -> None:
    model = _model(query_aware=True, chunk_size=size, slots_per_node=3)
    context, query = builders.ids(1, 4 * size + 3), builders.ids(1, 5)
    memory = model.compress(context[:, :1], query_ids=query)
    for end in range(2, context.shape[1] + 1):
        memory = model.append(memory, context[:, end - 1 : end], query_ids=query)
        assert_same(memory, model.compress(context[:, :end], query_ids=query))


@torch.no_grad()
def test_micro_batches_of_many_chunks() -> None:
    model = builders.model(query_aware=False)
    context = builders.ids(1, 400)
    memory = model.append(model.append(model.compress(context[:, :150]), context[:, 150:151]), context[:, 151:])
    for got, want in zip(tensors(memory), tensors(model.compress(context)), strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("asks", [False, True])
@torch.no_grad()
def test_ragged_batches(side: str, asks: bool) -> None:
    model, generator = _model(query_aware=asks), random.Random(1)
    query = builders.ids(3, 4) if asks else None
    texts = [builders.ids(200)[:length].tolist() for length in (40, 32, 0)]

    def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, rows))
        ids = [
            ([7] * (longest - len(row)) + row) if side == "left" else (row + [7] * (longest - len(row))) for row in rows
        ]
        mask = [
            [int((i >= longest - len(row)) if side == "left" else (i < len(row))) for i in range(longest)]
            for row in rows
        ]
        return torch.tensor(ids).view(len(rows), longest), torch.tensor(mask).view(len(rows), longest)

    memory = model.compress(*padded(texts), query)
    for _ in range(8):
        more = [builders.ids(generator.choice((0, 0, 1, 20, 70))).tolist() for _ in texts]
        texts = [text + new for text, new in zip(texts, more, strict=True)]
        memory = model.append(memory, *padded(more), query)
        assert_same(memory, model.compress(*padded(texts), query))
    # one row by its number
    new = builders.ids(1, 45)
    texts[1] += new[0].tolist()
    memory = model.append(memory, new, query_ids=None if query is None else query[1:2], rows=[1])
    assert_same(memory, model.compress(*padded(texts), query))


@torch.no_grad()
def test_a_document_of_several_rows_goes_on_by_one_of_them(model) -> None:
    context, more = builders.ids(2, 50), builders.ids(1, 30)
    beams = model.compress(context).expand(2)
    grown = model.append(beams, more, rows=[3])
    assert grown.memory_index == [0, 0, 1, 1] and grown.num_tokens == [50, 80]
    alone = model.compress(torch.cat((context[1:], more), 1))
    assert all(map(torch.equal, [t[grown.cu_slots[1] :] for t in tensors(grown)], tensors(alone)))
    with pytest.raises(ValueError, match="rows of different documents, got rows 2 and 3, which both read document 1"):
        model.append(grown, builders.ids(2, 3), rows=[2, 3])


# -- versions that share a storage ------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_version_whose_last_chunk_was_written_anew_refuses_every_use(tmp_path: Path, model) -> None:
    text = builders.ids(1, 4)
    first = model.append(model.compress(builders.ids(1, 40)), builders.ids(1, 3))
    views = {
        "itself": first,
        "rows": first.select([0, 0]),
        "beams": first.expand(3),
        "replaced": dataclasses.replace(first, memory_index=[0]),
        "its lists again": dataclasses.replace(first, keys=list(first.keys), values=list(first.values)),
        "the same device": first.to("cpu"),
        "a shallow copy": copy.copy(first),
        "a tree": pytree.tree_map(lambda leaf: leaf, first),
    }
    output = model(text, memory=first, use_cache=True)
    apart = {
        "another dtype": first.to(torch.float64),
        "a deep copy": copy.deepcopy(first),
        "bytes": pickle.loads(pickle.dumps(first)),
    }
    before = [[t.clone() for t in tensors(one)] for one in apart.values()]
    second = model.append(first, builders.ids(1, 30))
    assert second.version.storage is views["itself"].version.storage
    uses: list[Callable[[ContextMemory], Any]] = [
        lambda m: model(builders.ids(m.batch_size, 4), memory=m),
        lambda m: model.generate(builders.ids(m.batch_size, 4), memory=m, max_new_tokens=1),
        lambda m: model.append(m, builders.ids(1, 4), rows=[0]),
        lambda m: m.save(tmp_path / "memory"),
        lambda m: m.to("cpu"),
        lambda m: m.nbytes,
        lambda m: m.keys[0].sum(),
        lambda m: torch.cat(m.values),
        lambda m: torch.stack([m.keys[0], m.keys[1]]),
    ]
    for name, view in views.items():
        for index, use in enumerate(uses):
            with pytest.raises(ValueError, match=USED_UP):
                use(view)
                pytest.fail(f"{name}, use {index}")
    assert not (tmp_path / "memory").exists()
    # a cache whose text has read it
    with pytest.raises(ValueError, match=USED_UP):
        model(text, past_key_values=output.past_key_values)
    for one, kept in zip(apart.values(), before, strict=True):
        assert all(map(torch.equal, tensors(one), kept))


@torch.no_grad()
def test_a_version_of_full_chunks_stays_and_may_go_on_twice(model) -> None:
    context, one, other = builders.ids(1, 3 * CHUNK), builders.ids(1, 40), builders.ids(1, 50)
    begin = model.compress(context)
    # its own storage is no room to grow in
    trunk = model.append(begin, one)
    assert_same(begin, model.compress(context))
    trunk = model.append(model.compress(context[:, :CHUNK]), context[:, CHUNK:])
    branches = [model.append(trunk, more) for more in (one, other)]
    assert branches[0].keys[0].data_ptr() == trunk.keys[0].data_ptr() != branches[1].keys[0].data_ptr()
    assert_same(trunk, model.compress(context))
    for branch, more in zip(branches, (one, other), strict=True):
        assert_same(branch, model.compress(torch.cat((context, more), 1)))


@torch.no_grad()
def test_keep_leaves_the_given_memory_readable(model) -> None:
    context = builders.ids(1, 120)
    memory = model.append(model.compress(context[:, :40]), context[:, 40:50])
    longer = model.append(memory, context[:, 50:60], keep=True)
    assert_same(memory, model.compress(context[:, :50]))
    assert_same(longer, model.compress(context[:, :60]))
    # the kept one goes on in its own storage
    place = memory.keys[0].data_ptr()
    again = model.append(memory, context[:, 50:53])
    assert again.keys[0].data_ptr() == place
    assert_same(longer, model.compress(context[:, :60]))


@torch.no_grad()
def test_two_threads_append_to_one_version(model) -> None:
    context = builders.ids(1, 2 * CHUNK)
    more = [builders.ids(1, 40) for _ in range(4)]
    model.check_memory(memory := model.append(model.compress(context[:, :CHUNK]), context[:, CHUNK:]))
    found: list[Any] = [None] * 4
    start = threading.Barrier(4)

    def work(i: int) -> None:
        start.wait()
        found[i] = model.append(memory, more[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for grown, ids in zip(found, more, strict=True):
        assert_same(grown, model.compress(torch.cat((context, ids), 1)))
    assert sum(grown.keys[0].data_ptr() == memory.keys[0].data_ptr() for grown in found) == 1


def test_a_backward_pass_sees_that_what_it_read_was_overwritten() -> None:
    model = _model()
    memory = model.append(model.compress(builders.ids(1, 40)), builders.ids(1, 3))
    loss = model(builders.ids(1, 6), memory=memory).logits.sum()
    model.append(memory, builders.ids(1, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@torch.no_grad()
def test_an_interrupted_append_leaves_nothing_that_reads_something_else(model, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = model.append(model.compress(builders.ids(1, 40)), builders.ids(1, 3))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        model.append(memory, builders.ids(1, 3))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=USED_UP):
        model(builders.ids(1, 3), memory=memory)


# -- the cost ---------------------------------------------------------------------------------------------------------


class _Written(TorchDispatchMode):
    """Counts the elements of all results that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            for tensor in pytree.tree_leaves(result):
                self.elements += tensor.numel() if isinstance(tensor, Tensor) else 0
        return result


@torch.no_grad()
def test_the_cost_does_not_depend_on_the_length(model) -> None:
    costs, seen = {}, []
    for chunks in (8, 200):
        memory = model.append(model.compress(builders.ids(1, chunks * CHUNK)), builders.ids(1, 3))
        model.append(memory, builders.ids(1, 0))
        with _Written() as written:
            memory = model.append(memory, builders.ids(1, 5), progress=seen.append)
        costs[chunks] = written.elements
    # the 3 tokens of the last chunk again
    assert seen == [8, 8]
    assert costs[8] == costs[200] > 0


@torch.no_grad()
def test_the_storage_is_copied_when_it_has_doubled(model) -> None:
    memory, places = model.compress(builders.ids(1, CHUNK)), []
    for _ in range(63):
        memory = model.append(memory, builders.ids(1, CHUNK))
        places.append(memory.keys[0].data_ptr())
        assert memory.version.storage.capacity <= 2 * memory.num_slots
    assert memory.num_chunks == [64] and sum(a != b for a, b in itertools.pairwise(places)) <= 6


@torch.no_grad()
def test_no_room_for_twice_as_much(model, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Tensor.new_empty

    def small(self: Tensor, size: Any, *rest: Any, **more: Any) -> Tensor:
        if len(size) == 3 and size[0] > 48:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(self, size, *rest, **more)

    context = builders.ids(1, 3 * CHUNK)
    monkeypatch.setattr(Tensor, "new_empty", small)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    memory = model.compress(context[:, : 2 * CHUNK])
    grown = model.append(memory, context[:, 2 * CHUNK :])
    assert grown.version.storage.capacity == 48
    with pytest.raises(torch.OutOfMemoryError):
        model.append(grown, context)
    assert_same(grown, model.compress(context))


# -- what a memory carries --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_copies_go_on(model) -> None:
    context, more = builders.ids(1, 45), builders.ids(1, 30)
    whole = model.compress(torch.cat((context, more), 1))
    memory = model.append(model.compress(context[:, :40]), context[:, 40:])
    for copied in (
        copy.deepcopy(memory),
        pickle.loads(pickle.dumps(memory)),
        pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, memory),
        memory.to("cpu", copy=True),
    ):
        assert_same(model.append(copied, more), whole)
    with torch.inference_mode():
        made = model.append(model.compress(context), more[:, :10])
    assert_same(model.append(made, more[:, 10:]), whole)


@torch.no_grad()
def test_another_dtype_is_kept(model) -> None:
    context = builders.ids(1, 90)
    memory = model.append(model.compress(context[:, :40]).to(torch.bfloat16), context[:, 40:])
    want = model.compress(context).to(torch.bfloat16)
    assert memory.dtype == torch.bfloat16
    assert_same(memory, want)


@torch.no_grad()
def test_memories_of_before_go_on_from_full_chunks(model) -> None:
    """Pickles and files of before have no token ids of the last chunk."""
    context = builders.ids(2, 2 * CHUNK)
    mask = torch.ones_like(context)
    mask[1, -3:] = 0
    memory = model.compress(context, mask)
    old = object.__new__(ContextMemory)
    vars(old).update({name: value for name, value in vars(memory).items() if name not in ("tails", "version")})
    longer = model.append(old, builders.ids(1, 5), rows=[0])
    assert longer.num_tokens == [2 * CHUNK + 5, 2 * CHUNK - 3]
    longer = model.append(longer, builders.ids(1, 5), rows=[0])
    with pytest.raises(ValueError, match=r"token ids of the last 29 tokens of document 1 .tails., got none; compress"):
        model.append(longer, builders.ids(1, 5), rows=[1])


def test_bad_input(model) -> None:
    memory, ids = model.compress(builders.ids(2, 40)), builders.ids(2, 5)
    longest = "expected 2 rows as in the memory, or rows=.* that names theirs, got"
    for error, message, call in (
        (TypeError, "memory: expected a ContextMemory, got list", lambda: model.append([], ids)),
        (ValueError, f"context_ids: {longest} 3", lambda: model.append(memory, builders.ids(3, 5))),
        (ValueError, f"context_ids: {longest} 1", lambda: model.append(memory, builders.ids(1, 5))),
        (ValueError, "context_ids: expected integer token ids", lambda: model.append(memory, ids.float())),
        (
            ValueError,
            "context_ids: expected token ids from 0 to 127, got 999",
            lambda: model.append(memory, ids + 999 - ids),
        ),
        (ValueError, "context_attention_mask: expected the shape", lambda: model.append(memory, ids, ids[:, :2])),
        (
            ValueError,
            "rows: expected 2 batch rows, one for each row of context_ids, got 1",
            lambda: model.append(memory, ids, rows=[0]),
        ),
        (IndexError, "rows: expected batch rows 0 to 1, got 2", lambda: model.append(memory, ids, rows=[0, 2])),
        (IndexError, "rows: expected batch rows 0 to 1, got -1", lambda: model.append(memory, ids, rows=[0, -1])),
        (
            ValueError,
            "query_ids: expected 2 rows, one for each row of context_ids, got shape .1, 4.",
            lambda: model.append(memory, ids, query_ids=builders.ids(1, 4)),
        ),
        (ValueError, "made by another model", lambda: _model().append(memory, ids)),
    ):
        with pytest.raises(error, match=message):
            call()
    assert_same(memory, memory)
    assert model.append(memory, ids[:, :0]) is memory
    trained = builders.model(query_aware=False).train()
    with pytest.raises(ValueError, match="expected one without gradients, got one of a model in training"):
        trained.append(trained.compress(builders.ids(1, 40)), builders.ids(1, 5))


def test_not_inside_of_a_graph(model) -> None:
    memory = model.compress(builders.ids(1, 40))
    with pytest.raises(Exception, match="append outside of the graph"):
        torch.compile(model.append, backend="eager", fullgraph=True)(memory, builders.ids(1, 5))
    torch.compiler.reset()

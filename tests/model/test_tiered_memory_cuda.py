"""Tiers on a CUDA device: copies on a side stream, whose results nobody sees too early or too late."""

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sharedllm_ext import ContextMemory, MemoryTiers, SharedLLMForCausalLM, TieredMemory
from sharedllm_ext.model.pages import Arriving
from sharedllm_ext.model.sources import Source

from ..support import needs_cuda
from . import builders
from .test_append import assert_same
from .test_passage_reading import FIELDS, STEPS, Letters, ready
from .test_pick import CHUNK, random_pick, tokens
from .test_pick import FIELDS as PICK_FIELDS
from .test_tiered_memory import assert_same_slots

pytestmark = needs_cuda
SLEEP = 50_000_000  # cycles: 25 ms and more


@pytest.fixture(scope="module")
def model() -> Any:
    # heads of 64, which the decoding steps take
    checkpoint = builders.base(hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    built: Any = SharedLLMForCausalLM.from_base(checkpoint, **{**PICK_FIELDS, **FIELDS, "window": 512})
    random_pick(built)
    return ready(built).to("cuda", torch.bfloat16)


def ids_of(count: int, seed: int = 0) -> Tensor:
    return tokens(1, count, seed=seed).cuda()


def resident(model: Any, ids: Tensor) -> ContextMemory:
    memory: ContextMemory = model.compress(ids).with_sources([Source.of_ids(ids[0])])
    return memory


def tiers_of(memory: ContextMemory, folder: Path | None, **how: Any) -> MemoryTiers:
    """Pages of two chunks; budgets in pages."""
    page = 2 * CHUNK // 4 * memory.nbytes // memory.num_slots
    sizes = {name: int(value * page) for name, value in how.items() if name.endswith("_bytes")}
    return MemoryTiers("cuda", folder=folder, page_bytes=page - 1, **{**how, **sizes})


def by_hand(model: Any, memory: ContextMemory, chunks: list[list[int]]) -> ContextMemory:
    size = model.compress(ids_of(CHUNK)).num_slots
    slots = [slot for chunk in chunks[0] for slot in range(chunk * size, min((chunk + 1) * size, memory.num_slots))]
    index = torch.tensor(slots, dtype=torch.int64, device="cuda")
    keys, values = ([tensor[index] for tensor in part] for part in (memory.keys, memory.values))
    return ContextMemory(
        keys=keys,
        values=values,
        cu_slots=[0, len(slots)],
        num_chunks=memory.num_chunks,
        num_tokens=memory.num_tokens,
        memory_index=[0],
        signature=memory.signature,
    )


@pytest.mark.parametrize("pin", [True, False])
@torch.no_grad()
def test_random_sequences_equal_the_resident_memory(model: Any, tmp_path: Path, pin: bool) -> None:
    for seed in range(6):
        generator = random.Random(seed)
        ids = ids_of(generator.randrange(1, 9 * CHUNK), seed)
        want = resident(model, ids)
        how = {"device_bytes": generator.choice((0, 0.5, 1.5, 9)), "host_bytes": generator.choice((0, 1, 2.5, 99))}
        tiers = tiers_of(resident(model, ids_of(CHUNK)), tmp_path, pin=pin, **how)
        memory = model.offload(want, tiers)
        for step in range(8):
            what = generator.choice(("append", "move", "file", "none"))
            if what == "append":
                more = ids_of(generator.randrange(1, 3 * CHUNK), 100 * seed + step)
                # one section: both compress the same tokens in one micro-batch
                memory, want = model.append(memory, more), model.append(want, more, keep=True)
            elif what == "move":
                memory.move(generator.choice(tiers.tier_names))
            elif what == "file":
                memory.save(tmp_path / "memory", max_shard_size=generator.choice((None, 20_000)))
                memory = TieredMemory.load(tmp_path / "memory", model, tiers)
            assert_same(memory.gather(), want)
            question = ids_of(5, seed + step)
            assert model.find_passages(question, memory=memory) == model.find_passages(question, memory=want)
            near = model.memory_for(memory, question, chunks=3)
            assert isinstance(near.keys, Arriving)
            assert_same_slots(near, by_hand(model, want, near.chunks))
            told = tiers.nbytes()
            for tier in tiers._tiers:
                assert tier.budget is None or told[tier.name] <= tier.budget


@torch.no_grad()
def test_layers_are_waited_for(model: Any) -> None:
    """The copies start late, and the allocator's memory was in use: every use comes after them, and they after it."""
    ids = ids_of(8 * CHUNK, 1)
    want = resident(model, ids)
    memory = model.offload(want, tiers_of(want, None))
    text, side = ids_of(7, 2), memory.tiers._side
    expected = model(text, memory=want).logits
    for round_ in range(20):
        # freed on the host, in use on the device: the next allocations get this memory
        busy = [torch.empty_like(tensor) for tensor in (*want.keys, *want.values)]
        torch.cuda._sleep(SLEEP)
        for tensor in busy:
            tensor.fill_(torch.nan)
        del busy, tensor
        if round_ % 2:
            with torch.cuda.stream(side):
                torch.cuda._sleep(SLEEP)
        near = memory.select_chunks([range(8)])
        logits = model(text, memory=near).logits
        del near
        # the memory is given back before the copies are done
        memory.select_chunks([range(8)])
        trash = [torch.full_like(tensor, torch.nan) for tensor in (*want.keys, *want.values)]
        assert torch.equal(logits, expected), round_
        assert all(bool(tensor.isnan().all()) for tensor in trash)


@torch.no_grad()
def test_the_host_does_not_wait(model: Any) -> None:
    want = resident(model, ids_of(8 * CHUNK, 1))
    memory = model.offload(want, tiers_of(want, None))
    memory.select_chunks([[0, 5]])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        near = memory.select_chunks([[0, 5]])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_slots(near, by_hand(model, want, near.chunks))
    # while the side stream is busy, the current one is not until it takes a layer
    with torch.cuda.stream(memory.tiers._side):
        torch.cuda._sleep(20 * SLEEP)
    near = memory.select_chunks([[1]])
    before = torch.cuda.current_stream().record_event()
    before.synchronize()
    assert not memory.tiers._side.query()
    near.keys[0].sum().item()
    assert torch.equal(near.keys[0], by_hand(model, want, [[1]]).keys[0])


@torch.no_grad()
def test_pages_that_leave_the_device_while_they_are_written(model: Any, tmp_path: Path) -> None:
    """Device to host to disk at once: each step waits for the copy before it."""
    want = resident(model, ids_of(9 * CHUNK, 1))
    for how in ({"host_bytes": 0}, {"host_bytes": 1}, {"device_bytes": 1, "host_bytes": 1}):
        tiers = tiers_of(want, tmp_path, **how)
        with torch.cuda.stream(tiers._side):
            torch.cuda._sleep(SLEEP)
        memory = model.offload(want, tiers)
        assert_same(memory.gather(), want)


@torch.no_grad()
def test_generate(model: Any, tmp_path: Path) -> None:
    """The graph of a decoding step reads memories that have just arrived, one after the other."""
    ids = ids_of(9 * CHUNK + 5, 4)
    want = resident(model, ids)
    memory = model.offload(want, tiers_of(want, tmp_path, host_bytes=2))
    how: dict[str, Any] = {"passages": 3, "tokenizer": Letters(), "return_dict_in_generate": True, **STEPS}
    for seed in range(4):
        question = ids_of(6, seed)
        got, expected = model.generate(question, memory=memory, **how), model.generate(question, memory=want, **how)
        assert got.passages == expected.passages and got.sequences.tolist() == expected.sequences.tolist()
        with torch.cuda.stream(memory.tiers._side):
            torch.cuda._sleep(SLEEP)
        near = model.memory_for(memory, question, chunks=3)
        text, steps = ids_of(9, seed), {**STEPS, "max_new_tokens": 12}
        answers = [
            model.generate(text, memory=one, **steps).tolist() for one in (near, by_hand(model, want, near.chunks))
        ]
        assert answers[0] == answers[1]


@torch.no_grad()
def test_threads(model: Any, tmp_path: Path) -> None:
    """Threads with streams of their own ask one memory."""
    want = resident(model, ids_of(12 * CHUNK, 1))
    memory = model.offload(want, tiers_of(want, tmp_path, device_bytes=2, host_bytes=2))
    questions = [ids_of(5, seed) for seed in range(4)]
    expected = [model.memory_for(memory, question, chunks=3).chunks for question in questions]
    torch.cuda.synchronize()
    errors: list[BaseException] = []

    def ask(number: int) -> None:
        try:
            generator = random.Random(number)
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(15):
                    which = generator.randrange(4)
                    near = model.memory_for(memory, questions[which], chunks=3)
                    assert near.chunks == expected[which]
                    assert_same_slots(near, by_hand(model, want, near.chunks))
                    if number == 0:
                        memory.move(generator.choice(memory.tiers.tier_names))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors

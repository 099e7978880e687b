"""Memories in tiers: bit by bit what the resident memory is, whatever lies where, and whoever asks."""

import copy
import errno
import functools
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sharedllm_ext import ContextMemory, MemoryTiers, TieredMemory
from sharedllm_ext.model import tiered_appending
from sharedllm_ext.model.pages import Tier
from sharedllm_ext.model.picked_memory import PickedMemory
from sharedllm_ext.model.sources import Source

from .. import support
from . import builders
from .test_append import assert_same
from .test_passage_reading import FIELDS, STEPS, Letters, ready
from .test_pick import CHUNK, build, tokens


def built(**fields: Any) -> Any:
    """A micro-batch is one chunk, so that all matmuls have the same rows whatever they are computed with."""
    return ready(build(**{**FIELDS, "micro_batch_tokens": 1, **fields}))


@pytest.fixture(scope="module")
def model() -> Any:
    return built()


@pytest.fixture
def small_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiered_appending, "SECTION_TOKENS", 2 * CHUNK)


def tiers_of(model: Any, folder: Path | None, *, pages: float = 3, device_pages: float | None = None) -> MemoryTiers:
    """Room for so many pages of two chunks; with ``device_pages`` a tier more, as on a CUDA device."""
    page = 2 * model.compress(tokens(1, CHUNK)).nbytes
    tiers = MemoryTiers("cpu", host_bytes=int(pages * page), folder=folder, page_bytes=page - 1)
    if device_pages is not None:
        tiers._tiers.insert(0, Tier("device", torch.device("cpu"), int(device_pages * page), pinned=False))
        tiers._tiers[1].name = "host"
    return tiers


def resident(model: Any, texts: list[Tensor]) -> ContextMemory:
    return ContextMemory.concat([_alone(model, tuple(text.tolist())) for text in texts])


@functools.lru_cache(maxsize=64)
def _alone(model: Any, text: tuple[int, ...]) -> ContextMemory:
    ids = torch.tensor([text], dtype=torch.int64).view(1, -1)
    memory: ContextMemory = model.compress(ids).with_sources([Source.of_ids(ids[0])])
    return memory


def streamed(model: Any, text: Tensor, tiers: MemoryTiers) -> TieredMemory:
    memory: TieredMemory = model.append(model.offload(model.compress(text[None, :0]), tiers), text[None])
    return memory


def picked(model: Any, memory: ContextMemory, chunks: list[list[int]]) -> ContextMemory:
    """Chunks of each document of a resident memory, taken out by hand."""
    size = model.compress(tokens(1, CHUNK)).num_slots
    slots, cu_slots = [], [0]
    for document, own in enumerate(chunks):
        first, end = memory.cu_slots[document : document + 2]
        for chunk in sorted(set(own)):
            slots += range(first + chunk * size, min(first + (chunk + 1) * size, end))
        cu_slots.append(len(slots))
    index = torch.tensor(slots, dtype=torch.int64)
    return ContextMemory(
        keys=[key[index] for key in memory.keys],
        values=[value[index] for value in memory.values],
        cu_slots=cu_slots,
        num_chunks=memory.num_chunks,
        num_tokens=memory.num_tokens,
        memory_index=list(range(len(chunks))),
        signature=memory.signature,
    )


def assert_same_slots(got: ContextMemory, want: ContextMemory) -> None:
    for name in ("cu_slots", "num_chunks", "num_tokens", "memory_index"):
        assert getattr(got, name) == getattr(want, name), name
    assert all(map(torch.equal, (*got.keys, *got.values), (*want.keys, *want.values)))


@torch.no_grad()
def assert_same_answers(model: Any, memory: TieredMemory, texts: list[Tensor], generator: random.Random) -> None:
    """Everything that can be read of it, against a resident memory of the same texts."""
    want = resident(model, texts)
    assert_same(memory.gather(), want)
    rows = len(texts)
    assert memory.memory_index == list(range(rows))
    question = tokens(rows, 5, seed=generator.randrange(10**6))
    found = model.find_passages(question, memory=want)
    assert model.find_passages(question, memory=memory) == found
    # by hand
    chunks = [[c for c in range(count) if generator.random() < 0.4] for count in want.num_chunks]
    got, by_hand = memory.select_chunks(chunks), picked(model, want, chunks)
    assert_same_slots(got, by_hand)
    assert torch.equal(model(question, memory=got).logits, model(question, memory=by_hand).logits)
    # by the pick: the best chunks of the resident memory's own scores
    count = generator.choice((1, 2, 4))
    scored = model._scored("", question, None, (None, None), want)
    best = [
        sorted({i for i, _ in sorted(enumerate(_chunk_scores(model, one)), key=lambda pair: -pair[1])[:count]})
        for one in scored
    ]
    got, by_hand = model.memory_for(memory, question, chunks=count), picked(model, want, best)
    assert [got.chunks[document] for document in got.memory_index] == best
    assert_same_slots(got, by_hand)
    # all chunks are the whole memory
    whole = model.memory_for(memory, question)
    assert all(map(torch.equal, (*whole.keys, *whole.values), (*want.keys, *want.values)))


def _chunk_scores(model: Any, scored: Any) -> list[float]:
    (part,) = scored.parts
    best = [-float("inf")] * -(-part.length // CHUNK)
    for segment, score in enumerate(scored.scores.tolist()):
        chunk = segment * model.config.segment_size // CHUNK
        best[chunk] = max(best[chunk], score)
    return best


@pytest.mark.usefixtures("small_sections")
@torch.no_grad()
def test_random_sequences_equal_the_resident_memory(model: Any, tmp_path: Path) -> None:
    """Each step's result is compared, bit by bit, with compressing its documents anew.

    ``SHAREDLLM_SEQUENCES`` says how many sequences; 500 take some minutes.
    """
    for seed in range(int(os.environ.get("SHAREDLLM_SEQUENCES", "20"))):
        generator = random.Random(seed)
        torch.manual_seed(seed)

        def some(generator: random.Random = generator) -> int:
            return generator.choice((0, 1, 9, CHUNK, CHUNK + 1, generator.randrange(6 * CHUNK)))

        def texts_of(count: int, generator: random.Random = generator) -> list[Tensor]:
            return [tokens(some(), seed=generator.randrange(10**6)) for _ in range(count)]

        device_pages = generator.choice((None, 0, 0.5, 2, 100))
        tiers = tiers_of(model, tmp_path, pages=generator.choice((0, 1, 3, 100)), device_pages=device_pages)
        texts = texts_of(generator.randrange(1, 3))
        memory = model.offload(resident(model, texts), tiers)
        for step in range(6):
            before, old_texts = memory, list(texts)
            what = generator.choice(
                ("append", "append", "row", "concat", "documents", "rows", "file", "move", "budget")
            )
            keep = generator.random() < 0.5
            if what == "append":
                more = texts_of(len(texts))
                longest = max(text.numel() for text in more)
                ids, mask = (torch.zeros((len(more), longest), dtype=torch.int64) for _ in range(2))
                for row, text in enumerate(more):
                    ids[row, longest - text.numel() :], mask[row, longest - text.numel() :] = text, 1
                memory = model.append(memory, ids, mask, keep=keep)
                texts = [torch.cat(pair) for pair in zip(texts, more, strict=True)]
            elif what == "row":
                row, more = generator.randrange(len(texts)), texts_of(1)[0]
                memory = model.append(memory, more[None], rows=[row], keep=keep)
                texts = [torch.cat((text, more)) if i == row else text for i, text in enumerate(texts)]
            elif what == "concat" and len(texts) < 5:
                other = texts_of(2)
                made = [streamed(model, text, tiers) for text in other]
                pair = [(memory, texts), (TieredMemory.concat(made), other)]
                generator.shuffle(pair)
                memory = TieredMemory.concat([one for one, _ in pair])
                texts = [text for _, own in pair for text in own]
            elif what == "documents":
                chosen = [generator.randrange(len(texts)) for _ in range(generator.randrange(1, 4))]
                memory, texts = memory.select_documents(chosen), [texts[i] for i in chosen]
            elif what == "rows":
                rows = [generator.randrange(len(texts)) for _ in range(3)]
                chunks = [[generator.randrange(n)] if n else [] for n in (memory.num_chunks[row] for row in rows)]
                got, want = memory.select(rows).select_chunks(chunks), resident(model, texts)
                text = tokens(3, 4, seed=step)
                logits = [
                    model(text[i : i + 1], memory=picked(model, want.select_documents([row]), [chunks[i]])).logits
                    for i, row in enumerate(rows)
                ]
                torch.testing.assert_close(model(text, memory=got).logits, torch.cat(logits), rtol=0, atol=1e-12)
            elif what == "file":
                memory.save(tmp_path / "memory", max_shard_size=generator.choice((None, 1, 20_000)))
                assert_same(ContextMemory.load(tmp_path / "memory", model), resident(model, texts))
                memory = TieredMemory.load(tmp_path / "memory", model, tiers, verify=generator.random() < 0.5)
            elif what == "move":
                documents = generator.choice((None, [generator.randrange(len(texts))]))
                memory.move(generator.choice(tiers.tier_names), documents)
            elif what == "budget":
                tiers._tiers[-1].budget = generator.choice((0, 10_000, None))
                tiers._make_room(len(tiers._tiers) - 1)
            assert_same_answers(model, memory, texts, generator)
            for tier in tiers._tiers:
                assert tier.budget is None or tier.nbytes <= tier.budget, (seed, step, what)
            # the memory of before still has its slots
            want = resident(model, old_texts)
            assert_same(before.gather(), want)
            if keep or before is memory:
                question = tokens(len(old_texts), 4, seed=step)
                assert model.find_passages(question, memory=before) == model.find_passages(question, memory=want)
        # nothing is left of what nobody has
        held = memory.describe()["tiers"]
        before = made = pair = None
        assert tiers.nbytes() == held, (seed, made, pair)


@torch.no_grad()
def test_a_document_that_stands_in_a_memory_twice(model: Any) -> None:
    text, more = tokens(2 * CHUNK + 9, seed=1), tokens(3 * CHUNK, seed=2)
    tiers = tiers_of(model, None, pages=99)
    twice = streamed(model, text, tiers).select_documents([0, 0])
    one = model.append(twice, more[None, :40], rows=[1])
    assert_same_answers(model, one, [text, torch.cat((text, more[:40]))], random.Random(0))
    twice = one.select_documents([1, 1])
    both = model.append(twice, torch.stack((more[:60], more[60:120])))
    longer = torch.cat((text, more[:40]))
    texts = [torch.cat((longer, more[:60])), torch.cat((longer, more[60:120]))]
    assert_same_answers(model, both, texts, random.Random(0))


@torch.no_grad()
def test_generate_with_passages_reads_picked_chunks(model: Any, tmp_path: Path) -> None:
    text = tokens(9 * CHUNK + 5, seed=4)
    memory, want = streamed(model, text, tiers_of(model, tmp_path, pages=1)), resident(model, [text])
    question = tokens(2, 6, seed=7)
    how: dict[str, Any] = {"passages": 3, "tokenizer": Letters(), "return_dict_in_generate": True, **STEPS}
    # up to 128 chunks: all of them
    got, expected = model.generate(question, memory=memory, **how), model.generate(question, memory=want, **how)
    assert got.passages == expected.passages and got.sequences.tolist() == expected.sequences.tolist()
    assert isinstance(got.memory, PickedMemory) and got.memory.num_slots == want.num_slots
    again = model.generate(question, memory=memory, context_ids=text[None], **how)
    assert again.sequences.tolist() == expected.sequences.tolist()
    # passages that were found before; what the questions' own words find
    given = model.generate(question, memory=memory, **{**how, "passages": expected.passages})
    assert given.sequences.tolist() == expected.sequences.tolist()
    query = tokens(2, 4, seed=9)
    asked = [model.generate(question, memory=one, query_ids=query, **how) for one in (memory, want)]
    assert asked[0].passages == asked[1].passages == model.find_passages(query, memory=want, count=3)
    assert asked[0].sequences.tolist() == asked[1].sequences.tolist()
    # a question's own choice
    near = model.memory_for(memory, question[:1], chunks=2)
    assert near.num_slots < want.num_slots / 3
    prompt = model.passage_prompt(Letters(), text, expected.passages[0], "ab")
    by_hand = picked(model, want, near.chunks)
    answers = [model.generate(prompt, memory=one, **STEPS).tolist() for one in (near, by_hand)]
    assert answers[0] == answers[1]


@torch.no_grad()
def test_pages_are_evicted_by_their_last_use(model: Any, tmp_path: Path) -> None:
    memory = streamed(model, tokens(8 * CHUNK), tiers_of(model, tmp_path, pages=2))
    pages = memory.documents[0].pages
    assert [page.copies[0] is not None for page in pages] == [False, False, True, True]
    assert [page.place is not None for page in pages] == [True, True, False, False]
    # 2 is used, so 3 goes for 0
    memory.select_chunks([[4]])
    memory.select_chunks([[0]])
    assert [page.copies[0] is not None for page in pages] == [True, False, True, False]
    told = memory.describe()
    page = pages[0].nbytes
    assert told["tiers"] == {"memory": 2 * page, "disk": 3 * page} and told["key_bytes"] == 2 * page
    assert json.loads(json.dumps(told)) == told
    # a copy that is on the disk already is not written again
    before = memory.tiers._spill._end  # type: ignore[union-attr]
    memory.select_chunks([[2]])
    memory.select_chunks([[6]])
    assert memory.describe()["tiers"]["disk"] == 4 * page and memory.tiers._spill._end == before + page  # type: ignore[union-attr]


@torch.no_grad()
def test_pages_go_down_from_the_device(model: Any, tmp_path: Path) -> None:
    memory = streamed(model, tokens(12 * CHUNK), tiers_of(model, tmp_path, pages=2, device_pages=1))
    pages, size = memory.documents[0].pages, memory.documents[0].pages[0].nbytes
    assert memory.describe()["tiers"] == {"device": size, "host": 2 * size, "disk": 3 * size}
    assert [[copy is not None for copy in page.copies] for page in pages[3:]] == [[0, 1], [0, 1], [1, 0]]
    memory.select_chunks([[0]])
    # a page comes up through all tiers, and what makes room goes down
    assert [copy is not None for copy in pages[0].copies] == [True, True]
    assert [copy is not None for copy in pages[5].copies] == [False, True]
    memory.move("disk")
    assert memory.describe()["tiers"] == {"device": 0, "host": 0, "disk": 6 * size}
    memory.move("host")
    assert memory.describe()["tiers"] == {"device": 0, "host": 2 * size, "disk": 6 * size}
    memory.move("device")
    assert memory.describe()["tiers"]["device"] == size
    with pytest.raises(ValueError, match="tier: expected one of device, host, disk, got 'gpu'"):
        memory.move("gpu")


def test_a_text_that_streams_in_takes_no_more_memory(tmp_path: Path) -> None:
    """Peak memory of the process while it compresses does not grow with the text."""
    program = tmp_path / "program.py"
    program.write_text(
        "import resource, sys, torch\n"
        "from sharedllm_ext import MemoryTiers\n"
        "from tests.model import builders\n"
        "torch.manual_seed(0)\n"
        "model = builders.model(chunk_size=64, query_aware=False)\n"
        "tiers = MemoryTiers('cpu', host_bytes='2MB', folder=sys.argv[1], page_bytes='100KB')\n"
        "memory = model.offload(model.compress(builders.ids(1, 0)), tiers)\n"
        "peaks = []\n"
        "for _ in range(4):\n"
        "    memory = model.append(memory, builders.ids(1, 65536))\n"
        "    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
        "print(memory.nbytes, memory.describe()['tiers']['memory'], *peaks)\n"
    )
    command = [sys.executable, str(program), str(tmp_path)]
    done = subprocess.run(
        command, env=support.environment_of_tests(), capture_output=True, text=True, timeout=300, check=True
    )
    size, held, *peaks = map(int, done.stdout.split())
    assert size > 30 << 20 and held <= 2_000_000
    # the last three quarters of the memory are not in the process
    assert peaks[-1] - peaks[0] < size // 8, (size, peaks)


class TestThreads:
    """Several threads ask one memory, and one makes it longer."""

    @torch.no_grad()
    def test_answers(self, model: Any, tmp_path: Path) -> None:
        text = tokens(12 * CHUNK + 7, seed=11)
        memory = streamed(model, text[: 12 * CHUNK], tiers_of(model, tmp_path, pages=1.5, device_pages=1))
        want = resident(model, [text[: 12 * CHUNK]])
        questions = [tokens(1, 5, seed=seed) for seed in range(4)]
        expected = [
            (model.find_passages(question, memory=want), model.memory_for(memory, question, chunks=3).chunks)
            for question in questions
        ]
        errors: list[BaseException] = []

        def ask(number: int) -> None:
            try:
                generator = random.Random(number)
                for _ in range(12):
                    which = generator.randrange(4)
                    near = model.memory_for(memory, questions[which], chunks=3)
                    assert near.chunks == expected[which][1]
                    assert_same_slots(near, picked(model, want, near.chunks))
                    assert model.find_passages(questions[which], memory=memory) == expected[which][0]
                    if number == 0:
                        memory.move(generator.choice(memory.tiers.tier_names))
            except BaseException as error:
                errors.append(error)

        def grow() -> None:
            try:
                for _ in range(4):
                    model.append(memory, text[None, 12 * CHUNK :], keep=True)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
        threads.append(threading.Thread(target=grow))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        assert_same(memory.gather(), want)


class TestTrouble:
    """Disks that are full, files that change: a clear error, and nothing is lost."""

    @pytest.fixture
    def no_room(self) -> Iterator[Any]:
        """A call that lets files grow to so many bytes only; the system's own error, not a stand-in."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    @torch.no_grad()
    def test_a_full_disk(self, model: Any, tmp_path: Path, no_room: Any) -> None:
        text = tokens(9 * CHUNK + 5, seed=3)
        tiers = tiers_of(model, tmp_path, pages=1)
        memory = streamed(model, text[: 5 * CHUNK + 3], tiers)
        want, question = resident(model, [text[: 5 * CHUNK + 3]]), tokens(1, 5)
        page = memory.documents[0].pages[0].nbytes
        no_room(int(2.5 * page))
        message = f"tiers: expected room for a page of [0-9]+ bytes in '{tmp_path}', got: .* make room on the disk"
        with pytest.raises(OSError, match=message):
            model.append(memory, text[None, 5 * CHUNK + 3 :])
        # as it was, also for the pick
        assert_same(memory.gather(), want)
        assert model.find_passages(question, memory=memory) == model.find_passages(question, memory=want)
        with pytest.raises(OSError, match=message):
            memory.move("disk")
        assert_same(memory.gather(), want)
        no_room(resource.RLIM_INFINITY)
        longer = model.append(memory, text[None, 5 * CHUNK + 3 :])
        assert_same(longer.gather(), resident(model, [text]))

    @torch.no_grad()
    def test_a_disk_that_is_full_within_a_page(
        self, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        memory, write, left = streamed(model, tokens(8 * CHUNK), tiers_of(model, tmp_path, pages=9)), os.pwrite, [2000]

        def small(descriptor: int, data: Any, offset: int) -> int:
            if not left[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = write(descriptor, data[: left[0]], offset)
            left[0] -= count
            return count

        monkeypatch.setattr(os, "pwrite", small)
        with pytest.raises(OSError, match="got: No space left on device") as caught:
            memory.move("disk")
        assert caught.value.errno == errno.ENOSPC
        monkeypatch.undo()
        # the part of a page that was written is given back
        assert memory.tiers._spill._end == 0  # type: ignore[union-attr]
        memory.move("disk")
        assert_same(memory.gather(), resident(model, [tokens(8 * CHUNK)]))

    @torch.no_grad()
    def test_questions_need_no_room(self, model: Any, tmp_path: Path, no_room: Any) -> None:
        """Pages that only main memory has stay there where they cannot be written."""
        memory = streamed(model, tokens(8 * CHUNK), tiers_of(model, tmp_path, pages=2))
        pages = memory.documents[0].pages
        no_room(2 * pages[0].nbytes)
        want = resident(model, [tokens(8 * CHUNK)])
        assert_same_slots(memory.select_chunks([[0]]), picked(model, want, [[0]]))
        assert [page.copies[0] is not None for page in pages] == [False, False, True, True]

    @torch.no_grad()
    def test_no_disk(self, model: Any) -> None:
        memory = streamed(model, tokens(3 * CHUNK), tiers_of(model, None, pages=2))
        expected = r"tiers: expected a folder for what exceeds host_bytes, got none; 'memory' holds [0-9]+ bytes"
        with pytest.raises(MemoryError, match=expected):
            model.append(memory, tokens(1, 5 * CHUNK))
        with pytest.raises(MemoryError, match="expected a folder"):
            memory.move("disk")
        assert_same(memory.gather(), resident(model, [tokens(3 * CHUNK)]))

    @torch.no_grad()
    def test_a_file_that_is_removed_is_still_read(self, model: Any, tmp_path: Path) -> None:
        text = tokens(7 * CHUNK + 3, seed=2)
        want = resident(model, [text])
        want.save(tmp_path / "memory", max_shard_size=20_000)
        memory = TieredMemory.load(tmp_path / "memory", model, tiers_of(model, None, pages=1))
        for file in tmp_path.iterdir():
            file.unlink()
        assert_same(memory.gather(), want)

    @torch.no_grad()
    def test_a_file_that_is_made_shorter(self, model: Any, tmp_path: Path) -> None:
        texts = [tokens(4 * CHUNK, seed=seed) for seed in range(2)]
        want = resident(model, texts)
        want.save(tmp_path / "memory")
        data = (tmp_path / "memory").read_bytes()
        tiers = tiers_of(model, None, pages=2)
        memory = TieredMemory.load(tmp_path / "memory", model, tiers)
        memory.move("memory", [0])
        os.truncate(tmp_path / "memory", len(data) // 4)
        with pytest.raises(
            ValueError, match="memory: expected a complete sharedllm-context-memory file, got a truncated"
        ):
            memory.gather()
        # what is in main memory answers
        first, own = memory.select_documents([0]), want.select_documents([0])
        assert_same(first.gather(), own)
        with open(tmp_path / "memory", "r+b") as file:
            file.write(data)
        assert_same(memory.gather(), want)

    @torch.no_grad()
    def test_a_spill_file_that_is_made_shorter(self, model: Any, tmp_path: Path) -> None:
        memory = streamed(model, tokens(8 * CHUNK), tiers_of(model, tmp_path, pages=0))
        spill: Any = memory.tiers._spill
        os.ftruncate(spill._file.fileno(), 10)
        with pytest.raises(OSError, match=f"of the spill file in '{tmp_path}', got 10: the file was made shorter"):
            memory.gather()

    def test_what_is_refused(self, model: Any, tmp_path: Path) -> None:
        tiers = tiers_of(model, tmp_path)
        memory = streamed(model, tokens(3 * CHUNK), tiers)
        text = tokens(1, 4)
        for call in (lambda: model(text, memory=memory), lambda: model.generate(text, memory=memory, max_new_tokens=1)):
            with pytest.raises(
                TypeError, match=r"memory: expected a ContextMemory, got a TieredMemory; model.memory_for"
            ):
                call()
        near = model.memory_for(memory, text, chunks=1)
        for refused in (
            lambda: near.save(tmp_path / "x"),
            lambda: model.append(near, text),
            lambda: model.find_passages(text, memory=near),
            lambda: ContextMemory.concat([near, near]),
            lambda: near.select_documents([0]),
            lambda: model.offload(near, tiers),
        ):
            with pytest.raises(ValueError, match="expected all chunks of its documents, got 1 picked one;"):
                refused()
        with pytest.raises(IndexError, match=r"chunks\[0\]: expected chunks 0 to 2 of document 0, got 3"):
            memory.select_chunks([[3]])
        with pytest.raises(ValueError, match="chunks: expected 1 list, one for each batch row, got 2"):
            memory.select_chunks([[0], [0]])
        with pytest.raises(ValueError, match="chunks: expected an integer of at least 1, got 0"):
            model.memory_for(memory, text, chunks=0)
        with pytest.raises(ValueError, match="query_ids: expected the questions' tokens for a tiered memory, got none"):
            model.memory_for(memory)
        other = streamed(model, tokens(CHUNK), tiers_of(model, tmp_path))
        with pytest.raises(ValueError, match=r"memories\[1\]: expected the tiers of the first, got others"):
            TieredMemory.concat([memory, other])
        with pytest.raises(ValueError, match="memories: expected at least one"):
            TieredMemory.concat([])
        with pytest.raises(IndexError, match="documents: expected 0 to 0, got 1"):
            memory.select_documents([1])
        with pytest.raises(IndexError, match="rows: expected batch rows 0 to 0, got -1"):
            memory.select([-1])
        with pytest.raises(ValueError, match="context_ids: expected the text that the memory was made of, got another"):
            model.find_passages(text, tokens(1, 3 * CHUNK, seed=9), memory=memory)
        with pytest.raises(ValueError, match="memory: made by another model"):
            built(chunk_size=CHUNK // 2).append(memory, text)
        for copied in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match="memory: expected a TieredMemory to stay in its tiers, got a pickle"):
                copied(memory)
        with pytest.raises(FileNotFoundError, match="folder: expected an existing folder, got '/none'"):
            MemoryTiers("cpu", folder="/none")
        with pytest.raises(
            ValueError, match=r"host_bytes: expected a number of bytes from 0 on, or a text .* got '2XB'"
        ):
            MemoryTiers("cpu", host_bytes="2XB")
        with pytest.raises(ValueError, match=r"device_bytes: expected 0 on the CPU, .*, got 5000"):
            MemoryTiers("cpu", device_bytes="5KB")

    def test_memories_that_a_pick_cannot_search(self, model: Any, tmp_path: Path) -> None:
        tiers, text = tiers_of(model, tmp_path), tokens(1, 2 * CHUNK)
        unknown = model.offload(model.compress(text), tiers)
        with pytest.raises(ValueError, match="expected the tokens of the memory's document 0, or a memory that knows"):
            model.memory_for(unknown, text[:, :4])
        with pytest.raises(ValueError, match=r"with the token ids of its documents \(sources\), got one without"):
            model.find_passages(text[:, :4], text, memory=unknown)
        assert_same(unknown.gather(), model.compress(text))
        with pytest.raises(ValueError, match="expected the text that the memory was made of, got another"):
            model.offload(model.compress(text).with_sources([_wrong(text)]), tiers)
        uneven = builders.model(chunk_size=37, slots_per_node=20, query_aware=True)
        with pytest.raises(ValueError, match="tiers: expected chunks of equally many slots, got chunk_size=37"):
            uneven.offload(uneven.compress(builders.ids(1, 40)), tiers)

    def test_memories_in_training(self, tmp_path: Path) -> None:
        model = builders.model().train()
        memory = model.compress(builders.ids(1, 40))
        with pytest.raises(ValueError, match="expected one of a model in evaluation mode, got one made in training"):
            model.offload(memory, MemoryTiers("cpu"))


def _wrong(text: Tensor) -> Source:
    """Another text of the same length; full chunks leave no tail to compare with."""
    return Source.of_ids(tokens(text.numel(), seed=77))


@torch.no_grad()
def test_models_without_a_pick(tmp_path: Path) -> None:
    """Chunks are chosen by hand, also of memories that a question has chosen."""
    for asks in (False, True):
        model = builders.model(query_aware=asks, micro_batch_tokens=1)
        context, query = builders.ids(1, 9 * 32 + 5), builders.ids(1, 4) if asks else None
        tiers = MemoryTiers("cpu", host_bytes=20_000, folder=tmp_path, page_bytes=7000)
        memory = model.offload(model.compress(context[:, :0], query_ids=query), tiers)
        memory = model.append(memory, context, query_ids=query)
        assert_same(memory.gather(), model.compress(context, query_ids=query))
        with pytest.raises(ValueError, match="memory_for: expected a model with a pick"):
            model.memory_for(memory, builders.ids(1, 3))
        near = memory.select_chunks([[8, 2]])
        assert (
            near.chunks == [[2, 8]] and near.num_slots == 32 and model(builders.ids(1, 3), memory=near).logits.numel()
        )


@torch.no_grad()
def test_inference_mode_and_copies(model: Any, tmp_path: Path) -> None:
    text = tokens(5 * CHUNK, seed=1)
    with torch.inference_mode():
        memory = streamed(model, text, tiers_of(model, tmp_path, pages=1))
    near = model.memory_for(memory, tokens(1, 4), chunks=2)
    assert not near.keys[0].is_inference()
    for other in (pickle.loads(pickle.dumps(near)), copy.deepcopy(near), near.to(torch.float64), near.expand(2)):
        assert isinstance(other, PickedMemory) and other.chunks == near.chunks
        assert all(map(torch.equal, (*other.keys, *other.values), (*near.keys, *near.values)))
    assert_same(memory.gather(), resident(model, [text]))


def test_files_of_older_versions(model: Any, tmp_path: Path) -> None:
    """Files without token ids and tails are read; chunks are chosen by hand."""
    memory = model.compress(tokens(1, 3 * CHUNK))
    memory.save(tmp_path / "memory")
    loaded = TieredMemory.load(tmp_path / "memory", model, tiers_of(model, None))
    assert loaded.tails == [None] and loaded.sources == [None]
    assert_same_slots(loaded.gather(), memory)
    loaded.save(tmp_path / "again")
    assert_same_slots(ContextMemory.load(tmp_path / "again", model), memory)

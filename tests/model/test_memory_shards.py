"""Files of version 3: what a memory knows of its documents, shards, maps; damage, kills and several writers."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from sharedllm_ext import ContextMemory
from sharedllm_ext.model import memory_writer
from sharedllm_ext.model.sources import Source, SourceText

from . import builders
from .test_append import assert_same
from .test_memory_file import _bytes_mutated, _head_mutated, _joined, _parts, _sealed, same, strays

# two of the four tensors of the memory below
SHARD = 32000


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return builders.model(query_aware=False, micro_batch_tokens=builders.TREE["chunk_size"])


@pytest.fixture(scope="module")
def memory(model) -> ContextMemory:
    """Three documents: one with a source of two texts, one with a name alone, one without."""
    torch.manual_seed(0)
    mask, context = torch.ones(3, 75, dtype=torch.long), builders.ids(3, 75)
    mask[1, 50:] = 0
    made = model.compress(context, mask)
    ids = context[0].to(torch.int32)
    offsets = torch.arange(120, dtype=torch.int32).view(60, 2)
    texts = (SourceText(60, ids[:60], offsets, 130, "ab" * 32), SourceText(15, ids[60:]))
    return made.with_sources([Source(texts, "a ☂.txt", "cd" * 32), Source((SourceText(50),), "b"), None])


def same_origin(one: ContextMemory, other: ContextMemory) -> bool:
    """Whether two memories have the same tails and sources, which :func:`same` does not look at."""

    def told(memory: ContextMemory) -> Any:
        tails = memory.tails and [tail and (tail.token_ids.tolist(), tail.slots) for tail in memory.tails]

        def listed(tensor: Any) -> Any:
            return None if tensor is None else tensor.tolist()

        sources = memory.sources and [
            source
            and (
                source.name,
                source.tokenizer,
                [(t.tokens, listed(t.token_ids), listed(t.offsets), t.characters, t.sha256) for t in source.texts],
            )
            for source in memory.sources
        ]
        return tails, sources

    return bool(told(one) == told(other))


def equal(one: ContextMemory, other: ContextMemory) -> bool:
    return same(one, other) and same_origin(one, other)


def shards_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if "-of-" in path.name)


@pytest.fixture(params=[None, SHARD], ids=["one file", "shards"])
def file(tmp_path: Path, memory: ContextMemory, request: pytest.FixtureRequest) -> Path:
    memory.save(tmp_path / "memory.safetensors", max_shard_size=request.param)
    return tmp_path / "memory.safetensors"


@pytest.fixture
def sharded(tmp_path: Path, memory: ContextMemory) -> Path:
    memory.save(tmp_path / "memory.safetensors", max_shard_size=SHARD)
    return tmp_path / "memory.safetensors"


@pytest.mark.parametrize("mmap", [False, True])
def test_everything_comes_back(model, memory: ContextMemory, file: Path, mmap: bool) -> None:
    loaded = ContextMemory.load(file, model, mmap=mmap)
    assert equal(loaded, memory)
    assert loaded.sources[0].place(3, 5) == ("a ☂.txt", 6, 9) and loaded.sources[2] is None
    more = builders.ids(3, 20)
    assert_same(model.append(loaded, more), model.append(memory, more, keep=True))
    for part, names in (
        (dataclasses.replace(memory, sources=None), "tails"),
        (dataclasses.replace(memory, tails=None), "sources"),
    ):
        part.save(file)
        assert equal(ContextMemory.load(file), part), names
    bare = dataclasses.replace(memory, tails=None, sources=None)
    for size in (None, SHARD):
        bare.save(file, max_shard_size=size)
        assert equal(ContextMemory.load(file, model), bare)


def test_shards_are_files_of_their_own(memory: ContextMemory, sharded: Path) -> None:
    shards = shards_in(sharded.parent)
    tensors = {f"{kind}.{i}": t for kind in ("keys", "values") for i, t in enumerate(getattr(memory, kind))}
    assert len(shards) == 2 and len({shard.name.rsplit("-", 3)[0] for shard in shards}) == 1
    found = []
    for shard in shards:
        with safe_open(shard, "pt") as opened:
            assert sum(tensors[name].nbytes for name in opened.keys()) <= SHARD  # noqa: SIM118
            for name in opened.keys():  # noqa: SIM118
                assert torch.equal(opened.get_tensor(name), tensors[name])
                found.append(name)
    assert sorted(found) == sorted(tensors)
    # a tensor is not cut
    memory.save(sharded, max_shard_size=1)
    assert len(shards_in(sharded.parent)) == 4 and equal(ContextMemory.load(sharded), memory)


@pytest.mark.parametrize(
    ("size", "shards"), [("32000", 2), (32000, 2), ("32KB", 2), ("0.032 mb", 2), ("1GB", 1), (10**9, 1), (1, 4)]
)
def test_sizes_of_shards(tmp_path: Path, memory: ContextMemory, size: Any, shards: int) -> None:
    memory.save(tmp_path / "memory", max_shard_size=size)
    assert len(shards_in(tmp_path)) == shards


@pytest.mark.parametrize("size", [0, -1, "", "x", "1XB", "GB", 0.5, True, "0.1"])
def test_sizes_that_are_none(tmp_path: Path, memory: ContextMemory, size: Any) -> None:
    with pytest.raises(ValueError, match="max_shard_size: expected a number of bytes from 1 on, or a text such as"):
        memory.save(tmp_path / "memory", max_shard_size=size)
    assert not list(tmp_path.iterdir())


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True])
def test_no_damaged_file_reads_as_something_else(model, memory: ContextMemory, file: Path, mmap: bool) -> None:
    generator, refused = random.Random(0), 0
    paths = [file, *shards_in(file.parent)]
    whole = {path: path.read_bytes() for path in paths}
    for index in range(600):
        path = paths[index % len(paths)]
        data = whole[path]
        first = 8 + int.from_bytes(data[:8], "little")
        damages: list[Callable[[], bytes]] = [
            lambda data=data: _bytes_mutated(data, generator, 0, 8),
            lambda data=data, first=first: _bytes_mutated(data, generator, 8, first),
            lambda data=data, first=first: _bytes_mutated(data, generator, first, len(data)),
            lambda data=data: _head_mutated(data, generator),
            lambda data=data: data[: generator.randrange(len(data))],
            lambda data=data: data + bytes(generator.randrange(1, 100)),
        ]
        path.write_bytes(damages[(index // len(paths)) % len(damages)]())
        try:
            loaded = ContextMemory.load(file, model, mmap=mmap)
        except ValueError as error:
            assert str(path) in str(error) or str(file) in str(error), error
            assert "expected" in str(error) and len(str(error)) < 1000, error
            refused += 1
        else:
            assert equal(loaded, memory), index
        path.unlink()
        path.write_bytes(data)
    assert refused > 480


def _text(header: dict[str, Any]) -> dict[str, Any]:
    return header["sources"][0]["texts"][0]


def _named(header: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The same in a file of the version whose texts have names."""
    header["version"] = 5
    text = _text(header)
    text.update({"name": None, "line_ends": None, "heading": 0} | fields)
    return text


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "tails of other documents": (lambda h: h.update(tails=[0]), r"tails to be null or a list of 3, got \[0\]"),
    "no tails": (lambda h: h.update(tails=None), r"expected tail_ids of shape \(0,\), got \(40,\)"),
    "a tail in words": (lambda h: h["tails"].__setitem__(0, "8"), "1 to 11 slots in the last 11 tokens of document 0"),
    "a tail of nothing": (
        lambda h: h["tails"].__setitem__(1, 0),
        "1 to 16 slots in the last 18 tokens of document 1, got 0",
    ),
    "a longer tail": (
        lambda h: h["tails"].__setitem__(1, 17),
        "1 to 16 slots in the last 18 tokens of document 1, got 17",
    ),
    "sources of nothing": (lambda h: h.update(sources={}), "sources to be null or a list of 3"),
    "a source of nothing": (
        lambda h: h["sources"].__setitem__(0, {}),
        "name, tokenizer and texts of the source of document 0",
    ),
    "a name that is none": (
        lambda h: h["sources"][0].update(name=3),
        "the source's name of document 0 to be null or a text, got 3",
    ),
    "texts that are none": (
        lambda h: h["sources"][0].update(texts={}),
        "the source's texts of document 0 to be a list",
    ),
    "a text of nothing": (lambda h: h["sources"][0].update(texts=[3]), "of a text of document 0, got 3"),
    "negative characters": (lambda h: _text(h).update(characters=-1), "tokens and characters of a text of document 0"),
    "a flag that is none": (
        lambda h: _text(h).update(token_ids=1),
        "token_ids and offsets of document 0 to be true or false",
    ),
    "a digest that is none": (
        lambda h: _text(h).update(sha256=1),
        "the SHA-256 of a text of document 0 to be null or a text",
    ),
    "a name in an older version": (
        lambda h: _text(h).update(name="a", line_ends=None, heading=0),
        "characters, offsets, sha256, token_ids, tokens of a text of document 0, got",
    ),
    "a name without the rest": (lambda h: _named(h, name="a").pop("heading"), "of a text of document 0, got"),
    "a text's name that is none": (
        lambda h: _named(h, name=5),
        "the name of a text of document 0 to be null or a text",
    ),
    "line ends below none": (
        lambda h: _named(h, line_ends=-1),
        r"line_ends and heading of a text of document 0 of at least 0, got \[-1, 0\]",
    ),
    "no heading": (lambda h: _named(h, heading=None), r"line_ends and heading of a text .*, got \[0, None\]"),
    "fewer tokens": (lambda h: _text(h).update(tokens=59), "texts of 75 tokens of document 0, got 74"),
    "no ids": (lambda h: _text(h).update(token_ids=False), r"expected token_ids of shape \(15,\), got \(75,\)"),
    "no offsets": (lambda h: _text(h).update(offsets=False), r"expected offsets of shape \(0, 2\), got \(60, 2\)"),
    "shards that are none": (lambda h: h.update(shards=3), "expected shards to be a list of names and SHA-256, got 3"),
    "a shard elsewhere": (lambda h: h.update(shards=[{"file": "../x", "sha256": ""}]), "expected shards to be a list"),
    "a shard of zeros": (lambda h: h.update(shards=[{"file": "a\0b", "sha256": ""}]), "expected shards to be a list"),
    "a shard without digest": (lambda h: h.update(shards=[{"file": "x"}]), "expected shards to be a list"),
    "a shard that is not there": (
        lambda h: h.update(shards=[{"file": "x", "sha256": ""}]),
        "expected its shard 'x' beside it, got none",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_headers_that_contradict_themselves(file: Path, name: str) -> None:
    change, message = HOSTILE[name]
    file.write_bytes(_sealed(file.read_bytes(), change))
    with pytest.raises(ValueError, match=message) as caught:
        ContextMemory.load(file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def test_integers_where_they_should_not_be(file: Path) -> None:
    data = file.read_bytes()
    for name, dtype, message in (
        ("tail_ids", "F32", "expected dtype I32 for 'tail_ids', got 'F32'"),
        ("keys.0", "I32", "expected one of the dtypes F64, F32, F16, BF16 for 'keys.0', got 'I32'"),
    ):
        head, rest = _parts(data)
        if name not in head:
            continue
        head[name]["dtype"] = dtype
        file.write_bytes(_joined(head, rest))
        with pytest.raises(ValueError, match=message):
            ContextMemory.load(file)


def test_shards_that_are_missing_or_of_another_memory(
    tmp_path: Path, model, memory: ContextMemory, sharded: Path
) -> None:
    one, other = shards_in(sharded.parent)
    first, second = one.read_bytes(), other.read_bytes()
    one.unlink()
    with pytest.raises(ValueError, match=rf"{sharded}: expected its shard '{one.name}' beside it, got none"):
        ContextMemory.load(sharded)
    one.mkdir()
    with pytest.raises(ValueError, match=f"expected its shard '{one.name}' beside it, got none"):
        ContextMemory.load(sharded)
    one.rmdir()
    os.mkfifo(one)
    with pytest.raises(ValueError, match=f"expected a regular file, got '{one}', which is a FIFO"):
        ContextMemory.load(sharded)
    one.unlink()
    one.write_bytes(second)
    with pytest.raises(
        ValueError, match=rf"{sharded}: expected a shard '{one.name}' whose header has the SHA-256 .*another memory's"
    ):
        ContextMemory.load(sharded)
    (tmp_path / "other").mkdir()
    memory.to(torch.float64).save(tmp_path / "other" / "memory", max_shard_size="64KB")
    for strange, message in (
        (shards_in(tmp_path / "other")[0].read_bytes(), "whose header has the SHA-256"),
        (sharded.read_bytes(), "expected a sharedllm-context-memory-shard file, got a 'sharedllm-context-memory' file"),
        (b"", "expected a sharedllm-context-memory-shard file, got an empty one"),
    ):
        one.write_bytes(strange)
        with pytest.raises(ValueError, match=message):
            ContextMemory.load(sharded)
    one.write_bytes(first)
    assert equal(ContextMemory.load(sharded, model), memory)
    # the same tensors twice
    data = sharded.read_bytes()
    sharded.write_bytes(_sealed(data, lambda h: h["shards"].append(h["shards"][0])))
    with pytest.raises(ValueError, match=r"expected one tensor 'keys.0' in all shards, got two"):
        ContextMemory.load(sharded)
    sharded.write_bytes(_sealed(data, lambda h: h["shards"].pop()))
    with pytest.raises(ValueError, match=r"expected 7 tensors for 2 layers, got 5"):
        ContextMemory.load(sharded)
    # a shard is no memory
    with pytest.raises(
        ValueError, match="expected a sharedllm-context-memory file, got a 'sharedllm-context-memory-shard'"
    ):
        ContextMemory.load(one)


# -- replacing --------------------------------------------------------------------------------------------------------


def test_old_shards_go_when_the_new_file_is_there(tmp_path: Path, memory: ContextMemory, sharded: Path) -> None:
    users = [f"{sharded.name}.{'0' * 16}-00001-of-00002", f"{sharded.name}-00001-of-00002", "memory.safetensors.bak"]
    for name in users:
        (tmp_path / name).write_text("mine")
    (tmp_path / "memory").write_bytes(b"")
    other = memory.select([2, 1])
    # another memory, whose name begins alike
    other.save(tmp_path / "memory", max_shard_size=SHARD)
    old = shards_in(tmp_path)
    memory.save(sharded, max_shard_size=SHARD)
    assert len(shards_in(tmp_path)) == len(old) and set(shards_in(tmp_path)) != set(old)
    memory.save(sharded)
    assert equal(ContextMemory.load(sharded), memory) and equal(ContextMemory.load(tmp_path / "memory"), other)
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith("memory.") or path.name in users}
    assert left == {"memory", *users}
    assert (
        len([path for path in shards_in(tmp_path) if path.name.startswith("memory.") and path.name not in users]) == 2
    )
    assert all((tmp_path / name).read_text() == "mine" for name in users)


def test_links_and_long_names(tmp_path: Path, memory: ContextMemory) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "link", tmp_path / "elsewhere" / ("m" * 255)
    link.symlink_to(target)
    for _ in range(2):
        memory.save(link, max_shard_size=SHARD)
        assert link.is_symlink() and len(list((tmp_path / "elsewhere").iterdir())) == 3
        assert equal(ContextMemory.load(link), memory) and equal(ContextMemory.load(target), memory)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_failure_leaves_the_old_memory(
    sharded: Path, memory: ContextMemory, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    before = {path.name: path.read_bytes() for path in sharded.parent.iterdir()}
    calls, sync = [], os.fsync

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(memory_writer.os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{sharded}'"):
        memory.select([0]).save(sharded, max_shard_size=SHARD)
    assert {path.name: path.read_bytes() for path in sharded.parent.iterdir()} == before


def test_several_writers_and_readers(tmp_path: Path, memory: ContextMemory) -> None:
    memories = [memory.select([i, 0]) for i in range(3)]
    path, errors = tmp_path / "memory", []
    memories[0].save(path, max_shard_size=SHARD)
    done = threading.Event()

    def write(which: int) -> None:
        try:
            for i in range(15):
                memories[which].save(path, max_shard_size=None if i % 5 == 4 else SHARD)
        except BaseException as error:
            errors.append(error)

    def read() -> None:
        try:
            while not done.is_set():
                loaded = ContextMemory.load(path)
                assert any(equal(loaded, one) for one in memories)
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(which,)) for which in range(3)]
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in (*writers, *readers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert not errors
    memories[0].save(path)
    assert os.listdir(tmp_path) == ["memory"]


_KILLED = """
import os, random, signal, sys, time
import torch
from sharedllm_ext import ContextMemory
torch.set_num_threads(1)
path, folder = sys.argv[1], os.path.dirname(sys.argv[1])
memory = ContextMemory.load(path)
size = memory.keys[0].nbytes * 2
generator = random.Random(0)
for run in range(40):
    before = set(os.listdir(folder))
    child = os.fork()
    if child == 0:
        while True:
            memory.save(path, max_shard_size=size)
    deadline = time.monotonic() + 60
    while set(os.listdir(folder)) == before and time.monotonic() < deadline:
        pass
    time.sleep(generator.random() * 0.03)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    loaded = ContextMemory.load(path)
    assert all(map(torch.equal, loaded.values, memory.values)) and loaded.signature == memory.signature
    assert loaded.sources[0].name == "a"
    print(len(os.listdir(folder)))
memory.save(path, max_shard_size=size)
left = os.listdir(folder)
assert len(left) == 1 + len(memory.keys), left
"""


def test_killed_writers_lose_nothing(tmp_path: Path, model) -> None:
    torch.manual_seed(0)
    context = builders.ids(16, 256)
    made = model.compress(context).with_sources([Source.of_ids(ids, "a") for ids in context])
    made.save(tmp_path / "memory", max_shard_size=made.keys[0].nbytes * 2)
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "memory")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # the kills did meet calls: something was left beside the memory
    assert sum(int(count) > 3 for count in done.stdout.split()) >= 5, done.stdout


# -- maps -------------------------------------------------------------------------------------------------------------


def test_maps(model, memory: ContextMemory, file: Path) -> None:
    where = file if len(list(file.parent.iterdir())) == 1 else shards_in(file.parent)[0]
    data = where.read_bytes()
    mapped = ContextMemory.load(file, model, mmap=True)
    assert str(where) in Path("/proc/self/maps").read_text()
    text = builders.ids(3, 5)
    with torch.no_grad():
        assert torch.equal(model(text, memory=mapped).logits, model(text, memory=memory).logits)
    # what is written to a tensor stays in this process
    mapped.keys[0].fill_(3.0)
    assert where.read_bytes() == data
    mapped = ContextMemory.load(file, model, mmap=True)
    # in place of the very file that is mapped
    mapped.save(file, max_shard_size=SHARD)
    assert equal(mapped, memory) and equal(ContextMemory.load(file), memory)
    mapped.save(file)
    assert equal(mapped, memory) and equal(ContextMemory.load(file), memory)
    # gone from the folder, but not from the map
    file.unlink()
    assert equal(mapped, memory)


def test_maps_are_no_default(memory: ContextMemory, file: Path) -> None:
    loaded = ContextMemory.load(file)
    assert str(file) not in Path("/proc/self/maps").read_text()
    for path in file.parent.iterdir():
        with path.open("wb"):
            pass
    assert equal(loaded, memory) and not strays(file.parent)


def test_a_map_is_checked_unless_the_caller_does_not_want_it(memory: ContextMemory, file: Path) -> None:
    path = max(file.parent.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    head, _ = _parts(bytes(data))
    first = 8 + int.from_bytes(data[:8], "little")
    name = next(key for key in head if key.startswith(("keys", "values")))
    data[first + head[name]["data_offsets"][0]] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"expected {name} with CRC-32 '\w{{8}}', got \w{{8}}: the data were changed"):
        ContextMemory.load(file, mmap=True)
    assert not same(ContextMemory.load(file, mmap=True, verify=False), memory)


def test_a_file_whose_tensors_are_not_aligned_is_read(memory: ContextMemory, tmp_path: Path) -> None:
    memory.save(tmp_path / "memory")
    head, rest = _parts((tmp_path / "memory").read_bytes())
    for spaces in range(4):
        text = json.dumps(head).encode() + b" " * spaces
        (tmp_path / "odd").write_bytes(len(text).to_bytes(8, "little") + text + rest)
        assert equal(ContextMemory.load(tmp_path / "odd", mmap=True), memory)

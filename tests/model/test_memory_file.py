"""Files of context memories: damage is refused, interruption costs nothing, a user's files stay."""

import copy
import dataclasses
import hashlib
import json
import os
import random
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sharedllm_ext import ContextMemory
from sharedllm_ext.model import memory_file

from . import builders


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return builders.model()


@pytest.fixture(scope="module")
def memory(model) -> ContextMemory:
    """Two documents, each read by its own row; without what files of version 3 alone hold."""
    torch.manual_seed(0)
    mask = torch.ones(2, 75, dtype=torch.long)
    mask[1, 50:] = 0
    return dataclasses.replace(model.compress(builders.ids(2, 75), mask), tails=None)


@pytest.fixture
def file(tmp_path: Path, memory: ContextMemory) -> Path:
    memory.save(tmp_path / "memory.safetensors")
    return tmp_path / "memory.safetensors"


def same(one: ContextMemory, other: ContextMemory) -> bool:
    """Whether two memories are equal in every field and every bit."""
    tensors = zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True)
    fields = ("cu_slots", "num_chunks", "num_tokens", "memory_index", "signature")
    return all(getattr(one, name) == getattr(other, name) for name in fields) and all(
        a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in tensors
    )


def strays(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".partial")]


# -- damage -----------------------------------------------------------------------------------------------------------


def _bytes_mutated(data: bytes, generator: random.Random, low: int, high: int) -> bytes:
    out = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 5))):
        place = generator.randrange(low, high)
        what = generator.randrange(5)
        if what == 0:
            out[place] ^= 1 << generator.randrange(8)
        elif what == 1:
            out[place] = generator.randrange(256)
        elif what == 2:
            del out[place]
            out.append(0)
        elif what == 3:
            out.insert(place, generator.randrange(256))
            out.pop()
        else:
            end = min(high, place + generator.randrange(1, 64))
            out[place:end] = out[low : low + end - place]
    return bytes(out)


def _value_mutated(value: Any, generator: random.Random) -> Any:
    if isinstance(value, dict):
        value = dict(value)
        name = generator.choice(sorted(value))
        change = generator.randrange(4)
        if change == 0:
            del value[name]
        elif change == 1:
            value[f"{name}x"] = value.pop(name)
        else:
            value[name] = _value_mutated(value[name], generator)
        return value
    if isinstance(value, list) and value and generator.random() < 0.7:
        value = list(value)
        place = generator.randrange(len(value))
        value[place] = _value_mutated(value[place], generator)
        return value
    others = [None, True, -1, 0, 1, 2, 2**64, 0.5, "", "x", [], [0], {}, {"a": 1}]
    if type(value) is int:
        others += [value + 1, value - 1, 2 * value, float(value), str(value)] * 2
    return generator.choice([other for other in others if other != value or type(other) is not type(value)])


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _joined(head: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + data


def _head_mutated(data: bytes, generator: random.Random) -> bytes:
    head, rest = _parts(data)
    if generator.random() < 0.5:
        return _joined(_value_mutated(head, generator), rest)
    header = _value_mutated(json.loads(head["__metadata__"]["header"]), generator)
    head["__metadata__"]["header"] = json.dumps(header)
    return _joined(head, rest)


def test_no_damaged_file_reads_as_something_else(model, memory: ContextMemory, file: Path) -> None:
    data, generator = file.read_bytes(), random.Random(0)
    first = 8 + int.from_bytes(data[:8], "little")
    damages: list[Callable[[], bytes]] = [
        lambda: _bytes_mutated(data, generator, 0, 8),
        lambda: _bytes_mutated(data, generator, 8, first),
        lambda: _bytes_mutated(data, generator, first, len(data)),
        lambda: _head_mutated(data, generator),
        lambda: data[: generator.randrange(len(data))],
        lambda: data + bytes(generator.randrange(1, 100)),
    ]
    refused, damaged = 0, file.with_name("damaged")
    for index in range(600):
        changed = damages[index % len(damages)]()
        damaged.write_bytes(changed)
        try:
            loaded = ContextMemory.load(damaged, model)
        except ValueError as error:
            assert str(damaged) in str(error) and "expected" in str(error) and len(str(error)) < 1000, error
            refused += 1
        else:
            assert same(loaded, memory), index
    assert refused > 500


def _sealed(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A file whose header was changed by somebody who knows how to seal it."""
    head, rest = _parts(data)
    header = json.loads(head["__metadata__"]["header"])
    change(header)
    text = json.dumps(header)
    head["__metadata__"] = {"header": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return _joined(head, rest)


def _old(data: bytes) -> bytes:
    """The same memory as version 1 wrote it."""

    def change(header: dict[str, Any]) -> None:
        del header["checksums"]
        header["version"] = 1
        for name in ("rope", "settings", "probe"):
            del header["signature"][name]

    head, rest = _parts(_sealed(data, change))
    del head["__metadata__"]["sha256"]
    return _joined(head, rest)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no list": (lambda h: h.update(cu_slots=5), "expected cu_slots to be a list of integers of at least 0, got 5"),
    "a fraction": (lambda h: h.update(num_tokens=[75.0, 50]), r"num_tokens to be a list .*, got \[75.0, 50\]"),
    "a truth value": (lambda h: h.update(memory_index=[True, 0]), "memory_index to be a list"),
    "a negative number": (lambda h: h.update(memory_index=[-1, 0]), "memory_index to be a list"),
    "a huge number": (lambda h: h.update(num_tokens=[2**70, 50]), "num_tokens to be a list"),
    "slots that fall": (lambda h: h["cu_slots"].__setitem__(2, 3), r"cu_slots to rise at document 1, got \[\d+, 3\]"),
    "slots that begin late": (lambda h: h["cu_slots"].__setitem__(0, 1), "cu_slots to begin with 0, got 1"),
    "slots without end": (lambda h: h["cu_slots"].pop(), "expected 3 cu_slots for 2 documents, got 2"),
    "fewer slots": (lambda h: h["cu_slots"].__setitem__(2, h["cu_slots"][1] + 8), "expected keys.0 of shape"),
    "chunks": (lambda h: h.update(num_chunks=[4, 2]), "num_chunks of document 0 to be 3 for 75 tokens in chunks of 32"),
    "tokens": (lambda h: h.update(num_tokens=[75]), "num_tokens of 2 documents as in num_chunks, got 1"),
    "many tokens": (lambda h: h.update(num_tokens=[75, 3200], num_chunks=[3, 100]), "400 to 1600 slots of document 1"),
    "a row without document": (lambda h: h.update(memory_index=[0, 2]), "memory_index from 0 to 1, got 2"),
    "no signature": (lambda h: h.update(signature=[]), "expected a signature of"),
    "a signature's text": (lambda h: h["signature"].update(chunk_size="32"), "chunk_size to be an integer"),
    "a signature's number": (lambda h: h["signature"].update(weights=3), "weights to be a text, got 3"),
    "chunks of nothing": (lambda h: h["signature"].update(chunk_size=0), "chunk_size to be an integer from 1"),
    "many layers": (
        lambda h: h["signature"].update(injection_layers=2**30, probe=None),
        "2147483648 tensors for 10737",
    ),
    "a field too many": (lambda h: h.update(more=1), "fields of version 2"),
    "a checksum too few": (lambda h: h["checksums"].pop("keys.0"), "a checksum for every tensor"),
    "another checksum": (lambda h: h["checksums"].update({"values.1": 7}), "expected values.1 with CRC-32 7, got"),
    "version": (lambda h: h.update(version=6), "expected sharedllm-context-memory version 1 to 5, got 6"),
    "version in words": (lambda h: h.update(version=[]), r"version 1 to 5, got \[\]"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_headers_that_contradict_themselves(file: Path, name: str) -> None:
    change, message = HOSTILE[name]
    file.write_bytes(_sealed(file.read_bytes(), change))
    with pytest.raises(ValueError, match=message) as caught:
        ContextMemory.load(file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def _entry(name: str, **fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda head: head[name].update(fields)


HEADS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another dtype": (
        _entry("keys.0", dtype="I32"),
        "one of the dtypes F64, F32, F16, BF16 for 'keys.0', got",
    ),
    "a dtype of another size": (_entry("keys.0", dtype="F16"), "bytes of 'keys.0' by its shape and dtype, got"),
    "no dtype": (_entry("keys.0", dtype=[]), "expected dtype, shape and data_offsets of 'keys.0'"),
    "another shape": (_entry("keys.0", shape=[1]), "expected 4 bytes of 'keys.0' by its shape and dtype"),
    "a negative shape": (_entry("keys.0", shape=[-1, -1]), "expected dtype, shape and data_offsets of 'keys.0'"),
    "the same bytes twice": (
        lambda head: head["keys.0"].update(data_offsets=head["values.1"]["data_offsets"]),
        "to begin at byte",
    ),
    "another name": (lambda head: head.update({"key.0": head.pop("keys.0")}), "a tensor keys.0, got none, but 'key.0'"),
    "one tensor less": (lambda head: head.pop("values.1"), "expected a file of|expected 4 tensors"),
    "no metadata": (lambda head: head.pop("__metadata__"), "safetensors file without that header"),
    "no seal": (lambda head: head["__metadata__"].pop("sha256"), "expected a header with its SHA-256"),
}


@pytest.mark.parametrize("name", HEADS)
def test_tensors_that_are_not_where_they_should_be(file: Path, name: str) -> None:
    change, message = HEADS[name]
    head, data = _parts(file.read_bytes())
    change(head)
    file.write_bytes(_joined(head, data))
    with pytest.raises(ValueError, match=message) as caught:
        ContextMemory.load(file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def test_two_dtypes(file: Path, memory: ContextMemory) -> None:
    tensors = {f"keys.{i}": key for i, key in enumerate(memory.keys)}
    tensors |= {f"values.{i}": value.half() for i, value in enumerate(memory.values)}
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["header"])
    del header["checksums"]
    save_file(tensors, file, {"header": json.dumps({**header, "version": 1})})
    with pytest.raises(ValueError, match=r"one dtype for all tensors, got torch.float16, torch.float32"):
        ContextMemory.load(file)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":1,"a":2}', '{"a":NaN}', '{"a":' + "9" * 5000 + "}", "[]", '"\\ud800"', "\xff"]
)
def test_text_that_is_no_header(tmp_path: Path, text: str) -> None:
    data = text.encode("latin-1")
    for name, whole in {
        "outer": len(data).to_bytes(8, "little") + data,
        "inner": _joined({"__metadata__": {"header": text}}, b""),
    }.items():
        (tmp_path / name).write_bytes(whole)
        with pytest.raises(ValueError, match=f"{name}: expected a complete .*truncated or foreign"):
            ContextMemory.load(tmp_path / name)


def test_checksum_may_be_left_out(memory: ContextMemory, file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"expected values.1 with CRC-32 '\w{8}', got \w{8}: the data were changed"):
        ContextMemory.load(file)
    loaded = ContextMemory.load(file, verify=False)
    assert not same(loaded, memory)
    assert torch.equal(loaded.keys[0], memory.keys[0])


# -- old and foreign files --------------------------------------------------------------------------------------------


def test_files_of_version_1_are_read(model, memory: ContextMemory, file: Path) -> None:
    file.write_bytes(_old(file.read_bytes()))
    loaded = ContextMemory.load(file, model)
    assert set(loaded.signature) < set(memory.signature)
    assert same(dataclasses.replace(loaded, signature=memory.signature), memory)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=r"weights: expected \w+, got \w+"):
        ContextMemory.load(file, builders.model())
    head, data = _parts(file.read_bytes())
    header = json.loads(head["__metadata__"]["header"])
    # a version 2 that was made to look old
    head["__metadata__"]["header"] = json.dumps({**header, "checksums": {}})
    file.write_bytes(_joined(head, data))
    with pytest.raises(ValueError, match="expected the fields of version 1, got others"):
        ContextMemory.load(file)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_safetensors_library_reads_what_is_written(tmp_path: Path, memory: ContextMemory, dtype) -> None:
    memory.to(dtype).save(tmp_path / "memory")
    with safe_open(tmp_path / "memory", "pt") as file:
        assert set(file.keys()) == {"keys.0", "keys.1", "values.0", "values.1"}
        assert torch.equal(file.get_tensor("values.1"), memory.values[1].to(dtype))
    loaded = ContextMemory.load(tmp_path / "memory")
    assert loaded.dtype == dtype
    assert torch.equal(loaded.keys[0], memory.keys[0].to(dtype))


def test_large_data_are_aligned(tmp_path: Path, memory: ContextMemory) -> None:
    # as tensors in memory: copies are faster, and a map of a tensor is aligned, too
    for count in (1, 3, 200, 300, 301):
        path = tmp_path / f"{count}.safetensors"
        several = ContextMemory.concat([memory] * count)
        several.save(path)
        begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert begin % (64 if several.nbytes >= 1 << 20 else 8) == 0
        assert several.nbytes + begin == path.stat().st_size
        for mmap in (False, True):
            loaded = ContextMemory.load(path, mmap=mmap)
            assert same(loaded, several)
            assert several.nbytes < 1 << 20 or loaded.keys[0].data_ptr() % 64 == 0
    assert several.nbytes > 1 << 20


def test_views_and_gradients_are_written(tmp_path: Path, memory: ContextMemory) -> None:
    strided = copy.copy(memory)
    strided.keys = [torch.nn.Parameter(key.transpose(0, 1).contiguous().transpose(0, 1)) for key in memory.keys]
    strided.save(tmp_path / "memory")
    assert same(ContextMemory.load(tmp_path / "memory"), memory)


def test_empty_memory(tmp_path: Path, model) -> None:
    for context in (builders.ids(2, 0), builders.ids(0, 5)):
        empty = model.compress(context)
        empty.save(tmp_path / "memory")
        assert same(ContextMemory.load(tmp_path / "memory", model), empty)


def test_what_contradicts_itself_is_not_written(tmp_path: Path, memory: ContextMemory, file: Path) -> None:
    before = file.read_bytes()
    for field, value, message in (
        ("memory_index", [0, 7], "memory: expected memory_index from 0 to 1, got 7"),
        ("keys", memory.keys[:1], "memory: expected 4 keys and values, got 3"),
        ("values", [memory.values[0], memory.values[1].half()], "memory: expected values.1 of shape .*float16"),
        ("values", [memory.values[0], memory.values[1][1:]], "memory: expected values.1 of shape"),
    ):
        wrong = copy.copy(memory)
        setattr(wrong, field, value)
        with pytest.raises(ValueError, match=message):
            wrong.save(file)
    assert file.read_bytes() == before and not strays(tmp_path)


# -- the file system --------------------------------------------------------------------------------------------------


def test_a_loaded_memory_outlives_its_file(memory: ContextMemory, file: Path) -> None:
    loaded = ContextMemory.load(file)
    # reading a mapped file that has become shorter ends the process
    assert str(file) not in Path("/proc/self/maps").read_text()
    with file.open("wb"):
        pass
    assert same(loaded, memory)


@pytest.fixture
def special(tmp_path: Path) -> Iterator[dict[str, Path]]:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link to fifo").symlink_to(tmp_path / "fifo")
    yield {
        "a FIFO": tmp_path / "fifo",
        "a folder": tmp_path / "folder",
        "a character device": Path("/dev/null"),
        "a FIFO, through a link": tmp_path / "link to fifo",
    }


def test_only_regular_files(memory: ContextMemory, special: dict[str, Path]) -> None:
    for kind, path in special.items():
        before = path.lstat()
        with pytest.raises(ValueError, match=f"expected a regular file or a new name, got .*which is {kind[:6]}"):
            memory.save(path)
        with pytest.raises((ValueError, FileNotFoundError), match=f"expected a .*file, got .*which is {kind[:6]}"):
            ContextMemory.load(path)
        assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    with pytest.raises(ValueError, match="which is a folder's name"):
        memory.save(f"{special['a folder']}/new/")


def test_no_folder(memory: ContextMemory, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected an existing folder, got '.*/none', which does not exist"):
        memory.save(tmp_path / "none" / "memory")


def test_links_stay_links(tmp_path: Path, memory: ContextMemory) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "memory", tmp_path / "link"
    link.symlink_to(Path("elsewhere") / "memory")
    for _ in range(2):  # the first time the link leads nowhere
        memory.save(link)
        assert link.is_symlink() and not target.is_symlink()
        assert same(ContextMemory.load(target), memory)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="loop"):
        memory.save(tmp_path / "loop")


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_permissions_of_a_new_file_are_those_of_any_new_file(tmp_path: Path, memory: ContextMemory, mask: int) -> None:
    before = os.umask(mask)
    try:
        memory.save(tmp_path / "memory")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "memory").stat().st_mode) == 0o666 & ~mask


def test_permissions_of_an_old_file_stay(memory: ContextMemory, file: Path) -> None:
    file.chmod(0o640)
    memory.save(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_users_files_stay(tmp_path: Path, memory: ContextMemory) -> None:
    path = tmp_path / "memory"
    prefix = f".sharedllm-{hashlib.sha256(b'memory').hexdigest()[:16]}-"
    names = ["memory.partial", "memory.tmp", ".memory.partial", f"{prefix}notes.partial", f"{prefix}{'0' * 16}.partial"]
    for name in names:
        (tmp_path / name).write_text("mine, and 128 bytes are not all that there is")
    (tmp_path / f"{prefix}{'1' * 16}.partial").symlink_to(tmp_path / "memory.tmp")
    memory.save(path)
    memory.save(path)
    assert set(names) < set(os.listdir(tmp_path))
    assert all((tmp_path / name).read_text().startswith("mine") for name in names)
    assert (tmp_path / f"{prefix}{'1' * 16}.partial").is_symlink()


def test_names_as_long_as_they_may_be(tmp_path: Path, memory: ContextMemory) -> None:
    memory.save(tmp_path / ("m" * 255))
    memory.save(os.fsencode(tmp_path / "bytes"))
    assert same(ContextMemory.load(tmp_path / ("m" * 255)), ContextMemory.load(os.fsencode(tmp_path / "bytes")))


def test_failure_leaves_the_old_file(file: Path, memory: ContextMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory_file.os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{file}'"):
        memory.save(file)
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


def test_two_writers(tmp_path: Path, memory: ContextMemory) -> None:
    other, errors = memory.select([1, 0]), []

    def write(which: ContextMemory) -> None:
        try:
            for _ in range(20):
                which.save(tmp_path / "memory")
                loaded = ContextMemory.load(tmp_path / "memory")
                assert same(loaded, memory) or same(loaded, other)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(which,)) for which in (memory, other, memory)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert os.listdir(tmp_path) == ["memory"]


_KILLED = """
import os, random, signal, sys, time
import torch
from sharedllm_ext import ContextMemory
torch.set_num_threads(1)
path, folder = sys.argv[1], os.path.dirname(sys.argv[1])
memory = ContextMemory.load(path)
generator = random.Random(0)
for run in range(60):
    child = os.fork()
    if child == 0:
        while True:
            memory.save(path)
    deadline = time.monotonic() + 60
    # a moment within one of the first calls
    while len(os.listdir(folder)) < 2 and time.monotonic() < deadline:
        pass
    time.sleep(generator.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left = [name for name in os.listdir(folder) if name != os.path.basename(path)]
    assert len(left) <= 1, left
    loaded = ContextMemory.load(path)
    assert all(map(torch.equal, loaded.values, memory.values)) and loaded.signature == memory.signature
    print(len(left))
memory.save(path)
assert os.listdir(folder) == [os.path.basename(path)]
"""


def test_killed_writers_lose_nothing(tmp_path: Path, model) -> None:
    torch.manual_seed(0)
    model.compress(builders.ids(64, 256)).save(tmp_path / "memory")
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "memory")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # the kills did meet calls
    assert done.stdout.split().count("1") >= 10, done.stdout

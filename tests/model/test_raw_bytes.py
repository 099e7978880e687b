"""Sums of bytes and fresh memory: each set of instructions against zlib, and what works without the compiled module."""

import platform
import random
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
import torch

from sharedllm_ext import _C
from sharedllm_ext.model import raw_bytes
from sharedllm_ext.model.memory_file import SHARD, bytes_of, crc32
from sharedllm_ext.model.memory_writer import write_tensors

from ..support import environment_of_package

#: Of this machine; "" takes the fastest.
INSTRUCTIONS = [*_C.crc32_instructions(), *([""] if _C.crc32_instructions() else [])]
DATA = random.Random(0).randbytes(1 << 16)


def test_instructions_of_this_machine() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    expected = [
        name
        for name, needed in (("vpclmulqdq", {"vpclmulqdq", "avx512f", "pclmulqdq"}), ("pclmulqdq", {"pclmulqdq"}))
        if needed <= set(flags.split())
    ]
    assert _C.crc32_instructions() == expected
    assert crc32 is raw_bytes.crc32 is (_C.crc32 if expected else zlib.crc32)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_all_short_lengths_at_all_alignments(instructions: str) -> None:
    view = memoryview(DATA)
    for length in range(1101):
        # of the registers' 64 bytes
        place = length * 7 % 64
        piece = view[place : place + length]
        assert _C.crc32(piece, 0, instructions) == zlib.crc32(piece), (length, place)
    for place in range(64):
        for length in (0, 1, 15, 16, 63, 64, 255, 256, 257, 511, 512, 1024):
            piece = view[place : place + length]
            assert _C.crc32(piece, 0, instructions) == zlib.crc32(piece), (length, place)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_continued_sums(instructions: str) -> None:
    generator = random.Random(1)
    for _ in range(300):
        begin = generator.randrange(2**32)
        cuts = sorted(generator.randrange(len(DATA)) for _ in range(generator.randrange(6)))
        total = begin
        for first, last in zip([0, *cuts], [*cuts, len(DATA)], strict=True):
            total = _C.crc32(memoryview(DATA)[first:last], total, instructions)
        assert total == zlib.crc32(DATA, begin)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("fill", [b"\x00", b"\xff", b"\x80"])
def test_one_byte_over_and_over(instructions: str, fill: bytes) -> None:
    for length in (1, 64, 300, 5000):
        assert _C.crc32(fill * length, 0, instructions) == zlib.crc32(fill * length)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_every_bit_counts(instructions: str) -> None:
    data = bytearray(DATA[:600])
    found = {_C.crc32(data, 0, instructions)}
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        found.add(_C.crc32(data, 0, instructions))
        data[bit // 8] ^= 1 << bit % 8
    assert len(found) == 1 + 8 * len(data)


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_a_long_tensor(instructions: str) -> None:
    tensor = torch.randn(5_000_001, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    data = bytes_of(tensor)
    assert _C.crc32(data, 0, instructions) == zlib.crc32(data)
    assert _C.crc32(data[3:-5], 7, instructions) == zlib.crc32(data[3:-5], 7)


@pytest.mark.skipif(not INSTRUCTIONS, reason="this CPU has no instructions for it")
def test_other_threads_run_meanwhile() -> None:
    data, most = memoryview(bytearray(1 << 24)), 2000
    started, enough = threading.Event(), threading.Event()
    sums = 0

    def keep_summing() -> None:
        nonlocal sums
        started.set()
        while sums < most and not enough.is_set():
            _C.crc32(data)
            sums += 1

    interval = sys.getswitchinterval()
    # whoever holds the lock is not asked for it within the test
    sys.setswitchinterval(600)
    try:
        thread = threading.Thread(target=keep_summing)
        thread.start()
        started.wait()
        enough.set()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sums < most


def test_what_cannot_be_summed() -> None:
    names = ", ".join(_C.crc32_instructions()) or "none"
    with pytest.raises(
        ValueError, match=rf"^instructions: expected one of those that run here \({names}\), got 'mmx'$"
    ):
        _C.crc32(b"", 0, "mmx")
    if not INSTRUCTIONS:
        return
    with pytest.raises(TypeError):
        _C.crc32("text")
    with pytest.raises(BufferError):
        _C.crc32(memoryview(DATA)[::2])


def test_fresh_memory_keeps_what_is_in_it() -> None:
    tensor = torch.arange(3_000_001, dtype=torch.int32)
    data = bytes_of(tensor)
    for piece in (data, data[1:], data[5:-3], data[:0], data[:1], data[4095:4097]):
        _C.populate(piece)
    assert torch.equal(tensor, torch.arange(3_000_001, dtype=torch.int32))
    with pytest.raises(BufferError):
        _C.populate(DATA)


@pytest.mark.skipif(sys.platform != "linux", reason="faults are counted as Linux does")
def test_fresh_memory_is_present_at_once() -> None:
    # in a process of its own: no other thread's faults are counted
    program = """
import mmap, resource, sys
# as on the command line, where the package itself imports nothing
sys.argv = ["sharedllm"]
from sharedllm_ext import _C
size = 64 << 20
def faults(populate):
    fresh = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(fresh)
    if populate:
        _C.populate(view)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for place in range(0, size, 4096):
        view[place] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(False), faults(True))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment_of_package(), check=True
    )
    alone, populated = map(int, result.stdout.split())
    if alone < 100:
        pytest.skip("fresh memory has huge pages here")
    major, minor = platform.release().split(".")[:2]
    if (int(major), int(minor)) < (5, 14):
        pytest.skip("Linux before 5.14 has no call for it")
    assert populated < alone / 100


def test_files_are_read_without_the_compiled_module(tmp_path: Path) -> None:
    path = str(tmp_path / "shard")
    tensor = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    write_tensors(path, {}, {"keys.0": tensor}, SHARD)
    program = f"""
import sys, zlib
# as on the command line, where the package itself imports nothing
sys.argv = ["sharedllm"]
sys.modules["sharedllm_ext._C"] = None
from sharedllm_ext.model.memory_file import SHARD, MemoryFile, crc32
assert crc32 is zlib.crc32
with MemoryFile({path!r}, SHARD) as file:
    file.verify(file.names)
    (tensor,) = file.read(file.names, lambda tensor: tensor, verify=True)
print(float(tensor.double().sum()))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment_of_package()
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == float(tensor.double().sum())

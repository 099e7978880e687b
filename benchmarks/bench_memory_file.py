"""A memory's file beside its bytes: reading and writing them alone, and by this package, PyTorch and safetensors.

python benchmarks/bench_memory_file.py               # 131,072 tokens of Llama-3.1-8B's shape, M = 16: 1.07 GB
python benchmarks/bench_memory_file.py --layers 4    # 268 MB, in tensors of the same size

One thread, files in the page cache, the cases in another order each turn; medians and ranges of the process's CPU time
and of wall-clock time. Bytes written alone are brought to the disk (fsync), as `save` does; PyTorch and safetensors
leave that to the system.
"""

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from run_gpu import header

import sharedllm_ext
from sharedllm_ext import ContextMemory, SharedLLMForCausalLM
from sharedllm_ext.model.memory_file import PIECE, bytes_of
from sharedllm_ext.model.raw_bytes import crc32

HEADS, HEAD_SIZE, CHUNK = 8, 128, 1024
ALONE = {"load": "read its bytes into fresh memory", "save": "write its bytes"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, metavar="M", help="injection layers (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=131072, help="of the memory (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of each case (default %(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose names have one of these words")
    parser.add_argument("--folder", type=Path, help="for the files (default: a temporary one)")
    arguments = parser.parse_args(argv)
    if arguments.tokens % CHUNK or arguments.tokens < CHUNK:
        print(
            f"bench_memory_file: expected --tokens in whole chunks of {CHUNK}, got {arguments.tokens}", file=sys.stderr
        )
        return 2
    torch.set_num_threads(1)
    about = {**header(), "threads": "1"}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        memory = random_memory(arguments.layers, arguments.tokens)
        todo = cases(memory, Path(folder))
        words = arguments.only.split()
        todo = {name: case for name, case in todo.items() if not words or set(words) & set(name.split())}
        found = measure(todo, arguments.repeats)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{memory.nbytes:,} bytes in {2 * arguments.layers} tensors, medians of {arguments.repeats} (range)\n")
    print(table(found))
    print(json.dumps({**about, "bytes": memory.nbytes, "found": found}))
    return 0


@torch.no_grad()
def random_memory(layers: int, tokens: int) -> ContextMemory:
    """A memory of Llama-3.1-8B's shape, one slot for eight tokens, with random keys and values."""
    folder = Path(sharedllm_ext.__file__).parent / "demo_model"
    small = SharedLLMForCausalLM.from_pretrained(folder).compress(torch.zeros(1, CHUNK, dtype=torch.long))
    sizes = {"injection_layers": layers, "num_key_value_heads": HEADS, "head_dim": HEAD_SIZE, "chunk_size": CHUNK}
    # four nodes of 32 slots a chunk
    signature = {**small.signature, **sizes, "tree_depth": 3, "slots_per_node": 32, "probe": None}
    slots, generator = tokens // 8, torch.Generator().manual_seed(0)
    tensors = [torch.randn(slots, HEADS, HEAD_SIZE, generator=generator).to(torch.bfloat16) for _ in range(2 * layers)]
    return ContextMemory(tensors[:layers], tensors[layers:], [0, slots], [tokens // CHUNK], [tokens], [0], signature)


def cases(memory: ContextMemory, folder: Path) -> dict[str, Callable[[], Any]]:
    """What is measured, by name; what a case returns is freed after its time was taken."""
    path, torchs, plain, raw = (str(folder / name) for name in ("memory", "torch", "safetensors", "raw"))
    tensors = {f"{kind}.{i}": x for kind in ("keys", "values") for i, x in enumerate(getattr(memory, kind))}
    memory.save(path)
    torch.save(tensors, torchs)
    safetensors.torch.save_file(tensors, plain)
    size = memory.nbytes // len(tensors)
    head = Path(path).read_bytes()[: os.path.getsize(path) - memory.nbytes]
    room = [torch.zeros(size, dtype=torch.uint8) for _ in tensors]

    def read(fresh: bool) -> list[torch.Tensor]:
        buffers = [torch.empty(size, dtype=torch.uint8) for _ in tensors] if fresh else room
        with open(path, "rb", buffering=0) as file:
            file.seek(len(head))
            for buffer in buffers:
                data = bytes_of(buffer)
                for first in range(0, size, PIECE):
                    file.readinto(data[first : first + PIECE])  # type: ignore[attr-defined]
        return buffers

    def add(checksum: Callable[[memoryview, int], int]) -> None:
        for tensor in tensors.values():
            data, total = bytes_of(tensor), 0
            for first in range(0, len(data), PIECE):
                total = checksum(data[first : first + PIECE], total)

    def write() -> None:
        with open(raw + ".new", "wb", buffering=0) as file:
            # the system gives a file other pages in its cache if the data begin with one
            file.write(head)
            for tensor in tensors.values():
                data = bytes_of(tensor)
                for first in range(0, len(data), PIECE):
                    file.write(data[first : first + PIECE])
            os.fsync(file.fileno())
        os.replace(raw + ".new", raw)

    def touch(mapped: list[torch.Tensor]) -> list[torch.Tensor]:
        for tensor in mapped:
            tensor.view(torch.int16).view(-1)[:: 4096 // 2].max()
        return mapped

    def load(**how: bool) -> list[torch.Tensor]:
        loaded = ContextMemory.load(path, **how)
        return [*loaded.keys, *loaded.values]

    return {
        "read its bytes into the same memory": lambda: read(False),
        ALONE["load"]: lambda: read(True),
        "checksum, zlib": lambda: add(zlib.crc32),
        "checksum, ours": lambda: add(crc32),
        "load": load,
        "load, verify=False": lambda: load(verify=False),
        "load, mmap=True": lambda: load(mmap=True),
        "load, torch.load": lambda: torch.load(torchs, weights_only=True),
        "load, safetensors (maps), every page used": lambda: touch(list(safetensors.torch.load_file(plain).values())),
        ALONE["save"]: write,
        "save": lambda: memory.save(path),
        "save, torch.save": lambda: torch.save(tensors, torchs),
        "save, safetensors": lambda: safetensors.torch.save_file(tensors, plain),
    }


def measure(todo: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of CPU and by the clock of every case; the first turn is not counted."""
    found: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in todo}
    for turn in range(1 + repeats):
        # what a case takes depends on the pages that the one before it has freed
        for name, case in random.Random(turn).sample(list(todo.items()), len(todo)):
            gc.collect()
            begin = time.process_time(), time.perf_counter()
            result = case()
            end = time.process_time(), time.perf_counter()
            del result
            if turn:
                found[name]["cpu"].append(end[0] - begin[0])
                found[name]["wall"].append(end[1] - begin[1])
    return found


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Medians and ranges in ms, and CPU time beside that of the bytes alone."""
    lines = ["| | CPU, ms | clock, ms | CPU beside its bytes |", "| --- | ---: | ---: | ---: |"]
    for name, times in found.items():
        alone = ALONE.get(name.split(",")[0])
        ratio = "-"
        if alone in found:
            ratio = f"{statistics.median(times['cpu']) / statistics.median(found[alone]['cpu']):.2f}"
        cells = [
            f"{1e3 * statistics.median(x):,.0f} ({1e3 * min(x):,.0f} to {1e3 * max(x):,.0f})" for x in times.values()
        ]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

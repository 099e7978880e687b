"""One question over several documents of a memory: a decoding step by their number, of equal total length.

python benchmarks/bench_documents.py                                   # Llama-3.1-8B's shape, M = 16, 131072 tokens
python benchmarks/bench_documents.py --cpu --shape smollm2-135m --layers 8 --documents 1 4 16

Random weights and a random memory (times do not depend on their values), bfloat16 on CUDA, float32 on the CPU.
On CUDA wall-clock times with the device synchronised; on the CPU those of one core, without other programs' share.
The numbers of documents take turns, and the best of the repeats counts.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_end_to_end import DEVICE, SHAPES, built, digits, lacks_device, random_ids, seconds
from run_gpu import header

import sharedllm_ext
from sharedllm_ext import ContextMemory, SharedLLMForCausalLM

COLUMNS = ("documents", "ms a step", "beside one document", "first token, ms")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape",
        choices=[*SHAPES, "demo"],
        default="llama-3.1-8b",
        help="demo: the shipped model, with its own weights",
    )
    parser.add_argument("--layers", type=int, default=16, metavar="M", help="injection layers (default %(default)s)")
    parser.add_argument("--context", type=int, default=131072, help="tokens of all documents (default %(default)s)")
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--question", type=int, default=64, help="tokens of the question (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="decoded tokens that are timed (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of each time (default %(default)s)")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU where torch sees no CUDA device")
    arguments = parser.parse_args(argv)
    if lacks_device("bench_documents", arguments.cpu):
        return 2
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    about = header()
    # what `built` reads
    arguments.running, arguments.micro_batch = 4096, None
    with built(arguments.shape, arguments.layers, arguments) if arguments.shape != "demo" else demo() as model:
        found = measure(model, arguments)
        arguments.layers = model.config.injection_layers
    one = found[0]["step"]
    print(
        f"{arguments.shape}, M = {arguments.layers}, {arguments.context:,} tokens of documents, "
        f"{arguments.question} of question; {', '.join(about.values())}"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{' ---: |' * len(COLUMNS)}")
    for row in found:
        beside = f"{100 * (row['step'] / one - 1):+.1f} %"
        step, first = (digits(1e3 * row[name], 2) for name in ("step", "first"))
        print(f"| {row['documents']} | {step} | {beside} | {first} |")
    print(json.dumps({**about, **vars(arguments), "found": found}))
    return 0


@contextlib.contextmanager
def demo() -> Iterator[Any]:
    """The shipped demo model; none of its tokens ends an answer."""
    model = SharedLLMForCausalLM.from_pretrained(Path(sharedllm_ext.__file__).parent / "demo_model").to(DEVICE)
    model.generation_config.eos_token_id = None
    yield model


@torch.no_grad()
def measure(model: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """For each number of documents, seconds of a step and of the first token."""
    calls: dict[tuple[int, int], Callable[[], Any]] = {}
    for count in arguments.documents:
        memory = random_memory(model, count, arguments.context).with_rows([list(range(count))])
        for tokens in (1, 1 + arguments.tokens):
            calls[count, tokens] = partial(answer, model, memory, arguments, tokens)
    best = dict.fromkeys(calls, float("inf"))
    for repeat in range(1 + arguments.repeats):
        for key, call in calls.items():
            taken = seconds(call) if DEVICE == "cuda" else core_seconds(call)
            # the first time makes what all others share
            best[key] = min(best[key], taken) if repeat else best[key]
    found = []
    for count in arguments.documents:
        first, whole = best[count, 1], best[count, 1 + arguments.tokens]
        found.append({"documents": count, "step": (whole - first) / arguments.tokens, "first": first})
    return found


def core_seconds(call: Callable[[], Any]) -> float:
    begin = time.thread_time()
    call()
    return time.thread_time() - begin


def random_memory(model: Any, documents: int, tokens: int) -> ContextMemory:
    """Documents of equal length, which no model has compressed."""
    one = model.compress(random_ids(model.config.chunk_size, model.config.vocab_size, 1))
    chunks = -(-tokens // documents // model.config.chunk_size)
    shape = (documents * chunks * one.num_slots, *one.keys[0].shape[1:])
    generator = torch.Generator(DEVICE).manual_seed(2)
    tensors = [
        torch.randn(shape, dtype=one.dtype, device=DEVICE, generator=generator) for _ in range(2 * len(one.keys))
    ]
    return ContextMemory(
        keys=tensors[::2],
        values=tensors[1::2],
        cu_slots=list(range(0, shape[0] + 1, chunks * one.num_slots)),
        num_chunks=[chunks] * documents,
        num_tokens=[chunks * model.config.chunk_size] * documents,
        memory_index=list(range(documents)),
        signature=one.signature,
    )


def answer(model: Any, memory: ContextMemory, arguments: argparse.Namespace, tokens: int) -> None:
    text = random_ids(arguments.question, model.config.vocab_size, 3)
    model.generate(text, memory=memory, max_new_tokens=tokens, do_sample=False)


if __name__ == "__main__":
    sys.exit(main())

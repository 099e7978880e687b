"""A memory larger than the GPU: how fast pages come, and what a question over 10M tokens costs beside one over 128K.

python benchmarks/bench_tiers.py                        # Llama-3.1-8B's shape, M = 16, 10M tokens: 86 GB on the host
python benchmarks/bench_tiers.py --tokens 4194304 --fill-seconds 20
python benchmarks/bench_tiers.py --cpu --shape smollm2-135m --layers 8 --tokens 262144    # to try the script

Random weights, keys and values: neither times nor bytes depend on them, answers mean nothing. The memory is not
compressed here (bench_end_to_end.py measures that) but filled, and its tokens are random.
A question reads 8 passages with the 128 best chunks at hand; a resident memory of 131,072 tokens is asked in the same
way. Times are wall-clock with the device synchronised.
"""

import argparse
import contextlib
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import bench_end_to_end as whole
import torch
from run_gpu import header
from torch import Tensor

from sharedllm_ext import ContextMemory, MemoryTiers, SharedLLMForCausalLM, TieredMemory
from sharedllm_ext.model.pages import Page, PageForm
from sharedllm_ext.model.sources import Source
from sharedllm_ext.model.tiered_document import PickKeys, TieredDocument, chunk_slots

GB = 1e9
PASSAGES = 8
PROMPT = {"begin": "Read.", "passage": "\n[{rank}] ", "question": "\nQuestion: ", "answer": "\nAnswer: "}


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoded", (), {"input_ids": [ord(character) for character in text]})


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if whole.lacks_device("bench_tiers", arguments.cpu):
        return 2
    about = header() if whole.DEVICE == "cuda" else {"device": "cpu"}
    print(", ".join(about.values()))
    fields = {"micro_batch": None, "running": 4096}
    with whole.built(arguments.shape, arguments.layers, argparse.Namespace(**fields), pick=PROMPT) as model:
        results = {**bandwidths(model, arguments), **questions(model, arguments)}
    print(json.dumps({**about, **vars(arguments), **results}))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=whole.SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=16, metavar="M", help="injection layers (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=10 << 20, help="of the memory in tiers (default %(default)s)")
    parser.add_argument("--resident", type=int, default=131072, help="tokens of the other one (default %(default)s)")
    parser.add_argument("--chunks", type=int, default=128, help="that a question reads (default %(default)s)")
    parser.add_argument("--question", type=int, default=64, help="tokens of a question (default %(default)s)")
    parser.add_argument("--answer", type=int, default=64, help="decoded tokens that are timed (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=4, help="questions (default %(default)s)")
    parser.add_argument("--host-bytes", default="100GB", help="budget of the host tier (default %(default)s)")
    parser.add_argument("--folder", default="/tmp", help="for the disk tier (default %(default)s)")
    parser.add_argument(
        "--fill-seconds", type=float, default=math.inf, help="take fewer tokens if filling them would take longer"
    )
    parser.add_argument("--cpu", action="store_true", help="run on the CPU where torch sees no CUDA device")
    return parser.parse_args(argv)


def form_of(model: Any) -> PageForm:
    """Sizes of a memory of the model."""
    text_config = model.config.text_config
    heads, size = text_config.num_key_value_heads, text_config.hidden_size // text_config.num_attention_heads
    return PageForm(model.config.injection_layers, heads, size, model.dtype)


def random_page(form: PageForm, slots: int, seed: int) -> Tensor:
    generator = torch.Generator(whole.DEVICE).manual_seed(seed)
    return torch.randn(form.shape(slots), dtype=form.dtype, device=whole.DEVICE, generator=generator)


def bandwidths(model: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """GB/s at which a question's pages come from main memory and from disk."""
    form, slots, found = form_of(model), chunk_slots(model.config), {}
    on_cuda = whole.DEVICE == "cuda"
    cases = {"disk": {"host_bytes": 0, "folder": arguments.folder}}
    if on_cuda:
        cases = {"pinned": {}, "pageable": {"pin": False}, **cases}
    for name, how in cases.items():
        tiers = MemoryTiers(whole.DEVICE, page_bytes=slots * form.slot_bytes, **how)
        page = random_page(form, slots, 0)
        pages = [tiers.insert(page.clone(), form) for _ in range(arguments.chunks)]
        parts = [(one, 0, slots) for one in pages]
        nbytes = arguments.chunks * slots * form.slot_bytes
        times, started = [], []
        for _ in range(4):
            whole.synchronize()
            begin = time.perf_counter()
            lists = tiers.gather(parts, form)
            started.append(time.perf_counter() - begin)
            last = lists[0][-1], lists[1][-1]
            whole.synchronize()
            times.append(time.perf_counter() - begin)
            assert all(torch.equal(tensor[-slots:], page[-1, kind]) for kind, tensor in enumerate(last))
            del lists, last
        best = min(times[1:])
        found[f"{name}_gb_s"], found[f"{name}_ms"] = nbytes / best / GB, 1e3 * best
        found[f"{name}_host_ms"] = 1e3 * min(started[1:])
        print(
            f"{name}: {nbytes / GB:.2f} GB in {arguments.chunks} pages: {1e3 * best:.1f} ms, {nbytes / best / GB:.1f} "
            f"GB/s; the host is free after {1e3 * min(started[1:]):.1f} ms"
        )
        del pages, parts, tiers
    return found


@torch.no_grad()
def questions(model: SharedLLMForCausalLM, arguments: argparse.Namespace) -> dict[str, Any]:
    """First token and time per token over a memory in tiers, and over a resident one."""
    found: dict[str, Any] = {}
    resident = resident_memory(model, arguments.resident)
    memory = tiered_memory(model, arguments, found)
    told = memory.describe()
    print(
        f"tiered memory: {memory.num_tokens[0]:,} tokens, {memory.nbytes / GB:.1f} GB; {told['tiers']}, pick "
        f"{told['pick_bytes'] / GB:.2f} GB; filled in {found['fill_s']:.1f} s"
    )
    if whole.DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for name, one in (("resident", resident), ("tiered", memory)):
        ask = partial(answer, model, one, arguments)
        # the first one makes what all questions share
        found[f"{name}_first_question_s"] = whole.seconds(partial(ask, 0, 1))
        ask(0, 1 + arguments.answer)
        first = [whole.seconds(partial(ask, seed, 1)) for seed in range(1, 1 + arguments.repeats)]
        long = [whole.seconds(partial(ask, seed, 1 + arguments.answer)) for seed in range(1, 1 + arguments.repeats)]
        found[f"{name}_first_token_s"] = statistics.median(first)
        # with the graph of a decoding step, which each new memory needs
        found[f"{name}_per_token_ms"] = 1e3 * (statistics.median(long) - statistics.median(first)) / arguments.answer
        more = whole.seconds(partial(ask, 1, 1 + 3 * arguments.answer))
        found[f"{name}_per_further_token_ms"] = 1e3 * (more - min(long)) / (2 * arguments.answer)
        found[f"{name}_first_tokens_s"], found[f"{name}_long_s"] = first, long
        print(
            f"{name}: first question {found[f'{name}_first_question_s']:.3f} s, then first token "
            f"{found[f'{name}_first_token_s']:.3f} s, {found[f'{name}_per_token_ms']:.2f} ms a token for "
            f"{arguments.answer}, {found[f'{name}_per_further_token_ms']:.2f} ms a further one"
        )
    # its parts
    question = asked(model, arguments, 3)
    parts: dict[str, Callable[[], Any]] = {
        "pick": lambda: model.find_passages(question, memory=memory),
        "pick and bring": lambda: model.memory_for(memory, question, chunks=arguments.chunks),
    }
    for name, call in parts.items():
        found[name] = min(whole.seconds(call) for _ in range(3))
    near = model.memory_for(memory, question, chunks=arguments.chunks)
    passages = model.find_passages(question, memory=memory)
    ids = memory.sources[0].token_ids
    prompt = model.passage_prompt(Letters(), ids.long().to(whole.DEVICE), passages[0], "q" * arguments.question)
    found["prefill, chunks there"] = min(
        whole.seconds(lambda: model.generate(prompt, memory=near, max_new_tokens=1)) for _ in range(3)
    )
    found["bring and prefill"] = min(
        whole.seconds(lambda: model.generate(prompt, memory=memory.select_chunks(near.chunks), max_new_tokens=1))
        for _ in range(3)
    )
    for name in (*parts, "prefill, chunks there", "bring and prefill"):
        print(f"{name}: {1e3 * found[name]:.1f} ms")
    if whole.DEVICE == "cuda":
        found["peak_gb"] = torch.cuda.max_memory_allocated() / GB
    found["rss_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB
    return found


def asked(model: Any, arguments: argparse.Namespace, seed: int) -> Tensor:
    return whole.random_ids(arguments.question, model.config.vocab_size, 100 + seed)


def answer(model: Any, memory: Any, arguments: argparse.Namespace, seed: int, tokens: int) -> None:
    model.generate(
        asked(model, arguments, seed),
        passages=PASSAGES,
        memory=memory,
        tokenizer=Letters(),
        max_new_tokens=tokens,
        do_sample=False,
    )


def resident_memory(model: Any, tokens: int) -> ContextMemory:
    ids = whole.random_ids(tokens, model.config.vocab_size, 5)
    memory: ContextMemory = model.compress(ids).with_sources([Source.of_ids(ids[0])])
    return memory


def tiered_memory(model: Any, arguments: argparse.Namespace, found: dict[str, Any]) -> TieredMemory:
    form, slots = form_of(model), chunk_slots(model.config)
    tiers = MemoryTiers(
        whole.DEVICE, host_bytes=arguments.host_bytes, folder=arguments.folder, page_bytes=slots * form.slot_bytes
    )
    bases = [random_page(form, slots, seed) for seed in range(8)]
    chunks = arguments.tokens // model.config.chunk_size
    begin, pages = time.perf_counter(), []
    for number in range(chunks):
        pages.append(filled_page(tiers, bases[number % len(bases)], form))
        if number == 127:
            whole.synchronize()
            spent = time.perf_counter() - begin
            print(f"128 pages take {spent:.2f} s")
            chunks = int(min(chunks, max(256, arguments.fill_seconds / spent * 128)))
        if number + 1 >= chunks:
            break
    whole.synchronize()
    found["fill_s"], found["tokens_held"] = time.perf_counter() - begin, chunks * model.config.chunk_size
    tokens, total = chunks * model.config.chunk_size, chunks * slots
    ids = whole.random_ids(tokens, model.config.vocab_size, 6)
    keys = []
    for layer in model.pick.layers:
        generator = torch.Generator(whole.DEVICE).manual_seed(layer)
        shape = (total, form.heads, form.size)
        keys.append(torch.randn(shape, dtype=form.dtype, device=whole.DEVICE, generator=generator))
    document = TieredDocument(tuple(pages), tokens, total, None, Source.of_ids(ids[0]), PickKeys(keys))
    return TieredMemory([document], [0], model.memory_signature(), form, slots, tiers)


def filled_page(tiers: MemoryTiers, base: Tensor, form: PageForm) -> Page:
    return tiers.insert(base.clone(), form)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())

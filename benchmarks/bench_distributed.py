"""Compression of one context by all processes beside one process; the target on two GPUs is 1.9 times as fast.

    torchrun --nproc-per-node 2 benchmarks/bench_distributed.py                        # 1M tokens, Llama-3.1-8B's shape
    torchrun --nproc-per-node 2 benchmarks/bench_distributed.py --shape tiny --tokens 4096    # a try on CPUs

It has been tried with gloo on CPUs, and not yet been run on several GPUs.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.distributed import Ranks, compress, join

SHAPES = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}


def seconds_of(ranks: Ranks, work: Callable[[], object], repeats: int) -> float:
    """Median of the slowest process's time, after one call to warm up; all begin together."""
    times = []
    for _ in range(repeats + 1):
        ranks.agree("benchmark")
        begin = time.perf_counter()
        work()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        own = time.perf_counter() - begin
        times.append(max(float(text) for text in ranks.exchange(repr(own).encode())))
    return statistics.median(times[1:])


def main() -> None:
    """Measure, and print a table in the first process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--layers", type=int, default=16, help="injected layers M (default: 16; tiny: 2)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    with join() as ranks:
        dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        config = LlamaConfig(**SHAPES[args.shape], max_position_embeddings=131072)
        layers = args.layers if args.shape != "tiny" else 2
        with torch.device(ranks.device):
            base = LlamaForCausalLM(config).to(dtype)
        model = SharedLLMForCausalLM.from_base(base, injection_layers=layers).eval()
        context = torch.randint(3, config.vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(0))
        context = context.to(ranks.device)
        # alone: the first process works, the others wait
        cases: dict[str, Callable[[], object]] = {
            "one process": lambda: model.compress(context) if ranks.rank == 0 else None,
            "all, each keeps its slots": lambda: compress(model, context, ranks=ranks, gather="none"),
            "all, gathered in the first": lambda: compress(model, context, ranks=ranks, gather="first"),
            "all, gathered in all": lambda: compress(model, context, ranks=ranks, gather="all"),
        }
        found = {name: seconds_of(ranks, work, args.repeats) for name, work in cases.items()}
        if ranks.rank == 0:
            one = found["one process"]
            where = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU, gloo"
            lines = [
                f"{ranks.size} x {where}, torch {torch.__version__}: {args.shape}, M = {layers}, "
                f"{args.tokens:,} tokens",
                "",
                "| compression | s | x one process |",
                "| --- | ---: | ---: |",
                *(f"| {name} | {seconds:.4g} | {one / seconds:.2f} |" for name, seconds in found.items()),
            ]
            sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

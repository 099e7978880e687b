"""Several GPUs on paper: time to compress and gather, state of a GPU, time of a token, from figures measured on one.

Nothing here has been measured on several GPUs; every input is named with where it comes from.

    python benchmarks/several_gpus.py
"""

import argparse

#: Seconds to the first token at 131072 and 1048576 tokens, Llama-3.1-8B's shape, bfloat16, by injection layers M; H100,
#: commit 75ab3b28f711, 2026-11-26, in RESULTS.md.
FIRST_TOKEN = {16: {131072: 1.464, 1048576: 10.97}, 4: {131072: 0.316, 1048576: 1.804}}
#: Bytes of the memory for each context token and injected layer: 1/8 slot, 8 heads of 128, keys and values, bfloat16.
BYTES = 8 * 128 * 2 * 2 / 8
#: Seconds of a decoding step over 131072 tokens by its CUDA graph, H200, commit e6eb631, 2026-11-30.
STEP = {16: 5.23e-3, 4: 4.72e-3}
#: Read rate of the memory while decoding in bytes a second: 537 MB of a layer in 136.9 us, H200, the same run.
READ = 131072 * 8 * 128 * 2 * 2 / 136.9e-6
#: Bytes of weights in bfloat16, and device memory that is left for state.
WEIGHTS, ROOM = 16.1e9, 141e9 - 16.1e9 - 5.1e9
# Assumed, not measured:
#: Bytes a second that one GPU receives: NVLink of an H200, 450 GB/s a direction, inside a node of 8.
NVLINK = 450e9
#: Between nodes: one 400 Gbit/s port a GPU.
NETWORK = 50e9
#: Seconds of one message of a few kilobytes to all GPUs: inside a node, and between nodes.
MESSAGE = {True: 20e-6, False: 40e-6}
GPUS, TOKENS = (1, 2, 4, 8, 16, 32, 64), (1 << 20, 10 << 20, 100_000_000)


def compress_seconds(layers: int, tokens: float) -> float:
    """Time of one GPU for so many tokens: linear beyond 131072, with the slope between the two measured lengths."""
    low, high = sorted(FIRST_TOKEN[layers])
    slope = (FIRST_TOKEN[layers][high] - FIRST_TOKEN[layers][low]) / (high - low)
    return slope * tokens


def row(layers: int, tokens: int, gpus: int) -> dict[str, float]:
    """Everything of one case: seconds and bytes."""
    state = tokens * BYTES * layers
    inside = gpus <= 8
    rate = NVLINK if inside else NETWORK
    # the step as measured, without its memory of 131072 tokens, which is read at the measured rate here
    rest = STEP[layers] - 131072 * BYTES * layers / READ
    messages = 0.0 if gpus == 1 else layers * MESSAGE[inside]
    return {
        "compress": compress_seconds(layers, tokens / gpus),
        "gather": state * (gpus - 1) / gpus / rate,
        "state": state / gpus,
        "whole": state,
        "token": rest + state / gpus / READ + messages,
        "token_whole": rest + state / READ,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, choices=sorted(FIRST_TOKEN), nargs="+", default=sorted(FIRST_TOKEN))
    args = parser.parse_args()
    lines = [
        "On paper, from figures of one GPU; Llama-3.1-8B's shape, bfloat16, chunks of 1024 tokens, 128 slots each.",
        f"Measured: first token {FIRST_TOKEN} s; step {STEP} s at 131072 tokens; memory at {READ / 1e12:.2f} TB/s.",
        f"Assumed: {NVLINK / 1e9:.0f} GB/s received inside a node of 8 GPUs, {NETWORK / 1e9:.0f} GB/s between nodes; "
        f"a message to all {MESSAGE[True] * 1e6:.0f} us inside, {MESSAGE[False] * 1e6:.0f} us between nodes,",
        "one for each injected layer and token; compression linear in tokens, no time for loading text; a step over a",
        "sharded memory by the CUDA graph's time, which the package does not have for it today.",
        "'-': does not fit beside the weights.",
        "",
        "| M | tokens | GPUs | compress, s | gather to all, s | state a GPU, GB: sharded | whole "
        "| token, ms: sharded | whole |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for layers in args.layers:
        for tokens in TOKENS:
            for gpus in GPUS:
                case = row(layers, tokens, gpus)
                shard, fits = case["state"] <= ROOM, case["whole"] <= ROOM
                cells = [
                    f"{case['compress']:.3g}",
                    f"{case['gather']:.3g}" if fits else "-",
                    f"{case['state'] / 1e9:.3g}" if shard else "-",
                    f"{case['whole'] / 1e9:.3g}" if fits else "-",
                    f"{case['token'] * 1e3:.2f}" if shard else "-",
                    f"{case['token_whole'] * 1e3:.2f}" if fits else "-",
                ]
                lines.append(f"| {layers} | {tokens:,} | {gpus} | {' | '.join(cells)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

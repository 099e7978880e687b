"""Every CUDA operator and path once, at small hostile shapes: what compute-sanitizer runs (see ``sanitize.sh``).

python tests/sanitize.py [--list] [--part I/N] [NAME ...]

Inputs are made on the CPU, so that the tools see little else than this package's kernels. Prints the number of calls
last; an operator without a CUDA kernel is left out and named.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sharedllm_ext import ops
from sharedllm_ext._library import cuda_kernels

DEVICE = torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclasses.dataclass(frozen=True)
class Call:
    """Operators that the call needs a kernel of, and what returns the call with its inputs on the device."""

    operators: tuple[str, ...]
    prepare: Callable[[], Callable[[], object]]


def missing(name: str) -> str | None:
    """Why a call cannot be made here."""
    plain = set(CALLS[name].operators) - cuda_kernels()
    return f"the CUDA library has no kernel of {', '.join(sorted(plain))}" if plain else None


def noise(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype).to(DEVICE)


def integers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(DEVICE)


def cumulative(counts: list[int]) -> Tensor:
    return integers([0, *itertools.accumulate(counts)])


def tables(rows: int, half: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(rows).unsqueeze(1) * torch.logspace(0, -4, half)
    return angle.cos().to(DEVICE), angle.sin().to(DEVICE)


def attention(
    lengths: list[int],
    ranges: list[tuple[int, int]],
    heads: tuple[int, int],
    size: int,
    dtype: torch.dtype,
    path: str | None,
    backward: tuple[bool, ...] = (),
    by_copy_engine: bool = False,
) -> Callable[[], object]:
    """Forward, and backward with and without gradients of k and v, each with and without a gradient of lse."""
    # the kernel for short memories, which stores results by the copy engine, is for all columns that turn
    half = size // 2 if by_copy_engine else size // 4 if size % 4 == 0 else 0
    slots = max([end for _, end in ranges], default=0) + 3
    q, k, v = (
        noise(rows, count, size, dtype=dtype)
        for rows, count in ((sum(lengths), heads[0]), (slots, heads[1]), (slots, heads[1]))
    )
    rest = [
        cumulative(lengths),
        integers(ranges).view(-1, 2),
        integers([i % 8 + 1 for i in range(len(lengths))]),
        *tables(9, half),
        size**-0.5,
    ]
    grad_out, grad_lse = noise(*q.shape, dtype=dtype), noise(*q.shape[:2], dtype=FP32)

    def run() -> None:
        with ops.injected_attention_path(path or "auto"):
            out, lse = torch.ops.sharedllm.injected_attention(q, k, v, *rest)
        if by_copy_engine:
            # initcheck does not count what it stores
            with ops.injected_attention_path("portable"):
                out, lse = torch.ops.sharedllm.injected_attention(q, k, v, *rest)
        with ops.injected_attention_path(path or "auto"):
            for need_grad_kv in backward:
                for grad in (None, grad_lse):
                    torch.ops.sharedllm.injected_attention_backward(
                        grad_out, grad, q, k, v, out, lse, *rest, need_grad_kv
                    )

    return run


def attention_8bit(rows: int, queries: int, slots: int, size: int, dtype: torch.dtype) -> Callable[[], object]:
    """Quantisation, and attention of few queries (codes read directly) or many (codes restored first)."""
    memory = [noise(slots + 3, 2, size, dtype=dtype) for _ in range(2)]
    q = noise(rows * queries, 8, size, dtype=dtype)
    ranges = integers([[7 * row, slots - 67 * (row % 2)] for row in range(rows)])
    rest = [cumulative([queries] * rows), ranges, integers([row % 8 for row in range(rows)]), *tables(9, size // 4)]

    def run() -> None:
        (k, k_scale), (v, v_scale) = map(ops.quantize_memory, memory)
        ops.injected_attention_8bit(q, k, v, k_scale, v_scale, *rest, scale=size**-0.5)

    return run


def compression(size: int, rotary: int, dtype: torch.dtype, with_q: bool, backward: bool) -> Callable[[], object]:
    """Some slots unused, tokens and slots no multiple of a block."""
    tokens, slots = 333, 77
    generator = torch.Generator().manual_seed(1)
    keep = torch.randperm(tokens, generator=generator)[:slots]
    keep[::5] = -1
    positions = integers([i % 50 for i in range(tokens)])
    at = integers([i % 60 for i in range(slots)])
    q, k, v = noise(tokens, 8, size, dtype=dtype), *(noise(tokens, 2, size, dtype=dtype) for _ in range(2))
    memory = [noise(slots, 2, size, dtype=dtype) for _ in range(2)]
    cos, sin = tables(64, rotary // 2)
    index = (positions if with_q else None, positions if with_q else None, keep.to(DEVICE), at)

    def run() -> None:
        if not backward:
            ops.chunk_compression(q if with_q else None, k, v, cos, sin, *index)
            return
        grads = (q, k) if with_q else (None, None)
        ops.chunk_compression_backward(*grads, *memory, cos, sin, *index, tokens)

    return run


def node_vectors(
    heads: tuple[int, int], size: int, dtype: torch.dtype, backward: bool, more: int
) -> Callable[[], object]:
    """Nodes of many lengths, overlapping, one of them empty; tokens in no node."""
    spans = [(0, 512), (512, 129), (100, 64), (3, 1), (640, 0), (1, 257), (600, 41), *((i, 512) for i in range(more))]
    q, k, v = (noise(len(spans), heads[0], size, dtype=dtype), *(noise(700, heads[1], size, dtype=dtype) for _ in "kv"))
    arguments = (q, k, v, integers(spans), *tables(512, size // 2))
    if backward:
        return partial(torch.ops.sharedllm.node_vectors_backward, q.flip(0), *arguments, size**-0.5)
    return partial(ops.node_vectors, *arguments, scale=size**-0.5)


def tree_node_vectors(heads: tuple[int, int], size: int, levels: int, dtype: torch.dtype) -> Callable[[], object]:
    """Roots of many lengths, some too short for their levels, one of them empty."""
    spans = [(0, 512), (512, 129), (100, 3), (3, 1), (640, 0), (600, 41)]
    q = noise(len(spans), 2**levels, heads[0], size, dtype=dtype)
    k, v = (noise(641, heads[1], size, dtype=dtype) for _ in "kv")
    return partial(
        ops.tree_node_vectors, q, k, v, integers(spans), *tables(256, size // 2), levels=levels, scale=size**-0.5
    )


def topk(sizes: list[int], d: int, k: int, dtype: torch.dtype, masked: bool) -> Callable[[], object]:
    """Groups of these sizes."""
    rows = sum(sizes)
    valid = (torch.arange(rows) % 3 > 0).to(DEVICE) if masked else None
    cu_groups, group_query = cumulative(sizes), integers([i % 2 for i in range(len(sizes))])
    arguments = (noise(2, d, dtype=dtype), noise(rows, d, dtype=dtype), cu_groups, group_query, k, valid)
    return lambda: ops.topk_nodes(*arguments)


def tree(chunks: int, noisy: bool) -> Callable[[], object]:
    """Three levels and the layout; the last chunk holds a single token."""
    lengths = [*([100, 33, 8, 64] * chunks)[: chunks - 1], 1]
    ends = torch.tensor(lengths).cumsum(0)
    spans = torch.stack((ends - torch.tensor(lengths), torch.tensor(lengths)), 1).to(DEVICE)
    offset = noise(chunks, dtype=FP32) if noisy else None
    choice = integers([i % 2 for i in range(chunks)]) if noisy else None
    chunk_index, tokens = integers(list(range(chunks))), sum(lengths)

    def run() -> None:
        node, retained = spans, []
        for _ in range(2):
            node, other = ops.context_tree_select(ops.context_tree_split(node, offset), choice)
            retained.append(other)
        leaves = ops.context_tree_split(node, None)
        nodes = torch.stack((leaves[:, 0], leaves[:, 1], *reversed(retained)), 1)
        ops.context_tree_layout(nodes, chunk_index, 4, tokens, chunks * 16 + 3)

    return run


def decode_step(rows: int, heads: tuple[int, int], size: int, dtype: torch.dtype) -> Callable[[], object]:
    """One layer on one new token a row, each kernel beginning while the one in front still runs; one cache is full."""
    inner, capacity = heads[0] * size + size % 2, 70
    x = noise(rows, inner, dtype=dtype)
    matrices = [noise(n * size, inner, dtype=dtype) for n in (heads[0], heads[1], heads[1])]
    biases = [noise(n * size, dtype=dtype) for n in (heads[0], heads[1], heads[1])]
    back, gate, up = noise(inner, heads[0] * size, dtype=dtype), *(noise(333, inner, dtype=dtype) for _ in range(2))
    keys, values = (noise(rows, capacity, heads[1], size, dtype=dtype) for _ in range(2))
    length = integers([capacity if row == 1 else 7 * row for row in range(rows)])
    first = integers([row % 4 for row in range(rows)])
    angles, norm, head_norm = tables(capacity, size // 2), noise(inner, dtype=dtype), noise(size, dtype=dtype)
    batch = cumulative([1] * rows), integers([0] * rows)
    early: dict[str, Any] = {"overlap": True, "prefetch": back, "prefetch_bytes": back.nbytes}

    def run() -> None:
        qkv = ops.decode_linear(x, matrices, biases, norm_weight=norm, eps=1e-5, **early)
        q, slots = ops.decode_append(
            qkv, keys, values, length, first, *angles, q_norm=head_norm, k_norm=head_norm, eps=1e-5, window=50, **early
        )
        flat = (cache.flatten(0, 1) for cache in (keys, values))
        out, _ = ops.injected_attention(q, *flat, batch[0], slots, batch[1], *angles, scale=size**-0.5)
        hidden = ops.decode_linear(out.flatten(1), [back], residual=x, overlap=True)
        ops.decode_linear(hidden, [gate, up], [None, gate[:, 0].contiguous()], norm_weight=norm, gated=True, **early)

    return run


def decode_linear_fp8(
    rows: int, inner: int, outputs: tuple[int, int], dtype: torch.dtype, odd: bool
) -> Callable[[], object]:
    """The fused linear with weights in 8 bits, with everything around it; ``odd``: rows that are not aligned."""
    x, norm = noise(rows, inner, dtype=dtype), noise(inner, dtype=dtype)
    pairs = [ops.quantize_rows_fp8(noise(n, inner + odd, dtype=dtype)) for n in outputs]
    codes, scales = [c[:, odd:] for c, _ in pairs], [scale for _, scale in pairs]
    biases = [noise(outputs[0], dtype=dtype), None]
    residual = noise(rows, sum(outputs), dtype=dtype)
    early: dict[str, Any] = {"overlap": True, "prefetch": pairs[0][0], "prefetch_bytes": pairs[0][0].nbytes}

    def run() -> None:
        ops.decode_linear_fp8(x, codes, scales, biases, norm_weight=norm, eps=1e-5, residual=residual, **early)
        ops.decode_linear_fp8(x, codes[:1] * 2, scales[:1] * 2, biases, norm_weight=norm, gated=True, **early)

    return run


def fused_layer(rows: int, width: int, dtype: torch.dtype) -> Callable[[], object]:
    """Element-wise work around a layer's products, with and without 8-bit rows; inputs are halves of longer rows."""
    x, y = noise(rows, 2 * width, dtype=dtype).split(width, 1)
    weight = noise(width, dtype=dtype)

    def run() -> None:
        ops.silu_product(x, y)
        ops.silu_product_fp8(x, y)
        ops.quantize_rows_fp8(x)
        for norm in (ops.rms_norm, ops.rms_norm_fp8):
            norm(x, weight, 1e-5)
        for sum_and_norm in (ops.add_rms_norm, ops.add_rms_norm_fp8):
            sum_and_norm(x, y, weight, 1e-5)

    return run


# a ragged batch whose rows share slots; one row has no slots, one no queries
RAGGED = ([70, 1, 0, 130, 5], [(0, 150), (20, 21), (3, 9), (100, 231), (40, 40)])
FEW = ([1, 2, 0, 4], [(0, 3001), (7, 7), (0, 5), (2900, 3100)])
# so long that the buffers in shared memory are filled again and again: many steps to a tile, many blocks to a worker
LONG = ([70, 1, 33], [(3, 700), (0, 500), (5, 5)])
MANY = ([1, 2] * 8, [(row, 4000 + row) for row in range(16)])
TREE = ("context_tree_split", "context_tree_select", "context_tree_layout")

CALLS: dict[str, Call] = {}


def add(name: str, operators: tuple[str, ...], prepare: Callable[[], Callable[[], object]]) -> None:
    assert name not in CALLS, name
    CALLS[name] = Call(operators, prepare)


def add_attention(
    name: str,
    batch: Any,
    heads: Any,
    size: int,
    dtype: Any,
    path: str | None,
    *backward: bool,
    by_copy_engine: bool = False,
) -> None:
    operators = ("injected_attention", *(("injected_attention_backward",) if backward else ()))
    full = f"injected_attention {name}, {str(dtype)[6:]}, {heads[0]}/{heads[1]} heads of {size}"
    add(full, operators, partial(attention, *batch, heads, size, dtype, path, backward, by_copy_engine))


for _dtype in (BF16, FP16):
    for _size in (64, 96, 128, 256):
        add_attention("ragged, both backwards", RAGGED, (4, 1), _size, _dtype, None, True, False)
add_attention("ragged, both backwards", RAGGED, (7, 1), 128, BF16, None, True, False)
add_attention("one row", ([257], [(1, 386)]), (2, 2), 128, BF16, None, True)
for _size in (64, 128, 256):
    add_attention("sm90", RAGGED, (4, 1), _size, BF16, "sm90")
for _size in (64, 96, 128, 256):
    add_attention("long", LONG, (8, 1), _size, BF16, None, True, False)
    add_attention("portable, long", ([40, 7], [(0, 330), (20, 300)]), (4, 1), _size, FP16, "portable", _size % 128 > 0)
    add_attention("decode, long", MANY, (8, 2), _size, FP16, "decode")
# more tiles than multiprocessors
add_attention("many tiles", ([600, 1, 33], [(3, 300), (0, 400), (5, 5)]), (32, 4), 128, BF16, None, False)
# four rounds of tiles and as many slots as chained tiles take (on 132 multiprocessors), whoever loads their queries
add_attention("tiles in a chain", ([2107], [(1, 4300)]), (32, 8), 128, BF16, None)
add_attention(
    "tiles in a chain, short", ([2107], [(1, 200)]), (32, 8), 128, BF16, None, True, False, by_copy_engine=True
)
add_attention(
    "tiles in a chain, short", ([3700], [(1, 140)]), (28, 4), 64, FP16, None, True, False, by_copy_engine=True
)
add_attention("many tiles, short", ([2107], [(1, 200)]), (32, 8), 128, BF16, None)
for _size in (64, 96, 128, 256):
    add_attention("portable", RAGGED, (4, 1), _size, BF16, "portable", True, False)
    add_attention("decode, slots in parts", FEW, (8, 2), _size, BF16, "decode")
add_attention("portable", RAGGED, (4, 1), 128, FP16, "portable")
add_attention("generic", RAGGED, (4, 2), 128, FP32, None, True, False)
add_attention("few queries", FEW, (8, 2), 128, BF16, None, True, False)
add_attention("few queries", FEW, (7, 1), 64, FP16, None)
add_attention("few queries", ([16], [(5, 4100)]), (4, 4), 128, BF16, None)
# from 32 MB on, parts are merged as they come
add_attention("one query, long memory", ([1], [(5, 9000)]), (32, 8), 128, BF16, None)
add_attention("few queries", FEW, (4, 2), 48, FP32, None, True, False)
add_attention("generic", ([33, 2], [(0, 70), (1, 99)]), (4, 2), 33, FP32, None, True, False)
add_attention("generic", ([33, 2], [(0, 70), (1, 99)]), (4, 2), 80, FP32, None, True, False)
# by the kernel of the next larger head size
for _size in (40, 80, 100, 112, 160):
    add_attention("between sizes", RAGGED, (4, 1), _size, BF16, None, True, False)
    add_attention("between sizes, long", LONG, (8, 1), _size, FP16, None, True)
    add_attention("between sizes, few queries", FEW, (8, 2), _size, BF16, None)
    add_attention("between sizes, portable", RAGGED, (4, 1), _size, FP16, "portable", True, False)
add_attention("between sizes, tiles in a chain", ([2107], [(1, 1300)]), (32, 8), 112, BF16, None)
add_attention("generic", ([33, 2], [(0, 70), (1, 99)]), (4, 2), 256, FP32, None, True, False)
add_attention("no slots", ([3], [(0, 0)]), (4, 2), 128, BF16, None, True, False)

for _size, _rows, _queries, _slots, _dtype in (
    (64, 2, 1, 200, FP16),
    (96, 2, 2, 200, BF16),
    (128, 2, 1, 200, BF16),
    (128, 2, 40, 200, BF16),
    (256, 2, 3, 200, BF16),
    (80, 2, 2, 200, FP16),
    (40, 2, 2, 200, BF16),
    (112, 16, 1, 4000, BF16),
    (64, 16, 2, 4000, BF16),
    (96, 16, 1, 4000, FP16),
    (128, 16, 4, 4000, BF16),
    (256, 16, 1, 4000, BF16),
    (128, 1, 1, 66000, BF16),
):
    _name = f"injected_attention_8bit {_rows} x {_queries}, {_slots} slots, {str(_dtype)[6:]}, heads of {_size}"
    _call = partial(attention_8bit, _rows, _queries, _slots, _size, _dtype)
    add(_name, ("injected_attention_8bit", "quantize_memory"), _call)
for _backward in (False, True):
    _operator = "chunk_compression_backward" if _backward else "chunk_compression"
    for _size, _rotary, _dtype in ((128, 128, BF16), (64, 32, FP16), (33, 10, FP32), (80, 80, BF16)):
        for _with_q in (True, False):
            _name = f"{_operator} {str(_dtype)[6:]}, heads of {_size}, {'all' if _with_q else 'memory alone'}"
            add(_name, (_operator,), partial(compression, _size, _rotary, _dtype, _with_q, _backward))
for _heads, _size, _dtype, _all_levels in (
    ((8, 2), 128, BF16, (1, 2, 4)),
    ((4, 2), 64, FP16, (2,)),
    ((7, 1), 24, FP32, (4,)),
    ((4, 4), 256, BF16, (2,)),
    ((14, 2), 96, BF16, (4,)),
):
    for _operator in ("node_vectors", "node_vectors_backward"):
        _name = f"{_operator} {str(_dtype)[6:]}, {_heads[0]}/{_heads[1]} heads of {_size}"
        add(_name, (_operator,), partial(node_vectors, _heads, _size, _dtype, _operator == "node_vectors_backward", 0))
    for _levels in _all_levels:
        _name = f"tree_node_vectors {_levels} levels, {str(_dtype)[6:]}, {_heads[0]}/{_heads[1]} heads of {_size}"
        add(_name, ("tree_node_vectors",), partial(tree_node_vectors, _heads, _size, _levels, _dtype))
add("node_vectors many tiles", ("node_vectors",), partial(node_vectors, (8, 2), 128, BF16, False, 66))
for _sizes, _d, _k, _dtype, _masked in (
    ([2] * 33, 256, 2, BF16, True),
    ([3000, 0, 5], 64, 32, FP16, False),
    ([700, 1500], 33, 700, FP32, True),
):
    _name = f"topk_nodes {str(_dtype)[6:]}, {_k} of {max(_sizes)}"
    add(_name, ("topk_nodes",), partial(topk, _sizes, _d, _k, _dtype, _masked))
for _chunks, _noisy in ((1, False), (7, True), (300, False)):
    add(f"context_tree {_chunks} chunks{', noise' if _noisy else ''}", TREE, partial(tree, _chunks, _noisy))
for _rows, _heads, _size, _dtype in (
    (1, (8, 2), 128, BF16),
    (2, (7, 1), 64, FP16),
    (9, (4, 2), 96, BF16),
    (4, (4, 4), 33, FP32),
    (3, (2, 1), 33, BF16),
):
    _name = f"decode_step {_rows} rows, {str(_dtype)[6:]}, {_heads[0]}/{_heads[1]} heads of {_size}"
    _operators = ("decode_linear", "decode_append", "injected_attention")
    add(_name, _operators, partial(decode_step, _rows, _heads, _size, _dtype))
for _rows, _inner, _outputs, _dtype, _odd in (
    (1, 4096, (1000, 24), BF16, False),
    (3, 640, (133, 9), FP16, False),
    (8, 2064, (40, 300), BF16, False),
    (9, 33, (5, 3), BF16, False),
    (4, 1040, (20, 4), FP16, True),
):
    _name = f"decode_linear_fp8 {_rows} x {_inner} to {_outputs}, {str(_dtype)[6:]}{', odd' if _odd else ''}"
    add(_name, ("decode_linear_fp8",), partial(decode_linear_fp8, _rows, _inner, _outputs, _dtype, _odd))
_operators = (
    *("silu_product", "silu_product_fp8", "quantize_rows_fp8", "rms_norm", "rms_norm_fp8", "add_rms_norm"),
    "add_rms_norm_fp8",
)
for _rows, _width, _dtype in ((37, 64, BF16), (5, 1032, FP16), (3, 14336, BF16), (9, 33, FP32), (2, 20000, BF16)):
    add(f"fused_layer {_rows} x {_width}, {str(_dtype)[6:]}", _operators, partial(fused_layer, _rows, _width, _dtype))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="calls whose name begins so; default: all")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="of these every N-th call, from the I-th on")
    arguments = parser.parse_args(argv)
    first, parts = map(int, arguments.part.split("/"))
    names = [name for name in CALLS if not arguments.names or name.startswith(tuple(arguments.names))]
    names = names[first::parts]
    if arguments.list:
        print("\n".join(names))
        return 0
    if not names or not torch.cuda.is_available():
        what = "a CUDA device, got none that torch sees" if names else "names of calls (--list), got none that exists"
        print(f"sanitize: expected {what}", file=sys.stderr)
        return 2
    made, left_out, failed = 0, dict[str, list[str]](), 0
    for name in names:
        reason = missing(name)
        if reason:
            left_out.setdefault(reason, []).append(name)
            continue
        # a tool's findings follow the name of their call
        print(f"call: {name}", flush=True)
        try:
            CALLS[name].prepare()()
            torch.cuda.synchronize()
            made += 1
        except Exception as error:  # the next call may show more, unless the device is lost
            print(f"failed: {name}: {type(error).__name__}: {error}", flush=True)
            failed += 1
    for reason, skipped in left_out.items():
        print(f"left out ({reason}): {len(skipped)} calls")
    print(f"calls made: {made}, left out: {len(names) - made - failed}, failed: {failed}")
    return 1 if failed or not made else 0


if __name__ == "__main__":
    sys.exit(main())

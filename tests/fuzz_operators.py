"""Seeded calls of every operator on the CPU through ``torch.ops.sharedllm``, most of them wrong in some way.

python tests/fuzz_operators.py [--calls N] [--seed N] [--operator NAME ...]

A right call must give what the reference gives, in whatever layout its tensors lie. A wrong one must return tensors of
the shapes that its fake promises, or raise one line that says what was expected and what came; it must end within
:data:`SLOW` seconds of processor time. ``tests/fuzz_operators.sh`` runs this under AddressSanitizer and
UndefinedBehaviorSanitizer.
Every call has a seed of its own, so ``--seed S --calls 1`` repeats the one that failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import math
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sharedllm_ext import ops, reference
from sharedllm_ext.reference.memory_quantization import quantize_memory

assert ops  # importing it registers the operators that run as plain PyTorch

SLOW = 20.0
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
PLAIN_DTYPES = (*KERNEL_DTYPES, torch.float16, torch.float64)
OTHER_DTYPES = (
    *PLAIN_DTYPES,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
)
LARGEST, SMALLEST = 2**63 - 1, -(2**63)
#: Sizes of this order are refused by every allocator, so that no call takes the machine's memory.
INTS = (SMALLEST, -1, 0, 1, 2, 3, 21, 63, 2**45, 2**62, LARGEST)
INDICES = (SMALLEST, -2, -1, 0, 1, 7, 2**31, 2**53 + 1, 2**62, LARGEST - 1, LARGEST)
FLOATS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -3.0, 1e300, -1e300, 1e-300, 5e-324, 3.4e38, 3.5e38)
#: Written to in place: PyTorch itself refuses some layouts of these.
WRITTEN = ("keys", "values")
Arguments = dict[str, Any]


def floats(rng: random.Random, *shape: int, dtype: torch.dtype) -> Tensor:
    """Normally distributed numbers."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return torch.randn(shape, generator=generator).to(dtype)


def integers(rng: random.Random, count: int, low: int, high: int) -> Tensor:
    """Whole numbers, ``low <= x < high``."""
    return torch.tensor([rng.randrange(low, high) for _ in range(count)], dtype=torch.int64)


def cumulative(rng: random.Random, count: int, total: int) -> Tensor:
    """``count`` sizes that add up to ``total``, cumulative."""
    if count == 0:
        return torch.zeros(1, dtype=torch.int64)
    cuts = sorted(rng.randint(0, total) for _ in range(count - 1))
    return torch.tensor([0, *cuts, total], dtype=torch.int64)


def tables(rng: random.Random, rows: int, size: int) -> Arguments:
    """Cosine and sine of a rotary embedding of up to ``size`` elements."""
    half = rng.choice([size // 2, size // 2, size // 4, 0])
    angles = torch.arange(rows).unsqueeze(1) * torch.rand(half, generator=torch.Generator().manual_seed(rows + half))
    return {"cos": angles.cos(), "sin": angles.sin()}


def heads_of(rng: random.Random) -> tuple[int, int, int]:
    """Query heads, key/value heads, head size."""
    shared = rng.choice([1, 1, 2, 3])
    return shared * rng.choice([1, 1, 2, 5]), shared, rng.choice([1, 2, 7, 8, 16, 24, 33, 64, 96])


def split(rng: random.Random) -> Arguments:
    """context_tree_split."""
    count = rng.choice([0, 1, 5, 40])
    spans = torch.stack((integers(rng, count, 0, 50), integers(rng, count, 0, 50)), 1)
    offset = floats(rng, count, dtype=rng.choice(PLAIN_DTYPES)) * 4 if rng.random() < 0.6 else None
    return {"spans": spans, "offset": offset}


def select(rng: random.Random) -> Arguments:
    """context_tree_select."""
    count = rng.choice([0, 1, 5, 40])
    children = integers(rng, 4 * count, 0, 4).reshape(count, 2, 2)
    return {"children": children, "choice": integers(rng, count, 0, 2) if rng.random() < 0.6 else None}


def layout(rng: random.Random) -> Arguments:
    """context_tree_layout."""
    chunks, per_chunk = rng.choice([0, 1, 3, 9]), rng.choice([1, 2, 4, 5, 100])
    total = rng.choice([0, 1, 30, 400]) if chunks else 0
    bounds = cumulative(rng, chunks * per_chunk, total)
    nodes = torch.stack((bounds[:-1], bounds.diff()), 1).reshape(chunks, per_chunk, 2)
    if chunks:
        nodes = torch.stack([chunk[torch.tensor(rng.sample(range(per_chunk), per_chunk))] for chunk in nodes])
    slots = rng.choice([1, 2, 7, 100])
    kept = int(nodes[..., 1].clamp(max=slots).sum())
    return {
        "nodes": nodes,
        "chunk_index": integers(rng, chunks, 0, 1000),
        "slots_per_node": slots,
        "num_tokens": total,
        "num_slots": kept + rng.choice([0, 0, 3]),
    }


def node_attention(rng: random.Random, dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES) -> Arguments:
    """node_vectors."""
    q_heads, heads, size = heads_of(rng)
    count, tokens, dtype = rng.choice([0, 1, 4, 20]), rng.choice([0, 1, 9, 150]), rng.choice(dtypes)
    start = integers(rng, count, 0, tokens + 1)
    length = torch.tensor([rng.randint(0, tokens - int(at)) for at in start], dtype=torch.int64)
    return {
        "q": floats(rng, count, q_heads, size, dtype=dtype),
        "k": floats(rng, tokens, heads, size, dtype=dtype),
        "v": floats(rng, tokens, heads, size, dtype=dtype),
        "spans": torch.stack((start, length), 1),
        **tables(rng, tokens + rng.choice([0, 3]), size),
        "scale": rng.choice([size**-0.5, 1.0, -0.5, 0.0]),
    }


def plain_node_attention(rng: random.Random) -> Arguments:
    """node_vectors_plain."""
    return node_attention(rng, PLAIN_DTYPES)


def node_attention_backward(rng: random.Random) -> Arguments:
    """node_vectors_backward."""
    arguments = node_attention(rng, PLAIN_DTYPES)
    return {"grad_out": floats(rng, *arguments["q"].shape, dtype=arguments["q"].dtype), **arguments}


def tree_attention(rng: random.Random) -> Arguments:
    """tree_node_vectors."""
    arguments = node_attention(rng)
    levels = rng.choice([1, 1, 2, 3, 5])
    q = arguments["q"]
    scale = arguments.pop("scale")
    arguments["q"] = floats(rng, q.shape[0], 2**levels, q.shape[1], q.shape[2], dtype=q.dtype)
    return {**arguments, "levels": levels, "scale": scale}


def topk(rng: random.Random) -> Arguments:
    """topk_nodes."""
    groups, nodes, width = rng.choice([0, 1, 3, 9]), rng.choice([0, 1, 12, 90]), rng.choice([0, 1, 5, 16, 70])
    nodes, queries, dtype = nodes if groups else 0, rng.choice([1, 4]), rng.choice(KERNEL_DTYPES)
    return {
        "queries": floats(rng, queries, width, dtype=dtype),
        "nodes": floats(rng, nodes, width, dtype=dtype),
        "cu_groups": cumulative(rng, groups, nodes),
        "group_query": integers(rng, groups, 0, queries),
        "k": rng.choice([0, 1, 1, 2, 5]),
        "valid": integers(rng, nodes, 0, 2).bool() if rng.random() < 0.5 else None,
        "eps": rng.choice([1e-6, 0.5]),
    }


def compression(rng: random.Random) -> Arguments:
    """chunk_compression."""
    q_heads, heads, size = heads_of(rng)
    tokens, dtype, rows = rng.choice([0, 1, 9, 60]), rng.choice(KERNEL_DTYPES), rng.choice([1, 7, 80])
    slots, queries = rng.randint(0, tokens), rng.choice([0, 1, 11])
    keep = torch.tensor(rng.sample(range(tokens), slots), dtype=torch.int64)
    keep[torch.rand(slots, generator=torch.Generator().manual_seed(slots)) < 0.2] = -1
    with_q, with_k = rng.random() < 0.5, rng.random() < 0.5
    return {
        "q": floats(rng, queries, q_heads, size, dtype=dtype) if with_q else None,
        "k": floats(rng, tokens, heads, size, dtype=dtype),
        "v": floats(rng, tokens, heads, size, dtype=dtype),
        **tables(rng, rows, size),
        "q_positions": integers(rng, queries, 0, rows) if with_q else None,
        "positions": integers(rng, tokens, 0, rows) if with_k else None,
        "keep_index": keep,
        "keep_position": integers(rng, slots, 0, rows),
    }


def compression_backward(rng: random.Random) -> Arguments:
    """chunk_compression_backward."""
    given = compression(rng)
    slots, k = given["keep_index"].shape[0], given["k"]
    memory = (slots, *k.shape[1:])
    return {
        "grad_q_rotated": given["q"],
        "grad_k_rotated": None if given["positions"] is None else floats(rng, *k.shape, dtype=k.dtype),
        "grad_memory_k": floats(rng, *memory, dtype=k.dtype),
        "grad_memory_v": floats(rng, *memory, dtype=k.dtype),
        **{name: given[name] for name in ("cos", "sin", "q_positions", "positions", "keep_index", "keep_position")},
        "num_tokens": k.shape[0],
    }


def attention(rng: random.Random, dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES) -> Arguments:
    """injected_attention."""
    q_heads, heads, size = heads_of(rng)
    rows, dtype = rng.choice([0, 1, 2, 5, 40]), rng.choice(dtypes)
    queries, slots = rng.choice([0, 1, 9, 130]) if rows else 0, rng.choice([0, 1, 40, 300])
    # rows often share a memory with others, wherever those are in the batch
    memories = [sorted((rng.randint(0, slots), rng.randint(0, slots))) for _ in range(rng.choice([1, 2, max(rows, 1)]))]
    ends = [rng.choice(memories) for _ in range(rows)]
    positions = rng.choice([1, 9])
    return {
        "q": floats(rng, queries, q_heads, size, dtype=dtype),
        "k": floats(rng, slots, heads, size, dtype=dtype),
        "v": floats(rng, slots, heads, size, dtype=dtype),
        "cu_q": cumulative(rng, rows, queries),
        "slot_range": torch.tensor(ends, dtype=torch.int64).reshape(rows, 2),
        "q_position": integers(rng, rows, 0, positions),
        **tables(rng, positions, size),
        "scale": rng.choice([size**-0.5, 1.0, -0.5, 0.0]),
    }


def attention_backward(rng: random.Random) -> Arguments:
    """injected_attention_backward."""
    given = attention(rng)
    out, lse = reference.injected_attention(**given)
    grad_lse = floats(rng, *lse.shape, dtype=torch.float32) if rng.random() < 0.5 else None
    first = {"grad_out": floats(rng, *out.shape, dtype=out.dtype), "grad_lse": grad_lse}
    q, k, v, *rest = given
    names = {name: given[name] for name in (q, k, v)}
    return {
        **first,
        **names,
        "out": out,
        "lse": lse,
        **{name: given[name] for name in rest},
        "need_grad_kv": rng.random() < 0.7,
    }


def attention_8bit(rng: random.Random) -> Arguments:
    """injected_attention_8bit."""
    given = attention(rng, PLAIN_DTYPES)
    (k, k_scale), (v, v_scale) = (quantize_memory(given[name]) for name in ("k", "v"))
    rest = {name: given[name] for name in ("cu_q", "slot_range", "q_position", "cos", "sin", "scale")}
    return {"q": given["q"], "k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale, **rest}


def memory_rows(rng: random.Random) -> Arguments:
    """quantize_memory."""
    return {"x": floats(rng, rng.choice([0, 3, 20]), 2, rng.choice([0, 1, 8, 33]), dtype=rng.choice(PLAIN_DTYPES))}


def linear(rng: random.Random) -> Arguments:
    """decode_linear."""
    rows, inner, dtype = rng.choice([0, 1, 3, 13]), rng.choice([0, 1, 8, 33]), rng.choice(KERNEL_DTYPES)
    gated = rng.random() < 0.3
    outputs = [5, 5] if gated else [rng.choice([0, 1, 6, 101]) for _ in range(rng.choice([1, 2, 3]))]
    weights = [floats(rng, n, inner, dtype=dtype) for n in outputs]
    biases = [floats(rng, n, dtype=dtype) if rng.random() < 0.5 else None for n in outputs]
    missing = [None] * (3 - len(outputs))
    residual = None if gated or rng.random() < 0.5 else floats(rng, rows, sum(outputs), dtype=dtype)
    return {
        "x": floats(rng, rows, inner, dtype=dtype),
        **dict(zip(("weight", "weight2", "weight3"), [*weights, *missing], strict=True)),
        **dict(zip(("bias", "bias2", "bias3"), [*biases, *missing], strict=True)),
        "norm_weight": floats(rng, inner, dtype=dtype) if rng.random() < 0.5 else None,
        "eps": 1e-5,
        "residual": residual,
        "gated": gated,
        "overlap": rng.random() < 0.5,
        "prefetch": weights[0] if rng.random() < 0.3 else None,
        "prefetch_bytes": rng.choice([0, 64]),
    }


def linear_fp8(rng: random.Random) -> Arguments:
    """decode_linear_fp8: the arguments of decode_linear, with codes and scales in the weights' place."""
    made = linear(rng)
    scales: Arguments = {}
    for name in ("weight", "weight2", "weight3"):
        weight, scale = made[name], name.replace("weight", "scale")
        scales[scale] = None
        if weight is not None:
            made[name], scales[scale] = reference.quantize_rows_fp8(weight)
    names = list(made)
    after = names.index("weight3") + 1
    return {name: {**made, **scales}[name] for name in (*names[:after], *scales, *names[after:])}


def append(rng: random.Random) -> Arguments:
    """decode_append."""
    q_heads, heads, size = heads_of(rng)
    rows, capacity, dtype = rng.choice([0, 1, 3]), rng.choice([0, 1, 9]), rng.choice(PLAIN_DTYPES)
    return {
        "qkv": floats(rng, rows, (q_heads + 2 * heads) * size, dtype=dtype),
        "keys": floats(rng, rows, capacity, heads, size, dtype=dtype),
        "values": floats(rng, rows, capacity, heads, size, dtype=dtype),
        "length": integers(rng, rows, 0, capacity + 1),
        "first": integers(rng, rows, 0, 2),
        **tables(rng, rng.choice([1, 10]), size),
        "q_norm": floats(rng, size, dtype=dtype) if rng.random() < 0.5 else None,
        "k_norm": floats(rng, size, dtype=dtype) if rng.random() < 0.5 else None,
        "eps": 1e-5,
        "window": rng.choice([0, 1, 4]),
        "overlap": False,
        "prefetch": None,
        "prefetch_bytes": 0,
    }


def rows_of(*names: str) -> Callable[[random.Random], Arguments]:
    """Element-wise operators: ``[T, n]`` each; ``weight`` is ``[n]`` and ``eps`` a number."""

    def build(rng: random.Random) -> Arguments:
        tokens, width, dtype = rng.choice([0, 1, 9]), rng.choice([0, 1, 8, 33]), rng.choice(PLAIN_DTYPES)
        made: Arguments = {}
        for name in names:
            shape = (width,) if name == "weight" else (tokens, width)
            made[name] = 1e-5 if name == "eps" else floats(rng, *shape, dtype=dtype)
        return made

    return build


BUILDERS: dict[str, Callable[[random.Random], Arguments]] = {
    "context_tree_split": split,
    "context_tree_select": select,
    "context_tree_layout": layout,
    "node_vectors": node_attention,
    "node_vectors_backward": node_attention_backward,
    "node_vectors_plain": plain_node_attention,
    "node_vectors_plain_backward": node_attention_backward,
    "tree_node_vectors": tree_attention,
    "topk_nodes": topk,
    "chunk_compression": compression,
    "chunk_compression_backward": compression_backward,
    "injected_attention": attention,
    "injected_attention_backward": attention_backward,
    "injected_attention_8bit": attention_8bit,
    "quantize_memory": memory_rows,
    "decode_linear": linear,
    "decode_linear_fp8": linear_fp8,
    "decode_append": append,
    "silu_product": rows_of("gate", "up"),
    "silu_product_fp8": rows_of("gate", "up"),
    "rms_norm": rows_of("x", "weight", "eps"),
    "rms_norm_fp8": rows_of("x", "weight", "eps"),
    "add_rms_norm": rows_of("x", "residual", "weight", "eps"),
    "add_rms_norm_fp8": rows_of("x", "residual", "weight", "eps"),
    "quantize_rows_fp8": rows_of("x"),
}
#: Operators whose right calls are compared with the reference of the same name; the others are that reference.
COMPARED = (
    "context_tree_split",
    "context_tree_select",
    "context_tree_layout",
    "node_vectors",
    "tree_node_vectors",
    "topk_nodes",
    "chunk_compression",
    "chunk_compression_backward",
    "injected_attention",
    "injected_attention_backward",
)


def lay_out(rng: random.Random, x: Tensor, odd: bool) -> Tensor:
    """The same numbers in another place: strided, in the middle of others, negated lazily, or at an odd address."""
    kind = rng.choice(["dense", "transposed", "inside", "negated", "odd" if odd else "dense"])
    if kind == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "inside" and x.dim() and x.numel():
        wide = x.new_zeros([size + 3 for size in x.shape])
        part = wide[tuple(slice(2, 2 + size) for size in x.shape)]
        return part.copy_(x)
    if kind == "odd" and x.numel() and x.element_size() > 1:
        # byte by byte: PyTorch's own copies need not be able to
        memory = bytearray(1) + bytearray(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=1).view(x.shape)
    if kind == "negated" and x.dtype in PLAIN_DTYPES:
        return torch._neg_view(-x)
    return x


def spoil_tensor(rng: random.Random, x: Tensor) -> Tensor:
    """Another dtype, shape or value than the operator asked for."""
    kind = rng.choice(["dtype", "rank", "size", "empty", "vast", "value", "value", "value", "bytes"])
    if kind == "dtype":
        return x.to(rng.choice(OTHER_DTYPES))
    if kind == "rank":
        return (
            x.unsqueeze(rng.randint(0, x.dim()))
            if rng.random() < 0.5 or not x.dim()
            else x.select(0, 0)
            if len(x)
            else x
        )
    if kind == "size" and x.dim():
        place = rng.randrange(x.dim())
        return torch.cat((x, x), place) if rng.random() < 0.5 else x.narrow(place, 0, max(x.shape[place] - 1, 0))
    if kind == "empty" and x.dim():
        return x.narrow(rng.randrange(x.dim()), 0, 0)
    if kind == "vast" and x.dim() > 1:
        shape = list(x.shape)
        empty, vast = rng.sample(range(x.dim()), 2)
        shape[empty], shape[vast] = 0, rng.choice([2**45, 2**50])
        return torch.empty(shape, dtype=x.dtype)
    if kind == "bytes" and x.dtype == torch.bool:
        return integers(rng, x.numel(), 0, 256).to(torch.uint8).view(torch.bool).reshape(x.shape)
    if x.numel() == 0:
        return x
    x = x.clone()
    flat = x.view(-1)
    for _ in range(rng.choice([1, 1, 4])):
        at = rng.randrange(flat.numel())
        if x.dtype == torch.int64:
            flat[at] = rng.choice([*INDICES, x.numel(), x.numel() - 1])
        elif x.is_floating_point() and x.element_size() > 1:
            flat[at] = rng.choice([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40, 0.0])
    return x


def spoil(rng: random.Random, arguments: Arguments) -> Arguments:
    """The call with one to three arguments that are not what they should be."""
    spoilt = dict(arguments)
    for name in rng.sample(list(spoilt), min(len(spoilt), rng.choice([1, 1, 2, 3]))):
        value = spoilt[name]
        if isinstance(value, Tensor):
            spoilt[name] = spoil_tensor(rng, value)
        elif isinstance(value, bool):
            spoilt[name] = not value
        elif isinstance(value, int):
            spoilt[name] = rng.choice(INTS)
        elif isinstance(value, float):
            spoilt[name] = rng.choice(FLOATS)
        elif rng.random() < 0.5:
            # where nothing was, some other tensor
            tensors = [other for other in spoilt.values() if isinstance(other, Tensor)]
            spoilt[name] = rng.choice(tensors) if "bytes" not in name else value
    return spoilt


def tuple_of(result: Any) -> tuple[Tensor, ...]:
    """An operator's results, however many."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def compare(name: str, arguments: Arguments, results: tuple[Tensor, ...]) -> None:
    """A right call's results against the reference."""
    expected = tuple_of(getattr(reference, name)(**arguments))
    narrow = any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in arguments.values())
    tolerance = 6e-2 if narrow else 1e-3
    for index, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
        if name == "topk_nodes" and index == 0:
            # equal up to rounding may come in another order
            assert torch.equal(ours >= 0, theirs >= 0), (ours, theirs)
            continue
        # gradients grow with what they add up
        largest = float(theirs.nan_to_num(0, 0, 0).abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * max(1.0, largest), equal_nan=True)


def promised(name: str, arguments: Arguments) -> list[tuple[torch.Size, torch.dtype]]:
    """Shapes and dtypes of the fake's results."""
    meta = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in arguments.items()}
    results = tuple_of(getattr(torch.ops.sharedllm, name)(*meta.values()))
    return [(result.shape, result.dtype) for result in results]


def one_call(name: str, seed: int) -> str:
    """One call; returns how it ended, raises AssertionError or whatever should not have happened."""
    rng = random.Random(f"{name} {seed}")
    arguments = BUILDERS[name](rng)
    right = rng.random() < 0.25
    given = {
        key: lay_out(rng, value, name in COMPARED) if isinstance(value, Tensor) and key not in WRITTEN else value
        for key, value in (arguments if right else spoil(rng, arguments)).items()
    }
    begin = time.process_time()
    try:
        results = tuple_of(getattr(torch.ops.sharedllm, name)(*given.values()))
    except (ValueError, TypeError, RuntimeError) as error:
        text = str(error)
        assert not right, f"expected a right call to return, got {text!r}"
        # PyTorch's own word where it makes the results
        no_memory = "can't allocate memory" in text
        clear = "expected" in text and "got" in text and "\n" not in text.strip()
        assert clear or no_memory, f"expected a clear line, got {text!r}"
        return type(error).__name__
    finally:
        seconds = time.process_time() - begin
        assert seconds < SLOW, f"expected an end within {SLOW} s, got {seconds:.1f} s"
    got = [(result.shape, result.dtype) for result in results]
    assert got == (expected := promised(name, given)), f"expected {expected}, got {got}"
    if right and name in COMPARED:
        compare(name, arguments, results)
    return "right" if right else "returned"


def main() -> int:
    """Run the calls; exit code 1 if one ended otherwise than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=6000, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first call (default: %(default)s)")
    parser.add_argument("--operator", action="append", choices=list(BUILDERS), help="only this one; may be repeated")
    parser.add_argument("--verbose", action="store_true", help="print each call before it is made")
    parsed = parser.parse_args()
    faulthandler.enable()
    names = parsed.operator or list(BUILDERS)
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in names}
    failures = 0
    for index in range(parsed.calls):
        name, seed = names[index % len(names)], parsed.seed + index // len(names)
        if parsed.verbose:
            print(name, seed, flush=True)
        try:
            outcomes[name][one_call(name, seed)] += 1
        except Exception:
            failures += 1
            outcomes[name]["FAILED"] += 1
            print(f"--operator {name} --seed {seed} --calls 1", file=sys.stderr)
            traceback.print_exc(limit=-3)
    for name, counter in outcomes.items():
        print(f"{name:<28} " + ", ".join(f"{count} {kind}" for kind, count in sorted(counter.items())))
    print(f"{parsed.calls} calls, seeds from {parsed.seed}, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

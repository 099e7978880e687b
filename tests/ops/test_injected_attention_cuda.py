"""Injected attention on CUDA: paths, tile borders, memory that must not leak, determinism, graphs, streams, limits.

What holds on every device is in ``test_injected_attention.py``; the measure of error is the same.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from test_injected_attention import (
    Spec,
    attend,
    backward_op,
    build,
    check_same_gradient,
    compare,
    forward_op,
)
from torch import Tensor

from sharedllm_ext import reference
from sharedllm_ext._library import cuda_kernels
from sharedllm_ext.ops import dequantize_memory, injected_attention_8bit, quantize_memory
from sharedllm_ext.ops.injected_attention import PATHS, TENSOR_CORE_HEAD_SIZES, _plain, injected_attention_path
from tests import sanitize
from tests.support import needs_cuda, scale_last
from tests.tolerance import check_error, oracle

pytestmark = needs_cuda

attend_8bit = scale_last(injected_attention_8bit)
CUDA = torch.device("cuda")
HALVES = (torch.bfloat16, torch.float16)
# query heads, key/value heads: groups of 1, 4, 7, 8
HEADS = ((2, 2), (8, 2), (7, 1), (8, 1))
BORDERS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 175, 176, 177, 255, 256, 257)

needs_kernel = pytest.mark.skipif(
    not {"injected_attention", "injected_attention_backward"} <= cuda_kernels(),
    reason="the CUDA library has no kernel of this operator: plain PyTorch reads index values on the host",
)


def on_path(name: str) -> AbstractContextManager[Any]:
    """Context in which the operator takes a path; one that cannot run a call leaves it to the usual choice."""
    if name == "auto":
        return nullcontext()
    if "injected_attention" not in cuda_kernels():
        pytest.skip("the CUDA library has no kernel of this operator: there is no path to choose")
    return injected_attention_path(name)


def type_on(path: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype, or on the general path the only one that it takes."""
    return torch.float32 if path == "generic" else dtype


def ragged(
    lengths: list[int], slots: list[int], heads: tuple[int, int], size: int, rotary: int | None = None
) -> tuple[Spec, Tensor]:
    """Rows with slots of their own and gaps between them; the slots that belong to a row."""
    ranges, end = [], 3
    for i, count in enumerate(slots):
        ranges.append((end, end + count))
        end += count + i % 5 + 1
    owned = torch.zeros(end + 2, dtype=torch.bool)
    for begin, stop in ranges:
        owned[begin:stop] = True
    return (lengths, ranges, end + 2, *heads, size, size if rotary is None else rotary), owned


def poison_outside(arguments: list[Any], owned: Tensor) -> None:
    """NaN and infinity in every slot that no row reads."""
    outside = (~owned).nonzero().flatten().to(CUDA)
    for x, values in ((arguments[1], (torch.nan, torch.inf)), (arguments[2], (-torch.inf, torch.nan))):
        x[outside[::2]], x[outside[1::2]] = values


# --- every path, dtype, head size; groups and rotations take turns ----------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", TENSOR_CORE_HEAD_SIZES)
def test_paths_types_and_sizes(path: str, dtype: torch.dtype, size: int, generator: torch.Generator) -> None:
    turn = TENSOR_CORE_HEAD_SIZES.index(size) + HALVES.index(dtype) + PATHS.index(path)
    heads, rotary = HEADS[turn % 4], (size, size // 2, 0)[turn % 3]
    few = path == "decode"
    lengths = [1, 3, 0, 2, 4, 1] if few else [130, 1, 0, 65, 200, 17]
    # rows share slots, one has none, one has no queries
    spec: Spec = (lengths, [(0, 300), (5, 70), (0, 90), (299, 299), (40, 411), (410, 411)], 411, *heads, size, rotary)
    with on_path(path):
        compare(build(spec, type_on(path, dtype), CUDA, generator), generator)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("shift", [0, 5, 11])
def test_tile_borders(path: str, size: int, shift: int, generator: torch.Generator) -> None:
    count = len(BORDERS)
    slots = [BORDERS[(i * 4 + shift) % count] for i in range(count)]
    lengths = [i % 4 + 1 for i in range(count)] if path == "decode" else list(BORDERS)
    spec, owned = ragged(lengths, slots, HEADS[shift % 4], size)
    arguments = build(spec, type_on(path, HALVES[shift % 2]), CUDA, generator)
    poison_outside(arguments, owned)
    with on_path(path):
        compare(arguments, generator)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("slots", BORDERS)
def test_one_row_at_tile_borders(path: str, slots: int, generator: torch.Generator) -> None:
    turn = BORDERS.index(slots)
    queries = turn % 16 + 1 if path == "decode" else BORDERS[turn * 5 % len(BORDERS)]
    spec, owned = ragged([queries], [slots], HEADS[turn % 4], TENSOR_CORE_HEAD_SIZES[turn % 4])
    arguments = build(spec, type_on(path, HALVES[turn % 2]), CUDA, generator)
    poison_outside(arguments, owned)
    with on_path(path):
        compare(arguments, generator)


@pytest.mark.parametrize(
    ("queries", "slots"), [(1, 5000), (1, 16385), (2, 4097), (4, 9001), (16, 4096), (17, 3000), (33, 2049)]
)
def test_few_queries_over_many_slots(queries: int, slots: int, generator: torch.Generator) -> None:
    spec, owned = ragged([queries, 1, queries], [slots, 1, 515], HEADS[queries % 4], 128)
    arguments = build(spec, HALVES[slots % 2], CUDA, generator)
    poison_outside(arguments, owned)
    compare(arguments, generator)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("eight_bit", [False, True], ids=["16 bits", "8 bits"])
@pytest.mark.parametrize(
    ("heads", "size", "slots"),
    [((32, 8), 128, 9000), ((28, 4), 64, 36000), ((16, 4), 256, 8300), ((32, 32), 128, 4352), ((16, 16), 128, 5000)],
    ids=str,
)
def test_one_row_of_a_long_memory(
    heads: tuple[int, int],
    size: int,
    slots: int,
    eight_bit: bool,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    """Over 32 MB: parts are merged as they come, and the first block asked for is a guess that may be wrong."""
    slots *= 2 if eight_bit else 1
    rows = [(1, 0, slots), (1, 5, slots - 70), (2, 0, 700), (1, slots - 64, slots), (1, 7, 7), (1, 3, 40)]
    for queries, begin, end in rows:
        # as self-attention is decoded: no rotation
        rotary = 0 if heads[0] == heads[1] else size
        spec: Spec = ([queries], [(begin, end)], slots, *heads, size, rotary)
        arguments = build(spec, dtype, CUDA, generator)
        operator, same_arguments, exact_arguments = forward_op, arguments, oracle(arguments)
        if eight_bit:
            q, k, v, *rest = arguments
            codes, scales = zip(quantize_memory(k), quantize_memory(v), strict=True)
            same_arguments = [q, *(dequantize_memory(*x, dtype) for x in zip(codes, scales, strict=True)), *rest]
            exact_arguments[1:3] = (dequantize_memory(*x, torch.float64) for x in zip(codes, scales, strict=True))
            arguments, operator = [q, *codes, *scales, *rest], attend_8bit
        else:
            owned = torch.zeros(slots, dtype=torch.bool)
            owned[begin:end] = True
            poison_outside(arguments, owned)
        got = operator(*arguments)
        same, exact = _plain(*same_arguments), reference.injected_attention(*exact_arguments)
        for name, *values in zip(("out", "lse"), got, same, exact, strict=True):
            check_error(name, *values)
        for _ in range(3):
            assert all(map(torch.equal, operator(*arguments), got))


@pytest.mark.parametrize(
    ("queries", "slots", "heads", "size"), [(1024, 2048, (8, 2), 128), (777, 1501, (7, 1), 64), (300, 900, (4, 4), 256)]
)
def test_many_tiles(queries: int, slots: int, heads: tuple[int, int], size: int, generator: torch.Generator) -> None:
    spec, _ = ragged([queries], [slots], heads, size)
    compare(build(spec, torch.bfloat16, CUDA, generator), generator)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("heads", "size", "rotary", "scale"),
    [((32, 8), 128, 128, None), ((56, 8), 96, 96, 1.0), ((8, 8), 64, 20, None), ((16, 8), 128, 0, -0.3)],
    ids=str,
)
@pytest.mark.parametrize("more", [1, 29, 100])
def test_last_round_of_slot_tiles_is_shared(
    dtype: torch.dtype,
    heads: tuple[int, int],
    size: int,
    rotary: int,
    scale: float | None,
    more: int,
    generator: torch.Generator,
) -> None:
    """One row and more tiles of slots than multiprocessors: the backward cuts the tiles of the last round of blocks."""
    multiprocessors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    slots = -(-(multiprocessors + more) // heads[1]) * 128 - 5
    queries = 2048 // (heads[0] // heads[1]) + 37
    # the row's own slots begin and end inside of tiles, the last of which is not full either
    owned = torch.zeros(slots, dtype=torch.bool)
    owned[131 : slots - 200] = True
    spec: Spec = ([queries], [(131, slots - 200)], slots, *heads, size, rotary)
    arguments = build(spec, dtype, CUDA, generator, scale)
    poison_outside(arguments, owned)
    compare(arguments, generator)
    q, k, v, *rest = arguments
    out, lse = forward_op(*arguments)
    gradients = [backward_op(out, None, q, k, v, out, lse, *rest, True)[1:] for _ in range(2)]
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second) and not first[~owned].any()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("size", "memory"), [(64, 1100), (96, 1100), (128, 1100), (128, 4200)])
@pytest.mark.parametrize(
    "slots", [0, 1, 2, 63, 127, 128, 129, 255, 256, 257, 511, 513, 640, 1000, 1024, 1091, 2049, 4500]
)
def test_tiles_in_a_chain(dtype: torch.dtype, size: int, memory: int, slots: int, generator: torch.Generator) -> None:
    """Several tiles for each multiprocessor, a short memory or a long one, of which the row owns some slots."""
    turn = slots % 7 + HALVES.index(dtype)
    q_heads, kv_heads = ((32, 8), (28, 4), (7, 1), (8, 8))[turn % 4]
    # over four rounds of tiles, the last tile not full; long memories chain full rounds only
    multiprocessors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    total = max(slots + 9, memory)
    queries = 4 * multiprocessors * (192 if size == 64 else 128) // q_heads + (37 if total < 4096 else -5)
    owned = torch.zeros(total, dtype=torch.bool)
    owned[5 : 5 + slots] = True
    rotary = (size, size // 2, 20, 0)[slots % 4]
    spec: Spec = ([queries], [(5, 5 + slots)], total, q_heads, kv_heads, size, rotary)
    arguments = build(spec, dtype, CUDA, generator, scale=(None, 0.0, -0.3)[max(turn - 1, 0) % 3])
    poison_outside(arguments, owned)
    got = forward_op(*arguments)
    same, exact = _plain(*arguments), reference.injected_attention(*oracle(arguments))
    for name, *values in zip(("out", "lse"), got, same, exact, strict=True):
        check_error(name, *values)
    assert all(map(torch.equal, forward_op(*arguments), got))


@pytest.mark.parametrize("path", ["auto", "portable", "generic"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.3, 2.5])
@pytest.mark.parametrize("queries", [9, 90])
def test_hostile_scales(path: str, dtype: torch.dtype, scale: float, queries: int, generator: torch.Generator) -> None:
    spec, _ = ragged([queries, 5], [333, 70], (8, 2), 64)
    with on_path(path):
        compare(build(spec, type_on(path, dtype), CUDA, generator, scale), generator)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("size", "rotary", "slots"),
    [(64, 64, 310), (96, 96, 310), (128, 128, 310), (128, 64, 310), (128, 0, 310), (128, 128, 4200)],
)
def test_gradients_round_scores_as_they_were_rounded_before(
    dtype: torch.dtype, scale: float, size: int, rotary: int, slots: int, generator: torch.Generator
) -> None:
    """Weights are exponentials of scores over a sum of such, so that large scores show another rounding."""
    # over two rounds of tiles of one row, enough to turn a short memory's keys instead of the queries
    multiprocessors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    queries = 2 * multiprocessors * (192 if size == 64 else 128) // 8 + 37
    compare(
        build(([queries], [(5, 5 + slots)], slots + 9, 8, 2, size, rotary), dtype, CUDA, generator, scale), generator
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_scores_far_apart(path: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    # scores of some thousands: exponentials underflow, and the maximum keeps changing
    spec, _ = ragged([3, 4] if path == "decode" else [70, 3], [1300, 64], (8, 2), 128)
    arguments = build(spec, type_on(path, dtype), CUDA, generator, 100.0)
    with on_path(path):
        out, lse = attend(*arguments)
    exact_out, exact_lse = reference.injected_attention(*oracle(arguments))
    same_out, same_lse = _plain(*arguments)
    check_error("out", out, same_out, exact_out)
    check_error("lse", lse, same_lse, exact_lse)


@pytest.mark.parametrize(
    ("dtype", "size", "rotary"),
    [
        (torch.float32, 128, 128),
        (torch.float32, 64, 32),
        (torch.float32, 1, 0),
        (torch.float32, 33, 10),
        (torch.bfloat16, 33, 32),
        (torch.bfloat16, 80, 80),
        (torch.float16, 100, 50),
        (torch.bfloat16, 192, 64),
        (torch.float16, 8, 8),
        (torch.bfloat16, 256, 64),
    ],
    ids=str,
)
def test_other_types_and_sizes(dtype: torch.dtype, size: int, rotary: int, generator: torch.Generator) -> None:
    for lengths in ([65, 3], [1, 2]):
        spec, owned = ragged(lengths, [150, 31], (6, 2), size, rotary)
        arguments = build(spec, dtype, CUDA, generator)
        poison_outside(arguments, owned)
        compare(arguments, generator)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 64), (torch.float64, 33), (torch.bfloat16, 1056)], ids=str)
def test_what_no_kernel_takes(dtype: torch.dtype, size: int, generator: torch.Generator) -> None:
    spec, owned = ragged([65, 3, 1], [150, 31, 0], (6, 2), size, 32)
    q, k, v, *rest = build(spec, dtype, CUDA, generator)
    poison_outside([q, k, v], owned)
    results = []
    for wide in (False, True):
        leaves = [(x.double() if wide else x).clone().requires_grad_() for x in (q, k, v)]
        function = reference.injected_attention if wide else attend
        out, lse = function(*leaves, *(oracle(rest) if wide else rest))
        (out.double().square().sum() + lse[lse.isfinite()].double().sin().sum()).backward()
        results.append([out, lse, *(x.grad for x in leaves)])
    for got, want in zip(*results, strict=True):
        finite = want.isfinite()
        assert torch.equal(got.isfinite(), finite)
        difference, norm = (x[finite].double().norm() for x in (got.double() - want, want))
        assert difference <= (1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps) * norm


# --- what must not leak ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_other_rows_do_not_leak(path: str, bad: float, generator: torch.Generator) -> None:
    lengths = [3, 2, 4] if path == "decode" else [70, 130, 33]
    spec: Spec = (lengths, [(0, 100), (100, 301), (301, 350)], 350, 8, 2, 128, 128)
    arguments = build(spec, type_on(path, torch.bfloat16), CUDA, generator)
    grad_out = torch.randn(arguments[0].shape, generator=generator).to(arguments[0])
    first, last = lengths[0], lengths[0] + lengths[1]
    clean = [*range(first), *range(last, sum(lengths))]
    clean_slots = [*range(100), *range(301, 350)]
    # a row's own queries may spoil the gradients of slots that share a tile with its slots, but nothing else
    for queries_too in (True, False):
        spoiled = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
        spoiled_grad = grad_out.clone()
        spoiled[1][100:301] = bad
        spoiled[2][100:301] = bad
        if queries_too:
            spoiled[0][first:last] = bad
            spoiled_grad[first:last] = bad
        with on_path(path):
            want, got = forward_op(*arguments), forward_op(*spoiled)
            for x, y in zip(want, got, strict=True):
                assert x[clean].isfinite().all() and torch.equal(x[clean], y[clean])
            for need_grad_kv in (True, False):
                grads = backward_op(grad_out, None, *arguments[:3], *want, *arguments[3:], need_grad_kv)
                others = backward_op(spoiled_grad, None, *spoiled[:3], *got, *spoiled[3:], need_grad_kv)
                parts = (clean, clean_slots, clean_slots) if need_grad_kv and not queries_too else (clean,)
                for name, part, x, y in zip(("grad_q", "grad_k", "grad_v"), parts, others, grads, strict=False):
                    check_same_gradient(name, x[part], y[part])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_large_numbers_in_other_slots_do_not_leak(dtype: torch.dtype, generator: torch.Generator) -> None:
    """A rotation makes them infinite."""
    multiprocessors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    queries = 2 * multiprocessors * 128 // 8 + 37
    arguments = build(([queries], [(70, 370)], 450, 8, 2, 128, 128), dtype, CUDA, generator)
    grad_out = torch.randn(arguments[0].shape, generator=generator).to(arguments[0])
    results = []
    for _ in range(2):
        out, lse = forward_op(*arguments)
        rest = (*arguments[:3], out, lse, *arguments[3:])
        results.append([out, lse, *(x for need in (True, False) for x in backward_op(grad_out, None, *rest, need))])
        for x in arguments[1:3]:
            x[:70], x[370:] = torch.finfo(dtype).max, -torch.finfo(dtype).max
    for i, (clean, spoiled) in enumerate(zip(*results, strict=True)):
        if clean.numel():
            check_same_gradient(str(i), spoiled, clean)


def test_gradients_of_slots_that_no_row_reads_are_zero(generator: torch.Generator) -> None:
    spec, owned = ragged([70, 2, 0], [65, 33, 40], (8, 2), 128)
    owned[spec[1][2][0] : spec[1][2][1]] = False
    q, k, v, *rest = arguments = build(spec, torch.bfloat16, CUDA, generator)
    poison_outside(arguments, owned)
    out, lse = forward_op(*arguments)
    _, grad_k, grad_v = backward_op(torch.ones_like(out), None, q, k, v, out, lse, *rest, True)
    for grad in (grad_k, grad_v):
        assert grad.isfinite().all() and not grad[~owned].any()
    assert grad_v[owned].any()


# --- same bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_forward_gives_the_same_bits(path: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    lengths = [1, 4, 1] if path == "decode" else [700, 1, 90]
    spec, _ = ragged(lengths, [3000, 20000, 7], (8, 2), 128)
    arguments = build(spec, type_on(path, dtype), CUDA, generator)
    with on_path(path):
        first = forward_op(*arguments)
        for _ in range(4):
            assert all(map(torch.equal, forward_op(*arguments), first))


def test_gradients_repeat(generator: torch.Generator) -> None:
    spec, _ = ragged([700, 90], [900, 300], (8, 2), 128)
    q, k, v, *rest = build(spec, torch.bfloat16, CUDA, generator)
    out, lse = forward_op(q, k, v, *rest)
    grad_out = torch.randn(out.shape, generator=generator).to(out)
    first = backward_op(grad_out, None, q, k, v, out, lse, *rest, True)
    for _ in range(3):
        for values in zip(
            ("q", "k", "v"), backward_op(grad_out, None, q, k, v, out, lse, *rest, True), first, strict=True
        ):
            check_same_gradient(*values)


# --- layouts ---------------------------------------------------------------------------------------------------------


def fused_projection(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Slices of rows that hold something else too, as views of a fused projection are."""
    return [torch.cat((x, x, x), 1)[:, x.shape[1] : 2 * x.shape[1]] for x in (q, k, v)]


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Transposed storage ``[H, T, D]``."""
    return [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]


def size_first(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """The last dimension is not dense."""
    return [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)]


def shifted(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Addresses that are multiples of two bytes only."""
    return [torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for x in (q, k, v)]


def odd_rows(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """An odd number of elements between tokens."""
    return [torch.nn.functional.pad(x.flatten(1), (1, 2))[:, 1:-2].unflatten(1, x.shape[1:]) for x in (q, k, v)]


def every_second(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Every second token and head of a larger tensor."""
    return [x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2] for x in (q, k, v)]


def expanded(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """All heads at the same address."""
    return [x[:, :1].expand(x.shape) for x in (q, k, v)]


@pytest.mark.parametrize(
    "layout", [fused_projection, heads_first, size_first, shifted, odd_rows, every_second, expanded]
)
@pytest.mark.parametrize("lengths", [[2, 1], [150, 20], [4400]], ids=["few", "many", "one row"])
def test_layouts(layout: Callable[..., list[Tensor]], lengths: list[int], generator: torch.Generator) -> None:
    spec, _ = ragged(lengths, [200, 67][: len(lengths)], (8, 2), 128)
    arguments = build(spec, torch.bfloat16, CUDA, generator)
    compare([*layout(*arguments[:3]), *arguments[3:]], generator)


# --- size limits -----------------------------------------------------------------------------------------------------


def test_more_than_65535_rows(generator: torch.Generator) -> None:
    rows, slots, heads, size = 70001, 1000, 4, 64
    begin = torch.randint(0, slots - 3, (rows,), generator=generator)
    spec: Spec = ([1] * rows, [(b, b + 3) for b in begin.tolist()], slots, heads, 2, size, size)
    q, k, v, *rest = arguments = build(spec, torch.bfloat16, CUDA, generator)
    out, lse = attend(*arguments)
    position, cos, sin = rest[2:5]
    query = reference.rotary.rotate(q.double(), cos[position].double(), sin[position].double())
    index = begin.to(CUDA)[:, None] + torch.arange(3, device=CUDA)
    keys, values = (x.double()[index].repeat_interleave(2, 2) for x in (k, v))
    scores = torch.einsum("bhd,bshd->bhs", query, keys) * rest[-1]
    exact = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), values)
    # one rounding of out, and of the rotated query and the weights inside
    assert (out.double() - exact).square().mean().sqrt() <= 2**-8 * exact.square().mean().sqrt() * 2
    assert (lse.double() - scores.logsumexp(-1)).abs().max() <= 2**-6 * scores.abs().max()
    grad_q, grad_k, _ = backward_op(torch.ones_like(out), None, q, k, v, out, lse, *rest, True)
    assert grad_q.isfinite().all() and grad_k.isfinite().all()


def test_more_than_65535_tiles_of_queries(generator: torch.Generator) -> None:
    # tiles of 64 queries of one row; few slots and one head keep it short
    count = 64 * 70001
    arguments = build(([500], [(0, 5)], 5, 1, 1, 64, 64), torch.bfloat16, CUDA, generator)
    part, position = [*arguments], count - 500
    arguments[0] = torch.ones(count, 1, 64, dtype=torch.bfloat16, device=CUDA)
    arguments[0][position:] = part[0]
    arguments[3] = torch.tensor([0, count], device=CUDA)
    out, lse = attend(*arguments)
    exact_out, exact_lse = reference.injected_attention(*oracle(part))
    same_out, same_lse = _plain(*part)
    check_error("out", out[position:], same_out, exact_out)
    check_error("lse", lse[position:], same_lse, exact_lse)
    assert torch.equal(out[:position], out[:1].expand(position, 1, 64))


@needs_kernel
def test_more_than_2_to_31_elements(generator: torch.Generator) -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    slots = 2**31 // 128 + 5000
    spec: Spec = ([70, 3, 2], [(0, 300), (0, 257), (0, 1000)], 1000, 4, 1, 128, 128)
    q, k, v, *rest = build(spec, torch.bfloat16, CUDA, generator)
    # the same slots at both ends of a memory with indices above 2^31; the middle is whatever was there
    wide = [torch.empty((slots, 1, 128), dtype=k.dtype, device=CUDA) for _ in range(2)]
    for large, small in zip(wide, (k, v), strict=True):
        large[:1000], large[-1000:] = small, small
    want, same = (function(q, k, v, *rest) for function in (forward_op, _plain))
    exact = reference.injected_attention(*oracle([q, k, v, *rest]))
    grad_out = torch.ones_like(want[0])
    small = backward_op(grad_out, None, q, k, v, *want, *rest, True)
    for first in (0, slots - 1000):
        moved = [rest[0], rest[1] + first, *rest[2:]]
        got = forward_op(q, *wide, *moved)
        for name, *values in zip(("out", "lse"), got, same, exact, strict=True):
            check_error(name, *values)
        grad_q, grad_k, grad_v = backward_op(grad_out, None, q, *wide, *got, *moved, True)
        check_same_gradient("grad_q", grad_q, small[0])
        for name, large, part in (("grad_k", grad_k, small[1]), ("grad_v", grad_v, small[2])):
            check_same_gradient(name, large[first : first + 1000], part)
            assert not large[slots // 2 - 1000 : slots // 2 + 1000].any()
        del grad_k, grad_v


# --- hosts that do not wait ------------------------------------------------------------------------------------------


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Any wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", sanitize.CALLS)
def test_no_operator_waits_for_the_device(name: str, request: pytest.FixtureRequest) -> None:
    missing = sanitize.missing(name)
    if missing:
        pytest.skip(missing)
    call = sanitize.CALLS[name].prepare()
    call()
    request.getfixturevalue("no_waiting")
    call()


def changed(arguments: list[Any], generator: torch.Generator) -> list[Any]:
    """Other values in tensors of the same shapes, row bounds included."""
    q, k, v, _, _, position, cos, sin, scale = arguments
    other_q, other_k, other_v = (torch.randn(x.shape, generator=generator).to(x) for x in (q, k, v))
    total, slots = q.shape[0], k.shape[0]
    one = position.numel() == 1
    bounds = torch.tensor([0, total] if one else [0, 1, total // 2, total], device=CUDA)
    ranges = torch.tensor([[slots // 3, slots], [5, 5], [0, slots // 2]][: position.numel()], device=CUDA)
    return [other_q, other_k, other_v, bounds, ranges, (position + 1) % 8, cos, sin, scale]


@needs_kernel
@pytest.mark.parametrize("lengths", [[1, 2, 1], [130, 70, 1], [6500]], ids=["few", "many", "one row"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 48)], ids=str)
def test_graph_replay_with_other_inputs(
    lengths: list[int], dtype: torch.dtype, size: int, generator: torch.Generator
) -> None:
    spec, _ = ragged(lengths, [300, 17, 2000][: len(lengths)], (8, 2), size)
    arguments = build(spec, dtype, CUDA, generator)
    static = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
    grad_out = torch.randn(static[0].shape, generator=generator).to(static[0])

    def run(values: list[Any]) -> list[Tensor]:
        out, lse = forward_op(*values)
        rest = (*values[:3], out, lse, *values[3:])
        both = (backward_op(grad_out, torch.ones_like(lse), *rest, need) for need in (True, False))
        return [out, lse, *(x for grads in both for x in grads if x.numel())]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(static)
    for values in (arguments, changed(arguments, generator), arguments):
        for target, value in zip(static, values, strict=True):
            if isinstance(target, Tensor):
                target.copy_(value)
        for x in results:
            x.fill_(torch.nan)
        graph.replay()
        want = run(values)
        assert all(map(torch.equal, results[:2], want[:2]))
        for x, y in zip(results[2:], want[2:], strict=True):
            check_same_gradient("grad", x, y)


@needs_kernel
def test_side_stream(generator: torch.Generator) -> None:
    for lengths in ([2, 1], [150, 20]):
        spec, _ = ragged(lengths, [3000, 67], (8, 2), 128)
        arguments = build(spec, torch.bfloat16, CUDA, generator)
        late = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
        for x in late[:3]:
            x.fill_(torch.nan)
        want = forward_op(*arguments)
        grads = backward_op(torch.ones_like(want[0]), None, *arguments[:3], *want, *arguments[3:], True)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            # the inputs arrive late on this stream: a kernel on another one would read NaN
            torch.cuda._sleep(20_000_000)
            for x, y in zip(late[:3], arguments[:3], strict=True):
                x.copy_(y)
            got = forward_op(*late)
            late_grads = backward_op(torch.ones_like(got[0]), None, *late[:3], *got, *late[3:], True)
        stream.synchronize()
        assert all(map(torch.equal, got, want))
        for x, y in zip(late_grads, grads, strict=True):
            check_same_gradient("grad", x, y)


def test_compile_with_the_default_backend(generator: torch.Generator) -> None:
    def block(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        out, lse = attend(2 * q, k, v, *rest)
        return out.float().sin().sum() + lse.clamp(min=0).sum()

    compiled = torch.compile(block, fullgraph=True)
    spec, _ = ragged([70, 9], [300, 17], (8, 2), 128)
    arguments = build(spec, torch.bfloat16, CUDA, generator)
    inputs = [[x.clone().requires_grad_() for x in arguments[:3]] for _ in range(2)]
    values = [f(*leaves, *arguments[3:]) for f, leaves in zip((compiled, block), inputs, strict=True)]
    # sums of some 80,000 numbers, in another order
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-3)
    for value in values:
        value.backward()
    for x, y in zip(*inputs, strict=True):
        check_same_gradient("grad", x.grad, y.grad)


@needs_kernel
def test_last_device(generator: torch.Generator) -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    spec, _ = ragged([70, 2], [300, 17], (8, 2), 128)
    arguments = build(spec, torch.bfloat16, device, generator)
    out, lse = attend(*arguments)
    here = [x.to(CUDA) if isinstance(x, Tensor) else x for x in arguments]
    assert out.device == device and all(
        torch.equal(x.cpu(), y.cpu()) for x, y in zip((out, lse), attend(*here), strict=True)
    )


@needs_kernel
@pytest.mark.parametrize("heads", [(7, 1), (6, 2), (10, 2)], ids=str)
@pytest.mark.parametrize("size", [64, 96, 128])
def test_queries_gradient_beside_those_of_the_slots(
    size: int, heads: tuple[int, int], generator: torch.Generator
) -> None:
    # Both kernels find the same dq. The one for all three sums it in memory in an order of its own, which depends on
    # the row of a query's head: odd groups and lengths, and rotations that end inside of its quads.
    for rotary in (size, 32, 34, 8, 2, 0):
        spec, owned = ragged([67, 1, 130, 33], [150, 31, 300, 129], heads, size, rotary)
        arguments = build(spec, torch.bfloat16, CUDA, generator)
        poison_outside(arguments, owned)
        out, lse = forward_op(*arguments)
        grad_out = torch.randn(out.shape, generator=generator).to(out)
        all_three, alone = (
            backward_op(grad_out, None, *arguments[:3], out, lse, *arguments[3:], need)[0] for need in (True, False)
        )
        check_same_gradient(f"dq, rotary {rotary}", all_three, alone)

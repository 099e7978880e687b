"""Injected attention: forward and backward against float64, hostile shapes, gradients, tracing, messages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sharedllm_ext import reference
from sharedllm_ext.ops import injected_attention as module_function
from sharedllm_ext.ops.injected_attention import _plain, _plain_backward, injected_attention
from tests.support import scale_last
from tests.tolerance import check_error, oracle

#: What the C++ kernels take; float16 in a CUDA kernel only.
CPU_DTYPES = (torch.float32, torch.bfloat16)
KERNEL_DTYPES = (*CPU_DTYPES, *((torch.float16,) if torch.cuda.is_available() else ()))
Spec = tuple[list[int], list[tuple[int, int]], int, int, int, int, int]
attend = scale_last(injected_attention)
forward_op: Callable[..., tuple[Tensor, Tensor]] = torch.ops.sharedllm.injected_attention
backward_op: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.sharedllm.injected_attention_backward

# queries of each row, slots of each row, number of slots, Hq, Hkv, D, R
CASES: dict[str, Spec] = {
    "ragged batch": ([5, 3, 1], [(0, 130), (7, 300), (300, 301)], 301, 8, 2, 64, 32),
    "rows share slots": ([40, 2, 30], [(0, 200), (50, 150), (97, 290)], 300, 4, 2, 32, 32),
    "row without queries": ([5, 0, 3], [(0, 13), (0, 5), (7, 30)], 31, 4, 2, 16, 16),
    "row without slots": ([5, 2, 3], [(0, 13), (4, 4), (7, 30)], 31, 4, 2, 16, 16),
    "only rows without slots": ([2, 3], [(0, 0), (0, 0)], 0, 4, 2, 16, 8),
    "no rows": ([], [], 9, 4, 2, 16, 8),
    "no queries": ([0, 0], [(0, 9), (3, 3)], 9, 4, 2, 16, 8),
    "one element": ([1], [(0, 1)], 1, 1, 1, 1, 0),
    "odd sizes": ([301, 7], [(1, 130), (100, 301)], 301, 3, 3, 33, 10),
    "no rotation": ([17], [(3, 100)], 100, 6, 2, 8, 0),
    "group of 7": ([19], [(0, 211)], 211, 7, 1, 24, 24),
    "few queries": ([1, 2, 1, 4, 0, 1], [(0, 1), (1, 4), (4, 37), (0, 300), (0, 9), (9, 9)], 300, 6, 2, 48, 48),
    "slots in parts": ([1, 3], [(0, 4099), (5, 3000)], 4100, 8, 2, 64, 64),
    "many panels": ([700], [(5, 611)], 612, 4, 2, 64, 64),
    "group of 300": ([2], [(0, 50)], 50, 300, 1, 16, 16),
    "head size 256": ([70], [(0, 200)], 200, 2, 1, 256, 128),
    # rows of equal range are computed together, each with its own position
    "rows of one memory": ([1] * 8, [(3, 1500)] * 8, 1500, 9, 3, 64, 64),
    "two rows of one memory": ([1, 1], [(5, 80)] * 2, 80, 8, 2, 64, 32),
    "ragged rows of three memories": (
        [1, 3, 2, 0, 1, 1, 5, 1, 2, 1, 1, 40],
        [
            (0, 99),
            (99, 320),
            (0, 99),
            (99, 320),
            (7, 7),
            (0, 300),
            (0, 99),
            (320, 320),
            (0, 300),
            (9, 9),
            (0, 99),
            (0, 99),
        ],
        320,
        4,
        2,
        40,
        24,
    ),
}


@pytest.fixture(params=KERNEL_DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    """Every dtype that the device has a kernel for."""
    if device.type == "cpu" and request.param not in CPU_DTYPES:
        pytest.skip(f"the CPU kernel does not take {request.param}")
    return request.param


def build(
    spec: Spec, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator, scale: float | None = None
) -> list[Any]:
    """Arguments of the operator."""
    lengths, ranges, slots, q_heads, kv_heads, size, rotary = spec
    angle = torch.arange(9).unsqueeze(1) * torch.logspace(0, -4, rotary // 2)
    tensors = [
        torch.randn(sum(lengths), q_heads, size, generator=generator).to(dtype),
        torch.randn(slots, kv_heads, size, generator=generator).to(dtype),
        torch.randn(slots, kv_heads, size, generator=generator).to(dtype),
        torch.tensor([0, *lengths]).cumsum(0),
        torch.tensor(ranges, dtype=torch.int64).view(-1, 2),
        torch.arange(len(lengths)) % 8 + 1,
        angle.cos(),
        angle.sin(),
    ]
    return [*(x.to(device) for x in tensors), size**-0.5 if scale is None else scale]


def problem(
    case: str, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator, scale: float | None = None
) -> list[Any]:
    """Arguments of the operator, by the case's name."""
    return build(CASES[case], dtype, device, generator, scale)


def check_same_gradient(name: str, got: Tensor, want: Tensor) -> None:
    """The same bits on the CPU; on CUDA sums over parts arrive in any order, which moves a few roundings."""
    assert got.shape == want.shape and got.dtype == want.dtype, name
    if got.device.type == "cpu":
        assert torch.equal(got, want), name
        return
    difference, size = (x.double().square().sum().sqrt() for x in (got.double() - want.double(), want))
    assert difference <= 8 * torch.finfo(got.dtype).eps * size, f"{name}: {difference:.3g} of {size:.3g}"


def compare(arguments: list[Any], generator: torch.Generator) -> None:
    """Forward and both kinds of backward against the oracle."""
    q, k, v, *rest = arguments
    out, lse = attend(*arguments)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert out.is_contiguous() and lse.is_contiguous()
    same_out, same_lse = _plain(*arguments)
    exact = oracle(arguments)
    exact_out, exact_lse = reference.injected_attention(*exact)
    check_error("out", out, same_out, exact_out)
    check_error("lse", lse, same_lse, exact_lse)

    grad_out = torch.randn(out.shape, generator=generator).to(out)
    some_lse = torch.randn(lse.shape, generator=generator).to(lse)
    for grad_lse in (None, some_lse):
        wide = None if grad_lse is None else grad_lse.double()
        want = reference.injected_attention_backward(
            grad_out.double(), wide, *exact[:3], exact_out, exact_lse, *exact[3:]
        )
        same = _plain_backward(grad_out, grad_lse, q, k, v, same_out, same_lse, *rest, True)
        got = backward_op(grad_out, grad_lse, q, k, v, out, lse, *rest, True)
        for name, *values in zip(("grad_q", "grad_k", "grad_v"), got, same, want, strict=True):
            check_error(name, *values)
        alone, no_k, no_v = backward_op(grad_out, grad_lse, q, k, v, out, lse, *rest, False)
        check_error("grad_q alone", alone, same[0], want[0])
        assert q.is_cuda or torch.equal(alone, got[0])
        assert no_k.shape == no_v.shape == (0,)


@pytest.mark.parametrize("case", CASES)
def test_error_against_float64(case: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    compare(problem(case, dtype, device, generator), generator)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.5])
def test_scales(scale: float, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    compare(problem("ragged batch", dtype, device, generator, scale), generator)


def test_scores_far_apart(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    # scores of some thousands: exponentials underflow, and the maximum keeps changing
    arguments = problem("slots in parts", dtype, device, generator, 100.0)
    out, lse = attend(*arguments)
    same_out, same_lse = _plain(*arguments)
    exact_out, exact_lse = reference.injected_attention(*oracle(arguments))
    check_error("out", out, same_out, exact_out)
    check_error("lse", lse, same_lse, exact_lse)


def test_strided_inputs(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    arguments = problem("odd sizes", dtype, device, generator)
    plain = attend(*arguments)
    for part in range(3):
        x = arguments[part]
        wide = torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 3), torch.nan, dtype=dtype, device=device)
        wide[:, 1:, 2:-1] = x
        for strided in (
            wide[:, 1:, 2:-1],
            x.transpose(0, 2).contiguous().transpose(0, 2),
            x.repeat(1, 1, 2)[..., : x.shape[2]],
        ):
            assert not strided.is_contiguous()
            changed = attend(*arguments[:part], strided, *arguments[part + 1 :])
            assert all(map(torch.equal, changed, plain))
    arguments[3:6] = [torch.stack((x, x), -1)[..., 0] for x in arguments[3:6]]
    arguments[6:8] = [x.t().contiguous().t() for x in arguments[6:8]]
    assert all(map(torch.equal, attend(*arguments), plain))


def test_strided_gradients(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    q, k, v, *rest = problem("ragged batch", dtype, device, generator)
    out, lse = forward_op(q, k, v, *rest)
    grad_out = torch.randn(out.shape, generator=generator).to(out)
    want = backward_op(grad_out, None, q, k, v, out, lse, *rest, True)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (grad_out, q, k, v, out, lse)]
    expanded = torch.ones((), dtype=dtype, device=device).expand(out.shape)
    dense = backward_op(expanded.contiguous(), None, q, k, v, out, lse, *rest, True)
    for name, *values in zip(
        ("grad_q", "grad_k", "grad_v"),
        backward_op(turned[0], None, *turned[1:], *rest, True),
        want,
        backward_op(expanded, None, q, k, v, out, lse, *rest, True),
        dense,
        strict=True,
    ):
        check_same_gradient(name, *values[:2])
        check_same_gradient(name, *values[2:])


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("case", ["ragged batch", "rows share slots", "slots in parts"])
def test_same_bits_with_any_number_of_threads(case: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    q, k, v, *rest = problem(case, dtype, "cpu", generator)
    grad_out = torch.randn(q.shape, generator=generator).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out, lse = forward_op(q, k, v, *rest)
            results.append((out, lse, *backward_op(grad_out, None, q, k, v, out, lse, *rest, True)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_rows_do_not_see_each_other(device: torch.device, generator: torch.Generator) -> None:
    q, k, v, cu_q, slot_range, position, cos, sin, scale = problem("ragged batch", torch.float32, device, generator)
    out, _ = attend(q, k, v, cu_q, slot_range, position, cos, sin, scale)
    single = torch.tensor([0, 3], device=device)
    alone, _ = attend(q[5:8], k, v, single, slot_range[1:2], position[1:2], cos, sin, scale)
    torch.testing.assert_close(out[5:8], alone, rtol=0, atol=1e-6)
    k[300:] = torch.nan  # the third row's memory
    again, _ = attend(q, k, v, cu_q, slot_range, position, cos, sin, scale)
    assert torch.equal(again[:8], out[:8]) and again[8:].isnan().all()


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 2, 64), (8, 9, 3, 64), (21, 4, 2, 33), (90, 6, 2, 32)], ids=str)
def test_rows_of_one_memory_are_one_row(
    shape: tuple[int, int, int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    # keys and values are then read once for all of them: the same bits as if the caller had given one row
    rows, q_heads, kv_heads, size = shape
    spec: Spec = ([1] * rows, [(2, 333)] * rows, 340, q_heads, kv_heads, size, 16)
    q, k, v, *rest = build(spec, dtype, "cpu", generator)
    rest[2] = torch.full((rows,), 5)
    one = [torch.tensor([0, rows]), torch.tensor([[2, 333]]), torch.tensor([5]), *rest[3:]]
    grad_out = torch.randn(q.shape, generator=generator).to(dtype)
    results = []
    for described in (rest, one):
        out, lse = forward_op(q, k, v, *described)
        results.append((out, lse, *backward_op(grad_out, lse, q, k, v, out, lse, *described, True)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 30])
def test_order_of_rows_does_not_matter(dtype: torch.dtype, length: int, generator: torch.Generator) -> None:
    ranges = [(0, 150), (150, 301), (7, 7), (0, 150), (20, 150)] * 4
    rows = len(ranges)
    q, k, v, cu_q, slot_range, position, *rest = build(
        ([length] * rows, ranges, 301, 6, 2, 32, 16), dtype, "cpu", generator
    )
    q, grad_out = q.unflatten(0, (rows, length)), torch.randn(q.shape, generator=generator).to(dtype)
    grad_out = grad_out.unflatten(0, (rows, length))

    def run(order: Tensor) -> list[Tensor]:
        described = (cu_q, slot_range[order], position[order], *rest)
        queries = q[order].flatten(0, 1)
        out, lse = forward_op(queries, k, v, *described)
        grads = backward_op(grad_out[order].flatten(0, 1), None, queries, k, v, out, lse, *described, True)
        by_row = [x.unflatten(0, (rows, length))[order.argsort()] for x in (out, lse, grads[0])]
        return [*by_row, *grads[1:]]

    straight, shuffled = run(torch.arange(rows)), run(torch.randperm(rows, generator=generator))
    same = oracle([q.flatten(0, 1), k, v, cu_q, slot_range, position, *rest])
    exact_out, exact_lse = reference.injected_attention(*same)
    plain_out, plain_lse = _plain(q.flatten(0, 1), k, v, cu_q, slot_range, position, *rest)
    check_error("out", shuffled[0].flatten(0, 1), plain_out, exact_out)
    check_error("lse", shuffled[1].flatten(0, 1), plain_lse, exact_lse)
    for name, *values in zip(("out", "lse", "grad_q", "grad_k", "grad_v"), shuffled, straight, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(*values, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("rows", [2, 5, 40])
def test_a_row_of_nan_leaves_the_rows_of_its_memory_alone(
    dtype: torch.dtype, rows: int, generator: torch.Generator
) -> None:
    q, k, v, *rest = build(([1] * rows, [(3, 200)] * rows, 204, 6, 2, 48, 16), dtype, "cpu", generator)
    k[:3] = v[:3] = k[200:] = v[200:] = torch.nan
    clean = forward_op(q, k, v, *rest)
    q[1] = torch.nan
    poisoned = forward_op(q, k, v, *rest)
    others = [row for row in range(rows) if row != 1]
    for got, want in zip(poisoned, clean, strict=True):
        assert want.isfinite().all() and torch.equal(got[others], want[others]) and got[1].isnan().all()


def test_infinite_scores(device: torch.device, generator: torch.Generator) -> None:
    q, k, v, *rest = problem("many panels", torch.float32, device, generator)
    q, k = q.abs(), k.abs()
    rest[-3].fill_(1)  # no rotation, so that the signs are known
    rest[-2].fill_(0)
    k[5:400, 0] = -torch.inf  # whole blocks of slots whose weight is 0
    v[5:400, 0] = 1e30
    out, lse = attend(q, k, v, *rest)
    want, want_lse = reference.injected_attention(q, k, v, *rest)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, want_lse)


# ends of a row's slots: every parity, next to an end of memory, one slot, on and across the blocks of 96 slots
SLOT_ENDS = (
    (0, 33),
    (0, 31),
    (3, 40),
    (5, 32),
    (2, 34),
    (5, 37),
    (33, 34),
    (34, 35),
    (95, 96),
    (96, 97),
    (32, 193),
    (95, 97),
    (1, 200),
    (7, 201),
)


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("ends", SLOT_ENDS, ids=str)
@pytest.mark.parametrize("queries", [1, 2, 43])
@pytest.mark.parametrize("shared", [False, True], ids=["unread", "read by others"])
def test_slots_outside_the_range_do_not_leak(
    dtype: torch.dtype, ends: tuple[int, int], queries: int, shared: bool, generator: torch.Generator
) -> None:
    begin, end = ends
    # three stacked queries for each: odd and even numbers, one panel and several
    lengths, ranges = [queries], [ends]
    if shared:
        lengths, ranges = [2, queries, 65], [(0, begin), ends, (end, 201)]
    spec: Spec = (lengths, ranges, 201, 6, 2, 16 if queries < 3 else 33, 16)
    q, k, v, *rest = build(spec, dtype, "cpu", generator)
    grad_out = torch.randn(q.shape, generator=generator).to(dtype)
    first = lengths[0] if shared else 0
    own, slots = slice(first, first + queries), slice(begin, end)
    parts = (own, own, own, slots, slots)
    memories = [(k, v)]
    for bad in (torch.nan, torch.inf, -torch.inf):
        bad_k, bad_v = k.clone(), v.clone()
        for x in (bad_k, bad_v):
            x[:begin] = x[end:] = bad
        memories += [(bad_k, v), (k, bad_v), (bad_k, bad_v)]
    results = []
    for memory in memories:
        out, lse = forward_op(q, *memory, *rest)
        grads = backward_op(grad_out, None, q, *memory, out, lse, *rest, True)
        alone, _, _ = backward_op(grad_out, None, q, *memory, out, lse, *rest, False)
        assert torch.equal(alone[own], grads[0][own])
        assert shared or not any(x[:begin].any() or x[end:].any() for x in grads[1:])
        results.append([x[part] for x, part in zip((out, lse, *grads), parts, strict=True)])
    assert all(x.isfinite().all() for x in results[0])
    for other in results[1:]:
        for name, *values in zip(("out", "lse", "grad_q", "grad_k", "grad_v"), other, results[0], strict=True):
            assert torch.equal(*values), name


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 2, 7, 15, 16, 63, 65])
def test_gradients_of_slots_whose_weight_is_zero(dtype: torch.dtype, queries: int, generator: torch.Generator) -> None:
    q, k, v, *rest = build(([queries], [(1, 120)], 121, 3, 3, 16, 0), dtype, "cpu", generator)
    q = q.abs()
    hidden = [1, 2, 50, 97, 119]
    k[hidden] = -torch.inf
    out, lse = forward_op(q, k, v, *rest)
    grad_out = torch.randn(q.shape, generator=generator).to(dtype)
    _, grad_k, grad_v = backward_op(grad_out, None, q, k, v, out, lse, *rest, True)
    for grad in (grad_k, grad_v):
        assert grad.isfinite().all() and not grad[hidden].any() and grad[3:50].any()


@pytest.mark.parametrize("case", ["row without slots", "rows share slots", "odd sizes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_autograd_equals_the_reference(
    case: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    arguments = problem(case, dtype, device, generator)
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 2e-2}[dtype]
    results = []
    for function in (attend, reference.injected_attention):
        inputs = [x.clone().requires_grad_() for x in arguments[:3]]
        out, lse = function(*inputs, *arguments[3:])
        finite = lse.isfinite()
        ((out.double() ** 2).sum() + lse[finite].double().sin().sum()).backward()
        results.append([x.grad for x in inputs])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_needed_gradients_only(device: torch.device, generator: torch.Generator) -> None:
    q, k, v, *rest = problem("ragged batch", torch.float32, device, generator)
    q.requires_grad_()
    out, lse = attend(q, k, v, *rest)
    (alone,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    (through_lse,) = torch.autograd.grad(lse.sum(), q)
    v.requires_grad_()
    out, lse = attend(q, k, v, *rest)
    grad_q, grad_v = torch.autograd.grad(out.sum(), (q, v))
    check_same_gradient("grad_q", alone, grad_q)
    assert grad_v.shape == v.shape
    assert through_lse.abs().max() > 0 and k.grad is None


def test_second_derivative_is_refused(device: torch.device, generator: torch.Generator) -> None:
    q, k, v, *rest = problem("ragged batch", torch.float32, device, generator)
    q.requires_grad_()
    (grad,) = torch.autograd.grad(attend(q, k, v, *rest)[0].sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="injected_attention: expected to be differentiated once"):
        grad.sum().backward()


@pytest.mark.parametrize("case", ["row without slots", "rows share slots"])
def test_gradcheck_of_the_reference(case: str, generator: torch.Generator) -> None:
    q, k, v, cu_q, slot_range, *rest = oracle(problem(case, torch.float32, "cpu", generator))
    q, k, v = (x[..., :4].clone().requires_grad_() for x in (q, k, v))
    rest[1:3] = [x[:, :2] for x in rest[1:3]]
    if case == "rows share slots":
        cu_q, slot_range = torch.tensor([0, 2, 4, 5]), torch.tensor([[0, 5], [2, 6], [1, 4]])
        q, k, v = (x.detach()[:count].clone().requires_grad_() for x, count in ((q, 5), (k, 6), (v, 6)))

    def finite(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = reference.injected_attention(*inputs, cu_q, slot_range, *rest)
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(finite, (q, k, v), fast_mode=True)
    out, lse = reference.injected_attention(q, k, v, cu_q, slot_range, *rest)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    want = torch.autograd.grad(out, (q, k, v), grad)
    got = reference.injected_attention_backward(
        grad, None, q.detach(), k.detach(), v.detach(), out.detach(), lse.detach(), cu_q, slot_range, *rest
    )
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("case", ["ragged batch", "row without slots", "no queries"])
def test_opcheck(case: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    q, k, v, *rest = problem(case, dtype, device, generator)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.sharedllm.injected_attention.default, (*leaves, *rest))
    torch.library.opcheck(torch.ops.sharedllm.injected_attention.default, (leaves[0], k, v, *rest))
    out, lse = forward_op(q, k, v, *rest)
    for grad_lse, need_grad_kv in ((None, True), (torch.ones_like(lse), False)):
        arguments = (torch.ones_like(out), grad_lse, q, k, v, out, lse, *rest, need_grad_kv)
        torch.library.opcheck(torch.ops.sharedllm.injected_attention_backward.default, arguments)


def test_compile(device: torch.device, generator: torch.Generator) -> None:
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for case in ("ragged batch", "rows share slots"):
        arguments = problem(case, torch.float32, device, generator)
        inputs = [[x.clone().requires_grad_() for x in arguments[:3]] for _ in range(2)]
        for function, leaves in zip((compiled, attend), inputs, strict=True):
            out, lse = function(*leaves, *arguments[3:])
            (out.sum() + lse.sum()).backward()
        for x, y in zip(*inputs, strict=True):
            check_same_gradient("grad", x.grad, y.grad)


def test_package_exports_the_function() -> None:
    assert module_function is injected_attention


NAMES = ("q", "k", "v", "cu_q", "slot_range", "q_position", "cos", "sin", "scale")

MISTAKES: list[tuple[str, Callable[[Tensor], Any], type[Exception], str]] = [
    ("q", lambda x: x[0], ValueError, r"q: expected shape \[T, Hq, D\], got \[8, 64\]"),
    ("q", lambda x: x.long(), TypeError, "q: expected dtype torch.float32 or .*, got torch.int64"),
    ("q", lambda x: x.tolist(), TypeError, "q: expected a tensor, got list"),
    ("q", lambda x: x[:, :7], ValueError, "q: expected a number of heads divisible by k's 2, got 7"),
    ("k", lambda x: x[..., 1:], ValueError, r"k: expected shape \[S, Hkv, 64\], got \[301, 2, 63\]"),
    ("k", lambda x: x.bfloat16(), TypeError, "k: expected dtype torch.float32, got torch.bfloat16"),
    ("k", lambda x: x.to("meta"), ValueError, "k: expected device .*, got meta"),
    ("v", lambda x: x[1:], ValueError, r"v: expected shape \[301, 2, 64\], got \[300, 2, 64\]"),
    ("v", lambda x: x.half(), TypeError, "v: expected dtype torch.float32, got torch.float16"),
    ("cu_q", lambda x: x[1:], ValueError, r"cu_q: expected shape \[4\], got \[3\]"),
    ("cu_q", lambda x: x.int(), TypeError, "cu_q: expected dtype torch.int64, got torch.int32"),
    ("slot_range", lambda x: x[:2], ValueError, r"slot_range: expected shape \[3, 2\], got \[2, 2\]"),
    ("slot_range", lambda x: x.float(), TypeError, "slot_range: expected dtype torch.int64, got torch.float32"),
    ("q_position", lambda x: x[:, None], ValueError, r"q_position: expected shape \[B\], got \[3, 1\]"),
    ("q_position", lambda x: x.float(), TypeError, "q_position: expected dtype torch.int64, got torch.float32"),
    ("cos", lambda x: x.repeat(1, 3), ValueError, r"sin: expected shape \[9, 48\], got \[9, 16\]"),
    ("cos", lambda x: x.double(), TypeError, "cos: expected dtype torch.float32, got torch.float64"),
    ("sin", lambda x: x[0], ValueError, r"sin: expected shape \[9, 16\], got \[16\]"),
]

VALUE_MISTAKES: list[tuple[str, list[Any], str]] = [
    ("cu_q", [1, 5, 8, 9], r"cu_q\[0\]: expected 0, got 1"),
    ("cu_q", [0, 5, 4, 9], r"cu_q\[2\]: expected at least cu_q\[1\] = 5, got 4"),
    ("cu_q", [0, 5, 8, 8], r"cu_q\[3\]: expected 9, got 8"),
    ("slot_range", [[0, 1], [5, 4], [0, 0]], r"slot_range\[1\]: expected 0 <= begin <= end <= 301, got \(5, 4\)"),
    ("slot_range", [[0, 1], [0, 0], [0, 302]], r"slot_range\[2\]: expected 0 <= begin <= end <= 301, got \(0, 302\)"),
    ("slot_range", [[-1, 1], [0, 0], [0, 0]], r"slot_range\[0\]: expected 0 <= begin <= end <= 301, got \(-1, 1\)"),
    ("q_position", [0, 9, 0], r"q_position\[1\]: expected 0 <= value < 9, got 9"),
    ("q_position", [0, 0, -1], r"q_position\[2\]: expected 0 <= value < 9, got -1"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), MISTAKES)
def test_mistakes(
    name: str,
    change: Callable[[Tensor], Any],
    error: type[Exception],
    message: str,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    arguments = dict(zip(NAMES, problem("ragged batch", torch.float32, device, generator), strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=message):
        injected_attention(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "values", "message"), VALUE_MISTAKES)
def test_value_mistakes_on_the_cpu(
    name: str, values: list[Any], message: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    arguments = dict(zip(NAMES, problem("ragged batch", dtype, "cpu", generator), strict=True))
    arguments[name] = torch.tensor(values)
    with pytest.raises(ValueError, match=message):
        injected_attention(**arguments)


def test_memory_that_does_not_suffice(device: torch.device, generator: torch.Generator) -> None:
    # views of one element each that the operator would have to copy
    arguments = build(CASES["one element"], torch.float32, device, generator)
    arguments[0] = torch.zeros(1, 1, 1, device=device).expand(2**46, 1, 1)
    arguments[3] = torch.tensor([0, 2**46], device=device)
    with pytest.raises(RuntimeError, match=r"out of memory: expected room for a tensor of shape \[\d+"):
        attend(*arguments)


def test_table_with_more_columns_than_half_the_head(device: torch.device, generator: torch.Generator) -> None:
    q, k, v, cu_q, slot_range, position, cos, sin, scale = problem("ragged batch", torch.float32, device, generator)
    with pytest.raises(ValueError, match="cos: expected at most D/2 = 32 columns, got 48"):
        attend(q, k, v, cu_q, slot_range, position, cos.repeat(1, 3), sin.repeat(1, 3), scale)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda x: x[1:], r"grad_out: expected shape \[9, 8, 64\], got \[8, 8, 64\]"),
        (0, lambda x: x.bfloat16(), "grad_out: expected dtype Float, got BFloat16"),
        (1, lambda x: x.double(), "grad_lse: expected dtype Float, got Double"),
        (5, lambda x: x[..., 1:], r"out: expected shape \[9, 8, 64\], got \[9, 8, 63\]"),
        (6, lambda x: x[:, 1:], r"lse: expected shape \[9, 8\], got \[9, 7\]"),
    ],
)
def test_mistakes_in_the_backward_operator(
    index: int, change: Callable[[Tensor], Tensor], message: str, generator: torch.Generator
) -> None:
    q, k, v, *rest = problem("ragged batch", torch.float32, "cpu", generator)
    out, lse = forward_op(q, k, v, *rest)
    arguments = [torch.ones_like(out), torch.ones_like(lse), q, k, v, out, lse, *rest, True]
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match=message):
        backward_op(*arguments)

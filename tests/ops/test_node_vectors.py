"""Node vectors: against float64 and the reference, hostile shapes, gradients, tracing, messages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sharedllm_ext import reference
from sharedllm_ext.ops import node_vectors as exported
from sharedllm_ext.ops.node_vectors import _plain, node_vectors

KERNEL_DTYPES = (torch.float32, torch.bfloat16)

# (start, length) of each node, tokens, Hq, Hkv, D, R, rows of the tables
CASES = {
    "nodes of one chunk": ([(0, 512), (512, 512), (512, 256), (768, 256)], 1024, 4, 2, 64, 64, 512),
    "overlapping": ([(3, 130), (0, 200), (199, 1), (50, 65), (50, 64), (50, 63)], 200, 8, 2, 32, 16, 300),
    "empty nodes": ([(0, 0), (5, 7), (12, 0), (4, 0)], 12, 4, 2, 16, 16, 7),
    "only empty nodes": ([(0, 0), (0, 0)], 0, 4, 2, 16, 8, 4),
    "no nodes": ([], 12, 4, 2, 16, 8, 4),
    "empty tables": ([(0, 0)], 3, 2, 1, 8, 4, 0),
    "one element": ([(0, 1)], 1, 1, 1, 1, 0, 1),
    "odd sizes": ([(0, 77), (7, 31)], 77, 3, 3, 33, 10, 80),
    "group of 7": ([(0, 129), (1, 128)], 129, 7, 1, 24, 24, 129),
    "no rotation": ([(2, 9)], 12, 6, 2, 8, 0, 9),
}


def problem(
    case: str, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator, scale: float | None = None
) -> list[Any]:
    """Arguments of the operator."""
    spans, tokens, q_heads, kv_heads, size, rotary, rows = CASES[case]
    angle = torch.arange(rows).unsqueeze(1) * torch.logspace(0, -4, rotary // 2)
    tensors = [
        torch.randn(len(spans), q_heads, size, generator=generator).to(dtype),
        torch.randn(tokens, kv_heads, size, generator=generator).to(dtype),
        torch.randn(tokens, kv_heads, size, generator=generator).to(dtype),
        torch.tensor(spans, dtype=torch.int64).view(-1, 2),
        angle.cos(),
        angle.sin(),
    ]
    return [*(x.to(device) for x in tensors), size**-0.5 if scale is None else scale]


def oracle(arguments: list[Any]) -> list[Any]:
    """The same arguments in float64."""
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]


def compare(arguments: list[Any]) -> None:
    """Root mean square error at most twice that of the same-dtype expression; the worst element, one draw, four times.

    Four float32 roundings are allowed where the other expression happens to be exact.
    """
    out = node_vectors(*arguments)
    exact = reference.node_vectors(*oracle(arguments))
    assert out.dtype == arguments[0].dtype and out.shape == exact.shape and out.is_contiguous()
    assert not out.isnan().any()
    if out.numel():
        floor = 4 * torch.finfo(torch.float32).eps * max(1.0, exact.abs().max().item())
        for same in (reference.node_vectors(*arguments), _plain(*arguments)):
            error, other = out.double() - exact, same.double() - exact
            assert error.square().mean().sqrt() <= 2 * other.square().mean().sqrt() + floor
            assert error.abs().max() <= 4 * other.abs().max() + floor


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_error_against_float64(case: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    compare(problem(case, dtype, device, generator))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.3, 10.0])
def test_scales(scale: float, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    compare(problem("overlapping", dtype, device, generator, scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    arguments = problem("overlapping", dtype, device, generator)
    torch.testing.assert_close(node_vectors(*arguments), reference.node_vectors(*arguments))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_plain_path(case: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    arguments = problem(case, dtype, device, generator)
    torch.testing.assert_close(_plain(*arguments), reference.node_vectors(*arguments))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_strided_inputs(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    arguments = problem("odd sizes", dtype, device, generator)
    want = node_vectors(*arguments)
    for part in range(3):
        x = arguments[part]
        wide = torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 3), torch.nan, dtype=dtype, device=device)
        wide[:, 1:, 2:-1] = x
        for strided in (wide[:, 1:, 2:-1], x.transpose(0, 2).contiguous().transpose(0, 2)):
            assert not strided.is_contiguous()
            assert torch.equal(node_vectors(*arguments[:part], strided, *arguments[part + 1 :]), want)
    arguments[3:6] = [x.t().contiguous().t() for x in arguments[3:6]]
    assert torch.equal(node_vectors(*arguments), want)


def test_many_nodes(device: torch.device, generator: torch.Generator) -> None:
    count = 70001  # more than a grid dimension of 65535 holds
    q = torch.randn(count, 2, 4, generator=generator).to(device)
    k, v = (torch.randn(count, 1, 4, generator=generator).to(device) for _ in range(2))
    start = torch.randperm(count, generator=generator).to(device)
    spans = torch.stack((start, torch.ones_like(start)), -1)
    table = torch.ones(1, 2, device=device)
    # one token: its value, whatever the scores are
    torch.testing.assert_close(node_vectors(q, k, v, spans, table, 0 * table, 0.5), v[start].expand(-1, 2, -1))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_same_bits_with_any_number_of_threads(dtype: torch.dtype, generator: torch.Generator) -> None:
    arguments = problem("overlapping", dtype, "cpu", generator)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(node_vectors(*arguments))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_tokens_outside_the_node_do_not_count(device: torch.device, generator: torch.Generator) -> None:
    q, k, v, spans, *rest = problem("overlapping", torch.float32, device, generator)
    want = node_vectors(q, k, v, spans, *rest)
    k[:50], v[:50] = torch.nan, torch.nan
    out = node_vectors(q, k, v, spans, *rest)
    assert torch.equal(out[2:], want[2:]) and out[:2].isnan().all()


@pytest.mark.parametrize("case", ["overlapping", "empty nodes", "no nodes", "odd sizes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autograd_equals_the_reference(
    case: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    arguments = problem(case, dtype, device, generator)
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    results = []
    for function in (node_vectors, reference.node_vectors):
        inputs = [x.clone().requires_grad_() for x in arguments[:3]]
        (function(*inputs, *arguments[3:]).double() ** 2).sum().backward()
        results.append([torch.zeros_like(x) if x.grad is None else x.grad for x in inputs])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_empty_nodes_have_zero_gradients(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    arguments = problem("only empty nodes", dtype, device, generator)
    inputs = [x.requires_grad_() for x in arguments[:3]]
    node_vectors(*arguments).sum().backward()
    assert all(x.grad is not None and torch.equal(x.grad, torch.zeros_like(x)) for x in inputs)


def test_second_derivative_is_refused(device: torch.device, generator: torch.Generator) -> None:
    q, *rest = problem("overlapping", torch.float32, device, generator)
    q.requires_grad_()
    (grad,) = torch.autograd.grad(node_vectors(q, *rest).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="node_vectors: expected to be differentiated once"):
        grad.sum().backward()


def test_gradcheck_of_the_reference(generator: torch.Generator) -> None:
    q, k, v, *rest = oracle(problem("empty nodes", torch.float32, "cpu", generator))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: reference.node_vectors(*x, *rest), leaves, fast_mode=True)


@pytest.mark.parametrize("case", ["overlapping", "empty nodes", "no nodes"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_opcheck(case: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    q, k, v, *rest = problem(case, dtype, device, generator)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.sharedllm.node_vectors.default, (*leaves, *rest))
    torch.library.opcheck(torch.ops.sharedllm.node_vectors_backward.default, (torch.ones_like(q), q, k, v, *rest))


def test_compile(device: torch.device, generator: torch.Generator) -> None:
    compiled = torch.compile(node_vectors, fullgraph=True, backend="aot_eager")
    for case in ("overlapping", "empty nodes"):
        arguments = problem(case, torch.float32, device, generator)
        inputs = [[x.clone().requires_grad_() for x in arguments[:3]] for _ in range(2)]
        for function, leaves in zip((compiled, node_vectors), inputs, strict=True):
            function(*leaves, *arguments[3:]).sum().backward()
        for x, y in zip(*inputs, strict=True):
            assert torch.equal(x.grad, y.grad)


def test_package_exports_the_function() -> None:
    assert exported is node_vectors


NAMES = ("q", "k", "v", "spans", "cos", "sin", "scale")

MISTAKES: list[tuple[str, Callable[[Tensor], Any], type[Exception], str]] = [
    ("q", lambda x: x[0], ValueError, r"q: expected shape \[N, Hq, D\], got \[8, 32\]"),
    ("q", lambda x: x.long(), TypeError, "q: expected dtype torch.float32 or .*, got torch.int64"),
    ("q", lambda x: x[:, :7], ValueError, "q: expected a number of heads divisible by k's 2, got 7"),
    ("q", lambda x: None, TypeError, "q: expected a tensor, got NoneType"),
    ("k", lambda x: x[..., 1:], ValueError, r"k: expected shape \[T, Hkv, 32\], got \[200, 2, 31\]"),
    ("k", lambda x: x[:, :0], ValueError, r"v: expected shape \[200, 0, 32\], got \[200, 2, 32\]"),
    ("v", lambda x: x.bfloat16(), TypeError, "v: expected dtype torch.float32, got torch.bfloat16"),
    ("v", lambda x: x.to("meta"), ValueError, "v: expected device .*, got meta"),
    ("spans", lambda x: x[1:], ValueError, r"spans: expected shape \[6, 2\], got \[5, 2\]"),
    ("spans", lambda x: x.int(), TypeError, "spans: expected dtype torch.int64, got torch.int32"),
    ("cos", lambda x: x.bfloat16(), TypeError, "cos: expected dtype torch.float32, got torch.bfloat16"),
    ("sin", lambda x: x[1:], ValueError, r"sin: expected shape \[300, 8\], got \[299, 8\]"),
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
    arguments = dict(zip(NAMES, problem("overlapping", torch.float32, device, generator), strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=message):
        node_vectors(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("span", [(-1, 2), (0, -1), (190, 11), (0, 301), (2**62, 2**62)])
def test_spans_outside_the_tokens(span: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    arguments = dict(zip(NAMES, problem("overlapping", dtype, "cpu", generator), strict=True))
    arguments["spans"][4] = torch.tensor(span)
    expected = r"start >= 0, 0 <= length <= 300 and start \+ length <= 200"
    message = rf"spans\[4\]: expected {expected}, got \({span[0]}, {span[1]}\)"
    with pytest.raises(ValueError, match=message):
        node_vectors(**arguments)

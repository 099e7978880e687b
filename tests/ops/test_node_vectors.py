"""Node vectors: against float64 and the reference, hostile shapes, gradients, tracing, messages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sharedllm_ext import ops, reference
from sharedllm_ext.ops.node_vectors import _plain, _tree_plain, node_vectors, tree_node_vectors
from tests.support import needs_cuda, scale_last
from tests.tolerance import check_error, oracle

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
attend, attend_tree = scale_last(node_vectors), scale_last(tree_node_vectors)

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
    # sizes of the kernel with tensor cores
    "llama heads": ([(0, 100), (100, 77), (3, 1), (9, 0), (20, 180)], 200, 32, 8, 128, 128, 200),
    "group of 7, D 128": ([(0, 333), (55, 256)], 400, 14, 2, 128, 128, 400),
    "group of 16": ([(0, 133), (55, 56)], 200, 32, 2, 128, 64, 200),
    "D 96": ([(0, 133), (55, 56), (1, 2)], 200, 4, 4, 96, 96, 200),
    "D 256, group of 12": ([(0, 133), (55, 56), (1, 2)], 200, 24, 2, 256, 64, 200),
    "one long node among short ones": ([(0, 3000), *((13 * i, i % 37) for i in range(40))], 3000, 4, 2, 64, 64, 3000),
}

# roots (start, length), tokens, Hq, Hkv, D, R, rows of the tables, levels
TREES = {
    "chunks": ([(0, 256), (256, 256), (512, 200)], 712, 8, 2, 64, 64, 128, 2),
    "one level": ([(3, 65), (0, 64)], 70, 4, 2, 16, 8, 40, 1),
    "llama heads": ([(0, 256), (256, 77)], 333, 32, 8, 128, 128, 128, 2),
    "deep": ([(0, 129), (129, 3), (1, 1), (5, 0), (7, 31)], 140, 6, 2, 96, 48, 65, 4),
    "odd sizes": ([(0, 77), (7, 31)], 77, 3, 3, 33, 10, 39, 3),
    "group of 7": ([(0, 129)], 129, 14, 2, 128, 128, 65, 2),
    "empty roots": ([(0, 0), (9, 0)], 9, 2, 1, 64, 64, 1, 2),
    "no roots": ([], 9, 2, 1, 64, 64, 1, 2),
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


def tree_problem(case: str, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator) -> list[Any]:
    """Arguments of the operator on trees."""
    spans, tokens, q_heads, kv_heads, size, rotary, rows, levels = TREES[case]
    angle = torch.arange(rows).unsqueeze(1) * torch.logspace(0, -4, rotary // 2)
    tensors = [
        torch.randn(len(spans), 2**levels, q_heads, size, generator=generator).to(dtype),
        torch.randn(tokens, kv_heads, size, generator=generator).to(dtype),
        torch.randn(tokens, kv_heads, size, generator=generator).to(dtype),
        torch.tensor(spans, dtype=torch.int64).view(-1, 2),
        angle.cos(),
        angle.sin(),
    ]
    return [*(x.to(device) for x in tensors), levels, size**-0.5]


def compare(arguments: list[Any], name: str = "node_vectors") -> None:
    """Against float64, beside two expressions of the same dtype."""
    out = scale_last(getattr(ops, name))(*arguments)
    exact = getattr(reference, name)(*oracle(arguments))
    assert out.dtype == arguments[0].dtype and out.is_contiguous()
    plain = {"node_vectors": _plain, "tree_node_vectors": _tree_plain}[name]
    for other in (getattr(reference, name), plain):
        check_error(name, out, other(*arguments), exact)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_error_against_float64(case: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    compare(problem(case, dtype, device, generator))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.3, 10.0])
def test_scales(scale: float, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    compare(problem("overlapping", dtype, device, generator, scale))


@pytest.mark.parametrize("case", TREES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_trees(case: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    compare(tree_problem(case, dtype, device, generator), "tree_node_vectors")


@pytest.mark.parametrize("case", ["chunks", "odd sizes"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_trees_of_other_dtypes(case: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    arguments = tree_problem(case, dtype, device, generator)
    torch.testing.assert_close(attend_tree(*arguments), reference.tree_node_vectors(*arguments))


def test_nodes_of_a_tree(generator: torch.Generator) -> None:
    nodes, leaf = reference.tree_nodes(torch.tensor([[10, 7]]), 2)
    assert nodes.tolist() == [[[10, 3], [13, 4], [10, 1], [11, 2], [13, 2], [15, 2]]]
    assert leaf.tolist() == [1, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autograd_of_trees(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    arguments = tree_problem("deep", dtype, device, generator)
    results = []
    for function in (attend_tree, reference.tree_node_vectors):
        inputs = [x.clone().requires_grad_() for x in arguments[:3]]
        (function(*inputs, *arguments[3:]) ** 2).sum().backward()
        results.append([x.grad for x in inputs])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    arguments = problem("overlapping", dtype, device, generator)
    torch.testing.assert_close(attend(*arguments), reference.node_vectors(*arguments))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_plain_path(case: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    arguments = problem(case, dtype, device, generator)
    torch.testing.assert_close(_plain(*arguments), reference.node_vectors(*arguments))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_strided_inputs(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    arguments = problem("odd sizes", dtype, device, generator)
    want = attend(*arguments)
    for part in range(3):
        x = arguments[part]
        wide = torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 3), torch.nan, dtype=dtype, device=device)
        wide[:, 1:, 2:-1] = x
        for strided in (wide[:, 1:, 2:-1], x.transpose(0, 2).contiguous().transpose(0, 2)):
            assert not strided.is_contiguous()
            assert torch.equal(attend(*arguments[:part], strided, *arguments[part + 1 :]), want)
    arguments[3:6] = [x.t().contiguous().t() for x in arguments[3:6]]
    assert torch.equal(attend(*arguments), want)


def test_many_nodes(device: torch.device, generator: torch.Generator) -> None:
    count = 70001  # more than a grid dimension of 65535 holds
    q = torch.randn(count, 2, 4, generator=generator).to(device)
    k, v = (torch.randn(count, 1, 4, generator=generator).to(device) for _ in range(2))
    start = torch.randperm(count, generator=generator).to(device)
    spans = torch.stack((start, torch.ones_like(start)), -1)
    table = torch.ones(1, 2, device=device)
    # one token: its value, whatever the scores are
    torch.testing.assert_close(attend(q, k, v, spans, table, 0 * table, 0.5), v[start].expand(-1, 2, -1))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_same_bits_with_any_number_of_threads(dtype: torch.dtype, generator: torch.Generator) -> None:
    arguments = problem("overlapping", dtype, "cpu", generator)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(attend(*arguments))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_tokens_outside_the_node_do_not_count(device: torch.device, generator: torch.Generator) -> None:
    q, k, v, spans, *rest = problem("overlapping", torch.float32, device, generator)
    want = attend(q, k, v, spans, *rest)
    k[:50], v[:50] = torch.nan, torch.nan
    out = attend(q, k, v, spans, *rest)
    assert torch.equal(out[2:], want[2:]) and out[:2].isnan().all()


@pytest.mark.parametrize("case", ["overlapping", "empty nodes", "no nodes", "odd sizes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autograd_equals_the_reference(
    case: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    arguments = problem(case, dtype, device, generator)
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    results = []
    for function in (attend, reference.node_vectors):
        inputs = [x.clone().requires_grad_() for x in arguments[:3]]
        (function(*inputs, *arguments[3:]).double() ** 2).sum().backward()
        results.append([torch.zeros_like(x) if x.grad is None else x.grad for x in inputs])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_empty_nodes_have_zero_gradients(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    arguments = problem("only empty nodes", dtype, device, generator)
    inputs = [x.requires_grad_() for x in arguments[:3]]
    attend(*arguments).sum().backward()
    assert all(x.grad is not None and torch.equal(x.grad, torch.zeros_like(x)) for x in inputs)


def test_second_derivative_is_refused(device: torch.device, generator: torch.Generator) -> None:
    q, *rest = problem("overlapping", torch.float32, device, generator)
    q.requires_grad_()
    (grad,) = torch.autograd.grad(attend(q, *rest).sum(), q, create_graph=True)
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


@pytest.mark.parametrize("case", ["chunks", "no roots"])
def test_opcheck_of_trees(case: str, device: torch.device, generator: torch.Generator) -> None:
    q, k, v, *rest = tree_problem(case, torch.float32, device, generator)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.sharedllm.tree_node_vectors.default, (*leaves, *rest))


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_cuda_never_waits(dtype: torch.dtype, generator: torch.Generator) -> None:
    plain, tree = (
        make(case, dtype, "cuda", generator) for make, case in ((problem, "overlapping"), (tree_problem, "chunks"))
    )
    leaves = [[x.requires_grad_() for x in arguments[:3]] for arguments in (plain, tree)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for function, arguments, inputs in zip((attend, attend_tree), (plain, tree), leaves, strict=True):
            out = function(*arguments)
            torch.autograd.grad(out, inputs, torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_cuda_graph_and_same_bits(generator: torch.Generator) -> None:
    for function, arguments in (
        (attend, problem("one long node among short ones", torch.bfloat16, "cuda", generator)),
        (attend_tree, tree_problem("llama heads", torch.bfloat16, "cuda", generator)),
    ):
        want = function(*arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = function(*arguments)
        for _ in range(3):
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out, want)


@needs_cuda
def test_wild_spans_stay_inside_on_cuda(generator: torch.Generator) -> None:
    arguments = problem("llama heads", torch.bfloat16, "cuda", generator)
    want = attend(*arguments)
    arguments[3][0] = torch.tensor([-5, 2**62])
    arguments[3][1] = torch.tensor([2**62, 2**62])
    out = attend(*arguments)
    # the others' results do not change but for rounding, as work is dealt out anew
    torch.testing.assert_close(out[2:], want[2:])
    assert not out.isnan().any() and (out[1] == 0).all()


def test_compile(device: torch.device, generator: torch.Generator) -> None:
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for case in ("overlapping", "empty nodes"):
        arguments = problem(case, torch.float32, device, generator)
        inputs = [[x.clone().requires_grad_() for x in arguments[:3]] for _ in range(2)]
        for function, leaves in zip((compiled, attend), inputs, strict=True):
            function(*leaves, *arguments[3:]).sum().backward()
        for x, y in zip(*inputs, strict=True):
            assert torch.equal(x.grad, y.grad)


def test_package_exports_the_functions() -> None:
    assert ops.node_vectors is node_vectors and ops.tree_node_vectors is tree_node_vectors


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


TREE_MISTAKES: list[tuple[str, Callable[[Any], Any], type[Exception], str]] = [
    ("q", lambda x: x[:, 1:], ValueError, r"q: expected shape \[n, 4, Hq, D\], got \[3, 3, 8, 64\]"),
    ("q", lambda x: x[:, :, :7], ValueError, "q: expected a number of heads divisible by k's 2, got 7"),
    ("k", lambda x: x[..., 1:], ValueError, r"k: expected shape \[T, Hkv, 64\], got \[712, 2, 63\]"),
    ("v", lambda x: x.bfloat16(), TypeError, "v: expected dtype torch.float32, got torch.bfloat16"),
    ("spans", lambda x: x[1:], ValueError, r"spans: expected shape \[3, 2\], got \[2, 2\]"),
    ("cos", lambda x: x.bfloat16(), TypeError, "cos: expected dtype torch.float32, got torch.bfloat16"),
    ("levels", lambda x: 0, ValueError, "levels: expected 1 to 20, got 0"),
    ("levels", lambda x: 21, ValueError, "levels: expected 1 to 20, got 21"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), TREE_MISTAKES)
def test_mistakes_with_trees(
    name: str,
    change: Callable[[Any], Any],
    error: type[Exception],
    message: str,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    names = (*NAMES[:-1], "levels", "scale")
    arguments = dict(zip(names, tree_problem("chunks", torch.float32, device, generator), strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=message):
        tree_node_vectors(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_roots_longer_than_the_tables(dtype: torch.dtype, generator: torch.Generator) -> None:
    arguments = tree_problem("chunks", dtype, "cpu", generator)
    arguments[3][1, 1] = 257
    message = r"spans\[1\]: expected start >= 0, 0 <= length <= 256 and start \+ length <= 712, got \(256, 257\)"
    with pytest.raises(ValueError, match=message):
        attend_tree(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("span", [(-1, 2), (0, -1), (190, 11), (0, 301), (2**62, 2**62)])
def test_spans_outside_the_tokens(span: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    arguments = dict(zip(NAMES, problem("overlapping", dtype, "cpu", generator), strict=True))
    arguments["spans"][4] = torch.tensor(span)
    expected = r"start >= 0, 0 <= length <= 300 and start \+ length <= 200"
    message = rf"spans\[4\]: expected {expected}, got \({span[0]}, {span[1]}\)"
    with pytest.raises(ValueError, match=message):
        node_vectors(**arguments)

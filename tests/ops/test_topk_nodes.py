"""Top-k node retrieval: against the reference and float64, ties, NaN, ragged groups, gradients, messages."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sharedllm_ext import reference
from sharedllm_ext.ops.topk_nodes import topk_nodes
from tests.support import needs_cuda
from tests.tolerance import check_error

KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def problem(
    sizes: list[int], d: int, queries: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random queries, nodes, cumulative group sizes and each group's query."""
    cu_groups = torch.tensor([0, *sizes]).cumsum(0)
    query = torch.randn(queries, d, generator=generator).to(dtype)
    nodes = torch.randn(sum(sizes), d, generator=generator).to(dtype)
    group_query = torch.randint(0, queries, (len(sizes),), generator=generator)
    return query.to(device), nodes.to(device), cu_groups.to(device), group_query.to(device)


def compare(arguments: tuple[Tensor, Tensor, Tensor, Tensor], k: int, valid: Tensor | None = None) -> None:
    """Error of the similarities at most twice that of the same-dtype expression; indices as good as the oracle's."""
    queries, nodes, cu_groups, group_query = arguments
    indices, similarity = topk_nodes(*arguments, k, valid)
    _, same = reference.topk_nodes(*arguments, k, valid)
    oracle_indices, oracle = reference.topk_nodes(queries.double(), nodes.double(), cu_groups, group_query, k, valid)
    assert indices.dtype == torch.int64 and similarity.dtype == torch.float32
    assert indices.shape == similarity.shape == (cu_groups.numel() - 1, k)
    assert torch.equal(indices < 0, oracle_indices < 0)
    found = indices >= 0
    assert (similarity[~found] == -torch.inf).all()
    if not found.any():
        return
    # rank by rank: a swap of two nodes that rounding made equal changes the values no more than rounding does
    check_error("similarity", similarity[found], same[found], oracle[found], worst=2)
    owner = torch.arange(len(found), device=found.device).unsqueeze(1).expand_as(found)[found]
    assert (cu_groups[owner] <= indices[found]).all() and (indices[found] < cu_groups[owner + 1]).all()
    exact = torch.nn.functional.cosine_similarity(
        queries[group_query[owner]].double(), nodes[indices[found]].double(), dim=-1
    )
    rounding = (same.double() - oracle)[found]
    check_error("similarity of the indices", similarity[found], exact + rounding, exact, worst=2)
    if valid is not None:
        assert valid[indices[found]].all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("d", [1, 15, 16, 17, 64, 100, 257])
@pytest.mark.parametrize("k", [0, 1, 2, 7])
def test_ragged_groups(dtype: torch.dtype, d: int, k: int, device: torch.device, generator: torch.Generator) -> None:
    arguments = problem([2, 0, 1, 7, 33, 0, 2, 3], d, 4, generator, dtype, device)
    compare(arguments, k)
    compare(arguments, k, (torch.rand(48, generator=generator) < 0.6).to(device))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_siblings_and_documents(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    compare(problem([2] * 129, 512, 3, generator, dtype, device), 1)
    compare(problem([700, 1500], 96, 2, generator, dtype, device), 64)
    compare(problem([3000], 64, 1, generator, dtype, device), 3000)


def test_more_than_65535_groups(device: torch.device, generator: torch.Generator) -> None:
    compare(problem([2] * 70001, 8, 3, generator, torch.float32, device), 1)
    compare(problem([140001], 8, 1, generator, torch.float32, device), 5)


@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("k", [1, 3])
def test_nothing_to_find(dtype: torch.dtype, k: int, device: torch.device, generator: torch.Generator) -> None:
    for sizes, d, queries in (([], 8, 2), ([], 8, 0), ([0, 0], 8, 1), ([1], 8, 1), ([2, 2], 0, 1)):
        arguments = problem(sizes, d, max(queries, 1), generator, dtype, device)
        valid = torch.zeros(sum(sizes), dtype=torch.bool, device=device)
        indices, similarity = topk_nodes(*arguments, k, valid)
        assert (indices == -1).all() and (similarity == -torch.inf).all()
        assert indices.shape == similarity.shape == (len(sizes), k)
    indices, similarity = topk_nodes(*problem([3], 0, 1, generator, dtype, device), k)
    assert indices.tolist() == [list(range(k))] and (similarity == 0).all()


@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 5, 300])
def test_lower_index_first_among_equals(dtype: torch.dtype, k: int, device: torch.device) -> None:
    # 40 copies of seven directions, and zeros of both signs, which are equal too
    nodes = torch.eye(7, 16).repeat(40, 1)
    nodes[3::11] = 0
    nodes[5::13] *= -1
    query = torch.tensor([[3.0, 2, 2, 0, 1, 1, 0] + [0] * 9])
    arguments = (
        query.to(dtype).to(device),
        nodes.to(dtype).to(device),
        torch.tensor([0, 100, 100, 280], device=device),
        torch.zeros(3, dtype=torch.int64, device=device),
    )
    indices, similarity = topk_nodes(*arguments, k)
    want_indices, want = reference.topk_nodes(*arguments, k)
    assert torch.equal(indices, want_indices)
    torch.testing.assert_close(similarity, want)
    assert (indices[1] == -1).all()


@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float16, torch.float64])
def test_nan_ranks_last(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    queries, nodes, cu_groups, group_query = problem([5, 3, 2], 20, 1, generator, dtype, device)
    nodes[1, 3] = torch.nan
    nodes[5:8, 0] = torch.nan
    valid = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 0, 1], dtype=torch.bool, device=device)
    indices, similarity = topk_nodes(queries, nodes, cu_groups, group_query, 4, valid)
    assert indices[0, 3] == 1 and similarity[0, 3].isnan()
    assert not similarity[0, :3].isnan().any()
    assert indices[1].tolist() == [5, 6, 7, -1] and similarity[1, :3].isnan().all()
    assert indices[2].tolist() == [9, -1, -1, -1]
    best, _ = topk_nodes(queries, nodes, cu_groups, group_query, 1, valid)
    assert torch.equal(best, indices[:, :1])
    queries[0, 0] = torch.nan
    indices, similarity = topk_nodes(queries, nodes, cu_groups, group_query, 2)
    assert indices.tolist() == [[0, 1], [5, 6], [8, 9]] and similarity.isnan().all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_zero_vectors(dtype: torch.dtype, device: torch.device) -> None:
    nodes = torch.zeros(3, 8, dtype=dtype, device=device)
    nodes[1] = 1
    cu_groups, group_query = torch.tensor([0, 3], device=device), torch.tensor([0], device=device)
    indices, similarity = topk_nodes(torch.ones_like(nodes[:1]), nodes, cu_groups, group_query, 3)
    assert indices.tolist() == [[1, 0, 2]] and similarity[0, 1:].tolist() == [0, 0]
    indices, similarity = topk_nodes(torch.zeros_like(nodes[:1]), nodes, cu_groups, group_query, 3)
    assert indices.tolist() == [[0, 1, 2]] and similarity.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_not_contiguous(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    queries, nodes, cu_groups, group_query = problem([4, 3], 33, 2, generator, dtype, device)
    valid = torch.tensor([1, 0, 1, 1, 1, 1, 0], dtype=torch.bool, device=device)
    want = topk_nodes(queries, nodes, cu_groups, group_query, 2, valid)
    padded = torch.nn.functional.pad(nodes, (0, 7))[:, :33]
    for strided in (nodes.T.contiguous().T, padded, nodes.repeat(2, 1).as_strided(nodes.shape, (33, 1))):
        got = topk_nodes(
            queries.T.contiguous().T,
            strided,
            cu_groups.repeat_interleave(2)[::2],
            group_query.repeat_interleave(3)[::3],
            2,
            valid.repeat_interleave(2)[::2],
        )
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_threads_change_nothing(dtype: torch.dtype, generator: torch.Generator) -> None:
    arguments = problem([2] * 300 + [900], 130, 3, generator, dtype, torch.device("cpu"))
    want = topk_nodes(*arguments, 3)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            got = topk_nodes(*arguments, 3)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    finally:
        torch.set_num_threads(threads)


def gradients(
    function: Callable[..., tuple[Tensor, Tensor]], arguments: tuple[Tensor, ...], weight: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    queries, nodes = (x.detach().clone().requires_grad_() for x in arguments[:2])
    indices, similarity = function(queries, nodes, *arguments[2:], weight.shape[1], valid)
    assert not indices.requires_grad
    chosen = torch.where(indices >= 0, similarity, 0)
    return torch.autograd.grad((chosen * weight).sum(), (queries, nodes))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_gradient(dtype: torch.dtype, masked: bool, device: torch.device, generator: torch.Generator) -> None:
    arguments = problem([3, 0, 6, 1], 12, 3, generator, dtype, device)
    valid = torch.tensor([1, 0, 1, 0, 1, 1, 0, 1, 1, 1], dtype=torch.bool, device=device) if masked else None
    weight = torch.randn(4, 2, generator=generator).to(device)
    ours = gradients(topk_nodes, arguments, weight, valid)
    same = gradients(reference.topk_nodes, arguments, weight, valid)
    oracle = gradients(
        reference.topk_nodes, (*(x.double() for x in arguments[:2]), *arguments[2:]), weight.double(), valid
    )
    for name, a, b, exact in zip(("grad_queries", "grad_nodes"), ours, same, oracle, strict=True):
        assert a.dtype == dtype
        check_error(name, a, b, exact, worst=2, roundings=1)


def test_gradient_of_one_argument_and_of_nothing(device: torch.device, generator: torch.Generator) -> None:
    queries, nodes, cu_groups, group_query = problem([3, 0, 4], 6, 2, generator, torch.float32, device)
    nodes.requires_grad_()
    _, similarity = topk_nodes(queries, nodes, cu_groups, group_query, 2)
    similarity[similarity > -torch.inf].sum().backward()
    assert nodes.grad is not None and nodes.grad.isfinite().all() and queries.grad is None
    # a node that is not returned, NaN included, leaves every gradient alone
    with torch.no_grad():
        nodes[0] = torch.nan
    nodes.grad = None
    queries.requires_grad_()
    valid = torch.ones(7, dtype=torch.bool, device=device)
    valid[0] = False
    _, similarity = topk_nodes(queries, nodes, cu_groups, group_query, 3, valid)
    similarity.backward(torch.ones_like(similarity))
    assert nodes.grad is not None and nodes.grad.isfinite().all() and not nodes.grad[0].any()
    assert queries.grad is not None and queries.grad.isfinite().all()
    empty = nodes.detach()[:0].requires_grad_()
    none = torch.zeros(1, dtype=torch.int64, device=device)
    _, similarity = topk_nodes(queries, empty, none, none[:0], 2)
    assert torch.autograd.grad(similarity.sum(), empty)[0].shape == (0, 6)


def test_gradcheck_of_the_reference(generator: torch.Generator) -> None:
    queries, nodes, cu_groups, group_query = problem([3, 0, 4], 5, 2, generator, torch.float64, torch.device("cpu"))

    def similarity(queries: Tensor, nodes: Tensor) -> Tensor:
        indices, result = topk_nodes(queries, nodes, cu_groups, group_query, 2)
        return torch.where(indices >= 0, result, 0)

    assert torch.autograd.gradcheck(similarity, (queries.requires_grad_(), nodes.requires_grad_()))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_opcheck(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    arguments = problem([3, 0, 4], 5, 2, generator, dtype, device)
    valid = torch.tensor([1, 0, 1, 1, 1, 1, 1], dtype=torch.bool, device=device)
    op = torch.ops.sharedllm.topk_nodes
    torch.library.opcheck(op, (*arguments, 1, None, 1e-6))
    queries, nodes = (x.clone().requires_grad_() for x in arguments[:2])
    # the fourth check adds the outputs up in place, which an integer first output forbids; the compiled test covers it
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (queries, nodes, *arguments[2:], 2, valid, 1e-6), test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic: bool, device: torch.device, generator: torch.Generator) -> None:
    arguments = problem([3, 2, 4], 5, 2, generator, torch.float32, device)
    arguments[1].requires_grad_()
    compiled = torch.compile(topk_nodes, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    indices, similarity = compiled(*arguments, 2)
    want_indices, want = topk_nodes(*arguments, 2)
    assert torch.equal(indices, want_indices) and torch.equal(similarity, want)
    got_grad, want_grad = (torch.autograd.grad(x.sum(), arguments[1])[0] for x in (similarity, want))
    torch.testing.assert_close(got_grad, want_grad)


def test_plain_path_never_asks_the_host() -> None:
    # a value read on the host (item, nonzero, tolist) raises under fake tensors
    with FakeTensorMode():
        long = torch.empty(4, dtype=torch.int64)
        indices, similarity = reference.topk_nodes(torch.empty(2, 8), torch.empty(9, 8), long, long[:3], 2)
        assert indices.shape == similarity.shape == (3, 2)


@needs_cuda
def test_cuda_never_waits(generator: torch.Generator) -> None:
    arguments = problem([3, 0, 4], 16, 2, generator, torch.float32, torch.device("cuda"))
    queries, nodes = (x.requires_grad_() for x in arguments[:2])
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, similarity = topk_nodes(*arguments, 2)
        torch.autograd.grad(similarity, (queries, nodes), torch.ones_like(similarity))
    finally:
        torch.cuda.set_sync_debug_mode("default")


Q, N, CU, GQ = torch.ones(2, 4), torch.ones(5, 4), torch.tensor([0, 2, 5]), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Q, "nodes", CU, GQ, 1), TypeError, "nodes: expected a tensor, got str"),
        ((Q, N.int(), CU, GQ, 1), TypeError, "nodes: expected dtype .*, got torch.int32"),
        ((Q, N[0], CU, GQ, 1), ValueError, r"nodes: expected shape \[N, d\], got \[4\]"),
        ((Q[:, :3], N, CU, GQ, 1), ValueError, r"queries: expected shape \[Q, 4\], got \[2, 3\]"),
        ((Q.bfloat16(), N, CU, GQ, 1), TypeError, "queries: expected dtype torch.float32, got torch.bfloat16"),
        ((Q.to("meta"), N, CU, GQ, 1), ValueError, "queries: expected device cpu, got meta"),
        ((Q, N, CU.int(), GQ, 1), TypeError, "cu_groups: expected dtype torch.int64, got torch.int32"),
        ((Q, N, CU[:0], GQ, 1), ValueError, "cu_groups: expected at least 1 element, got 0"),
        ((Q, N, CU, GQ[:1], 1), ValueError, r"group_query: expected shape \[2\], got \[1\]"),
        ((Q, N, CU, GQ, -1), ValueError, "k: expected at least 0, got -1"),
        ((Q, N, CU, GQ, 1, None, 0.0), ValueError, "eps: expected more than 0, got 0"),
        ((Q, N, CU, GQ, 1, None, float("nan")), ValueError, "eps: expected more than 0, got nan"),
        ((Q, N, CU, GQ, 1, GQ), TypeError, "valid: expected dtype torch.bool, got torch.int64"),
        ((Q, N, CU, GQ, 1, GQ > 0), ValueError, r"valid: expected shape \[5\], got \[2\]"),
        ((Q, N, CU + 1, GQ, 1), ValueError, r"cu_groups\[0\]: expected 0, got 1"),
        (
            (Q, N, torch.tensor([0, 6, 5]), GQ, 1),
            ValueError,
            r"cu_groups\[2\]: expected at least cu_groups\[1\] = 6, got 5",
        ),
        ((Q, N, torch.tensor([0, 2, 4]), GQ, 1), ValueError, r"cu_groups\[2\]: expected 5, got 4"),
        ((Q, N, CU, GQ + 1, 1), ValueError, r"group_query\[1\]: expected 0 <= value < 2, got 2"),
        ((Q, N, CU, GQ - 1, 1), ValueError, r"group_query\[0\]: expected 0 <= value < 2, got -1"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_messages(arguments: tuple, error: type[Exception], message: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        # the reference's path checks the same things
        arguments = tuple(x.double() if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in arguments)
        message = message.replace("expected dtype torch.float32", "expected dtype torch.float64")
    with pytest.raises(error, match=message):
        topk_nodes(*arguments)

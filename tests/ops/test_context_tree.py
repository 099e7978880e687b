"""Context tree: exact agreement with the reference, properties of the tree, hostile shapes, messages."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sharedllm_ext import _library, reference
from sharedllm_ext.ops.context_tree import (
    context_tree_layout,
    context_tree_select,
    context_tree_split,
    split_offsets,
)
from tests.support import needs_cuda

#: plain PyTorch ends the process's use of the GPU where the kernel bounds an index
NEEDS_KERNEL = pytest.mark.skipif(
    "context_tree_layout" not in _library.cuda_kernels(), reason="the CUDA kernel of context_tree_layout is not loaded"
)


def chunk_spans(lengths: list[int]) -> Tensor:
    """``[n, 2]`` spans of chunks that lie one after the other."""
    length = torch.tensor(lengths, dtype=torch.int64)
    return torch.stack((length.cumsum(0) - length, length), -1)


def grow(spans: Tensor, depth: int, std: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """Retained nodes ``[n, depth + 1, 2]`` of a tree with random choices (right children without a generator)."""
    retained, node = [], spans
    for level in range(depth):
        offset = split_offsets(len(node), std, device="cpu", generator=generator) if std else None
        children = context_tree_split(node, None if offset is None else offset.to(spans.device))
        if level == depth - 1:
            retained += list(children.unbind(1))
            break
        choice = None if generator is None else torch.randint(0, 2, (len(node),), generator=generator).to(spans.device)
        node, kept = context_tree_select(children, choice)
        retained.append(kept)
    return torch.stack(retained, 1)


def lay_out(nodes: Tensor, slots: int, spare: int = 0) -> tuple[Tensor, ...]:
    """The layout from the operator, after comparing all of it with the reference."""
    total = int(nodes[..., 1].sum())
    kept = int(nodes[..., 1].clamp(max=slots).sum())
    arguments = (nodes, torch.arange(nodes.shape[0], device=nodes.device), slots, total, kept + spare)
    result = context_tree_layout(*arguments)
    for ours, theirs in zip(result, reference.context_tree_layout(*arguments), strict=True):
        assert ours.dtype == torch.int64
        assert torch.equal(ours, theirs)
    return result


def test_papers_chunk(device: torch.device) -> None:
    nodes = grow(chunk_spans([1024, 1024]).to(device), depth=3)
    assert nodes[..., 1].tolist() == [[512, 256, 128, 128]] * 2
    positions, cu_nodes, keep_index, keep_position, cu_slots = lay_out(nodes, 32)
    assert cu_nodes.tolist() == [0, 512, 768, 896, 1024, 1536, 1792, 1920, 2048]
    assert cu_slots.tolist() == [0, 128, 256]
    assert keep_index[:3].tolist() == [0, 16, 32]
    assert keep_position[128:131].tolist() == [1, 17, 33]
    assert positions[510:514].tolist() == [510, 511, 0, 1]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_every_token_once(seed: int, depth: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = [*torch.randint(0, 40, (9,), generator=generator).tolist(), 0, 1, 2, 3]
    slots = int(torch.randint(1, 9, (), generator=generator))
    nodes = grow(chunk_spans(lengths).to(device), depth, std=[0.0, 2.0, 50.0][seed % 3], generator=generator)
    assert nodes.shape == (len(lengths), depth + 1, 2)
    assert nodes[..., 1].sum(1).tolist() == lengths

    covered = torch.zeros(sum(lengths), dtype=torch.int64)
    for chunk, (first, length) in enumerate(chunk_spans(lengths).tolist()):
        for start, size in nodes[chunk].tolist():
            assert (first <= start and start + size <= first + length) or size == 0
            covered[start : start + size] += 1
        # a chunk with more tokens than nodes loses none of its nodes when nothing is noisy
        if seed % 3 == 0 and length >= 2**depth:
            assert nodes[chunk, :, 1].min() > 0
    assert (covered == 1).all()

    positions, cu_nodes, keep_index, keep_position, cu_slots = lay_out(nodes, slots, spare=5)
    kept = nodes[..., 1].clamp(max=slots)
    assert cu_slots.tolist() == [0, *kept.sum(1).cumsum(0).tolist()]
    assert (cu_nodes.diff() >= 0).all()
    assert keep_index[-5:].tolist() == [-1] * 5
    assert keep_position[-5:].tolist() == [0] * 5
    used = keep_index[:-5]
    assert used.unique().numel() == used.numel() == int(kept.sum())
    slot = 0
    for chunk in range(len(lengths)):
        for (start, _), count in zip(nodes[chunk].tolist(), kept[chunk].tolist(), strict=True):
            inside = (used[slot : slot + count] - start).tolist()
            assert inside == sorted(set(inside))
            assert not inside or inside[0] == 0
            assert (positions[used[slot : slot + count]]).tolist() == inside
            assert (keep_position[slot : slot + count] - chunk).tolist() == inside
            slot += count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_split_equals_reference(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    spans = torch.randint(0, 30, (501, 2), generator=generator).to(device)
    offset = (torch.randn(501, generator=generator) * 8).to(dtype).to(device)
    assert torch.equal(context_tree_split(spans), reference.context_tree_split(spans))
    children = context_tree_split(spans, offset)
    assert torch.equal(children, reference.context_tree_split(spans, offset))
    assert (children[spans[:, 1] > 1][..., 1] >= 1).all()
    single = children[spans[:, 1] == 1]
    assert (single[:, 0, 1] == 0).all() and (single[:, 1, 1] == 1).all()


def test_select_equals_reference(device: torch.device, generator: torch.Generator) -> None:
    children = torch.randint(0, 3, (301, 2, 2), generator=generator).to(device)
    choice = torch.randint(-1, 3, (301,), generator=generator).to(device)
    for given in (None, choice):
        picked, retained = context_tree_select(children, given)
        want_picked, want_retained = reference.context_tree_select(children, given)
        assert torch.equal(picked, want_picked) and torch.equal(retained, want_retained)
        filled = children[..., 1].sum(1) > 0
        assert (picked[filled][:, 1] > 0).all()


def test_noise_is_seeded_and_has_its_deviation() -> None:
    first, again, other = (
        split_offsets(20000, 5.0, device="cpu", generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert abs(float(first.mean())) < 4 * 5 / math.sqrt(20000)
    assert abs(float(first.std()) - 5) < 4 * 5 / math.sqrt(2 * 20000)
    assert not split_offsets(3, 0.0, device="cpu").any()
    assert split_offsets(0, 1.0, device="cpu").shape == (0,)


def test_no_chunks(device: torch.device) -> None:
    nodes = grow(chunk_spans([]).to(device), depth=3)
    assert nodes.shape == (0, 4, 2)
    positions, cu_nodes, keep_index, keep_position, cu_slots = lay_out(nodes, 4, spare=2)
    assert positions.shape == (0,) and cu_nodes.tolist() == [0] == cu_slots.tolist()
    assert keep_index.tolist() == [-1, -1] and keep_position.tolist() == [0, 0]


def test_not_contiguous(device: torch.device, generator: torch.Generator) -> None:
    spans = chunk_spans([10, 3, 0, 8]).to(device)
    strided = torch.stack((spans, spans + 7), -1)[..., 0]
    offset = torch.randn(8, generator=generator).to(device)[::2]
    choice = torch.tensor([0, 9, 1, 9, 0, 9, 1, 9], device=device)[::2]
    assert not strided.is_contiguous()
    children = context_tree_split(strided, offset)
    assert torch.equal(children, context_tree_split(spans, offset.contiguous()))
    wide = torch.cat((children, children), 1)[:, :2]
    for ours, theirs in zip(
        context_tree_select(wide, choice), context_tree_select(children, choice.contiguous()), strict=True
    ):
        assert torch.equal(ours, theirs)
    nodes = grow(spans, 2)
    chunk_index = torch.tensor([0, 9, 1, 9, 0, 9, 1, 9], device=device)[::2]
    flipped = nodes.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for ours, theirs in zip(
        context_tree_layout(flipped, chunk_index, 2, 21, 20),
        context_tree_layout(nodes, chunk_index.contiguous(), 2, 21, 20),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_many_chunks(device: torch.device, generator: torch.Generator) -> None:
    lengths = torch.randint(0, 12, (70001,), generator=generator).tolist()
    nodes = grow(chunk_spans(lengths).to(device), depth=3, std=1.0, generator=generator)
    lay_out(nodes, 2)


def test_chunks_in_any_order(device: torch.device) -> None:
    # the slots follow the nodes' order even where the tokens do not
    nodes = grow(chunk_spans([9, 5, 6]).to(device), depth=2)[[2, 0, 1]]
    _, cu_nodes, keep_index, _, _ = lay_out(nodes, 2)
    assert cu_nodes.diff().sum() == 20
    assert keep_index[0] == 14


@pytest.mark.parametrize("chunks", [50, 3000])
def test_many_chunks_in_any_order(chunks: int, device: torch.device, generator: torch.Generator) -> None:
    lengths = torch.randint(0, 30, (chunks,), generator=generator).tolist()
    nodes = grow(chunk_spans(lengths).to(device), depth=2, std=1.0, generator=generator)
    lay_out(nodes[torch.randperm(chunks, generator=generator).to(device)], 4, spare=3)


def test_empty_chunks_anywhere(device: torch.device) -> None:
    # chunks without tokens that say they start at 0, between others
    nodes = grow(chunk_spans([20, 7, 3, 11, 1]).to(device), depth=2)
    empty = torch.zeros_like(nodes[:1])
    _, cu_nodes, _, _, cu_slots = lay_out(torch.cat((nodes[:2], empty, nodes[2:], empty)), 4)
    assert cu_nodes[6] == 0 and cu_slots[3] == cu_slots[2]


def test_long_chunk_crosses_thread_parts(device: torch.device) -> None:
    lay_out(grow(chunk_spans([100003, 1]).to(device), depth=3), 32)


def test_runs_repeat_exactly(device: torch.device) -> None:
    runs = [
        lay_out(grow(chunk_spans([31, 17, 2]).to(device), 3, 2.0, torch.Generator().manual_seed(5)), 3)
        for _ in range(3)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_opcheck(device: torch.device) -> None:
    spans = chunk_spans([10, 3, 0, 8]).to(device)
    ops = torch.ops.sharedllm
    torch.library.opcheck(ops.context_tree_split, (spans, None))
    torch.library.opcheck(ops.context_tree_split, (spans, torch.ones(4, device=device)))
    children = context_tree_split(spans)
    torch.library.opcheck(ops.context_tree_select, (children, None))
    torch.library.opcheck(ops.context_tree_select, (children, torch.zeros(4, dtype=torch.int64, device=device)))
    arguments = (grow(spans, 2), torch.arange(4, device=device), 3, 21, 30)
    torch.library.opcheck(ops.context_tree_layout, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic: bool, device: torch.device) -> None:
    def one_level(spans: Tensor, choice: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        picked, retained = context_tree_select(context_tree_split(spans, offset), choice)
        return context_tree_layout(torch.stack((picked, retained), 1), choice, 4, 21, 21)

    compiled = torch.compile(one_level, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    spans = chunk_spans([10, 3, 0, 8]).to(device)
    arguments = (spans, torch.tensor([1, 0, 0, 1], device=device), torch.tensor([0.5, 1, 2, -3], device=device))
    for ours, theirs in zip(compiled(*arguments), one_level(*arguments), strict=True):
        assert torch.equal(ours, theirs)


def test_plain_path_never_asks_the_host() -> None:
    # a value read on the host (item, nonzero, tolist) raises under fake tensors
    with FakeTensorMode():
        spans = torch.empty(6, 2, dtype=torch.int64)
        children = reference.context_tree_split(spans, torch.empty(6))
        picked, retained = reference.context_tree_select(children, torch.empty(6, dtype=torch.int64))
        nodes = torch.stack((picked, retained), 1)
        layout = reference.context_tree_layout(nodes, spans[:, 0], 4, 100, 48)
        assert [x.shape[0] for x in layout] == [100, 13, 48, 48, 7]


@needs_cuda
def test_cuda_never_waits() -> None:
    spans = chunk_spans([10, 3, 0, 8]).cuda()
    offset, choice = torch.ones(4, device="cuda"), torch.tensor([0, 1, 0, 1], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        picked, retained = context_tree_select(context_tree_split(spans, offset), choice)
        context_tree_layout(torch.stack((picked, retained), 1), choice, 4, 21, 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("chunks", [7, 2000])
def test_cuda_side_stream_and_graph(chunks: int, generator: torch.Generator) -> None:
    lengths = torch.randint(1, 50, (chunks,), generator=generator)
    spans, total = chunk_spans(lengths.tolist()).cuda(), int(lengths.sum())
    chunk_index = torch.arange(chunks, device="cuda")
    choice = torch.randint(0, 2, (chunks,), generator=generator).cuda()

    def tree() -> tuple[Tensor, ...]:
        picked, retained = context_tree_select(context_tree_split(spans), choice)
        nodes = torch.cat((retained.unsqueeze(1), context_tree_split(picked)), 1)
        return context_tree_layout(nodes, chunk_index, 4, total, 12 * chunks)

    want = tree()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = tree()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tree()
    choice.mul_(-1).add_(1)
    for x in captured:
        x.fill_(-5)
    for _ in range(2):
        graph.replay()
    want = tree()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


@NEEDS_KERNEL
@pytest.mark.parametrize("chunks", [5, 700, 3000])
def test_cuda_survives_any_nodes(chunks: int, generator: torch.Generator) -> None:
    nodes = torch.randint(-(2**40), 2**40, (chunks, 4, 2), generator=generator).cuda()
    outputs = context_tree_layout(nodes, torch.arange(chunks, device="cuda"), 8, 5000, 3000)
    # all of it written: what is not holds the largest number
    assert all((x < 2**62).all() for x in outputs)


@NEEDS_KERNEL
def test_cuda_offsets_out_of_range() -> None:
    spans = chunk_spans([5, 5, 5, 5, 1, 0]).cuda()
    offset = torch.tensor([math.nan, math.inf, -math.inf, 1e300, math.nan, math.nan], dtype=torch.float64).cuda()
    assert context_tree_split(spans, offset)[:, 0, 1].tolist() == [1, 1, 4, 1, 0, 0]


@needs_cuda
def test_cuda_more_than_2_31_tokens() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 40e9:
        pytest.skip(f"needs 40 GB of free GPU memory, got {free / 1e9:.0f}")
    half, total = 2**30, 2**31 + 5
    nodes = torch.tensor([[[half, total - half], [0, half]]], device="cuda")
    positions, cu_nodes, keep_index, keep_position, _ = context_tree_layout(
        nodes, torch.tensor([2], device="cuda"), 4, total, 9
    )
    assert cu_nodes.tolist() == [0, half, total]
    assert positions[[0, half - 1, half, total - 1]].tolist() == [0, half - 1, 0, total - half - 1]
    kept = [j * (total - half) // 4 for j in range(4)]
    assert keep_index.tolist() == [*(half + x for x in kept), *(j * half // 4 for j in range(4)), -1]
    assert keep_position.tolist() == [*(2 + x for x in kept), *(2 + j * half // 4 for j in range(4)), 0]


INTS = torch.zeros(3, 2, dtype=torch.int64)
NODES = torch.tensor([[[0, 2], [2, 3]], [[5, 1], [6, 4]]])
INDEX = torch.arange(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: context_tree_split([[0, 1]]), TypeError, "spans: expected a tensor, got list"),
        (lambda: context_tree_split(INTS.float()), TypeError, "spans: expected dtype torch.int64, got torch.float32"),
        (lambda: context_tree_split(INTS[0]), ValueError, r"spans: expected shape \[n, 2\], got \[2\]"),
        (lambda: context_tree_split(INTS, INTS[:, 0]), TypeError, "offset: expected dtype .*, got torch.int64"),
        (lambda: context_tree_split(INTS, torch.ones(2)), ValueError, r"offset: expected shape \[3\], got \[2\]"),
        (
            lambda: context_tree_split(INTS, torch.ones(3, device="meta")),
            ValueError,
            "offset: expected device cpu, got meta",
        ),
        (
            lambda: context_tree_split(INTS - 1),
            ValueError,
            r"spans\[0\]: expected start >= 0 and length >= 0, got \(-1, -1\)",
        ),
        (
            lambda: context_tree_split(INTS, torch.tensor([0, float("nan"), 0])),
            ValueError,
            r"offset\[1\]: expected a finite number of tokens, got nan",
        ),
        (
            lambda: context_tree_split(INTS, torch.tensor([0, 0, float("inf")])),
            ValueError,
            r"offset\[2\]: expected a finite number of tokens, got inf",
        ),
        (lambda: context_tree_select(INTS), ValueError, r"children: expected shape \[n, 2, 2\], got \[3, 2\]"),
        (
            lambda: context_tree_select(NODES, torch.zeros(2, dtype=torch.int32)),
            TypeError,
            "choice: expected dtype torch.int64, got torch.int32",
        ),
        (
            lambda: context_tree_select(NODES, torch.zeros(3).long()),
            ValueError,
            r"choice: expected shape \[2\], got \[3\]",
        ),
        (
            lambda: context_tree_layout(INTS, INDEX, 2, 10, 8),
            ValueError,
            r"nodes: expected shape \[n, m, 2\], got \[3, 2\]",
        ),
        (
            lambda: context_tree_layout(NODES[:, :0], INDEX, 2, 10, 8),
            ValueError,
            "nodes: expected at least 1 node for each chunk, got 0",
        ),
        (
            lambda: context_tree_layout(NODES, torch.arange(3), 2, 10, 8),
            ValueError,
            r"chunk_index: expected shape \[2\], got \[3\]",
        ),
        (lambda: context_tree_layout(NODES, INDEX, 0, 10, 8), ValueError, "slots_per_node: expected at least 1, got 0"),
        (lambda: context_tree_layout(NODES, INDEX, 2, -1, 8), ValueError, "num_tokens: expected at least 0, got -1"),
        (lambda: context_tree_layout(NODES, INDEX, 2, 10, -1), ValueError, "num_slots: expected at least 0, got -1"),
        (
            lambda: context_tree_layout(NODES, INDEX, 2, 10, 6),
            ValueError,
            "num_slots: expected at least the 7 kept tokens, got 6",
        ),
        (
            lambda: context_tree_layout(NODES, INDEX, 2, 11, 8),
            ValueError,
            "nodes: expected to cover num_tokens = 11, got 10",
        ),
        (
            lambda: context_tree_layout(NODES, INDEX, 2, 9, 8),
            ValueError,
            r"nodes\[1, 1\]: expected an end of at most num_tokens = 9, got 6 \+ 4",
        ),
        (
            lambda: context_tree_layout(NODES + torch.tensor([0, 1]), INDEX, 2, 14, 8),
            ValueError,
            r"nodes\[0, 1\]: expected nodes that cover each token once: start 3, got 2",
        ),
        (
            lambda: context_tree_layout(-NODES, INDEX, 2, 10, 8),
            ValueError,
            r"nodes\[0, 0\]: expected start >= 0 and length >= 0, got \(0, -2\)",
        ),
        (
            lambda: context_tree_layout(NODES, INDEX - 1, 2, 10, 8),
            ValueError,
            r"chunk_index\[0\]: expected 0 <= value < \d+, got -1",
        ),
        (lambda: split_offsets(-1, 1.0, device="cpu"), ValueError, "num: expected at least 0, got -1"),
        (lambda: split_offsets(1, -1.0, device="cpu"), ValueError, "std: expected a finite .*, got -1"),
        (lambda: split_offsets(1, float("nan"), device="cpu"), ValueError, "std: expected a finite .*, got nan"),
    ],
)
def test_messages(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()

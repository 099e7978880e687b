"""Chunk compression: forward and backward against the reference and float64, hostile shapes, messages."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sharedllm_ext import _library, reference
from sharedllm_ext.ops.chunk_compression import chunk_compression, chunk_compression_backward
from tests.support import needs_cuda
from tests.tolerance import check_error

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
#: those of the CUDA kernel; float16 on the CPU takes the reference
DTYPES = (*KERNEL_DTYPES, torch.float16)
P = 67
#: plain PyTorch ends the process's use of the GPU where the kernel bounds an index
NEEDS_KERNEL = pytest.mark.skipif(
    "chunk_compression" not in _library.cuda_kernels(), reason="the CUDA kernel of chunk_compression is not loaded"
)


def problem(
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    tq: int | None = 9,
    t: int = 41,
    s: int = 13,
    hq: int = 4,
    hkv: int = 2,
    d: int = 24,
    r: int = 24,
    rotated: bool = True,
) -> dict[str, Any]:
    """Random arguments; a third of the slots are unused, no token is kept twice."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    def position(count: int) -> Tensor:
        return torch.randint(0, P, (count,), generator=generator).to(device)

    angle = torch.rand(P, r // 2, generator=generator) * 100
    keep = torch.full((s,), -1)
    kept = torch.randperm(t, generator=generator)[: (2 * s + 2) // 3]
    keep[torch.randperm(s, generator=generator)[: len(kept)]] = kept
    return {
        "q": None if tq is None else noise(tq, hq, d),
        "k": noise(t, hkv, d),
        "v": noise(t, hkv, d),
        "cos": (1.1 * angle.cos()).to(device),
        "sin": (1.1 * angle.sin()).to(device),
        "q_positions": None if tq is None else position(tq),
        "positions": position(t) if rotated else None,
        "keep_index": keep.to(device),
        "keep_position": position(s),
    }


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}


def assert_as_exact(ours: tuple[Tensor, ...], same: tuple[Tensor, ...], oracle: tuple[Tensor, ...]) -> None:
    """Nothing is summed, so no element has an excuse, and one rounding of the largest is enough."""
    for i, (a, b, exact) in enumerate(zip(ours, same, oracle, strict=True)):
        assert a.dtype == b.dtype and a.is_contiguous()
        check_error(f"result {i}", a, b, exact, worst=2, roundings=1)


def compare(arguments: dict[str, Any], generator: torch.Generator) -> None:
    outputs = chunk_compression(**arguments)
    assert_as_exact(
        outputs, reference.chunk_compression(**arguments), reference.chunk_compression(**widened(arguments))
    )
    unused = arguments["keep_index"] < 0
    assert not outputs[2][unused].any() and not outputs[3][unused].any()
    assert torch.equal(outputs[3][~unused], arguments["v"][arguments["keep_index"][~unused]])

    q, positions = arguments["q"], arguments["positions"]
    grads = [torch.randn(x.shape, generator=generator).to(x.dtype).to(x.device) for x in outputs]
    backward = {
        "grad_q_rotated": None if q is None else grads[0],
        "grad_k_rotated": None if positions is None else grads[1],
        "grad_memory_k": grads[2],
        "grad_memory_v": grads[3],
        "num_tokens": arguments["k"].shape[0],
        **{name: x for name, x in arguments.items() if name not in ("q", "k", "v")},
    }
    ours = chunk_compression_backward(**backward)
    assert_as_exact(
        ours,
        reference.chunk_compression_backward(**backward),
        reference.chunk_compression_backward(**widened(backward)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("d", "r"), [(2, 2), (6, 6), (16, 16), (24, 10), (32, 32), (33, 32), (64, 64), (80, 32), (128, 128), (7, 0)]
)
@pytest.mark.parametrize("rotated", [False, True])
def test_head_sizes(
    dtype: torch.dtype, d: int, r: int, rotated: bool, device: torch.device, generator: torch.Generator
) -> None:
    compare(problem(generator, device, dtype, d=d, r=r, rotated=rotated), generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tq", [None, 0, 1, 9])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("t", "s"), [(0, 0), (0, 3), (1, 1), (5, 0), (41, 13), (8, 12)])
def test_sizes(
    dtype: torch.dtype,
    tq: int | None,
    rotated: bool,
    t: int,
    s: int,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    compare(problem(generator, device, dtype, tq=tq, t=t, s=s, rotated=rotated), generator)


@pytest.mark.parametrize(("hq", "hkv"), [(0, 0), (1, 1), (3, 1), (8, 8)])
def test_heads(hq: int, hkv: int, device: torch.device, generator: torch.Generator) -> None:
    compare(problem(generator, device, hq=hq, hkv=hkv), generator)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_and_a_large_output(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    compare(problem(generator, device, dtype, tq=5, t=70001, s=9001, hq=2, hkv=1, d=32, r=32), generator)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_contiguous(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    arguments = problem(generator, device, dtype, d=32, r=32)
    want = chunk_compression(**arguments)
    fused = torch.cat((arguments["k"], arguments["v"]), -1)
    strided = {
        "q": arguments["q"].transpose(0, 1).contiguous().transpose(0, 1),
        "k": fused[..., :32],
        "v": fused.transpose(1, 2).contiguous().transpose(1, 2)[..., 32:],
        **{
            name: arguments[name].T.contiguous().T
            if arguments[name].dim() == 2
            else arguments[name].repeat_interleave(2)[::2]
            for name in ("cos", "sin", "q_positions", "positions", "keep_index", "keep_position")
        },
    }
    assert not any(x.is_contiguous() for x in strided.values())
    for a, b in zip(chunk_compression(**strided), want, strict=True):
        assert torch.equal(a, b)
    rest = {name: x for name, x in arguments.items() if name not in ("q", "k", "v")}
    names = ("grad_q_rotated", "grad_k_rotated", "grad_memory_k", "grad_memory_v")
    want_grads = chunk_compression_backward(**dict(zip(names, want, strict=True)), **rest, num_tokens=41)
    flipped = {name: x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for name, x in zip(names, want, strict=True)}
    for a, b in zip(chunk_compression_backward(**flipped, **rest, num_tokens=41), want_grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    arguments = problem(generator, device, dtype)
    kept = int(arguments["keep_index"].max())
    clean = chunk_compression(**arguments)
    arguments["k"][kept] = torch.nan
    arguments["v"][kept, 0, 0] = torch.inf
    got = chunk_compression(**arguments)
    slot = arguments["keep_index"].tolist().index(kept)
    assert got[1][kept].isnan().all() and got[2][slot].isnan().all() and got[3][slot, 0, 0] == torch.inf
    for index, row in ((1, kept), (2, slot), (3, slot)):
        others = torch.arange(got[index].shape[0]) != row
        assert torch.equal(got[index][others], clean[index][others])


def test_backward_undoes_a_rotation(device: torch.device, generator: torch.Generator) -> None:
    arguments = problem(generator, device, d=32, r=32)
    for table in ("cos", "sin"):
        arguments[table] = arguments[table] / 1.1
    q_rotated, k_rotated, memory_k, memory_v = chunk_compression(**arguments)
    rest = {name: x for name, x in arguments.items() if name not in ("q", "k", "v")}
    grad_q, grad_k, _ = chunk_compression_backward(
        q_rotated, k_rotated, memory_k * 0, memory_v * 0, **rest, num_tokens=41
    )
    torch.testing.assert_close(grad_q, arguments["q"])
    torch.testing.assert_close(grad_k, arguments["k"])
    _, grad_k, grad_v = chunk_compression_backward(None, None, memory_k, memory_v, **rest, num_tokens=41)
    kept = torch.zeros(41, dtype=torch.bool, device=device)
    kept[arguments["keep_index"][arguments["keep_index"] >= 0]] = True
    torch.testing.assert_close(grad_k, torch.where(kept.view(-1, 1, 1), arguments["k"], 0))
    torch.testing.assert_close(grad_v, torch.where(kept.view(-1, 1, 1), arguments["v"], 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tq", [None, 9])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("used", [(0, 1, 2, 3), (2,), (3,), (1, 3)])
def test_autograd(
    dtype: torch.dtype,
    tq: int | None,
    rotated: bool,
    used: tuple[int, ...],
    device: torch.device,
    generator: torch.Generator,
) -> None:
    arguments = problem(generator, device, dtype, tq=tq, rotated=rotated)
    weights = [torch.randn(x.shape, generator=generator).to(device) for x in chunk_compression(**arguments)]

    def gradients(function: Any, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        wanted = {
            name: arguments[name].detach().clone().requires_grad_()
            for name in ("q", "k", "v")
            if arguments[name] is not None
        }
        outputs = function(**{**arguments, **wanted})
        loss = sum((outputs[i].to(weights[i].dtype) * weights[i]).sum() for i in used)
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, wanted.values(), strict=True))

    same = gradients(reference.chunk_compression, arguments)
    ours = gradients(chunk_compression, arguments)
    weights = [x.double() for x in weights]
    oracle = gradients(reference.chunk_compression, widened(arguments))
    assert_as_exact(ours, same, oracle)


@pytest.mark.parametrize("tq", [None, 9])
@pytest.mark.parametrize("rotated", [False, True])
def test_second_derivative(tq: int | None, rotated: bool, device: torch.device, generator: torch.Generator) -> None:
    arguments = problem(generator, device, tq=tq, rotated=rotated)
    names = [name for name in ("q", "k", "v") if arguments[name] is not None]

    def second(function: Any, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        inputs = [arguments[name].clone().requires_grad_() for name in names]
        outputs = function(**{**arguments, **dict(zip(names, inputs, strict=True))})
        first = torch.autograd.grad(sum((x**3).sum() for x in outputs), inputs, create_graph=True)
        return torch.autograd.grad(sum((x**2).sum() for x in first), inputs)

    assert_as_exact(
        second(chunk_compression, arguments),
        second(reference.chunk_compression, arguments),
        second(reference.chunk_compression, widened(arguments)),
    )


def test_one_gradient_alone(device: torch.device, generator: torch.Generator) -> None:
    for name in ("q", "k", "v"):
        arguments = problem(generator, device)
        arguments[name].requires_grad_()
        sum(x.sum() for x in chunk_compression(**arguments)).backward()
        for other in ("q", "k", "v"):
            assert (arguments[other].grad is not None) == (other == name)


@pytest.mark.parametrize("tq", [None, 3])
@pytest.mark.parametrize("rotated", [False, True])
def test_gradcheck_of_the_reference(tq: int | None, rotated: bool, generator: torch.Generator) -> None:
    arguments = problem(
        generator, torch.device("cpu"), torch.float64, tq=tq, t=6, s=5, hq=2, hkv=1, d=4, r=2, rotated=rotated
    )
    for table in ("cos", "sin"):
        # exact in float64, so that the numerical derivative sees the tables' values
        arguments[table] = arguments[table].float()
    names = [name for name in ("q", "k", "v") if arguments[name] is not None]

    def outputs(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            x for x in chunk_compression(**{**arguments, **dict(zip(names, inputs, strict=True))}) if x.numel()
        )

    assert torch.autograd.gradcheck(outputs, tuple(arguments[name].requires_grad_() for name in names))

    # the reference's explicit backward equals what autograd derives
    inputs = [arguments[name] for name in names]
    results = chunk_compression(**arguments)
    grads = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in results]
    present = [i for i, x in enumerate(results) if x.numel()]
    derived = torch.autograd.grad([results[i] for i in present], inputs, [grads[i] for i in present])
    rest = {name: x for name, x in arguments.items() if name not in ("q", "k", "v")}
    explicit = chunk_compression_backward(
        grads[0] if tq else None, grads[1] if rotated else None, *grads[2:], **rest, num_tokens=6
    )
    for a, b in zip(explicit[0 if tq else 1 :], derived, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_take_the_reference(dtype: torch.dtype, generator: torch.Generator) -> None:
    arguments = problem(generator, torch.device("cpu"), dtype)
    for a, b in zip(chunk_compression(**arguments), reference.chunk_compression(**arguments), strict=True):
        assert a.dtype == dtype and torch.equal(a, b)


def test_threads_change_nothing(generator: torch.Generator) -> None:
    arguments = problem(generator, torch.device("cpu"), t=3001, s=701, tq=333, d=64, r=64)
    want = chunk_compression(**arguments)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            for a, b in zip(chunk_compression(**arguments), want, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("tq", [None, 9])
@pytest.mark.parametrize("rotated", [False, True])
def test_opcheck(
    dtype: torch.dtype, tq: int | None, rotated: bool, device: torch.device, generator: torch.Generator
) -> None:
    arguments = problem(generator, device, dtype, tq=tq, rotated=rotated)
    ops = torch.ops.sharedllm
    torch.library.opcheck(ops.chunk_compression, tuple(arguments.values()))
    outputs = chunk_compression(**arguments)
    grads = (outputs[0] if tq else None, outputs[1] if rotated else None, *outputs[2:])
    torch.library.opcheck(ops.chunk_compression_backward, (*grads, *list(arguments.values())[3:], 41))
    grads = tuple(None if x is None else x.detach().requires_grad_() for x in grads)
    torch.library.opcheck(ops.chunk_compression_backward, (*grads, *list(arguments.values())[3:], 41))
    for name in ("q", "k", "v"):
        if arguments[name] is not None:
            arguments[name].requires_grad_()
    torch.library.opcheck(ops.chunk_compression, tuple(arguments.values()))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("tq", [None, 9])
def test_compiles_without_a_break(
    dynamic: bool, tq: int | None, device: torch.device, generator: torch.Generator
) -> None:
    arguments = problem(generator, device, tq=tq)
    arguments["k"].requires_grad_()
    compiled = torch.compile(chunk_compression, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got, want = compiled(**arguments), chunk_compression(**arguments)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    got_grad, want_grad = (torch.autograd.grad((x[1].sum() + x[2].sum()), arguments["k"])[0] for x in (got, want))
    assert torch.equal(got_grad, want_grad)


def test_plain_path_never_asks_the_host(generator: torch.Generator) -> None:
    # a value read on the host (item, nonzero, tolist) raises under fake tensors
    arguments = problem(generator, torch.device("cpu"))
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in arguments.items()}
        outputs = reference.chunk_compression(**fake)
        grads = reference.chunk_compression_backward(*outputs, *list(fake.values())[3:], 41)
        assert [x.shape for x in grads] == [fake[name].shape for name in ("q", "k", "v")]


@needs_cuda
def test_cuda_never_waits(generator: torch.Generator) -> None:
    arguments = problem(generator, torch.device("cuda"))
    inputs = [arguments[name].requires_grad_() for name in ("q", "k", "v")]
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = chunk_compression(**arguments)
        torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def backward_of(outputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the backward, the outputs as gradients."""
    return {
        "grad_q_rotated": None if arguments["q"] is None else outputs[0],
        "grad_k_rotated": None if arguments["positions"] is None else outputs[1],
        "grad_memory_k": outputs[2],
        "grad_memory_v": outputs[3],
        "num_tokens": arguments["k"].shape[0],
        **{name: x for name, x in arguments.items() if name not in ("q", "k", "v")},
    }


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@needs_cuda
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("d", "r"), [(128, 128), (96, 96), (64, 16), (33, 32)])
@pytest.mark.parametrize("rotated", [False, True])
def test_cuda_rounds_as_the_reference(
    dtype: torch.dtype, d: int, r: int, rotated: bool, generator: torch.Generator
) -> None:
    arguments = problem(generator, torch.device("cuda"), dtype, t=301, s=77, d=d, r=r, rotated=rotated)
    outputs = chunk_compression(**arguments)
    assert_same(outputs, reference.chunk_compression(**arguments))
    backward = backward_of(outputs, arguments)
    assert_same(chunk_compression_backward(**backward), reference.chunk_compression_backward(**backward))


@NEEDS_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tq", [None, 50])
@pytest.mark.parametrize("rotated", [False, True])
def test_cuda_bounds_every_index(dtype: torch.dtype, tq: int | None, rotated: bool, generator: torch.Generator) -> None:
    wild = problem(generator, torch.device("cuda"), dtype, tq=tq, t=90, s=40, d=64, r=64, rotated=rotated)
    wild["keep_index"][::4] = torch.tensor([90, 91, -7, 2**62, -(2**62)], device="cuda").repeat(2)
    for name in ("q_positions", "positions", "keep_position"):
        if wild[name] is not None:
            wild[name][::3], wild[name][1::3] = 2**61, -(2**61)
    tame = dict(wild)
    for name in ("q_positions", "positions", "keep_position"):
        tame[name] = None if wild[name] is None else wild[name].clamp(0, P - 1)
    tame["keep_index"] = torch.where((wild["keep_index"] >= 0) & (wild["keep_index"] < 90), wild["keep_index"], -1)
    outputs = chunk_compression(**wild)
    assert_same(outputs, reference.chunk_compression(**tame))
    assert_same(
        chunk_compression_backward(**backward_of(outputs, wild)),
        reference.chunk_compression_backward(**backward_of(outputs, tame)),
    )


@NEEDS_KERNEL
def test_cuda_fills_every_slot_of_a_token_kept_twice(generator: torch.Generator) -> None:
    arguments = problem(generator, torch.device("cuda"), d=32, r=32)
    arguments["keep_index"][:5] = 7
    assert_same(chunk_compression(**arguments), reference.chunk_compression(**arguments))
    backward = backward_of(chunk_compression(**arguments), arguments)
    assert_same(chunk_compression_backward(**backward), chunk_compression_backward(**backward))


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_odd_addresses(dtype: torch.dtype, generator: torch.Generator) -> None:
    arguments = problem(generator, torch.device("cuda"), dtype, d=64, r=64)
    want = chunk_compression(**arguments)
    for name in ("q", "k", "v", "cos", "sin"):
        x = arguments[name]
        moved = {**arguments, name: x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)}
        assert moved[name].data_ptr() % 16
        assert_same(chunk_compression(**moved), want)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_side_stream_and_graph(dtype: torch.dtype, generator: torch.Generator) -> None:
    arguments = problem(generator, torch.device("cuda"), dtype, t=3000, s=500, tq=3000, d=128, r=128)
    want = reference.chunk_compression(**arguments)
    want_grads = reference.chunk_compression_backward(**backward_of(want, arguments))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs = chunk_compression(**arguments)
        grads = chunk_compression_backward(**backward_of(outputs, arguments))
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(outputs, want)
    assert_same(grads, want_grads)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = chunk_compression(**arguments)
        grads = chunk_compression_backward(**backward_of(outputs, arguments))
    for name in ("q", "k", "v"):
        arguments[name].mul_(-0.5)
    for x in (*outputs, *grads):
        x.fill_(torch.nan)
    for _ in range(2):
        graph.replay()
    want = reference.chunk_compression(**arguments)
    assert_same(outputs, want)
    assert_same(grads, reference.chunk_compression_backward(**backward_of(want, arguments)))


@needs_cuda
def test_cuda_more_than_2_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 40e9:
        pytest.skip(f"needs 40 GB of free GPU memory, got {free / 1e9:.0f}")
    device, tokens, last = torch.device("cuda"), 2**21 + 3, 1000
    k = torch.randn(tokens, 8, 128, device=device, dtype=torch.bfloat16)
    angle = torch.rand(500, 64, device=device)
    tables = (angle.cos(), angle.sin())
    positions = torch.arange(tokens, device=device) % 500
    keep_index = torch.tensor([tokens - 1, 5, -1, tokens - 2], device=device)
    keep_position = torch.tensor([3, 4, 5, 6], device=device)
    rotated, memory_k, memory_v = chunk_compression(None, k, k, *tables, None, positions, keep_index, keep_position)[1:]
    tail = (torch.where(keep_index > tokens - last, keep_index - (tokens - last), -1), keep_position)
    want = reference.chunk_compression(None, k[-last:], k[-last:], *tables, None, positions[-last:], *tail)[1:]
    assert torch.equal(rotated[-last:], want[0])
    for got, exact in ((memory_k, want[1]), (memory_v, want[2])):
        assert torch.equal(got[[0, 2, 3]], exact[[0, 2, 3]])
    del k
    _, grad_k, grad_v = chunk_compression_backward(
        None, rotated, memory_k, memory_v, *tables, None, positions, keep_index, keep_position, tokens
    )
    exact_grads = reference.chunk_compression_backward(
        None, rotated[-last:], memory_k, memory_v, *tables, None, positions[-last:], *tail, last
    )
    assert torch.equal(grad_k[-last:], exact_grads[1]) and torch.equal(grad_v[-last:], exact_grads[2])
    assert not grad_v[6 : tokens - 2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 3}, TypeError, "k: expected a tensor, got int"),
        ({"k": torch.ones(41, 2, 24, dtype=torch.int32)}, TypeError, "k: expected dtype .*, got torch.int32"),
        ({"k": torch.ones(41, 48)}, ValueError, r"k: expected shape \[T, Hkv, D\], got \[41, 48\]"),
        ({"v": torch.ones(40, 2, 24)}, ValueError, r"v: expected shape \[41, 2, 24\], got \[40, 2, 24\]"),
        ({"v": torch.ones(41, 2, 24, dtype=torch.float16)}, TypeError, "v: expected dtype .*, got torch.float16"),
        ({"v": torch.ones(41, 2, 24, device="meta")}, ValueError, "v: expected device cpu, got meta"),
        ({"q": torch.ones(9, 4, 22)}, ValueError, r"q: expected shape \[Tq, Hq, 24\], got \[9, 4, 22\]"),
        ({"q": None}, ValueError, "q_positions: expected a tensor exactly when q is given"),
        ({"q_positions": None}, ValueError, "q_positions: expected a tensor exactly when q is given, got None"),
        ({"q_positions": torch.zeros(8).long()}, ValueError, r"q_positions: expected shape \[9\], got \[8\]"),
        ({"positions": torch.zeros(40).long()}, ValueError, r"positions: expected shape \[41\], got \[40\]"),
        ({"positions": torch.zeros(41)}, TypeError, "positions: expected dtype torch.int64, got torch.float32"),
        ({"cos": torch.ones(P, 13)}, ValueError, r"sin: expected shape \[67, 13\], got \[67, 12\]"),
        (
            {"cos": torch.ones(P, 13), "sin": torch.ones(P, 13)},
            ValueError,
            "cos: expected at most D/2 = 12 columns, got 13",
        ),
        ({"cos": torch.ones(P, 12).bfloat16()}, TypeError, "cos: expected dtype torch.float32, got torch.bfloat16"),
        ({"keep_index": torch.zeros(13, 1).long()}, ValueError, r"keep_index: expected shape \[S\], got \[13, 1\]"),
        ({"keep_position": torch.zeros(12).long()}, ValueError, r"keep_position: expected shape \[13\], got \[12\]"),
        (
            {"q_positions": torch.full((9,), P)},
            ValueError,
            r"q_positions\[0\]: expected 0 <= value < 67, got 67",
        ),
        ({"positions": -torch.arange(41)}, ValueError, r"positions\[1\]: expected 0 <= value < 67, got -1"),
        ({"keep_index": torch.arange(13) * 4}, ValueError, r"keep_index\[11\]: expected -1 <= value < 41, got 44"),
        ({"keep_index": torch.arange(13) - 2}, ValueError, r"keep_index\[0\]: expected -1 <= value < 41, got -2"),
        ({"keep_position": torch.full((13,), 99)}, ValueError, r"keep_position\[0\]: expected 0 <= value < 67, got 99"),
        ({"keep_index": torch.tensor([4, 7, 4] + [-1] * 10)}, ValueError, "keep_index.*: expected .*, got .*4"),
    ],
)
def test_messages(
    change: dict[str, Any], error: type[Exception], message: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    arguments = {**problem(generator, torch.device("cpu"), dtype), **change}
    for name in ("q", "k", "v"):
        if isinstance(arguments[name], Tensor) and arguments[name].dtype == torch.float32:
            arguments[name] = arguments[name].to(dtype)
    with pytest.raises(error, match=message):
        chunk_compression(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad_memory_k": None}, TypeError, "grad_memory_k: expected a tensor, got NoneType"),
        (
            {"grad_memory_v": torch.ones(12, 2, 24)},
            ValueError,
            r"grad_memory_v: expected shape \[13, 2, 24\], got \[12, 2, 24\]",
        ),
        ({"grad_q_rotated": torch.ones(9, 4, 23)}, ValueError, r"grad_q_rotated: expected shape \[Tq, Hq, 24\], got"),
        ({"grad_k_rotated": torch.ones(41, 1, 24)}, ValueError, r"grad_k_rotated: expected shape \[41, 2, 24\], got"),
        ({"num_tokens": -1}, ValueError, "num_tokens: expected at least 0, got -1"),
        ({"num_tokens": 40}, ValueError, r"grad_k_rotated: expected shape \[40, 2, 24\], got \[41, 2, 24\]"),
        ({"keep_index": torch.arange(13) + 30}, ValueError, r"keep_index\[11\]: expected -1 <= value < 41, got 41"),
        ({"keep_index": torch.zeros(13).long()}, ValueError, "keep_index.*: expected .*, got .*0"),
    ],
)
def test_messages_of_the_backward(
    change: dict[str, Any], error: type[Exception], message: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    arguments = problem(generator, torch.device("cpu"), dtype)
    names = ("grad_q_rotated", "grad_k_rotated", "grad_memory_k", "grad_memory_v")
    grads = {**dict(zip(names, chunk_compression(**arguments), strict=True)), "num_tokens": 41, **change}
    for name in names:
        if isinstance(grads[name], Tensor):
            grads[name] = grads[name].to(dtype)
    rest = {name: x for name, x in arguments.items() if name not in ("q", "k", "v")}
    with pytest.raises(error, match=message):
        chunk_compression_backward(**{**rest, **grads})

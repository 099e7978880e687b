"""Norms, gated activation and 8-bit rows against float64: dtypes, devices, shapes and strides that can hurt, limits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sharedllm_ext import ops
from sharedllm_ext.reference import fused_layer as reference
from tests.support import needs_cuda
from tests.tolerance import check_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
NAMES = [
    "silu_product",
    "rms_norm",
    "add_rms_norm",
    "quantize_rows_fp8",
    "silu_product_fp8",
    "rms_norm_fp8",
    "add_rms_norm_fp8",
]
# rows, width: whole vectors and not, a warp, a block, every number of vectors, more than a block's registers
SHAPES = [
    (0, 64),
    (3, 0),
    (1, 1),
    (5, 7),
    (9, 8),
    (17, 256),
    (3, 257),
    (2, 264),
    (3, 1000),
    (4, 1024),
    (2, 1032),
    (2, 4095),
    (5, 4096),
    (2, 14336),
    (1, 16384),
    (2, 16392),
    (1, 30001),
]


def arguments(
    name: str, rows: int, width: int, dtype: torch.dtype, device: Any, generator: torch.Generator
) -> list[Any]:
    """Tensors of the size that products have: some gates far from 0."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    if "silu" in name:
        return [4 * draw(rows, width), draw(rows, width)]
    if "rms" in name:
        tensors = [3 * draw(rows, width), 1 + draw(width)]
        return [*([tensors[0], draw(rows, width)] if "add" in name else tensors[:1]), tensors[1], EPS]
    return [draw(rows, width)]


def wide(values: list[Any]) -> list[Any]:
    return [value.double() if isinstance(value, Tensor) else value for value in values]


def pytorch(name: str, values: list[Any]) -> Any:
    """The same-dtype expression."""
    if name == "silu_product":
        return functional.silu(values[0]) * values[1]
    if name == "rms_norm":
        # as the models write it
        x, weight, eps = values
        unit = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        return weight * unit.to(x.dtype)
    if name == "add_rms_norm":
        total = values[0] + values[1]
        return total, pytorch("rms_norm", [total, *values[2:]])
    if name == "add_rms_norm_fp8":
        total = values[0] + values[1]
        return total, *pytorch("rms_norm_fp8", [total, *values[2:]])
    before = {"silu_product_fp8": "silu_product", "rms_norm_fp8": "rms_norm"}.get(name)
    return reference.quantize_rows_fp8(pytorch(before, values) if before else values[0])


def exact_values(name: str, values: list[Any]) -> Any:
    """Float64, without any quantisation."""
    plain = name.removesuffix("_fp8")
    if plain == "quantize_rows":
        return values[0].double()
    if plain == "add_rms_norm":
        # the norm is that of the rounded sum
        total = values[0] + values[1]
        return values[0].double() + values[1].double(), reference.rms_norm(*wide([total, *values[2:]]))
    return getattr(reference, plain)(*wide(values))


def restored(result: tuple[Tensor, Tensor]) -> Tensor:
    return result[0].double() * result[1].double()


def check(name: str, values: list[Any]) -> None:
    """Error at most twice that of PyTorch in the same dtype, and the same bits twice."""
    got, same, exact = getattr(ops, name)(*values), pytorch(name, values), exact_values(name, values)
    again = getattr(ops, name)(*values)
    parts = zip(*(x if isinstance(x, tuple) else (x,) for x in (got, again)), strict=True)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in parts if a.numel())
    if name == "add_rms_norm_fp8":
        check_error(name, got[0], same[0], exact[0])
        got, same, exact = got[1:], same[1:], exact[1]
    if name.endswith("_fp8"):
        codes, scale = got
        rows, width = values[0].shape
        assert codes.dtype == torch.float8_e4m3fn and codes.shape == (rows, width) and codes.is_contiguous()
        assert scale.dtype == torch.float32 and scale.shape == (rows, 1)
        if codes.numel():
            assert (codes.float().abs().amax(-1) == 448).all()
        check_error(name, restored(got), restored(same), exact)
    elif name == "add_rms_norm":
        for part in range(2):
            assert got[part].dtype == values[0].dtype and got[part].is_contiguous()
            check_error(name, got[part], same[part], exact[part])
    else:
        assert got.dtype == values[0].dtype and got.is_contiguous()
        check_error(name, got, same, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_error_against_float64(
    name: str, rows: int, width: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    check(name, arguments(name, rows, width, dtype, device, generator))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_strides_and_odd_addresses(
    name: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    values = arguments(name, 6, 512, dtype, device, generator)
    expected = getattr(ops, name)(*values)
    expected = expected if isinstance(expected, tuple) else (expected,)

    def longer(x: Tensor, more: int, first: int) -> Tensor:
        inside = x.new_full((*x.shape[:-1], x.shape[-1] + more), torch.nan)
        inside[..., first : first + x.shape[-1]] = x
        return inside[..., first : first + x.shape[-1]]

    for change in (
        lambda x: longer(x, 512, 512),
        lambda x: longer(x, 8, 0),
        lambda x: longer(x, 8, 1),
        lambda x: longer(x, 3, 2),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: x.T.contiguous().T if x.dim() == 2 else x,
    ):
        got = getattr(ops, name)(*(change(x) if isinstance(x, Tensor) else x for x in values))
        for a, b in zip(got if isinstance(got, tuple) else (got,), expected, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=0.13 if "fp8" in name else 2e-2, atol=1e-6)
    # one row for all
    values = [x[:1].expand(6, -1) if isinstance(x, Tensor) and x.dim() == 2 else x for x in values]
    check(name, values)


def test_halves_of_one_product(device: torch.device, generator: torch.Generator) -> None:
    both = torch.randn(5, 2 * 1536, generator=generator).to(device, torch.bfloat16)
    gate, up = both.chunk(2, -1)
    assert torch.equal(ops.silu_product(gate, up), ops.silu_product(gate.contiguous(), up.contiguous()))
    check("silu_product_fp8", [gate, up])


def test_codes_equal_the_reference(device: torch.device, generator: torch.Generator) -> None:
    for dtype in DTYPES:
        x = torch.randn(200, 640, generator=generator).to(dtype) * torch.logspace(-6, 3, 200).unsqueeze(1).to(dtype)
        codes, scale = ops.quantize_rows_fp8(x.to(device))
        want_codes, want_scale = reference.quantize_rows_fp8(x)
        assert torch.equal(scale.cpu(), want_scale)
        assert torch.equal(codes.cpu().view(torch.uint8), want_codes.view(torch.uint8))
    error = (restored((codes.cpu(), scale.cpu())) - x.double()).norm() / x.double().norm()
    assert 0.02 < error < 0.03


@pytest.mark.parametrize("width", [64, 500, 4096])
def test_zeros_and_what_is_too_small(width: int, device: torch.device) -> None:
    x = torch.zeros(4, width, device=device)
    x[1], x[2, 3], x[3, 5] = 2.0**-101, 2.0**-100, -(2.0**-140)
    codes, scale = ops.quantize_rows_fp8(x)
    assert not codes[[0, 1, 3]].float().any() and scale[[0, 1, 3]].eq(1).all()
    assert codes[2, 3].float() == 448 and scale[2] > 0
    weight = torch.ones(width, device=device)
    for codes, scale in (ops.rms_norm_fp8(x[:1], weight, EPS), ops.silu_product_fp8(x[:1], x[:1])):
        assert not codes.float().any() and scale.eq(1).all()
    assert not ops.rms_norm(x[:1], weight, EPS).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("width", [64, 500, 4096])
@pytest.mark.parametrize("name", NAMES)
def test_not_finite_stays_in_its_row(
    name: str, width: int, bad: float, device: torch.device, generator: torch.Generator
) -> None:
    values = arguments(name, 12, width, torch.bfloat16, device, generator)
    clean = getattr(ops, name)(*values)
    values[0][5, 7] = bad
    got = getattr(ops, name)(*values)
    others = torch.arange(12, device=device) != 5
    clean, got = (x if isinstance(x, tuple) else (x,) for x in (clean, got))
    for before, after in zip(clean, got, strict=True):
        assert torch.equal(before.float()[others], after.float()[others])
    if name.endswith("_fp8") and not (name == "silu_product_fp8" and bad == -float("inf")):
        assert restored(got[-2:])[5].isnan().all()
    want = getattr(reference, name)(*values)
    for a, b in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
        torch.testing.assert_close(a.float().isfinite(), b.float().isfinite())


def test_extreme_gates(device: torch.device) -> None:
    gate = torch.tensor([[-1e30, -700.0, -104.0, -88.5, -87.0, -20.0, 0.0, 20.0, 89.0, 700.0, 1e30]], device=device)
    for dtype in (torch.float32, torch.bfloat16):
        x = gate.to(dtype)
        got = ops.silu_product(x, torch.ones_like(x))
        torch.testing.assert_close(got.double(), functional.silu(x.double()), rtol=2.0**-7, atol=1e-36)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["silu_product", "rms_norm", "add_rms_norm"])
def test_gradients(name: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    values = arguments(name, 4, 24, dtype, device, generator)
    tensors = [x.requires_grad_() for x in values if isinstance(x, Tensor)]

    def gradients(function: Callable[..., Any], inputs: list[Any]) -> tuple[Tensor, ...]:
        leaves = [x for x in inputs if isinstance(x, Tensor)]
        results = function(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        total = sum((x.double() * (1 + i) * torch.arange(24.0, device=device)).sum() for i, x in enumerate(results))
        return torch.autograd.grad(total, leaves)

    exact_inputs = [x.detach().double().requires_grad_() if isinstance(x, Tensor) else x for x in values]
    exact = gradients(getattr(reference, name), exact_inputs)
    operator = getattr(torch.ops.sharedllm, name) if device.type == "cpu" or dtype != torch.float64 else None
    got = gradients(operator or getattr(ops, name), values)
    assert len(got) == len(tensors)
    for a, b in zip(got, exact, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(a, b)
        else:
            assert (a.double() - b).norm() <= 0.01 * b.norm()


@pytest.mark.parametrize("name", ["quantize_rows_fp8", "silu_product_fp8", "rms_norm_fp8", "add_rms_norm_fp8"])
def test_backward_is_refused(name: str, device: torch.device, generator: torch.Generator) -> None:
    values = arguments(name, 2, 32, torch.float32, device, generator)
    values[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="8-bit rows: expected to be computed without gradients"):
        getattr(ops, name)(*values)[-1].sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_and_compile(name: str, device: torch.device, generator: torch.Generator) -> None:
    values = arguments(name, 3, 40, torch.bfloat16, device, generator)
    torch.library.opcheck(getattr(torch.ops.sharedllm, name).default, tuple(values))
    compiled = torch.compile(getattr(ops, name), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got, want = compiled(*values), getattr(ops, name)(*values)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), strict=True):
        assert a.dtype == b.dtype and torch.equal(a.float(), b.float())


MISTAKES: list[tuple[str, int, Callable[[Tensor], Any], type[Exception], str]] = [
    ("silu_product", 0, lambda x: x.long(), TypeError, "gate: expected dtype torch.float32 or .*, got torch.int64"),
    ("silu_product", 1, lambda x: x[:, :3], ValueError, r"up: expected shape \[2, 32\], got \[2, 3\]"),
    ("silu_product_fp8", 1, lambda x: x.half(), TypeError, "up: expected dtype torch.float32, got torch.float16"),
    ("rms_norm", 0, lambda x: x[0], ValueError, r"x: expected shape \[T, d\], got \[32\]"),
    ("rms_norm", 1, lambda x: x[:5], ValueError, r"weight: expected shape \[32\], got \[5\]"),
    ("rms_norm_fp8", 1, lambda x: x.half(), TypeError, "weight: expected dtype torch.float32, got torch.float16"),
    ("add_rms_norm", 1, lambda x: x[:1], ValueError, r"residual: expected shape \[2, 32\], got \[1, 32\]"),
    ("add_rms_norm", 2, lambda x: None, TypeError, "weight: expected a tensor, got NoneType"),
    ("quantize_rows_fp8", 0, lambda x: x[None], ValueError, r"x: expected shape \[T, n\], got \[1, 2, 32\]"),
]


@pytest.mark.parametrize(("name", "index", "change", "error", "message"), MISTAKES)
def test_mistakes(
    name: str,
    index: int,
    change: Callable[[Tensor], Any],
    error: type[Exception],
    message: str,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    values = arguments(name, 2, 32, torch.float32, device, generator)
    values[index] = change(values[index])
    with pytest.raises(error, match=message):
        getattr(ops, name)(*values)


@needs_cuda
@pytest.mark.parametrize("name", NAMES)
def test_cuda_graph_without_waiting(name: str, generator: torch.Generator) -> None:
    values = arguments(name, 70, 4096, torch.bfloat16, "cuda", generator)
    want = getattr(ops, name)(*values)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            getattr(ops, name)(*values)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = getattr(ops, name)(*values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    for x in got:
        x.view(torch.uint8).fill_(0)
    graph.replay()
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(got, want, strict=True))


@needs_cuda
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "width"), [(70001, 16), (70001, 5), (66000, 1024)])
def test_many_rows(name: str, rows: int, width: int, generator: torch.Generator) -> None:
    check(name, arguments(name, rows, width, torch.bfloat16, "cuda", generator))


@needs_cuda
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [4096, 4095])
def test_more_than_2_to_the_31_elements(name: str, width: int, generator: torch.Generator) -> None:
    """The last rows are those of a call with them alone."""
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB of GPU memory")
    torch.use_deterministic_algorithms(False)
    rows, last = (1 << 31) // width + 5, 4
    few = arguments(name, last, width, torch.bfloat16, "cuda", generator)
    many = []
    for x in few:
        if isinstance(x, Tensor) and x.dim() == 2:
            long = torch.zeros(rows, width, dtype=x.dtype, device="cuda")
            long[-last:] = x
            x = long
        many.append(x)
    got, want = (getattr(ops, name)(*values) for values in (many, few))
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), strict=True):
        assert torch.equal(a[-last:].float(), b.float())
        assert not a[: -last - 1 : 4097].float().any() or (a[: -last - 1] == 1).all()


@needs_cuda
def test_scaled_matrix_product(generator: torch.Generator) -> None:
    """torch's product takes codes and scales as they are; off by the operands' rounding, 2.6% each."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("8-bit products need compute capability 8.9")
    x, weight = (torch.randn(n, 512, generator=generator).to("cuda", torch.bfloat16) for n in (300, 256))
    x[7], x[9, 3] = 0, torch.nan
    (a, a_scale), (b, b_scale) = ops.quantize_rows_fp8(x), ops.quantize_rows_fp8(weight)
    got = torch._scaled_mm(
        a, b.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )
    assert got[9].isnan().all() and not got[7].any()
    rows = torch.arange(300, device="cuda") != 9
    exact = (x.double() @ weight.double().t())[rows]
    assert (got[rows].double() - exact).norm() / exact.norm() < 0.05

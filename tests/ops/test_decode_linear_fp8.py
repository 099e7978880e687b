"""The fused linear with weights in 8 bits against float64: dtypes, devices, hard shapes, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sharedllm_ext.ops import decode_append, decode_linear_fp8, quantize_rows_fp8
from sharedllm_ext.reference import decode_step as reference
from tests.ops.linear_cases import EPS, KINDS, SHAPES, arguments, outputs_of, random_data, shape_for, wide
from tests.support import needs_cuda
from tests.tolerance import check_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _case(*sizes: Any) -> dict[str, Any]:
    """Arguments of one product, by those of :func:`arguments`."""
    weights, data = arguments(*sizes)
    pairs = [quantize_rows_fp8(weight) for weight in weights]
    return {**data, "codes": [codes for codes, _ in pairs], "scales": [scale for _, scale in pairs]}


def _exact(data: dict[str, Any]) -> Tensor:
    return reference.decode_linear_fp8(**{name: wide(value) for name, value in data.items()})


def _check(data: dict[str, Any], **more: Any) -> Tensor:
    """Error at most twice that of PyTorch in the same dtype, whose sums are float32."""
    got = decode_linear_fp8(**data, **more)
    assert got.dtype == data["x"].dtype
    check_error("decode_linear_fp8", got, reference.decode_linear_fp8(**data), _exact(data), worst=2)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8])
def test_linear(device: torch.device, generator: torch.Generator, dtype: torch.dtype, kind: str, rows: int) -> None:
    _check(_case(generator, device, dtype, rows, 640, outputs_of(kind), kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner", "outputs"), [*SHAPES, (2, 2064, (9,)), (1, 1024, (20,)), (4, 1040, (20,))])
@pytest.mark.parametrize("kind", ["", "nbr", "g"])
def test_linear_shapes(
    device: torch.device,
    generator: torch.Generator,
    dtype: torch.dtype,
    rows: int,
    inner: int,
    outputs: tuple[int, ...],
    kind: str,
) -> None:
    _check(_case(generator, device, dtype, rows, inner, shape_for(kind, inner, outputs), kind))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_strides_and_odd_addresses(device: torch.device, generator: torch.Generator, dtype: torch.dtype) -> None:
    for rows, inner in ((1, 512), (3, 512), (3, 510)):
        data = _case(generator, device, dtype, rows, inner, (96, 32), "nbr")
        _check(data)
        broad, _ = quantize_rows_fp8(random_data(generator, device, torch.float32, 96, inner + 16))
        for begin in (0, 1, 16):
            data["codes"][0] = broad[:, begin : begin + inner]
            _check(data)
        # rows of a joined matrix
        data["codes"][1], data["scales"][1] = broad[5:37, :inner], data["scales"][0][5:37]
        _check(data)
        data["codes"][0] = quantize_rows_fp8(random_data(generator, device, torch.float32, inner, 96))[0].T
        _check(data)
        data["x"] = random_data(generator, device, dtype, rows, 2 * inner)[:, ::2]
        _check(data)
        data["residual"] = random_data(generator, device, dtype, rows, 300)[:, 11 : 11 + 128]
        _check(data)
        data["norm_weight"] = random_data(generator, device, dtype, inner + 1)[1:]
        _check(data)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_its_number(device: torch.device, dtype: torch.dtype) -> None:
    """All 256 codes in one row, asked for one by one; a NaN makes everything of its row one."""
    bits = torch.arange(256, dtype=torch.uint8, device=device).roll(7)
    numbers = bits.view(torch.float8_e4m3fn).float()
    clean = bits.masked_fill(numbers.isnan(), 0).view(torch.float8_e4m3fn)
    x, one = torch.eye(256, dtype=dtype, device=device), torch.ones(2, 1, device=device)
    both = torch.stack((bits.view(torch.float8_e4m3fn).view(torch.uint8), clean.view(torch.uint8)))
    for first in range(0, 256, 8):
        got = decode_linear_fp8(x[first : first + 8], [both.view(torch.float8_e4m3fn)], [one])
        assert got[:, 0].isnan().all()
        assert torch.equal(got[:, 1].float(), numbers[first : first + 8].nan_to_num(0.0))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("kind", ["", "n"])
def test_linear_of_small_and_large_rows(
    device: torch.device, generator: torch.Generator, magnitude: float, kind: str
) -> None:
    """Rows of bfloat16 far beyond half precision, and columns of very different sizes in one row."""
    data = _case(generator, device, torch.bfloat16, 4, 640, (96,), kind)
    data["x"][0] *= magnitude
    data["x"][1, ::7] *= 1e4
    data["x"][2] = 0
    data["x"][3, 5] = magnitude
    if kind:
        data["norm_weight"][::3] *= 1e3
    got, exact, same = decode_linear_fp8(**data), _exact(data), reference.decode_linear_fp8(**data)
    for row in range(4):
        # each against its own size
        largest = max(exact[row].abs().max().item(), 1e-38)
        parts = [one[row].double() / largest for one in (got, same, exact)]
        check_error(f"row {row}", *parts, worst=2)


def test_linear_says_the_same_twice(device: torch.device, generator: torch.Generator) -> None:
    data = _case(generator, device, torch.bfloat16, 4, 4096, (1000,), "nbr")
    assert torch.equal(decode_linear_fp8(**data), decode_linear_fp8(**data))


def test_linear_overlap_and_prefetch(device: torch.device, generator: torch.Generator) -> None:
    first = _case(generator, device, torch.bfloat16, 1, 4096, (4096,), "n")
    second = _case(generator, device, torch.bfloat16, 1, 4096, (4096, 4096), "nbg")
    expected = None
    for overlap in (False, True):
        for _ in range(20):
            x = decode_linear_fp8(**first, overlap=overlap, prefetch=second["codes"][0], prefetch_bytes=1 << 30)
            x = decode_linear_fp8(
                **{**second, "x": x}, overlap=overlap, prefetch=second["biases"][0], prefetch_bytes=17
            )
            expected = x if expected is None else expected
            assert torch.equal(x, expected)


def test_linear_nan_stays_in_its_row(device: torch.device, generator: torch.Generator) -> None:
    for kind in ("", "n"):
        for bad in (torch.nan, torch.inf):
            data = _case(generator, device, torch.bfloat16, 3, 512, (40,), kind)
            clean = decode_linear_fp8(**data)
            data["x"][1, 5] = bad
            got = decode_linear_fp8(**data)
            assert not got[1].isfinite().any()
            assert torch.equal(got[::2], clean[::2])
    # a row of weights that could not be quantised
    data = _case(generator, device, torch.bfloat16, 3, 512, (40,), "")
    data["scales"][0][7] = torch.nan
    got = decode_linear_fp8(**data)
    assert got[:, 7].isnan().all() and got.isnan().sum() == 3


def test_messages(device: torch.device, generator: torch.Generator) -> None:
    data = _case(generator, device, torch.float32, 2, 64, (8, 8), "nb")
    for change, error, text in [
        ({"codes": []}, ValueError, "codes: expected 1 to 3 matrices, got 0"),
        ({"codes": [data["codes"][0][:, :5]] * 2}, ValueError, r"codes\[0\]: expected shape \[N0, 64\], got \[8, 5\]"),
        (
            {"codes": [data["x"]] * 2},
            TypeError,
            r"codes\[0\]: expected dtype torch.float8_e4m3fn, got torch.float32",
        ),
        ({"scales": data["scales"][:1]}, ValueError, "scales: expected 2 entries, one for each matrix, got 1"),
        (
            {"scales": [scale.flatten() for scale in data["scales"]]},
            ValueError,
            r"scales\[0\]: expected shape \[8, 1\], got \[8\]",
        ),
        (
            {"scales": [scale.half() for scale in data["scales"]]},
            TypeError,
            r"scales\[0\]: expected dtype torch.float32",
        ),
        ({"biases": [None]}, ValueError, "biases: expected 2 entries, one for each matrix, got 1"),
        ({"norm_weight": data["norm_weight"].half()}, TypeError, "norm_weight: expected dtype torch.float32"),
        ({"residual": data["x"]}, ValueError, r"residual: expected shape \[2, 16\], got \[2, 64\]"),
        ({"gated": True, "residual": data["x"]}, ValueError, "residual: expected None with gated, got a tensor"),
        (
            {"gated": True, "codes": data["codes"][:1], "scales": data["scales"][:1], "biases": None},
            ValueError,
            "codes: expected 2 matrices with",
        ),
    ]:
        with pytest.raises(error, match=text):
            decode_linear_fp8(**{**data, **change})


def _positional(case: dict[str, Any]) -> tuple[Any, ...]:
    codes, scales = ([*case[name], None, None][:3] for name in ("codes", "scales"))
    biases = [*case.get("biases", []), None, None, None][:3]
    rest = (case.get("norm_weight"), EPS, case.get("residual"), case["gated"], False, None, 0)
    return (case["x"], *codes, *scales, *biases, *rest)


def test_the_operator_itself_refuses(device: torch.device, generator: torch.Generator) -> None:
    """What a caller of torch.ops can get wrong, without the checks of the public function."""
    call = torch.ops.sharedllm.decode_linear_fp8
    good = list(_positional(_case(generator, device, torch.bfloat16, 2, 64, (8, 8), "")))
    for place, value, text in [
        (1, good[0], "expected dtype"),
        (2, None, "scale2: expected none without weight2"),
        (3, good[1], "scale.*: expected one with"),
        (5, None, "expected one with"),
        (4, good[4].flatten(), r"expected shape \[8, 1\]"),
        (4, good[4].double(), "expected dtype"),
        (9, good[0][0, :8].contiguous(), "bias3: expected none without weight3"),
    ]:
        bad = list(good)
        bad[place] = value
        with pytest.raises(ValueError, match=text):
            call(*bad)


def test_linear_refuses_gradients(device: torch.device, generator: torch.Generator) -> None:
    data = _case(generator, device, torch.bfloat16, 2, 64, (8,), "")
    data["x"].requires_grad_()
    with pytest.raises(NotImplementedError, match="decode_linear_fp8: expected to be run without gradients"):
        decode_linear_fp8(**data).sum().backward()


def test_opcheck(device: torch.device, generator: torch.Generator) -> None:
    """Its test of the schema compares arguments before and after, which PyTorch cannot do for codes: here, by bytes."""
    for kind, outputs in (("nbr", (8, 16, 8)), ("g", (8, 8))):
        given = _positional(_case(generator, device, torch.bfloat16, 2, 64, outputs, kind))
        before = [x.clone() if isinstance(x, Tensor) else x for x in given]
        torch.library.opcheck(torch.ops.sharedllm.decode_linear_fp8, given, test_utils=("test_faketensor",))
        out = torch.ops.sharedllm.decode_linear_fp8(*given)
        for x, was in zip(given, before, strict=True):
            if isinstance(x, Tensor) and isinstance(was, Tensor):
                assert torch.equal(x.contiguous().view(torch.uint8), was.contiguous().view(torch.uint8))
                assert x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()


def test_compiles(device: torch.device, generator: torch.Generator) -> None:
    data = _case(generator, device, torch.bfloat16, 2, 64, (8,), "nr")
    step = torch.compile(lambda **given: decode_linear_fp8(**given) * 2, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(step(**data), decode_linear_fp8(**data) * 2)


@needs_cuda
def test_cuda_graph(generator: torch.Generator) -> None:
    device = torch.device("cuda")
    first = _case(generator, device, torch.bfloat16, 2, 512, (1024, 256, 256), "n")
    angle = torch.rand(40, 64, generator=generator)
    data = {
        "keys": random_data(generator, device, torch.bfloat16, 2, 24, 2, 128),
        "values": random_data(generator, device, torch.bfloat16, 2, 24, 2, 128),
        "length": torch.zeros(2, dtype=torch.int64, device=device),
        "first": torch.zeros(2, dtype=torch.int64, device=device),
        "cos": angle.cos().to(device),
        "sin": angle.sin().to(device),
    }
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()

    def step() -> tuple[Tensor, Tensor]:
        return decode_append(**{**data, "qkv": decode_linear_fp8(**first, overlap=True), "overlap": True})

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        with torch.cuda.graph(graph, stream=stream):
            q, slots = step()
    torch.cuda.current_stream().wait_stream(stream)
    for length in (1, 7):
        data["length"].fill_(length)
        first["x"].normal_()
        graph.replay()
        got = [x.clone() for x in (q, slots, data["keys"], data["values"])]
        expected = step()
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        assert torch.equal(got[2], data["keys"]) and torch.equal(got[3], data["values"])

"""Operators of one decoding step against float64: every dtype, device and shape that can hurt, and what they refuse."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sharedllm_ext.ops import decode_append, decode_linear
from sharedllm_ext.reference import decode_step as reference
from tests.ops.linear_cases import EPS, KINDS, SHAPES, arguments, outputs_of, random_data, shape_for, wide
from tests.support import needs_cuda
from tests.tolerance import check_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _case(*sizes: Any) -> dict[str, Any]:
    """Arguments of one product, by those of :func:`arguments`."""
    weights, data = arguments(*sizes)
    return {**data, "weights": [weight.to(data["x"].dtype) for weight in weights]}


def _check(data: dict[str, Any], **more: Any) -> Tensor:
    """Error at most twice that of PyTorch in the same dtype."""
    got = decode_linear(**data, **more)
    exact = reference.decode_linear(**{name: wide(value) for name, value in data.items()})
    same = reference.decode_linear(**data)
    assert got.dtype == data["x"].dtype
    check_error("decode_linear", got, same, exact, worst=2)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
def test_linear(device: torch.device, generator: torch.Generator, dtype: torch.dtype, kind: str, rows: int) -> None:
    _check(_case(generator, device, dtype, rows, 640, outputs_of(kind), kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner", "outputs"), SHAPES)
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
        broad = random_data(generator, device, dtype, 96, inner + 8)
        data["weights"][0] = broad[:, :inner]
        _check(data)
        data["weights"][0] = broad[:, 1 : inner + 1]
        _check(data)
        data["weights"][0] = random_data(generator, device, dtype, inner, 96).T
        _check(data)
        data["x"] = random_data(generator, device, dtype, rows, 2 * inner)[:, ::2]
        _check(data)
        data["residual"] = random_data(generator, device, dtype, rows, 300)[:, 11 : 11 + 128]
        _check(data)
        data["norm_weight"] = random_data(generator, device, dtype, inner + 1)[1:]
        _check(data)


def test_linear_says_the_same_twice(device: torch.device, generator: torch.Generator) -> None:
    data = _case(generator, device, torch.bfloat16, 4, 4096, (1000,), "nbr")
    assert torch.equal(decode_linear(**data), decode_linear(**data))


def test_linear_overlap_and_prefetch(device: torch.device, generator: torch.Generator) -> None:
    first = _case(generator, device, torch.bfloat16, 1, 4096, (4096,), "n")
    second = _case(generator, device, torch.bfloat16, 1, 4096, (4096, 4096), "nbg")
    expected = None
    for overlap in (False, True):
        for _ in range(20):
            x = decode_linear(**first, overlap=overlap, prefetch=second["weights"][0], prefetch_bytes=1 << 30)
            x = decode_linear(**{**second, "x": x}, overlap=overlap, prefetch=second["biases"][0], prefetch_bytes=17)
            expected = x if expected is None else expected
            assert torch.equal(x, expected)


def test_linear_overlap_with_weights_that_are_copied(device: torch.device, generator: torch.Generator) -> None:
    """The kernel in front is then the copy, whose results may not be read before it has ended."""
    case = _case(generator, device, torch.bfloat16, 1, 4096, (2048,), "n")
    expected = None
    for turn in range(40):
        # other numbers in the same memory, so that what the last turn left there shows
        factor = 2.0 ** (turn % 3)
        data = dict(case)
        data["weights"] = [(case["weights"][0] * factor).T.contiguous().T]
        data["norm_weight"] = torch.stack((case["norm_weight"],) * 2, 1)[:, 0]
        got = decode_linear(**data, overlap=True) / factor
        expected = got if expected is None else expected
        assert torch.equal(got, expected)


def test_linear_nan_stays_in_its_row(device: torch.device, generator: torch.Generator) -> None:
    for kind in ("", "n"):
        data = _case(generator, device, torch.bfloat16, 3, 512, (40,), kind)
        clean = decode_linear(**data)
        data["x"][1, 5] = torch.nan
        got = decode_linear(**data)
        assert got[1].isnan().all()
        assert torch.equal(got[::2], clean[::2])


def _append_case(
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    heads: tuple[int, int],
    size: int,
    half: int,
) -> dict[str, Any]:
    q_heads, kv_heads = heads
    angle = torch.rand(40, half, generator=generator)
    return {
        "qkv": random_data(generator, device, dtype, rows, (q_heads + 2 * kv_heads) * size),
        "keys": random_data(generator, device, dtype, rows, 24, kv_heads, size),
        "values": random_data(generator, device, dtype, rows, 24, kv_heads, size),
        "length": torch.randint(0, 24, (rows,), generator=generator).to(device),
        "first": torch.randint(0, 5, (rows,), generator=generator).to(device),
        "cos": angle.cos().to(device),
        "sin": angle.sin().to(device),
    }


def _check_append(data: dict[str, Any]) -> None:
    copies = [{**data, "keys": data["keys"].clone(), "values": data["values"].clone()} for _ in range(2)]
    exact = {name: wide(value) for name, value in data.items()}
    exact["cos"], exact["sin"] = data["cos"], data["sin"]
    exact = {name: value.clone() if isinstance(value, Tensor) else value for name, value in exact.items()}
    got, same, best = decode_append(**copies[0]), reference.decode_append(**copies[1]), reference.decode_append(**exact)
    assert torch.equal(got[1], best[1])
    for name, index in (("q", None), ("keys", 0), ("values", 0)):
        results = [
            result[0] if index is None else case[name]
            for result, case in ((got, copies[0]), (same, copies[1]), (best, exact))
        ]
        check_error(name, *results, worst=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 6, 100])
@pytest.mark.parametrize(
    ("rows", "heads", "size", "half"),
    [(1, (8, 2), 128, 64), (5, (7, 1), 96, 32), (2, (4, 4), 64, 0), (3, (6, 2), 7, 3), (1, (1, 1), 256, 128)],
)
def test_append(
    device: torch.device,
    generator: torch.Generator,
    dtype: torch.dtype,
    window: int,
    rows: int,
    heads: tuple[int, int],
    size: int,
    half: int,
) -> None:
    data = _append_case(generator, device, dtype, rows, heads, size, half)
    _check_append({**data, "window": window})
    norms = {
        "q_norm": random_data(generator, device, dtype, size),
        "k_norm": random_data(generator, device, dtype, size),
    }
    _check_append({**data, **norms, "eps": EPS, "window": window})
    # storage of another order, and projections inside a wider tensor
    data["keys"] = random_data(generator, device, dtype, rows, heads[1], 24, size).transpose(1, 2)
    data["qkv"] = random_data(generator, device, dtype, rows, data["qkv"].shape[1] + 3)[:, 3:]
    _check_append(data)


def test_append_to_a_full_cache_writes_nothing(device: torch.device, generator: torch.Generator) -> None:
    data = _append_case(generator, device, torch.float32, 3, (4, 2), 64, 32)
    data["length"] = torch.tensor([24, 99, -5], device=device)
    data["first"] = torch.tensor([0, 200, -1], device=device)
    before = data["keys"].clone()
    _, slots = decode_append(**data)
    assert torch.equal(data["keys"][:2], before[:2])
    assert torch.equal(data["keys"][2, 1:], before[2, 1:])
    assert not torch.equal(data["keys"][2, 0], before[2, 0])
    assert slots.tolist() == [[0, 24], [48, 48], [48, 49]]


def test_append_touches_its_token_alone(device: torch.device, generator: torch.Generator) -> None:
    data = _append_case(generator, device, torch.bfloat16, 2, (4, 2), 64, 32)
    data["keys"].fill_(torch.nan)
    data["values"].fill_(torch.nan)
    data["length"] = torch.tensor([3, 0], device=device)
    decode_append(**data)
    for name in ("keys", "values"):
        finite = data[name].isfinite().all(-1).all(-1)
        assert finite.nonzero().tolist() == [[0, 3], [1, 0]]


def test_messages(device: torch.device, generator: torch.Generator) -> None:
    data = _case(generator, device, torch.float32, 2, 64, (8, 8), "nb")
    for change, error, text in [
        ({"weights": []}, ValueError, "weights: expected 1 to 3 matrices, got 0"),
        (
            {"weights": [data["weights"][0][:, :5]] * 2},
            ValueError,
            r"weights\[0\]: expected shape \[N0, 64\], got \[8, 5\]",
        ),
        ({"biases": [None]}, ValueError, "biases: expected 2 entries, one for each matrix, got 1"),
        ({"norm_weight": data["norm_weight"].half()}, TypeError, "norm_weight: expected dtype torch.float32"),
        ({"residual": data["x"]}, ValueError, r"residual: expected shape \[2, 16\], got \[2, 64\]"),
        ({"gated": True, "residual": data["x"]}, ValueError, "residual: expected None with gated, got a tensor"),
        (
            {"gated": True, "weights": data["weights"][:1], "biases": None},
            ValueError,
            "weights: expected 2 matrices with",
        ),
    ]:
        with pytest.raises(error, match=text):
            decode_linear(**{**data, **change})
    data = _append_case(generator, device, torch.float32, 2, (4, 2), 64, 32)
    for change, error, text in [
        ({"qkv": data["qkv"][:, :200]}, ValueError, "qkv: expected whole heads of 64, more than 4, got 200 columns"),
        (
            {"values": data["values"][:, :3]},
            ValueError,
            r"values: expected shape \[2, 24, 2, 64\], got \[2, 3, 2, 64\]",
        ),
        ({"length": data["length"].int()}, TypeError, "length: expected dtype torch.int64, got torch.int32"),
        ({"keys": data["keys"].transpose(2, 3).contiguous().transpose(2, 3)}, ValueError, "keys: expected heads whose"),
        (
            {"cos": data["cos"].repeat(1, 2), "sin": data["sin"].repeat(1, 2)},
            ValueError,
            "cos: expected at most D/2 = 32",
        ),
    ]:
        with pytest.raises(error, match=text):
            decode_append(**{**data, **change})


def test_linear_refuses_gradients(device: torch.device, generator: torch.Generator) -> None:
    data = _case(generator, device, torch.float32, 2, 64, (8,), "")
    data["x"].requires_grad_()
    with pytest.raises(NotImplementedError, match="decode_linear: expected to be run without gradients"):
        decode_linear(**data).sum().backward()


def test_opcheck(device: torch.device, generator: torch.Generator) -> None:
    tests = ("test_schema", "test_faketensor")
    for kind, outputs in (("nbr", (8, 16, 8)), ("g", (8, 8))):
        case = _case(generator, device, torch.float32, 2, 64, outputs, kind)
        matrices = [*case["weights"], None][:3]
        biases = [*case.get("biases", []), None, None, None][:3]
        rest = (case.get("norm_weight"), EPS, case.get("residual"), case["gated"], False, None, 0)
        torch.library.opcheck(
            torch.ops.sharedllm.decode_linear, (case["x"], *matrices, *biases, *rest), test_utils=tests
        )
    data = _append_case(generator, device, torch.float32, 2, (4, 2), 64, 32)
    arguments = (*data.values(), None, None, 0.0, 3, False, None, 0)
    torch.library.opcheck(torch.ops.sharedllm.decode_append, arguments, test_utils=tests)


def test_compiles(device: torch.device, generator: torch.Generator) -> None:
    data = _case(generator, device, torch.float32, 2, 64, (8,), "nr")
    step = torch.compile(lambda **given: decode_linear(**given) * 2, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(step(**data), decode_linear(**data) * 2)


@needs_cuda
def test_cuda_graph(generator: torch.Generator) -> None:
    device = torch.device("cuda")
    first = _case(generator, device, torch.bfloat16, 2, 512, (1024, 256, 256), "n")
    data = _append_case(generator, device, torch.bfloat16, 2, (8, 2), 128, 64)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()

    def step() -> tuple[Tensor, Tensor]:
        return decode_append(**{**data, "qkv": decode_linear(**first, overlap=True), "overlap": True})

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

"""Injected attention over a memory of 8-bit codes: against float64 over the same codes, tracing, messages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_injected_attention import attend, build
from torch import Tensor

from sharedllm_ext import reference
from sharedllm_ext.ops import dequantize_memory, injected_attention_8bit, quantize_memory
from sharedllm_ext.reference.memory_quantization import quantize_memory as reference_quantize
from tests.support import needs_cuda, scale_last
from tests.tolerance import check_error

attend_8bit = scale_last(injected_attention_8bit)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# queries of each row, slots of each row, number of slots, Hq, Hkv, D, R
SPECS = {
    "decode": ([1, 2, 1], [(0, 700), (100, 131), (4, 4)], 900, 8, 2, 128, 128),
    "decode, group of 7, 64": ([3, 1], [(0, 65), (1, 900)], 900, 7, 1, 64, 32),
    "decode, 96": ([4, 1], [(3, 130), (0, 900)], 900, 4, 4, 96, 96),
    "decode, 80": ([2, 1], [(3, 700), (0, 131)], 900, 8, 2, 80, 80),
    "decode, 40": ([2, 1], [(3, 700), (0, 131)], 900, 8, 2, 40, 40),
    "decode, 192": ([1, 4], [(5, 800), (0, 90)], 900, 8, 1, 192, 96),
    "decode, 256": ([1], [(5, 800)], 900, 4, 2, 256, 128),
    "many queries": ([150, 40], [(0, 300), (100, 900)], 900, 8, 2, 128, 128),
    "many queries, 112": ([40, 150], [(0, 300), (100, 900)], 900, 8, 2, 112, 112),
    "many queries, 32": ([150], [(1, 300)], 301, 4, 2, 32, 16),
    "no slots": ([2], [(0, 0)], 0, 4, 2, 64, 64),
    "no queries": ([0], [(0, 9)], 9, 4, 2, 64, 64),
}


def problem(
    name: str, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> tuple[list[Any], list[Any]]:
    """Arguments of the operator, and those of the float64 oracle over the same codes."""
    q, k, v, *rest = build(SPECS[name], dtype, device, generator)
    codes, scales = zip(quantize_memory(k), quantize_memory(v), strict=True)
    stored = [dequantize_memory(c, s, torch.float64) for c, s in zip(codes, scales, strict=True)]
    cos, sin, scale = rest[3:]
    oracle = [q.double(), *stored, *rest[:3], cos.double(), sin.double(), scale]
    return [q, *codes, *scales, *rest], oracle


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECS)
def test_error_against_float64(name: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    arguments, oracle = problem(name, dtype, device, generator)
    out, lse = attend_8bit(*arguments)
    assert out.dtype == dtype and lse.dtype == torch.float32
    exact_out, exact_lse = reference.injected_attention(*oracle)
    # the same-dtype expression: codes restored in q's dtype, products in that dtype
    restored = [dequantize_memory(c, s, dtype) for c, s in zip(arguments[1:3], arguments[3:5], strict=True)]
    same_out, same_lse = attend(arguments[0], *restored, *arguments[5:])
    if dtype == torch.float32:
        torch.testing.assert_close(out.double(), exact_out, rtol=0, atol=3e-6)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=3e-5)
    else:
        check_error("out", out, same_out, exact_out)
        check_error("lse", lse, same_lse, exact_lse)
    again, _ = attend_8bit(*arguments)
    assert torch.equal(again, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 64, 96, 128, 256])
def test_quantize_equals_the_reference(
    size: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    x = torch.randn(301, 3, size, generator=generator).to(dtype)
    x[3], x[4, 1], x[5, 0, 2], x[6, 2, 1] = 0, 2.0**-120, torch.nan, torch.inf
    codes, scale = quantize_memory(x.to(device))
    want_codes, want_scale = reference_quantize(x)
    torch.testing.assert_close(scale.cpu(), want_scale, rtol=1e-6, atol=0, equal_nan=True)
    # a product that lies between two codes may fall either way
    difference = (codes.cpu().int() - want_codes.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    turned = x.to(device).transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(quantize_memory(turned)[0], codes)


def test_other_slots_do_not_leak(device: torch.device, generator: torch.Generator) -> None:
    arguments, _ = problem("decode", torch.bfloat16, device, generator)
    out, lse = attend_8bit(*arguments)
    for scales in arguments[3:5]:
        scales[700:] = torch.nan
    again, again_lse = attend_8bit(*arguments)
    assert torch.equal(again, out) and torch.equal(again_lse, lse)


def test_what_it_costs(device: torch.device, generator: torch.Generator) -> None:
    q, k, v, *rest = build(([2], [(0, 900)], 900, 8, 2, 128, 128), torch.float32, device, generator)
    exact, _ = attend(q, k, v, *rest)
    (keys, key_scale), (values, value_scale) = quantize_memory(k), quantize_memory(v)
    got, _ = attend_8bit(q, keys, values, key_scale, value_scale, *rest)
    assert 0 < (got - exact).norm() / exact.norm() < 0.015


@pytest.mark.parametrize("name", ["decode", "many queries, 32"])
def test_opcheck_and_compile(name: str, device: torch.device, generator: torch.Generator) -> None:
    arguments, _ = problem(name, torch.bfloat16, device, generator)
    torch.library.opcheck(torch.ops.sharedllm.injected_attention_8bit.default, tuple(arguments))
    torch.library.opcheck(torch.ops.sharedllm.quantize_memory.default, (arguments[0],))
    compiled = torch.compile(attend_8bit, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(*arguments), attend_8bit(*arguments)))


def test_backward_is_refused(device: torch.device, generator: torch.Generator) -> None:
    arguments, _ = problem("decode", torch.float32, device, generator)
    arguments[0].requires_grad_()
    with pytest.raises(NotImplementedError, match="8-bit memory: expected to be read without gradients"):
        attend_8bit(*arguments)[0].sum().backward()


@needs_cuda
@pytest.mark.parametrize("name", ["decode", "many queries"])
def test_cuda_graph_without_waiting(name: str, generator: torch.Generator) -> None:
    arguments, _ = problem(name, torch.bfloat16, "cuda", generator)
    want = attend_8bit(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            attend_8bit(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = attend_8bit(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, want[0])


NAMES = ("q", "k", "v", "k_scale", "v_scale", "cu_q", "slot_range", "q_position", "cos", "sin", "scale")

MISTAKES: list[tuple[str, Callable[[Tensor], Any], type[Exception], str]] = [
    ("q", lambda x: x.long(), TypeError, "q: expected dtype torch.float32 or .*, got torch.int64"),
    ("k", lambda x: x.float(), TypeError, "k: expected dtype torch.int8, got torch.float32"),
    ("k", lambda x: x[..., 1:], ValueError, r"k: expected shape \[S, Hkv, 128\], got \[900, 2, 127\]"),
    ("v", lambda x: x[1:], ValueError, r"v: expected shape \[900, 2, 128\], got \[899, 2, 128\]"),
    ("k_scale", lambda x: x[:, :1], ValueError, r"k_scale: expected shape \[900, 2\], got \[900, 1\]"),
    ("v_scale", lambda x: x.half(), TypeError, "v_scale: expected dtype torch.float32, got torch.float16"),
    ("cu_q", lambda x: x[1:], ValueError, r"cu_q: expected shape \[4\], got \[3\]"),
    ("q", lambda x: x[:, :7], ValueError, "q: expected a number of heads divisible by k's 2, got 7"),
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
    values, _ = problem("decode", torch.float32, device, generator)
    arguments = dict(zip(NAMES, values, strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=message):
        injected_attention_8bit(**arguments)


def test_mistakes_of_the_other_functions(device: torch.device) -> None:
    with pytest.raises(TypeError, match=r"x: expected dtype .*, got torch.int8"):
        quantize_memory(torch.zeros(1, 1, 8, dtype=torch.int8, device=device))
    with pytest.raises(ValueError, match=r"scale: expected shape \[2, 1\], got \[1, 1\]"):
        codes = torch.zeros(2, 1, 8, dtype=torch.int8, device=device)
        dequantize_memory(codes, torch.zeros(1, 1, device=device), torch.float32)
    with pytest.raises(ValueError, match=r"dtype: expected torch.float32 or .*, got torch.int8"):
        dequantize_memory(codes, torch.zeros(2, 1, device=device), torch.int8)

"""Reference of the 8-bit context memory: rounding, bounds, what is not finite, and what it costs the attention."""

import pytest
import torch

from sharedllm_ext.reference import injected_attention
from sharedllm_ext.reference.memory_quantization import dequantize_memory, quantize_memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [8, 64, 96, 256])
def test_rounds_to_half_a_step(dtype: torch.dtype, size: int) -> None:
    x = torch.randn(50, 3, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    codes, scale = quantize_memory(x)
    assert codes.dtype == torch.int8 and codes.shape == x.shape
    assert scale.dtype == torch.float32 and scale.shape == x.shape[:2]
    assert codes.abs().amax(-1).eq(127).all()
    difference = (dequantize_memory(codes, scale, torch.float64) - x.double()).abs()
    assert (difference <= 0.5001 * scale.double().unsqueeze(-1)).all()


def test_codes_survive_a_second_round() -> None:
    codes, scale = quantize_memory(torch.randn(20, 2, 64, generator=torch.Generator().manual_seed(0)))
    again, scale_again = quantize_memory(dequantize_memory(codes, scale, torch.float32))
    assert torch.equal(again, codes)
    torch.testing.assert_close(scale_again, scale)


def test_zeros_and_what_is_too_small_become_zero() -> None:
    x = torch.zeros(3, 1, 16)
    x[1] = 2.0**-101
    x[2, 0, 3] = 2.0**-100
    codes, scale = quantize_memory(x)
    assert not codes[:2].any() and not scale[:2].any()
    assert codes[2, 0, 3] == 127 and scale[2] > 0
    assert dequantize_memory(codes, scale, torch.float32).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_reads_back_as_nan(bad: float) -> None:
    x = torch.ones(2, 2, 16)
    x[1, 0, 5] = bad
    values = dequantize_memory(*quantize_memory(x), torch.bfloat16)
    assert values[1, 0].isnan().all()
    assert values.isnan().sum() == 16


def test_empty() -> None:
    codes, scale = quantize_memory(torch.empty(0, 4, 64))
    assert codes.shape == (0, 4, 64) and scale.shape == (0, 4)


def test_error_of_the_attention() -> None:
    """About 1% of the output for independent normal keys and values, where 8-bit floating point has 4%."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, h, 128, generator=generator).double() for n, h in ((2, 8), (2000, 2), (2000, 2)))
    rows = (torch.tensor([0, 2]), torch.tensor([[0, 2000]]), torch.tensor([3]))
    angle = torch.rand(8, 64, generator=generator)
    tables = (angle.cos(), angle.sin())
    exact, _ = injected_attention(q, k, v, *rows, *tables, 128**-0.5)
    stored = [dequantize_memory(*quantize_memory(x), torch.float64) for x in (k, v)]
    got, _ = injected_attention(q, *stored, *rows, *tables, 128**-0.5)
    assert ((got - exact).norm() / exact.norm()).item() < 0.015

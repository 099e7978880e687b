"""A context memory of 8-bit codes: half the bytes to keep and to read."""

from typing import Any

import torch
from torch import Tensor

from .._library import cuda_kernels
from ..reference.memory_quantization import dequantize_memory as _dequantize
from ..reference.memory_quantization import quantize_memory as _quantize
from ..reference.rotary import compute_dtype
from ._autocast import outside_autocast
from ._checks import FLOATS, check_heads, check_scale, check_tensor, check_that
from ._rows import Rows
from .injected_attention import injected_attention

__all__ = ["dequantize_memory", "injected_attention_8bit", "quantize_memory"]


@outside_autocast
def quantize_memory(x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (rotated) or values of the memory as int8 codes, one scale for each slot and head: ``x ≈ codes * scale``.

    ``scale = max|x| / 127`` over a head's vector, codes to the nearest integer. Normally distributed vectors of 128
    elements read back with an error of 0.6% of their length (bfloat16: 0.17%), and attention over them is off by about
    1%.

    Args:
        x: ``[S, Hkv, D]``, floating; on CUDA float32, bfloat16 or float16 with ``D`` a multiple of 8 up to 256.

    Returns:
        codes: ``[S, Hkv, D]`` int8, between -127 and 127.
        scale: ``[S, Hkv]`` float32. A vector of zeros, or of magnitudes below ``2^-100``, has codes and scale 0; one
            with NaN or inf reads back as NaN.

    Raises:
        TypeError: not a floating tensor.
        ValueError: another shape, or on CUDA a head size that the kernel does not take.

    Equivalent to::

        scale = x.float().abs().amax(-1) / 127
        codes = (x.float() / scale.unsqueeze(-1)).round().to(torch.int8)
    """
    check_tensor("x", x, ("S", "Hkv", "D"), FLOATS)
    if x.is_cuda and x.dtype == torch.float64:
        return _quantize(x)
    return torch.ops.sharedllm.quantize_memory(x)


@outside_autocast
def dequantize_memory(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize_memory`: ``codes * scale`` in ``dtype``, rounded once.

    Args:
        codes: ``[S, Hkv, D]`` int8.
        scale: ``[S, Hkv]`` float32.
        dtype: floating dtype of the result.

    Returns:
        ``[S, Hkv, D]``.

    Raises:
        TypeError: a dtype that is not the one expected.
        ValueError: a shape or device that does not fit the other.
    """
    check_tensor("codes", codes, ("S", "Hkv", "D"), torch.int8)
    check_tensor("scale", scale, tuple(codes.shape[:2]), torch.float32, codes.device)
    check_that(dtype in FLOATS, "dtype", " or ".join(map(str, FLOATS)), dtype)
    return _dequantize(codes, scale, dtype)


@outside_autocast
def injected_attention_8bit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    cu_q: Tensor,
    slot_range: Tensor,
    q_position: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """:func:`injected_attention` over a memory of 8-bit codes.

    With up to 16 queries a row (decoding, bound by reading the memory) and heads of a multiple of 16 the CUDA kernel
    reads the codes themselves; otherwise keys and values are restored in q's dtype first, which takes memory for one
    layer's keys and values. Other devices and dtypes restore them in PyTorch. Not differentiable.

    Args:
        q: ``[T, Hq, D]``, not rotated; on CUDA ``D`` a multiple of 8 up to 256.
        k, v: ``[S, Hkv, D]`` int8 codes, ``k_scale, v_scale``: ``[S, Hkv]`` float32, all from :func:`quantize_memory`.
        cu_q, slot_range, q_position, cos, sin, scale: as for :func:`injected_attention`.

    Returns:
        out ``[T, Hq, D]`` in q's dtype, lse ``[T, Hq]``.

    Raises:
        TypeError: a dtype that is not the one expected.
        ValueError: a shape or device that does not fit the others.
        NotImplementedError: in a backward pass.

    Equivalent to ``injected_attention(q, dequantize_memory(k, k_scale, q.dtype), …)`` up to rounding.
    """
    rows = Rows(cu_q, slot_range, q_position, cos, sin)
    if q.is_cuda and q.dtype == torch.float64:
        return _restored(q, k, v, k_scale, v_scale, *rows, scale)
    _check_attention(q, k, v, k_scale, v_scale, rows, scale)
    return torch.ops.sharedllm.injected_attention_8bit(q, k, v, k_scale, v_scale, *rows, scale)


def _check_attention(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor, rows: Rows, scale: float
) -> None:
    check_tensor("q", q, ("T", "Hq", "D"), FLOATS)
    device = q.device
    check_tensor("k", k, ("S", "Hkv", q.shape[2]), torch.int8, device)
    check_tensor("v", v, k.shape, torch.int8, device)
    check_heads(q, k)
    for name, tensor in (("k_scale", k_scale), ("v_scale", v_scale)):
        check_tensor(name, tensor, k.shape[:2], torch.float32, device)
    rows.check(q.shape[2], device)
    check_scale(scale)


def _restored(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    cu_q: Tensor,
    slot_range: Tensor,
    q_position: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    rows = Rows(cu_q, slot_range, q_position, cos, sin)
    _check_attention(q, k, v, k_scale, v_scale, rows, scale)
    keys, values = _dequantize(k, k_scale, q.dtype), _dequantize(v, v_scale, q.dtype)
    return injected_attention(q, keys, values, *rows, scale=scale)


def _plain_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    check_tensor("x", x, ("S", "Hkv", "D"), FLOATS)
    return _quantize(x)


@torch.library.register_fake("sharedllm::quantize_memory")
def _quantize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.register_fake("sharedllm::injected_attention_8bit")
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    cu_q: Tensor,
    slot_range: Tensor,
    q_position: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=compute_dtype(q.dtype))


def _no_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
    raise NotImplementedError(
        "8-bit memory: expected to be read without gradients, got a backward pass; restore it with dequantize_memory"
    )


torch.library.register_autograd("sharedllm::quantize_memory", _no_derivative)
torch.library.register_autograd("sharedllm::injected_attention_8bit", _no_derivative)

# the CPU has no kernels of its own for these
for _name, _plain in (("quantize_memory", _plain_quantize), ("injected_attention_8bit", _restored)):
    for _device in ("CPU", "CUDA"):
        if _device == "CPU" or _name not in cuda_kernels():
            torch.library.impl(f"sharedllm::{_name}", _device, _plain)

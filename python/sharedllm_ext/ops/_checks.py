"""Argument checks of the operators: every failure names the tensor, what was expected and what came."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..counted import counted

#: Element types of the data tensors.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Element types that the C++ CPU kernels take; the other two go to the reference.
CPU_KERNEL_DTYPES = (torch.float32, torch.bfloat16)
LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def _text(values: Sequence[object]) -> str:
    return "[" + ", ".join(str(value) for value in values) + "]"


def check_that(condition: bool, name: str, expected: str, got: object) -> None:
    """Raise ``ValueError("name: expected …, got …")`` unless ``condition``."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | str],
    dtype: torch.dtype | Sequence[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """Check kind, dtype, shape and device of one argument.

    Args:
        name: the argument's name, first in every message.
        tensor: the argument.
        shape: one entry for each dimension: a number must match, a letter accepts any size.
        dtype: the dtype, or those allowed.
        device: the device that the other arguments are on; ``None`` accepts any.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: another shape or device.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype is not dtype:
        dtypes = (dtype,) if isinstance(dtype, torch.dtype) else dtype
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name}: expected dtype {' or '.join(str(d) for d in dtypes)}, got {tensor.dtype}")
    if not _fits(tensor.shape, shape):
        raise ValueError(f"{name}: expected shape {_text(shape)}, got {_text(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def _fits(have: Sequence[int], shape: Sequence[int | str]) -> bool:
    if len(have) != len(shape):
        return False
    # no generator for all(): it takes twice as long
    for size, want in zip(have, shape, strict=True):  # noqa: SIM110
        if not isinstance(want, str) and size != want:
            return False
    return True


def check_rotary(cos: Tensor, sin: Tensor, head_size: int, device: torch.device) -> None:
    """Check the half tables ``[P, R/2]`` of a rotary embedding, ``R <= D``."""
    check_tensor("cos", cos, ("P", "R/2"), torch.float32, device)
    check_tensor("sin", sin, (cos.shape[0], cos.shape[1]), torch.float32, device)
    check_that(2 * cos.shape[1] <= head_size, "cos", f"at most D/2 = {counted(head_size // 2, 'column')}", cos.shape[1])


def check_scale(scale: float) -> None:
    """Check the factor on attention scores: with infinity or NaN every result would be NaN."""
    check_that(abs(scale) <= LARGEST_FLOAT32, "scale", "a finite number (in float32)", scale)


def check_eps(eps: float) -> None:
    """Check what a norm adds to its mean square."""
    check_that(0 <= eps <= LARGEST_FLOAT32, "eps", "a finite number of at least 0", eps)


def check_heads(q: Tensor, k: Tensor) -> None:
    """Check that the query heads share the key/value heads evenly."""
    heads, shared = q.shape[1], k.shape[1]
    check_that(shared > 0 and heads % shared == 0, "q", f"a number of heads divisible by k's {shared}", heads)


def check_cumulative(name: str, values: Tensor, total: int) -> None:
    """Check that cumulative counts start at 0, never fall and end at ``total`` (reads the values: CPU tensors only)."""
    numbers = values.tolist()
    check_that(numbers[0] == 0, f"{name}[0]", "0", numbers[0])
    for i, (low, high) in enumerate(itertools.pairwise(numbers)):
        check_that(low <= high, f"{name}[{i + 1}]", f"at least {name}[{i}] = {low}", high)
    check_that(numbers[-1] == total, f"{name}[{len(numbers) - 1}]", f"{total}", numbers[-1])


def check_inside(name: str, values: Tensor, low: int, high: int) -> None:
    """Check ``low <= value < high`` of every value (reads the values: CPU tensors only)."""
    outside = ((values < low) | (values >= high)).flatten().nonzero()
    if outside.numel():
        first = int(outside[0])
        raise ValueError(f"{name}[{first}]: expected {low} <= value < {high}, got {values.flatten()[first].item()}")

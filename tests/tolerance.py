"""The one measure of error, for tests and benchmarks: a kernel beside PyTorch in its dtype, both against float64."""

from typing import Any

import torch
from torch import Tensor


def oracle(arguments: list[Any]) -> list[Any]:
    """The same arguments, floating tensors in float64."""
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]


def too_far(
    name: str, got: Tensor, same: Tensor, exact: Tensor, *, worst: float = 4.0, roundings: int = 4
) -> str | None:
    """What is wrong with ``got``; ``None`` if its error is at most twice that of ``same``, both against ``exact``.

    Args:
        name: what the message calls the result.
        got: the result that is judged.
        same: the same-dtype expression in PyTorch.
        exact: the float64 oracle.
        worst: the rule of twice the error is for the root mean square; the worst element, one draw, may be off by this
            many times the other expression's worst.
        roundings: how many float32 roundings of the largest value (at least 1) are allowed besides, where the other
            expression happens to be exact.
    """
    if got.shape != exact.shape:
        return f"{name}: expected shape {tuple(exact.shape)}, got {tuple(got.shape)}"
    infinite = exact.isinf()
    if not torch.equal(got.isinf(), infinite):
        return f"{name}: expected {int(infinite.sum())} infinite elements at their places, got {int(got.isinf().sum())}"
    got, same, exact = (x.double()[~infinite] for x in (got, same, exact))
    if exact.numel() == 0:
        return None
    floor = roundings * torch.finfo(torch.float32).eps * max(1.0, exact.abs().max().item())
    for what, factor, norm in (
        ("rms", 2, lambda x: x.square().mean().sqrt()),
        ("worst", worst, lambda x: x.abs().max()),
    ):
        error, allowed = norm(got - exact).item(), factor * norm(same - exact).item() + floor
        # also false for NaN
        if not error <= allowed:
            return f"{name}: {what} error: expected at most {allowed:.3g}, got {error:.3g}"
    return None


def check_error(name: str, got: Tensor, same: Tensor, exact: Tensor, *, worst: float = 4.0, roundings: int = 4) -> None:
    """Assert that nothing is :func:`too_far`."""
    message = too_far(name, got, same, exact, worst=worst, roundings=roundings)
    assert message is None, message

"""What the tests of a decoding step's linears share: arguments of one product, float64 copies, and their parameters."""

from typing import Any

import pytest
import torch
from torch import Tensor

EPS = 1e-5
#: n (norm), b (biases), r (residual), g (gated).
KINDS = ["", "n", "b", "r", "nb", "br", "nbr", "g", "ng", "nbg"]
#: Rows, inner size and outputs that can hurt.
SHAPES = [
    (1, 1, (1,)),
    (1, 7, (5, 3)),
    (3, 2049, (17, 1, 2)),
    (2, 2048, (1,)),
    (9, 257, (31,)),
    (19, 512, (40, 24)),
    (1, 4096, (3000,)),
    (8, 14336, (64,)),
    (5, 18944, (9,)),
    (0, 64, (8,)),
    (2, 64, (0, 8)),
    (2, 0, (8,)),
]


def random_data(generator: torch.Generator, device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normal numbers, drawn on the CPU so that every device has the same."""
    return torch.randn(shape, generator=generator).to(device, dtype)


def outputs_of(kind: str) -> tuple[int, ...]:
    """Outputs of a product of a kind: a gate has two of one size, a norm several."""
    return (133, 133) if "g" in kind else (256, 33, 64) if "n" in kind else (300,)


def shape_for(kind: str, inner: int, outputs: tuple[int, ...]) -> tuple[int, ...]:
    """Outputs that a kind can have; skips a norm of nothing."""
    if inner == 0 and "n" in kind:
        pytest.skip("the mean of nothing")
    return (outputs[0], outputs[0]) if "g" in kind else outputs


def arguments(
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    inner: int,
    outputs: tuple[int, ...],
    kind: str,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Weights of one product in float32, one matrix for each output, and its other arguments."""
    weights = [random_data(generator, device, torch.float32, size, inner) * max(inner, 1) ** -0.5 for size in outputs]
    data: dict[str, Any] = {"x": random_data(generator, device, dtype, rows, inner)}
    if "b" in kind:
        # the second matrix has none
        data["biases"] = [None if i == 1 else random_data(generator, device, dtype, n) for i, n in enumerate(outputs)]
    if "n" in kind:
        data["norm_weight"], data["eps"] = random_data(generator, device, dtype, inner), EPS
    if "r" in kind:
        data["residual"] = random_data(generator, device, dtype, rows, sum(outputs))
    data["gated"] = "g" in kind
    return weights, data


def wide(x: Any) -> Any:
    """The same in float64; codes in 8 bits stay."""
    if isinstance(x, list):
        return [wide(one) for one in x]
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() and x.element_size() > 1 else x

"""Whether a model reads its context at all: new injected blocks have a zero output projection, which adds nothing."""

import warnings
from typing import Any

import torch
from torch import nn

from .fp8_linear import Fp8Linear
from .layer_math import version_of


def can_read_context(model: Any) -> bool:
    """Whether any injected block adds something to the running text.

    Only weights known to be zero count: not those replaced by an adapter, quantisation or offloading. Weights are
    checked once, and again when they have changed.
    """
    weights = []
    for block in model.injected_blocks:
        projection = block.o_proj
        if type(projection) is Fp8Linear:
            weights.append(projection.codes.view(torch.uint8))
            continue
        if (
            type(projection) is not nn.Linear
            or type(projection.weight) is not nn.Parameter
            or projection.weight.is_meta
        ):
            return True
        weights.append(projection.weight)
    state = tuple((weight.data_ptr(), version_of(weight)) for weight in weights)
    known = model._reads_context
    if known is None or known[0] != state:
        with torch.no_grad():
            known = model._reads_context = (state, any(bool(weight.any()) for weight in weights))
    return bool(known[1])


def say_if_it_cannot_read(model: Any) -> None:
    """Warn, once per model, about a context that a model outside training does not read."""
    if model.training or model._said_it_cannot_read or can_read_context(model):
        return
    model._said_it_cannot_read = True
    warnings.warn(
        f"context: expected injected blocks that read it, got {len(model.injected_blocks)} whose output projections "
        "are all zero, as in a new model; it answers from the running text alone until it is trained or trained "
        "weights are loaded",
        UserWarning,
        stacklevel=3,
    )

"""Operators compute in their arguments' dtypes: autocast, which would round inside them, is off while they run."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_DEVICES = ("cpu", "cuda")


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """The function with autocast switched off while it runs, on the devices that operators know."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return run(*args, **kwargs)
        return function(*args, **kwargs)

    # torch.compile counts recompilations by code object, which all wrappers would share
    run.__code__ = run.__code__.replace(co_name=function.__name__)  # type: ignore[attr-defined]
    return run

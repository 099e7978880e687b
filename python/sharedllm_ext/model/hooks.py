"""What a call of a module does besides its class's forward: hooks, its own or of all modules, and replaced forwards."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.nn.modules import module as _torch

_FORWARD = (("forward hook", "_forward_hooks"), ("forward pre-hook", "_forward_pre_hooks"))
_BACKWARD = (("backward hook", "_backward_hooks"), ("backward pre-hook", "_backward_pre_hooks"))


def keep_signatures(*functions: Callable[..., Any]) -> None:
    """Keep what ``inspect.signature`` says of functions: Transformers' generate asks five times a call."""
    function: Any
    for function in functions:
        function.__signature__ = inspect.signature(function)


def is_untouched(module: Any) -> bool:
    """Whether a call of a module is only its class's forward: no hooks, no replaced forward."""
    # spelled out: it is asked several times a layer, and traced by torch.compile
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _torch._global_forward_hooks
        or _torch._global_forward_pre_hooks
        or _torch._global_backward_hooks
        or _torch._global_backward_pre_hooks
        or "forward" in module.__dict__
    )


def global_hook(*, backward: bool) -> str | None:
    """The first hook that runs for every module, "kind `name`", or ``None``; those of gradients count if asked for."""
    kinds = (*_FORWARD, *_BACKWARD) if backward else _FORWARD
    return next(_named((kind, getattr(_torch, f"_global{attribute}")) for kind, attribute in kinds), None)


def forward_hook(module: Any) -> str | None:
    """The first hook of a module's own forward, "kind `name`", or ``None``.

    Transformers' own hooks do nothing unless outputs are wanted, and do not count.
    """
    return next(_named((kind, getattr(module, attribute)) for kind, attribute in _FORWARD), None)


def own_forward(module: Any) -> str | None:
    """The name of what replaced a module's forward, or ``None``."""
    return _name(module.__dict__["forward"]) if "forward" in module.__dict__ else None


def _named(kinds: Iterator[tuple[str, Mapping[int, Any]]]) -> Iterator[str]:
    for kind, hooks in kinds:
        for hook in hooks.values():
            if getattr(hook, "__module__", "") != "transformers.utils.output_capturing":
                yield f"{kind} `{_name(hook)}`"


def _name(call: Any) -> str:
    """Its qualified name; of an object that can be called, its class's."""
    return str(getattr(call, "__qualname__", type(call).__qualname__))

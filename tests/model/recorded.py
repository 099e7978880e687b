"""Stands for CUDA graphs on the CPU: the operators that a function ran, run again on the same tensors."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sharedllm_ext.model.decoding import DecodeRunner, graph, prompt


class Recorded(TorchDispatchMode):
    """As a graph does, a replay reads and writes the tensors of the recording, and nothing that Python decides.

    What reads a value on the host is refused, as in a capture.
    """

    replays = 0

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Any]]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.nonzero.default:
            raise AssertionError(f"expected nothing that waits for the device in a capture, got {func}")
        for argument, value in (*zip(func._schema.arguments, args, strict=False), *_named(func, kwargs or {})):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                place = _place(value)
                if place not in self._made and place not in self._before:
                    whole = value.new_empty(0).set_(value.untyped_storage())
                    self._before[place] = (whole, whole.clone())
        inputs = _places((args, kwargs))
        out = func(*args, **(kwargs or {}))
        outs = pytree.tree_leaves(out)
        self._made |= _places(outs) - inputs
        self._calls.append((func, args, kwargs or {}, outs))
        return out

    def undo(self) -> None:
        """Take back what the recording has written: a capture computes nothing."""
        for whole, before in self._before.values():
            whole.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        """Run everything again."""
        Recorded.replays += 1
        for func, args, kwargs, outs in self._calls:
            inputs = _places((args, kwargs))
            for old, new in zip(outs, pytree.tree_leaves(func(*args, **kwargs)), strict=True):
                # views and what is written in place are there already
                if _place(old) not in inputs:
                    old.copy_(new)


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _places(tree: Any) -> set[int]:
    return {_place(x) for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)}


def _named(func: Any, kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    by_name = {argument.name: argument for argument in func._schema.arguments}
    return [(by_name[name], value) for name, value in kwargs.items()]


def record(function: Callable[[], Tensor], device: torch.device) -> tuple[Recorded, Tensor]:
    """What stands for :func:`sharedllm_ext.model.decoding.graph.capture`; like it, it computes nothing yet."""
    graph_of = Recorded()
    with graph_of, torch.no_grad():
        result = function()
    with torch.no_grad():
        graph_of.undo()
        result.fill_(torch.nan)
    return graph_of, result


def use_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything that captures graphs on CUDA record on the CPU."""
    monkeypatch.setattr(graph, "uses_graphs", lambda device: True)
    monkeypatch.setattr(graph, "capture", record)
    # what is recorded for a model's short texts is not kept for the tests that follow
    monkeypatch.setattr(prompt, "_KEPT", weakref.WeakKeyDictionary())
    monkeypatch.setattr(DecodeRunner, "_replay_aside", lambda self, captured: captured.replay())

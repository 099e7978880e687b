"""CUDA graphs of what writes to the same tensors every time."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: What chooses the kernels that have run outside a capture in this process; a capture must not load any.
LOADED: set[tuple[Any, ...]] = set()


def uses_graphs(device: torch.device) -> bool:
    """Whether what is repeated on a device is captured; elsewhere the same operators run one by one."""
    return device.type == "cuda"


def capture(function: Callable[[], Tensor], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of the kernels that a function launches on a device, and the function's result, which a replay writes.

    The graph is captured on the thread's side stream; what it allocates stays with it.
    """
    graph = torch.cuda.CUDAGraph()
    stream = side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # a workspace of cuBLAS is of one stream: graphs that were captured on the same one and run at the same time would
    # share it; so each allocates its own
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            result = function()
        finally:
            graph.capture_end()
            torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph, result


class _Streams(threading.local):
    def __init__(self) -> None:
        self.by_device: dict[torch.device, torch.cuda.Stream] = {}


_streams = _Streams()


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The thread's stream for captures and for steps that start ahead; CUDA has only a few."""
    if device not in _streams.by_device:
        _streams.by_device[device] = torch.cuda.Stream(device)
    return _streams.by_device[device]

"""The step of a continuous batch: rows that come and go, in buffers that stay in place."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..protocols import Decoder
from . import graph as graphs
from .groups import MemoryGroups
from .layers import StepLayer
from .token_step import TokenStep


class RowsStep(TokenStep):
    """A step of some rows of a batch, in its buffers: tokens, lengths, padding and which rows are live."""

    def __init__(
        self,
        model: Decoder,
        storages: list[tuple[Tensor, Tensor]],
        buffers: list[Tensor],
        *,
        groups: MemoryGroups | None,
        tables: list[Any],
        kernels: tuple[Any, ...],
    ) -> None:
        tokens, length, first, live = buffers
        super().__init__(model, storages, len(tokens), context=groups, tables=tables, live=live)
        self._tokens, self._length, self._first = tokens, length, first
        self.groups = groups
        self._kernels = kernels
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._layers = [StepLayer.of(layer) for layer in model.model.layers]

    def run(self) -> Tensor:
        """Logits ``[rows, vocabulary]``, overwritten by the next run."""
        if self._graph is None and graphs.uses_graphs(self._tokens.device) and self._kernels in graphs.LOADED:
            self._graph, self._logits = graphs.capture(self.step, self._tokens.device)
        if self._graph is not None:
            self._graph.replay()
        else:
            # the first run also loads the kernels, which a capture must not do
            self._logits = self.step()
            graphs.LOADED.add(self._kernels)
        assert self._logits is not None
        return self._logits


def to_host(tokens: Tensor) -> Callable[[], list[int]]:
    """Starts a copy of tokens ``[n]``; the result waits for it, and for nothing that is started in between."""
    if not tokens.is_cuda:
        return tokens.tolist
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> list[int]:
        done.synchronize()
        return host.tolist()

    return wait

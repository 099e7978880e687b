"""A short running text that begins a cache, read in one step: as a CUDA graph where it is read again and again."""

import collections
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from ...ops import chunk_compression, injected_attention, rms_norm
from ..injection import InjectedContext
from ..memory import ContextMemory
from ..protocols import Decoder
from ..rotary import Tables
from . import graph as graphs
from .layers import StepLayer, product, run_layers

#: Most tokens of all rows together, padding included; longer texts are bound by their matmuls, not by launches.
MOST_TOKENS = 256
#: Columns that a text is padded to: one graph each.
COLUMNS = (8, 16, 32, 64, 96, 128, 192, 256)
#: Steps that are kept for a model, each for one memory, number of rows and number of columns.
KEPT_PROMPTS = 8


def columns_of(batch: int, length: int) -> int | None:
    """Columns of the step that reads ``batch`` rows of ``length`` tokens; ``None``: they are too many."""
    columns = next((columns for columns in COLUMNS if columns >= length), None)
    return None if columns is None or batch * columns > MOST_TOKENS else columns


class ShortPrompt:
    """A running text of some rows that begins a cache, in one step.

    Rows may be padded on the left; columns beyond the text are filled with any token, which nothing before them sees.
    Keys and values stay with the step until the next text.

    Args:
        model: the model; :func:`~.support.obstacle_in_model` says which.
        batch: rows.
        columns: tokens a row, padding included.
        context: of a memory for so many tokens a row, without its keys and values, or ``None``.
        tables: cos and sin of each layer for as many positions as columns.
        graph: whether to use a CUDA graph from the second text on; else the same operators run one by one.
    """

    # its buffers are written in later calls, which may be outside inference mode
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        model: Decoder,
        batch: int,
        columns: int,
        *,
        context: InjectedContext | None,
        tables: list[Tables],
        graph: bool,
    ) -> None:
        device, rows = model.device, batch * columns
        self.batch, self.columns = batch, columns
        self.size = model.model.layers[0].self_attn.head_dim
        self._model = weakref.ref(model)
        self._context, self._tables, self._use_graph = context, tables, graph
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._first, self._shift = (torch.zeros(batch, 1, dtype=torch.int64, device=device) for _ in range(2))
        self._row = torch.arange(batch, device=device)[:, None] * columns
        self._column = torch.arange(columns, device=device)
        self._cu_q = torch.arange(rows + 1, device=device)
        self._nothing = torch.zeros(0, dtype=torch.int64, device=device)
        # queries are rotated together with keys
        # not in the default dtype, which may be different
        angle = torch.zeros(1, self.size // 2, dtype=torch.float32, device=device)
        self._no_rotation = (angle.cos(), angle.sin())
        self._no_position = torch.zeros(rows, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._hidden: Tensor | None = None
        self._has_run = False
        self._parts: list[Tensor] = []
        self._states: Tensor | None = None
        self._ranges: dict[int, Tensor] = {}
        self._positions = self._no_position
        self._used: torch.cuda.Event | None = None

    def run(self, tokens: Tensor, first: Tensor | None, shift: Tensor | None, memory: ContextMemory | None) -> Tensor:
        """Read a text.

        Args:
            tokens: ``[B, L]`` integers, ``L`` at most the step's columns.
            first: left padding of each row in tokens, ``[B]`` int64, or ``None`` for none.
            shift: by how much a token's position is below its column, at most to 0, ``[B]`` int64; ``None``: nothing.
            memory: the one of the step's context; a graph reads the tensors that it was captured with.

        Returns:
            ``[B, L, d]``, the last layer's normed output; a copy.
        """
        device, length = self._tokens.device, tokens.shape[1]
        if self._used is not None:
            # the last text may have been read on another stream
            torch.cuda.current_stream(device).wait_event(self._used)
        self._tokens.view(self.batch, -1)[:, :length].copy_(tokens)
        for buffer, given in ((self._first, first), (self._shift, shift)):
            if given is None:
                buffer.zero_()
            else:
                buffer.copy_(given[:, None])
        if self._graph is None:
            if self._context is not None and memory is not None:
                self._context.keys, self._context.values = memory.keys, memory.values
            if self._use_graph and self._has_run:
                self._graph, self._hidden = graphs.capture(self._step, device)
            else:
                # many memories are asked once; a first run also loads the kernels, which a capture must not do
                self._hidden = self._step()
                self._has_run = True
            if self._context is not None:
                self._context.keys, self._context.values = [], []
        if self._graph is not None:
            self._graph.replay()
        assert self._hidden is not None
        return self._hidden.view(self.batch, self.columns, -1)[:, :length].clone()

    def states(self, length: int) -> Tensor:
        """Keys and values of all layers, ``[layers, 2, B, L, Hkv, D]``, a view that the next text overwrites."""
        assert self._states is not None
        return self._states.unflatten(1, (self.batch, -1)).unflatten(0, (-1, 2))[:, :, :, :length]

    def end(self) -> None:
        """After the last use of what :meth:`run` has made; the next text may be read on another stream."""
        if self._tokens.is_cuda:
            self._used = self._used or torch.cuda.Event()
            self._used.record()
        if self._graph is None:
            self._hidden = self._states = None

    def _step(self) -> Tensor:
        model: Any = self._model()
        layers = [StepLayer.of(layer) for layer in model.model.layers]
        self._positions = (self._column - self._shift).clamp_(min=0).flatten()
        # padding sees itself alone
        begin, end = self._row + torch.minimum(self._first, self._column), self._row + self._column + 1
        for window in {layer.window for layer in layers}:
            seen = begin if window == 0 else torch.maximum(begin, end - window)
            self._ranges[window] = torch.stack((seen, end), 2).flatten(0, 1)
        self._parts = []
        x = run_layers(model, self._tokens, layers, self._attend, self._context)
        # one tensor, so that a cache takes the states of all layers at once
        self._states, self._parts = torch.stack(self._parts), []
        return rms_norm(x, model.model.norm.weight, model.model.norm.variance_epsilon)

    def _attend(self, x: Tensor, layer: StepLayer, index: int) -> Tensor:
        qkv = product(x, layer.qkv, layer.attention_norm).unflatten(1, (-1, self.size))
        heads = layer.qkv[1].out_features // self.size
        q, k, v = qkv.split((qkv.shape[1] - 2 * heads, heads, heads), 1)
        q = q if layer.q_norm is None else layer.q_norm(q)
        k = k if layer.k_norm is None else layer.k_norm(k)
        at, nothing = self._positions, self._nothing
        q, k, _, _ = chunk_compression(q, k, v, *self._tables[index], at, at, nothing, nothing)
        self._parts += [k, v]
        ranges = self._ranges[layer.window]
        out, _ = injected_attention(
            q, k, v, self._cu_q, ranges, self._no_position, *self._no_rotation, scale=layer.scaling
        )
        return out.flatten(1)


class KeptPrompts:
    """Steps of a model by what they have fixed, the one used last at the end; ``None``: somebody uses it."""

    def __init__(self) -> None:
        self._steps: collections.OrderedDict[tuple[Any, ...], ShortPrompt | None] = collections.OrderedDict()
        self._lock = threading.RLock()

    def take(self, key: tuple[Any, ...]) -> ShortPrompt | None:
        """The step, which nobody else gets until it is put back."""
        with self._lock:
            step = self._steps.get(key)
            self.put(key, None)
            return step

    def put(self, key: tuple[Any, ...], step: ShortPrompt | None) -> None:
        """Keep a step."""
        with self._lock:
            self._steps[key] = step
            self._steps.move_to_end(key)
            while len(self._steps) > KEPT_PROMPTS:
                self._steps.popitem(last=False)


_KEPT: "weakref.WeakKeyDictionary[Decoder, KeptPrompts]" = weakref.WeakKeyDictionary()


def kept_prompts(model: Decoder) -> KeptPrompts:
    """The steps that are kept for a model's short texts."""
    kept = _KEPT.get(model)
    # threads may ask at the same time
    return _KEPT.setdefault(model, KeptPrompts()) if kept is None else kept


def release_prompts(model: Decoder) -> None:
    """Free them."""
    _KEPT.pop(model, None)

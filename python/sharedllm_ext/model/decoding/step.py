"""One decoding step by its own operators, as a CUDA graph after the first time."""

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..examined import Fixed, examined
from ..families import attention_norm, embedding_factor, mlp_norm, residual_factor, rotation_of, sliding_window
from ..injection import InjectedContext
from ..layer_math import version_of
from ..memory import ContextMemory
from ..protocols import Decoder
from ..rotary import Tables, rotations_of
from . import graph as graphs
from .cache import BEFORE_UPDATE, PreallocatedCache
from .layers import StepLayer, weights_of
from .token_step import TokenStep


class DecodeRunner(TokenStep):
    """One decoding step of a model over a cache, as a CUDA graph after the first time.

    Holds the tensors that the graph's kernels read: parameters, storage of the cache, memory.

    Args:
        model: the model; :func:`~.support.obstacle_in_model` says which.
        cache: the cache, with at least one token and room for one more in every layer.
        memory: what the injected layers read, or ``None``.
        batch: rows.
        context: of the memory, for one token a row; ``None`` without one.
        tables: cos and sin of each layer for every position that the cache has room for.
        graph: whether to use a CUDA graph; without it the same operators run one by one.
        state: what :func:`state_of_step` gives for model and memory.
    """

    # its buffers are written in later calls, which may be outside inference mode
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        model: Decoder,
        cache: PreallocatedCache,
        memory: ContextMemory | None,
        batch: int,
        *,
        context: InjectedContext | None,
        tables: list[Tables],
        graph: bool,
        state: tuple[Any, ...],
    ) -> None:
        device = model.device
        super().__init__(model, [layer.storage for layer in cache.layers], batch, context=context, tables=tables)
        self.state = state
        self.length_on_host = -1
        self._parameters: list[Tensor] = []
        self._memory: ContextMemory | None = None
        self._vocabulary = model.model.embed_tokens.num_embeddings
        self._use_graph = graph
        self._kernels = kernels_of(self.state, batch, device, self._storages[0][0].shape[2:], self._tables[0][0])
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._watched: list[Tensor] = []
        self._ahead_of: tuple[int, int] | None = None
        self.hold(model, memory)

    def fits(self, cache: PreallocatedCache, state: tuple[Any, ...], batch: int) -> bool:
        """Whether the graph was captured for these parameters, this memory and the cache's present storage."""
        if not (self.state is state or self.state == state) or self.batch != batch:
            return False
        if len(cache.layers) != len(self._storages):
            return False
        for layer, (keys, values) in zip(cache.layers, self._storages, strict=True):
            if layer._key_storage is not keys or layer._value_storage is not values:
                return False
        return True

    def hold(self, model: Decoder, memory: ContextMemory | None) -> None:
        """Keep alive what the graph reads: parameters and memory of :attr:`state`."""
        self._parameters = [weight.detach() for weight in weights_of(model)]
        self._memory = memory
        if self._context is not None and memory is not None:
            self._context.keys, self._context.values = memory.keys, memory.values
        read = [*self._parameters, *(x for pair in self._storages for x in pair)]
        read += [] if memory is None else [*memory.keys, *memory.values]
        self._layers = [StepLayer.of(layer) for layer in model.model.layers]
        self._watched = [tensor for tensor in read if not tensor.is_inference()]

    def release(self) -> None:
        """Drop the references to parameters and memory; call :meth:`hold` before the next run."""
        self.drop()
        self._layers = []
        self._parameters, self._watched, self._memory, self.length_on_host = [], [], None, -1
        if self._context is not None:
            self._context.keys, self._context.values = [], []

    def set_padding(self, first: Tensor) -> None:
        """Left padding of each row in tokens, ``[B]`` int64."""
        self._first.copy_(first)

    def run(self, tokens: Tensor, cache: PreallocatedCache) -> Tensor:
        """Append one token a row to the cache.

        Args:
            tokens: ``[B]`` or ``[B, 1]`` integers.
            cache: the cache of the runner, with room for one token.

        Returns:
            Logits ``[B, vocabulary]`` of the next token, overwritten by the next call.
        """
        self.drop()
        self._put(tokens, cache.get_seq_length())
        if self._graph is not None:
            self._graph.replay()
        elif self._use_graph and self._kernels in graphs.LOADED:
            self._capture().replay()
        else:
            # the first run also loads the kernels, which a capture must not do
            self._logits = self.step()
            graphs.LOADED.add(self._kernels)
        return self._end(cache)

    @property
    def can_run_ahead(self) -> bool:
        """Whether :meth:`run_ahead` can be called: if a graph is used, only once it can be captured."""
        return self._graph is not None or not self._use_graph or self._kernels in graphs.LOADED

    def run_ahead(self, tokens: Tensor, cache: PreallocatedCache) -> None:
        """Start the step that :meth:`run` would make, concurrently with the current stream's next work.

        :meth:`take` returns its result, :meth:`drop` discards it. Arguments as for :meth:`run`; an invalid token
        (padding of rows that have ended) counts as the nearest valid one.
        """
        self.drop()
        self._put(tokens, cache.get_seq_length(), among=self._vocabulary)
        # there is nothing to take before it is started, but something to wait for
        self._ahead_of = (-1, -1)
        if not self._use_graph:
            self._logits = self.step()
        else:
            # captured here it costs nothing while the device still reads the prompt
            self._replay_aside(self._graph or self._capture())
        self._ahead_of = (cache.get_seq_length(), self._version())

    def _replay_aside(self, graph: torch.cuda.CUDAGraph) -> None:
        device = self._length.device
        self._stream = graphs.side_stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            graph.replay()

    def is_ahead(self, cache: PreallocatedCache) -> bool:
        """Whether :meth:`run_ahead` has started the next step, and what it reads has not changed since."""
        return self._ahead_of == (cache.get_seq_length(), self._version())

    def take(self, cache: PreallocatedCache) -> Tensor:
        """The logits of the step that :meth:`run_ahead` has started, as :meth:`run` returns them."""
        self._join()
        return self._end(cache)

    def drop(self) -> bool:
        """Discard the step started by :meth:`run_ahead`; returns whether there was one. The cache keeps its tokens."""
        if self._ahead_of is None:
            return False
        self._join()
        return True

    def wait(self, *, on_host: bool = False) -> None:
        """Make the current stream, or the host, wait for steps that were started on another stream."""
        if self._stream is None:
            return
        if on_host:
            self._stream.synchronize()
        else:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _join(self) -> None:
        self.wait()
        self._ahead_of = None

    def _version(self) -> int:
        # counts only grow, so that their sum shows any change
        return sum(tensor._version for tensor in self._watched)

    def _put(self, tokens: Tensor, length: int, among: int | None = None) -> None:
        if length != self.length_on_host:
            self._length.fill_(length)
        # until the step is over: an interruption must not leave two different lengths
        self.length_on_host = -1
        if among is None:
            self._tokens.copy_(tokens.reshape(-1))
        else:
            torch.clamp(tokens.reshape(-1).long(), 0, among - 1, out=self._tokens)

    def _end(self, cache: PreallocatedCache) -> Tensor:
        length = cache.get_seq_length() + 1
        for layer in cache.layers:
            layer._length = length
        self.length_on_host = length
        assert self._logits is not None
        return self._logits

    def _capture(self) -> torch.cuda.CUDAGraph:
        self._graph, self._logits = graphs.capture(self.step, self._length.device)
        return self._graph


def state_of_step(model: Decoder, memory: ContextMemory | None, *, just_examined: bool = False) -> tuple[Any, ...]:
    """What a graph has fixed: addresses of parameters and memory, which rows read what, the layers' constants.

    Args:
        model: the model.
        memory: what it reads, or ``None``.
        just_examined: see ``just_now`` of :func:`~..examined.examined`.
    """
    known = examined(model, just_now=just_examined)
    if known.fixed is None:
        parameters = ((x.data_ptr(), x.dtype, x.shape, x.stride()) for x in weights_of(model))
        found = rotations_of(model.model.rotary_emb, model.model.layers).values()
        known.rotations = tuple((x.frequencies.data_ptr(), version_of(x.frequencies), x.scaling) for x in found)
        known.fixed = Fixed((Fixed(parameters), _constants_of(model)))
    if memory is None:
        return (id(model), known.fixed, known.rotations)
    tensors = tuple((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in (*memory.keys, *memory.values))
    # slots, and the positions of the queries
    rows = tuple(memory.spans(model.config.query_position_offset))
    return (id(model), known.fixed, known.rotations, tensors, rows)


def _constants_of(model: Decoder) -> tuple[Any, ...]:
    numbers = []
    for layer in model.model.layers:
        attention, injection = layer.self_attn, getattr(layer, "injection", None)
        norms = [attention_norm(layer), mlp_norm(layer), getattr(attention, "q_norm", None)]
        norms += [] if injection is None else [injection.norm]
        numbers += [attention.scaling, sliding_window(layer), None if injection is None else injection.scaling]
        numbers += [None if norm is None else norm.variance_epsilon for norm in norms]
        numbers += [rotation_of(layer), residual_factor(layer)]
    return (*numbers, model.model.norm.variance_epsilon, embedding_factor(model.model.layers[0]))


def kernels_of(
    state: tuple[Any, ...], batch: int, device: torch.device, heads: torch.Size, table: Tensor
) -> tuple[Any, ...]:
    """The kernels that a step of this state runs, as chosen by shapes, dtypes, strides and alignment.

    Args:
        state: what :func:`state_of_step` gives.
        batch, device: of the step.
        heads: of the cache, number and size.
        table: cos of a layer.
    """
    _, (parameters, _), _, *memory = state
    weights = tuple((pointer % 16, *rest) for pointer, *rest in parameters)
    slots = tuple((pointer % 16, shape[1:], stride) for pointer, shape, stride in memory[0]) if memory else None
    return (device, batch, weights, slots, heads, table.shape[1])


#: Runners by cache: a graph lives as long as the cache that it writes to.
RUNNERS: "weakref.WeakKeyDictionary[Cache, DecodeRunner]" = weakref.WeakKeyDictionary()


def _drop_step_ahead(cache: Cache) -> None:
    runner = RUNNERS.get(cache)
    if runner is not None:
        runner.drop()


BEFORE_UPDATE.append(_drop_step_ahead)

"""Decoding token by token at the speed of memory: a cache that stays in place, and one CUDA graph of a whole step."""

import dataclasses
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from .._library import cuda_kernels
from ..ops import decode_append, decode_linear, injected_attention
from .cache_name import CACHE_NAME
from .families import (
    attention_norm,
    embedding_factor,
    family_of,
    mlp_norm,
    projection,
    residual_factor,
    rotation_of,
    sliding_window,
)
from .layer_math import version_of
from .memory import ContextMemory

if TYPE_CHECKING:
    from .modeling import SharedLLMForCausalLM

__all__ = ["DecodeRunner", "PreallocatedCache", "PreallocatedLayer"]

#: Rows that one step takes; more are a matter of matrix products, not of memory.
MAX_BATCH = 8
#: Head sizes with a tensor core kernel of the attention.
HEAD_SIZES = (64, 96, 128, 256)
#: Rope types whose frequencies do not follow the sequence length.
FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
#: Bytes of the output projection's weights that are asked for in L2 in front of an attention. More delays the
#: attention's own loads: 6.58 ms a token with 0 and 6 MB, 6.72 with 12, 6.92 with 33 (Llama-3.1-8B, 16384 slots, H100).
PREFETCH_BYTES = 6 << 20
#: A cache has room for a multiple of this many tokens, so that the next generate's mostly fits into the same storage.
CAPACITY_STEP = 256
#: Bytes of a cache that are kept, with its graph, for the next generate of the same model.
KEPT_BYTES = 1 << 30
#: For tests: run the step, without a graph, on the CPU too.
RUN_ON_CPU = False

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class PreallocatedLayer(DynamicLayer):
    """A cache layer that behaves as Transformers' ``DynamicLayer`` but keeps its tensors in place.

    Storage is ``[B, capacity, Hkv, D]``, allocated with room to grow; ``keys`` and ``values`` are views
    ``[B, Hkv, length, D]`` of the part in use. A new token is written, not concatenated. Views taken before a crop see
    what is written after it: clone what is to be kept.

    Args:
        limit: tokens that will never be exceeded, as far as is known; the room kept free ends there. ``None``: unknown.
        spare: storage of keys and of values that nobody else uses, taken if the first states fit into it.
    """

    def __init__(self, limit: int | None = None, spare: tuple[Tensor, Tensor] | None = None) -> None:
        self._spare = spare
        self._key_storage: Tensor | None = None
        self._value_storage: Tensor | None = None
        self._length = 0
        self._limit = limit
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        """Keys in use, ``[B, Hkv, length, D]``; ``None`` before the first."""
        return None if self._key_storage is None else self._key_storage[:, : self._length].transpose(1, 2)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._key_storage = self._adopt(self._key_storage, value)

    @property
    def values(self) -> Tensor | None:
        """Values in use, ``[B, Hkv, length, D]``; ``None`` before the first."""
        return None if self._value_storage is None else self._value_storage[:, : self._length].transpose(1, 2)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._value_storage = self._adopt(self._value_storage, value)

    def _adopt(self, storage: Tensor | None, value: Tensor | None) -> Tensor | None:
        """The storage of what is assigned from outside: the same one for a shorter view of it."""
        if value is None:
            self._length = 0
            return None
        seen = value.transpose(1, 2)
        self._length = seen.shape[1]
        if (
            storage is not None
            and seen.data_ptr() == storage.data_ptr()
            and seen.stride() == storage.stride()
            and (seen.shape[0], *seen.shape[2:]) == (storage.shape[0], *storage.shape[2:])
        ):
            return storage
        return seen.clone(memory_format=torch.contiguous_format)

    @property
    def capacity(self) -> int:
        """Tokens that fit without another allocation."""
        return 0 if self._key_storage is None else self._key_storage.shape[1]

    @property
    def storage(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, capacity, Hkv, D]``; what lies behind the length in use is undefined."""
        assert self._key_storage is not None and self._value_storage is not None
        return self._key_storage, self._value_storage

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take over batch, heads, dtype and device of the first states ``[B, Hkv, tokens, D]``."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._length = 0
        self.is_initialized = True
        spare, self._spare = self._spare, None
        batch, heads, _, size = key_states.shape
        if spare is not None and all(
            (storage.shape[0], *storage.shape[2:]) == (batch, heads, size)
            and storage.dtype == states.dtype
            and storage.device == states.device
            for storage, states in zip(spare, (key_states, value_states), strict=True)
        ):
            self._key_storage, self._value_storage = spare
            return
        self._key_storage = key_states.transpose(1, 2)[:, :0].contiguous()
        self._value_storage = value_states.transpose(1, 2)[:, :0].contiguous()

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` in all, with a quarter more (at least 1024) if the limit allows it, rounded up."""
        if self._key_storage is None or self._value_storage is None:
            return
        # what inference mode made cannot be written outside of it
        locked = self._key_storage.is_inference() and not torch.is_inference_mode_enabled()
        if tokens <= self.capacity and not locked:
            return
        room = tokens + max(tokens // 4, 1024)
        if self._limit is not None and self._limit >= tokens:
            room = min(room, self._limit)
        room = -(-room // CAPACITY_STEP) * CAPACITY_STEP
        self._key_storage = self._moved(self._key_storage, room)
        self._value_storage = self._moved(self._value_storage, room)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _moved(self, storage: Tensor, capacity: int) -> Tensor:
        batch, _, heads, size = storage.shape
        moved = torch.empty((batch, capacity, heads, size), dtype=storage.dtype, device=storage.device)
        moved[:, : self._length] = storage[:, : self._length]
        return moved

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states ``[B, Hkv, tokens, D]``.

        Returns:
            All keys and values, ``[B, Hkv, length, D]``, as views.
        """
        if not self.is_initialized or self._key_storage is None:
            self.lazy_initialization(key_states, value_states)
        begin, end = self._length, self._length + key_states.shape[-2]
        if any(x.requires_grad for x in (key_states, value_states, *self.storage)):
            # written in place they would be missing in the gradient, or spoil it
            pairs = zip(self.storage, (key_states, value_states), strict=True)
            self._key_storage, self._value_storage = (
                torch.cat((storage[:, :begin], states.transpose(1, 2)), 1) for storage, states in pairs
            )
        else:
            self.reserve(end)
            key_storage, value_storage = self.storage
            key_storage[:, begin:end] = key_states.transpose(1, 2)
            value_storage[:, begin:end] = value_states.transpose(1, 2)
        self._length = end
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens in use."""
        return self._length

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: ``-n`` removes ``n``, a positive number is the length to keep (as Transformers once
        had it)."""
        keep = self._length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        self._length = min(max(keep, 0), self._length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the batch rows into another order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every batch row ``repeats`` times in a row."""
        if self._length > 0:
            self._replace(lambda storage: storage.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows, in that order."""
        if self._length > 0:
            self._replace(lambda storage: storage[indices.to(storage.device)])

    def _replace(self, change: Any) -> None:
        key_storage, value_storage = self.storage
        self._key_storage, self._value_storage = change(key_storage), change(value_storage)


class PreallocatedCache(Cache):
    """A cache with the meaning of Transformers' ``DynamicCache`` whose tensors stay in place while it grows.

    Made for inference; tensors with gradients are concatenated, as Transformers' caches do. Sliding-window layers keep
    all tokens; masks and decoding steps look at the window alone.

    Args:
        config: of the decoder (``num_hidden_layers``).
        limit: tokens that will never be exceeded, as far as is known; saves memory.
        spares: for each layer a storage that nobody else uses.
    """

    layers: Any

    def __init__(
        self, config: Any, limit: int | None = None, spares: list[tuple[Tensor, Tensor]] | None = None
    ) -> None:
        count = config.num_hidden_layers
        own: list[Any] = [None] * count if spares is None else spares
        super().__init__(layers=[PreallocatedLayer(limit, spare) for spare in own])

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Append states to a layer; a step that has been started ahead is forgotten, as it stands where they go."""
        runner = _RUNNERS.get(self)
        if runner is not None:
            runner.drop()
        parent: Any = super()
        return parent.update(*args, **kwargs)

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` in all; where that moves the storage, a graph of the decoding step is made anew."""
        for layer in self.layers:
            layer.reserve(tokens)


class DecodeRunner:
    """One decoding step of a model over a cache, as a CUDA graph after the first time.

    Holds the tensors that the graph's kernels read: parameters, storage of the cache, memory.

    Args:
        model: the model; :func:`supports` says which.
        cache: the cache, with at least one token and room for one more in every layer.
        memory: what the injected layers read, or ``None``.
        batch: rows.
        graph: whether to use a CUDA graph; without it the same operators run one by one.
        state: what :func:`_state` gives for model and memory, if it is at hand.
    """

    # its buffers are written in later calls, which may be outside of inference mode
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        model: "SharedLLMForCausalLM",
        cache: PreallocatedCache,
        memory: ContextMemory | None,
        batch: int,
        graph: bool,
        state: tuple[Any, ...] | None = None,
    ) -> None:
        device = model.device
        self.state = _state(model, memory) if state is None else state
        self.batch = batch
        self.length_on_host = -1
        self._model = weakref.ref(model)
        self._parameters: list[Tensor] = []
        self._memory: ContextMemory | None = None
        self._storages = [layer.storage for layer in cache.layers]
        self._context = None if memory is None else model._injected_context(memory, batch, 1, device)
        tables = model._rope_tables(cache.layers[0].capacity, device, model.model.layers)
        self._tables = [tables.of(layer) for layer in model.model.layers]
        size = model.model.layers[0].self_attn.head_dim
        # queries are rotated when the cache gets their key
        # not in the default dtype, which may be another one
        angle = torch.zeros(1, size // 2, dtype=torch.float32, device=device)
        self._no_rotation = (angle.cos(), angle.sin())
        self._no_position = torch.zeros(batch, dtype=torch.int64, device=device)
        self._cu_q = torch.arange(batch + 1, device=device)
        self._length = torch.zeros(batch, dtype=torch.int64, device=device)
        self._first = torch.zeros(batch, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self._vocabulary = model.model.embed_tokens.num_embeddings
        self._use_graph = graph
        self._kernels = _kernels_of(self.state, batch, device, self._storages[0][0], self._tables[0][0])
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._watched: list[Tensor] = []
        self._ahead_of: tuple[int, int] | None = None
        self.hold(model, memory)

    def fits(self, cache: PreallocatedCache, state: tuple[Any, ...], batch: int) -> bool:
        """Whether this runner's graph is one of these parameters, this memory and the cache's present storage."""
        return (
            (self.state is state or self.state == state)
            and self.batch == batch
            and len(cache.layers) == len(self._storages)
            and all(
                layer._key_storage is keys and layer._value_storage is values
                for layer, (keys, values) in zip(cache.layers, self._storages, strict=True)
            )
        )

    def hold(self, model: "SharedLLMForCausalLM", memory: ContextMemory | None) -> None:
        """Keep alive what the graph reads: parameters and memory of :attr:`state`."""
        self._parameters = [parameter.detach() for parameter in model.parameters()]
        self._memory = memory
        if self._context is not None and memory is not None:
            self._context.keys, self._context.values = memory.keys, memory.values
        read = [*self._parameters, *(x for pair in self._storages for x in pair)]
        read += [] if memory is None else [*memory.keys, *memory.values]
        self._watched = [tensor for tensor in read if not tensor.is_inference()]

    def release(self) -> None:
        """Let go of parameters and memory; :meth:`hold` comes before the next run."""
        self.drop()
        self._parameters, self._watched, self._memory, self.length_on_host = [], [], None, -1
        if self._context is not None:
            self._context.keys, self._context.values = [], []

    def set_padding(self, first: Tensor) -> None:
        """Padding tokens in front of each row, ``[B]`` int64."""
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
        elif self._use_graph and self._kernels in _LOADED:
            self._capture().replay()
        else:
            # the first time also loads the kernels, which a capture must not
            self._logits = self._step()
            _LOADED.add(self._kernels)
        return self._end(cache)

    @property
    def can_run_ahead(self) -> bool:
        """Whether :meth:`run_ahead` can be called: not before there can be a graph, where there will be one."""
        return self._graph is not None or not self._use_graph or self._kernels in _LOADED

    def run_ahead(self, tokens: Tensor, cache: PreallocatedCache) -> None:
        """Start the step that :meth:`run` would make beside what the current stream does next.

        :meth:`take` ends it, :meth:`drop` forgets it. Arguments as for :meth:`run`; a token that is none (padding of
        rows that have ended) counts as the nearest one.
        """
        self.drop()
        self._put(tokens, cache.get_seq_length(), among=self._vocabulary)
        # nothing to take before it is started, but something to wait for
        self._ahead_of = (-1, -1)
        if not self._use_graph:
            self._logits = self._step()
        else:
            # made here it costs nothing where the device still reads the prompt
            graph = self._graph or self._capture()
            device = self._length.device
            self._stream = _side_stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                graph.replay()
        self._ahead_of = (cache.get_seq_length(), self._version())

    def is_ahead(self, cache: PreallocatedCache) -> bool:
        """Whether :meth:`run_ahead` has started the step that comes next, and what it reads has not changed since."""
        return self._ahead_of == (cache.get_seq_length(), self._version())

    def take(self, cache: PreallocatedCache) -> Tensor:
        """The logits of the step that :meth:`run_ahead` has started, as :meth:`run` returns them."""
        self._join()
        return self._end(cache)

    def drop(self) -> bool:
        """Forget the step that :meth:`run_ahead` has started; whether there was one. The cache has the same tokens."""
        if self._ahead_of is None:
            return False
        self._join()
        return True

    def wait(self, *, on_host: bool = False) -> None:
        """Let the current stream, or the host, wait for steps that were started on another one."""
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
        # counts only grow, so that their sum tells any change
        return sum(tensor._version for tensor in self._watched)

    def _put(self, tokens: Tensor, length: int, among: int | None = None) -> None:
        if length != self.length_on_host:
            self._length.fill_(length)
        # until the step is over: an interrupted one must not leave two lengths
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
        device = self._length.device
        graph = torch.cuda.CUDAGraph()
        stream = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._logits = self._step()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = graph
        return graph

    def _step(self) -> Tensor:
        model: Any = self._model()
        x = nn.functional.embedding(self._tokens, model.model.embed_tokens.weight)
        factor = embedding_factor(model.model.layers[0])
        x = x if factor == 1.0 else x * factor
        for layer, storage, tables in zip(model.model.layers, self._storages, self._tables, strict=True):
            x = self._attend(x, layer, storage, tables)
            injection = getattr(layer, "injection", None)
            if injection is not None and self._context is not None:
                x = self._inject(x, injection)
            gate, up, down = (projection(layer.mlp, name) for name in ("gate", "up", "down"))
            hidden = _product(x, (gate, up), mlp_norm(layer), gated=True)
            x = _sum(x, hidden, down, layer)
        logits = _product(x, (model.lm_head,), model.model.norm)
        logits = family_of(model.model.layers[0]).logits(logits, model.config.text_config)
        self._length.add_(1)
        return logits

    def _attend(self, x: Tensor, layer: Any, storage: tuple[Tensor, Tensor], tables: tuple[Tensor, Tensor]) -> Tensor:
        attention, (keys, values) = layer.self_attn, storage
        query, key, value, output = (projection(attention, name) for name in "qkvo")
        qkv = _product(x, (query, key, value), attention_norm(layer))
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        q, slot_range = decode_append(
            qkv,
            keys,
            values,
            self._length,
            self._first,
            *tables,
            q_norm=None if q_norm is None else q_norm.weight,
            k_norm=None if k_norm is None else k_norm.weight,
            eps=0.0 if q_norm is None else q_norm.variance_epsilon,
            window=sliding_window(layer) or 0,
            overlap=True,
            prefetch=output.weight,
            prefetch_bytes=PREFETCH_BYTES,
        )
        out, _ = injected_attention(
            q,
            keys.flatten(0, 1),
            values.flatten(0, 1),
            self._cu_q,
            slot_range,
            self._no_position,
            *self._no_rotation,
            scale=attention.scaling,
        )
        return _sum(x, out.flatten(1), output, layer)

    def _inject(self, x: Tensor, injection: Any) -> Tensor:
        context: Any = self._context
        query = _product(x, (injection.q_proj,), injection.norm, prefetch=injection.o_proj.weight)
        query = query.view(self.batch, -1, injection.head_dim)
        if injection.q_norm is not None:
            query = injection.q_norm(query)
        out, _ = injected_attention(
            query,
            context.keys[injection.layer_index],
            context.values[injection.layer_index],
            context.cu_q,
            context.slot_range,
            context.q_position,
            context.cos[injection.layer_index],
            context.sin[injection.layer_index],
            scale=injection.scaling,
        )
        return _product(out.flatten(1), (injection.o_proj,), residual=x)


def _product(
    x: Tensor,
    modules: tuple[Any, ...],
    norm: Any = None,
    *,
    residual: Tensor | None = None,
    gated: bool = False,
    prefetch: Tensor | None = None,
) -> Tensor:
    """Norm, linear modules and residual in one kernel."""
    return decode_linear(
        x,
        [module.weight for module in modules],
        [module.bias for module in modules],
        norm_weight=None if norm is None else norm.weight,
        eps=0.0 if norm is None else norm.variance_epsilon,
        residual=residual,
        gated=gated,
        # nothing writes parameters between the kernels of a step, and its first kernel does not overlap
        overlap=True,
        prefetch=prefetch,
        prefetch_bytes=PREFETCH_BYTES if prefetch is not None else 0,
    )


def _sum(hidden: Tensor, x: Tensor, module: Any, layer: Any) -> Tensor:
    """``hidden`` and the layer's last linear module of ``x``, added as the layer does."""
    factor = residual_factor(layer)
    if factor == 1.0:
        return _product(x, (module,), residual=hidden)
    return hidden.add(_product(x, (module,)), alpha=factor)


def _state(model: "SharedLLMForCausalLM", memory: ContextMemory | None) -> tuple[Any, ...]:
    """What a graph has baked in: where parameters and memory lie, which rows read what, the layers' constants."""
    parameters = tuple(
        (parameter.data_ptr(), parameter.dtype, parameter.shape, parameter.stride()) for parameter in model.parameters()
    )
    numbers = []
    for layer in model.model.layers:
        attention, injection = layer.self_attn, getattr(layer, "injection", None)
        norms = [attention_norm(layer), mlp_norm(layer), getattr(attention, "q_norm", None)]
        norms += [] if injection is None else [injection.norm]
        numbers += [attention.scaling, sliding_window(layer), None if injection is None else injection.scaling]
        numbers += [None if norm is None else norm.variance_epsilon for norm in norms]
        numbers += [rotation_of(layer), residual_factor(layer)]
    numbers += [model.model.norm.variance_epsilon, embedding_factor(model.model.layers[0])]
    for rotation in model._rotations(model.model.layers).values():
        numbers += [rotation.frequencies.data_ptr(), version_of(rotation.frequencies), rotation.scaling]
    if memory is None:
        return (id(model), parameters, tuple(numbers))
    tensors = tuple((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in (*memory.keys, *memory.values))
    rows = (tuple(memory.slot_ranges()), tuple(memory.num_chunks[i] for i in memory.memory_index))
    return (id(model), parameters, tuple(numbers), tensors, rows, model.config.query_position_offset)


def _kernels_of(
    state: tuple[Any, ...], batch: int, device: torch.device, storage: Tensor, table: Tensor
) -> tuple[Any, ...]:
    """Which kernels a step of this :func:`_state` runs, as far as shapes, dtypes, strides and alignment choose them."""
    _, parameters, _, *memory = state
    weights = tuple((pointer % 16, *rest) for pointer, *rest in parameters)
    slots = tuple((pointer % 16, shape[1:], stride) for pointer, shape, stride in memory[0]) if memory else None
    return (device, batch, weights, slots, storage.shape[2:], table.shape[1])


def supports(model: "SharedLLMForCausalLM") -> bool:
    """Whether a decoding step of this model, as it is now, can run by :class:`DecodeRunner`.

    It can for the supported families with plain modules without hooks, all on one CUDA device in bfloat16 or float16,
    in evaluation mode, and head sizes that the attention has fast kernels for.
    """
    from .modeling import SharedLLMForCausalLM

    config = model.config.text_config
    if model.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if type(model).forward is not SharedLLMForCausalLM.forward:
        return False
    weight = model.model.embed_tokens.weight
    device, dtype = weight.device, weight.dtype
    if device.type not in ("cuda", "cpu") or torch.is_autocast_enabled(device.type):
        return False
    attention = model.model.layers[0].self_attn
    if device.type == "cuda":
        fast = dtype != torch.float32 and attention.head_dim in HEAD_SIZES
        if not fast or not {"decode_linear", "decode_append", "injected_attention"} <= cuda_kernels():
            return False
    elif not RUN_ON_CPU:
        return False
    rope = getattr(model.model.rotary_emb, "rope_type", "default")
    if dtype not in _DTYPES or rope not in FIXED_ROPE_TYPES or getattr(config, "hidden_act", None) != "silu":
        return False
    if any(getattr(model.config, name, False) for name in ("output_attentions", "output_hidden_states")):
        return False
    if any(_has_hooks(module) for module in (model, *model.model.modules(), model.lm_head)):
        return False
    if type(model.model.embed_tokens) is not nn.Embedding or model.model.embed_tokens.max_norm is not None:
        return False
    family, linear, norms = family_of(model.model.layers[0]), [model.lm_head], [model.model.norm]
    if family.not_decoded is not None:
        return False
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        parts = (layer, family.layer), (attention, family.attention), (mlp, family.mlp)
        if not all(isinstance(part, its) for part, its in parts):
            return False
        norms += [attention_norm(layer), mlp_norm(layer)]
        linear += [getattr(attention if name in "qkvo" else mlp, its) for name, its in family.projections.items()]
        injection: Any = getattr(layer, "injection", None)
        if injection is not None:
            linear += [injection.q_proj, injection.o_proj]
            norms.append(injection.norm)
    if any(type(module) is not nn.Linear for module in linear) or any(not isinstance(n, family.norm) for n in norms):
        return False
    return all(
        type(parameter) is nn.Parameter and parameter.device == device and parameter.dtype == dtype
        for parameter in (*model.model.parameters(), *model.lm_head.parameters())
    )


def _has_hooks(module: nn.Module) -> bool:
    """Whether a call is more than the forward; Transformers' own hooks do nothing unless outputs are wanted."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    foreign = any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)
    return foreign or "forward" in module.__dict__


@dataclasses.dataclass
class DecodeCall:
    """The forward pass of one ``generate``: decoding steps through a runner, everything else through the model.

    Attributes:
        model: the model.
        memory: what its injected layers read, or ``None``.
        first: padding tokens in front of each row, ``[B]`` int64, or ``None``.
        cache: over which the next call is probably a step, or ``None``.
    """

    model: "SharedLLMForCausalLM"
    memory: ContextMemory | None
    first: Tensor | None
    runner: DecodeRunner | None = None
    state: tuple[Any, ...] | None = None
    usual_positions: bool | None = None
    cache: PreallocatedCache | None = None
    next_length: int = -1

    def __call__(self, **inputs: Any) -> Any:
        """As the model's own call, with keyword arguments alone."""
        tokens, cache = inputs.get("input_ids"), inputs.get(CACHE_NAME)
        if not self._is_step(tokens, cache, inputs):
            self.drop()
            self.cache = None
            return self.model(**inputs)
        assert tokens is not None and isinstance(cache, PreallocatedCache)
        cache.reserve(cache.get_seq_length() + 1)
        runner = self._runner(cache, tokens.shape[0])
        taken = cache is self.cache and runner.is_ahead(cache)
        logits = runner.take(cache) if taken else runner.run(tokens, cache)
        self.cache, self.next_length = cache, cache.get_seq_length()
        from .modeling import SharedLLMOutput

        output: dict[str, Any] = {CACHE_NAME: cache}
        return SharedLLMOutput(logits=logits.unsqueeze(1), memory=self.memory, **output)

    def run_ahead(self, tokens: Tensor) -> None:
        """Start the next step with these tokens ``[B]``, if a step over :attr:`cache` is what comes next."""
        cache, batch = self.cache, tokens.shape[0]
        if cache is None or not self._is_held(cache, batch):
            return
        cache.reserve(cache.get_seq_length() + 1)
        runner = self._runner(cache, batch)
        if runner.can_run_ahead:
            runner.run_ahead(tokens, cache)

    def drop(self) -> bool:
        """Forget a step that has been started ahead; whether there was one."""
        return self.runner is not None and self.runner.drop()

    def _is_step(self, tokens: Tensor | None, cache: Any, inputs: dict[str, Any]) -> bool:
        if tokens is None or type(cache) is not PreallocatedCache or inputs.get("inputs_embeds") is not None:
            return False
        length = cache.get_seq_length()
        if tokens.shape[1] != 1 or tokens.shape[0] > MAX_BATCH or length == 0:
            return False
        if any(inputs.get(name) for name in ("output_attentions", "output_hidden_states")):
            return False
        if inputs.get("memory") is not self.memory or inputs.get("labels") is not None:
            return False
        mask = inputs.get("attention_mask")
        if mask is not None and tuple(mask.shape) != (tokens.shape[0], length + 1):
            return False
        if self.first is not None and self.first.shape[0] != tokens.shape[0]:
            return False
        if not self._has_usual_positions(inputs.get("position_ids"), length):
            return False
        return tokens.device == self.model.lm_head.weight.device and self._is_held(cache, tokens.shape[0])

    def _is_held(self, cache: PreallocatedCache, batch: int) -> bool:
        """Whether the layers of the cache hold equally many tokens of so many rows as a step expects them."""
        length, weight = cache.get_seq_length(), self.model.lm_head.weight
        return (
            length > 0
            and batch <= MAX_BATCH
            and all(
                layer.get_seq_length() == length
                and layer.storage[0].dtype == weight.dtype
                and layer.storage[0].device == weight.device
                and layer.storage[0].shape[0] == batch
                for layer in cache.layers
            )
        )

    def _has_usual_positions(self, positions: Tensor | None, length: int) -> bool:
        """Whether positions count the tokens without padding.

        Looked at once, since generate continues them by ones, and again where the cache has another length than that.
        """
        if self.usual_positions is None or length != self.next_length:
            expected = length if self.first is None else length - self.first
            self.usual_positions = positions is None or bool((positions.reshape(-1) == expected).all())
        return self.usual_positions

    def _runner(self, cache: PreallocatedCache, batch: int) -> DecodeRunner:
        if self.state is None:
            self.state = _state(self.model, self.memory)
        fresh = self.runner is None
        runner = self.runner or _RUNNERS.get(cache)
        if runner is None or not runner.fits(cache, self.state, batch):
            if runner is not None:
                runner.drop()
            # the old graph goes before the new one comes
            self.runner = runner = None
            _RUNNERS.pop(cache, None)
            on_cuda = cache.layers[0].storage[0].is_cuda
            runner = DecodeRunner(self.model, cache, self.memory, batch, on_cuda, self.state)
            fresh = True
        elif fresh:
            # the same object: every token compares them
            runner.state = self.state
            runner.hold(self.model, self.memory)
        if fresh:
            runner.set_padding(torch.zeros_like(runner._first) if self.first is None else self.first)
            _RUNNERS[cache] = runner
            self.runner = runner
        return runner


# kernels (see _kernels_of) that a step has run outside of a capture in this process
_LOADED: set[tuple[Any, ...]] = set()
# a graph lives as long as the cache that it writes to
_RUNNERS: "weakref.WeakKeyDictionary[Cache, DecodeRunner]" = weakref.WeakKeyDictionary()
# of the last generate that kept its cache to itself: storage of every layer, and the graph over it
_SPARES: "weakref.WeakKeyDictionary[nn.Module, tuple[list[tuple[Tensor, Tensor]], DecodeRunner | None]]"
_SPARES = weakref.WeakKeyDictionary()


@dataclasses.dataclass(eq=False)
class Generating:
    """What the questions that one ``generate`` asks have to know of each other; its caller holds it.

    Attributes:
        may_run_ahead: whether steps may start before they are called.
        outer: of the ``generate`` that this one runs inside of.
        removed: columns of its prompt that became context.
        cache: made by :func:`new_cache`.
        stepped: over which tokens will be chosen one after another.
        ahead: the criterion that starts steps.
        call: made by :func:`offer_call`, until it is taken.
    """

    may_run_ahead: bool
    outer: "Generating | None"
    removed: int = 0
    cache: PreallocatedCache | None = None
    stepped: PreallocatedCache | None = None
    ahead: "RunAhead | None" = None
    call: DecodeCall | None = None


class _Thread(threading.local):
    generating: "weakref.ref[Generating] | None" = None

    def __init__(self) -> None:
        self.streams: dict[torch.device, torch.cuda.Stream] = {}


_thread = _Thread()


def _generating() -> Generating | None:
    return None if _thread.generating is None else _thread.generating()


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The thread's stream for captures and for steps that start ahead; CUDA has only few."""
    if device not in _thread.streams:
        _thread.streams[device] = torch.cuda.Stream(device)
    return _thread.streams[device]


def begin_generate(may_run_ahead: bool, removed: int = 0) -> Generating:
    """At the beginning of a ``generate``, for :func:`end_generate`; ``removed`` columns of its prompt are context."""
    own = Generating(may_run_ahead, _generating(), removed)
    _thread.generating = weakref.ref(own)
    return own


def removed_tokens() -> int:
    """Columns of the prompt that became context, of the ``generate`` that runs in this thread."""
    generating = _generating()
    return 0 if generating is None else generating.removed


def expect_steps(cache: PreallocatedCache) -> None:
    """A ``generate`` will choose its tokens one after another over this cache."""
    generating, runner = _generating(), _RUNNERS.get(cache)
    if runner is not None:
        # it may come from a generate on another stream
        runner.wait()
    if generating is not None and generating.may_run_ahead:
        generating.stepped = cache


def new_cache(model: "SharedLLMForCausalLM", limit: int | None) -> PreallocatedCache:
    """A cache for one ``generate``, in the storage of the last one where that fits; see :func:`end_generate`."""
    storages, runner = _SPARES.pop(model, (None, None))
    cache = PreallocatedCache(model.config.text_config, limit, storages)
    if runner is not None:
        # looked at before it is used, as every runner is
        _RUNNERS[cache] = runner
    generating = _generating()
    if generating is not None:
        generating.cache = cache
    return cache


class RunAhead(StoppingCriteria):
    """Starts the next decoding step as soon as its tokens are chosen, and stops nothing.

    Otherwise the device would stand still while the host asks whether to stop and prepares the next call. A sequence
    that ends before its longest length costs one step that nobody looks at.

    Args:
        max_length: of the sequences; no step follows one of this length.
        cache: over which the steps go.
    """

    def __init__(self, max_length: int | None, cache: PreallocatedCache) -> None:
        self.max_length = max_length
        self.cache = cache
        self.call: DecodeCall | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Zeros ``[B]``, given all tokens ``[B, T]``."""
        if self.call is not None and (self.max_length is None or input_ids.shape[1] < self.max_length):
            self.call.run_ahead(input_ids[:, -1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def add_run_ahead(criteria: StoppingCriteriaList) -> None:
    """Add :class:`RunAhead` to the criteria of a ``generate`` whose decoding may go through a :class:`DecodeCall`."""
    generating = _generating()
    if generating is None or generating.stepped is None:
        return
    ahead = generating.ahead = RunAhead(criteria.max_length, generating.stepped)
    generating.stepped = None
    # criteria of others come first: they might change the tokens
    foreign = any(type(other).__module__ != StoppingCriteria.__module__ for other in criteria)
    criteria.insert(len(criteria) if foreign else 0, ahead)


def end_generate(model: "SharedLLMForCausalLM", seen: bool, own: Generating | None) -> None:
    """At the end of a ``generate``: keep the cache that :func:`new_cache` made, unless others may have ``seen`` it.

    What is kept is the cache's storage, up to ``KEPT_BYTES``, and the graph, without holding on to parameters or
    memory. The graph is used again if all it reads lies where it lay.
    """
    if own is None:
        return
    cache = own.cache
    _thread.generating = None if own.outer is None else weakref.ref(own.outer)
    call = None if own.ahead is None else own.ahead.call
    if call is not None and call.drop() and call.runner is not None:
        device = model.device
        if device.type == "cuda" and torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
            # the storage may be of another stream, which would not wait
            call.runner.wait(on_host=True)
    if cache is None or seen or any(layer._key_storage is None for layer in cache.layers):
        return
    storages = [layer.storage for layer in cache.layers]
    if sum(x.numel() * x.element_size() for pair in storages for x in pair) > KEPT_BYTES:
        return
    if any(x.is_inference() for pair in storages for x in pair):
        return
    runner = _RUNNERS.pop(cache, None)
    if runner is not None:
        runner.release()
    _SPARES[model] = (storages, runner)


def release(model: "SharedLLMForCausalLM") -> None:
    """Give the memory back that is kept for the model's next ``generate``."""
    _SPARES.pop(model, None)


def offer_call(model: "SharedLLMForCausalLM", model_kwargs: dict[str, Any], generation_config: Any) -> bool:
    """Prepare the :class:`DecodeCall` of a ``generate``, to be taken by :func:`take_call`; whether there is one."""
    generating = _generating()
    if generating is None:
        return False
    generating.call = None
    cache = model_kwargs.get(CACHE_NAME)
    wanted = not any(
        getattr(generation_config, name, None)
        for name in ("disable_compile", "output_attentions", "output_hidden_states")
    )
    if not wanted or type(cache) is not PreallocatedCache or not supports(model):
        return False
    memory = model_kwargs.get("memory")
    if memory is not None and (memory.dtype != model.dtype or memory.device != model.device):
        return False
    mask, first = model_kwargs.get("attention_mask"), None
    if mask is not None:
        if mask.dim() != 2 or mask.shape[0] > MAX_BATCH:
            return False
        total = mask.shape[1]
        first = total - mask.long().sum(1)
        is_left_padded = (mask.bool() == (torch.arange(total, device=mask.device) >= first[:, None])).all()
        if not bool(is_left_padded):
            return False
    generating.call = DecodeCall(model, memory, first)
    return True


def take_call() -> DecodeCall | None:
    """What :func:`offer_call` prepared on this thread, once."""
    generating = _generating()
    if generating is None:
        return None
    call, generating.call = generating.call, None
    ahead = generating.ahead
    # the first one is the loop's; a prompt in pieces takes another
    if call is not None and ahead is not None and ahead.call is None:
        ahead.call, call.cache = call, ahead.cache
    return call

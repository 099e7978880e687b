"""The state of one ``generate``: which cache it steps over, its decoding calls, and steps that start ahead."""

import dataclasses
import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from ...counted import counted
from ..cache_name import CACHE_NAME
from ..memory import ContextMemory
from ..outputs import SharedLLMOutput
from ..protocols import Decoder
from ..rotary import TablesOf
from . import graph as graphs
from . import support
from .cache import PreallocatedCache
from .prompt import release_prompts
from .step import RUNNERS, DecodeRunner, state_of_step
from .support import (
    obstacle_in_cache,
    obstacle_in_call,
    obstacle_in_model,
    obstacle_in_outputs,
    obstacle_in_rows,
    padding_of,
    say_slow,
)

#: Bytes of a cache that are kept, with its graph, for the next generate of the same model.
KEPT_BYTES = 1 << 30
# no step, and nothing to log: the prompt, or a part of it
_PROMPT = "input_ids: expected one token a row after the prompt, got the prompt"


@dataclasses.dataclass
class DecodeCall:
    """The forward pass of one ``generate``: decoding steps through a runner, everything else through the model.

    Attributes:
        model: the model.
        tables: gives cos and sin for a number of positions on a device.
        memory: what its injected layers read, or ``None``.
        first: left padding of each row in tokens, ``[B]`` int64, or ``None``.
        just_examined: whether nothing has happened to the model since this ``generate`` examined it.
        cache: the cache over which the next call is probably a step, or ``None``.
    """

    model: Any
    tables: TablesOf
    memory: ContextMemory | None
    first: Tensor | None
    just_examined: bool = False
    runner: DecodeRunner | None = None
    state: tuple[Any, ...] | None = None
    usual_positions: bool | None = None
    cache: PreallocatedCache | None = None
    next_length: int = -1

    def __call__(self, **inputs: Any) -> Any:
        """As the model's own call, with keyword arguments alone."""
        tokens, cache = inputs.get("input_ids"), inputs.get(CACHE_NAME)
        obstacle = self._obstacle(tokens, cache, inputs)
        if obstacle is not None:
            if obstacle is not _PROMPT:
                say_slow(obstacle)
            self.drop()
            self.cache = None
            try:
                return self.model(**inputs)
            finally:
                # the loop goes on to what others wrote
                self.just_examined = False
        assert tokens is not None and isinstance(cache, PreallocatedCache)
        cache.reserve(cache.get_seq_length() + 1)
        runner = self._runner(cache, tokens.shape[0])
        taken = cache is self.cache and runner.is_ahead(cache)
        logits = runner.take(cache) if taken else runner.run(tokens, cache)
        self.cache, self.next_length = cache, cache.get_seq_length()
        output: dict[str, Any] = {CACHE_NAME: cache}
        return SharedLLMOutput(logits=logits.unsqueeze(1), memory=self.memory, **output)

    def state_of_model(self) -> tuple[Any, ...]:
        """What a step's graph fixes of model and memory, looked up once a generate."""
        if self.state is None:
            self.state = state_of_step(self.model, self.memory, just_examined=self.just_examined)
        return self.state

    def run_ahead(self, tokens: Tensor) -> None:
        """Start the next step with these tokens ``[B]``, if a step over :attr:`cache` is what comes next."""
        cache, batch = self.cache, tokens.shape[0]
        # the CPU is not idle meanwhile
        if cache is None or not self._is_held(cache, batch) or not (tokens.is_cuda or support.RUN_ON_CPU):
            return
        cache.reserve(cache.get_seq_length() + 1)
        runner = self._runner(cache, batch)
        if runner.can_run_ahead:
            runner.run_ahead(tokens, cache)

    def drop(self) -> bool:
        """Discard a step that was started ahead; returns whether there was one."""
        return self.runner is not None and self.runner.drop()

    def _obstacle(self, tokens: Tensor | None, cache: Any, inputs: dict[str, Any]) -> str | None:
        """Why this call is not a decoding step; ``None`` if it is one."""
        if tokens is None or inputs.get("inputs_embeds") is not None:
            return _PROMPT
        rows, new = tokens.shape
        if type(cache) is not PreallocatedCache:
            return obstacle_in_cache(cache) or f"{CACHE_NAME}: expected a PreallocatedCache, got none"
        length = cache.get_seq_length()
        if new != 1 or length == 0:
            return _PROMPT
        obstacle = obstacle_in_rows(self.model, rows)
        if obstacle is not None:
            return obstacle
        for name in ("output_attentions", "output_hidden_states"):
            if inputs.get(name):
                return f"{name}: expected False, got True"
        if inputs.get("memory") is not self.memory:
            return "memory: expected the one that generate was given, got another one"
        if inputs.get("labels") is not None:
            return "labels: expected none in a decoding step, got some"
        mask = inputs.get("attention_mask")
        if mask is not None and tuple(mask.shape) != (rows, length + 1):
            got = counted(mask.dim(), "dimension")
            return f"attention_mask: expected shape [batch, cached tokens + 1], got one of {got}"
        if self.first is not None and self.first.shape[0] != rows:
            return "attention_mask: expected the rows that generate began with, got others"
        if not self._has_usual_positions(inputs.get("position_ids"), length):
            return "position_ids: expected the tokens' count without padding, got others"
        if tokens.device != self.model.model.embed_tokens.weight.device or not self._is_held(cache, rows):
            return f"{CACHE_NAME}: expected every layer to hold the model's dtype, device and rows, got others"
        return None

    def _is_held(self, cache: PreallocatedCache, batch: int) -> bool:
        """Whether all layers of the cache hold equally many tokens of ``batch`` rows, as a step expects."""
        weight = self.model.model.embed_tokens.weight
        length, dtype, device = cache.get_seq_length(), weight.dtype, weight.device
        if length == 0 or obstacle_in_rows(self.model, batch) is not None:
            return False
        for layer in cache.layers:
            keys = layer._key_storage
            if layer._length != length or keys.dtype != dtype or keys.device != device or keys.shape[0] != batch:
                return False
        return True

    def _has_usual_positions(self, positions: Tensor | None, length: int) -> bool:
        """Whether positions count the tokens without padding.

        Checked once, since generate increments them, and again if the cache has an unexpected length.
        """
        if self.usual_positions is None or length != self.next_length:
            expected = length if self.first is None else length - self.first
            self.usual_positions = positions is None or bool((positions.reshape(-1) == expected).all())
        return self.usual_positions

    def _runner(self, cache: PreallocatedCache, batch: int) -> DecodeRunner:
        state = self.state_of_model()
        fresh = self.runner is None
        runner = self.runner or RUNNERS.get(cache)
        if runner is None or not runner.fits(cache, state, batch):
            if runner is not None:
                runner.drop()
            # the old graph goes before the new one comes
            self.runner = runner = None
            RUNNERS.pop(cache, None)
            runner = self._new_runner(cache, batch, graphs.uses_graphs(self.model.device), state)
            fresh = True
        elif fresh:
            # the same object, because every token compares them
            runner.state = state
            runner.hold(self.model, self.memory)
        if fresh:
            runner.set_padding(torch.zeros_like(runner._first) if self.first is None else self.first)
            RUNNERS[cache] = runner
            self.runner = runner
        return runner

    # the graph reads them in later calls, which may be outside inference mode
    @torch.inference_mode(False)
    @torch.no_grad()
    def _new_runner(self, cache: PreallocatedCache, batch: int, graph: bool, state: tuple[Any, ...]) -> DecodeRunner:
        model, device, layers = self.model, self.model.device, self.model.model.layers
        context = None if self.memory is None else model._context_of(self.memory, (batch, 1), device)
        found = self.tables(cache.layers[0].capacity, device, layers)
        tables = [found.of(layer) for layer in layers]
        return DecodeRunner(model, cache, self.memory, batch, context=context, tables=tables, graph=graph, state=state)


# of the last generate that did not return its cache: storage of every layer, and the graph over it
_SPARES: "weakref.WeakKeyDictionary[Decoder, tuple[list[tuple[Tensor, Tensor]], DecodeRunner | None]]"
_SPARES = weakref.WeakKeyDictionary()


@dataclasses.dataclass(eq=False)
class Generating:
    """State shared by the hooks of one ``generate`` call; owned by that call.

    Attributes:
        model: the model that generates.
        may_run_ahead: whether steps may start before they are called.
        outer: state of the ``generate`` inside which this one runs.
        removed: columns of its prompt that became context.
        examined: whether nothing in the model speaks against steps, as found by this ``generate`` before its loop.
        checked: the memory that this ``generate`` has checked or made, until its first forward.
        just_examined: whether it has looked at the model to do so, before its loop.
        cache: made by :func:`new_cache`.
        stepped: the cache over which tokens will be chosen one by one.
        ahead: the criterion that starts steps.
        call: made by :func:`offer_call`, until it is taken.
    """

    model: Decoder
    may_run_ahead: bool
    outer: "Generating | None"
    removed: int = 0
    examined: bool = False
    checked: ContextMemory | None = None
    just_examined: bool = False
    cache: PreallocatedCache | None = None
    stepped: PreallocatedCache | None = None
    ahead: "RunAhead | None" = None
    call: DecodeCall | None = None


class _Thread(threading.local):
    generating: "weakref.ref[Generating] | None" = None


_thread = _Thread()


def _generating() -> Generating | None:
    return None if _thread.generating is None else _thread.generating()


def begin_generate(
    model: Decoder,
    may_run_ahead: bool,
    removed: int = 0,
    memory: ContextMemory | None = None,
    made: bool = False,
) -> Generating:
    """At the beginning of a ``generate``, for :func:`end_generate`.

    ``removed`` columns of its prompt are context. Its ``memory`` was made or checked just now.
    """
    own = Generating(model, may_run_ahead, _generating(), removed)
    if may_run_ahead:
        # a loop of the caller's may change the model first; a check examines the model
        own.checked, own.just_examined = memory, memory is not None and not made
    _thread.generating = weakref.ref(own)
    return own


def was_examined(model: Decoder) -> bool:
    """Whether the ``generate`` that runs in this thread has examined the model, and has not come to its loop yet."""
    generating = _generating()
    if generating is None or generating.model is not model:
        return False
    just, generating.just_examined = generating.just_examined, False
    return just


def was_checked(model: Decoder, memory: ContextMemory) -> bool:
    """Whether the ``generate`` that runs in this thread has just checked the memory of its first forward."""
    generating = _generating()
    if generating is None or generating.model is not model:
        return False
    checked, generating.checked = generating.checked, None
    return checked is memory


def removed_tokens() -> int:
    """Columns of the prompt that became context, of the ``generate`` that runs in this thread."""
    generating = _generating()
    return 0 if generating is None else generating.removed


def expect_steps(cache: PreallocatedCache) -> None:
    """A ``generate`` is going to choose its tokens one by one over this cache."""
    generating, runner = _generating(), RUNNERS.get(cache)
    if runner is not None:
        # it may come from a generate on another stream
        runner.wait()
    if generating is not None and generating.may_run_ahead:
        generating.stepped = cache


def new_cache(model: Decoder, limit: int | None) -> PreallocatedCache:
    """A cache for one ``generate``, in the storage of the last one where that fits; see :func:`end_generate`.

    Its model has been examined: :func:`~.support.obstacle_in_model` has found nothing.
    """
    storages, runner = _SPARES.pop(model, (None, None))
    cache = PreallocatedCache(model.config.text_config, limit, storages)
    if runner is not None:
        # checked before it is used, like every runner
        RUNNERS[cache] = runner
    generating = _generating()
    if generating is not None:
        generating.cache = cache
        # a loop of the caller's may change the model before it asks
        generating.examined = generating.may_run_ahead
    return cache


class RunAhead(StoppingCriteria):
    """Starts the next decoding step as soon as its tokens are chosen, and stops nothing.

    Otherwise the device would be idle while the host checks whether to stop and prepares the next call. A sequence that
    ends before its longest length wastes one step.

    Args:
        max_length: of the sequences; no step follows a sequence of this length.
        cache: the cache that the steps extend.
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


def end_generate(model: Decoder, seen: bool, own: Generating | None) -> None:
    """At the end of a ``generate``: keep the cache of :func:`new_cache`, unless the caller may have ``seen`` it.

    What is kept is the cache's storage, up to ``KEPT_BYTES``, and the graph, without holding on to parameters or
    memory. The graph is used again if everything that it reads is still in the same place.
    """
    if own is None:
        return
    cache = own.cache
    _thread.generating = None if own.outer is None else weakref.ref(own.outer)
    call = None if own.ahead is None else own.ahead.call
    if call is not None and call.drop() and call.runner is not None:
        device = model.device
        if device.type == "cuda" and torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
            # another stream may use the storage without waiting
            call.runner.wait(on_host=True)
    if cache is None or seen or any(layer._key_storage is None for layer in cache.layers):
        return
    storages = [layer.storage for layer in cache.layers]
    if sum(x.numel() * x.element_size() for pair in storages for x in pair) > KEPT_BYTES:
        return
    if any(x.is_inference() for pair in storages for x in pair):
        return
    runner = RUNNERS.pop(cache, None)
    if runner is not None:
        runner.release()
    _SPARES[model] = (storages, runner)


def release(model: Decoder) -> None:
    """Free what is kept for the model's next texts: the storage of a ``generate``, and steps of short prompts."""
    release_prompts(model)
    _SPARES.pop(model, None)


def offer_call(model: Decoder, tables: TablesOf, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
    """Prepare the :class:`DecodeCall` of a ``generate``, for :func:`take_call`; returns whether there is one."""
    generating = _generating()
    if generating is None:
        return False
    generating.call = None
    cache = model_kwargs.get(CACHE_NAME)
    if cache is None:
        # the reason has been logged already
        return False
    memory, mask = model_kwargs.get("memory"), model_kwargs.get("attention_mask")
    examined, generating.examined = generating.examined, False
    obstacle = _obstacle_to_call(model, cache, memory, mask, generation_config, examined)
    if obstacle is not None:
        say_slow(obstacle)
        return False
    first = None if mask is None else padding_of(mask)
    generating.call = DecodeCall(model, tables, memory, first, just_examined=examined)
    return True


def _obstacle_to_call(
    model: Decoder, cache: Any, memory: Any, mask: Tensor | None, config: Any, examined: bool
) -> str | None:
    return (
        obstacle_in_outputs(lambda name: getattr(config, name, None))
        or obstacle_in_cache(cache)
        or (None if examined else obstacle_in_model(model))
        or obstacle_in_call(model, 1, memory, mask)
    )


def known_state(model: Decoder, memory: ContextMemory | None, cache: Any) -> tuple[bool, tuple[Any, ...] | None]:
    """Whether a ``generate`` of this thread has decided how the model reads a text, and what a step then fixes.

    The latter is as :func:`state_of_step` gives it, or ``None`` where that generate does not decode by steps.
    """
    generating = _generating()
    if generating is None or generating.model is not model:
        return False, None
    call = None if generating.ahead is None else generating.ahead.call
    if call is None:
        return True, None
    # other texts that something reads meanwhile are not its prompt
    if call.memory is not memory or call.cache is not cache or call.runner is not None:
        return False, None
    return True, call.state_of_model()


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

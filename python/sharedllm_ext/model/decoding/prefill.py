"""Which running texts are read as one step, and what the model's forward gets of it."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..cache_name import CACHE_NAME
from ..memory import ContextMemory
from . import graph, support
from .cache import PreallocatedCache
from .prompt import ShortPrompt, columns_of, kept_prompts
from .session import known_state
from .step import state_of_step
from .support import obstacle_in_call, obstacle_in_model, padding_of


def read_short(
    model: Any,
    tokens: Tensor | None,
    mask: Tensor | None,
    positions: Tensor | None,
    cache: Any,
    memory: ContextMemory | None,
    use_cache: bool,
    others: dict[str, Any],
    *,
    just_examined: bool,
) -> BaseModelOutputWithPast | None:
    """The decoder's output for a short running text that begins its cache, in one step where that is faster.

    The ordinary forward launches each kernel from the host, which takes longer than the kernels of so few tokens. A
    step launches fewer, and its graph, made at the second text of a memory, all at once. The first text is read by the
    same operators, so that a question has one answer, however often it is asked.

    Args:
        model: the model.
        tokens: ``[B, L]``, or ``None`` if the text comes in another form.
        mask: ``[B, L]``, 0 for padding, or ``None``.
        positions: of the tokens, or ``None``.
        cache: empty, or ``None``.
        memory: of ``B`` rows or of one, or ``None``.
        use_cache: whether a cache is returned, and made where none is given.
        others: further keywords of the forward.
        just_examined: whether nothing has happened to the model since the caller examined it.

    Returns:
        ``None`` if the ordinary forward has to read the text.
    """
    device = model.model.embed_tokens.weight.device
    if tokens is None or not (device.type == "cuda" or support.RUN_ON_CPU) or tokens.device != device:
        return None
    if support.in_8_bits(model):
        return None
    batch, length = tokens.shape
    columns = columns_of(batch, length)
    if columns is None or any(value for value in others.values()) or torch.compiler.is_compiling():
        return None
    if type(cache) not in (type(None), PreallocatedCache, DynamicCache) or (mask is not None and mask.dim() != 2):
        return None
    if memory is not None and memory.batch_size not in (1, batch):
        return None
    if memory is not None and memory.version is not None:
        memory.version.check()
    state = _state(model, memory, cache, just_examined)
    if state is None:
        return None
    first = None if mask is None else padding_of(mask)
    if not _counts_tokens(tokens, mask, positions, first):
        return None
    kept = kept_prompts(model)
    key = (state, batch, columns)
    step = kept.take(key) or _new_step(model, memory, batch, columns)
    hidden = step.run(tokens, first, None if positions is None else first, memory)
    if cache is None and use_cache:
        # as the decoder would
        cache = DynamicCache(config=model.config.text_config)
    if type(cache) is PreallocatedCache:
        cache.fill(step.states(length))
    elif cache is not None:
        # it may keep what it is given
        for index, pair in enumerate(step.states(length).transpose(3, 4).clone().unbind(0)):
            cache.update(*pair.unbind(0), index)
    step.end()
    kept.put(key, step)
    output: dict[str, Any] = {CACHE_NAME: cache if use_cache else None}
    return BaseModelOutputWithPast(last_hidden_state=hidden, **output)


def _state(model: Any, memory: ContextMemory | None, cache: Any, just_examined: bool) -> tuple[Any, ...] | None:
    """What a step's graph fixes of model and memory; ``None`` if a step cannot run them."""
    generating, state = known_state(model, memory, cache)
    if generating:
        # whether it decodes by steps has been decided
        return state
    if obstacle_in_model(model, just_examined=just_examined) or obstacle_in_call(model, 1, memory, None):
        return None
    return state_of_step(model, memory, just_examined=True)


def _counts_tokens(tokens: Tensor, mask: Tensor | None, positions: Tensor | None, first: Tensor | None) -> bool:
    """Whether a mask pads on the left alone, and positions, if given, count the tokens without padding."""
    if mask is None and positions is None:
        return True
    column = torch.arange(tokens.shape[1], device=tokens.device)
    agree = torch.ones((), dtype=torch.bool, device=tokens.device)
    if mask is not None and first is not None:
        if mask.shape != tokens.shape:
            return False
        agree = agree & (mask.bool() == (column >= first[:, None])).all()
        column = (column - first[:, None]).clamp(min=0)
    if positions is not None:
        if positions.dim() != 2 or positions.shape[1] != tokens.shape[1]:
            return False
        agree = agree & (positions == column).all()
    return bool(agree)


# the graph reads them in later calls, which may be outside inference mode
@torch.inference_mode(False)
@torch.no_grad()
def _new_step(model: Any, memory: ContextMemory | None, batch: int, columns: int) -> ShortPrompt:
    layers, device = model.model.layers, model.device
    found = model._rope_tables(columns, device, layers)
    return ShortPrompt(
        model,
        batch,
        columns,
        context=None if memory is None else model._context_of(memory, (batch, columns), device),
        tables=[found.of(layer) for layer in layers],
        graph=graph.uses_graphs(device),
    )

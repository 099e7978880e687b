"""The injected attention block, and the decoder layers of the supported families that carry one."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..counted import counted
from ..ops import injected_attention
from .families import FAMILIES, Family, attention_norm, norm_eps, projection
from .hooks import is_untouched
from .joins import Joins
from .layer_math import add_linear, add_mlp, add_output, adds_plainly, linear_weight, version_of
from .managed_layers import RunsSteps
from .memory import ContextMemory
from .memory_rows import Span
from .rotary import TablesOf
from .upload import upload


class InjectedContext:
    """Inputs of the injected blocks of one forward pass; see :func:`sharedllm_ext.ops.injected_attention`.

    Keys, values and rotary tables are lists, one entry a block. ``merge`` joins attention and log-sum-exp with those of
    other processes, which hold the memory's other slots.

    Batch rows that read the same slots from the same position are one row of the operator, which then reads those slots
    once for all of them: ``order`` are the batch rows in the operator's order, ``place`` says where each went; both are
    ``None`` if that is the batch's own order. Where a batch row reads several documents, ``joins`` takes their place:
    each document is then a row of the operator.

    No dataclass: FSDP descends into those and would round the rotary tables to its parameters' dtype.
    """

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        cu_q: Tensor,
        slot_range: Tensor,
        q_position: Tensor,
        cos: list[Tensor],
        sin: list[Tensor],
        merge: Callable[[Tensor, Tensor], Tensor] | None = None,
        order: Tensor | None = None,
        place: Tensor | None = None,
        joins: Joins | None = None,
        length: int = 1,
    ) -> None:
        self.keys, self.values, self.merge = keys, values, merge
        self.cu_q, self.slot_range, self.q_position = cu_q, slot_range, q_position
        self.order, self.place = order, place
        self.joins, self.length = joins, length
        self.cos, self.sin = cos, sin

    @classmethod
    def of(
        cls,
        memory: ContextMemory,
        batch: int,
        length: int,
        device: torch.device,
        *,
        offset: int,
        tables: TablesOf,
        layers: Sequence[Any],
    ) -> "InjectedContext":
        """The part of a memory that ``batch`` rows of ``length`` tokens on a device read.

        Args:
            memory: of so many rows, or of one for all.
            batch, length, device: of the running text.
            offset: added to the number of chunks it is the position of the queries.
            tables: gives cos and sin.
            layers: the layers that read the memory.

        Raises:
            ValueError: the memory is of other rows or on another device.
        """
        if memory.version is not None and not torch.compiler.is_compiling():
            memory.version.check()
        if memory.batch_size == 1 and batch > 1:
            memory = memory.expand(batch)
        if memory.batch_size != batch:
            raise ValueError(
                f"memory: expected {counted(batch, 'batch row')} as in input_ids, or 1, got {memory.batch_size}"
            )
        if memory.device != device:
            raise ValueError(
                f"memory: expected device {device} as input_ids, got {memory.device}; use memory.to({str(device)!r})"
            )
        spans = tuple(memory.spans(offset))
        found = tables(max((0, *(span.position for own in spans for span in own))) + 1, device, layers)
        cos, sin = ([found.of(layer)[side] for layer in layers] for side in (0, 1))
        rows = _rows_on(device, batch, length, spans)
        return cls(memory.keys, memory.values, *rows[:3], cos, sin, memory.merge, *rows[3:], length=length)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, *, layer: int, scale: float) -> Tensor:
        """What the queries ``[B * L, Hq, D]`` of all batch rows read of a layer's keys and values; same shape."""
        if self.joins is None:
            out, lse = self.read(_rows_taken(query, self.order), keys, values, layer=layer, scale=scale)
            out = _rows_taken(out, self.place)
        else:

            def read(part: Tensor, length: int) -> tuple[Tensor, Tensor]:
                cu_q = self.cu_q if length == self.length else self.cu_q // self.length * length
                return self.read(part, keys, values, layer=layer, scale=scale, cu_q=cu_q)

            out, lse = self.joins.attend(query, self.length, read)
        # other processes may have joined other rows
        return out if self.merge is None else self.merge(out, _rows_taken(lse, self.place))

    def read(
        self, query: Tensor, keys: Tensor, values: Tensor, *, layer: int, scale: float, cu_q: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention and log-sum-exp of queries ``[T, Hq, D]`` that lie as the operator's rows do."""
        return injected_attention(
            query,
            keys,
            values,
            self.cu_q if cu_q is None else cu_q,
            self.slot_range,
            self.q_position,
            self.cos[layer],
            self.sin[layer],
            scale=scale,
        )


def _rows_taken(x: Tensor, rows: Tensor | None) -> Tensor:
    """The given batch rows of ``x [B * L, ...]``; ``None``: all, as they are."""
    if rows is None:
        return x
    return x.unflatten(0, (rows.shape[0], -1)).index_select(0, rows).flatten(0, 1)


_OperatorRows = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Joins | None]


def _rows_on(device: torch.device, batch: int, length: int, spans: tuple[tuple[Span, ...], ...]) -> _OperatorRows:
    """``cu_q``, ``slot_range`` and ``q_position`` of the operator's rows, their order, its inverse and how they are
    joined, see :class:`InjectedContext`; on the CPU the same tensors for the same rows."""
    global _last_rows
    # on CUDA another stream may ask next, and a graph may be captured
    if torch.compiler.is_compiling() or device.type != "cpu":
        return _new_rows(device, batch, length, spans)
    key = (torch.is_inference_mode_enabled(), batch, length, spans)
    known = _last_rows
    if known is not None and known[0] == key:
        return known[1]
    rows = _new_rows(device, batch, length, spans)
    joins = rows[5]
    tensors = [*rows[:5], *(() if joins is None else (joins.rows, joins.place, *(place for _, place in joins.parts)))]
    # no stand-ins, by which others plan where a model's parts go
    if all(tensor is None or type(tensor) is Tensor for tensor in tensors):
        _last_rows = key, rows
    return rows


def _new_rows(device: torch.device, batch: int, length: int, spans: tuple[tuple[Span, ...], ...]) -> _OperatorRows:
    reads = [(row, span) for row, own in enumerate(spans) for span in own]
    sharing: dict[Any, list[int]] = {}
    for number, (_, span) in enumerate(reads):
        # an exported program must not be tied to who shares with whom
        own: Any = number if torch.compiler.is_compiling() else span
        sharing.setdefault(own, []).append(number)
    groups = list(sharing.values())
    order = [number for numbers in groups for number in numbers]
    firsts = [reads[numbers[0]][1] for numbers in groups]
    cu_q = torch.arange(len(reads) + 1, device=device) * length
    if len(groups) < len(reads):
        ends = itertools.accumulate((len(numbers) for numbers in groups), initial=0)
        cu_q = cu_q.index_select(0, upload(torch.tensor(list(ends)), device))
    moved: list[Tensor | None] = [None, None]
    joins = None
    if len(reads) > batch:
        joins = Joins.of([reads[number][0] for number in order], batch, device)
    elif order != list(range(batch)):
        moved = [upload(torch.tensor(rows), device) for rows in (order, sorted(range(batch), key=order.__getitem__))]
    slots = torch.tensor([span.slots for span in firsts], dtype=torch.int64).view(len(groups), 2)
    return (
        cu_q,
        upload(slots, device),
        upload(torch.tensor([span.position for span in firsts], dtype=torch.int64), device),
        moved[0],
        moved[1],
        joins,
    )


# replaced as a whole: threads may ask at any time
_last_rows: tuple[tuple[Any, ...], _OperatorRows] | None = None


class InjectedAttention(nn.Module):
    """Cross-attention from running text to the context memory (paper, section on position-aware injection).

    ``x + o_proj(attention(rope(q_proj(norm(x)), n + 1), keys, values))``; the memory needs no projection of its own.
    """

    def __init__(self, layer: Any, layer_index: int) -> None:
        super().__init__()
        attention = layer.self_attn
        query, norm = projection(attention, "q"), attention_norm(layer)
        hidden, width, eps = query.in_features, query.out_features, norm_eps(norm)
        self.layer_index = layer_index
        self.head_dim = attention.head_dim
        self.scaling = attention.scaling
        self.norm = type(norm)(hidden, eps=eps)
        self.q_proj = nn.Linear(hidden, width, bias=query.bias is not None)
        self.q_norm = type(attention.q_norm)(self.head_dim, eps=eps) if hasattr(attention, "q_norm") else None
        self.o_proj = nn.Linear(width, hidden, bias=False)
        nn.init.zeros_(self.o_proj.weight)
        self._checked_projection: tuple[int, ...] | None = None

    @torch.no_grad()
    def start_from(self, layer: Any) -> None:
        """Copy the layer's own norm and query projection, zero the output: the model starts equal to its base."""
        self.norm.load_state_dict(attention_norm(layer).state_dict())
        query = projection(layer.self_attn, "q")
        self.q_proj.weight.copy_(linear_weight(query))
        if self.q_proj.bias is not None:
            self.q_proj.bias.copy_(query.bias)
        if self.q_norm is not None:
            self.q_norm.load_state_dict(layer.self_attn.q_norm.state_dict())
        self.o_proj.weight.zero_()

    def forward(
        self, hidden_states: Tensor, context: InjectedContext, key: Tensor | None = None, value: Tensor | None = None
    ) -> Tensor:
        """Read the memory.

        Args:
            hidden_states: ``[B, L, d]``; may be overwritten where no gradient is needed.
            context: the memory and its tables.
            key, value: ``[S, Hkv, D]`` the layer's part of the memory; default: the context's own.

        Returns:
            ``[B, L, d]``: the residual stream with what was read added to it.
        """
        if type(self.o_proj) is not nn.Linear:
            self._check_projection()
        batch, length, _ = hidden_states.shape
        keys = context.keys[self.layer_index] if key is None else key
        values = context.values[self.layer_index] if value is None else value
        normed = self.norm(hidden_states)
        # Gemma's norm gives its input's dtype, which may be narrower than the block's weights
        normed = normed.to(torch.promote_types(normed.dtype, self.norm.weight.dtype))
        query = self.q_proj(normed).view(batch * length, -1, self.head_dim)
        # the dtype of the block's own weights, which may be wider than the residual stream, or autocast's
        dtype = query.dtype
        if self.q_norm is not None:
            query = self.q_norm(query)
        out = context.attend(query.to(keys.dtype), keys, values, layer=self.layer_index, scale=self.scaling)
        # a hook of this block may have kept its input
        hidden_states = hidden_states if is_untouched(self) else hidden_states.clone()
        read = add_linear(hidden_states, self.o_proj, out.view(batch, length, -1).to(dtype))
        return read.to(hidden_states.dtype)

    def _check_projection(self) -> None:
        """Refuse DoRA on a zero output projection, where it gives NaN; checked once for a weight."""
        output: Any = self.o_proj
        if not len(getattr(output, "lora_magnitude_vector", ())):
            return
        weight = output.get_base_layer().weight
        state = (id(output), weight.data_ptr(), version_of(weight))
        if state == self._checked_projection:
            return
        zeros = int((weight.detach() == 0).all(1).sum())
        if zeros:
            raise ValueError(
                f"injection.o_proj: expected no rows of zeros under DoRA, which divides by their norm, got {zeros} of "
                f"{weight.shape[0]}; leave the injected blocks out (exclude_modules=r'.*injection.*') and train them "
                "whole (modules_to_save=['injection']), or use LoRA without use_dora"
            )
        self._checked_projection = state


class _InjectedLayer:
    """Mixin: the family's decoder layer with the injected block between self-attention and MLP."""

    base_family: Family

    def __call__(
        self, hidden_states: Tensor, *tensors: Tensor, injected_context: InjectedContext | None = None, **kwargs: Any
    ) -> Any:
        call: Any = super().__call__  # type: ignore[misc]
        if injected_context is None:
            return call(hidden_states, *tensors, **kwargs)
        if self.training and self.gradient_checkpointing:  # type: ignore[attr-defined]
            # reentrant checkpointing hands gradients to positional tensors only
            index = self.injection.layer_index  # type: ignore[attr-defined]
            tensors = (injected_context.keys[index], injected_context.values[index])
        return call(hidden_states, *tensors, injected_context=injected_context, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        memory_key: Tensor | None = None,
        memory_value: Tensor | None = None,
        attention_mask: Tensor | None = None,
        injected_context: InjectedContext | None = None,
        compressor_step: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if compressor_step is not None:
            return compressor_step(self, hidden_states)
        family = self.base_family
        normed = getattr(self, family.attention_norm)(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, attention_mask=attention_mask, **kwargs)  # type: ignore[attr-defined]
        plain = family.adds_plainly
        hidden_states = hidden_states + attended if plain else add_output(self, "attention", hidden_states, attended)
        if injected_context is not None:
            injection = self.injection  # type: ignore[attr-defined]
            hidden_states = self._own(injection(hidden_states, injected_context, memory_key, memory_value), injection)
        norm = getattr(self, family.mlp_norm)
        normed = norm(hidden_states)
        mlp: Any = self.mlp  # type: ignore[attr-defined]
        if not plain and not adds_plainly(self, "mlp"):
            return add_output(self, "mlp", hidden_states, mlp(normed))
        return add_mlp(self._own(hidden_states, norm), mlp, normed)

    def _own(self, hidden_states: Tensor, module: nn.Module) -> Tensor:
        """The tensor, or a copy if a hook of the module may have kept it: sums are computed in place."""
        return hidden_states if is_untouched(module) else hidden_states.clone()


def _classes(prefix: str, mixin: type) -> dict[type, type]:
    """For each family's decoder layer a subclass with the mixin."""
    fields = {"__module__": __name__, "__doc__": mixin.__doc__}
    return {
        family.layer: type(f"{prefix}{family.layer.__name__}", (mixin, family.layer), {**fields, "base_family": family})
        for family in FAMILIES.values()
    }


_INJECTED_CLASS = _classes("Injected", _InjectedLayer)
_COMPRESSOR_CLASS = _classes("Compressor", RunsSteps)
# pickle looks classes up by name
globals().update({made.__name__: made for made in (*_INJECTED_CLASS.values(), *_COMPRESSOR_CLASS.values())})


def install_injection(layers: Any, count: int) -> None:
    """Give the lowest ``count`` decoder layers an injected block each."""
    for index, layer in enumerate(layers[:count]):
        layer.injection = InjectedAttention(layer, index)
        layer.__class__ = _INJECTED_CLASS[type(layer)]


def install_steps(layers: Any) -> None:
    """Let the layers of a separate compressor run the compressor's steps inside their calls."""
    for layer in layers:
        layer.__class__ = _COMPRESSOR_CLASS[type(layer)]

"""The decoder layers of a step between its attentions: what a step reads of them, and their matmuls."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...ops import decode_linear, decode_linear_fp8, rms_norm, silu_product
from ...ops.decode_step import MAX_CPU_ROWS
from ..families import (
    attention_norm,
    embedding_factor,
    family_of,
    mlp_norm,
    projection,
    residual_factor,
    sliding_window,
)
from ..fp8_linear import FEW_ROWS as FEW_FP8_ROWS
from ..fp8_linear import Fp8Linear, is_fp8, stored_weight

#: Most rows for which kernels that stream the weights once, with norm, gate and residual fused, beat matmuls of a
#: library; on the CPU they have instances for no more. On CUDA they are bound by reads of x from there on: 4 rows take
#: 5.76 ms a step, with matmuls 6.13, and 8 rows 7.49 and 6.30 (Llama-3.1-8B, 16384 slots, H200).
FEW_ROWS = {"cuda": 4, "cpu": MAX_CPU_ROWS}
#: Most rows of weights in 8 bits, which have these kernels alone.
MOST_FP8_ROWS = {"cuda": FEW_FP8_ROWS, "cpu": MAX_CPU_ROWS}
#: Bytes of the output projection's weights that are prefetched into L2 before an attention. More delays the attention's
#: own loads: 6.58 ms a token with 0 and 6 MB, 6.72 with 12, 6.92 with 33 (Llama-3.1-8B, 16384 slots, H100).
PREFETCH_BYTES = 6 << 20


@dataclasses.dataclass(frozen=True)
class StepLayer:
    """What a step reads of a decoder layer, looked up once a generate.

    Attributes:
        qkv, output, gate_up, down: projections.
        attention_norm, mlp_norm, q_norm, k_norm: norms; those of heads may be ``None``.
        injection: the injected block, or ``None``.
        window: tokens to look back on, 0 for all.
        scaling: of the attention.
        residual: factor of what attention and MLP add.
    """

    qkv: tuple[Any, ...]
    output: tuple[Any, ...]
    gate_up: tuple[Any, ...]
    down: tuple[Any, ...]
    attention_norm: Any
    mlp_norm: Any
    q_norm: Any
    k_norm: Any
    injection: Any
    window: int
    scaling: float
    residual: float

    @classmethod
    def of(cls, layer: Any) -> "StepLayer":
        """Of a decoder layer."""
        attention = layer.self_attn
        return cls(
            qkv=tuple(projection(attention, name) for name in "qkv"),
            output=(projection(attention, "o"),),
            gate_up=(projection(layer.mlp, "gate"), projection(layer.mlp, "up")),
            down=(projection(layer.mlp, "down"),),
            attention_norm=attention_norm(layer),
            mlp_norm=mlp_norm(layer),
            q_norm=getattr(attention, "q_norm", None),
            k_norm=getattr(attention, "k_norm", None),
            injection=getattr(layer, "injection", None),
            window=sliding_window(layer) or 0,
            scaling=attention.scaling,
            residual=residual_factor(layer),
        )


def weights_of(model: Any) -> list[Tensor]:
    """Parameters, and weights in 8 bits."""
    codes = [x for module in model.modules() if type(module) is Fp8Linear for x in (module.codes, module.scale)]
    return [*model.parameters(), *codes]


class MemoryContext(Protocol):
    """What the injected layers of a step read, as :class:`~sharedllm_ext.model.injection.InjectedContext`."""

    keys: Any
    values: Any

    def attend(self, query: Tensor, keys: Any, values: Any, *, layer: int, scale: float) -> Tensor:
        """What the queries ``[rows, Hq, D]`` read of a layer's keys and values; same shape."""


#: ``(x, layer, index)``: the attention's heads ``[rows, Hq * D]`` of a layer's input ``x [rows, d]``.
Attend = Callable[[Tensor, StepLayer, int], Tensor]


def run_layers(
    model: Any, tokens: Tensor, layers: Sequence[StepLayer], attend: Attend, context: MemoryContext | None
) -> Tensor:
    """The decoder's layers over one row a token.

    Args:
        model: the model.
        tokens: ``[rows]`` int64.
        layers: of the model.
        attend: projects, stores and attends.
        context: what injected layers read, ``None`` for nothing.

    Returns:
        ``[rows, d]``, before the last norm.
    """
    x = nn.functional.embedding(tokens, model.model.embed_tokens.weight)
    factor = embedding_factor(model.model.layers[0])
    x = x if factor == 1.0 else x * factor
    for index, layer in enumerate(layers):
        x = _sum(x, attend(x, layer, index), layer.output, layer.residual)
        if layer.injection is not None and context is not None:
            x = _inject(x, layer.injection, context)
        hidden = product(x, layer.gate_up, layer.mlp_norm, gated=True)
        x = _sum(x, hidden, layer.down, layer.residual)
    return x


def logits_of(model: Any, x: Tensor) -> Tensor:
    """Logits ``[rows, vocabulary]`` of what :func:`run_layers` gives."""
    logits = product(x, (model.lm_head,), model.model.norm)
    return family_of(model.model.layers[0]).logits(logits, model.config.text_config)


def _inject(x: Tensor, injection: Any, context: MemoryContext) -> Tensor:
    query = product(x, (injection.q_proj,), injection.norm, prefetch=stored_weight(injection.o_proj))
    query = query.view(x.shape[0], -1, injection.head_dim)
    if injection.q_norm is not None:
        query = injection.q_norm(query)
    index = injection.layer_index
    out = context.attend(query, context.keys[index], context.values[index], layer=index, scale=injection.scaling)
    return product(out.flatten(1), (injection.o_proj,), residual=x)


def product(
    x: Tensor,
    modules: Sequence[Any],
    norm: Any = None,
    *,
    residual: Tensor | None = None,
    gated: bool = False,
    prefetch: Tensor | None = None,
) -> Tensor:
    """Norm, linear modules and residual, or gate, of a step's rows: one kernel for a few, a library's matmuls for many.

    Weights in 8 bits have the kernel alone, for at most MOST_FP8_ROWS.

    Args:
        x: ``[rows, K]``.
        modules: one to three of K inputs; ``gated``: gate and up.
        norm: before them, or ``None``.
        residual: ``[rows, N]``, added; overwritten where rows are many.
        gated: ``silu(gate) * up`` instead of both.
        prefetch: see :func:`~sharedllm_ext.ops.decode_linear`.

    Returns:
        ``[rows, sum of N]``, with ``gated`` ``[rows, N]``.
    """
    weights, biases = [stored_weight(module) for module in modules], [module.bias for module in modules]
    multiply: Callable[..., Tensor]
    if is_fp8(modules[0]):
        multiply = functools.partial(decode_linear_fp8, x, weights, [module.scale for module in modules], biases)
    elif x.shape[0] > FEW_ROWS[x.device.type]:
        x = x if norm is None else rms_norm(x, norm.weight, norm.variance_epsilon)
        return _matmuls(x, weights, biases, residual, gated)
    else:
        multiply = functools.partial(decode_linear, x, weights, biases)
    return multiply(
        norm_weight=None if norm is None else norm.weight,
        eps=0.0 if norm is None else norm.variance_epsilon,
        residual=residual,
        gated=gated,
        # nothing writes parameters between the kernels of a step, and its first kernel does not overlap
        overlap=True,
        prefetch=prefetch,
        prefetch_bytes=PREFETCH_BYTES if prefetch is not None else 0,
    )


def _matmuls(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], residual: Tensor | None, gated: bool
) -> Tensor:
    if not any(bias is not None for bias in biases):
        weights = _joined(weights)
    if residual is not None and len(weights) == 1 and biases[0] is None:
        # added in the matmul's accumulator
        return residual.addmm_(x, weights[0].t())
    outputs = [weight.shape[0] for weight in weights]
    out = x.new_empty((x.shape[0], sum(outputs)))
    for part, weight, bias in zip(out.split(outputs, 1), weights, biases, strict=False):
        if bias is None:
            torch.mm(x, weight.t(), out=part)
        else:
            torch.addmm(bias, x, weight.t(), out=part)
    if gated:
        return silu_product(*out.chunk(2, 1))
    return out if residual is None else residual.add_(out)


def _joined(weights: list[Tensor]) -> list[Tensor]:
    """The matrices ``[N_i, K]`` as one, if they lie one after the other in one storage, as joined projections do."""
    first = weights[0]
    end = first.data_ptr()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and weight.is_contiguous() and weight.data_ptr() == end):
            return weights
        end += weight.numel() * weight.element_size()
    return [first.as_strided((sum(weight.shape[0] for weight in weights), first.shape[1]), first.stride())]


def _sum(hidden: Tensor, x: Tensor, modules: tuple[Any, ...], factor: float) -> Tensor:
    """``hidden`` and a layer's last linear module of ``x``, added as the layer does."""
    if factor == 1.0:
        return product(x, modules, residual=hidden)
    return hidden.add(product(x, modules), alpha=factor)

"""The injected attention block, and the decoder layers of the supported families that carry one."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from ..ops import injected_attention
from .layer_math import add_linear, add_mlp, is_untouched


@dataclasses.dataclass
class InjectedContext:
    """What the injected blocks of one forward pass read; see :func:`sharedllm_ext.ops.injected_attention`."""

    keys: list[Tensor]
    values: list[Tensor]
    cu_q: Tensor
    slot_range: Tensor
    q_position: Tensor
    cos: Tensor
    sin: Tensor


class InjectedAttention(nn.Module):
    """Cross-attention from running text to the context memory (paper, section on position-aware injection).

    ``x + o_proj(attention(rope(q_proj(norm(x)), n + 1), keys, values))``; the memory needs no projection of its own.
    """

    def __init__(self, layer: Any, layer_index: int) -> None:
        super().__init__()
        attention = layer.self_attn
        hidden, width = attention.q_proj.in_features, attention.q_proj.out_features
        eps = layer.input_layernorm.variance_epsilon
        self.layer_index = layer_index
        self.head_dim = attention.head_dim
        self.scaling = attention.scaling
        self.norm = type(layer.input_layernorm)(hidden, eps=eps)
        self.q_proj = nn.Linear(hidden, width, bias=attention.q_proj.bias is not None)
        self.q_norm = type(attention.q_norm)(self.head_dim, eps=eps) if hasattr(attention, "q_norm") else None
        self.o_proj = nn.Linear(width, hidden, bias=False)
        nn.init.zeros_(self.o_proj.weight)

    @torch.no_grad()
    def start_from(self, layer: Any) -> None:
        """Copy the layer's own norm and query projection, zero the output: the model starts equal to its base."""
        self.norm.load_state_dict(layer.input_layernorm.state_dict())
        self.q_proj.load_state_dict(layer.self_attn.q_proj.state_dict())
        if self.q_norm is not None:
            self.q_norm.load_state_dict(layer.self_attn.q_norm.state_dict())
        self.o_proj.weight.zero_()

    def forward(self, hidden_states: Tensor, context: InjectedContext) -> Tensor:
        """Read the memory.

        Args:
            hidden_states: ``[B, L, d]``; may be overwritten where no gradient is needed.
            context: the memory and its tables.

        Returns:
            ``[B, L, d]``: the residual stream with what was read added to it.
        """
        batch, length, _ = hidden_states.shape
        keys, values = context.keys[self.layer_index], context.values[self.layer_index]
        query = self.q_proj(self.norm(hidden_states)).view(batch * length, -1, self.head_dim)
        if self.q_norm is not None:
            query = self.q_norm(query)
        out, _ = injected_attention(
            query.to(keys.dtype),
            keys,
            values,
            context.cu_q,
            context.slot_range,
            context.q_position,
            context.cos,
            context.sin,
            self.scaling,
        )
        # a hook of this block may have kept its input
        hidden_states = hidden_states if is_untouched(self) else hidden_states.clone()
        return add_linear(hidden_states, self.o_proj, out.view(batch, length, -1).to(hidden_states.dtype))


class _InjectedLayer:
    """Mixin: the family's decoder layer with the injected block between self-attention and MLP."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        injected_context: InjectedContext | None = None,
        **kwargs: Any,
    ) -> Tensor:
        normed = self.input_layernorm(hidden_states)  # type: ignore[attr-defined]
        attended, _ = self.self_attn(hidden_states=normed, attention_mask=attention_mask, **kwargs)  # type: ignore[attr-defined]
        hidden_states = hidden_states + attended
        if injected_context is not None:
            injection = self.injection  # type: ignore[attr-defined]
            hidden_states = self._own(injection(hidden_states, injected_context), injection)
        normed = self.post_attention_layernorm(hidden_states)  # type: ignore[attr-defined]
        return add_mlp(self._own(hidden_states, self.post_attention_layernorm), self.mlp, normed)  # type: ignore[attr-defined]

    def _own(self, hidden_states: Tensor, module: nn.Module) -> Tensor:
        """The tensor, or a copy if a hook of the module that saw it may have kept it: sums are made in place."""
        return hidden_states if is_untouched(module) else hidden_states.clone()


class InjectedLlamaDecoderLayer(_InjectedLayer, LlamaDecoderLayer):  # type: ignore[misc]
    """Llama layer that reads the context memory."""


class InjectedMistralDecoderLayer(_InjectedLayer, MistralDecoderLayer):  # type: ignore[misc]
    """Mistral layer that reads the context memory."""


class InjectedQwen2DecoderLayer(_InjectedLayer, Qwen2DecoderLayer):  # type: ignore[misc]
    """Qwen2 and Qwen2.5 layer that reads the context memory."""


class InjectedQwen3DecoderLayer(_InjectedLayer, Qwen3DecoderLayer):  # type: ignore[misc]
    """Qwen3 layer that reads the context memory."""


_INJECTED_CLASS = {
    LlamaDecoderLayer: InjectedLlamaDecoderLayer,
    MistralDecoderLayer: InjectedMistralDecoderLayer,
    Qwen2DecoderLayer: InjectedQwen2DecoderLayer,
    Qwen3DecoderLayer: InjectedQwen3DecoderLayer,
}


def install_injection(layers: Any, count: int) -> None:
    """Give the lowest ``count`` decoder layers an injected block each."""
    for index, layer in enumerate(layers[:count]):
        layer.injection = InjectedAttention(layer, index)
        layer.__class__ = _INJECTED_CLASS[type(layer)]

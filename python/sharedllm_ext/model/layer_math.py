"""Norms, MLPs and residual sums of a decoder layer, fused where no gradient is needed."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from .. import ops

_FUSED_DTYPES = (torch.bfloat16, torch.float16)


def inference_only(x: Tensor) -> bool:
    """Whether ``x`` is worth the fused kernels: half precision on CUDA and no gradient or autocast to serve."""
    return x.is_cuda and x.dtype in _FUSED_DTYPES and not torch.is_grad_enabled() and not torch.is_autocast_enabled()


def is_plain_linear(module: Any, x: Tensor) -> bool:
    """Whether a module is nothing but ``x @ weight.T``: no adapter, quantisation, bias or hook."""
    return (
        type(module) is nn.Linear
        and module.bias is None
        and module.weight.dtype == x.dtype
        and module.weight.device == x.device
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
    )


def add_linear(hidden: Tensor, module: Any, x: Tensor) -> Tensor:
    """``hidden + module(x)``; for inference the product's own accumulator takes ``hidden``, in place.

    Args:
        hidden: ``[..., N]``, nobody else's: it may be overwritten.
        module: projection from K to N.
        x: ``[..., K]``.
    """
    if inference_only(hidden) and hidden.is_contiguous() and is_plain_linear(module, x) and hidden.dtype == x.dtype:
        hidden.view(-1, hidden.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), module.weight.t())
        return hidden
    return hidden + module(x)


def add_mlp(hidden: Tensor, mlp: Any, x: Tensor) -> Tensor:
    """``hidden + mlp(x)``, as :func:`add_linear`."""
    if isinstance(mlp, _FusedMLP) and not mlp._forward_hooks and not mlp._forward_pre_hooks:  # type: ignore[attr-defined]
        return add_linear(hidden, mlp.down_proj, mlp.activated(x))  # type: ignore[attr-defined]
    return hidden + mlp(x)


class _FusedRMSNorm:
    """Mixin: the family's norm in one pass over its input where no gradient is needed."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight  # type: ignore[attr-defined]
        if inference_only(hidden_states) and weight.dtype == hidden_states.dtype:
            flat = ops.rms_norm(hidden_states.reshape(-1, weight.shape[0]), weight, self.variance_epsilon)  # type: ignore[attr-defined]
            return flat.view(hidden_states.shape)
        return super().forward(hidden_states)  # type: ignore[misc]


class _FusedMLP:
    """Mixin: the family's MLP with one pass over gate and up where no gradient is needed."""

    def activated(self, x: Tensor) -> Tensor:
        """``act(gate_proj(x)) * up_proj(x)``, ``[..., n]``."""
        gate, up = self.gate_proj(x), self.up_proj(x)  # type: ignore[attr-defined]
        if inference_only(gate) and self.config.hidden_act == "silu":  # type: ignore[attr-defined]
            width = gate.shape[-1]
            return ops.silu_product(gate.view(-1, width), up.view(-1, width)).view(gate.shape)
        return self.act_fn(gate) * up  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activated(x))  # type: ignore[attr-defined]


def _fused_class(mixin: type, family_class: type) -> type:
    return type(
        f"Fused{family_class.__name__}", (mixin, family_class), {"__doc__": mixin.__doc__, "__module__": __name__}
    )


_FUSED_CLASS: dict[type, type] = {
    family_class: _fused_class(mixin, family_class)
    for mixin, family_classes in (
        (_FusedRMSNorm, (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)),
        (_FusedMLP, (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP)),
    )
    for family_class in family_classes
}
# pickle looks classes up by name
globals().update({fused.__name__: fused for fused in _FUSED_CLASS.values()})


def install_fused(model: nn.Module) -> None:
    """Give every norm and MLP of a base model its fused class; names and parameters stay."""
    for module in model.modules():
        fused = _FUSED_CLASS.get(type(module))
        if fused is not None:
            module.__class__ = fused


class Products:
    """The products of a compressor layer in the weights' own dtype."""

    def norm(self, module: Any, hidden: Tensor) -> Any:
        """Norm of ``hidden [T, d]``, in the form that :meth:`linear` takes."""
        return module(hidden)

    def rows(self, x: Tensor) -> Any:
        """``x [T, K]`` in the form that :meth:`linear` takes."""
        return x

    def linear(self, module: Any, rows: Any) -> Tensor:
        """``module(rows)``, ``[T, N]``."""
        return module(rows)

    def add_linear(self, hidden: Tensor, module: Any, rows: Any) -> Tensor:
        """``hidden + module(rows)``; ``hidden`` may be overwritten where no gradient is needed."""
        return add_linear(hidden, module, rows)

    def add_mlp(self, hidden: Tensor, mlp: Any, rows: Any) -> Tensor:
        """``hidden + mlp(rows)``; ``hidden`` may be overwritten where no gradient is needed."""
        return add_mlp(hidden, mlp, rows)

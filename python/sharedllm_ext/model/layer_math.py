"""Norms, attention, MLPs and residual sums of a decoder layer, fused where no gradient is needed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .cache_name import CACHE_NAME
from .families import (
    FAMILIES,
    STILL,
    Family,
    after_output,
    attention_norm,
    family_of,
    mlp_norm,
    projection,
    residual_factor,
)
from .fp8_linear import Fp8Linear, fp8_product, is_fp8, linear_all, multiplies_fp8, stored_weight, takes_codes
from .hooks import is_untouched

FUSED_DTYPES = (torch.bfloat16, torch.float16)


def inference_only(x: Tensor) -> bool:
    """Whether ``x`` takes the fused kernels: half precision on CUDA, without gradients and autocast."""
    return x.is_cuda and x.dtype in FUSED_DTYPES and not torch.is_grad_enabled() and not torch.is_autocast_enabled()


def adds_in_place(x: Tensor) -> bool:
    """Whether sums may be written into ``x``: with fused kernels, and in float32 on the CPU, where pages are dear."""
    if x.device.type != "cpu":
        return inference_only(x)
    return x.dtype == torch.float32 and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; -1 for one made in inference mode, which does not count."""
    return -1 if tensor.is_inference() else tensor._version


def is_plain_linear(module: Any, x: Tensor) -> bool:
    """Whether a module is just ``x @ weight.T``: no adapter, quantisation, bias or hook."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.bias is None
        and module.weight.dtype == x.dtype
        and module.weight.device == x.device
        and is_untouched(module)
    )


def linear_weight(module: Any) -> torch.Tensor:
    """Weight ``[N, K]`` of a linear module in floating point, whatever form it is stored in."""
    if type(module) is nn.Linear and type(module.weight) is nn.Parameter:
        return module.weight
    reference = next(tensor for tensor in (module.bias, module.weight) if tensor is not None)
    dtype = reference.dtype if reference.dtype.is_floating_point else torch.get_default_dtype()
    size = module.in_features
    # every method of quantisation has a matmul, few can be dequantised in the same way
    columns = module(torch.eye(size, dtype=dtype, device=reference.device))
    return (columns if module.bias is None else columns - module.bias).t()


def add_linear(hidden: Tensor, module: Any, x: Tensor) -> Tensor:
    """``hidden + module(x)``; for inference ``hidden`` is added in the matmul's accumulator, in place.

    Args:
        hidden: ``[..., N]``, not used elsewhere: it may be overwritten.
        module: projection from K to N.
        x: ``[..., K]``.
    """
    if adds_in_place(hidden) and hidden.is_contiguous() and is_plain_linear(module, x) and hidden.dtype == x.dtype:
        hidden.view(-1, hidden.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), module.weight.t())
        return hidden
    return hidden + module(x)


def applies_silu(mlp: Any) -> bool:
    """Whether an MLP's activation module is SiLU; others may have replaced it."""
    return type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation") and is_untouched(mlp.act_fn)


def split_heads(attention: Any, projected: Tensor, name: str) -> Tensor:
    """A query, key or value projection ``[..., heads * D]`` as ``[..., heads, D]``, with the family's head norm."""
    out = projected.unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)
    # a norm with weights in float32 gives float32, which values do not follow
    return out if norm is None else norm(out).to(projected.dtype)


def add_mlp(hidden: Tensor, mlp: Any, x: Tensor) -> Tensor:
    """``hidden + mlp(x)``, as :func:`add_linear`."""
    if isinstance(mlp, _FusedMLP) and type(mlp).forward is _FusedMLP.forward and is_untouched(mlp):
        down = mlp.base_family.projection(mlp, "down")
        if type(down) is not Fp8Linear:
            return add_linear(hidden, down, mlp.activated(x))
        if adds_in_place(hidden):
            return hidden.add_(mlp.forward(x))
    return hidden + apply_mlp(mlp, x)


def apply_mlp(mlp: Any, x: Tensor) -> Tensor:
    """``mlp(x)`` of ``x [..., d]``; experts take rows of texts alone."""
    return mlp(x) if x.dim() == 3 else mlp(x.unsqueeze(0)).squeeze(0)


def adds_plainly(layer: Any, part: str) -> bool:
    """Whether a layer adds what its ``attention`` or ``mlp`` gives as it is."""
    if family_of(layer).adds_plainly:
        return True
    return residual_factor(layer) == 1.0 and after_output(layer, part) is None


def add_output(layer: Any, part: str, hidden: Tensor, output: Tensor) -> Tensor:
    """``hidden`` and what the layer's ``attention`` or ``mlp`` gives, added as the family does."""
    factor, module = residual_factor(layer), after_output(layer, part)
    output = output if module is None else module(output)
    return hidden + (output if factor == 1.0 else output * factor)


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

    base_family: Family

    def activated(self, x: Tensor) -> Tensor:
        """``act(gate_proj(x)) * up_proj(x)``, ``[..., n]``."""
        own = self.base_family.projection
        gate_proj = own(self, "gate")
        return self._activate(gate_proj, x, *linear_all([gate_proj, own(self, "up")], x))

    def _activate(self, gate_proj: Any, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        if inference_only(gate) and applies_silu(self):
            width = gate.shape[-1]
            return ops.silu_product(gate.view(-1, width), up.view(-1, width)).view(gate.shape)
        if adds_in_place(gate) and is_plain_linear(gate_proj, x) and applies_silu(self):
            return torch.nn.functional.silu(gate, inplace=True).mul_(up)
        return self.act_fn(gate) * up  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        gate_proj, up_proj, down = (self.base_family.projection(self, name) for name in ("gate", "up", "down"))
        gate, up = linear_all([gate_proj, up_proj], x)
        if takes_codes(down, gate) and inference_only(gate) and applies_silu(self):
            width = gate.shape[-1]
            rows = ops.silu_product_fp8(gate.view(-1, width), up.view(-1, width))
            return down.multiply_codes(rows).view(*gate.shape[:-1], -1)
        out: Tensor = down(self._activate(gate_proj, x, gate, up))
        return out


class _FusedAttention:
    """Mixin: the family's self-attention with one rotation kernel for queries and keys where no gradient is needed."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache = past_key_values if cache is None else cache
        if not self._is_plain(hidden_states, position_embeddings, attention_mask, kwargs):
            # the family's own code, whatever the backend, mask or options
            return super().forward(  # type: ignore[misc]
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        batch, length, _ = hidden_states.shape
        projected = linear_all([projection(self, name) for name in "qkv"], hidden_states)
        query, key, value = (split_heads(self, x, name).flatten(0, 1) for x, name in zip(projected, "qkv", strict=True))
        if family_of(self).rotation(self) != STILL:
            half = self.head_dim // 2  # type: ignore[attr-defined]
            tables = (table[..., :half].expand(batch, -1, -1).flatten(0, 1) for table in position_embeddings)  # type: ignore[union-attr]
            cos, sin = (table.float().contiguous() for table in tables)
            rows = torch.arange(batch * length, device=query.device)
            none = rows[:0]
            query, key, _, _ = ops.chunk_compression(query, key, value, cos, sin, rows, rows, none, none)
        query, key, value = (x.unflatten(0, (batch, length)).transpose(1, 2) for x in (query, key, value))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)  # type: ignore[attr-defined]
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=length > 1,
            scale=self.scaling,  # type: ignore[attr-defined]
            enable_gqa=True,
        )
        return projection(self, "o")(attended.transpose(1, 2).flatten(2)), None

    def _is_plain(self, x: Tensor, tables: Any, mask: Tensor | None, options: dict[str, Any]) -> bool:
        """Whether Transformers would call PyTorch's causal attention without a mask."""
        return (
            inference_only(x)
            and mask is None
            and tables is not None
            and tables[0].dim() == 3
            and tables[0].shape[-1] == self.head_dim  # type: ignore[attr-defined]
            and self.config._attn_implementation == "sdpa"  # type: ignore[attr-defined]
            and "is_causal" not in options
            and not torch.compiler.is_compiling()
            and not (self.training and self.attention_dropout > 0)  # type: ignore[attr-defined]
        )


def _fused_class(mixin: type, family_class: type, family: Family) -> type:
    fields = {"__doc__": mixin.__doc__, "__module__": __name__, "base_family": family}
    return type(f"Fused{family_class.__name__}", (mixin, family_class), fields)


FUSED_MIXINS = {"norm": _FusedRMSNorm, "attention": _FusedAttention, "mlp": _FusedMLP}
_FUSED_CLASS: dict[type, type] = {
    getattr(family, part): _fused_class(mixin, getattr(family, part), family)
    for family in FAMILIES.values()
    for part, mixin in FUSED_MIXINS.items()
    if part not in family.not_fused
}
# pickle looks classes up by name
globals().update({fused.__name__: fused for fused in _FUSED_CLASS.values()})


def install_fused(model: nn.Module) -> None:
    """Give every norm, self-attention and MLP of a base model its fused class; names and parameters stay."""
    for module in model.modules():
        fused = _FUSED_CLASS.get(type(module))
        if fused is not None:
            module.__class__ = fused


class Products:
    """The matmuls of a compressor layer in the weights' own dtype."""

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

    def add_mlp(self, hidden: Tensor, layer: Any, rows: Any) -> Tensor:
        """``hidden`` and the layer's MLP of ``rows``; ``hidden`` may be overwritten where no gradient is needed."""
        if not adds_plainly(layer, "mlp"):
            return add_output(layer, "mlp", hidden, apply_mlp(layer.mlp, rows))
        return add_mlp(hidden, layer.mlp, rows)

    def add_attention(self, hidden: Tensor, layer: Any, rows: Any) -> Tensor:
        """``hidden`` and the layer's output projection of ``rows``; ``hidden`` may be overwritten, as above."""
        output = projection(layer.self_attn, "o")
        if not adds_plainly(layer, "attention"):
            return add_output(layer, "attention", hidden, self.linear(output, rows))
        return self.add_linear(hidden, output, rows)


class Fp8Products(Products):
    """The same with 8-bit floating-point operands (e4m3), one scale for each row of activations and of weights.

    Weights are quantised at their first use and kept, half the bytes of bfloat16, until they are changed in place or
    replaced (a change through ``weight.data`` is not noticed).
    """

    def __init__(self) -> None:
        self._weights: dict[int, tuple[tuple[int, int], Tensor, Tensor]] = {}

    def forget(self) -> None:
        """Free the kept weights."""
        self._weights.clear()

    def norm(self, module: Any, hidden: Tensor) -> Any:
        if isinstance(module, _FusedRMSNorm):
            return ops.rms_norm_fp8(hidden, module.weight, module.variance_epsilon)  # type: ignore[attr-defined]
        return self.rows(module(hidden))

    def rows(self, x: Tensor) -> Any:
        return ops.quantize_rows_fp8(x)

    def linear(self, module: Any, rows: Any) -> Tensor:
        return fp8_product(rows, *self._quantized(module), module.bias)

    def add_linear(self, hidden: Tensor, module: Any, rows: Any) -> Tensor:
        return hidden.add_(self.linear(module, rows))

    def add_mlp(self, hidden: Tensor, layer: Any, rows: Any) -> Tensor:
        mlp = layer.mlp
        gate_proj, up_proj, down_proj = (projection(mlp, name) for name in ("gate", "up", "down"))
        gate, up = self.linear(gate_proj, rows), self.linear(up_proj, rows)
        if applies_silu(mlp):
            return self.add_linear(hidden, down_proj, ops.silu_product_fp8(gate, up))
        return self.add_linear(hidden, down_proj, self.rows(mlp.act_fn(gate) * up))

    def _quantized(self, module: Any) -> tuple[Tensor, Tensor]:
        if type(module) is Fp8Linear:
            # the decoder's own
            return module.codes, module.scale
        weight = module.weight
        state = (weight.data_ptr(), version_of(weight))
        kept = self._weights.get(id(module))
        if kept is None or kept[0] != state:
            kept = (state, *ops.quantize_rows_fp8(weight.detach()))
            self._weights[id(module)] = kept
        return kept[1], kept[2]


def refuse_fp8(layers: Any) -> None:
    """Check that the compressor's matmuls can be computed in 8 bits.

    Raises:
        ValueError: a device, dtype, size or module that these matmuls do not take.
    """
    weight = attention_norm(layers[0]).weight
    if not multiplies_fp8(weight.device):
        raise ValueError(
            "compressor_precision='fp8': expected a CUDA device of compute capability 8.9 or newer, got "
            + (f"{torch.cuda.get_device_capability(weight.device)}" if weight.is_cuda else str(weight.device))
        )
    if torch.is_autocast_enabled(weight.device.type):
        raise ValueError("compressor_precision='fp8': expected no autocast, got one")
    for index, layer in enumerate(layers):
        attention, mlp = layer.self_attn, layer.mlp
        if not (adds_plainly(layer, "attention") and adds_plainly(layer, "mlp")):
            raise ValueError(
                f"compressor_precision='fp8': expected layers that add what attention and MLP give as it is, got "
                f"{type(layer).__name__} (layer {index})"
            )
        family = family_of(layer)
        if not isinstance(mlp, family.mlp):
            raise ValueError(
                f"compressor_precision='fp8': expected {family.mlp.__name__} as layer {index}'s mlp, got "
                f"{type(mlp).__name__}"
            )
        norms = {family.attention_norm: attention_norm(layer), family.mlp_norm: mlp_norm(layer)}
        for name, module in {**norms, "mlp": mlp}.items():
            # none in an MLP whose weights are in 8 bits
            dtypes = {parameter.dtype for parameter in module.parameters()}
            if not is_untouched(module) or dtypes - {torch.bfloat16}:
                got = ", ".join(sorted(map(str, dtypes))) + ("" if is_untouched(module) else ", hooks or own forward")
                raise ValueError(
                    f"compressor_precision='fp8': expected a plain bfloat16 module as layer {index}'s {name}, got {got}"
                )
        for part, name in family.projections.items():
            module = projection(attention if part in "qkvo" else mlp, part)
            plain = type(module) is nn.Linear and module.weight.dtype == torch.bfloat16
            if not (plain or type(module) is Fp8Linear) or not is_untouched(module):
                weight = stored_weight(module) if is_fp8(module) else getattr(module, "weight", None)
                got = f"{type(module).__name__}, {getattr(weight, 'dtype', None)}"
                raise ValueError(
                    f"compressor_precision='fp8': expected a plain bfloat16 Linear as layer {index}'s {name}, got {got}"
                )
            if module.in_features % 16 or module.out_features % 16:
                raise ValueError(
                    f"compressor_precision='fp8': expected multiples of 16 as sizes of layer {index}'s {name}, got "
                    f"{module.out_features} x {module.in_features}"
                )

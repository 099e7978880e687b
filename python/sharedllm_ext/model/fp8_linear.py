"""A linear module with weights in 8 bits: codes of floating point (e4m3) and one scale a row."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .hooks import is_untouched

#: Whether 8-bit matmuls accumulate with fewer bits than float32, which is the tensor cores' fastest way: on hidden
#: states of a trained model rounding to 8 bits hides the difference (docs/architecture.md).
FP8_FAST_ACCUMULATION = True
#: Most rows that are multiplied as they are, by a kernel that is bound by reading the weights.
FEW_ROWS = 8
# of a matrix that becomes 16-bit numbers at a time
_BLOCK_ELEMENTS = 1 << 26


def fp8_product(rows: tuple[Tensor, Tensor], codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``rows @ weights.T + bias`` of rows and weights in 8 bits, ``[T, N]`` bfloat16.

    Args:
        rows: codes ``[T, K]`` and scale ``[T, 1]`` of :func:`~sharedllm_ext.ops.quantize_rows_fp8`.
        codes, scale: the same of the weights, ``[N, K]`` and ``[N, 1]``.
        bias: ``[N]`` or ``None``.
    """
    return torch._scaled_mm(
        rows[0],
        codes.t(),
        scale_a=rows[1],
        scale_b=scale.t(),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=FP8_FAST_ACCUMULATION,
    )


class Fp8Linear(nn.Module):
    """``x @ (codes * scale).T + bias`` for inference.

    Up to 8 rows of x are taken as they are. More are rounded to 8 bits as well where there are matmuls of that kind
    (bfloat16 on CUDA, compute capability 8.9 and newer). Elsewhere the weights become numbers of x's dtype, some rows
    at a time.

    State: ``codes [N, K]`` ``torch.float8_e4m3fn``, ``scale [N, 1]`` float32, both kept by changes of the module's
    dtype, and ``bias``.

    Args:
        module: the linear module whose weights are rounded; its bias is shared.

    Raises:
        ValueError: weights that are not finite.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, module: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = module.in_features, module.out_features
        codes, scale = ops.quantize_rows_fp8(module.weight.detach())
        if not bool(scale.isfinite().all()):
            raise ValueError("expected finite weights, got infinities or NaN")
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias = module.bias

    def extra_repr(self) -> str:
        """Sizes, as for a linear module."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # a change of dtype is not meant for them: functions see integers of the same size
        kept = {name: self._buffers.pop(name) for name in ("codes", "scale")}
        try:
            super()._apply(fn, recurse)
            for name, integers in (("codes", torch.uint8), ("scale", torch.int32)):
                tensor = kept[name]
                assert tensor is not None
                kept[name] = fn(tensor.view(integers)).view(tensor.dtype)
        finally:
            self._buffers.update(kept)
        return self

    def forward(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        """``x [..., K]`` to ``[..., N]`` in x's dtype, or to some of the outputs.

        Raises:
            ValueError: gradients are wanted.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("decoder_precision='fp8': expected to run without gradients, got an input that needs one")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = x.reshape(-1, self.in_features)
        codes, scale, bias = self.codes, self.scale, None if self.bias is None else self.bias.to(x.dtype)
        if outputs is not None:
            codes, scale, bias = codes[outputs], scale[outputs], None if bias is None else bias[outputs]
        if self.takes_codes(x):
            out = fp8_product(ops.quantize_rows_fp8(rows), codes, scale, bias)
        elif rows.shape[0] <= FEW_ROWS:
            out = ops.decode_linear_fp8(rows, [codes], [scale], [bias])
        else:
            out = _product_in_blocks(rows, codes, scale, bias)
        return out.unflatten(0, x.shape[:-1]) if x.dim() != 2 else out

    def multiply_codes(self, rows: tuple[Tensor, Tensor]) -> Tensor:
        """The module of rows in 8 bits, where it :meth:`takes_codes`: ``[T, N]`` bfloat16."""
        return fp8_product(rows, self.codes, self.scale, self.bias)

    def takes_codes(self, x: Tensor) -> bool:
        """Whether ``x [..., K]`` is rounded to 8 bits."""
        return (
            x.dtype == torch.bfloat16
            and x.numel() > FEW_ROWS * self.in_features
            and self.in_features % 16 == 0
            and self.out_features % 16 == 0
            and multiplies_fp8(x.device)
        )


def takes_codes(module: Any, x: Tensor) -> bool:
    """Whether a module is an :class:`Fp8Linear`, and nothing else, that rounds ``x`` to 8 bits."""
    return type(module) is Fp8Linear and is_untouched(module) and module.takes_codes(x)


def is_fp8(module: Any) -> bool:
    """Whether a linear module, or what it is a part of, has weights in 8 bits."""
    return type(getattr(module, "whole", module)) is Fp8Linear


def stored_weight(module: Any) -> Tensor:
    """Weights ``[N, K]`` of a linear module or of a part of one, as they are read: codes or numbers."""
    weight: Tensor = module.codes if is_fp8(module) else module.weight
    return weight


def linear_all(modules: list[Any], x: Tensor) -> list[Tensor]:
    """Each module of ``x [..., K]``; modules that take it in 8 bits share that rounding."""
    if not all(takes_codes(module, x) for module in modules) or torch.is_autocast_enabled(x.device.type):
        return [module(x) for module in modules]
    rows = ops.quantize_rows_fp8(x.reshape(-1, x.shape[-1]))
    return [module.multiply_codes(rows).view(*x.shape[:-1], -1) for module in modules]


@functools.cache
def multiplies_fp8(device: torch.device) -> bool:
    """Whether a device has matmuls of rows and weights in 8 bits."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _product_in_blocks(rows: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    step = max(1, _BLOCK_ELEMENTS // max(1, codes.shape[1]))
    parts = []
    for begin in range(0, codes.shape[0], step):
        weight = (codes[begin : begin + step].float() * scale[begin : begin + step]).to(rows.dtype)
        parts.append(F.linear(rows, weight, None if bias is None else bias[begin : begin + step]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

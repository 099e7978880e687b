"""Operators of one decoding step: fused linear for a few rows, and the KV cache's new entry."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._library import cpu_kernels, cuda_kernels
from ..counted import counted
from ..reference import decode_step as _reference
from ._autocast import outside_autocast
from ._checks import CPU_KERNEL_DTYPES, FLOATS, check_eps, check_rotary, check_tensor, check_that

__all__ = ["decode_append", "decode_linear", "decode_linear_fp8"]

#: Most matrices of one fused linear.
MATRICES = 3
#: Most rows for which the CPU kernel beats matmuls of a library, which repack the weights for every call.
MAX_CPU_ROWS = 16


@outside_autocast
def decode_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
    overlap: bool = False,
    prefetch: Tensor | None = None,
    prefetch_bytes: int = 0,
) -> Tensor:
    """Fused linear for a few rows: optional RMSNorm, 1 to 3 matmuls, then bias, gate or residual as the epilogue.

    ``norm(x) [W_0; W_1; W_2]^T + [b_0; b_1; b_2] + residual``, or with ``gated``
    ``silu(norm(x) W_0^T + b_0) * (norm(x) W_1^T + b_1)``; ``norm`` is the root mean square norm, if it has a weight. On
    CUDA one kernel accumulates in float32 and reads the weights once for every 8 rows; it gives the same bits in every
    run. On the CPU a kernel does the same for up to 16 rows in float32 and bfloat16. Elsewhere plain PyTorch. Not
    differentiable.

    Args:
        x: ``[rows, K]`` float32, bfloat16, float16 or float64; on CUDA a row must fit into shared memory.
        weights: one to three matrices ``[N_i, K]``; ``gated``: two of equal shape.
        biases: ``[N_i]`` or ``None`` for each matrix; default: none.
        norm_weight: ``[K]``.
        eps: added to the mean square.
        residual: ``[rows, sum N_i]``; not with ``gated``.
        gated: see above.
        overlap: begin while the previous kernel still runs (programmatic dependent launch, compute capability 9.0). The
            caller promises that weights, biases and norm are older than that kernel.
        prefetch: a contiguous tensor of which CUDA fetches the first ``prefetch_bytes`` bytes into its L2 cache at the
            end, for a later kernel (compute capability 9.0; elsewhere nothing happens).
        prefetch_bytes: see ``prefetch``.

    Returns:
        ``[rows, sum N_i]``, with ``gated`` ``[rows, N_0]``, in x's dtype.

    Raises:
        TypeError: a dtype that is not x's.
        ValueError: a shape, device or number of matrices that does not fit.
        NotImplementedError: in a backward pass.

    Equivalent, up to rounding, to::

        torch.cat([F.linear(norm(x), w, b) for w, b in zip(weights, biases)], -1) + residual
    """
    matrices: list[Tensor | None] = [*weights]
    offsets: list[Tensor | None] = [None] * len(weights) if biases is None else [*biases]
    _check_linear(x, weights, offsets, norm_weight, eps, residual, gated)
    if (x.is_cuda and x.dtype == torch.float64) or (x.device.type == "cpu" and not _has_cpu_kernel(x)):
        return _reference.decode_linear(
            x, weights, biases, norm_weight=norm_weight, eps=eps, residual=residual, gated=gated
        )
    matrices += [None] * (MATRICES - len(matrices))
    offsets += [None] * (MATRICES - len(offsets))
    return torch.ops.sharedllm.decode_linear(
        x, *matrices, *offsets, norm_weight, eps, residual, gated, overlap, prefetch, prefetch_bytes
    )


@outside_autocast
def decode_linear_fp8(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
    overlap: bool = False,
    prefetch: Tensor | None = None,
    prefetch_bytes: int = 0,
) -> Tensor:
    """:func:`decode_linear` with weights in 8 bits, ``codes * scale`` as :func:`quantize_rows_fp8` gives them.

    Half the bytes of 16-bit weights are read; x stays in its own dtype, sums are float32. On CUDA tensor cores multiply
    up to 8 rows at a time, in float16 and bfloat16: a row of bfloat16 is scaled by a power of two into half precision,
    where numbers 2^29 times smaller than the row's largest lose digits. On the CPU a kernel serves up to 16 rows in
    float32 and bfloat16. Elsewhere plain PyTorch. Not differentiable.

    Args:
        x: ``[rows, K]`` float32, bfloat16, float16 or float64; on CUDA a row must fit into shared memory.
        codes: one to three matrices ``[N_i, K]`` ``torch.float8_e4m3fn``; ``gated``: two of equal shape.
        scales: ``[N_i, 1]`` float32 for each matrix.
        biases, norm_weight, eps, residual, gated, overlap, prefetch, prefetch_bytes: as for :func:`decode_linear`; with
            ``overlap`` codes are older than the previous kernel, too.

    Returns:
        ``[rows, sum N_i]``, with ``gated`` ``[rows, N_0]``, in x's dtype.

    Raises:
        TypeError: a dtype that is not the one expected.
        ValueError: a shape, device or number of matrices that does not fit.
        NotImplementedError: in a backward pass.

    Equivalent, up to rounding, to::

        torch.cat([F.linear(norm(x), c.to(x.dtype) * s, b) for c, s, b in zip(codes, scales, biases)], -1) + residual
    """
    matrices: list[Tensor | None] = [*codes]
    factors: list[Tensor | None] = [*scales]
    offsets: list[Tensor | None] = [None] * len(codes) if biases is None else [*biases]
    _check_linear(x, codes, offsets, norm_weight, eps, residual, gated, scales)
    wide = x.dtype in (torch.float32, torch.float64)
    if (x.is_cuda and wide) or (x.device.type == "cpu" and not _has_cpu_kernel(x, "decode_linear_fp8")):
        return _reference.decode_linear_fp8(
            x, codes, scales, biases, norm_weight=norm_weight, eps=eps, residual=residual, gated=gated
        )
    none = [None] * (MATRICES - len(matrices))
    return torch.ops.sharedllm.decode_linear_fp8(
        x,
        *(matrices + none),
        *(factors + none),
        *(offsets + none),
        norm_weight,
        eps,
        residual,
        gated,
        overlap,
        prefetch,
        prefetch_bytes,
    )


def _has_cpu_kernel(x: Tensor, name: str = "decode_linear") -> bool:
    return x.dtype in CPU_KERNEL_DTYPES and x.shape[0] <= MAX_CPU_ROWS and name in cpu_kernels()


def _check_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    offsets: Sequence[Tensor | None],
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
    scales: Sequence[Tensor] | None = None,
) -> None:
    """``scales``: of weights that are codes, which are then called so."""
    name, dtype = ("weights", x.dtype) if scales is None else ("codes", torch.float8_e4m3fn)
    check_tensor("x", x, ("rows", "K"), FLOATS)
    check_that(1 <= len(weights) <= MATRICES, name, f"1 to {MATRICES} matrices", len(weights))
    for what, entries in (("scales", scales), ("biases", offsets)):
        if entries is not None:
            check_that(
                len(entries) == len(weights),
                what,
                f"{counted(len(weights), 'entry')}, one for each matrix",
                len(entries),
            )
    for i, (weight, bias) in enumerate(zip(weights, offsets, strict=True)):
        check_tensor(f"{name}[{i}]", weight, (f"N{i}", x.shape[1]), dtype, x.device)
        if scales is not None:
            check_tensor(f"scales[{i}]", scales[i], (weight.shape[0], 1), torch.float32, x.device)
        if bias is not None:
            check_tensor(f"biases[{i}]", bias, (weight.shape[0],), x.dtype, x.device)
    total = sum(weight.shape[0] for weight in weights)
    if gated:
        check_that(len(weights) == 2, name, "2 matrices with gated", len(weights))
        check_tensor(f"{name}[1]", weights[1], weights[0].shape, dtype, x.device)
        check_that(residual is None, "residual", "None with gated", "a tensor")
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, (x.shape[1],), x.dtype, x.device)
    if residual is not None:
        check_tensor("residual", residual, (x.shape[0], total), x.dtype, x.device)
    check_eps(eps)


@outside_autocast
def decode_append(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    first: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    window: int = 0,
    overlap: bool = False,
    prefetch: Tensor | None = None,
    prefetch_bytes: int = 0,
) -> tuple[Tensor, Tensor]:
    """Between the projections and the attention of one new token a row: head norms, RoPE, the KV cache's new entry.

    The token goes to ``length[b]`` of the cache, its rotary position is ``length[b] - first[b]``. Nothing waits for the
    device: out-of-range values are clamped, and a row whose cache is full is not written. ``keys`` and ``values`` are
    changed in place. Not differentiable.

    Args:
        qkv: ``[B, (Hq + 2 Hkv) D]``: all query heads, all key heads, all value heads.
        keys, values: ``[B, capacity, Hkv, D]``, a head's elements adjacent in memory.
        length: ``[B]`` int64, tokens that the cache holds of each row.
        first: ``[B]`` int64, how many of them are left padding.
        cos, sin: ``[P, R/2]`` float32, ``R <= D``.
        q_norm, k_norm: ``[D]``, weights of a root mean square norm over each query or key head; ``None``: no norm.
        eps: of those norms.
        window: tokens that a query sees, including itself; 0: all.
        overlap: begin while the previous kernel still runs (9.0); its results are waited for, so this is always safe.
        prefetch, prefetch_bytes: as for :func:`decode_linear`.

    Returns:
        q: ``[B, Hq, D]``, rotated.
        slot_range: ``[B, 2]`` int64, begin and end of what the token sees, itself included, in the cache as
            ``[B * capacity, Hkv, D]``; ready for :func:`injected_attention`.

    Raises:
        TypeError: a dtype that is not the one expected.
        ValueError: a shape, stride or device that does not fit the others.
    """
    _check_append(qkv, keys, values, length, first, cos, sin, q_norm, k_norm, eps, window)
    if qkv.is_cuda and qkv.dtype == torch.float64:
        return _reference.decode_append(
            qkv, keys, values, length, first, cos, sin, q_norm=q_norm, k_norm=k_norm, eps=eps, window=window
        )
    return torch.ops.sharedllm.decode_append(
        qkv, keys, values, length, first, cos, sin, q_norm, k_norm, eps, window, overlap, prefetch, prefetch_bytes
    )


def _check_append(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    first: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    window: int,
) -> None:
    check_tensor("qkv", qkv, ("B", "(Hq + 2 Hkv) D"), FLOATS)
    rows, device = qkv.shape[0], qkv.device
    check_tensor("keys", keys, (rows, "capacity", "Hkv", "D"), qkv.dtype, device)
    check_tensor("values", values, keys.shape, qkv.dtype, device)
    heads, size = keys.shape[2:]
    check_that(
        size > 0 and qkv.shape[1] % size == 0 and qkv.shape[1] // size > 2 * heads,
        "qkv",
        f"whole heads of {size}, more than {2 * heads}",
        counted(qkv.shape[1], "column"),
    )
    for name, tensor in (("keys", keys), ("values", values)):
        stride = tensor.stride(3)
        check_that(size == 1 or stride == 1, name, "heads whose elements are adjacent in memory", f"stride {stride}")
    check_tensor("length", length, (rows,), torch.int64, device)
    check_tensor("first", first, (rows,), torch.int64, device)
    check_rotary(cos, sin, size, device)
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check_tensor(name, weight, (size,), qkv.dtype, device)
    check_eps(eps)
    check_that(window >= 0, "window", "at least 0 tokens", window)


def _plain_linear(
    x: Tensor,
    weight: Tensor,
    weight2: Tensor | None,
    weight3: Tensor | None,
    bias: Tensor | None,
    bias2: Tensor | None,
    bias3: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
    overlap: bool,
    prefetch: Tensor | None,
    prefetch_bytes: int,
) -> Tensor:
    _check_places(weight2, weight3, bias2, bias3)
    weights = [matrix for matrix in (weight, weight2, weight3) if matrix is not None]
    biases = [bias, bias2, bias3][: len(weights)]
    _check_linear(x, weights, biases, norm_weight, eps, residual, gated)
    return _reference.decode_linear(
        x, weights, biases, norm_weight=norm_weight, eps=eps, residual=residual, gated=gated
    )


def _plain_linear_fp8(
    x: Tensor,
    weight: Tensor,
    weight2: Tensor | None,
    weight3: Tensor | None,
    scale: Tensor,
    scale2: Tensor | None,
    scale3: Tensor | None,
    bias: Tensor | None,
    bias2: Tensor | None,
    bias3: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
    overlap: bool,
    prefetch: Tensor | None,
    prefetch_bytes: int,
) -> Tensor:
    _check_places(weight2, weight3, bias2, bias3)
    for name, matrix, factor in (("weight2", weight2, scale2), ("weight3", weight3, scale3)):
        expected, got = ("none without", "one") if matrix is None else ("one with", "none")
        check_that((matrix is None) == (factor is None), f"scale{name[-1]}", f"{expected} {name}", got)
    codes = [matrix for matrix in (weight, weight2, weight3) if matrix is not None]
    scales = [factor for factor in (scale, scale2, scale3) if factor is not None]
    biases = [bias, bias2, bias3][: len(codes)]
    _check_linear(x, codes, biases, norm_weight, eps, residual, gated, scales)
    return _reference.decode_linear_fp8(
        x, codes, scales, biases, norm_weight=norm_weight, eps=eps, residual=residual, gated=gated
    )


def _check_places(weight2: Tensor | None, weight3: Tensor | None, bias2: Tensor | None, bias3: Tensor | None) -> None:
    # as in the CUDA operator: matrices that are given come first, each with its bias
    check_that(weight2 is not None or weight3 is None, "weight3", "none without weight2", "one")
    for name, matrix, offset in (("weight2", weight2, bias2), ("weight3", weight3, bias3)):
        check_that(matrix is not None or offset is None, f"bias{name[-1]}", f"none without {name}", "one")


def _plain_append(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    first: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    window: int,
    overlap: bool,
    prefetch: Tensor | None,
    prefetch_bytes: int,
) -> tuple[Tensor, Tensor]:
    _check_append(qkv, keys, values, length, first, cos, sin, q_norm, k_norm, eps, window)
    return _reference.decode_append(
        qkv, keys, values, length, first, cos, sin, q_norm=q_norm, k_norm=k_norm, eps=eps, window=window
    )


@torch.library.register_fake("sharedllm::decode_linear")
def _linear_fake(
    x: Tensor,
    weight: Tensor,
    weight2: Tensor | None,
    weight3: Tensor | None,
    bias: Tensor | None,
    bias2: Tensor | None,
    bias3: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
    overlap: bool,
    prefetch: Tensor | None,
    prefetch_bytes: int,
) -> Tensor:
    return _empty_linear(x, (weight, weight2, weight3), gated)


@torch.library.register_fake("sharedllm::decode_linear_fp8")
def _linear_fp8_fake(
    x: Tensor,
    weight: Tensor,
    weight2: Tensor | None,
    weight3: Tensor | None,
    scale: Tensor,
    scale2: Tensor | None,
    scale3: Tensor | None,
    bias: Tensor | None,
    bias2: Tensor | None,
    bias3: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
    overlap: bool,
    prefetch: Tensor | None,
    prefetch_bytes: int,
) -> Tensor:
    return _empty_linear(x, (weight, weight2, weight3), gated)


def _empty_linear(x: Tensor, matrices: Sequence[Tensor | None], gated: bool) -> Tensor:
    outputs = [matrix.shape[0] for matrix in matrices if matrix is not None]
    return x.new_empty((x.shape[0], outputs[0] if gated else sum(outputs)))


@torch.library.register_fake("sharedllm::decode_append")
def _append_fake(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    first: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    window: int,
    overlap: bool,
    prefetch: Tensor | None,
    prefetch_bytes: int,
) -> tuple[Tensor, Tensor]:
    heads, size = keys.shape[2:]
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] // size - 2 * heads, size)), length.new_empty((qkv.shape[0], 2))


def _no_derivative(name: str) -> Callable[..., None]:
    def backward(ctx: object, *grads: Tensor) -> None:
        raise NotImplementedError(f"{name}: expected to be run without gradients, got a backward pass")

    return backward


for _name in ("decode_linear", "decode_linear_fp8"):
    torch.library.register_autograd(f"sharedllm::{_name}", _no_derivative(_name))

for _name, _plain in (
    ("decode_linear", _plain_linear),
    ("decode_linear_fp8", _plain_linear_fp8),
    ("decode_append", _plain_append),
):
    for _device, _kernels in (("CPU", cpu_kernels()), ("CUDA", cuda_kernels())):
        if _name not in _kernels:
            torch.library.impl(f"sharedllm::{_name}", _device, _plain)

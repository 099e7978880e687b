"""Chunk compression: a layer's queries and keys rotated, its kept keys and values packed into the memory."""

from typing import Any

import torch
from torch import Tensor

from .. import _library, reference
from ._autocast import outside_autocast
from ._checks import CPU_KERNEL_DTYPES, FLOATS, check_inside, check_rotary, check_tensor, check_that


@outside_autocast
def chunk_compression(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_positions: Tensor | None,
    positions: Tensor | None,
    keep_index: Tensor,
    keep_position: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotate one layer's queries and keys for the nodes' own attention and pack its kept keys and values.

    ``k_rotated[t] = R(positions[t]) k[t]``, ``memory_k[s] = R(keep_position[s]) k[keep_index[s]]``,
    ``memory_v[s] = v[keep_index[s]]``, where ``R(p)`` rotates the pairs ``(i, i + R/2)`` by row ``p`` of the tables; a
    slot's rotation is position in the node + chunk index, both at once (paper, sections 3.2 and 3.3).

    Args:
        q: ``[Tq, Hq, D]`` raw queries, or ``None``.
        k, v: ``[T, Hkv, D]`` raw keys and values; float32, bfloat16, float16 or float64, q's too.
        cos, sin: ``[P, R/2]`` float32, ``R <= D``.
        q_positions: ``[Tq]`` int64 below P; given exactly when ``q`` is.
        positions: ``[T]`` int64 below P, position of each token in its node; ``None``: rotated keys are not wanted.
        keep_index: ``[S]`` int64, token kept in each slot (no token twice), -1 for a slot filled with zeros.
        keep_position: ``[S]`` int64 below P, rotation of each slot's key.

    Returns:
        q_rotated ``[Tq, Hq, D]`` (empty without ``q``), k_rotated ``[T, Hkv, D]`` (empty without ``positions``),
        memory_k ``[S, Hkv, D]``, memory_v ``[S, Hkv, D]``. Differentiable with respect to q, k and v.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or device is wrong, or only one of ``q`` and ``q_positions`` is given; on the CPU also
            indices and positions out of range and a token kept twice.

    Equivalent to (``rotate`` as in :mod:`sharedllm_ext.reference.rotary`)::

        q_rotated = rotate(q, cos[q_positions], sin[q_positions])
        k_rotated = rotate(k, cos[positions], sin[positions])
        memory_k = rotate(k[keep_index], cos[keep_position], sin[keep_position])
        memory_v = v[keep_index]

    The CPU kernel takes float32 and bfloat16; float16 and float64 on the CPU take the reference, and so does float64 on
    CUDA. The CUDA kernel takes the rest; it never reads index values on the host: a position outside the tables takes
    the nearest row, a ``keep_index`` outside the tokens counts as -1.
    """
    check_tensor("k", k, ("T", "Hkv", "D"), FLOATS)
    tokens, heads, size = k.shape
    device = k.device
    check_tensor("v", v, (tokens, heads, size), k.dtype, device)
    check_that((q is None) == (q_positions is None), "q_positions", "a tensor exactly when q is given", q_positions)
    if q is not None and q_positions is not None:
        check_tensor("q", q, ("Tq", "Hq", size), k.dtype, device)
        check_tensor("q_positions", q_positions, (q.shape[0],), torch.int64, device)
    if positions is not None:
        check_tensor("positions", positions, (tokens,), torch.int64, device)
    check_rotary(cos, sin, size, device)
    check_tensor("keep_index", keep_index, ("S",), torch.int64, device)
    check_tensor("keep_position", keep_position, (keep_index.shape[0],), torch.int64, device)
    if device.type == "cuda" and k.dtype == torch.float64:
        return reference.chunk_compression(q, k, v, cos, sin, q_positions, positions, keep_index, keep_position)
    if device.type == "cpu" and k.dtype not in CPU_KERNEL_DTYPES:
        if not torch.compiler.is_compiling():
            _check_values(cos.shape[0], tokens, q_positions, positions, keep_index, keep_position)
        return reference.chunk_compression(q, k, v, cos, sin, q_positions, positions, keep_index, keep_position)
    return torch.ops.sharedllm.chunk_compression(q, k, v, cos, sin, q_positions, positions, keep_index, keep_position)


@outside_autocast
def chunk_compression_backward(
    grad_q_rotated: Tensor | None,
    grad_k_rotated: Tensor | None,
    grad_memory_k: Tensor,
    grad_memory_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_positions: Tensor | None,
    positions: Tensor | None,
    keep_index: Tensor,
    keep_position: Tensor,
    num_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`chunk_compression` for q, k and v.

    ``grad_k[t] = R(-positions[t]) grad_k_rotated[t] + R(-keep_position[s]) grad_memory_k[s]`` and
    ``grad_v[t] = grad_memory_v[s]``, the slot's terms only where ``keep_index[s] = t``.

    Args:
        grad_q_rotated: ``[Tq, Hq, D]``, or ``None``.
        grad_k_rotated: ``[T, Hkv, D]``, or ``None``.
        grad_memory_k, grad_memory_v: ``[S, Hkv, D]``.
        cos, sin, q_positions, positions, keep_index, keep_position: as in the forward; positions whose gradient is
            ``None`` are ignored, and a gradient without positions too.
        num_tokens: ``T``.

    Returns:
        grad_q ``[Tq, Hq, D]`` (empty without ``grad_q_rotated``), grad_k ``[T, Hkv, D]``, grad_v ``[T, Hkv, D]``.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or device is wrong; on the CPU also indices and positions out of range.
    """
    check_tensor("grad_memory_k", grad_memory_k, ("S", "Hkv", "D"), FLOATS)
    slots, heads, size = grad_memory_k.shape
    device, dtype = grad_memory_k.device, grad_memory_k.dtype
    check_tensor("grad_memory_v", grad_memory_v, (slots, heads, size), dtype, device)
    check_that(num_tokens >= 0, "num_tokens", "at least 0", num_tokens)
    if grad_q_rotated is None or q_positions is None:
        grad_q_rotated = q_positions = None
    else:
        check_tensor("grad_q_rotated", grad_q_rotated, ("Tq", "Hq", size), dtype, device)
        check_tensor("q_positions", q_positions, (grad_q_rotated.shape[0],), torch.int64, device)
    if grad_k_rotated is None or positions is None:
        grad_k_rotated = positions = None
    else:
        check_tensor("grad_k_rotated", grad_k_rotated, (num_tokens, heads, size), dtype, device)
        check_tensor("positions", positions, (num_tokens,), torch.int64, device)
    check_rotary(cos, sin, size, device)
    check_tensor("keep_index", keep_index, (slots,), torch.int64, device)
    check_tensor("keep_position", keep_position, (slots,), torch.int64, device)
    indices = (q_positions, positions, keep_index, keep_position)
    grads = (grad_q_rotated, grad_k_rotated, grad_memory_k, grad_memory_v)
    if device.type == "cuda" and dtype == torch.float64:
        return reference.chunk_compression_backward(*grads, cos, sin, *indices, num_tokens)
    if device.type == "cpu" and dtype not in CPU_KERNEL_DTYPES:
        if not torch.compiler.is_compiling():
            _check_values(cos.shape[0], num_tokens, *indices)
        return reference.chunk_compression_backward(*grads, cos, sin, *indices, num_tokens)
    return torch.ops.sharedllm.chunk_compression_backward(*grads, cos, sin, *indices, num_tokens)


def _check_values(
    rows: int,
    tokens: int,
    q_positions: Tensor | None,
    positions: Tensor | None,
    keep_index: Tensor,
    keep_position: Tensor,
) -> None:
    if q_positions is not None:
        check_inside("q_positions", q_positions, 0, rows)
    if positions is not None:
        check_inside("positions", positions, 0, rows)
    check_inside("keep_index", keep_index, -1, tokens)
    check_inside("keep_position", keep_position, 0, rows)
    kept = keep_index[keep_index >= 0]
    check_that(kept.unique().numel() == kept.numel(), "keep_index", "no token twice", keep_index.tolist())


@torch.library.register_fake("sharedllm::chunk_compression")
def _(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_positions: Tensor | None,
    positions: Tensor | None,
    keep_index: Tensor,
    keep_position: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q_rotated = k.new_empty((0,) if q is None else q.shape)
    k_rotated = k.new_empty((0,) if positions is None else k.shape)
    memory = (keep_index.shape[0], *k.shape[1:])
    return q_rotated, k_rotated, k.new_empty(memory), k.new_empty(memory)


@torch.library.register_fake("sharedllm::chunk_compression_backward")
def _(
    grad_q_rotated: Tensor | None,
    grad_k_rotated: Tensor | None,
    grad_memory_k: Tensor,
    grad_memory_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_positions: Tensor | None,
    positions: Tensor | None,
    keep_index: Tensor,
    keep_position: Tensor,
    num_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    has_q = grad_q_rotated is not None and q_positions is not None
    grad_q = grad_memory_k.new_empty(grad_q_rotated.shape if has_q else (0,))  # type: ignore[union-attr]
    shape = (num_tokens, *grad_memory_k.shape[1:])
    return grad_q, grad_memory_k.new_empty(shape), grad_memory_k.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, _, cos, sin, q_positions, positions, keep_index, keep_position = inputs
    ctx.save_for_backward(cos, sin, q_positions, positions, keep_index, keep_position)
    ctx.has_q, ctx.has_positions, ctx.num_tokens = q is not None, positions is not None, k.shape[0]


def _backward(
    ctx: Any, grad_q_rotated: Tensor, grad_k_rotated: Tensor, grad_memory_k: Tensor, grad_memory_v: Tensor
) -> tuple[Tensor | None, ...]:
    need_q, need_k, need_v = ctx.needs_input_grad[:3]
    grad_q, grad_k, grad_v = torch.ops.sharedllm.chunk_compression_backward(
        grad_q_rotated if ctx.has_q and need_q else None,
        grad_k_rotated if ctx.has_positions and need_k else None,
        grad_memory_k,
        grad_memory_v,
        *ctx.saved_tensors,
        ctx.num_tokens,
    )
    return grad_q if need_q else None, grad_k if need_k else None, grad_v if need_v else None, *(None,) * 6


torch.library.register_autograd("sharedllm::chunk_compression", _backward, setup_context=_setup_context)


def _setup_context_of_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_q_rotated, grad_k_rotated, _, _, cos, sin, q_positions, positions, keep_index, keep_position, _ = inputs
    # a gradient without positions, or the other way round, took no part
    ctx.has_q = grad_q_rotated is not None and q_positions is not None
    ctx.has_k = grad_k_rotated is not None and positions is not None
    used = (q_positions if ctx.has_q else None, positions if ctx.has_k else None)
    ctx.save_for_backward(cos, sin, *used, keep_index, keep_position)


def _backward_of_backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
    # the operator is linear in the data and its backward the transpose, so the transpose of that is the operator
    q_rotated, k_rotated, memory_k, memory_v = torch.ops.sharedllm.chunk_compression(
        grad_q if ctx.has_q else None, grad_k, grad_v, *ctx.saved_tensors
    )
    return q_rotated if ctx.has_q else None, k_rotated if ctx.has_k else None, memory_k, memory_v, *(None,) * 7


torch.library.register_autograd(
    "sharedllm::chunk_compression_backward", _backward_of_backward, setup_context=_setup_context_of_backward
)

for _name in ("chunk_compression", "chunk_compression_backward"):
    if _name not in _library.cuda_kernels():
        torch.library.impl(f"sharedllm::{_name}", "CUDA", getattr(reference, _name))

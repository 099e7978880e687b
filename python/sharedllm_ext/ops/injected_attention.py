"""Injected attention: running text reads the context memory."""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._library import CUDA_LIBRARY, cuda_kernels
from ..reference.injected_attention import injected_attention as _reference
from ..reference.rotary import compute_dtype, rotate
from ._autocast import outside_autocast
from ._checks import (
    CPU_KERNEL_DTYPES,
    FLOATS,
    check_heads,
    check_scale,
    check_tensor,
    check_that,
)
from ._dispatch import below_autograd, goes_directly, kernel_inputs, needs_gradient
from ._rows import Rows

__all__ = ["injected_attention", "injected_attention_path"]

#: Kernels on CUDA: Hopper's, the one from compute capability 8.0 on, the one for few queries, the one for float32.
PATHS = ("auto", "sm90", "portable", "decode", "generic")
#: Head sizes of the tensor core kernels, in 16-bit types; a head of another size takes the next larger one's kernel.
TENSOR_CORE_HEAD_SIZES = (64, 96, 128, 256)
#: Elements that these kernels load at a time. Heads that are no multiple of it are copied in every call.
TENSOR_CORE_UNIT = 8
#: Largest head size of the CUDA kernels.
MAX_CUDA_HEAD_SIZE = 256

#: Scores that the plain path holds at once: 1 GiB of float32.
PLAIN_SCORES = 2**28


_KERNEL_INPUTS = kernel_inputs("injected_attention")


def head_size_obstacle(size: int) -> str | None:
    """Why the tensor cores cannot read heads of a size in place; ``None``: they can, in 16-bit types on CUDA."""
    if size % TENSOR_CORE_UNIT == 0 and size <= MAX_CUDA_HEAD_SIZE:
        return None
    expected = f"a multiple of {TENSOR_CORE_UNIT} up to {MAX_CUDA_HEAD_SIZE} (read in place by tensor core kernels)"
    return f"head_dim: expected {expected}, got {size}"


def injected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    slot_range: Tensor,
    q_position: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of each row's queries over the row's whole memory, without a causal mask.

    ``out = softmax(rope(q, position) k^T * scale) v`` and ``lse = log(sum(exp(rope(q, position) k^T * scale)))``;
    ``Hq / Hkv`` query heads share a key/value head. Differentiable once in ``q``, ``k`` and ``v``, through both
    results; the gradients of ``k`` and ``v`` are computed only if one of them requires it.

    On the CPU, float32 and bfloat16 run in a C++ kernel that accumulates in float32; float16 and float64 run in
    :mod:`sharedllm_ext.reference`.

    On CUDA, bfloat16 and float16 run on the tensor cores, with float32 accumulation: kernels for head sizes of 64, 96,
    128 and 256, of which the next larger one takes the other sizes. Heads that are no multiple of 8 are copied into
    longer ones first, in every call. float32 takes a general kernel, many times slower. None waits for the device.
    Without a CUDA library, and for float64 or larger heads, plain PyTorch does the work and waits. The
    forward pass gives the same bits every time; the backward pass sums ``grad_q`` in an order that may change. What
    lies in slots outside a row's range never matters; a NaN in a row's own queries or gradients may reach the gradients
    of slots that share a tile of 128 with its slots.

    Args:
        q: ``[T, Hq, D]``, the queries of all rows, packed, not rotated.
        k: ``[S, Hkv, D]``, the memory's keys, rotated; rows of the batch may share slots.
        v: ``[S, Hkv, D]``, the memory's values.
        cu_q: ``[B + 1]`` int64, cumulative query counts: row ``b`` owns queries ``cu_q[b] .. cu_q[b + 1] - 1``.
        slot_range: ``[B, 2]`` int64, first slot and end of each row's memory.
        q_position: ``[B]`` int64, the one rotary position of all queries of a row.
        cos: ``[P, R/2]`` float32, ``R <= D``; element ``i`` is rotated with ``i + R/2``, those from ``R`` on pass.
        sin: ``[P, R/2]`` float32.
        scale: factor on the scores, usually ``D ** -0.5``.

    Returns:
        out: ``[T, Hq, D]`` in q's dtype; zeros for a row without slots.
        lse: ``[T, Hq]`` float32 (float64 for float64 input); -inf for a row without slots.

    Raises:
        TypeError: a dtype that is not the one expected.
        ValueError: a shape or device that does not fit the others; on the CPU also a value of ``cu_q``, ``slot_range``
            or ``q_position`` that is out of range.

    Source: SharedLLM (arXiv 2603.04759), position-aware injection. Equivalent, for one row, to::

        query = rotate(q, cos[position], sin[position])
        scores = torch.einsum("qhd,shd->hqs", query, k.repeat_interleave(Hq // Hkv, 1)) * scale
        out = torch.einsum("hqs,shd->qhd", scores.softmax(-1), v.repeat_interleave(Hq // Hkv, 1))
        lse = scores.logsumexp(-1).T
    """
    if goes_directly(_KERNEL_INPUTS, q, k, v, cu_q, slot_range, q_position, cos, sin):
        try:
            if needs_gradient(q, k, v, cos, sin):
                return _Differentiable.apply(q, k, v, cu_q, slot_range, q_position, cos, sin, scale)
            with below_autograd():
                return _KERNEL(q, k, v, cu_q, slot_range, q_position, cos, sin, scale)
        except Exception:
            # the kernel checks as much as the checks below, which say what is wrong in Python's words
            pass
    return _checked(q, k, v, Rows(cu_q, slot_range, q_position, cos, sin), scale)


@outside_autocast
def _checked(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> tuple[Tensor, Tensor]:
    """Every call that does not go straight to the kernel, and every call that it refused."""
    check_tensor("q", q, ("T", "Hq", "D"), FLOATS)
    device, size = q.device, q.shape[2]
    check_tensor("k", k, ("S", "Hkv", size), q.dtype, device)
    check_tensor("v", v, k.shape, q.dtype, device)
    check_heads(q, k)
    rows.check(size, device)
    check_scale(scale)
    if device.type == "cpu" and q.dtype not in CPU_KERNEL_DTYPES:
        rows.check_values(q.shape[0], k.shape[0])
        return _reference(q, k, v, *rows, scale)
    if device.type == "cuda" and (q.dtype == torch.float64 or size > MAX_CUDA_HEAD_SIZE):
        return _reference(q, k, v, *rows, scale)
    return torch.ops.sharedllm.injected_attention(q, k, v, *rows, scale)


@contextlib.contextmanager
def injected_attention_path(name: str) -> Iterator[None]:
    """Force a CUDA kernel of :func:`injected_attention` for the whole process, for tests and benchmarks.

    Where a path cannot run a call (another GPU, element type or head size), the usual choice is made. The two passes
    of one problem belong on one path: gradients round scores as that path's forward pass does.

    Args:
        name: ``auto`` (the usual choice), ``sm90``, ``portable``, ``decode`` or ``generic``.

    Raises:
        ValueError: another name, or there is no CUDA library.
    """
    check_that(name in PATHS, "name", " or ".join(PATHS), name)
    check_that("injected_attention" in cuda_kernels(), "name", "a loaded CUDA library to choose a path of", "none")
    force = ctypes.CDLL(str(CUDA_LIBRARY)).sharedllm_force_injected_attention_path
    before = force(PATHS.index(name))
    try:
        yield
    finally:
        force(before)


@torch.library.register_fake("sharedllm::injected_attention")
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    slot_range: Tensor,
    q_position: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=compute_dtype(q.dtype))


@torch.library.register_fake("sharedllm::injected_attention_backward")
def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    slot_range: Tensor,
    q_position: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    need_grad_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = k.shape if need_grad_kv else (0,)
    return q.new_empty(q.shape), k.new_empty(shape), v.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, slot_range, q_position, cos, sin, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, slot_range, q_position, cos, sin)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *rows = ctx.saved_tensors
    need_grad_kv = any(ctx.needs_input_grad[1:3])
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grad_q, grad_k, grad_v = torch.ops.sharedllm.injected_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, *rows, ctx.scale, need_grad_kv
    )
    return (grad_q, grad_k, grad_v, *([None] * 6)) if need_grad_kv else (grad_q, *([None] * 8))


torch.library.register_autograd("sharedllm::injected_attention", _backward, setup_context=_setup_context)
_KERNEL = torch.ops.sharedllm.injected_attention.default


class _Differentiable(torch.autograd.Function):
    """What ``torch.library`` makes of the two functions above, without its way through the dispatcher and back."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        with below_autograd():
            output = _KERNEL(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return _backward(ctx, *grads)
        with below_autograd():
            return _backward(ctx, *grads)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
    raise NotImplementedError(
        "injected_attention: expected to be differentiated once, got a second derivative; "
        "sharedllm_ext.reference.injected_attention is differentiable any number of times"
    )


torch.library.register_autograd("sharedllm::injected_attention_backward", _no_second_derivative)


class _Block(NamedTuple):
    """Queries that the plain path takes at once: rows of equal length and equally many slots, heads first."""

    queries: list[slice]
    slots: list[slice]
    heads: int

    def load_queries(self, x: Tensor) -> Tensor:
        """``[rows, Hkv, queries * groups, …]`` of a tensor ``[T, Hq, …]``."""
        rows = torch.stack([x[part] for part in self.queries]) if len(self.queries) > 1 else x[self.queries[0]][None]
        return rows.unflatten(2, (self.heads, -1)).transpose(1, 2).flatten(2, 3)

    def store_queries(self, target: Tensor, x: Tensor) -> None:
        """Inverse of :meth:`load_queries`, into ``target``."""
        for part, row in zip(self.queries, x.unflatten(2, (_length(self.queries), -1)).transpose(1, 2), strict=True):
            target[part] = row.flatten(1, 2)

    def load_slots(self, x: Tensor) -> Tensor:
        """``[rows, Hkv, slots, D]`` of a tensor ``[S, Hkv, D]``."""
        rows = torch.stack([x[part] for part in self.slots]) if len(self.slots) > 1 else x[self.slots[0]][None]
        return rows.transpose(1, 2)

    def add_slots(self, target: Tensor, x: Tensor) -> None:
        """Add ``[rows, Hkv, slots, D]`` to ``target``; rows may share slots, so one after the other."""
        for part, row in zip(self.slots, x.transpose(1, 2), strict=True):
            target[part] += row


def _length(parts: list[slice]) -> int:
    """Length of the first slice; all slices of a block are equally long."""
    return parts[0].stop - parts[0].start


def _blocks(q: Tensor, k: Tensor, cu_q: Tensor, slot_range: Tensor) -> Iterator[_Block]:
    """Cut the batch into blocks of at most ``PLAIN_SCORES`` scores (or one query), rows without work left out."""
    bounds = cu_q.tolist()
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for first, last, (begin, end) in zip(bounds[:-1], bounds[1:], slot_range.tolist(), strict=True):
        if first < last and begin < end:
            groups.setdefault((last - first, end - begin), []).append((first, begin))
    for (length, slots), rows in groups.items():
        queries = max(PLAIN_SCORES // (q.shape[1] * slots), 1)
        together = max(queries // length, 1)
        for i in range(0, len(rows), together):
            for skip in range(0, length, queries):
                yield _Block(
                    [slice(first + skip, first + min(skip + queries, length)) for first, _ in rows[i : i + together]],
                    [slice(begin, begin + slots) for _, begin in rows[i : i + together]],
                    k.shape[1],
                )


@outside_autocast
def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    slot_range: Tensor,
    q_position: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The operator in plain PyTorch: matmuls in the input dtype, softmax in float32."""
    dtype = compute_dtype(q.dtype)
    query = rotate(q.to(dtype), *Rows(cu_q, slot_range, q_position, cos, sin).query_tables(q.shape[0])).to(q.dtype)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
    for block in _blocks(q, k, cu_q, slot_range):
        scores = (block.load_queries(query) @ block.load_slots(k).transpose(2, 3)).to(dtype) * scale
        block.store_queries(lse, torch.logsumexp(scores, -1))
        block.store_queries(out, torch.softmax(scores, -1).to(q.dtype) @ block.load_slots(v))
    return out, lse


@outside_autocast
def _plain_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    slot_range: Tensor,
    q_position: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    need_grad_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's backward in plain PyTorch, scores recomputed from ``lse``."""
    dtype = compute_dtype(q.dtype)
    tables = Rows(cu_q, slot_range, q_position, cos, sin).query_tables(q.shape[0])
    query = rotate(q.to(dtype), *tables).to(q.dtype)
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_q = torch.zeros(q.shape, dtype=dtype, device=q.device)
    shape = k.shape if need_grad_kv else (0,)
    grad_k, grad_v = (torch.zeros(shape, dtype=dtype, device=q.device) for _ in range(2))
    for block in _blocks(q, k, cu_q, slot_range):
        rows, upstream, keys = block.load_queries(query), block.load_queries(grad_out), block.load_slots(k)
        scores = (rows @ keys.transpose(2, 3)).to(dtype) * scale
        weights = torch.exp(scores - block.load_queries(lse).unsqueeze(-1))
        grad_weights = (upstream @ block.load_slots(v).transpose(2, 3)).to(dtype)
        grad_scores = (weights * (grad_weights - block.load_queries(delta).unsqueeze(-1)) * scale).to(q.dtype)
        block.store_queries(grad_q, (grad_scores @ keys).to(dtype))
        if need_grad_kv:
            block.add_slots(grad_k, (grad_scores.transpose(2, 3) @ rows).to(dtype))
            block.add_slots(grad_v, (weights.to(q.dtype).transpose(2, 3) @ upstream).to(dtype))
    grad_q = rotate(grad_q, tables[0], -tables[1])
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


if "injected_attention" not in cuda_kernels():
    torch.library.impl("sharedllm::injected_attention", "CUDA", _plain)
if "injected_attention_backward" not in cuda_kernels():
    torch.library.impl("sharedllm::injected_attention_backward", "CUDA", _plain_backward)

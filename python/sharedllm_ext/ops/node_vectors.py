"""Node vectors' attention: a node's last token over the node's keys and values."""

from typing import Any

import torch
from torch import Tensor

from .._library import cuda_kernels
from ..reference.node_vectors import node_vectors as _reference
from ..reference.rotary import compute_dtype, rotate
from ._checks import CPU_KERNEL_DTYPES, FLOATS, check_heads, check_rotary, check_tensor, check_that

__all__ = ["node_vectors"]

#: Elements of the gathered keys that the plain path holds at once: 256 MiB of float32.
PLAIN_ELEMENTS = 2**26


def node_vectors(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """Attention of each node's last token over the whole node, rotary positions counted from the node's start.

    ``out[i] = softmax(rope(q[i], l - 1) rope(k[s : s + l], 0 .. l - 1)^T * scale) v[s : s + l]`` with ``s, l = spans[i]``;
    ``Hq / Hkv`` query heads share a key/value head. Differentiable in ``q``, ``k`` and ``v``; the backward pass recomputes
    the forward in PyTorch.

    On the CPU, float32 and bfloat16 run in a C++ kernel that accumulates in float32; float16 and float64 run in
    :mod:`sharedllm_ext.reference`. The plain PyTorch path on CUDA does not wait for the device and takes time in
    proportion to ``N * P``: pass tables no longer than the longest node.

    Args:
        q: ``[N, Hq, D]``, the query projections of each node's last token, not rotated.
        k: ``[T, Hkv, D]``, the key projections of all tokens, not rotated.
        v: ``[T, Hkv, D]``, the value projections of all tokens.
        spans: ``[N, 2]`` int64, (start, length) in tokens; spans may overlap, and nodes may be empty.
        cos: ``[P, R/2]`` float32, ``R <= D`` and ``P`` at least the longest length; element ``i`` is rotated with
            ``i + R/2``, from ``R`` on all pass through.
        sin: ``[P, R/2]`` float32.
        scale: factor on the scores, usually ``D ** -0.5``.

    Returns:
        ``[N, Hq, D]`` in q's dtype; zeros for an empty node.

    Raises:
        TypeError: a dtype that is not the one expected.
        ValueError: a shape or device that does not fit the others; on the CPU also a span that is not inside the tokens or
            is longer than the tables.

    Source: SharedLLM (arXiv 2603.04759), query-aware retrieval. Equivalent, for one node, to::

        query = rotate(q[i], cos[l - 1], sin[l - 1])
        keys = rotate(k[s : s + l], cos[:l], sin[:l]).repeat_interleave(Hq // Hkv, 1)
        weights = (torch.einsum("hd,thd->ht", query, keys) * scale).softmax(-1)
        out[i] = torch.einsum("ht,thd->hd", weights, v[s : s + l].repeat_interleave(Hq // Hkv, 1))
    """
    check_tensor("q", q, ("N", "Hq", "D"), FLOATS)
    device, size = q.device, q.shape[2]
    check_tensor("k", k, ("T", "Hkv", size), q.dtype, device)
    check_tensor("v", v, tuple(k.shape), q.dtype, device)
    check_heads(q, k)
    check_tensor("spans", spans, (q.shape[0], 2), torch.int64, device)
    check_rotary(cos, sin, size, device)
    if device.type == "cpu" and q.dtype not in CPU_KERNEL_DTYPES:
        _check_values(k, spans, cos)
        return _reference(q, k, v, spans, cos, sin, scale)
    return torch.ops.sharedllm.node_vectors(q, k, v, spans, cos, sin, scale)


def _check_values(k: Tensor, spans: Tensor, cos: Tensor) -> None:
    """What the C++ operator checks by itself, for the reference path."""
    tokens, longest = k.shape[0], cos.shape[0]
    for node, (start, length) in enumerate(spans.tolist()):
        inside = start >= 0 and 0 <= length <= longest and start + length <= tokens
        expected = f"start >= 0, 0 <= length <= {longest} and start + length <= {tokens}"
        check_that(inside, f"spans[{node}]", expected, (start, length))


@torch.library.register_fake("sharedllm::node_vectors")
def _fake(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


def _plain(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """The operator in plain PyTorch: nodes padded to the tables' length, some nodes at a time; differentiable."""
    dtype = compute_dtype(q.dtype)
    tokens, heads, size = k.shape
    longest = min(cos.shape[0], tokens)
    if q.shape[0] == 0 or longest == 0:
        return q * 0
    cos, sin = cos[:longest], sin[:longest]
    place = torch.arange(longest, device=q.device)
    outs = []
    for i in range(0, q.shape[0], step := max(PLAIN_ELEMENTS // (longest * heads * max(size, 1)), 1)):
        start, length = spans[i : i + step].unbind(-1)
        last = (length - 1).clamp(min=0)
        inside = place < length.unsqueeze(1)
        token = (start.unsqueeze(1) + place).clamp(max=tokens - 1)
        query = rotate(q[i : i + step].to(dtype), cos[last], sin[last]).unflatten(1, (heads, -1))
        keys, values = rotate(k[token].to(dtype), cos, sin), v[token].to(dtype)
        scores = torch.einsum("nhgd,nthd->nhgt", query, keys) * scale
        # the lowest finite number, not -inf: an empty node's softmax stays free of NaN and is cleared below
        scores = scores.masked_fill(~inside[:, None, None], torch.finfo(dtype).min)
        # a masked token's value may be NaN or infinite, and 0 * NaN is NaN
        values = values.masked_fill(~inside[:, :, None, None], 0)
        out = torch.einsum("nhgt,nthd->nhgd", torch.softmax(scores, -1), values).flatten(1, 2)
        outs.append(out.masked_fill((length == 0)[:, None, None], 0).to(q.dtype))
    return torch.cat(outs)


@torch.library.custom_op("sharedllm::node_vectors_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # an operator of its own, so that tracing does not look inside: the reference reads the spans on the host
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        forward = _plain if q.is_cuda else _reference
        out = forward(inputs[0], inputs[1], inputs[2], spans, cos, sin, scale)
        grads = torch.autograd.grad(out, inputs, grad_out, allow_unused=True)
    grad_q, grad_k, grad_v = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) if grad is None else grad.contiguous()
        for grad, x in zip(grads, inputs, strict=True)
    )
    return grad_q, grad_k, grad_v


@_backward_op.register_fake
def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
    raise NotImplementedError(
        "node_vectors: expected to be differentiated once, got a second derivative; "
        "sharedllm_ext.reference.node_vectors is differentiable any number of times"
    )


_backward_op.register_autograd(_no_second_derivative)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.sharedllm.node_vectors_backward(grad_out, *ctx.saved_tensors, ctx.scale)
    return (*grads, None, None, None, None)


torch.library.register_autograd("sharedllm::node_vectors", _backward, setup_context=_setup_context)

if "node_vectors" not in cuda_kernels():
    torch.library.impl("sharedllm::node_vectors", "CUDA", _plain)

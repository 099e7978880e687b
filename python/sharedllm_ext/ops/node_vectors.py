"""Node vectors' attention: a node's last token over the node's keys and values."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._library import cuda_kernels
from ..reference.node_vectors import node_vectors as _reference
from ..reference.node_vectors import tree_node_vectors as _tree_reference
from ..reference.node_vectors import tree_nodes
from ..reference.rotary import compute_dtype, rotate
from ._autocast import outside_autocast
from ._checks import CPU_KERNEL_DTYPES, FLOATS, check_heads, check_rotary, check_scale, check_tensor, check_that

__all__ = ["node_vectors", "tree_node_vectors"]

#: Largest head size of the CUDA kernel (kNodeVectorsMaxSize in csrc/kernels/node_vectors.h).
CUDA_KERNEL_MAX_SIZE = 256
#: Most levels of :func:`tree_node_vectors`.
MAX_LEVELS = 20

#: Elements of the gathered keys that the plain path holds at once: 256 MiB of float32.
PLAIN_ELEMENTS = 2**26


@outside_autocast
def node_vectors(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, cos: Tensor, sin: Tensor, *, scale: float) -> Tensor:
    """Attention of each node's last token over the whole node, rotary positions counted from the node's start.

    ``out[i] = softmax(rope(q[i], l - 1) rope(k[s : s + l], 0 .. l - 1)^T * scale) v[s : s + l]`` with
    ``s, l = spans[i]``; ``Hq / Hkv`` query heads share a key/value head. Differentiable once in ``q``, ``k`` and ``v``;
    the backward pass recomputes the forward, in a deterministic CUDA kernel or in PyTorch, where it is as deterministic
    as ``Tensor.index_add_``.

    On the CPU, float32 and bfloat16 run in a C++ kernel that accumulates in float32; float16 and float64 run in
    :mod:`sharedllm_ext.reference`. On CUDA, float32, bfloat16 and float16 with ``D <= 256`` run in a CUDA kernel, whose
    work is divided evenly whatever the lengths are; the rest runs in plain PyTorch, in time proportional to
    ``N * P``. Neither waits for the device. The CUDA kernel for 16-bit numbers rotates queries and keys by the
    difference of their positions, so the tables must be those of angles proportional to the position (times a common
    factor).

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
        ValueError: a shape or device that does not fit the others; on the CPU also a span that is not inside the tokens
            or is longer than the tables. On CUDA such a span is cut to what is there.

    Source: SharedLLM (arXiv 2603.04759), query-aware retrieval. Equivalent, for one node, to::

        query = rotate(q[i], cos[l - 1], sin[l - 1])
        keys = rotate(k[s : s + l], cos[:l], sin[:l]).repeat_interleave(Hq // Hkv, 1)
        weights = (torch.einsum("hd,thd->ht", query, keys) * scale).softmax(-1)
        out[i] = torch.einsum("ht,thd->hd", weights, v[s : s + l].repeat_interleave(Hq // Hkv, 1))
    """
    _check_nodes(q, k, v, spans, cos, sin, scale)
    device = q.device
    if device.type == "cpu" and q.dtype not in CPU_KERNEL_DTYPES:
        _check_values(k, spans, cos.shape[0])
        return _reference(q, k, v, spans, cos, sin, scale)
    if _outside_cuda_kernel(q):
        return torch.ops.sharedllm.node_vectors_plain(q, k, v, spans, cos, sin, scale)
    return torch.ops.sharedllm.node_vectors(q, k, v, spans, cos, sin, scale)


@outside_autocast
def tree_node_vectors(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, cos: Tensor, sin: Tensor, levels: int, *, scale: float
) -> Tensor:
    """:func:`node_vectors` of all nodes of the first levels of trees whose nodes are halved.

    A node of length ``l`` has the children of :func:`~sharedllm_ext.ops.context_tree_split` without noise: its first
    ``floor(l / 2)`` tokens and the rest. Keys and values are read once for all levels on CUDA: rotary scores depend on
    relative positions only, so a node and its right child, which end with the same token, share their scores.

    Args:
        q: ``[n, 2^levels, Hq, D]``, the query projections at the last token of each leaf, not rotated. The leaves are
            the nodes of the last level; every node ends where one of them does.
        k: ``[T, Hkv, D]``, the key projections of all tokens, not rotated.
        v: ``[T, Hkv, D]``, the value projections of all tokens.
        spans: ``[n, 2]`` int64, (start, length) of the roots, in tokens.
        cos: ``[P, R/2]`` float32, ``R <= D`` and ``2 P`` at least the longest length; element ``i`` is rotated with
            ``i + R/2``, from ``R`` on all pass through.
        sin: ``[P, R/2]`` float32.
        levels: how often the roots are halved, 1 to 20.
        scale: factor on the scores, usually ``D ** -0.5``.

    Returns:
        ``[n, 2^(levels + 1) - 2, Hq, D]`` in q's dtype: the vectors of the two halves, the four quarters and so on,
        each level from left to right; the root has none. Zeros for an empty node. Differentiable once in ``q``, ``k``
        and ``v``.

    Raises:
        TypeError: a dtype that is not the one expected.
        ValueError: a shape, number or device that does not fit the others; on the CPU also a span that is not inside
            the tokens or is longer than twice the tables. On CUDA such a span is cut to what is there.

    Equivalent to::

        nodes, leaf = sharedllm_ext.reference.tree_nodes(spans, levels)
        out = node_vectors(q[:, leaf].flatten(0, 1), k, v, nodes.flatten(0, 1), cos, sin, scale=scale)
        out = out.unflatten(0, nodes.shape[:2])
    """
    check_that(1 <= levels <= MAX_LEVELS, "levels", f"1 to {MAX_LEVELS}", levels)
    check_tensor("q", q, ("n", 2**levels, "Hq", "D"), FLOATS)
    device, size = q.device, q.shape[3]
    check_tensor("k", k, ("T", "Hkv", size), q.dtype, device)
    check_tensor("v", v, k.shape, q.dtype, device)
    check_heads(q[:, 0], k)
    check_tensor("spans", spans, (q.shape[0], 2), torch.int64, device)
    check_rotary(cos, sin, size, device)
    check_scale(scale)
    if device.type == "cpu" and q.dtype not in CPU_KERNEL_DTYPES:
        _check_values(k, spans, 2 * cos.shape[0])
        return _tree_reference(q, k, v, spans, cos, sin, levels, scale)
    if _outside_cuda_kernel(q):
        nodes, leaf = tree_nodes(spans, levels)
        out = torch.ops.sharedllm.node_vectors_plain(
            q[:, leaf].flatten(0, 1), k, v, nodes.flatten(0, 1), cos, sin, scale
        )
        return out.reshape(*nodes.shape[:2], *q.shape[2:])
    return torch.ops.sharedllm.tree_node_vectors(q, k, v, spans, cos, sin, levels, scale)


def _outside_cuda_kernel(q: Tensor) -> bool:
    return q.is_cuda and (q.dtype == torch.float64 or q.shape[-1] > CUDA_KERNEL_MAX_SIZE)


def _check_nodes(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, cos: Tensor, sin: Tensor, scale: float) -> None:
    check_tensor("q", q, ("N", "Hq", "D"), FLOATS)
    device, size = q.device, q.shape[2]
    check_tensor("k", k, ("T", "Hkv", size), q.dtype, device)
    check_tensor("v", v, k.shape, q.dtype, device)
    check_heads(q, k)
    check_tensor("spans", spans, (q.shape[0], 2), torch.int64, device)
    check_rotary(cos, sin, size, device)
    check_scale(scale)


def _check_values(k: Tensor, spans: Tensor, longest: int) -> None:
    """What the C++ operator checks by itself, for the reference path."""
    tokens = k.shape[0]
    start, length = spans.unbind(-1)
    # no sum: the numbers may be the largest of their type
    inside = (start >= 0) & (length >= 0) & (length <= min(longest, tokens)) & (start <= tokens - length.clamp(min=0))
    if not bool(inside.all()):
        node = int((~inside).nonzero()[0])
        raise ValueError(
            f"spans[{node}]: expected start >= 0, 0 <= length <= {longest} and start + length <= {tokens},"
            f" got {tuple(spans[node].tolist())}"
        )


@torch.library.register_fake("sharedllm::node_vectors")
def _fake(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("sharedllm::tree_node_vectors")
def _tree_fake(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, cos: Tensor, sin: Tensor, levels: int, scale: float
) -> Tensor:
    return q.new_empty((q.shape[0], 2 ** (levels + 1) - 2, *q.shape[2:]))


class _Nodes(NamedTuple):
    """Some nodes of the plain path, padded to one length; heads grouped as ``[nodes, Hkv, groups, …]``."""

    part: slice
    query: Tensor  # rotated, [nodes, Hkv, groups, D]
    keys: Tensor  # rotated, [nodes, length, Hkv, D]
    values: Tensor
    weights: Tensor  # [nodes, Hkv, groups, length], 0 outside a node
    token: Tensor  # [nodes, length]
    cos: Tensor
    sin: Tensor
    last: Tensor  # [nodes], position of the last token


def _padded(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Iterator[_Nodes]:
    """Nodes a block at a time; nothing if no node can hold a token."""
    dtype = compute_dtype(q.dtype)
    tokens, heads, size = k.shape
    longest = min(cos.shape[0], tokens)
    if not spans.is_cuda and spans.shape[0]:
        longest = min(longest, int(spans[:, 1].max()))
    if longest == 0:
        return
    cos, sin = cos[:longest], sin[:longest]
    place = torch.arange(longest, device=q.device)
    step = max(PLAIN_ELEMENTS // (longest * heads * max(size, 1)), 1)
    for i in range(0, q.shape[0], step):
        part = slice(i, i + step)
        start, length = spans[part].unbind(-1)
        last = (length - 1).clamp(min=0)
        token = start.unsqueeze(1) + place
        inside = (place < length.unsqueeze(1)) & (token >= 0) & (token < tokens)
        token = token.clamp(0, tokens - 1)
        query = rotate(q[part].to(dtype), cos[last], sin[last]).unflatten(1, (heads, -1))
        # a token outside may hold NaN or infinity, and 0 * NaN is NaN
        outside = ~inside[:, :, None, None]
        keys = rotate(k[token].to(dtype), cos, sin).masked_fill(outside, 0)
        values = v[token].to(dtype).masked_fill(outside, 0)
        outside = ~inside[:, None, None]
        scores = torch.einsum("nhgd,nthd->nhgt", query, keys) * scale
        # the lowest number, not -inf: the softmax of an empty node stays a number
        weights = torch.softmax(scores.masked_fill(outside, torch.finfo(dtype).min), -1).masked_fill(outside, 0)
        yield _Nodes(part, query, keys, values, weights, token, cos, sin, last)


@outside_autocast
def _plain(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """The operator in plain PyTorch: nodes padded to the tables' length, some nodes at a time."""
    _check_nodes(q, k, v, spans, cos, sin, scale)
    if q.device.type == "cpu":
        _check_values(k, spans, cos.shape[0])
    return _attend(q, k, v, spans, cos, sin, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """:func:`_plain` of arguments that have been checked; ``k`` and ``v`` are widened to q's dtype block by block."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for nodes in _padded(q, k, v, spans, cos, sin, scale):
        out[nodes.part] = torch.einsum("nhgt,nthd->nhgd", nodes.weights, nodes.values).flatten(1, 2).to(q.dtype)
    return out


# operators of their own, so that tracing does not look inside: the sizes depend on the spans
_plain_op = torch.library.custom_op("sharedllm::node_vectors_plain", _plain, mutates_args=())
_plain_op.register_fake(_fake)


@outside_autocast
def _plain_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_nodes(q, k, v, spans, cos, sin, scale)
    check_tensor("grad_out", grad_out, tuple(q.shape), q.dtype, q.device)
    if q.device.type == "cpu":
        _check_values(k, spans, cos.shape[0])
    dtype = compute_dtype(q.dtype)
    grad_q = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    grad_k, grad_v = (torch.zeros(k.shape, dtype=dtype, device=q.device) for _ in range(2))
    for nodes in _padded(q, k, v, spans, cos, sin, scale):
        upstream = grad_out[nodes.part].to(dtype).unflatten(1, (k.shape[1], -1))
        grad_weights = torch.einsum("nhgd,nthd->nhgt", upstream, nodes.values)
        delta = (nodes.weights * grad_weights).sum(-1, keepdim=True)
        grad_scores = nodes.weights * (grad_weights - delta) * scale
        grad_query = torch.einsum("nhgt,nthd->nhgd", grad_scores, nodes.keys).flatten(1, 2)
        grad_q[nodes.part] = rotate(grad_query, nodes.cos[nodes.last], -nodes.sin[nodes.last]).to(q.dtype)
        grad_keys = rotate(torch.einsum("nhgt,nhgd->nthd", grad_scores, nodes.query), nodes.cos, -nodes.sin)
        # spans may overlap: tokens add up over the nodes that hold them
        token = nodes.token.flatten()
        grad_k.index_add_(0, token, grad_keys.flatten(0, 1))
        grad_v.index_add_(0, token, torch.einsum("nhgt,nhgd->nthd", nodes.weights, upstream).flatten(0, 1))
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


_plain_backward_op = torch.library.custom_op("sharedllm::node_vectors_plain_backward", _plain_backward, mutates_args=())


@_plain_backward_op.register_fake
@torch.library.register_fake("sharedllm::node_vectors_backward")
def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
    raise NotImplementedError(
        "node_vectors: expected to be differentiated once, got a second derivative; "
        "sharedllm_ext.reference.node_vectors is differentiable any number of times"
    )


_plain_backward_op.register_autograd(_no_second_derivative)
torch.library.register_autograd("sharedllm::node_vectors_backward", _no_second_derivative)


def _gradients(grad_out: Tensor, q: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    operators = torch.ops.sharedllm
    operator = operators.node_vectors_plain_backward if _outside_cuda_kernel(q) else operators.node_vectors_backward
    return operator(grad_out, q, *others)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grads = _gradients(grad_out, *ctx.saved_tensors, ctx.scale)
    return (*grads, None, None, None, None)


torch.library.register_autograd("sharedllm::node_vectors", _backward, setup_context=_setup_context)
_plain_op.register_autograd(_backward, setup_context=_setup_context)


def _tree_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.levels, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _tree_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, spans, *tables = ctx.saved_tensors
    nodes, leaf = tree_nodes(spans, ctx.levels)
    grad_queries, grad_k, grad_v = _gradients(
        grad_out.flatten(0, 1), q[:, leaf].flatten(0, 1), k, v, nodes.flatten(0, 1), *tables, ctx.scale
    )
    # several nodes end with the same token
    grad_q = torch.zeros_like(q, dtype=compute_dtype(q.dtype))
    grad_q.index_add_(1, leaf, grad_queries.reshape(grad_out.shape).to(grad_q.dtype))
    return grad_q.to(q.dtype), grad_k, grad_v, None, None, None, None, None


torch.library.register_autograd("sharedllm::tree_node_vectors", _tree_backward, setup_context=_tree_setup_context)


@outside_autocast
def _tree_plain(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, cos: Tensor, sin: Tensor, levels: int, scale: float
) -> Tensor:
    nodes, leaf = tree_nodes(spans, levels)
    out = _plain(q[:, leaf].flatten(0, 1), k, v, nodes.flatten(0, 1), cos, sin, scale)
    return out.reshape(*nodes.shape[:2], *q.shape[2:])


# no C++ kernel of the gradients for the CPU: the model needs none, as nodes are chosen without gradients
for _key in ("CPU",) if "node_vectors_backward" in cuda_kernels() else ("CPU", "CUDA"):
    torch.library.impl("sharedllm::node_vectors_backward", _key, _plain_backward)
if "node_vectors" not in cuda_kernels():
    torch.library.impl("sharedllm::node_vectors", "CUDA", _plain)
if "tree_node_vectors" not in cuda_kernels():
    torch.library.impl("sharedllm::tree_node_vectors", "CUDA", _tree_plain)

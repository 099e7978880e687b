"""Top-k node retrieval: cosine similarity of nodes with their group's query, and the k best of each group."""

from typing import Any

import torch
from torch import Tensor

from .. import _library, reference
from ..reference.rotary import compute_dtype
from ._autocast import outside_autocast
from ._checks import (
    CPU_KERNEL_DTYPES,
    FLOATS,
    LARGEST_FLOAT32,
    check_cumulative,
    check_inside,
    check_tensor,
    check_that,
)

#: Largest ``k`` of the CUDA kernel (kTopkNodesMaxK in csrc/kernels/topk_nodes.h).
CUDA_KERNEL_MAX_K = 1024


@outside_autocast
def topk_nodes(
    queries: Tensor,
    nodes: Tensor,
    cu_groups: Tensor,
    group_query: Tensor,
    k: int,
    valid: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The ``k`` nodes of every group most similar to the group's query.

    ``similarity = q . x / (max(|q|, eps) * max(|x|, eps))``, accumulated in float32 (float64 for float64). The groups
    are the two siblings of one split (paper, section 3.2, k = 1) or all nodes of a document.

    Args:
        queries: ``[Q, d]``, the nodes' dtype.
        nodes: ``[N, d]`` float32, bfloat16, float16 or float64; group ``g`` holds rows
            ``cu_groups[g] .. cu_groups[g+1]-1``.
        cu_groups: ``[G + 1]`` int64, cumulative group sizes from 0 to N.
        group_query: ``[G]`` int64, the query of each group.
        k: how many to return, at least 0.
        valid: ``[N]`` bool; nodes that are not valid are never returned.
        eps: lower bound of each norm, above 0.

    Returns:
        indices ``[G, k]`` int64 into ``nodes``, best first, the lower index first among equals, -1 where a group has
        fewer than ``k`` valid nodes; similarity ``[G, k]`` (float32; float64 for float64 input), -inf at -1. A NaN
        similarity ranks below all numbers. The similarity is differentiable with respect to queries and nodes.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, device or number is wrong; on the CPU also ``cu_groups`` that fall or do not end at N and a
            ``group_query`` outside the queries.

    Equivalent to (one group)::

        score = torch.nn.functional.cosine_similarity(queries[group_query], nodes, dim=-1, eps=eps)
        similarity, indices = score.masked_fill(~valid, -torch.inf).topk(k)

    The CPU kernel takes float32 and bfloat16; float16 and float64 on the CPU take the reference. So do float64 and
    ``k`` above 1024 on CUDA; the CUDA kernel takes the rest.
    """
    check_tensor("nodes", nodes, ("N", "d"), FLOATS)
    device = nodes.device
    check_tensor("queries", queries, ("Q", nodes.shape[1]), nodes.dtype, device)
    check_tensor("cu_groups", cu_groups, ("G + 1",), torch.int64, device)
    check_that(cu_groups.shape[0] >= 1, "cu_groups", "at least 1 element", cu_groups.shape[0])
    check_tensor("group_query", group_query, (cu_groups.shape[0] - 1,), torch.int64, device)
    check_that(k >= 0, "k", "at least 0", k)
    check_that(eps > 0, "eps", "more than 0", eps)
    check_that(eps <= LARGEST_FLOAT32, "eps", "a finite number (in float32)", eps)
    if valid is not None:
        check_tensor("valid", valid, (nodes.shape[0],), torch.bool, device)
    if device.type == "cpu" and nodes.dtype not in CPU_KERNEL_DTYPES:
        if not torch.compiler.is_compiling():
            check_cumulative("cu_groups", cu_groups, nodes.shape[0])
            check_inside("group_query", group_query, 0, queries.shape[0])
        return reference.topk_nodes(queries, nodes, cu_groups, group_query, k, valid, eps)
    if device.type == "cuda" and (nodes.dtype == torch.float64 or k > CUDA_KERNEL_MAX_K):
        return reference.topk_nodes(queries, nodes, cu_groups, group_query, k, valid, eps)
    return torch.ops.sharedllm.topk_nodes(queries, nodes, cu_groups, group_query, k, valid, eps)


@torch.library.register_fake("sharedllm::topk_nodes")
def _(
    queries: Tensor,
    nodes: Tensor,
    cu_groups: Tensor,
    group_query: Tensor,
    k: int,
    valid: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    shape = (cu_groups.shape[0] - 1, k)
    return nodes.new_empty(shape, dtype=torch.int64), nodes.new_empty(shape, dtype=compute_dtype(nodes.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    queries, nodes, _, group_query, _, _, ctx.eps = inputs
    indices, _ = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(queries, nodes, group_query, indices)


def _backward(ctx: Any, _grad_indices: Tensor | None, grad: Tensor) -> tuple[Tensor | None, ...]:
    # only the returned nodes carry a gradient, so only their similarity is computed again
    saved_queries, saved_nodes, group_query, indices = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    found = indices >= 0
    with torch.enable_grad():
        queries, nodes = saved_queries.detach().requires_grad_(), saved_nodes.detach().requires_grad_()
        dtype = compute_dtype(nodes.dtype)
        query = queries[group_query].to(dtype).unsqueeze(1)
        if nodes.shape[0] == 0:
            return torch.zeros_like(queries), torch.zeros_like(nodes), None, None, None, None, None
        # ones where nothing was found: neither a value nor a NaN of another node gets into the gradient
        query, node = (torch.where(found.unsqueeze(-1), x, 1) for x in (query, nodes[indices.clamp(min=0)].to(dtype)))
        score = (query * node).sum(-1) / (query.norm(dim=-1).clamp(min=ctx.eps) * node.norm(dim=-1).clamp(min=ctx.eps))
        inputs = [x for x, want in zip((queries, nodes), wanted, strict=True) if want]
        grads = iter(torch.autograd.grad(score, inputs, torch.where(found, grad, 0)))
    grad_queries, grad_nodes = (next(grads) if want else None for want in wanted)
    return grad_queries, grad_nodes, None, None, None, None, None


torch.library.register_autograd("sharedllm::topk_nodes", _backward, setup_context=_setup_context)

if "topk_nodes" not in _library.cuda_kernels():
    torch.library.impl("sharedllm::topk_nodes", "CUDA", reference.topk_nodes)

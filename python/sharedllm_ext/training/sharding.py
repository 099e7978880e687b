"""FSDP2 in training: every process holds a share of each parameter, its gradient and its optimiser state.

A layer above the injected ones is put together for its own calls. The rest (embedding, the lowest layers, the
compressor, the pick, the output projection) is read in many places and is whole from a step's forward pass to the end
of its backward pass, so that processes may compress in different numbers of micro-batches.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.upload import upload

#: How several processes divide the work: all parameters in each, or a share of them.
SHARDINGS = ("ddp", "fsdp")
_METHOD = "training_sums"


def shard(model: Any, compute: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Shard a model over all processes, in place.

    Args:
        model: a :class:`SharedLLMForCausalLM`, whole and equal in all processes; it may still be on the CPU.
        compute: what runs the model, with tensors that require gradients as its result.
        device: where each process computes.

    Returns:
        ``compute`` with the parameters in place. The gradients it gives are sums over the processes divided by their
        number.
    """
    # importing them takes longer than most of the package
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.layers[model.config.injection_layers :]:
        fully_shard(layer, mesh=mesh)
    setattr(model, _METHOD, compute)
    # reading outside of the layers' own calls: nothing is given up between forward and backward pass
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, _METHOD)
    wrapped: Callable[..., Any] = getattr(model, _METHOD)
    return wrapped


def is_share(tensor: Tensor) -> bool:
    """Whether a tensor is this process's share of one."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """The tensor, put together if it is a share; then all processes take part."""
    full: Tensor = tensor.full_tensor() if is_share(tensor) else tensor
    return full


def gathered(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU by name, one after the other; all processes take part.

    Args:
        tensors: names and tensors, in the same order everywhere.
        keep: whether this process wants them; otherwise the result is empty.
    """
    held = {}
    for name, tensor in tensors:
        full = whole(tensor.detach()) if keep or is_share(tensor) else None
        if keep and full is not None:
            held[name] = full.to("cpu").contiguous()
    return held


def like(full: Tensor, place: Any) -> Tensor:
    """``full`` on the device of ``place``, and the same share of it if that is a share."""
    if not is_share(place):
        return upload(full, place.device)
    from torch.distributed.tensor import distribute_tensor

    # every process has the whole tensor: nothing is sent
    return distribute_tensor(full.to(place.device), place.device_mesh, place.placements, src_data_rank=None)

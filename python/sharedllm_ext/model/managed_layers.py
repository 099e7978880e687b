"""Layers whose parameters are present only while the layer runs: sharded by FSDP, or moved by accelerate's hooks."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

# by name: importing them takes longer than most models need to be built
_SHARDED_CLASSES = ("FSDPModule", "FullyShardedDataParallel")


def is_managed(layer: Any) -> bool:
    """Whether a layer has its parameters in place only inside its own calls."""
    return hasattr(layer, "_hf_hook") or is_sharded(layer)


def is_sharded(layer: Any) -> bool:
    """Whether FSDP shards a layer's parameters."""
    return any(base.__name__ in _SHARDED_CLASSES for base in type(layer).__mro__)


def recomputes_whole_calls() -> bool:
    """Whether this Transformers version checkpoints a layer's whole call, including the hooks around its forward."""
    return "__call__" in vars(GradientCheckpointingLayer)


def check_checkpointing(layer: Any) -> None:
    """Refuse what FSDP cannot recompute under reentrant checkpointing.

    FSDP1 lets no layer run twice in a step; FSDP2 leaves gradients sharded where its hooks are recomputed as well.

    Raises:
        ValueError: names the setting.
    """
    if not layer.gradient_checkpointing or not is_sharded(layer):
        return
    function = getattr(layer, "_gradient_checkpointing_func", None)
    if not getattr(function, "keywords", {}).get("use_reentrant"):
        return
    if any(base.__name__ == "FullyShardedDataParallel" for base in type(layer).__mro__):
        where = "in FullyShardedDataParallel"
    elif recomputes_whole_calls():
        where = f"sharded by fully_shard under Transformers {transformers.__version__}"
    else:
        return
    raise ValueError(f"gradient_checkpointing_kwargs: expected use_reentrant=False for a model {where}, got True")


def call_layer(layer: Any, step: Callable[..., Any], *tensors: Tensor) -> Any:
    """``step(layer, *tensors)`` where the layer's parameters are present: inside a call of the layer if it is managed.

    Args:
        layer: a decoder layer with :class:`RunsSteps`.
        step: the function; gradient checkpointing may repeat it, so it must depend on its arguments alone.
        tensors: the tensors to which gradients flow back.
    """
    return layer(*tensors, compressor_step=step) if is_managed(layer) else step(layer, *tensors)


class RunsSteps:
    """Mixin of a decoder layer: a call with ``compressor_step`` does that step instead of the layer's forward."""

    def forward(self, *args: Any, compressor_step: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        if compressor_step is not None:
            return compressor_step(self, *args)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def device_of(module: Any) -> torch.device:
    """Device that a module with a weight computes on; accelerate may keep the weight elsewhere between calls."""
    weight_device: torch.device = module.weight.device
    if weight_device.type != "meta":
        return weight_device
    devices = [hook.execution_device for hook in _offloading_hooks(module)]
    return weight_device if not devices else torch.device(devices[0])


def stored_parameters(module: nn.Module, skip: str = "") -> Iterator[Tensor]:
    """Parameters with their values, in the order of ``module.parameters()``: sharded ones put together (all processes
    take part), offloaded ones read from where accelerate keeps them, quantised ones in floating point.

    Args:
        module: the module.
        skip: name of a child to leave out.
    """
    stored: dict[str, Any] = {}
    for prefix, child in module.named_modules():
        for hook in _offloading_hooks(child):
            stored[prefix] = hook.weights_map
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if skip and name.startswith(f"{skip}."):
            continue
        if parameter.device.type == "meta":
            # the module's own hook, or that of one it is part of
            path = name.split(".")
            owners = [i for i in range(len(path) - 1, -1, -1) if ".".join(path[:i]) in stored]
            if not owners:
                raise ValueError(f"{name}: expected a parameter with data, got one on the meta device")
            owner = owners[0]
            yield stored[".".join(path[:owner])][".".join(path[owner:])]
        else:
            yield _plain(parameter)


def _plain(parameter: Any) -> Tensor:
    """Values in an ordinary tensor: of all shards, or of integers and scales."""
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()
    # every tensor has dequantize, those of quantisation libraries one that works
    own = type(parameter) not in (Tensor, nn.Parameter) and not parameter.data_ptr()
    return parameter.detach().dequantize() if own else parameter


def _offloading_hooks(module: Any) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", (hook,)) if getattr(one, "offload", False)]


def refuse_plan(name: str, embedding: nn.Module) -> None:
    """Refuse parameters that a tensor parallel plan of Transformers shares out.

    Raises:
        ValueError: names the way that works.
    """
    mesh = getattr(getattr(embedding, "weight", None), "device_mesh", None)
    if "tp" in (getattr(mesh, "mesh_dim_names", None) or ()):
        raise ValueError(
            f"{name}: expected whole parameters, got ones shared out by a tensor parallel plan (tp_plan), whose parts "
            "the compressor's fused operators cannot read; load the whole model in every process and share out the "
            "context (sharedllm_ext.distributed)"
        )


def check_whole(name: str, embedding: nn.Module) -> None:
    """Refuse parameters that are sharded at this moment.

    Raises:
        ValueError: names the way that works.
    """
    weight: Any = embedding.weight
    if weight.dim() == 2 and type(weight).__name__ != "DTensor" and type(weight.data).__name__ != "DTensor":
        return
    refuse_plan(name, embedding)
    raise ValueError(
        f"{name}: expected whole parameters, got ones that FSDP has sharded; give context_ids to the model's forward, "
        f"or call torch.distributed.fsdp.register_fsdp_forward_method(model, {name!r}) once before (FSDP2)"
    )

"""Small tables from the host to the device."""

import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor's copy on the device; from page-locked memory, so that the host does not wait for earlier work."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)

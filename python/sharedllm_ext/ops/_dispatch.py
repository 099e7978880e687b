"""Direct calls of a kernel: without checks that it repeats, and without PyTorch's Python layer for autograd."""

import torch
from torch import Tensor

from .._library import cpu_kernels, cuda_kernels
from ._checks import CPU_KERNEL_DTYPES

#: Element types that the CUDA kernels take.
CUDA_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Context in which a call goes straight to the kernel: what ``torch.library`` uses behind its own autograd function.
below_autograd = torch._C._AutoDispatchBelowAutograd


def kernel_inputs(operator: str) -> frozenset[tuple[str, torch.dtype]]:
    """Kinds of device and element types for which an operator has a C++ kernel, which checks all of its arguments."""
    found = [("cpu", dtype) for dtype in CPU_KERNEL_DTYPES if operator in cpu_kernels()]
    found += [("cuda", dtype) for dtype in CUDA_KERNEL_DTYPES if operator in cuda_kernels()]
    return frozenset(found)


def goes_directly(inputs: frozenset[tuple[str, torch.dtype]], *tensors: Tensor) -> bool:
    """Whether a call with these tensors (all of its arguments) reaches the C++ kernel itself.

    Traced and transformed (``torch.func``) calls do not, nor those with subclasses of tensors, which may run anything,
    or with meta tensors, for which the dispatcher takes the fake kernel.
    """
    if torch.compiler.is_compiling() or type(tensors[0]) is not Tensor:
        return False
    device = tensors[0].device
    for tensor in tensors:
        if type(tensor) is not Tensor or tensor.device != device:
            return False
    return (device.type, tensors[0].dtype) in inputs and not torch._C._are_functorch_transforms_active()


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records a call with these tensors."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)

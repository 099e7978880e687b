"""What this machine's CPU computes fast: the instructions that run, and the dtype for models that leave it open."""

import os
from pathlib import Path
from typing import NamedTuple

import torch

#: Settings of oneDNN, which computes PyTorch's 16-bit products, that keep it from using bfloat16 instructions.
_ONEDNN_WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")


class Instructions(NamedTuple):
    """The instructions that run on the CPU.

    Attributes:
        kernels: of this package's kernels: ``avx512_bf16``, ``avx512``, ``avx2`` or ``generic``.
        torch: of PyTorch's own, which ``ATEN_CPU_CAPABILITY`` may lower: ``AVX512``, ``AVX2``, ``DEFAULT``, …
        bfloat16_products: whether PyTorch multiplies bfloat16 matrices with instructions made for it.
    """

    kernels: str
    torch: str
    bfloat16_products: bool


def instructions() -> Instructions:
    """What runs here; raises ImportError if the package was not built."""
    from . import _C

    kernels = _C.cpu_capability()
    limits = {os.environ.get(name, "").upper() for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")}
    limited = bool(limits.intersection(_ONEDNN_WITHOUT_BFLOAT16))
    # AMX comes with these instructions
    return Instructions(kernels, torch.backends.cpu.get_cpu_capability(), kernels == "avx512_bf16" and not limited)


def preferred_dtype(checkpoint: torch.dtype) -> torch.dtype:
    """The dtype to compute a checkpoint's weights in on this CPU.

    float16 has no kernels of this package, and without bfloat16 instructions PyTorch's products of bfloat16 run many
    times slower than those of float32: both become float32. Everything else stays as it is.
    """
    slow = checkpoint == torch.bfloat16 and not instructions().bfloat16_products
    return torch.float32 if slow or checkpoint == torch.float16 else checkpoint


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that a process can still get; ``None`` where the system does not say."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)

"""Loads the compiled operators and compares what they were built for with what runs here."""

import warnings
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "lib"
CPU_LIBRARY = FOLDER / "libsharedllm_cpu.so"
CUDA_LIBRARY = FOLDER / "libsharedllm_cuda.so"
OLDEST_TORCH = (2, 10)
REBUILD = "pip install --force-reinstall --no-deps ."

_cuda_operators: frozenset[str] = frozenset()


def cuda_kernels() -> frozenset[str]:
    """Operators whose CUDA kernel is loaded; the others run as plain PyTorch on CUDA tensors."""
    return _cuda_operators


def build_info() -> dict[str, Any]:
    """Version, revision, torch, CUDA, compiler and architectures of the installed build.

    Raises:
        ImportError: the package was not built.
    """
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(
            f"sharedllm_ext: expected the compiled module _C in {FOLDER.parent}, got none that loads ({error});"
            f" build it: {REBUILD}"
        ) from error
    return _C.build_info()


def problems(capabilities: list[tuple[int, int]] | None = None) -> list[str]:
    """What does not fit between this build and the running Python packages and devices; empty if all is well.

    Args:
        capabilities: compute capabilities of the GPUs; default: those that torch sees.
    """
    import torch

    info = build_info()
    found = []
    running = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if running < OLDEST_TORCH:
        found.append(
            f"expected torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer (stable ABI; built with {info['torch']}), got"
            f" {torch.__version__}; run: pip install -U torch"
        )
    if not torch.cuda.is_available():
        return found
    if capabilities is None:
        capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if not info["architectures"]:
        found.append(f"this build has no CUDA kernels, but torch sees {len(capabilities)} GPU(s); on this machine: {REBUILD}")
        return found
    for index, capability in enumerate(capabilities):
        if not runs_on(capability, info["architectures"]):
            found.append(
                f"GPU {index} has compute capability {capability[0]}.{capability[1]}, but the CUDA kernels were built for"
                f" {', '.join(info['architectures'])}; run: TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]} {REBUILD}"
            )
    return found


def runs_on(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether machine code of one of the architectures runs on a device of this compute capability.

    Code for ``xy`` runs on minor versions from ``y`` of the same major version, code for ``xya`` on ``x.y`` alone.
    """
    for name in architectures:
        number = int(name.rstrip("af"))
        major, minor = divmod(number, 10)
        exact = name.endswith("a")
        if major == capability[0] and (minor == capability[1] if exact else minor <= capability[1]):
            return True
    return False


def _load() -> None:
    global _cuda_operators
    import torch

    info = build_info()
    found = problems([]) if not torch.cuda.is_available() else []
    if found:
        raise ImportError(f"sharedllm_ext: {found[0]}")
    if not CPU_LIBRARY.is_file():
        raise ImportError(f"sharedllm_ext: expected {CPU_LIBRARY}, which does not exist; build it: {REBUILD}")
    try:
        torch.ops.load_library(CPU_LIBRARY)
    except OSError as error:
        raise ImportError(
            f"sharedllm_ext: {CPU_LIBRARY} was built with torch {info['torch']} and does not load in torch"
            f" {torch.__version__} ({error}); build it again: {REBUILD}"
        ) from error
    # torch.version.cuda needs no device and creates no context
    if torch.version.cuda is None or not CUDA_LIBRARY.is_file() or not torch.cuda.is_available():
        return
    unfit = problems()
    if unfit:
        warnings.warn(f"sharedllm_ext: {'; '.join(unfit)}. CUDA tensors take the plain PyTorch path", stacklevel=2)
        return
    torch.ops.load_library(CUDA_LIBRARY)
    _cuda_operators = frozenset(registered("CUDA"))


def registered(key: str) -> set[str]:
    """Operators with an implementation for a dispatch key such as CPU or CUDA."""
    import torch

    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {name.removeprefix("sharedllm::").split(".")[0] for name in names if name.startswith("sharedllm::")}


_load()

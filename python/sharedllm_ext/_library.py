"""Loads the compiled operators and compares what they were built for with what runs here."""

import ctypes
import struct
import warnings
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .counted import counted

PACKAGE = Path(__file__).resolve().parent
CPU_LIBRARY = PACKAGE / "lib" / "libsharedllm_cpu.so"
CUDA_LIBRARY = PACKAGE / "lib" / "libsharedllm_cuda.so"
OLDEST_TORCH = (2, 10)
# a checkout is built in place, an installed package from its source folder
IN_CHECKOUT = (PACKAGE.parent.parent / "setup.py").is_file()
REBUILD = "python setup.py build_ext --inplace" if IN_CHECKOUT else "pip install --force-reinstall --no-deps ."

_cpu_operators: frozenset[str] = frozenset()
_cuda_operators: frozenset[str] = frozenset()


def cpu_kernels() -> frozenset[str]:
    """Operators with a C++ kernel for the CPU; the others run as plain PyTorch there."""
    return _cpu_operators


def cuda_kernels() -> frozenset[str]:
    """Operators whose CUDA kernel is loaded; the others run as plain PyTorch on CUDA tensors."""
    return _cuda_operators


def build_info() -> dict[str, Any]:
    """Version, revision, torch, CUDA, compiler, architectures and PTX of the installed build.

    Raises:
        ImportError: the package was not built.
    """
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(
            f"sharedllm_ext: expected the compiled module _C in {PACKAGE}, got none that loads ({error}); run:"
            f" {REBUILD}"
        ) from error
    return _C.build_info()


def broken(info: dict[str, Any], torch_version: str = torch.__version__) -> str | None:
    """Why this build cannot be used with this torch and these Python files, with the command that mends it."""
    if info["version"] != __version__:
        return (
            f"expected libraries of version {__version__} (that of the Python files), got {info['version']}"
            f" (revision {info['revision']}); run: {REBUILD}"
        )
    running = tuple(int(part) for part in torch_version.split("+")[0].split(".")[:2])
    if running < OLDEST_TORCH:
        return (
            f"expected torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer (the stable ABI of a build with torch"
            f" {info['torch']}), got {torch_version}; run: pip install -U torch"
        )
    if not CPU_LIBRARY.is_file():
        return f"expected {CPU_LIBRARY}, got no such file; run: {REBUILD}"
    return None


def cuda_problems(
    info: dict[str, Any], capabilities: list[tuple[int, int]], torch_cuda: str | None = torch.version.cuda
) -> list[str]:
    """Why the CUDA kernels of this build cannot run here, with the command that mends it; empty if they can.

    Args:
        info: what :func:`build_info` returns.
        capabilities: compute capability of each GPU.
        torch_cuda: CUDA version of the running torch.
    """
    if not capabilities:
        return []
    listed = ";".join(sorted({f"{major}.{minor}" for major, minor in capabilities}))
    if not info["architectures"]:
        return [
            f"expected CUDA kernels for compute capability {listed}, got a CPU-only build; run:"
            f" TORCH_CUDA_ARCH_LIST='{listed}' {REBUILD}"
        ]
    if not CUDA_LIBRARY.is_file():
        return [f"expected {CUDA_LIBRARY}, got no such file; run: {REBUILD}"]
    found = []
    if torch_cuda is not None and info["cuda"] and _major(info["cuda"]) > _major(torch_cuda):
        found.append(
            f"expected kernels built with CUDA {_major(torch_cuda)} or older (torch uses CUDA {torch_cuda}), got CUDA"
            f" {info['cuda']}; run, with CUDA_HOME set to that of torch: {REBUILD}"
        )
    compiled = ", ".join([*(f"sm_{name}" for name in info["architectures"]), *(f"PTX {name}" for name in info["ptx"])])
    for index, (major, minor) in enumerate(capabilities):
        if not runs_on((major, minor), info["architectures"], info["ptx"]):
            found.append(
                f"expected CUDA kernels for compute capability {major}.{minor} (GPU {index}), got {compiled}; run:"
                f" TORCH_CUDA_ARCH_LIST='{listed}' {REBUILD}"
            )
    return found


def runs_on(capability: tuple[int, int], architectures: list[str], ptx: list[str]) -> bool:
    """Whether code of one of the architectures, or compiled from the PTX, runs on a device.

    Machine code for ``xy`` runs on ``x.y`` and later minor versions of the same major version, code for ``xya`` on
    ``x.y`` alone; PTX for ``xy`` runs on ``x.y`` and everything later.
    """
    for name in architectures:
        major, minor = divmod(int(name.rstrip("af")), 10)
        if major == capability[0] and (minor == capability[1] if name.endswith("a") else minor <= capability[1]):
            return True
    return any(divmod(int(name), 10) <= capability for name in ptx)


def capabilities() -> list[tuple[int, int]]:
    """Compute capability of each GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    # asked of the driver: torch would initialise CUDA, and a process that did cannot fork workers that use it
    driver, value = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()

    def ask(function: str, *arguments: int) -> int:
        status = getattr(driver, function)(ctypes.byref(value), *arguments)
        if status != 0:
            raise RuntimeError(f"sharedllm_ext: {function}: expected status 0 of the CUDA driver, got {status}")
        return value.value

    driver.cuInit(0)
    devices = [ask("cuDeviceGet", index) for index in range(torch.cuda.device_count())]
    major, minor = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    return [
        (ask("cuDeviceGetAttribute", major, device), ask("cuDeviceGetAttribute", minor, device)) for device in devices
    ]


def problems() -> list[str]:
    """Everything that does not fit between this build and what runs here; empty if all is well."""
    info = build_info()
    reason = broken(info)
    return [*([reason] if reason else []), *cuda_problems(info, capabilities())]


def registered(key: str) -> set[str]:
    """Operators with an implementation for a dispatch key such as CPU or CUDA."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {name.removeprefix("sharedllm::").split(".")[0] for name in names if name.startswith("sharedllm::")}


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _truncated(path: Path) -> str | None:
    """Loading a truncated library would end the process with a bus error; the section table is a whole one's end."""
    with path.open("rb") as file:
        header = file.read(64)
    if header[:5] != b"\x7fELF\x02":
        return None
    size, whole = path.stat().st_size, 64
    if len(header) == 64:
        (table,) = struct.unpack_from("<Q", header, 40)
        entry, entries = struct.unpack_from("<HH", header, 58)
        whole = table + entry * entries
    return None if size >= whole else f"file truncated: {size} of {counted(whole, 'byte')}"


def _load_library(path: Path, info: dict[str, Any]) -> None:
    try:
        truncated = _truncated(path)
        if truncated:
            raise OSError(truncated)
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"sharedllm_ext: expected {path}, built with torch {info['torch']} and CUDA {info['cuda'] or 'none'}, to"
            f" load in torch {torch.__version__} with CUDA {torch.version.cuda or 'none'}, got: {error}; run: {REBUILD}"
        ) from error


def _load() -> None:
    global _cpu_operators, _cuda_operators
    info = build_info()
    reason = broken(info)
    if reason:
        raise ImportError(f"sharedllm_ext: {reason}")
    _load_library(CPU_LIBRARY, info)
    _cpu_operators = frozenset(registered("CPU"))
    # neither this nor asking for the capabilities creates a CUDA context
    if torch.version.cuda is None or not info["architectures"] or not torch.cuda.is_available():
        return
    unfit = cuda_problems(info, capabilities())
    if unfit:
        text = f"sharedllm_ext: {'; '.join(unfit)}. Until then CUDA tensors take the plain PyTorch path"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return
    _load_library(CUDA_LIBRARY, info)
    _cuda_operators = frozenset(registered("CUDA"))


_load()

"""Finds torch, chooses the CUDA architectures and calls CMake; everything else is in pyproject.toml and CMakeLists.txt."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
STABLE_HEADER = Path("include/torch/csrc/stable/ops.h")
GIBIBYTE = 1 << 30


def say(text: str) -> None:
    print(f"sharedllm_ext: {text}", file=sys.stderr, flush=True)


def torch_in_environment() -> Path | None:
    """A usable torch of the environment that pip installs into; build isolation hides it from import, not from disk."""
    for kind in ("purelib", "platlib"):
        folder = Path(sysconfig.get_path(kind)) / "torch"
        if (folder / STABLE_HEADER).is_file():
            return folder
    return None


def find_torch() -> Path:
    folder = torch_in_environment()
    if folder is None:
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.origin is not None and (Path(spec.origin).parent / STABLE_HEADER).is_file():
            folder = Path(spec.origin).parent
    if folder is None:
        raise SystemExit("sharedllm_ext: expected torch 2.10 or newer, found none; run: pip install 'torch>=2.10'")
    return folder


def torch_has_cuda(folder: Path) -> bool:
    return re.search(r"^cuda[^=]*= *'", (folder / "version.py").read_text(), re.MULTILINE) is not None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for candidate in (home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    return None


def local_architectures() -> list[str]:
    """Compute capabilities of the GPUs here, as architectures; empty without a GPU."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        listing = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted({architecture(line.strip()) for line in listing.splitlines() if re.fullmatch(r"\d+\.\d+", line.strip())})


def architecture(capability: str) -> str:
    """'9.0' as CMake's '90a': the kernels for that chip use instructions that plain sm_90 lacks."""
    return "90a" if capability in ("9.0", "9.0a") else capability.replace(".", "")


def requested_architectures() -> list[str]:
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", ";").replace(" ", ";")
    names = [name for name in listed.split(";") if name]
    for name in names:
        if not re.fullmatch(r"\d+\.\d[a-f]?(\+PTX)?", name):
            raise SystemExit(f"sharedllm_ext: TORCH_CUDA_ARCH_LIST: expected entries such as 8.0 or 9.0a, got {name!r}")
    return [architecture(name.removesuffix("+PTX")) for name in names]


def cuda_architectures(torch_folder: Path | None) -> list[str]:
    """Architectures to build for; empty for a CPU-only build."""
    wish = os.environ.get("SHAREDLLM_CUDA", "auto").lower()
    if wish not in ("auto", "on", "off"):
        raise SystemExit(f"sharedllm_ext: SHAREDLLM_CUDA: expected auto, on or off, got {wish!r}")
    if wish == "off":
        say("CPU-only build, as asked for by SHAREDLLM_CUDA=off")
        return []
    requested, local = requested_architectures(), local_architectures()
    chosen = requested or local
    if not chosen:
        if wish == "on":
            raise SystemExit(
                "sharedllm_ext: SHAREDLLM_CUDA=on: expected a GPU or TORCH_CUDA_ARCH_LIST (such as '8.0;9.0a'), found neither"
            )
        say("CPU-only build: no GPU found and TORCH_CUDA_ARCH_LIST is not set")
        return []
    if wish == "auto" and not requested and torch_folder is not None and not torch_has_cuda(torch_folder):
        say(f"CPU-only build: there is a GPU, but the installed torch ({torch_folder}) is built without CUDA")
        return []
    if find_nvcc() is None:
        raise SystemExit(
            f"sharedllm_ext: expected nvcc to build CUDA kernels for {', '.join(chosen)}, found none on PATH, in CUDA_HOME or"
            " /usr/local/cuda. Install the CUDA toolkit (or set CUDA_HOME), or set SHAREDLLM_CUDA=off for a CPU-only build"
        )
    return chosen


def cutlass_headers() -> str | None:
    """CUTLASS headers: SHAREDLLM_CUTLASS_INCLUDE, or those in the nvidia-cutlass wheel."""
    given = os.environ.get("SHAREDLLM_CUTLASS_INCLUDE")
    if given:
        return given
    for folder in (*map(Path, sys.path), Path(sysconfig.get_path("purelib"))):
        headers = folder / "cutlass_library" / "source" / "include"
        if (headers / "cute" / "tensor.hpp").is_file():
            return str(headers)
    return None


def build_requirements() -> list[str]:
    torch_folder = torch_in_environment()
    needed = [] if torch_folder else ["torch>=2.10"]
    if cuda_architectures(torch_folder) and cutlass_headers() is None:
        needed.append("nvidia-cutlass>=4.2")
    return needed


def revision() -> str:
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def parallel_jobs() -> int:
    """MAX_JOBS, or as many as cores and free memory (2 GiB a job) allow."""
    asked = os.environ.get("MAX_JOBS")
    if asked:
        if not asked.isdigit() or int(asked) < 1:
            raise SystemExit(f"sharedllm_ext: MAX_JOBS: expected a positive number, got {asked!r}")
        return int(asked)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        free = 4 * GIBIBYTE
    return max(1, min(os.cpu_count() or 1, free // (2 * GIBIBYTE)))


class CMakeBuild(build_ext):
    """Builds and installs the libraries with CMake into the package folder."""

    def run(self) -> None:
        version = self.distribution.get_version()
        package = (ROOT / "python" if self.inplace else Path(self.build_lib).resolve()) / "sharedllm_ext"
        torch_folder = find_torch()
        architectures = cuda_architectures(torch_folder)
        build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.version_info.major}{sys.version_info.minor}"
        if not self.inplace:
            build = Path(self.build_temp).resolve() / "cmake"
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": str(package),
            "Python_EXECUTABLE": sys.executable,
            "SHAREDLLM_TORCH_DIR": str(torch_folder),
            "SHAREDLLM_ARCHITECTURES": ";".join(architectures),
            "SHAREDLLM_REVISION": revision(),
            "SHAREDLLM_VERSION": version,
        }
        if architectures:
            options["SHAREDLLM_CUTLASS_INCLUDE"] = cutlass_headers() or ""
            options["CMAKE_CUDA_COMPILER"] = find_nvcc() or "nvcc"
            say(f"building CUDA kernels for {', '.join(architectures)} with {find_nvcc()}")
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        subprocess.run(configure + [f"-D{name}={value}" for name, value in options.items()], check=True)
        subprocess.run(["cmake", "--build", str(build), "-j", str(parallel_jobs())], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)


def requirements() -> list[str]:
    # only the hooks that ask for requirements need them; SystemExit there would hide the message in pip's log
    return build_requirements()


setup(
    ext_modules=[Extension("sharedllm_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=requirements() if "egg_info" in sys.argv or "dist_info" in sys.argv else [],
)

"""Finds torch, chooses the CUDA architectures and calls CMake; the rest is in pyproject.toml and CMakeLists.txt."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
STABLE_HEADER = Path("include/torch/csrc/stable/ops.h")
OLDEST_TORCH = (2, 10)
GIBIBYTE = 1 << 30


def say(text: str) -> None:
    print(f"sharedllm_ext: {text}", file=sys.stderr, flush=True)


def stop(text: str) -> NoReturn:
    raise SystemExit(f"sharedllm_ext: {text}")


def site_folders() -> list[Path]:
    """Where the environment that pip installs into keeps its packages; build isolation hides them from import only."""
    folders = [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
    settings = Path(sys.prefix) / "pyvenv.cfg"
    if settings.is_file() and re.search(r"(?mi)^include-system-site-packages *= *true", settings.read_text()):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        folders += [sysconfig.get_path(kind, vars=base) for kind in ("purelib", "platlib")]
    return list(dict.fromkeys(map(Path, folders)))


def torch_version(folder: Path) -> str | None:
    try:
        found = re.search(r"^__version__ *= *'([^']+)'", (folder / "version.py").read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1] if found else None


def usable(folder: Path) -> bool:
    version = re.match(r"(\d+)\.(\d+)", torch_version(folder) or "")
    new_enough = version is not None and (int(version[1]), int(version[2])) >= OLDEST_TORCH
    return new_enough and (folder / STABLE_HEADER).is_file()


def torch_in_environment() -> Path | None:
    return next((folder / "torch" for folder in site_folders() if usable(folder / "torch")), None)


def find_torch() -> Path:
    """The torch to build with: the target environment's, or what build isolation installed."""
    candidates = [folder / "torch" for folder in (*site_folders(), *map(Path, filter(None, sys.path)))]
    for folder in candidates:
        if usable(folder):
            return folder
    old = [f"{torch_version(folder)} in {folder}" for folder in candidates if torch_version(folder)]
    stop(f"expected torch 2.10 or newer, found {', '.join(old) or 'none'}; run: pip install 'torch>=2.10'")


def torch_has_cuda(folder: Path) -> bool:
    return re.search(r"^cuda[^=]*= *'", (folder / "version.py").read_text(), re.MULTILINE) is not None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    # a home that was asked for is not replaced by another compiler
    candidates = [f"{home}/bin/nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((candidate for candidate in candidates if candidate and os.access(candidate, os.X_OK)), None)


def local_architectures() -> list[str]:
    """Compute capabilities of the GPUs here, as architectures; empty without a GPU."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        listing = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted(
        {architecture(line.strip()) for line in listing.splitlines() if re.fullmatch(r"\d+\.\d+", line.strip())}
    )


def architecture(capability: str) -> str:
    """'9.0' as CMake's '90a': the kernels for that chip may use instructions that plain sm_90 lacks."""
    return "90a" if capability in ("9.0", "9.0a") else capability.replace(".", "")


def requested_capabilities() -> list[str]:
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", ";").replace(" ", ";")
    names = [name for name in listed.split(";") if name]
    for name in names:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            stop(f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 8.0+PTX, got {name!r}")
    return names


def portable_code(architectures: list[str], requested: list[str]) -> list[str]:
    """Architectures to keep PTX of: those with +PTX, and the oldest one whose PTX runs on every newer GPU."""
    wanted = {name.removesuffix("+PTX").rstrip("af").replace(".", "") for name in requested if name.endswith("+PTX")}
    portable = [int(name) for name in architectures if name.isdigit()]
    wanted |= {str(min(portable))} if portable else set()
    return sorted(wanted, key=int)


def cuda_architectures(torch_folder: Path | None) -> list[str]:
    """Architectures to build for; empty for a CPU-only build."""
    wish = os.environ.get("SHAREDLLM_CUDA", "auto").lower()
    if wish not in ("auto", "on", "off"):
        stop(f"SHAREDLLM_CUDA: expected auto, on or off, got {wish!r}")
    if wish == "off":
        say("CPU-only build, as asked for by SHAREDLLM_CUDA=off")
        return []
    requested = [architecture(name.removesuffix("+PTX")) for name in requested_capabilities()]
    chosen = list(dict.fromkeys(requested)) or local_architectures()
    if not chosen:
        if wish == "on":
            stop("SHAREDLLM_CUDA=on: expected a GPU or TORCH_CUDA_ARCH_LIST (such as '8.0;9.0a'), found neither")
        say("CPU-only build: no GPU found and TORCH_CUDA_ARCH_LIST is not set")
        return []
    if wish == "auto" and not requested and torch_folder is not None and not torch_has_cuda(torch_folder):
        say(f"CPU-only build: there is a GPU, but the installed torch ({torch_folder}) is built without CUDA")
        return []
    if find_nvcc() is None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        places = f"in CUDA_HOME ({home})" if home else "on PATH or in /usr/local/cuda"
        stop(
            f"expected nvcc to build CUDA kernels for {', '.join(chosen)}, found none {places}. Install the CUDA"
            " toolkit or set CUDA_HOME to it; for a build without CUDA kernels set SHAREDLLM_CUDA=off"
        )
    return chosen


def cutlass_headers() -> str | None:
    """CUTLASS headers: SHAREDLLM_CUTLASS_INCLUDE, or those in the nvidia-cutlass wheel."""
    given = os.environ.get("SHAREDLLM_CUTLASS_INCLUDE")
    if given:
        if not (Path(given) / "cute" / "tensor.hpp").is_file():
            stop(f"SHAREDLLM_CUTLASS_INCLUDE: expected a folder with cute/tensor.hpp, got {given}")
        return given
    for folder in (*map(Path, filter(None, sys.path)), *site_folders()):
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
            stop(f"MAX_JOBS: expected a positive number, got {asked!r}")
        return int(asked)
    free = 4 * GIBIBYTE
    meminfo = Path("/proc/meminfo")
    available = re.search(r"MemAvailable: *(\d+) kB", meminfo.read_text()) if meminfo.is_file() else None
    if available:
        free = int(available[1]) * 1024
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
            headers = cutlass_headers()
            if headers is None:
                stop("expected CUTLASS headers for the CUDA kernels, found none; run: pip install nvidia-cutlass")
            options["SHAREDLLM_CUTLASS_INCLUDE"] = headers
            options["SHAREDLLM_PTX"] = ";".join(portable_code(architectures, requested_capabilities()))
            options["CMAKE_CUDA_COMPILER"] = find_nvcc() or "nvcc"
            say(f"building CUDA kernels for {', '.join(architectures)} with {find_nvcc()}")
        # --fresh: under build isolation the ninja and pybind11 that an earlier build cached no longer exist
        configure = ["cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        self.call(configure + [f"-D{name}={value}" for name, value in options.items()])
        self.call(["cmake", "--build", str(build), "-j", str(parallel_jobs())])
        if not architectures:
            # of an earlier build with CUDA; it would be loaded without having been built
            (package / "lib" / "libsharedllm_cuda.so").unlink(missing_ok=True)
        self.call(["cmake", "--install", str(build)])

    @staticmethod
    def call(command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            stop(f"expected {command[0]} on PATH, found none; run: pip install cmake ninja pybind11")
        except subprocess.CalledProcessError as error:
            stop(f"{' '.join(command[:4])} … failed with exit code {error.returncode}; its output is above")


# the hooks that ask for build requirements run egg_info or dist_info
asked_for_requirements = bool({"egg_info", "dist_info"} & set(sys.argv))
setup(
    ext_modules=[Extension("sharedllm_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=build_requirements() if asked_for_requirements else [],
)

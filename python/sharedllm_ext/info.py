"""``python -m sharedllm_ext.info``: versions, libraries, architectures, devices, and what is wrong if something is."""

import argparse
import importlib
import importlib.metadata
import json
import platform
import sys
from typing import Any

PACKAGES = ("torch", "transformers", "numpy", "safetensors", "triton")
OPERATORS = (
    "context_tree_split",
    "context_tree_select",
    "context_tree_layout",
    "node_vectors",
    "topk_nodes",
    "chunk_compression",
    "chunk_compression_backward",
    "injected_attention",
    "injected_attention_backward",
)


def collect() -> dict[str, Any]:
    """Everything that :func:`main` prints; never raises, what fails is listed under ``problems``."""
    report: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform(), "problems": []}
    report["packages"] = {name: _version(name) for name in PACKAGES}
    report["sharedllm_ext"] = importlib.import_module(__package__).__version__
    report["build"] = _attempt(report, "build information", lambda: dict(_library_module().build_info()))
    report["cpu_capability"] = _attempt(
        report, "CPU capability", lambda: importlib.import_module("._C", __package__).cpu_capability()
    )
    report["libraries"] = _attempt(report, "libraries", _libraries)
    report["devices"] = _attempt(report, "devices", _devices) or []
    report["operators"] = _attempt(report, "operators", _operators) or {}
    for problem in _attempt(report, "comparison of build and machine", lambda: _library_module().problems()) or []:
        report["problems"].append(problem)
    report["problems"] = list(dict.fromkeys(report["problems"]))
    return report


def main(argv: list[str] | None = None) -> int:
    """Print the report; exit code 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="sharedllm info", description="Show versions, libraries and devices.")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args(argv)
    report = collect()
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 1 if report["problems"] else 0
    build = report["build"] or {}
    print(f"sharedllm_ext   {report['sharedllm_ext']} (revision {build.get('revision', 'unknown')})")
    print(f"Python          {report['python']} on {report['platform']}")
    for name, version in report["packages"].items():
        print(f"{name:<15} {version or 'not installed'}")
    architectures = ", ".join(build.get("architectures", [])) or "none: CPU-only build"
    print(f"built with      torch {build.get('torch')}, {build.get('compiler')}, CUDA {build.get('cuda') or 'none'}")
    print(f"architectures   {architectures}")
    print(f"CPU kernels     {report['cpu_capability']}")
    for name, size in (report["libraries"] or {}).items():
        print(f"{name:<26} {'missing' if size is None else f'{size / 1e6:.2f} MB'}")
    for device in report["devices"] or ["no CUDA device"]:
        print(f"device          {device}")
    if report["operators"]:
        print(f"{'operator':<30} {'CPU':<12} CUDA")
        for name, paths in report["operators"].items():
            print(f"{name:<30} {paths['cpu']:<12} {paths['cuda']}")
    for problem in report["problems"]:
        print(f"PROBLEM         {problem}")
    if not report["problems"]:
        print("no problem found")
    return 1 if report["problems"] else 0


def _attempt(report: dict[str, Any], what: str, action: Any) -> Any:
    try:
        return action()
    except BaseException as error:  # a broken installation may raise anything, SystemExit included
        if isinstance(error, KeyboardInterrupt):
            raise
        report["problems"].append(f"{what}: {type(error).__name__}: {error}")
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _library_module() -> Any:
    return importlib.import_module("._library", __package__)


def _libraries() -> dict[str, int | None]:
    from pathlib import Path

    folder = Path(__file__).resolve().parent / "lib"
    names = ("libsharedllm_cpu.so", "libsharedllm_cuda.so")
    return {name: (folder / name).stat().st_size if (folder / name).is_file() else None for name in names}


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        found.append(
            f"{properties.name}, compute capability {properties.major}.{properties.minor},"
            f" {properties.multi_processor_count} multiprocessors, {memory:.0f} GiB"
        )
    return found


def _operators() -> dict[str, dict[str, str]]:
    library = _library_module()
    importlib.import_module(".ops", __package__)
    cpu, cuda = library.registered("CPU"), library.cuda_kernels()
    return {
        name: {
            "cpu": "C++ kernel" if name in cpu else "missing",
            "cuda": "CUDA kernel" if name in cuda else "plain PyTorch",
        }
        for name in OPERATORS
    }


if __name__ == "__main__":
    sys.exit(main())

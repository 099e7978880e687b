"""``python -m sharedllm_ext.info``: versions, libraries, architectures, devices, and what is wrong if something is."""

import argparse
import importlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from .counted import counted

PACKAGES = ("torch", "transformers", "numpy", "safetensors", "triton")
OPERATORS = (
    "context_tree_split",
    "context_tree_select",
    "context_tree_layout",
    "node_vectors",
    "node_vectors_backward",
    "tree_node_vectors",
    "topk_nodes",
    "chunk_compression",
    "chunk_compression_backward",
    "injected_attention",
    "injected_attention_backward",
    "injected_attention_8bit",
    "quantize_memory",
    "decode_linear",
    "decode_linear_fp8",
    "decode_append",
    "silu_product",
    "silu_product_fp8",
    "rms_norm",
    "rms_norm_fp8",
    "add_rms_norm",
    "add_rms_norm_fp8",
    "quantize_rows_fp8",
)


def collect() -> dict[str, Any]:
    """Everything that :func:`main` prints; never raises, what fails is listed under ``problems``."""
    report: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform(), "problems": []}
    report["packages"] = {name: _version(name) for name in PACKAGES}
    report["sharedllm_ext"] = importlib.import_module(__package__).__version__
    report["source_revision"] = _source_revision()
    report["libraries"] = _attempt(report, "libraries", _libraries) or {}
    compiled = _attempt(report, "compiled module", lambda: importlib.import_module("._C", __package__))
    if "torch" in sys.modules:
        # its own word names the CUDA version too
        report["packages"]["torch"] = sys.modules["torch"].__version__
    report["build"] = dict(compiled.build_info()) if compiled else None
    report["cpu_capability"] = compiled.cpu_capability() if compiled else None
    library = _attempt(report, "operators", lambda: importlib.import_module("._library", __package__))
    report["cpu"] = _attempt(report, "CPU instructions", _cpu) if compiled else None
    report["devices"] = _attempt(report, "devices", _devices) or []
    report["operators"] = (_attempt(report, "operators", lambda: _operators(library)) if library else None) or {}
    report["decoding_obstacle"] = _decoding_obstacle(report["devices"], report["operators"])
    missing = [name for name, paths in report["operators"].items() if paths["cpu"] == "missing"]
    if missing:
        report["problems"].append(f"CPU library: expected a kernel of every operator, got none of {', '.join(missing)}")
    if library:
        report["problems"] += _attempt(report, "comparison of build and machine", library.problems) or []
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
    print(f"sharedllm_ext   {report['sharedllm_ext']}, built from revision {build.get('revision', 'unknown')}")
    if report["source_revision"] not in (None, build.get("revision")):
        print(f"source          revision {report['source_revision']}, which is not the one that was built")
    print(f"Python          {report['python']} on {report['platform']}")
    for name, version in report["packages"].items():
        print(f"{name:<15} {version or 'not installed'}")
    if build:
        code = [*build["architectures"], *(f"PTX {name}" for name in build["ptx"])]
        print(f"built with      torch {build['torch']}, {build['compiler']}, CUDA {build['cuda'] or 'none'}")
        print(f"architectures   {', '.join(code) or 'none: CPU-only build'}")
        print(f"CPU             {report['cpu_capability']} instructions{_torch_instructions(report['cpu'])}")
    for name, size in report["libraries"].items():
        print(f"{name:<26} {'none' if size is None else f'{size / 1e6:.2f} MB'}")
    for device in report["devices"] or ["no CUDA device"]:
        print(f"device          {device}")
    if report["operators"]:
        print(f"{'operator':<30} {'CPU':<12} CUDA")
        for name, paths in report["operators"].items():
            print(f"{name:<30} {paths['cpu']:<12} {paths['cuda']}")
    obstacle = report["decoding_obstacle"]
    print(f"fast decoding   {'can run here' if obstacle is None else f'cannot run here: {obstacle}'}")
    print("                (of a model: sharedllm_ext.decoding_obstacle(model))")
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


def _source_revision() -> str | None:
    """Revision of the checkout that the package lies in; None for an installed package."""
    checkout = Path(__file__).resolve().parent.parent.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _libraries() -> dict[str, int | None]:
    folder = Path(__file__).resolve().parent / "lib"
    names = ("libsharedllm_cpu.so", "libsharedllm_cuda.so")
    return {name: (folder / name).stat().st_size if (folder / name).is_file() else None for name in names}


def _cpu() -> dict[str, Any]:
    import torch

    from .cpu import instructions, preferred_dtype

    used = instructions()
    dtype = preferred_dtype(torch.bfloat16)
    return {**used._asdict(), "bfloat16_checkpoints_run_in": str(dtype).removeprefix("torch.")}


def _torch_instructions(cpu: dict[str, Any] | None) -> str:
    if cpu is None:
        return ""
    has = "bfloat16 products" if cpu["bfloat16_products"] else "no bfloat16 products"
    runs = cpu["bfloat16_checkpoints_run_in"]
    return f"; PyTorch: {cpu['torch']}, {has}: the commands run bfloat16 checkpoints in {runs}"


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
            f" {counted(properties.multi_processor_count, 'multiprocessor')}, {memory:.0f} GiB"
        )
    return found


def _decoding_obstacle(devices: list[str], operators: dict[str, dict[str, str]]) -> str | None:
    """Why no model decodes by CUDA graphs here; ``None``: this machine and build can."""
    if not devices:
        return "expected a CUDA device, got none"
    needed = ("decode_linear", "decode_append", "injected_attention")
    missing = [name for name in needed if operators.get(name, {}).get("cuda") != "CUDA kernel"]
    return f"expected CUDA kernels of {', '.join(needed)}, got none of {', '.join(missing)}" if missing else None


def _operators(library: Any) -> dict[str, dict[str, str]]:
    importlib.import_module(".ops", __package__)
    cpu, cuda = library.cpu_kernels(), library.cuda_kernels()
    return {
        name: {
            "cpu": "C++ kernel" if name in cpu else "plain PyTorch",
            "cuda": "CUDA kernel" if name in cuda else "plain PyTorch",
        }
        for name in OPERATORS
    }


if __name__ == "__main__":
    sys.exit(main())

"""``python -m sharedllm_ext.info``: the report, and that it names what is wrong with a broken installation."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sharedllm_ext
from sharedllm_ext.info import OPERATORS, _decoding_obstacle

PACKAGE = Path(sharedllm_ext.__file__).resolve().parent


def info(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the program; with the copy of the package in ``folder`` if one is given."""
    environment = dict(os.environ)
    if folder is not None:
        environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, "-m", "sharedllm_ext.info", *arguments]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


def test_report_of_a_whole_installation() -> None:
    result = info("--json")
    report = json.loads(result.stdout)
    assert result.returncode == (1 if report["problems"] else 0), result.stderr
    if not torch.cuda.is_available():
        assert report["problems"] == [] and report["devices"] == []
    assert report["sharedllm_ext"] == sharedllm_ext.__version__
    assert report["packages"]["torch"] and report["packages"]["transformers"]
    assert report["libraries"]["libsharedllm_cpu.so"] > 0
    assert list(report["operators"]) == list(OPERATORS)
    for name in (
        "injected_attention",
        "injected_attention_backward",
        "chunk_compression",
        "node_vectors",
        "topk_nodes",
    ):
        assert report["operators"][name]["cpu"] == "C++ kernel"
    assert report["operators"]["rms_norm"]["cpu"] == "plain PyTorch"
    assert (report["decoding_obstacle"] is None) == torch.cuda.is_available()
    assert report["cpu"]["kernels"] == report["cpu_capability"]
    assert report["cpu"]["torch"] == torch.backends.cpu.get_cpu_capability()
    runs = "bfloat16" if report["cpu"]["bfloat16_products"] else "float32"
    assert report["cpu"]["bfloat16_checkpoints_run_in"] == runs
    for paths in report["operators"].values():
        assert paths["cpu"] in ("C++ kernel", "plain PyTorch") and paths["cuda"] in ("CUDA kernel", "plain PyTorch")


def test_text_of_a_whole_installation() -> None:
    result = info()
    assert result.returncode in (0, 1) and result.stderr == ""
    for line in (
        f"sharedllm_ext +{sharedllm_ext.__version__}",
        "Python ",
        "built with +torch",
        "architectures",
        "operator",
        "fast decoding +can",
    ):
        assert re.search(f"^{line}", result.stdout, re.MULTILINE), line
    ending = "no problem found" if result.returncode == 0 else "PROBLEM"
    assert ending in result.stdout.splitlines()[-1]


def test_what_keeps_decoding_slow_here() -> None:
    kernels = {name: {"cpu": "C++ kernel", "cuda": "CUDA kernel"} for name in OPERATORS}
    assert _decoding_obstacle([], kernels) == "expected a CUDA device, got none"
    assert _decoding_obstacle(["H100"], kernels) is None
    without = {**kernels, "decode_append": {"cpu": "plain PyTorch", "cuda": "plain PyTorch"}}
    assert str(_decoding_obstacle(["H100"], without)).endswith("got none of decode_append")


def no_libraries(package: Path) -> None:
    shutil.rmtree(package / "lib")


def truncated_library(package: Path) -> None:
    library = package / "lib" / "libsharedllm_cpu.so"
    library.write_bytes(library.read_bytes()[:4096])


def no_module(package: Path) -> None:
    for module in package.glob("_C*.so"):
        module.unlink()


def other_version(package: Path) -> None:
    module = package / "__init__.py"
    module.write_text(module.read_text().replace(f'"{sharedllm_ext.__version__}"', '"99.0.0"'))


def other_library(package: Path) -> None:
    # loads, but registers nothing
    shutil.copy(next(package.glob("_C*.so")), package / "lib" / "libsharedllm_cpu.so")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_libraries, r"expected .*libsharedllm_cpu\.so, got no such file; run: .+"),
        (
            truncated_library,
            r"expected .*libsharedllm_cpu\.so, built with torch .*, to load in torch .*, got: .*; run: .+",
        ),
        (no_module, r"_C"),
        (other_version, r"expected libraries of version 99\.0\.0 .*, got "),
        (other_library, r"sharedllm"),
    ],
)
def test_broken_installations_are_named(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    package = tmp_path / "sharedllm_ext"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "demo_model"))
    damage(package)
    for arguments in ((), ("--json",)):
        result = info(*arguments, folder=tmp_path)
        assert result.returncode == 1, result.stdout
        assert "Traceback" not in result.stderr
        if arguments:
            problems = json.loads(result.stdout)["problems"]
        else:
            problems = re.findall(r"^PROBLEM +(.*)$", result.stdout, re.MULTILINE)
        assert any(re.search(message, problem) for problem in problems), problems
        assert "Python" in result.stdout or "python" in result.stdout

"""The build: rules of the native tree, schemas, build information, architectures, paths named in the documentation."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sharedllm_ext
from sharedllm_ext import _library
from sharedllm_ext.info import OPERATORS
from tests import instances

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
NATIVE = sorted(
    path for path in CSRC.rglob("*") if path.suffix in (".cpp", ".h", ".inl", ".cu", ".cuh") and path.is_file()
)
TORCH_HEADER = re.compile(r"^(torch|ATen|c10|aten)/")


def without_comments(path: Path) -> str:
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.DOTALL)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', without_comments(path), re.MULTILINE)


def inside(path: Path, name: str) -> Path | None:
    """The file of the tree that an #include means; None for headers from elsewhere."""
    return next((found.resolve() for found in (path.parent / name, CSRC / name) if found.is_file()), None)


def torch_headers(path: Path) -> list[str]:
    """Chains of #include, within the tree, that end at a header of torch."""
    found, todo, seen = [], [(path, [path.name])], {path}
    while todo:
        file, chain = todo.pop()
        for name in includes(file):
            if TORCH_HEADER.match(name):
                found.append(" -> ".join([*chain, name]))
            target = inside(file, name)
            if target is not None and target not in seen:
                seen.add(target)
                todo.append((target, [*chain, name]))
    return found


def test_no_torch_header_is_reachable_from_cuda_files() -> None:
    kernels = [path for path in NATIVE if path.suffix in (".cu", ".cuh")]
    assert any(path.suffix == ".cu" for path in kernels)
    assert [chain for path in kernels for chain in torch_headers(path)] == []
    # the search itself finds what it looks for
    assert torch_headers(CSRC / "ops" / "topk_nodes.cpp")


def test_host_files_use_the_stable_headers_only() -> None:
    allowed = re.compile(r"^torch/(csrc/stable|csrc/inductor/aoti_torch/c|headeronly)/")
    unstable = [
        f"{path.name}: {name}"
        for path in NATIVE
        for name in includes(path)
        if TORCH_HEADER.match(name) and not allowed.match(name)
    ]
    assert unstable == []


def test_nothing_ends_the_process() -> None:
    ending = re.compile(r"\b(?:std::)?(?:_?exit|_Exit|quick_exit|abort|terminate|raise|assert)\s*\(")
    assert [path.name for path in NATIVE if ending.search(without_comments(path))] == []


def test_checks_that_hold_format_nothing() -> None:
    # arguments are made whether a check holds or not: numbers, literals and shape_text, which formats when written
    text = without_comments(CSRC / "common" / "checks.h")
    assert "inline ShapeText<Sizes> shape_text(const Sizes& sizes)" in text
    for path in NATIVE:
        for call in re.findall(r"\bcheck\([^;]*;", without_comments(path)):
            assert not re.search(r"to_string|\.str\(\)|std::string|stringstream|format\(", call), f"{path.name}: {call}"


def test_every_native_file_is_built() -> None:
    named = (ROOT / "cmake" / "SharedLLMSources.cmake").read_text() + (ROOT / "CMakeLists.txt").read_text()
    sources = {path.relative_to(ROOT).as_posix() for path in NATIVE if path.suffix in (".cpp", ".cu")}
    assert set(re.findall(r"csrc/[\w/]+\.(?:cpp|cu)\b", named)) == sources
    included = {inside(path, name) for path in NATIVE for name in includes(path)}
    included |= {(CSRC / "kernels" / header).resolve() for row in instances.table() for header in row.headers}
    headers = [path for path in NATIVE if path.suffix not in (".cpp", ".cu")]
    assert [path.name for path in headers if path.resolve() not in included] == []


def test_table_of_kernel_instances() -> None:
    rows = instances.table()
    files = [file for row in rows for file in row.files]
    assert len(files) == len(set(files))
    for row in rows:
        assert row.variable in ("SHAREDLLM_CUDA_SOURCES", "SHAREDLLM_SM90_SOURCES")
        text = "".join(without_comments(CSRC / "kernels" / header) for header in row.headers)
        for launcher in row.launchers:
            name = launcher.split("::")[-1]
            definition = rf"cudaError_t {name}\(const {row.params}& \w+,\s+cudaStream_t stream\) \{{"
            assert re.search(definition, text), launcher


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_files_of_kernel_instances(tmp_path: Path) -> None:
    def write() -> dict[str, tuple[int, str]]:
        subprocess.run(["cmake", "-P", str(instances.TABLE)], cwd=tmp_path, check=True, timeout=60)
        return {path.name: (path.stat().st_mtime_ns, path.read_text()) for path in (tmp_path / "instances").iterdir()}

    files = write()
    assert sorted(files) == sorted(file for row in instances.table() for file in row.files)
    assert files["node_vectors_64_2.cu"][1] == '#include "kernels/node_vectors.cuh"\n\n' + "".join(
        f"template cudaError_t sharedllm::node_vectors::launch_tensor<{kind}, 64, 2>(\n"
        "    const sharedllm::NodeVectorsParams&, cudaStream_t);\n"
        for kind in ("__nv_bfloat16", "__half")
    )
    assert files["injected_attention_decode_bf16_96.cu"][1].count("<__nv_bfloat16, 96>") == 2
    assert "sharedllm::launch_decode_linear_of<float>(" in files["decode_linear_fp32.cu"][1]
    # configured again, nothing is compiled again
    assert write() == files


ASSEMBLER = re.compile(r"\b(?:asm|__asm__)\b")
FULL_WARP = re.compile(r"__(?:shfl\w*|ballot|any|all|reduce\w*|match\w*|sync)(?:_sync|warp)\(\s*(?:0x|~|-1)")


def test_instructions_and_constants_have_one_home() -> None:
    kernels = [path for path in NATIVE if path.suffix in (".cu", ".cuh")]
    common = CSRC / "kernels" / "common"
    texts = {path.relative_to(common.parent).as_posix(): without_comments(path) for path in kernels}
    with_assembler = {name for name, text in texts.items() if ASSEMBLER.search(text)}
    assert with_assembler and all(name.startswith("common/") for name in with_assembler)
    assert [name for name, text in texts.items() if "griddepcontrol" in text] == ["common/overlap.cuh"]
    assert [name for name, text in texts.items() if re.search(r"\b1\.4426|\b0\.6931", text)] == ["common/softmax.cuh"]
    assert [name for name, text in texts.items() if FULL_WARP.search(text)] == []
    assert FULL_WARP.search("__shfl_xor_sync(0xffffffffu, x, 1)") and FULL_WARP.search("__syncwarp(0xffffffffu)")


def library_schemas() -> dict[str, str]:
    found = {}
    for definition in re.findall(r"m\.def\((.*?)\);", without_comments(CSRC / "library.cpp"), re.DOTALL):
        text = "".join(re.findall(r'"([^"]*)"', definition))
        found[text.split("(")[0]] = text
    return found


def test_schemas_are_those_of_the_loaded_library() -> None:
    schemas = library_schemas()
    assert sorted(schemas) == sorted(OPERATORS)
    for name, text in schemas.items():
        loaded = getattr(torch.ops.sharedllm, name).default._schema
        assert str(loaded) == str(torch._C.parse_schema(f"sharedllm::{text}"))
    assert _library.registered("CPU") >= set(OPERATORS)
    # where the CUDA library is not loaded, plain PyTorch is registered instead
    assert _library.registered("CUDA") >= set(OPERATORS)


def test_build_information() -> None:
    info = _library.build_info()
    assert info["version"] == sharedllm_ext.__version__
    assert re.match(r"\d+\.\d+", info["torch"]) and info["compiler"] and info["revision"]
    assert bool(info["cuda"]) == bool(info["architectures"])
    assert _library.broken(info) is None


@pytest.mark.parametrize(
    ("capability", "architectures", "ptx", "runs"),
    [
        ((8, 0), ["80"], [], True),
        ((8, 6), ["80"], [], True),
        ((8, 0), ["86"], [], False),
        ((9, 0), ["80"], [], False),
        ((9, 0), ["90"], [], True),
        ((9, 0), ["80", "90a"], [], True),
        ((9, 1), ["90a"], [], False),
        ((10, 0), ["80", "90a"], [], False),
        ((10, 0), ["80", "90a"], ["80"], True),
        ((7, 5), ["80"], ["80"], False),
        ((12, 1), ["120"], [], True),
        ((9, 0), [], [], False),
    ],
)
def test_runs_on(capability: tuple[int, int], architectures: list[str], ptx: list[str], runs: bool) -> None:
    assert _library.runs_on(capability, architectures, ptx) is runs


def test_what_does_not_fit_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = {
        "version": sharedllm_ext.__version__,
        "revision": "abc",
        "torch": "2.13.0",
        "cuda": "13.0.88",
        "architectures": ["80"],
        "ptx": [],
    }
    old = _library.broken({**info, "version": "0.0.1"})
    assert old is not None and f"expected libraries of version {sharedllm_ext.__version__}" in old and "0.0.1" in old
    older_torch = _library.broken(info, "2.9.1+cpu")
    assert older_torch is not None and "expected torch 2.10 or newer" in older_torch and "got 2.9.1+cpu" in older_torch
    assert _library.broken(info, "2.10.0") is None
    assert _library.cuda_problems(info, []) == []
    (cpu_only,) = _library.cuda_problems({**info, "architectures": []}, [(9, 0)])
    assert "got a CPU-only build; run: TORCH_CUDA_ARCH_LIST='9.0'" in cpu_only
    monkeypatch.setattr(_library, "CUDA_LIBRARY", tmp_path / "libsharedllm_cuda.so")
    (missing,) = _library.cuda_problems(info, [(8, 0)])
    assert "libsharedllm_cuda.so, got no such file" in missing
    _library.CUDA_LIBRARY.touch()
    assert _library.cuda_problems(info, [(8, 0), (8, 6)], "13.0") == []
    (unfit,) = _library.cuda_problems(info, [(8, 0), (9, 0)], "13.0")
    assert "for compute capability 9.0 (GPU 1), got sm_80; run: TORCH_CUDA_ARCH_LIST='8.0;9.0'" in unfit
    (newer,) = _library.cuda_problems(info, [(8, 0)], "12.8")
    assert "expected kernels built with CUDA 12 or older" in newer and "got CUDA 13.0.88" in newer


def build(tmp_path: Path, smi: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """``setup.py build_ext`` without nvcc and with the GPUs that ``smi`` lists."""
    programs = tmp_path / "programs"
    programs.mkdir()
    if smi is not None:
        program = programs / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho {smi}\n")
        program.chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if key not in ("SHAREDLLM_CUDA", "TORCH_CUDA_ARCH_LIST")}
    clean |= {"PATH": f"{programs}:/bin:/usr/bin", "CUDA_HOME": str(tmp_path / "no_cuda"), **environment}
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path / "temp"), "--build-lib"]
    return subprocess.run(
        [*command, str(tmp_path / "lib")], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("smi", "environment", "message"),
    [
        ("9.0", {"SHAREDLLM_CUDA": "on"}, "expected nvcc to build CUDA kernels for 90a, found none in CUDA_HOME"),
        (None, {"TORCH_CUDA_ARCH_LIST": "8.0;9.0a"}, "expected nvcc to build CUDA kernels for 80, 90a, found none"),
        (
            None,
            {"TORCH_CUDA_ARCH_LIST": "Hopper"},
            "TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 8.0+PTX, got 'Hopper'",
        ),
        (None, {"SHAREDLLM_CUDA": "maybe"}, "SHAREDLLM_CUDA: expected auto, on or off, got 'maybe'"),
    ],
)
def test_what_cannot_be_built_is_an_error(
    smi: str | None, environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    result = build(tmp_path, smi, **environment)
    assert result.returncode != 0
    assert f"sharedllm_ext: {message}" in result.stderr
    assert not (tmp_path / "temp").exists()
    if "nvcc" in message:
        assert "Install the CUDA toolkit or set CUDA_HOME" in result.stderr and "SHAREDLLM_CUDA=off" in result.stderr


DOCUMENTS = [
    path
    for path in (
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        ROOT / "CONTRIBUTING.md",
        CSRC / "README.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/*/README.md"),
    )
    if path.is_file()
]


def links(text: str) -> list[str]:
    """Targets of relative links."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]


def named_paths(text: str) -> list[str]:
    """Paths of this tree, in code or prose: what begins with one of its folders."""
    folders = r"(?:\.ci|benchmarks|cmake|csrc|docs|examples|python|tests)"
    return [path.rstrip(".") for path in re.findall(rf"(?<![\w./<>-]){folders}/[\w./*<>-]*", text)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_paths_in_the_documentation_exist(document: Path) -> None:
    text = document.read_text()
    assert [target for target in links(text) if not (document.parent / target).exists()] == []
    # <op> and * stand for any name
    patterns = {path: re.sub(r"<\w+>", "*", path).rstrip("/") for path in named_paths(text)}
    assert [path for path, pattern in patterns.items() if not any(ROOT.glob(pattern))] == []

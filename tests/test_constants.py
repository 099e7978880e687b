"""Numbers and names that Python and C++ both have: each pair is compared, so that none of them drifts."""

import ast
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sharedllm_ext
from sharedllm_ext._library import CUDA_LIBRARY
from sharedllm_ext.info import OPERATORS
from sharedllm_ext.ops import _checks, _dispatch, decode_step
from sharedllm_ext.reference import fused_layer, memory_quantization
from tests import instances

CSRC = Path(__file__).resolve().parents[1] / "csrc"
# in sharedllm_ext.ops these names are the functions
attention_module, node_vectors_module, topk_module = (
    importlib.import_module(f"sharedllm_ext.ops.{name}")
    for name in ("injected_attention", "node_vectors", "topk_nodes")
)


def found(file: str, pattern: str) -> list[str]:
    """What the group of a pattern matches in a file of the native tree, comments left out."""
    text = re.sub(r"//[^\n]*", "", (CSRC / file).read_text())
    matches = re.findall(pattern, text)
    assert matches, f"{file}: expected {pattern}, got nothing like it"
    return matches


def constant(file: str, name: str) -> float:
    """Value of a constexpr number, a literal with at most one shift."""
    (text,) = found(file, rf"constexpr \w+ {name} = ([^;]+);")
    base, _, shift = text.partition(" << ")
    return float(base.rstrip("f")) * 2 ** int(shift or 0)


CONSTANTS = [
    (attention_module.TENSOR_CORE_UNIT, "ops/injected_attention.cpp", "kUnit"),
    (attention_module.MAX_CUDA_HEAD_SIZE, "kernels/injected_attention/generic/forward.h", "kGenericMaxHeadSize"),
    (node_vectors_module.CUDA_KERNEL_MAX_SIZE, "kernels/node_vectors.h", "kNodeVectorsMaxSize"),
    (node_vectors_module.MAX_LEVELS, "kernels/node_vectors.h", "kNodeVectorsMaxLevel"),
    (node_vectors_module.MAX_LEVELS, "cpu/node_vectors.cpp", "kMaxLevels"),
    (topk_module.CUDA_KERNEL_MAX_K, "kernels/topk_nodes.h", "kTopkNodesMaxK"),
    (decode_step.MATRICES, "kernels/decode_linear.h", "kDecodeLinearMatrices"),
    (fused_layer.LARGEST_CODE, "kernels/fused_layer.cu", "kLargestCode"),
    (fused_layer.SMALLEST, "kernels/fused_layer.cu", "kSmallest"),
    (memory_quantization.LARGEST_CODE, "kernels/memory_quantization.cu", "kLargestCode"),
    (memory_quantization.SMALLEST, "kernels/memory_quantization.cu", "kSmallest"),
]


@pytest.mark.parametrize(("value", "file", "name"), CONSTANTS, ids=[f"{file}: {name}" for _, file, name in CONSTANTS])
def test_numbers(value: float, file: str, name: str) -> None:
    assert constant(file, name) == value


def test_paths_in_their_order() -> None:
    (names,) = found("ops/injected_attention.cpp", r"enum class Path : int \{ ([^}]*) \};")
    assert tuple(name.removeprefix("k").lower() for name in names.split(", ")) == attention_module.PATHS


def test_function_that_forces_a_path() -> None:
    source = inspect.getsource(attention_module.injected_attention_path)
    (name,) = found("ops/injected_attention.cpp", r'extern "C" [^\n]* int (\w+)\(int path\)')
    assert f".{name}\n" in source
    if CUDA_LIBRARY.is_file():
        assert name.encode() in CUDA_LIBRARY.read_bytes()


def test_head_sizes_of_the_tensor_cores() -> None:
    (sizes,) = found("ops/injected_attention.cpp", r"for \(const int32_t columns : \{([^}]*)\}\)")
    assert tuple(map(int, sizes.split(", "))) == attention_module.TENSOR_CORE_HEAD_SIZES
    # a kernel is there for each of them, in both element types
    for kernel in (
        "injected_attention_portable_instance",
        "injected_attention_decode_portable",
        "injected_attention_decode_8bit_portable",
        "injected_attention_backward_portable_instance",
        "injected_attention_sm90_instance",
        "query_gradient",
    ):
        rows = [row for row in instances.table() if f"launch_{kernel}" in row.launchers]
        assert {row.types for row in rows} == {("bf16", "fp16")}, kernel
        sizes = [int(size) for row in rows for size in row.sizes]
        assert sizes == list(attention_module.TENSOR_CORE_HEAD_SIZES), kernel


@pytest.mark.parametrize(
    ("kernel", "sizes"),
    [
        # TMA's swizzle takes pieces of 128 bytes: D 96 has an instance that refuses, so that the choice needs no case
        ("decode_bulk", attention_module.TENSOR_CORE_HEAD_SIZES),
        ("bulk_sm90_instance", (64, 96, 128)),
        ("chained_sm90_instance", (128,)),
    ],
)
def test_head_sizes_of_single_kernels(kernel: str, sizes: tuple[int, ...]) -> None:
    rows = [row for row in instances.table() if f"launch_injected_attention_{kernel}" in row.launchers]
    assert {row.types for row in rows} == {("bf16", "fp16")}
    assert [size for row in rows for size in row.sizes] == list(map(str, sizes))


def test_instances_of_node_vectors() -> None:
    # head size and columns of tiles
    declared = found("kernels/node_vectors.cu", r"launch_tensor<T, (\d+, \d)>\(const")
    assert {int(pair.split(",")[0]) for pair in declared} == set(attention_module.TENSOR_CORE_HEAD_SIZES)
    assert found("kernels/node_vectors.cu", r"return launch_tensor<T, (\d+, \d)>\(p") == declared
    (row,) = (row for row in instances.table() if row.name == "node_vectors")
    assert row.types == ("bf16", "fp16") and [size.replace("_", ", ") for size in row.sizes] == declared


def test_element_types_of_the_cuda_kernels() -> None:
    (function,) = found("ops/common/cuda_checks.h", r"inline FloatType float_type\([^)]*\) \{([\s\S]*?)\n\}")
    names = {"Float": torch.float32, "BFloat16": torch.bfloat16, "Half": torch.float16}
    assert [names[name] for name in re.findall(r"case \S*::(\w+):", function)] == list(_dispatch.CUDA_KERNEL_DTYPES)


def calls(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A call of each operator with a CPU kernel of its own, over tensors of the dtype."""
    x, keys, pair = torch.ones(1, 1, 2, dtype=dtype), torch.ones(2, 1, 2, dtype=dtype), torch.tensor([[0, 2]])
    tables = torch.ones(2, 1), torch.zeros(2, 1)
    one, bounds = torch.tensor([0]), torch.tensor([0, 1])
    kept = (None, None, torch.tensor([0, 1]), torch.tensor([0, 1]))
    operators = torch.ops.sharedllm
    rows = (bounds, pair, one, *tables)
    lse = torch.ones(1, 1)
    return {
        "injected_attention": lambda: operators.injected_attention(x, keys, keys, *rows, 1.0),
        "injected_attention_backward": lambda: operators.injected_attention_backward(
            x, None, x, keys, keys, x, lse, *rows, 1.0, True
        ),
        "node_vectors": lambda: operators.node_vectors(x, keys, keys, pair, *tables, 1.0),
        "tree_node_vectors": lambda: operators.tree_node_vectors(
            x.expand(1, 2, 2).unsqueeze(2), keys, keys, pair, *tables, 1, 1.0
        ),
        "topk_nodes": lambda: operators.topk_nodes(keys[0], keys[:, 0], torch.tensor([0, 2]), one, 1, None, 1e-6),
        "chunk_compression": lambda: operators.chunk_compression(None, keys, keys, *tables, *kept),
        "chunk_compression_backward": lambda: operators.chunk_compression_backward(
            None, None, keys, keys, *tables, *kept, 2
        ),
    }


@pytest.mark.parametrize("dtype", _checks.FLOATS, ids=str)
@pytest.mark.parametrize("name", calls(torch.float32))
def test_element_types_of_the_cpu_kernels(name: str, dtype: torch.dtype) -> None:
    call = calls(dtype)[name]
    if dtype in _checks.CPU_KERNEL_DTYPES:
        call()
    else:
        with pytest.raises((TypeError, ValueError, RuntimeError), match="expected dtype Float or BFloat16, got "):
            call()


def test_levels_of_the_loaded_library() -> None:
    keys, tables = torch.ones(2, 1, 2), (torch.ones(2, 1), torch.zeros(2, 1))
    none = torch.empty(0, 2, dtype=torch.int64)

    def call(levels: int) -> torch.Tensor:
        q = torch.ones(0, 2**levels, 1, 2)
        return torch.ops.sharedllm.tree_node_vectors(q, keys, keys, none, *tables, levels, 1.0)

    most = node_vectors_module.MAX_LEVELS
    assert call(most).shape == (0, 2 ** (most + 1) - 2, 1, 2)
    with pytest.raises(ValueError, match=f"levels: expected 1 to {most}, got {most + 1}"):
        call(most + 1)


def fakes() -> dict[str, list[str]]:
    """Parameters of every fake, by its operator."""
    found = {}
    for file in Path(sharedllm_ext.ops.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                name = re.fullmatch(r"torch\.library\.register_fake\('sharedllm::(\w+)'\)", ast.unparse(decorator))
                if name:
                    found[name[1]] = [argument.arg for argument in node.args.args]
    return found


def test_fakes_take_the_arguments_of_the_schema() -> None:
    schemas = {name: getattr(torch.ops.sharedllm, name).default._schema for name in OPERATORS}
    assert fakes() == {name: [argument.name for argument in x.arguments] for name, x in schemas.items()}

"""The Python package's shape: imports go one way, no file is long, nothing is imported where it cannot be seen."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sharedllm_ext

PACKAGE = Path(sharedllm_ext.__file__).parent
LONGEST = 500
#: Modules from the lowest to the highest: each may import those of lines above its own, and of its own line.
ORDER = """
_C, counted
_library, cpu
reference.*
ops._autocast, ops._checks
ops.*
model.raw_bytes
model.cache_name, model.stopwatch, model.upload, model.protocols, model.peft_defaults, model.memory_file
model.word_index, model.memory_rows, model.joins
model.signature_fields, model.hooks, model.sources, model.memory_writer, model.page_files
model.pages, model.fp8_linear
model.memory_tiers
model.families
model.configuration, model.layer_math, model.managed_layers, model.chunks, model.collator, model.reading
model.rotary, model.module_facts
model.examined
model.lower_model
model.tree
model.compressor
model.levels
model.pick
model.signature, model.training_mark, model.storage
model.memory_fields
model.memory, model.inputs
model.cached_memory, model.injection, model.micro_batches, model.split, model.loading, model.outputs, model.pick_index
model.file_description
model.context_index, model.picked_memory, model.tiered_document
model.tiered_memory
model.tiered_appending
model.split_prompt, model.gguf_checkpoint, model.passages, model.appending, model.adapter
model.passage_reading
model.compression, model.base_checkpoint, model.decoding.*
model.indexing, model.decoder_precision
model.generation, model.slow_paths
model.modeling
model.conversation, model.published
model.registered
model.__init__
__init__
distributed.ranks, distributed.shares
distributed.sharded_memory
distributed.compression
distributed.__init__
reference.model
info, evaluation.*
training.wordings, training.sources, training.prompt, training.sharding
training.trained
training.data
training.losses, training.flops, training.checkpoint
training.loop
training.*
cli.*
__main__
"""
HELP = "the programs' help is instant: torch, Transformers and numpy come when a command runs"
#: Modules with imports inside of functions, and why.
LATE = {
    "__init__": HELP,
    "_library": "the compiled module may be missing, which is said in words",
    "cpu": "the compiled module may be missing",
    "info": "it reports what cannot be imported",
    "evaluation.passage_search": "sentence-transformers is an optional package",
    "evaluation.peak_memory": "the system's resource module is there on Unix alone",
    "model.__init__": "what describes a file of a memory needs no Transformers, which takes seconds to import",
    "model.gguf_checkpoint": "gguf and accelerate are optional packages",
    "training.trained": "peft is an optional package",
    "training.sharding": "PyTorch's sharding modules take a second to import, and few runs need them",
    "cli._adapter": HELP,
    "cli._common": HELP,
    "cli._contexts": HELP,
    "cli._eval_report": "matplotlib is an optional package",
    "cli._processes": HELP,
    "cli._standard_library": HELP,
    "cli.ask": HELP,
    # also readline, which some systems lack
    "cli.chat": HELP,
    "cli.demo": HELP,
    "cli.eval": HELP,
    "cli.info": HELP,
    "cli.init": HELP,
    "cli.needle": HELP,
    # also matplotlib, an optional package
    "cli.perplexity": HELP,
    "cli.train": HELP,
}


def _name(path: Path) -> str:
    """Dotted name below the package; of a folder that of its ``__init__``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
# the extension is no Python file
MODULES = {*FILES, "_C"}


def _module(dotted: str) -> str | None:
    """The package's module of that name, ``None`` for another."""
    return next((name for name in (dotted, f"{dotted}.__init__".lstrip(".")) if name in MODULES), None)


def _imports(name: str) -> Iterator[tuple[str, int, bool]]:
    """Modules of the package that a module imports, the line, and whether that stands inside of a function."""
    tree = ast.parse(FILES[name].read_text())
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    package = name.split(".")[:-1]
    for node in ast.walk(tree):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names if alias.name.startswith("sharedllm_ext")]
            targets = [one.removeprefix("sharedllm_ext").lstrip(".") for one in named]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif node.module is not None and node.module.split(".")[0] == "sharedllm_ext":
                base = []
            else:
                continue
            own = node.module or ""
            own = own if node.level else own.removeprefix("sharedllm_ext").lstrip(".")
            stem = ".".join([*base, *([own] if own else [])])
            for alias in node.names:
                if not stem and alias.name == "__version__":
                    # the front has it before it imports anything
                    continue
                within = _module(f"{stem}.{alias.name}".lstrip("."))
                targets.append(f"{stem}.{alias.name}".lstrip(".") if within else stem)
        for target in targets:
            found = _module(target)
            assert found is not None, f"{name}:{node.lineno}: expected a module of the package, got {target!r}"
            if found != name:
                yield found, node.lineno, node in inside


EDGES = {name: list(_imports(name)) for name in FILES}


def _level(name: str) -> int:
    """The line of :data:`ORDER` that names a module; a name of its own counts before a star."""
    levels = [line.replace(" ", "").split(",") for line in ORDER.strip().splitlines()]
    named = [level for level, entries in enumerate(levels) if name in entries]
    starred = [
        level
        for level, entries in enumerate(levels)
        if any(entry.endswith(".*") and name.startswith(entry[:-1]) for entry in entries)
    ]
    assert named or starred, f"{name}: expected a line of ORDER for every module, got none"
    return (named or starred)[0]


def test_every_module_has_a_place() -> None:
    assert all(_level(name) >= 0 for name in MODULES)
    entries = [entry for line in ORDER.strip().splitlines() for entry in line.replace(" ", "").split(",")]
    gone = [entry for entry in entries if not entry.endswith("*") and entry not in MODULES]
    assert not gone and len(entries) == len(set(entries))


@pytest.mark.parametrize("name", list(FILES))
def test_imports_do_not_go_up(name: str) -> None:
    up = [f"line {line}: {other}" for other, line, _ in EDGES[name] if _level(other) > _level(name)]
    assert not up, f"{name}: expected imports of what stands below it, got {', '.join(up)}"


def test_there_is_no_cycle() -> None:
    state: dict[str, int] = {}

    def visit(name: str, path: list[str]) -> None:
        if state.get(name) == 1:
            raise AssertionError(f"expected no circle of imports, got {' -> '.join([*path[path.index(name) :], name])}")
        if name in state or name not in EDGES:
            return
        state[name] = 1
        for other, _, _ in EDGES[name]:
            visit(other, [*path, name])
        state[name] = 2

    for name in EDGES:
        visit(name, [])


@pytest.mark.parametrize("name", list(FILES))
def test_no_file_is_long(name: str) -> None:
    lines = len(FILES[name].read_text().splitlines())
    assert lines <= LONGEST, f"{name}: expected at most {LONGEST} lines, got {lines}"


def _is_import(node: ast.AST) -> bool:
    """Whether a node imports, be it by a call."""
    if isinstance(node, ast.Call):
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
        return name in ("import_module", "__import__")
    return isinstance(node, (ast.Import, ast.ImportFrom))


def _late(name: str) -> list[int]:
    """Lines of a module's imports inside of functions."""
    tree = ast.parse(FILES[name].read_text())
    return sorted(
        {
            node.lineno
            for function in ast.walk(tree)
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for node in ast.walk(function)
            if isinstance(node, (ast.stmt, ast.expr)) and _is_import(node)
        }
    )


@pytest.mark.parametrize("name", list(FILES))
def test_imports_stand_where_they_can_be_seen(name: str) -> None:
    late = _late(name)
    assert not late or name in LATE, f"{name}: expected imports at the top of the file, got ones in lines {late}"


def test_the_reasons_are_still_needed() -> None:
    gone = [name for name in LATE if name not in FILES or not _late(name)]
    assert not gone, f"expected an import inside of a function in each module of LATE, got none in {', '.join(gone)}"


def test_the_help_is_a_reason_only_where_the_help_imports() -> None:
    """What the help does not import may import what it likes at the top."""
    code = (
        "import sys; sys.argv = ['sharedllm', '--help']; from sharedllm_ext.cli import main; assert main() == 0;"
        "own = [module for name, module in sys.modules.items() if name.startswith('sharedllm_ext')];"
        "print(*(module.__file__ for module in own), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    lines = [Path(line) for line in done.stdout.splitlines() if line.endswith(".py")]
    imported = {_name(path) for path in lines if path.is_relative_to(PACKAGE)}
    assert "cli.__init__" in imported
    needless = [name for name, reason in LATE.items() if reason == HELP and name not in imported]
    assert not needless, f"expected modules that --help imports, got {', '.join(needless)}"


def test_only_one_file_overrides_transformers_generation() -> None:
    """One file to change for a new Transformers: private methods of its generation are overridden nowhere else."""
    from transformers.generation import GenerationMixin

    private = {name for name in vars(GenerationMixin) if name.startswith("_") and not name.startswith("__")}
    for name, path in FILES.items():
        defined = {
            item.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ClassDef)
            for item in node.body
            if isinstance(item, ast.FunctionDef)
        }
        assert name == "model.generation" or not defined & private, name
    assert any("_prepare_cache_for_generation" in path.read_text() for path in FILES.values())

"""The Python package's shape: imports go one way, no file is long, nothing is imported where it cannot be seen."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sharedllm_ext

PACKAGE = Path(sharedllm_ext.__file__).parent
LONGEST = 500
#: Modules from the lowest to the highest: each may import those of lines above its own, and of its own line.
ORDER = """
_C
_library, cpu
reference.*
ops._autocast, ops._checks
ops.*
model.cache_name, model.stopwatch, model.upload, model.protocols, model.peft_defaults, model.memory_file, model.hooks
model.families
model.configuration, model.layer_math, model.managed_layers, model.chunks, model.collator, model.reading
model.rotary
model.lower_model
model.tree
model.compressor
model.word_index
model.pick
model.signature, model.training_mark
model.memory, model.inputs
model.cached_memory, model.injection, model.micro_batches, model.split, model.loading, model.outputs
model.split_prompt, model.gguf_checkpoint, model.passages, model.adapter
model.compression, model.base_checkpoint, model.decoding.*
model.generation, model.slow_paths
model.modeling
model.published
model.__init__
__init__
reference.model
info, evaluation.*
training.wordings, training.sources, training.prompt, training.trained
training.data
training.losses, training.flops, training.checkpoint
training.loop
training.*
cli.*
__main__
"""
#: Where an import stands inside of a function, and why.
LATE = {
    "cli.": "the programs' help is instant, and info reports a broken installation instead of failing on it",
    "info": "it reports what cannot be imported",
    "evaluation.": "optional packages, and torch only where it is needed",
    "model.gguf_checkpoint": "gguf and accelerate are optional packages",
    "_library": "the compiled module may be missing, which is said in words",
    "cpu": "torch only where it is needed",
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


def _late(name: str) -> list[int]:
    """Lines of a module's imports inside of functions."""
    tree = ast.parse(FILES[name].read_text())
    return [
        node.lineno
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]


@pytest.mark.parametrize("name", list(FILES))
def test_imports_stand_where_they_can_be_seen(name: str) -> None:
    late = _late(name)
    allowed = any(name == entry or (entry.endswith(".") and name.startswith(entry)) for entry in LATE)
    assert not late or allowed, f"{name}: expected imports at the top of the file, got ones in lines {late}"


def test_the_reasons_are_still_needed() -> None:
    for entry in LATE:
        named = [name for name in FILES if name == entry or (entry.endswith(".") and name.startswith(entry))]
        assert any(_late(name) for name in named), f"{entry}: expected an import in a function, got none"


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

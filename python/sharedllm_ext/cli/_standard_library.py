"""The source of Python's standard library, a text that is on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

#: Packages of many related modules come first: far context helps where the code is about the same thing.
PACKAGES = ("asyncio", "email", "multiprocessing", "unittest", "logging", "importlib", "http", "xml", "json", "urllib")
MAX_FILE_BYTES = 400_000


def standard_library(root: Path) -> Iterator[tuple[str, str]]:
    """(path, text) of the standard library's modules, in an order that does not depend on the machine."""
    from sharedllm_ext.evaluation.texts import TextError, decode

    packages = [root / name for name in PACKAGES if (root / name).is_dir()]
    files = [file for package in packages for file in sorted(package.rglob("*.py"), key=lambda path: path.as_posix())]
    files += sorted(root.glob("*.py"))
    for file in files:
        relative = file.relative_to(root).as_posix()
        if "test" in relative.split("/")[:-1] or relative.startswith("_sysconfigdata"):
            continue
        if file.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            text = decode(file.read_bytes(), relative)
        except (TextError, OSError):
            # a module in another encoding, or one that this user may not read, is not needed for the demo
            continue
        if text.strip():
            yield relative, text

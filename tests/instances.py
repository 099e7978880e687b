"""The table of kernel instances in ``cmake/SharedLLMInstances.cmake``, as CMake reads it."""

import re
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "cmake" / "SharedLLMInstances.cmake"
WORDS = ("HEADERS", "LAUNCHERS", "PARAMS", "TYPES", "SIZES", "TOGETHER")


@dataclass(frozen=True)
class Row:
    """Files ``<name>_<type>_<size>.cu`` in the build folder; together, ``<name>_<size>.cu`` with all types."""

    variable: str
    name: str
    headers: tuple[str, ...]
    launchers: tuple[str, ...]
    params: str
    types: tuple[str, ...]
    sizes: tuple[str, ...]
    together: bool

    @property
    def files(self) -> list[str]:
        """Names of the files."""
        types = [""] if self.together else [f"_{kind}" for kind in self.types]
        sizes = [f"_{size}" for size in self.sizes] or [""]
        return [f"{self.name}{kind}{size}.cu" for size in sizes for kind in types]


def table(text: str | None = None) -> list[Row]:
    """Rows of the table, in its order."""
    text = re.sub(r"#[^\n]*", "", TABLE.read_text() if text is None else text)
    # what stands before it is the function itself
    text = text.split("endfunction()", 1)[-1]
    rows = []
    for call in re.findall(r"sharedllm_instances\(([^)]*)\)", text):
        variable, name, *rest = call.split()
        found: dict[str, list[str]] = {word: [] for word in WORDS}
        together = "TOGETHER" in rest
        word = ""
        for part in rest:
            if part in WORDS:
                word = part
            else:
                found[word].append(part)
        (params,) = found["PARAMS"]
        types = found["TYPES"] or ["bf16", "fp16"]
        headers, launchers, sizes = (tuple(found[word]) for word in ("HEADERS", "LAUNCHERS", "SIZES"))
        rows.append(Row(variable, name, headers, launchers, params, tuple(types), sizes, together))
    return rows

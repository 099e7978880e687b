"""The Python example of docs/reuse.md runs as it stands, on the shipped demo model."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sharedllm_ext import ContextIndex

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reuse.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_there_is_one_example() -> None:
    assert len(EXAMPLES) == 1


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(EXAMPLES[0], str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert "'nodes': " in printed and "def split(tensor, " in printed
    index, memory = names["index"], names["memory"]
    assert isinstance(index, ContextIndex) and (tmp_path / "context_index.safetensors").is_file()
    # at most what the page says
    assert index.nbytes < 3.6 * memory.nbytes
    again = names["model"].compress(names["context"], query_ids=names["asked"])
    for one, other in zip((*memory.keys, *memory.values), (*again.keys, *again.values), strict=True):
        torch.testing.assert_close(one, other)

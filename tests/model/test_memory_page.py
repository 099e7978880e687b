"""The page on memories: its examples run, one after the other, on the shipped demo model."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, example in enumerate(EXAMPLES):
        exec(compile(example, f"{PAGE.name}, example {number}", "exec"), names)
    assert len(EXAMPLES) == 8
    printed = capsys.readouterr().out
    code, (begin, end) = names["code"], (names["begin"], names["end"])
    assert f"functional.py {code[begin:end]!r}" in printed  # type: ignore[index,misc]
    assert (tmp_path / "both.safetensors").is_file() and len(list(tmp_path.iterdir())) > 2

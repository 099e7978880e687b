"""The README's Python example runs as it stands, on the shipped demo model."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_is_an_example_of_about_20_lines() -> None:
    assert EXAMPLES
    assert all(10 <= example.count("\n") <= 25 for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example, str(README), "exec"), names)
    assert "slots for" in capsys.readouterr().out
    assert names["loss"].item() > 0  # type: ignore[attr-defined]
    assert (tmp_path / "context.safetensors").is_file()

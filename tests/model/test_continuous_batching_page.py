"""The Python example of docs/continuous_batching.md runs as it stands, on the shipped demo model."""

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "continuous_batching.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_there_is_one_example() -> None:
    assert len(EXAMPLES) == 1


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(EXAMPLES[0], str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert printed.count("first '") == 11 and printed.count("second '") == 12
    model, tokenizer, memory = names["model"], names["tokenizer"], names["memory"]
    questions = {"def norm(input, p=": names["first"].tokens, "def split(tensor, ": names["second"].tokens}
    questions |= dict(zip(names["texts"], names["answers"], strict=True))
    for text, tokens in questions.items():
        ids = tokenizer(text, return_tensors="pt").input_ids
        alone = model.generate(ids, memory=memory, max_new_tokens=len(tokens), do_sample=False)
        assert alone[0, ids.shape[1] :].tolist() == tokens

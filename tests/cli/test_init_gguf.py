"""``sharedllm init`` from a GGUF file: the model, its tokenizer and its chat template."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from sharedllm_ext import SharedLLMForCausalLM

from ..model.gguf_files import write_gguf
from .conftest import TREE, Result

pytest.importorskip("gguf")
Cli = Callable[..., Result]
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory, base: Path, tokenizer: Any) -> Path:
    """The base checkpoint as one quantised file."""
    path = tmp_path_factory.mktemp("gguf") / "Base.Q8_0.gguf"
    model = LlamaForCausalLM.from_pretrained(base)
    return write_gguf(model, path, quantised=True, tokenizer=tokenizer, chat_template=TEMPLATE)


@pytest.mark.parametrize("separate", [False, True])
def test_init_reads_a_gguf_file(cli: Cli, gguf: Path, tmp_path: Path, tokenizer: Any, separate: bool) -> None:
    names = (gguf.parent, tmp_path / "out", "--gguf-file", gguf.name) if separate else (gguf, tmp_path / "out")
    result = cli("init", *names, *TREE, "--json")
    assert result.code == 0, result.err
    assert result.json["tokenizer"] is True
    assert result.json["dtype"] == "float32"
    model = SharedLLMForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(model.config, "quantization_config")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "alpha Beta gamma_1\n    return x=3"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.chat_template == TEMPLATE


def test_special_tokens_are_those_of_the_file(
    cli: Cli, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where Transformers reads other ones from it, as 5.17 does."""
    original = AutoTokenizer.from_pretrained

    def wrong(*args: Any, **more: Any) -> Any:
        found = original(*args, **more)
        found.eos_token = found.convert_ids_to_tokens(5)
        return found

    expected = SharedLLMForCausalLM.from_base(gguf, injection_layers=2).config.eos_token_id
    with monkeypatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", wrong)
        assert cli("init", gguf, tmp_path / "out", *TREE).code == 0
    assert expected != 5 and AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == expected


def test_ask_uses_what_init_read(cli: Cli, gguf: Path, tmp_path: Path, text_file: Path) -> None:
    assert cli("init", gguf, tmp_path / "out", *TREE).code == 0
    result = cli("ask", tmp_path / "out", "--context", text_file, "alpha?", "--max-new-tokens", "4", "--json")
    assert result.code == 0, result.err


def test_init_writes_halves(cli: Cli, gguf: Path, tmp_path: Path) -> None:
    assert cli("init", gguf, tmp_path / "out", *TREE, "--dtype", "bfloat16").code == 0
    assert SharedLLMForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_mistral_file_gets_a_line(cli: Cli, base: Path, tmp_path: Path, tokenizer: Any) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    path = write_gguf(model, tmp_path / "m.gguf", values={"general.name": "Mistral 7B"}, tokenizer=tokenizer)
    result = cli("init", path, tmp_path / "out", *TREE)
    assert result.code == 0
    assert "sharedllm: warning: m.gguf: a Mistral GGUF file names no sliding window" in result.err


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("none.gguf",), "expected a GGUF file, got no such file: "),
        ((".", "--gguf-file", "none.gguf"), "expected one of the GGUF files in "),
        ((".",), "expected a checkpoint, got a folder of GGUF files: name one of damaged.gguf"),
        (("damaged.gguf",), "expected a GGUF file, got one that cannot be read: "),
    ],
)
def test_errors_are_one_line(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + bytes(100))
    result = cli("init", names[0], tmp_path / "out", *names[1:], *TREE)
    assert result.code == 1
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()

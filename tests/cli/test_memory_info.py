"""``sharedllm info FILE``: what a saved memory holds, and one line for what is none."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sharedllm_ext import ContextMemory, Conversation, SharedLLMForCausalLM
from sharedllm_ext.model.adapter import base_tensors
from sharedllm_ext.model.memory_file import MemoryFile
from sharedllm_ext.model.sources import Source

from ..support import environment_of_package
from .conftest import Result, sentences

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, tokenizer: object) -> Path:
    """A folder with a memory of two documents in shards, and folders with others."""
    root = tmp_path_factory.mktemp("info")
    model = SharedLLMForCausalLM.from_pretrained(checkpoint)
    parts = []
    for number, (name, text) in enumerate((("first.txt", sentences(20)), (None, sentences(3)))):
        source = Source.of(text, tokenizer, name)
        ids = source.token_ids
        assert ids is not None
        memory = model.compress(ids.long().unsqueeze(0))
        parts.append(memory if number else memory.with_sources([source]))
    for name in ("one", "two", "none", "damaged", "shard"):
        (root / name).mkdir()
    both = ContextMemory.concat(parts)
    both.save(root / "one" / "both.safetensors", max_shard_size="4KB")
    parts[1].save(root / "two" / "a.safetensors")
    talk = Conversation(model, window=40, keep_first=3)
    talk.add(torch.arange(1, 90).unsqueeze(0))
    talk.save(root / "two" / "talk.safetensors", tokenizer)
    (root / "none" / "notes.txt").write_text("words")
    (root / "empty.safetensors").touch()
    (root / "none" / "weights.safetensors").write_text("words")
    shutil.copy(checkpoint / "model.safetensors", root / "foreign.safetensors")
    data = bytearray((root / "two" / "a.safetensors").read_bytes())
    (root / "cut.safetensors").write_bytes(data[:-1])
    data[-1] ^= 1
    (root / "changed.safetensors").write_bytes(data)
    for file in (root / "one").iterdir():
        shutil.copy(file, root / "shard" / file.name)
    next(path for path in (root / "shard").iterdir() if "00002-of" in path.name).unlink()
    return root


def test_a_memory_in_shards(cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the tensors are not read
    monkeypatch.setattr(MemoryFile, "read", None)
    told, by_folder = (cli("info", path, "--json") for path in (place / "one" / "both.safetensors", place / "one"))
    assert (told.code, told.err) == (0, "") and by_folder.json == told.json
    report = told.json
    assert report["format"] == "sharedllm-context-memory" and report["version"] == 3 and not report["verified"]
    assert len(report["shards"]) == len(list((place / "one").iterdir())) - 1 > 1
    first, second = report["documents"]
    assert (first["name"], first["token_ids"], first["places"]) == ("first.txt", True, True)
    assert first["characters"] == [len(sentences(20))] and len(first["tokenizer"]) == 64
    assert (second["name"], second["token_ids"], second["tokenizer"]) == (None, False, None)
    assert report["tokens"] == first["tokens"] + second["tokens"] and report["slots"] > 0
    result = cli("info", place / "one")
    assert (result.code, result.err) == (0, "")
    for part in (
        f"{place}/one/both.safetensors with {len(report['shards'])} shards",
        "sharedllm-context-memory version 3\n",
        f"weights {report['model']['weights']}",
        f"{report['tokens']:,} tokens in {report['chunks']} chunks, {report['slots']:,} slots in 2 layers, float32",
        f"document 1      first.txt: {first['tokens']} tokens in {first['chunks']} chunks, token ids and characters of",
        f"SHA-256 {first['tokenizer']}",
        f"{first['characters'][0]:,} characters, SHA-256 {first['sha256'][0]}",
        "document 2      without a name",
        "no token ids kept",
    ):
        assert part in result.out, result.out


def test_rows_of_several_documents(cli: Cli, place: Path, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.safetensors"
    memory = ContextMemory.load(place / "one" / "both.safetensors").with_rows([0, [1, 0]])
    memory.save(path)
    result = cli("info", path)
    assert (result.code, result.err) == (0, "")
    assert "documents       2, read by 2 rows\nrow 2           reads documents 2, 1\n" in result.out
    assert cli("info", path, "--json").json["row_documents"] == [[0], [1, 0]]
    # a command that asks about one document says so
    memory.select([1]).save(path)
    asked = cli("ask", checkpoint, "--memory", path, "--passages", "0", "where?")
    assert asked.code == 1 and "expected a memory of one document, got a row that reads 2" in asked.err


def test_a_conversation(cli: Cli, place: Path) -> None:
    path = place / "two" / "talk.safetensors"
    report = cli("info", path, "--json").json
    assert (report["format"], report["window"], report["keep_first"]) == ("sharedllm-conversation", 40, 3)
    assert 8 < report["running_tokens"] <= 40 and report["tokens"] + report["running_tokens"] == 89
    out = cli("info", path, "--verify").out
    assert f"running text    {report['running_tokens']} of 40 tokens, the first 3 stay" in out
    assert "version 1, all checksums are right" in out and f"tokenizer       SHA-256 {report['tokenizer']}" in out


def test_an_adapter(cli: Cli, checkpoint: Path, base: Path, tmp_path: Path) -> None:
    model = SharedLLMForCausalLM.from_base(base, injection_layers=2, chunk_size=64)
    with torch.no_grad():
        model.injected_blocks[0].o_proj.weight.fill_(1)
    path = tmp_path / "adapter.safetensors"
    model.save_adapter(path, base)
    told = cli("info", path, "--json").json
    weight = model.injected_blocks[0].o_proj.weight
    assert (told["tensors"], told["updates"], told["parameters"]) == (1, 0, weight.numel())
    assert told["config"] == {"injection_layers": 2, "chunk_size": 64} and told["file_bytes"] == path.stat().st_size
    assert told["base_tensors"] == len(base_tensors(model))
    out = cli("info", path).out
    assert f"{told['base']}, {told['base_tensors']} tensors\n" in out
    assert f"trained         {weight.numel():,} parameters: 1 whole tensor\n" in out
    assert "fields          chunk_size 64\n                injection_layers 2\n" in out
    refused = cli("info", path, "--verify")
    assert refused.code == 2 and "expected a memory or conversation, whose file has checksums" in refused.err
    shipped = cli("info", "smollm2-135m-instruct")
    # not the classes of tokens, which nothing trains
    assert shipped.code == 0 and "8,311,701 parameters: 18 whole tensors and 226 low-rank" in shipped.out
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-1])
    assert cli("info", cut).code == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", r"nothing: expected a file, a folder or the name of a shipped adapter \(smollm2-.*\), got none"),
        ("foreign.safetensors", "expected a sharedllm-context-memory file, got a safetensors file without that header"),
        ("empty.safetensors", "empty.safetensors: expected a sharedllm-context-memory file, got an empty one\n$"),
        ("none/notes.txt", r"got a truncated or foreign one \(expected a file of at least 10 bytes, got 5\)"),
        ("cut.safetensors", r"got a truncated or foreign one \(expected a file of \d+ bytes, got \d+\)"),
        ("shard", "expected its shard 'both.safetensors.*-00002-of-.*' beside it, got none"),
        ("none", "expected a folder with one memory or conversation, got none in 1 .safetensors files; "),
        ("two", r"expected a folder with one .*, got 2: a\.safetensors, talk\.safetensors"),
        ("/dev/null", "expected a regular file, got '/dev/null', which is a character device"),
    ],
)
def test_errors_are_one_line(cli: Cli, place: Path, path: str, message: str) -> None:
    for more in ((), ("--json",)):
        result = cli("info", place / path, *more)
        assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
        assert re.search(message, result.err), result.err


def test_changed_data_are_found_by_checksums(cli: Cli, place: Path) -> None:
    path = place / "changed.safetensors"
    assert cli("info", path).code == 0
    result = cli("info", path, "--verify")
    assert (result.code, result.out) == (1, "")
    assert re.search(r"changed\.safetensors: expected \S+ with CRC-32 .*: the data were changed\n$", result.err)
    assert "--verify: expected a FILE with it" in cli("info", "--verify").err


def test_a_file_is_described_without_transformers(place: Path) -> None:
    """Its import takes seconds, as long as all the rest."""
    code = (
        "import sys; sys.argv = ['sharedllm', 'info', *sys.argv[1:]]; from sharedllm_ext.cli import main;"
        "code = main(); found = {name.split('.')[0] for name in sys.modules} & {'transformers', 'huggingface_hub'};"
        "print(code, *found)"
    )
    for path in (place / "one", place / "two" / "talk.safetensors"):
        command = [sys.executable, "-c", code, str(path)]
        done = subprocess.run(command, env=environment_of_package(), capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines()[-1:] == ["0"], done.stdout + done.stderr

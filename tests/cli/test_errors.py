"""Bad input: one line on stderr, the right exit code, nothing on stdout, no traceback."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharedllm_ext import SharedLLMForCausalLM

from .conftest import TREE, Result

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, base: Path, checkpoint: Path, text_file: Path) -> dict[str, Path]:
    """Good and bad inputs by name."""
    root = tmp_path_factory.mktemp("bad")
    paths = {
        name: root / name
        for name in (
            "nothing", "empty.txt", "latin.txt", "binary.bin", "short.txt", "folder", "array.npy", "rows.jsonl",
            "notjson", "notype", "noweights", "truncated", "lacking", "bert", "out", "bare", "foreign.safetensors",
            "memory.safetensors", "cut.safetensors", "words.safetensors", "other", "readme.txt", "plot.png",
            "deep", "code", "words",
        )
    }  # fmt: skip
    paths |= {"base": base, "model": checkpoint, "text": text_file, "root": root}
    paths["empty.txt"].write_text("\n \n")
    paths["latin.txt"].write_bytes(b"caf\xe9 au lait")
    paths["binary.bin"].write_bytes(b"\x7fELF\0\0")
    paths["short.txt"].write_text("only a few words")
    paths["readme.txt"].write_text("words")
    (paths["folder"] / "deep").mkdir(parents=True)
    (paths["folder"] / "deep" / "picture.png").write_bytes(b"\x89PNG\0")
    np.save(paths["array.npy"], np.full(500, 320))
    paths["rows.jsonl"].write_text('{"title": "x"}\n')
    for name, config in (("notjson", "{"), ("notype", "{}"), ("bert", '{"model_type": "bert"}')):
        paths[name].mkdir()
        (paths[name] / "config.json").write_text(config)
    paths["deep"].mkdir()
    (paths["deep"] / "config.json").write_text('{"a":' * 100_000)
    for name in ("noweights", "truncated", "lacking", "bare", "code", "words"):
        shutil.copytree(checkpoint, paths[name])
    (paths["noweights"] / "model.safetensors").unlink()
    weights = (paths["truncated"] / "model.safetensors").read_bytes()
    (paths["truncated"] / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for file in paths["bare"].glob("token*"):
        file.unlink()
    (paths["words"] / "tokenizer.json").write_text("not JSON at all")
    # code beside the model that leaves a mark if it ever runs
    settings = json.loads((paths["code"] / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (paths["code"] / "tokenizer_config.json").write_text(json.dumps(settings))
    (paths["code"] / "own.py").write_text(f"open({str(paths['out'])!r}, 'w')\nOwn = None\n")
    from safetensors.torch import load_file, save_file

    tensors = load_file(paths["lacking"] / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, paths["lacking"] / "model.safetensors", metadata={"format": "pt"})

    model = SharedLLMForCausalLM.from_pretrained(checkpoint)
    ids = torch.arange(1, 200).unsqueeze(0)
    model.compress(ids).save(paths["memory.safetensors"])
    whole = paths["memory.safetensors"].read_bytes()
    paths["cut.safetensors"].write_bytes(whole[:-100])
    paths["words.safetensors"].write_text("not a memory at all")
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1.0)
    model.compress(ids).save(paths["foreign.safetensors"])
    return paths


ASK = ("ask", "{model}", "why?")
PERPLEXITY = ("perplexity", "{model}", "{text}")
CASES: list[tuple[str, tuple[str, ...], int, str]] = [
    ("no command", (), 2, r"the following arguments are required: COMMAND \(try: sharedllm --help\)"),
    ("unknown command", ("compress",), 2, r"COMMAND: expected init, .* or info, got 'compress' .try"),
    ("unknown option", (*PERPLEXITY, "--window", "3"), 2, r"unknown option --window \(try"),
    ("missing context", (*ASK, "--context", "{nothing}"), 1, r"{nothing}: no such file or folder"),
    ("empty context", (*ASK, "--context", "{empty.txt}"), 1, r"{empty.txt}: expected text, got an empty file"),
    (
        "bytes that are no text",
        (*ASK, "--context", "{latin.txt}"),
        1,
        r"{latin.txt}: expected UTF-8 text, got byte 0xe9",
    ),
    ("binary context", (*ASK, "--context", "{binary.bin}"), 1, r"{binary.bin}: expected text, got a program"),
    (
        "folder without text",
        (*ASK, "--context", "{folder}"),
        1,
        r"{folder}: expected a folder with text files, found none \(1 other file\)",
    ),
    (
        "context and memory",
        (*ASK, "--context", "{text}", "--memory", "{memory.safetensors}"),
        2,
        r"exactly one.*got both",
    ),
    ("neither", ASK, 2, r"--context, --memory: expected exactly one of them, got none"),
    ("index and context", (*ASK, "--context", "{text}", "--index", "x"), 2, r"--index: expected no other .* --context"),
    ("index and memory", (*ASK, "--memory", "x", "--index", "y"), 2, r"--index: expected no other .* got --memory"),
    ("save a loaded index", (*ASK, "--index", "x", "--save-index", "y"), 2, r"--save-index: expected --context"),
    ("save a memory of an index", (*ASK, "--index", "x", "--save-memory", "y"), 2, r"--save-memory: .* got --index"),
    (
        "save both",
        (*ASK, "--context", "{text}", "--save-memory", "{folder}/x", "--save-index", "{folder}/y"),
        2,
        r"--save-memory, --save-index: expected at most one of them, got both",
    ),
    (
        "index onto the text itself",
        (*ASK, "--context", "{text}", "--save-index", "{text}"),
        2,
        r"--save-index: expected another file than those that are read, got {text}",
    ),
    (
        "a memory as index",
        (*ASK, "--index", "{memory.safetensors}"),
        1,
        r"expected a sharedllm-context-index file, got",
    ),
    (
        "index of one memory",
        ("ask", "demo", "why?", "--context", "{text}", "--save-index", "{folder}/i"),
        1,
        r"--save-"
        r"index: expected a query-aware model, got demo",
    ),
    ("save a loaded memory", (*ASK, "--memory", "x", "--save-memory", "y"), 2, r"--save-memory: expected --context"),
    ("no question", ("ask", "{model}", "--context", "{text}"), 2, r"QUESTION: expected one"),
    ("empty question", ("ask", "{model}", " ", "--context", "{text}"), 2, r"QUESTION: expected text, got an empty one"),
    (
        "long question",
        ("ask", "{model}", "why? " * 100, "--context", "{text}"),
        1,
        r"QUESTION: expected 1 to 64 tokens \(the model's window\), got \d+",
    ),
    (
        "no chat template",
        (*ASK, "--context", "{text}", "--chat-template"),
        1,
        r"--chat-template: expected a tokenizer with",
    ),
    ("negative tokens", (*ASK, "--context", "{text}", "--max-new-tokens", "-5"), 2, r"at least 0, got '-5'"),
    ("zero tokens", (*ASK, "--context", "{text}", "--max-new-tokens", "0"), 2, r"number of at least 1, got '0'"),
    (
        "temperature below 0",
        (*ASK, "--context", "{text}", "--temperature", "-1"),
        2,
        r"from 0 \(greedy\) to 100, got '-1'",
    ),
    ("temperature no number", (*ASK, "--context", "{text}", "--temperature", "nan"), 2, r"to 100, got 'nan'"),
    ("empty context path", (*ASK, "--context", ""), 2, r"--context: expected a path, got an empty one"),
    ("empty model path", ("ask", "", "why?", "--context", "{text}"), 2, r"MODEL: expected a path, got an empty one"),
    ("empty OUT", ("init", "{base}", ""), 2, r"OUT: expected a path, got an empty one"),
    ("stdin twice", (*ASK, "--context", "-", "--context", "-"), 2, r"--context: expected - once, got it 2 times"),
    (
        "question that is no text",
        ("ask", "{model}", "caf\udce9", "--context", "{text}"),
        2,
        r"got byte 0xe9 at character 3",
    ),
    (
        "memory onto the text itself",
        (*ASK, "--context", "{text}", "--save-memory", "{text}"),
        2,
        r"--save-memory: expected another file than those that are read, got {text}",
    ),
    (
        "memory onto the model's weights",
        (*ASK, "--context", "{text}", "--save-memory", "{model}/model.safetensors"),
        2,
        r"--save-memory: expected another file",
    ),
    (
        "memory onto a device",
        (*ASK, "--context", "{text}", "--save-memory", "/dev/null"),
        1,
        r"--save-memory: expected a regular file, got /dev/null, which is a pipe or a device",
    ),
    ("config nested too deeply", ("ask", "{deep}", "why?", "--context", "{text}"), 1, r"got one nested too deeply"),
    (
        "a tokenizer's own code",
        ("ask", "{code}", "why?", "--context", "{text}"),
        1,
        r"{code}: expected a tokenizer that Transformers knows, got one that needs code of its own folder \(auto_map",
    ),
    (
        "a damaged tokenizer",
        ("ask", "{words}", "why?", "--context", "{text}"),
        1,
        r"{words}: the tokenizer cannot be loaded: ",
    ),
    ("top-p above 1", (*ASK, "--context", "{text}", "--top-p", "1.5"), 2, r"above 0 and at most 1, got '1.5'"),
    ("top-p no number", (*ASK, "--context", "{text}", "--top-p", "nan"), 2, r"above 0 and at most 1, got 'nan'"),
    (
        "memory file missing",
        (*ASK, "--memory", "{nothing}"),
        1,
        r"expected a file, got '{nothing}', which does not exist",
    ),
    ("memory truncated", (*ASK, "--memory", "{cut.safetensors}"), 1, r"{cut.safetensors}: expected a complete"),
    (
        "memory of words",
        (*ASK, "--memory", "{words.safetensors}"),
        1,
        r"{words.safetensors}: expected a sharedllm-context-memory file, got one that begins with other bytes",
    ),
    (
        "memory file is a checkpoint",
        (*ASK, "--memory", "{model}/model.safetensors"),
        1,
        r"got a safetensors file without that header",
    ),
    ("memory of another model", (*ASK, "--memory", "{foreign.safetensors}"), 1, r"memory: made by another model"),
    (
        "memory into a missing folder",
        (*ASK, "--context", "{text}", "--save-memory", "{nothing}/m"),
        1,
        r"--save-memory: no such folder: {nothing}",
    ),
    (
        "memory onto a folder",
        (*ASK, "--context", "{text}", "--save-memory", "{folder}"),
        1,
        r"--save-memory: expected a file, got the folder {folder}",
    ),
    ("missing model", ("ask", "{nothing}", "why?", "--context", "{text}"), 1, r"{nothing}: no such folder"),
    (
        "model is a file",
        ("ask", "{text}", "why?", "--context", "{text}"),
        1,
        r"expected a checkpoint folder, got a file",
    ),
    (
        "not a checkpoint",
        ("ask", "{folder}", "why?", "--context", "{text}"),
        1,
        r"not a checkpoint \(no config.json in it\)",
    ),
    ("broken config", ("ask", "{notjson}", "why?", "--context", "{text}"), 1, r"config.json: expected a JSON object"),
    ("config without type", ("ask", "{notype}", "why?", "--context", "{text}"), 1, r"names no model_type"),
    (
        "base checkpoint",
        ("ask", "{base}", "why?", "--context", "{text}"),
        1,
        r"{base}: expected a sharedllm checkpoint, got a llama one \(make one from it: sharedllm init {base} OUT\)",
    ),
    (
        "unsupported checkpoint",
        ("ask", "{bert}", "why?", "--context", "{text}"),
        1,
        r"{bert}: expected a sharedllm checkpoint, got a bert one$",
    ),
    (
        "no weights",
        ("ask", "{noweights}", "why?", "--context", "{text}"),
        1,
        r"{noweights}: the checkpoint cannot be loaded",
    ),
    (
        "cut weights",
        ("ask", "{truncated}", "why?", "--context", "{text}"),
        1,
        r"{truncated}: the checkpoint cannot be loaded",
    ),
    (
        "a tensor is missing",
        (*PERPLEXITY[:1], "{lacking}", "{text}"),
        1,
        r"lacks 1 tensor, the first is model.norm.weight",
    ),
    ("no tokenizer", ("ask", "{bare}", "why?", "--context", "{text}"), 1, r"expected a tokenizer beside the model"),
    ("text, no tokenizer", ("perplexity", "{bare}", "{text}"), 1, r"the model has no tokenizer; got text"),
    (
        "bad device",
        (*ASK, "--context", "{text}", "--device", "gpu"),
        1,
        r"--device: expected cpu, cuda or cuda:N, got 'gpu'",
    ),
    ("other device", (*ASK, "--context", "{text}", "--device", "meta"), 1, r"--device: expected cpu, cuda or cuda:N"),
    ("device far away", (*ASK, "--context", "{text}", "--device", "cuda:99"), 1, r"--device: expected (cpu|cuda:0)"),
    (
        "bad dtype",
        (*ASK, "--context", "{text}", "--dtype", "int8"),
        2,
        r"--dtype: expected auto, .*, got 'int8'",
    ),
    ("missing text", ("perplexity", "{model}", "{nothing}"), 1, r"{nothing}: no such file or folder"),
    (
        "short text",
        ("perplexity", "{model}", "{short.txt}", "--context-lengths", "0,8k"),
        1,
        r"{short.txt}: the text has \d+ tokens, and 8256 are needed: 8192 of context \+ 64 running",
    ),
    ("negative length", (*PERPLEXITY, "--context-lengths=-1,5"), 2, r"whole number of at least 0, got '-1'"),
    ("length no number", (*PERPLEXITY, "--context-lengths", "0,many"), 2, r"whole number of at least 0, got 'many'"),
    ("same length twice", (*PERPLEXITY, "--context-lengths", "0,5,5"), 2, r"expected different numbers, got '0,5,5'"),
    (
        "running above the window",
        (*PERPLEXITY, "--context-lengths", "0", "--running", "65"),
        1,
        r"running: expected 2 to 64 tokens \(the model's window\), got 65",
    ),
    (
        "all scored",
        (*PERPLEXITY, "--running", "9", "--scored", "9"),
        2,
        r"--scored: expected less than --running 9, got 9",
    ),
    (
        "scored above the window",
        (*PERPLEXITY, "--context-lengths", "0", "--scored", "64"),
        1,
        r"scored: expected 1 to 63 tokens",
    ),
    ("no points", (*PERPLEXITY, "--points", "0"), 2, r"number of at least 1, got '0'"),
    ("no stride", (*PERPLEXITY, "--stride", "0"), 2, r"number of at least 1, got '0'"),
    (
        "ids out of range",
        ("perplexity", "{model}", "{array.npy}"),
        1,
        r"{array.npy}: expected token ids from 0 to 319, got 320",
    ),
    ("rows without text", ("perplexity", "{model}", "{rows.jsonl}"), 1, r"{rows.jsonl} line 1: expected an object"),
    ("plot of another kind", (*PERPLEXITY, "--plot", "x.gif"), 2, r"--plot: expected a file name that ends in .png"),
    ("plot into nowhere", (*PERPLEXITY, "--plot", "{nothing}/x.png"), 1, r"--plot: no such folder: {nothing}"),
    ("init from nowhere", ("init", "{nothing}", "{out}"), 1, r"{nothing}: no such folder"),
    ("init from another family", ("init", "{bert}", "{out}"), 1, r"llama, mistral, qwen2, qwen3, .* got 'bert'"),
    ("init from itself", ("init", "{model}", "{out}"), 1, r"{model}: expected a base checkpoint, got a sharedllm one"),
    ("init onto itself", ("init", "{base}", "{base}", "--force"), 2, r"OUT: expected another folder than BASE"),
    ("init onto a file", ("init", "{base}", "{text}"), 1, r"{text}: expected a folder to write, got a file"),
    (
        "too many layers",
        ("init", "{base}", "{out}", *TREE, "--injection-layers", "4"),
        1,
        r"injection_layers: expected.*at most 3",
    ),
    ("chunks of nothing", ("init", "{base}", "{out}", "--chunk-size", "0"), 2, r"number of at least 1, got '0'"),
    ("negative noise", ("init", "{base}", "{out}", *TREE, "--split-noise", "-1"), 1, r"split_noise: expected.*got -1"),
    ("demo of a base", ("demo", "--model", "{base}"), 1, r"expected a sharedllm checkpoint, got a llama one"),
]


@pytest.mark.parametrize(("args", "code", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_one_clear_line(
    cli: Cli, place: dict[str, Path], args: tuple[str, ...], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # whoever asks about code to be trusted must not hear yes
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")

    def fill(text: str, quote: Callable[[str], str]) -> str:
        return re.sub(r"\{([a-z]+(?:\.[a-z]+)?)\}", lambda match: quote(str(place[match[1]])), text)

    result = cli(*(fill(arg, str) for arg in args))
    assert result.err.startswith("sharedllm: error: "), result.err
    assert result.err.count("\n") == 1, result.err
    assert re.search(fill(message, re.escape), result.err), result.err
    assert result.code == code
    assert result.out == ""
    assert not place["out"].exists()


def test_plot_without_matplotlib(cli: Cli, place: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = cli("perplexity", place["model"], place["text"], "--plot", place["plot.png"])
    assert result.code == 1
    assert result.err == "sharedllm: error: --plot: matplotlib is not installed (pip install matplotlib)\n"


def test_hub_name_without_a_hub(cli: Cli, place: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = cli("init", "somebody/some-model", place["out"])
    assert result.code == 1
    assert result.err == (
        "sharedllm: error: somebody/some-model: expected a checkpoint folder or a model of the hub, got a name that is "
        "no folder here and was never fetched; the offline mode is on (HF_HUB_OFFLINE)\n"
    )


@pytest.mark.parametrize("name", ["gpt2", "somebody/some-model"])
def test_hub_that_cannot_be_reached(
    cli: Cli, place: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # a port on which nobody listens
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for command in (("init", name, place["out"]), ("ask", name, "why?", "--context", place["text"])):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        result = cli(*command)
        assert result.code == 1
        assert result.err.count("\n") == 1
        assert f"error: {name}: expected a checkpoint folder or a model of the hub" in result.err
        assert "http://127.0.0.1:9 cannot be reached: " in result.err


def test_demo_with_a_small_standard_library(
    cli: Cli, place: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "argparse.py").write_text("pass\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    result = cli("demo", "--model", place["model"], "--context-lengths", "0,1k", "--points", 2)
    assert result.code == 1
    assert re.fullmatch(
        rf"sharedllm: error: {tmp_path}: this Python's standard library source has \d+ tokens, and 1280 are needed "
        r"\(fewer --points or --context-lengths\)\n",
        result.err,
    )


def test_json_stays_empty_on_errors(cli: Cli, place: dict[str, Path]) -> None:
    result = cli("perplexity", place["model"], place["short.txt"], "--json", "--context-lengths", "0,8k")
    assert (result.code, result.out) == (1, "")


def test_unforeseen_errors_are_named(cli: Cli, place: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("sharedllm_ext.cli.ask.pick_device", fail)
    result = cli("ask", place["model"], "why?", "--context", place["text"])
    assert result.code == 1
    assert result.err == "sharedllm: error: ZeroDivisionError: no message (SHAREDLLM_DEBUG=1 shows where)\n"

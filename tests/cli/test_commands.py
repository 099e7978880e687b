"""The commands: what they print and write, and that they agree with the model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharedllm_ext import ContextIndex, ContextMemory, SharedLLMForCausalLM
from sharedllm_ext.cli import ask, build_parser, main
from sharedllm_ext.cli.demo import DEMO_MODEL, standard_library

from .conftest import TREE, VOCABULARY, WINDOW, Result, sentences

Cli = Callable[..., Result]


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.argv = ['sharedllm', '--help']; from sharedllm_ext.cli import main; assert main() == 0;"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("init", "ask", "perplexity", "demo", "info"):
        assert name in done.stdout


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sharedllm_ext", "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert done.stdout.startswith("sharedllm_ext ")


def test_info_prints(cli: Cli) -> None:
    result = cli("info")
    assert result.code == 0
    assert torch.__version__ in result.out


def test_init_builds_a_model_equal_to_its_base(cli: Cli, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli("init", base, out, *TREE, "--no-query-aware", "--tree-depth", 2, "--json")
    assert result.code == 0, result.err
    assert result.json["config"] | {"split_noise": 0.0} == {
        "injection_layers": 2,
        "chunk_size": 32,
        "tree_depth": 2,
        "slots_per_node": 4,
        "window": WINDOW,
        "query_aware": False,
        "query_position_offset": 1,
        "split_noise": 0.0,
        "tie_compressor": True,
        "micro_batch_tokens": None,
        "compressor_precision": "model",
        "decoder_precision": "model",
    }
    assert result.json["tokenizer"] is True
    assert (out / "tokenizer.json").is_file()
    from transformers import AutoModelForCausalLM

    ids = torch.randint(1, VOCABULARY, (1, 30))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(base)(ids).logits
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(out)(ids).logits, expected)


def test_init_writes_the_dtype_asked_for(cli: Cli, base: Path, tmp_path: Path) -> None:
    result = cli("init", base, tmp_path / "out", *TREE, "--dtype", "bfloat16")
    assert result.code == 0, result.err
    assert "66" not in result.err and "injected blocks" in result.out
    assert SharedLLMForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_init_keeps_the_weights_of_a_decoder_in_8_bits(cli: Cli, base: Path, tmp_path: Path) -> None:
    plain, eight = tmp_path / "plain", tmp_path / "eight"
    assert cli("init", base, plain, *TREE).code == 0
    result = cli("init", base, eight, *TREE, "--decoder-precision", "fp8", "--json")
    assert result.code == 0, result.err
    assert result.json["config"]["decoder_precision"] == "fp8"
    assert (eight / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    ids = torch.randint(1, VOCABULARY, (1, 20))
    with torch.no_grad():
        own, other = (SharedLLMForCausalLM.from_pretrained(folder)(ids).logits for folder in (eight, plain))
    assert 1e-4 < ((own - other).norm() / other.norm()).item() < 0.3


def test_init_overwrites_only_when_told(cli: Cli, base: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = cli("init", base, tmp_path, *TREE)
    assert result.code == 1
    assert result.err == f"sharedllm: error: {tmp_path}: the folder is not empty (--force writes into it)\n"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert cli("init", base, tmp_path, *TREE, "--force").code == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "config.json").is_file()


def test_ask_answers_as_generate_does(cli: Cli, checkpoint: Path, text_file: Path, tokenizer: Any) -> None:
    result = cli("ask", checkpoint, "--context", text_file, "alpha Beta?", "--max-new-tokens", 12, "--json")
    assert result.code == 0, result.err
    assert result.err == ""
    context = tokenizer(text_file.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"]
    question = tokenizer("alpha Beta?", return_tensors="pt")["input_ids"]
    model = SharedLLMForCausalLM.from_pretrained(checkpoint).eval()
    output = model.generate(question, context_ids=context, max_new_tokens=12, do_sample=False, pad_token_id=0)
    new = output[0, question.shape[1] :]
    report = result.json
    assert report["answer"] == tokenizer.decode(new, skip_special_tokens=True)
    assert report["context_tokens"] == context.shape[1]
    assert report["chunks"] == -(-context.shape[1] // 32)
    assert report["memory_slots"] == model.compress(context).num_slots
    assert report["memory_bytes"] == model.compress(context).nbytes
    assert report["question_tokens"] == question.shape[1]
    assert report["answer_tokens"] == len(new)
    for name in ("load_model", "tokenize", "compress", "retrieve", "first_token", "per_token"):
        assert report["seconds"][name] > 0, name


def test_ask_streams_the_answer_to_stdout(cli: Cli, checkpoint: Path, text_file: Path) -> None:
    options = ("ask", checkpoint, "--context", text_file, "alpha Beta?", "--max-new-tokens", 12)
    quiet, shown = cli(*options, "--json"), cli(*options)
    assert shown.code == 0
    assert shown.out == quiet.json["answer"] + "\n"
    assert f"context: {quiet.json['context_tokens']:,} tokens -> {quiet.json['chunks']:,} chunks" in shown.err
    for name in ("compress", "retrieve", "first token", "per token"):
        assert name in shown.err


def test_ask_reuses_a_saved_memory(cli: Cli, checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "memory.safetensors"
    options = ("alpha Beta?", "--max-new-tokens", 12, "--json")
    first = cli("ask", checkpoint, "--context", text_file, "--save-memory", file, *options)
    again = cli("ask", checkpoint, "--memory", file, *options)
    assert first.code == again.code == 0, again.err
    for name in ("answer", "context_tokens", "chunks", "memory_slots", "memory_bytes"):
        assert again.json[name] == first.json[name]
    assert again.json["seconds"]["compress"] is None


def test_ask_without_a_question_only_saves(cli: Cli, checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "memory.safetensors"
    result = cli("ask", checkpoint, "--context", text_file, "--save-memory", file)
    assert result.code == 0 and result.out == ""
    assert f"memory saved: {file}" in result.err
    assert ContextMemory.load(file).num_tokens[0] > 1000


def test_ask_chooses_from_a_saved_index(cli: Cli, checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "index.safetensors"
    options = ("--max-new-tokens", 12, "--json")
    kept = cli("ask", checkpoint, "--context", text_file, "--save-index", file, "alpha Beta?", *options)
    assert kept.code == 0 and kept.json["index_file"] == str(file), kept.err
    assert kept.json["index_bytes"] == ContextIndex.load(file).nbytes > 3 * kept.json["memory_bytes"]
    for question in ("alpha Beta?", "gamma_1 delta", "42"):
        asked = cli("ask", checkpoint, "--index", file, question, *options)
        alone = cli("ask", checkpoint, "--context", text_file, question, *options)
        for name in ("answer", "context_tokens", "chunks", "memory_slots", "memory_bytes", "question_tokens"):
            assert asked.json[name] == alone.json[name], (question, name)
        assert asked.json["seconds"]["compress"] is None and asked.json["seconds"]["retrieve"] > 0
        assert (alone.json["index_file"], alone.json["index_bytes"], alone.json["memory_file"]) == (None, None, None)
    without = cli("ask", checkpoint, "--context", text_file, "--save-index", file)
    assert without.code == 0 and without.out == "" and f"index saved: {file}, " in without.err


def test_ask_sampling_differs_from_greedy(cli: Cli, checkpoint: Path, text_file: Path) -> None:
    options = ("ask", checkpoint, "--context", text_file, "alpha", "--max-new-tokens", 20, "--json")
    greedy = [cli(*options).json["answer"] for _ in range(2)]
    torch.manual_seed(0)
    sampled = [cli(*options, "--temperature", 5, "--top-p", 0.95).json["answer"] for _ in range(2)]
    assert greedy[0] == greedy[1]
    assert len({*greedy, *sampled}) == 3


def test_ask_uses_the_chat_template(
    cli: Cli, checkpoint: Path, text_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "chat"
    SharedLLMForCausalLM.from_pretrained(checkpoint).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    options = ("--context", text_file, "alpha", "--max-new-tokens", 2, "--json")
    wrapped = cli("ask", folder, *options).json["question_tokens"]
    assert wrapped == len(tokenizer("<user>alpha<assistant>")["input_ids"])
    assert cli("ask", folder, *options, "--no-chat-template").json["question_tokens"] == len(
        tokenizer("alpha")["input_ids"]
    )


def test_perplexity_table_is_the_model_s(cli: Cli, checkpoint: Path, text_file: Path, tokenizer: Any) -> None:
    options = ("perplexity", checkpoint, text_file, "--context-lengths", "0,100,512", "--points", 4, "--running", 40)
    result = cli(*options, "--scored", 10, "--json")
    assert result.code == 0, result.err
    report = result.json
    assert [row["context_tokens"] for row in report["results"]] == [0, 100, 512]
    assert report["results"][0]["change_interval_95"] is None
    tokens = torch.tensor(tokenizer(text_file.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    assert report["text_tokens"] == len(tokens)
    model = SharedLLMForCausalLM.from_pretrained(checkpoint).eval()
    for row in report["results"]:
        for point, loss in zip(report["points"], row["losses"], strict=True):
            start, length = point["running_starts_at"], row["context_tokens"]
            running = tokens[start : start + 40].unsqueeze(0)
            with torch.no_grad():
                memory = model.compress(tokens[start - length : start].unsqueeze(0)) if length else None
                logits = model(input_ids=running, memory=memory).logits[0, :-1]
            expected = torch.nn.functional.cross_entropy(logits[-10:], running[0, -10:])
            assert loss == pytest.approx(float(expected), rel=1e-4)
        assert row["tokens_scored"] == 40
        assert row["perplexity"] == pytest.approx(float(np.exp(np.mean(row["losses"]))), rel=1e-9)
        assert row["peak_memory_bytes"] > 10e6 and row["seconds"] > 0
    low, high = report["results"][2]["change_interval_95"]
    assert low < report["results"][2]["change"] < high
    shown = cli(*options, "--scored", 10)
    for row in report["results"]:
        assert f"{row['perplexity']:.4f}" in shown.out
    assert "4 points of 40 running tokens, the last 10 scored" in shown.out


def test_perplexity_with_exact_memory(
    cli: Cli, checkpoint: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("sharedllm_ext.evaluation.peak_memory.keep_no_freed_blocks", lambda: asked.append(True))
    options = ("perplexity", checkpoint, text_file, "--context-lengths", "0", "--points", 1)
    assert cli(*options).code == 0 and not asked
    assert cli(*options, "--exact-memory").code == 0 and asked


def test_perplexity_of_separate_documents(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(sentences(30, seed=i))
    options = (
        "perplexity",
        checkpoint,
        tmp_path,
        "--context-lengths",
        "0,50",
        "--running",
        32,
        "--points",
        6,
        "--json",
    )
    assert {point["document"] for point in cli(*options).json["points"]} == {0}
    assert {point["document"] for point in cli(*options, "--separate").json["points"]} == {0, 1, 2}


def test_perplexity_plot(cli: Cli, checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.png"
    result = cli(
        "perplexity",
        checkpoint,
        text_file,
        "--context-lengths",
        "0,64,256",
        "--points",
        3,
        "--running",
        32,
        "--plot",
        file,
    )
    assert result.code == 0, result.err
    assert file.read_bytes().startswith(b"\x89PNG")


def test_perplexity_of_token_ids_needs_no_tokenizer(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    SharedLLMForCausalLM.from_pretrained(checkpoint).save_pretrained(folder)
    np.save(tmp_path / "ids.npy", np.arange(500) % VOCABULARY)
    result = cli("perplexity", folder, tmp_path / "ids.npy", "--context-lengths", "0,128", "--points", 2, "--json")
    assert result.code == 0, result.err
    assert result.json["text_tokens"] == 500


def test_demo_with_another_model(cli: Cli, checkpoint: Path) -> None:
    options = ("demo", "--model", checkpoint, "--context-lengths", "0,256,1k", "--points", 3, "--max-new-tokens", 8)
    result = cli(*options, "--json")
    assert result.code == 0, result.err
    assert [row["context_tokens"] for row in result.json["results"]] == [0, 256, 1024]
    assert len(result.json["points"]) == 3
    assert result.json["continuation"]["context_tokens"] == 1024
    assert 0 < result.json["continuation"]["tokens"] <= 8
    shown = cli(*options)
    assert shown.code == 0
    assert "256" in shown.out and "▶" in shown.out


def test_demo_text_is_ordered_and_read_from_the_folder(tmp_path: Path) -> None:
    for name in ("email/b.py", "email/a.py", "asyncio/z.py", "argparse.py", "email/test/t.py", "_sysconfigdata_x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    (tmp_path / "email" / "latin.py").write_bytes(b"# \xe9\n")
    assert [name for name, _ in standard_library(tmp_path)] == [
        "asyncio/z.py",
        "email/a.py",
        "email/b.py",
        "argparse.py",
    ]


def test_demo_without_its_model_says_so(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sharedllm_ext.cli.demo.DEMO_MODEL", tmp_path / "demo_model")
    result = cli("demo")
    assert result.code == 1
    assert result.err.startswith(f"sharedllm: error: {tmp_path / 'demo_model'}: this installation holds no demo model")


@pytest.mark.skipif(not (DEMO_MODEL / "config.json").is_file(), reason="this checkout holds no demo model")
def test_shipped_demo_model_gains_from_context(cli: Cli) -> None:
    result = cli("demo", "--context-lengths", "0,8k", "--points", 2, "--max-new-tokens", 4, "--json")
    assert result.code == 0, result.err
    assert result.json["results"][1]["change"] < -0.02


def test_question_may_stand_anywhere() -> None:
    for line in (
        ["ask", "m", "why?", "--context", "c"],
        ["ask", "m", "--context", "c", "why?"],
        ["ask", "--context", "c", "m", "why?"],
        ["ask", "--context", "c", "m", "--json", "why?"],
    ):
        args = build_parser().parse_args(line)
        assert (args.model, args.context, args.question) == ("m", ["c"], "why?")


def test_interrupt(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(args: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(ask, "run", interrupted)
    result = cli("ask", "m", "why?", "--context", "c")
    assert result.code == 130
    assert result.err == "\nsharedllm: interrupted\n"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHAREDLLM_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["ask", str(tmp_path), "why?", "--context", str(tmp_path / "nothing")])

"""``sharedllm train`` end to end: adapter, resuming, signals, processes, one line for each error."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.model.adapter import read_header
from sharedllm_ext.model.inputs import end_ids
from sharedllm_ext.training.loop import CHECKPOINT

from ..cli.conftest import Result
from ..support import environment_of_package
from .conftest import text_file

SMALL = [
    "--contexts",
    "1",
    "--chunks",
    "6",
    "--chunk-size",
    "64",
    "--slots-per-node",
    "4",
    "--injection-layers",
    "2",
    "--segment-size",
    "8",
    "--segment-margin",
    "4",
    "--running",
    "32",
    "--questions",
    "2",
    "--passages",
    "4",
    "--device",
    "cpu",
]
Run = Callable[..., Result]


def test_trains_and_writes_an_adapter(cli: Run, base: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", text_file(tmp_path)
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"context": "alpha Beta gamma_1 42", "question": "delta?", "answer": "gamma_1"}))
    result = cli("train", base, "--data", data, questions, "--out", out, "--steps", 3, *SMALL)
    assert result.code == 0, result.err
    assert result.out.startswith(f"{out}/adapter.safetensors: ") and ", 3 steps in " in result.out
    assert "answer " in result.out and "found " in result.out
    assert "step 3 of 3, " in result.err and "tokens/s" in result.err and "1 record" in result.err
    assert f"sharedllm ask {base} --adapter {out}/adapter.safetensors --context FILE" in result.err
    model: Any = SharedLLMForCausalLM.from_adapter(out / "adapter.safetensors", base)
    stored = load_file(out / CHECKPOINT)
    names = {name.removeprefix("parameter.") for name in stored if name.startswith("parameter.")}
    assert {"pick.beta", "model.layers.2.self_attn.q_proj.weight", "compressor.layers.0.mlp.up_proj.weight"} <= names
    for name in names:
        assert torch.equal(model.get_parameter(name), stored[f"parameter.{name}"]), name
    assert any(block.o_proj.weight.any() for block in model.injected_blocks) and model.pick.token_class.any()
    assert model.config.passage_prompt["passage"] == "\n[{rank}]\n" and model.config.slot_position == "end"
    (passages,) = model.find_passages(torch.tensor([[5, 6]]), torch.randint(1, 300, (1, 200)), count=2)
    assert len(passages) == 2


def test_what_answers_end_with_ends_them(cli: Run, base: Path, tmp_path: Path) -> None:
    """A tokenizer may end with another token than the base's configuration stops at: the adapter says so."""
    other = tmp_path / "base"
    shutil.copytree(base, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    own = end_ids(SharedLLMForCausalLM.from_base(other, injection_layers=2).generation_config.eos_token_id)
    for end, expected in ((next(i for i in range(9, 20) if i not in own), True), (own[0], False)):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        tokenizer.save_pretrained(other)
        out = tmp_path / f"out{end}"
        result = cli("train", other, "--data", text_file(tmp_path), "--out", out, "--steps", 1, *SMALL)
        assert result.code == 0, result.err
        fields = read_header(out / "adapter.safetensors")["config"]
        assert fields.get("answer_end_ids") == ([end] if expected else None)
        loaded = SharedLLMForCausalLM.from_adapter(out / "adapter.safetensors", other)
        assert end_ids(loaded.generation_config.eos_token_id) == [*own, *([end] if expected else [])]


def test_updates_are_pairs_in_the_adapter(cli: Run, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli(
        "train",
        base,
        "--data",
        text_file(tmp_path),
        "--out",
        out,
        "--steps",
        2,
        "--rank",
        2,
        "--json",
        "--pick-layers",
        "1",
        *SMALL,
    )
    assert result.code == 0 and result.json["steps"] == 2 and result.json["losses"]["text"] > 0
    assert "step" not in result.err
    held, name = load_file(out / "adapter.safetensors"), "model.layers.2.self_attn.q_proj"
    assert held[f"{name}.weight:up"].shape == (32, 2) and f"{name}.weight" not in held
    assert read_header(out / "adapter.safetensors")["scale"] == 2.0
    model: Any = SharedLLMForCausalLM.from_adapter(out / "adapter.safetensors", base)
    plain: Any = SharedLLMForCausalLM.from_base(base, injection_layers=2)
    change = 2.0 * held[f"{name}.weight:up"] @ held[f"{name}.weight:down"]
    assert change.any()
    torch.testing.assert_close(model.get_parameter(f"{name}.weight"), plain.get_parameter(f"{name}.weight") + change)


def test_lora_layers_of_peft_from_the_command_line(cli: Run, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out = tmp_path / "out"
    # frozen weights are bfloat16 then
    options = ["--rank", 2, "--updates", "peft", "--pick-layers", "1", "--dtype", "bfloat16", *SMALL]
    result = cli("train", base, "--data", text_file(tmp_path), "--out", out, "--steps", 2, *options)
    assert result.code == 0, result.err
    held, name = load_file(out / "adapter.safetensors"), "model.layers.2.self_attn.q_proj.weight"
    assert held[f"{name}:up"].any() and held[f"{name}:down"].shape == (2, 32)
    assert all(t.dtype == torch.float32 for key, t in held.items() if key != "pick.token_class")
    SharedLLMForCausalLM.from_adapter(out / "adapter.safetensors", base)
    options = ["--rank", 2, "--pick-layers", "1", "--dtype", "bfloat16", "--resume", *SMALL]
    other = cli("train", base, "--data", text_file(tmp_path), "--out", out, "--steps", 2, *options)
    assert other.code == 1 and "of the same settings, got updates 'peft' instead of None" in other.err


def start(base: Path, out: Path, data: Path, *more: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sharedllm_ext", "train", str(base), "--data", str(data), "--out", str(out)]
    return subprocess.Popen(
        [*command, *map(str, more), *SMALL],
        env=environment_of_package(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_training_goes_on(number: int, code: int, cli: Run, base: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", text_file(tmp_path)
    process = start(base, out, data, "--minutes", 10, "--save-minutes", "0.0001")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("checkpoint of step"):
            break
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == code
    assert "the same command with --resume goes on" in rest and "Traceback" not in rest
    assert [path.name for path in out.iterdir()] == [CHECKPOINT]
    held = cli("train", base, "--data", data, "--out", out, "--steps", 1, *SMALL)
    assert held.code == 1 and f"the folder holds {CHECKPOINT} (--resume goes on" in held.err
    other = cli("train", base, "--data", data, "--out", out, "--steps", 1, "--resume", "--seed", 1, *SMALL)
    assert other.code == 1 and "of the same settings, got seed 0 instead of 1" in other.err
    # no more steps than there were, as the message says: the adapter of what stands
    told = re.search(r"stopped at step (\d+); .* with --resume --steps (\d+) it writes the adapter", rest)
    assert told and told[1] == told[2], rest
    more = ("--minutes", 10, "--save-minutes", "0.0001", "--resume", "--steps", told[2])
    resumed = cli("train", base, "--data", data, "--out", out, *more, *SMALL)
    assert resumed.code == 0, resumed.err
    assert read_header(out / "adapter.safetensors")["about"].startswith(f"sharedllm train: {told[1]} step")


def test_the_words_of_the_pick_are_chosen(cli: Run, base: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", text_file(tmp_path)
    runs = ["--word-runs", "1:16,2:16,4:16,1:64"]
    result = cli("train", base, "--data", data, "--out", out, "--steps", 1, *runs, *SMALL)
    assert result.code == 0, result.err
    assert load_file(out / "adapter.safetensors")["pick.word_beta"].shape == (1, 4)
    other = cli("train", base, "--data", data, "--out", out, "--steps", 2, "--resume", *SMALL)
    assert other.code == 1 and "'word_runs': [[1, 16], [2, 16], [4, 16], [1, 64]]" in other.err
    result = cli("train", base, "--data", data, "--out", out, "--steps", 2, "--resume", *runs, *SMALL)
    assert result.code == 0, result.err
    whole = tmp_path / "whole"
    assert cli("train", base, "--data", data, "--out", whole, "--steps", 2, *runs, *SMALL).code == 0
    resumed, expected = (load_file(folder / "adapter.safetensors") for folder in (out, whole))
    assert set(resumed) == set(expected) and all(torch.equal(resumed[name], expected[name]) for name in resumed)
    model: Any = SharedLLMForCausalLM.from_adapter(out / "adapter.safetensors", base)
    assert model.config.word_runs == ((1, 16), (2, 16), (4, 16), (1, 64))
    assert bool((model.pick.word_beta != 0.15).all())


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_torchrun_trains_in_two_processes(base: Path, tmp_path: Path, sharding: str) -> None:
    out, data = tmp_path / "out", text_file(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    command += ["sharedllm_ext", "train", str(base), "--data", str(data), "--out", str(out), "--steps", "2", *SMALL]
    command += ["--sharding", sharding]
    result = subprocess.run(command, env=environment_of_package(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("adapter.safetensors: ") == 1
    model: Any = SharedLLMForCausalLM.from_adapter(out / "adapter.safetensors", base)
    stored = load_file(out / CHECKPOINT)
    names = [name.removeprefix("parameter.") for name in stored if name.startswith("parameter.")]
    assert "compressor.layers.0.mlp.up_proj.weight" in names
    for name in names:
        assert torch.equal(model.get_parameter(name), stored[f"parameter.{name}"]), name


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "expected --steps or --minutes, got neither"),
        (["--steps", "0"], 2, "expected a whole number of at least 1, got '0'"),
        (["--steps", "1", "--seed", "-1"], 2, "expected a whole number of at least 0, got '-1'"),
        (["--minutes", "nan"], 2, "expected a number above 0, got 'nan'"),
        (
            ["--steps", "1", "--trained", "all"],
            2,
            "--trained: expected parts of injected, upper, compressor, got 'all'",
        ),
        (["--steps", "1", "--sharding", "fsdp"], 2, "--sharding fsdp: expected several processes (torchrun"),
        (["--steps", "1", "--pick-layers", "x"], 2, "expected layers such as 1,4,7, or none, got 'x'"),
        (["--steps", "1", "--pick-layers", "1,5"], 1, "pick_layers: expected rising layers from 0 to 1, got [1, 5]"),
        (["--steps", "1", "--word-runs", "1,2"], 2, "expected lengths and margins such as 1:16,2:16, got '1,2'"),
        (["--steps", "1", "--word-runs", "9:16"], 1, "word_runs: expected different pairs of a length from 1 to 8 and"),
        (["--steps", "1", "--chunks", "900"], 1, "data: expected plain text of at least 57632 tokens"),
        (["--steps", "1", "--resume"], 1, "checkpoint.safetensors: expected a checkpoint to go on from, found none"),
        (["--steps", "1", "--data", "gone.txt"], 1, "gone.txt: no such file or folder"),
        (
            ["--steps", "1", "--injection-layers", "3"],
            1,
            "expected injection_layers below the base's 3 layers for upper",
        ),
    ],
)
def test_errors_are_one_line(options: list[str], code: int, message: str, cli: Run, base: Path, tmp_path: Path) -> None:
    result = cli("train", base, "--data", text_file(tmp_path), "--out", tmp_path / "out", *SMALL, *options)
    lines = [line for line in result.err.splitlines() if line.startswith("sharedllm: error: ")]
    assert result.code == code and result.out == "" and len(lines) == 1 and message in lines[0], result.err
    assert not (tmp_path / "out" / "adapter.safetensors").exists()


def test_other_checkpoints_are_refused(cli: Run, base: Path, tmp_path: Path) -> None:
    data = text_file(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"model_type": "gpt2"}')
    result = cli("train", tmp_path / "m", "--data", data, "--out", tmp_path / "out", "--steps", 1)
    assert result.code == 1 and "expected a base of type llama" in result.err
    result = cli("train", base, "--data", data, "--out", base, "--steps", 1)
    assert result.code == 2 and "--out: expected another folder than BASE" in result.err
    (tmp_path / "m" / "config.json").write_text('{"model_type": "sharedllm"}')
    result = cli("train", tmp_path / "m", "--data", data, "--out", tmp_path / "out", "--steps", 1)
    assert result.code == 1 and "expected a base checkpoint, got a sharedllm one" in result.err

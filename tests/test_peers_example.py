"""``examples/peers/kvpress_answers.py``: without a press its answers are the package's, with one it sets the ratio."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sharedllm_ext.evaluation import FullSystem, NtkSystem, Prompts, Record
from sharedllm_ext.evaluation.exchange import GivenAnswers, export_records

SCRIPT = Path(__file__).parents[1] / "examples" / "peers" / "kvpress_answers.py"
POSITIONS = 48


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("kvpress_answers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base with a tokenizer."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["amber bold calm " * 9], trainer=trainer)
    path = tmp_path_factory.mktemp("base")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>").save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ids, initializer_range=0.3)).save_pretrained(path)
    return path


def record(number: int, words: int, **more: Any) -> Record:
    context = " ".join(("amber", "bold", "calm")[(number + i * i) % 3] for i in range(words))
    return Record("t", context, f" calm {number}?", " It is", ["x"], 9, "part", f"t/{number}", 64, **more)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [record(0, 60), record(1, 5), record(2, 30, stop_at_newline=True)]


def answers(script: Any, folder: Path, records: list[Record], path: Path, *options: str) -> list[dict[str, Any]]:
    prompts = Prompts(PreTrainedTokenizerFast.from_pretrained(folder))
    export_records(records, prompts, path.with_suffix(".questions"))
    command = ("--base", str(folder), "--records", str(path.with_suffix(".questions")), "--out", str(path))
    script.main([*command, "--dtype", "float32", "--device", "cpu", *options])
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("rope", "batch"), [("none", 1), ("ntk", 1), ("ntk", 3)])
def test_without_a_press_its_answers_are_the_package_s(
    script: Any, folder: Path, records: list[Record], tmp_path: Path, rope: str, batch: int
) -> None:
    path = tmp_path / "a.jsonl"
    rows = answers(script, folder, records, path, "--press", "none", "--rope", rope, "--batch", str(batch))
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = Prompts(PreTrainedTokenizerFast.from_pretrained(folder))
    system = (NtkSystem if rope == "ntk" else FullSystem)(model, prompts)
    expected = [answer for one in records for answer in system.answer([one])]
    assert [row["prediction"] for row in rows] == expected and len(set(expected)) == 3
    assert GivenAnswers("none", path).answer(records) == expected
    lengths = [len(prompts.ids(one)) for one in records]
    # the question is not part of what could be pruned
    assert [row["kept"] for row in rows] == [len(prompts.ids(one).context) for one in records]
    assert lengths[0] > POSITIONS > lengths[1]


def test_a_later_run_goes_on(script: Any, folder: Path, records: list[Record], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first = answers(script, folder, records[:1], path, "--press", "none")
    assert answers(script, folder, records, path, "--press", "none")[:1] == first
    assert len(path.read_text().splitlines()) == 3
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(SystemExit, match=r"b.jsonl: stopped after 0 s; the same command goes on"):
        answers(script, folder, records, tmp_path / "b.jsonl", "--press", "none", "--seconds", "0")


@pytest.mark.parametrize(("press", "asked_last"), [("snapkv", True), ("expected_attention", False)])
def test_a_press_prunes_to_the_same_state(
    script: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, press: str, asked_last: bool
) -> None:
    seen: list[tuple[int, float]] = []

    class Press:
        compression_ratio = 0.0

        @contextlib.contextmanager
        def __call__(self, model: Any) -> Iterator[None]:
            lengths: list[int] = []
            hook = model.model.register_forward_pre_hook(
                lambda module, given, keywords: lengths.append(keywords["input_ids"].shape[1]), with_kwargs=True
            )
            yield
            hook.remove()
            seen.append((lengths[0], self.compression_ratio))

    kvpress = types.ModuleType("kvpress")
    kvpress.SnapKVPress = kvpress.ExpectedAttentionPress = Press  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvpress", kvpress)
    one = record(0, 60)
    state = ("--kept-share", "0.25", "--kept-tokens", "4")
    answers(script, folder, [one], tmp_path / "a.jsonl", "--press", press, *state)
    ids = Prompts(PreTrainedTokenizerFast.from_pretrained(folder)).ids(one)
    context, beside = len(ids.context), len(ids.question) - 1 if asked_last else 0
    ((read, ratio),) = seen
    assert read == context + beside
    # as kvpress counts
    assert int(read * (1 - ratio)) == round(0.25 * context) + 4 + beside


def test_what_is_kept(script: Any) -> None:
    assert [script.kept_entries(n, 1 / 30, 2048) for n in (1000, 8192, 32768, 131072)] == [1000, 2321, 3140, 6417]

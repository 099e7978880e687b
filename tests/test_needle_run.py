"""A run of the needle experiment from stage to stage, and the tools around it, at tiny size on the CPU."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sharedllm_ext import SharedLLMConfig, SharedLLMForCausalLM
from sharedllm_ext.model.adapter import DOWN, FORMAT, UP

from .test_needle_example import (
    HALF,
    adapter,
    byte_classes,
    data,
    evaluate,
    export,
    models_of,
    prepare,
    questions,
    shared_words,
    tiny_base,
    tiny_retriever,
    train,
)

# the example's folder is on the path by now; its evaluate.py goes by another name in the tests
import counting  # isort: skip
import fit_words  # isort: skip
import package_form  # isort: skip
import parts  # isort: skip
import run  # isort: skip
import ablate  # isort: skip

with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "evaluate", evaluate)
    import policy

__all__ = ["data"]


@torch.no_grad()
@pytest.mark.parametrize("more", [(), (shared_words.WIDE,)])
def test_an_adapter_of_the_package_is_read(tmp_path: Path, more: tuple[Any, ...]) -> None:
    assert (package_form.DOWN, package_form.UP, package_form.FORMAT) == (DOWN, UP, FORMAT)
    assert {name: getattr(SharedLLMConfig, name) for name in package_form.DEFAULTS} == package_form.DEFAULTS
    model = tiny_base()
    ours = tiny_retriever(model, HALF, (*shared_words.RUNS, *more))
    for parameter in ours.parameters():
        parameter.copy_((torch.randn_like(parameter) * 0.2).bfloat16())
    path = tmp_path / "adapter.safetensors"
    export.export(path, ours, copy.deepcopy(model), "tiny")
    base = adapter.Base(tmp_path, model.config.to_dict(), {"file": "tiny"}, "0" * 64, ours.base, ours.classes)
    read = package_form.any_adapter(path, base)
    assert read.classes.equal(ours.classes) and read.layout == ours.layout and read.ranks == ours.ranks
    assert read.runs == ours.runs
    for name, tensor in ours.state_dict().items():
        assert read.state_dict()[name].equal(tensor), name
    adapter.save_adapter(path, ours, base, {})
    assert package_form.any_adapter(path, base).ranks == ours.ranks


def test_rules_on_the_number_of_passages() -> None:
    assert policy.kept_by_drop([10.0, 9.5, 4.0, 3.9], 0.3) == 2
    assert policy.kept_by_drop([10.0, 9.5, 9.0], 0.3) == 3 and policy.kept_by_drop([10.0, 1.0], 0.3) == 1
    records = [
        {"task": "t", "chunks": 7, "scores": [10.0, 1.0, 1.0], "right": {"1": 1.0, "3": 0.0}},
        {"task": "t", "chunks": 7, "scores": [10.0, 9.0, 1.0], "right": {"1": 0.0, "3": 1.0}},
    ]
    (row,) = policy.report(records)
    assert (row["first 1"], row["first 3"], row["drop 0.4"], row["passages, drop 0.4"]) == (50, 50, 100, 2)


@torch.no_grad()
def test_passages_are_counted_by_task(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "SHARED", 2)
    monkeypatch.setattr(policy, "SQUAD_ANSWER_TOKENS", 1)
    models = models_of(data, tiny_retriever(tiny_base(), HALF))
    source = models.source(1)
    records = [
        *policy.needle_records(models, "multi-value", 8, source, (1, 8)),
        *policy.squad_records(models, 8, source, evaluate.Paragraphs(data, source), (1, 8)),
    ]
    assert [record["task"] for record in records] == ["multi-value"] * 2 + ["SQuAD"] * 2
    for record in records:
        assert len(record["scores"]) == 8 and record["scores"] == sorted(record["scores"], reverse=True)
        assert set(record["right"]) == {"1", "8"} and record["found"]["1"] <= record["found"]["8"]
    # of two values one is right, of one value all tokens have to be
    row = questions.Row([], [1], [*b" 1, 2.", 2], [])
    assert policy.share_right(models, row, [True] * 5 + [False] * 2, True) == 1
    assert policy.share_right(models, row, [True, False, True, True, True, True, True], True) == 0.5
    assert policy.share_right(models, row, [True, False, True, True, True, True, True], False) == 0


def test_parts_of_a_folder_are_joined(tmp_path: Path) -> None:
    folder, sent, back = (tmp_path / name for name in ("data", "parts", "back"))
    (folder / "base").mkdir(parents=True)
    contents = {"a": b"", "base/b": bytes(range(256)) * 9, "base/c": b"12345", "d": b"left out", "e": b"x" * 512}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    assert parts.split(folder, sent, 1000, ["d"]) == 3
    parts.join(sent, back)
    found = {path.relative_to(back).as_posix(): path.read_bytes() for path in back.rglob("*") if path.is_file()}
    assert found == {name: content for name, content in contents.items() if name != "d"}
    assert [len((sent / f"part-00{i}").read_bytes()) for i in range(3)] == [1000, 1000, 821]
    (sent / "part-001").write_bytes(b"y" * 1000)
    with pytest.raises(SystemExit, match=r"base/b: expected SHA-256 .*send the parts again"):
        parts.join(sent, back)
    (sent / "part-002").write_bytes(b"")
    (sent / "part-001").unlink()
    with pytest.raises(SystemExit, match="expected 3 parts, got none of part-001"):
        parts.join(sent, back)


def saved_base(data: Path) -> None:
    """The base of tiny_base and a tokenizer of bytes, as prepare.py leaves them in a data folder."""
    folder = data / "base"
    model = tiny_base()
    folder.mkdir()
    # a token's number is its byte, as in the data folder of bytes
    characters = bytes_to_unicode()
    tokenizer = Tokenizer(BPE(vocab={character: byte for byte, character in characters.items()}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False, use_regex=False), ByteDecoder()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=characters[2]).save_pretrained(folder)
    tensors = {f"model.{name.removeprefix('model.')}": p.detach().contiguous() for name, p in model.named_parameters()}
    save_file({n: t for n, t in tensors.items() if "lm_head" not in n}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    (folder / "source.json").write_text(json.dumps({"package": "tiny", "file": "tiny"}))
    np.save(data / "classes.npy", byte_classes().numpy())


def called(module: Any, monkeypatch: pytest.MonkeyPatch, flags: list[Any]) -> int:
    """The exit status of a script's main, and of the scripts that it starts, in this process."""
    here = Path(run.__file__).parent
    scripts = {"train.py": train, "evaluate.py": evaluate, "export.py": export, "counting.py": counting}
    scripts |= {"fit_words.py": fit_words}

    def started(command: list[str], **_: Any) -> Any:
        script = Path(command[1])
        assert script.parent == here
        return SimpleNamespace(returncode=called(scripts[script.name], monkeypatch, command[2:]), stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", started)
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])
    try:
        module.main()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        return end.code
    return 0


SMALL_RUN = ["--device", "cpu", "--workers", 1, "--max-steps", 2]
SMALL_TRAINING = ["--contexts", 2, "--chunks", 2, "--questions", 2, "--question-tokens", 160, "--running-tokens", 64]


def test_a_run_goes_on_from_stage_to_stage(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_base(data)
    # of bytes
    monkeypatch.setattr(fit_words, "QUESTION_TOKENS", 400)
    monkeypatch.setattr(evaluate, "SHARED", 1)
    monkeypatch.setattr(evaluate, "ANSWER_TOKENS", 1)
    monkeypatch.setattr(evaluate, "SQUAD_ANSWER_TOKENS", 1)
    monkeypatch.setattr(evaluate, "TASKS", {"single": evaluate.TASKS["single, RULER's wording"]})
    out = tmp_path / "run"
    flags = ["--data", data, "--out", out, *SMALL_RUN, "--lengths", 2, 3, "--squad-lengths", 2, "--questions", 1]
    flags += ["--counting", 0, "--points", 0, "--texts", 2, "--chunks", 4, "--text-questions", 20]
    end = ["--", *SMALL_TRAINING, "--rate", 1e-3, "--memory-layers", 2]
    # a call without time for training stops before it, one without time to evaluate after it
    assert called(run, monkeypatch, [*flags, "--limit", 1, "--margin", 5, *end]) == run.GO_ON
    assert not (out / "adapter.safetensors").exists()
    monkeypatch.setattr(run.Run, "evaluate", lambda self: False)
    assert called(run, monkeypatch, [*flags, "--seconds", 300, "--limit", 300, "--margin", 0, *end]) == run.GO_ON
    trained = (out / "adapter.safetensors").read_bytes()
    monkeypatch.undo()
    monkeypatch.setattr(fit_words, "QUESTION_TOKENS", 400)
    monkeypatch.setattr(evaluate, "SHARED", 1)
    monkeypatch.setattr(evaluate, "SQUAD_ANSWER_TOKENS", 1)
    monkeypatch.setattr(evaluate, "TASKS", {"single": evaluate.TASKS["single, RULER's wording"]})
    assert called(run, monkeypatch, [*flags, "--seconds", 300, *end]) == 0
    assert (out / "adapter.safetensors").read_bytes() == trained
    results = json.loads((out / "results.json").read_text())
    names = {"needles, 2 chunks, seed 0", "needles, 3 chunks, seed 0", "SQuAD, 2 chunks, seed 0"}
    assert names <= set(results) and results["needles, 2 chunks, seed 0"][0]["questions"] == 1
    with safe_open(out / "adapter.safetensors", "pt") as file:
        training = json.loads(file.metadata()["training"])
    assert training["steps"] == 2 and training["flags"]["rate"] == 1e-3
    assert results["adapter"] == adapter.file_digest(out / "fitted.safetensors")
    shared = SharedLLMForCausalLM.from_adapter(out / "package.safetensors", data / "base")
    assert shared.config.injection_layers == 2
    # results of another adapter are not mixed with these, nor are other flags of training
    (out / "results.json").write_text(json.dumps({**results, "adapter": "other"}))
    with pytest.raises(SystemExit, match=r"expected results of .*give another --out"):
        called(run, monkeypatch, [*flags, "--seconds", 300, *end])
    with pytest.raises(SystemExit, match=r"--: expected .* as this run was begun with, got \['--rate', '2'\]"):
        called(run, monkeypatch, [*flags, "--", "--rate", 2])


def test_a_tokenizer_that_ends_otherwise_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training would teach answers to end with a token at which the base's configuration does not stop."""
    saved_base(data)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data / "base")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(1)
    tokenizer.save_pretrained(data / "base")
    flags = ["--data", data, "--out", tmp_path / "a.safetensors", "--device", "cpu", "--max-steps", 0]
    with pytest.raises(SystemExit, match="a tokenizer that ends with token 2 as the base does, got one with 1"):
        called(train, monkeypatch, flags)


def test_words_of_all_that_is_read_are_trained_and_exported(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--wide``: training, the package's form, training on from it, and the scores of both codes."""
    saved_base(data)
    flags = ["--data", data, *SMALL_TRAINING, "--memory-layers", 2, "--seconds", 300, "--device", "cpu"]
    flags += ["--workers", 1, "--rate", 1e-2, "--wide"]
    narrow, first, second, package = (tmp_path / f"{name}.safetensors" for name in ("narrow", "1", "2", "package"))
    assert called(train, monkeypatch, [*flags, "--max-steps", 3, "--out", first]) == 0
    assert called(export, monkeypatch, ["--data", data, "--adapter", first, "--out", package]) == 0
    # begin with the package's form of it, and without a step lose nothing
    assert called(train, monkeypatch, [*flags, "--max-steps", 0, "--init", package, "--out", second]) == 0
    base = adapter.load_base(data / "base", torch.device("cpu"))
    ours = adapter.load_adapter(second, base)
    state = adapter.load_adapter(first, base).state_dict()
    # the package's form has vectors in bfloat16, too
    assert all(tensor.bfloat16().equal(state[name].bfloat16()) for name, tensor in ours.state_dict().items())
    assert ours.pick.word_beta.equal(state["pick.word_beta"])
    assert ours.runs == (*shared_words.RUNS, shared_words.WIDE) and ours.pick.word_beta.shape == (1, 4)
    assert ours.pick.word_beta.std() > 0
    with pytest.raises(SystemExit, match=r"--init: expected an adapter with words .*got one with .*margin=64"):
        called(train, monkeypatch, [*flags[:-1], "--max-steps", 0, "--init", package, "--out", narrow])
    # what the package makes of it
    shared: Any = SharedLLMForCausalLM.from_adapter(package, data / "base")
    assert shared.config.word_runs == ours.runs
    text = torch.from_numpy(np.load(data / "test.npy").astype(np.int64))
    document, question = text[None, : 3 * 1024], text[None, 1000:1040]
    with torch.no_grad():
        keys = ours.compress(ours.compressor_weights(), document.view(3, 1024))[1]
        used = torch.ones_like(question, dtype=torch.bool)
        words = ours.word_index(document)
        scores = ours.scores(ours.compressor_weights(), question, used, keys, words)[0]
        (found,) = shared.find_passages(question, document, count=24)
        got = torch.empty(24)
        got[[passage.segment for passage in found]] = torch.tensor([passage.score for passage in found])
        torch.testing.assert_close(got, scores, rtol=1e-4, atol=1e-4)
        # the term counts
        ours.pick.word_beta[:, 3] = 0
        without = ours.scores(ours.compressor_weights(), question, used, keys, words)[0]
        assert (without - scores).abs().max() > 1e-2
    # and it is not lost where the package saves
    shared.save_adapter(package, data / "base")
    again: Any = SharedLLMForCausalLM.from_adapter(package, data / "base")
    assert again.find_passages(question, document, count=24) == [found]


def test_words_are_fitted_to_long_texts(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``fit_words.py``: scores are the retriever's, the loss falls, and only the weights of tokens and words change."""
    saved_base(data)
    # of bytes
    monkeypatch.setattr(fit_words, "QUESTION_TOKENS", 400)
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    flags = ["--data", data, *SMALL_TRAINING, "--memory-layers", 2, "--seconds", 300, "--device", "cpu"]
    assert called(train, monkeypatch, [*flags, "--workers", 1, "--max-steps", 0, "--out", first]) == 0
    base = adapter.load_base(data / "base", torch.device("cpu"))
    given = adapter.load_adapter(first, base)
    source = questions.QuestionSource(data, models_of(data, given).tokenizer, "train", 5, given.layout)
    weights = given.compressor_weights()
    long_text = source.long_text

    def kept(*arguments: Any) -> Any:
        texts.append(long_text(*arguments))
        return texts[-1]

    for paragraphs in (False, True):
        texts: list[Any] = []
        monkeypatch.setattr(source, "long_text", kept)
        evidence = list(fit_words.evidence_of(given, weights, source, paragraphs, 4, 12))
        (text,) = texts
        asked = [row for row in text.rows if [other.question for other in text.rows].count(row.question) == 1]
        assert 0 < len(evidence) == len(asked) and {one.kind for one in evidence} == {
            "paragraphs" if paragraphs else "statements"
        }
        ids = torch.from_numpy(text.context)
        with torch.no_grad():
            keys, words = given.compress(weights, ids.view(4, -1))[1], given.word_index(ids[None])
            for one, row in zip(evidence, asked, strict=True):
                question = torch.tensor([row.question])
                used = torch.ones_like(question, dtype=torch.bool)
                expected = given.scores(weights, question, used, keys, words)[0]
                # evidence is kept in float16
                torch.testing.assert_close(fit_words.scores(given.pick, one), expected, rtol=2e-3, atol=2e-2)
                start, length = row.places[0]
                assert start // given.layout.segment in one.right
                assert (start + length - 1) // given.layout.segment in one.right
    more = ["--texts", 4, "--chunks", 6, "--questions", 12, "--held-out", 0.2, "--epochs", 4, "--rate", 0.05]
    fitting = ["--data", data, "--adapter", first, "--out", second, "--wide", "--device", "cpu", *more]
    assert called(fit_words, monkeypatch, fitting) == 0
    fitted = adapter.load_adapter(second, base)
    assert fitted.runs == (*shared_words.RUNS, shared_words.WIDE) and fitted.pick.word_beta.shape == (1, 4)
    names = ("token_weight", "word_weight", "token_bias", "word_bias", "beta", "word_beta")
    before = given.state_dict()
    for name, tensor in fitted.state_dict().items():
        changes = name.startswith("pick.") and name.split(".")[1] in names
        assert (tensor.shape == before[name].shape and tensor.equal(before[name])) is not changes, name

    def loss(retriever: Any) -> float:
        with torch.no_grad():
            return float(sum(fit_words.loss_of(retriever.pick, one) for one in held_out))

    widened = questions.QuestionSource(data, models_of(data, fitted).tokenizer, "train", 6, given.layout)
    held_out = list(fit_words.evidence_of(fitted, weights, widened, False, 6, 12))
    after = loss(fitted)
    # nobody has fitted these
    train.begin_with(fitted, given)
    assert after < 0.9 * loss(fitted)
    with pytest.raises(SystemExit, match=r"text: expected 900 questions in 2048 tokens .*; ask fewer"):
        called(fit_words, monkeypatch, [*fitting, "--chunks", 2, "--questions", 900])


def test_fitting_is_in_units_of_the_place_among_the_best() -> None:
    """The answer's score is compared with the last of the eight places that others leave it."""
    (pick,) = [SimpleNamespace(layers=[], token_weight=[], word_weight=[], word_beta=torch.zeros(0, 1))]
    others = torch.arange(20, 0, -1).float()
    for right, own, last in (([3], [4.0], 13.0), ([0, 5], [30.0, 14.0], 14.0)):
        found = others.clone()
        for place, score in zip(right, own, strict=True):
            found = torch.cat((found[:place], torch.tensor([score]), found[place:]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fit_words, "scores", lambda *_, found=found: found)
            evidence = fit_words.Evidence(others, others, others, right, "statements")
            expected = sum(2 * np.log1p(np.exp((last - score) / 2)) for score in own) / len(own)
            assert float(fit_words.loss_of(pick, evidence)) == pytest.approx(expected, rel=1e-5)


def test_ablations_are_one_file(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_base(data)
    monkeypatch.setattr(evaluate, "SHARED", 1)
    monkeypatch.setattr(evaluate, "SQUAD_ANSWER_TOKENS", 1)
    monkeypatch.setattr(evaluate, "TASKS", {"single": evaluate.TASKS["single, RULER's wording"]})
    out = tmp_path / "ablations.json"
    flags = ["--data", data, "--out", out, *SMALL_RUN, "--lengths", 2, "--questions", 1, "--seconds", 300]
    end = ["--", *SMALL_TRAINING, "--memory-layers", 2]
    name = "memory read by the top layers"
    assert called(ablate, monkeypatch, [*flags, "--runs", name, *end]) == 0
    results = json.loads(out.read_text())
    assert results[name]["training"]["flags"]["reading"] == "top" and results[name]["training"]["steps"] == 2
    assert results[name]["needles, 2 chunks, seed 0"][0]["task"] == "single"
    # what is there is not repeated, and no run begins after the limit
    flags += ["--runs", name, "4 memory layers", "--limit", -1]
    assert called(ablate, monkeypatch, [*flags, *end]) == ablate.GO_ON
    assert json.loads(out.read_text()) == results


def test_flags_of_ablations_are_those_of_training(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for flags in ablate.RUNS.values():
        # without its required ones the parser stops; a flag that it does not know would be named first or too
        monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--data", "none", "--out", "none", "--device", "cpu"])
        with pytest.raises(SystemExit, match=r"model\.safetensors is missing"):
            train.main()
    capsys.readouterr()


def test_counting_tasks_are_asked_without_the_package(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_base(data)
    lengths = ["--lengths", "24", "--questions", "1"]
    assert called(counting, monkeypatch, ["--data", data, *lengths]) == 0
    records = questions.read_json_gz(data / counting.RECORDS)
    assert [record["task"] for record in records] == ["vt", "cwe"]
    assert all(len(record["context"]) <= 24576 for record in records) and len(records[1]["answers"]) == 10
    prepare.write_json_gz(data / counting.RECORDS, [{**record, "most_tokens": 2} for record in records])
    models = models_of(data, tiny_retriever(tiny_base(), HALF))
    with torch.no_grad():
        rows = counting.counting(models, data / counting.RECORDS, 1)
    assert [(row["task"], row["chunks"], row["questions"]) for row in rows] == [("vt", 24, 1), ("cwe", 24, 1)]
    assert counting.share_written("AAA, bbb", ["aaa", "ccc"]) == 0.5
    assert counting.whole_chunks([1, 2, 3], 9, 4).tolist() == [1, 2, 3, 9]

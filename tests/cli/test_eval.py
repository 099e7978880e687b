"""``sharedllm eval`` from end to end: the shipped model, bases, suites' files, kept answers, plots."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.cli import build_parser
from sharedllm_ext.cli import eval as command
from sharedllm_ext.cli._common import DEMO_MODEL
from sharedllm_ext.evaluation import systems as systems_module
from sharedllm_ext.evaluation.generators import TASKS
from sharedllm_ext.evaluation.longbench import LONGBENCH

from ..model.gguf_files import write_gguf
from .conftest import Result, sentences

Cli = Callable[..., Result]
#: One pass-key task in the shipped model's tokens.
SHORT = ("--tasks", "passkey", "--lengths", "400", "--questions", 2, "--depths", "0,100")


@pytest.fixture
def kept(tmp_path: Path) -> tuple[str, Path]:
    """``--predictions`` in a folder of its own."""
    return "--predictions", tmp_path / "kept.jsonl"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_system_answers_and_nothing_is_asked_twice(
    cli: Cli, kept: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["memory", "full", "yarn", "ntk", "window", "bm25"]
    options = ("eval", "demo", *SHORT, "--systems", ",".join(names), "--rope-factor", 2, "--window", 300, "--json")
    first = cli(*options, *kept)
    assert first.code == 0, first.err
    assert first.err == ""
    document = first.json
    assert [(row["task"], row["length"], row["system"]) for row in document["results"]] == [
        ("passkey", 400, name) for name in names
    ]
    assert all(row["questions"] == 2 and 0 <= row["score"] <= 1 for row in document["results"])
    assert [(row["system"], row["depth"]) for row in document["by_depth"]][:2] == [("memory", 0.0), ("memory", 100.0)]
    assert document["systems"]["window"] == {"system": "window", "chat": False, "window": 300, "sinks": 4}
    assert document["systems"]["yarn"]["factor"] == 2.0
    assert (document["answers"], document["answers_kept"], document["seed"]) == (12, 0, 0)
    rows = rows_of(kept[1])
    assert [row["system"] for row in rows] == names * 2
    assert {row["depth"] for row in rows} == {0.0, 100.0}

    def never(*args: Any, **more: Any) -> str:
        raise AssertionError("asked again")

    monkeypatch.setattr(systems_module._Generating, "_generate", never)
    second = cli(*options, *kept)
    assert second.code == 0, second.err
    assert second.json["answers_kept"] == 12
    assert second.json["results"] == document["results"]
    assert rows_of(kept[1]) == rows


def test_table(cli: Cli, kept: tuple[str, Path]) -> None:
    tasks = ("--tasks", "passkey,number", "--lengths", "500,400", "--questions", 1)
    result = cli("eval", "demo", *tasks, "--systems", "memory,window", *kept)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].split() == ["task", "length", "system", "questions", "score", "95%", "interval", "time/answer"]
    groups = [
        (task, length, name)
        for task in ("passkey", "number")
        for length in ("400", "500")
        for name in ("memory", "window")
    ]
    assert [tuple(line.split()[:3]) for line in lines[1:9]] == groups
    assert [line.split()[:5] for line in lines[9:]] == [
        ["mean", "of", "tasks", length, name] for length in ("400", "500") for name in ("memory", "window")
    ]
    assert len({len(line) for line in lines}) == 1
    assert result.err.endswith(f"predictions: {kept[1]}, 8 answers\n")


def test_an_interrupted_run_keeps_its_answers_and_goes_on(
    cli: Cli, kept: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = systems_module._Generating._generate
    asked: list[int] = []

    def interrupted(self: Any, *args: Any, **more: Any) -> str:
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return original(self, *args, **more)

    monkeypatch.setattr(systems_module._Generating, "_generate", interrupted)
    result = cli("eval", "demo", *SHORT, *kept)
    assert (result.code, result.out) == (130, "")
    assert len(rows_of(kept[1])) == 1
    result = cli("eval", "demo", *SHORT, *kept)
    assert result.code == 0 and len(asked) == 3
    assert result.err.endswith(f"predictions: {kept[1]}, 2 answers, 1 of them kept from an earlier run\n")


def test_base_reads_with_full_attention(cli: Cli, base: Path, kept: tuple[str, Path], tmp_path: Path) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    options = ("eval", own, "--tasks", "passkey", "--lengths", 700, "--questions", 2, "--json", *kept)
    result = cli(*options)
    assert result.code == 0, result.err
    assert [row["system"] for row in result.json["results"]] == ["full"]
    # another file of the model, another model
    weights = own / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert cli(*options).json["answers_kept"] == 0
    assert cli(*options).json["answers_kept"] == 2
    result = cli(*options, "--systems", "memory")
    assert (result.code, result.out) == (2, "")
    assert result.err == f"sharedllm: error: --systems memory: expected a SharedLLM checkpoint, got a base one: {own}\n"


def test_other_systems_read_with_another_base(cli: Cli, base: Path, checkpoint: Path, kept: tuple[str, Path]) -> None:
    asked = ("--tasks", "passkey", "--lengths", 700, "--questions", 1, "--systems", "full", "--json")
    own = cli("eval", checkpoint, *asked, *kept)
    other = cli("eval", checkpoint, "--base", base, *asked, *kept)
    assert other.json["answers_kept"] == 0
    # that checkpoint's decoder was never trained away from its base
    first, second = rows_of(kept[1])
    assert first["prediction"] == second["prediction"]
    assert (own.json["base"], other.json["base"]) == (None, str(base))
    result = cli("eval", "demo", "--base", base, *asked, *kept)
    assert result.code == 1
    assert result.err == "sharedllm: error: --base: expected a vocabulary of 4096 tokens as MODEL has, got 320\n"


def test_gguf_base(cli: Cli, base: Path, tokenizer: Any, kept: tuple[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = LlamaForCausalLM.from_pretrained(base)
    path = write_gguf(model, tmp_path / "base.gguf", quantised=True, tokenizer=tokenizer)
    result = cli("eval", path, "--tasks", "passkey", "--lengths", 900, "--questions", 1, "--json", *kept)
    assert result.code == 0, result.err
    assert [row["system"] for row in result.json["results"]] == ["full"]


def test_haystack_and_documents(cli: Cli, kept: tuple[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(sentences(100).replace("\n", ".\n"))
    paragraphs = [
        {"context": f"Lake {i} is deep.", "qas": [{"question": f"Which lake {i}?", "answers": [{"text": f"Lake {i}"}]}]}
        for i in range(30)
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    sources = ("--haystack", tmp_path / "text.txt", "--squad", tmp_path / "squad.json")
    tasks = ("--tasks", "niah_single_2,qa_squad", "--lengths", 500, "--questions", 1, "--seed", 7)
    result = cli("eval", "demo", *tasks, *sources, *kept, "--json")
    assert result.code == 0, result.err
    assert [row["task"] for row in result.json["results"]] == ["niah_single_2", "qa_squad"]
    assert (result.json["seed"], result.json["haystack"]) == (7, str(tmp_path / "text.txt"))


def test_suite_of_files(cli: Cli, kept: tuple[str, Path], tmp_path: Path) -> None:
    row = {
        "input": "A.\nThe sky.\nWhat is the special magic number for x?",
        "outputs": ["1"],
        "answer_prefix": " It is",
    }
    for length in ("8k", "4k"):
        folder = tmp_path / "ruler" / length / "niah_single_1"
        folder.mkdir(parents=True)
        (folder / "validation.jsonl").write_text((json.dumps({**row, "length": 10}) + "\n") * 2)
    result = cli("eval", "demo", "--suite", "ruler", "--data", tmp_path / "ruler", "--questions", 1, *kept)
    assert result.code == 0, result.err
    assert [line.split()[:3] for line in result.out.splitlines()[1:]] == [
        ["niah_single_1", "4,096", "memory"],
        ["niah_single_1", "8,192", "memory"],
    ]


def test_labels_of_a_suite(cli: Cli, kept: tuple[str, Path], tmp_path: Path) -> None:
    choices = {f"choice_{letter}": letter for letter in "ABCD"}
    row = {"_id": "1", "domain": "Law", "sub_domain": "x", "question": "why?", "answer": "C", "context": "a", **choices}
    rows = [{**row, "difficulty": level, "length": size} for level, size in (("hard", "long"), ("easy", "short"))]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    result = cli("eval", "demo", "--suite", "longbench-v2", "--data", tmp_path / "data.json", *kept)
    assert result.code == 0, result.err
    assert [" ".join(line.split()[:3]) for line in result.out.splitlines()[1:]] == [
        "Law short memory",
        "Law long memory",
        "difficulty easy memory",
        "difficulty hard memory",
    ]
    document = cli("eval", "demo", "--suite", "longbench-v2", "--data", tmp_path, *kept, "--json").json
    assert document["answers_kept"] == 2
    assert {row["label"] for row in document["by_label"]} == {"difficulty", "length"}


def test_plot_of_depth_by_length(cli: Cli, kept: tuple[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = cli("eval", "demo", *SHORT, "--systems", "memory,window", *kept, "--plot", tmp_path / "a.png")
    assert result.code == 0, result.err
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert result.err.endswith(f"plot: {tmp_path}/a.png\n")


def test_table_survives_a_plot_that_cannot_be_drawn(
    cli: Cli, kept: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device", "a.png")

    monkeypatch.setattr("sharedllm_ext.cli._eval_run.plot", full)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    result = cli("eval", "demo", *SHORT, *kept, "--plot", tmp_path / "a.png")
    assert result.code == 1
    assert "passkey" in result.out
    assert result.err.endswith("sharedllm: error: --plot: a.png: no space left on device\n")


def test_questions_go_to_another_program_and_its_answers_come_back(
    cli: Cli, kept: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "questions.jsonl"
    direct = cli("eval", "demo", *SHORT, "--systems", "window", "--window", 300, *kept, "--json")
    with monkeypatch.context() as patch:
        # the model is not needed
        patch.setattr("sharedllm_ext.cli._eval_run.load_system_model", None)
        result = cli("eval", "demo", *SHORT, "--export", path)
    assert (result.code, result.out) == (0, "")
    assert result.err.endswith(f"exported: {path}, 2 questions\n")
    assert cli("eval", "demo", *SHORT, "--export", path, "--json").json == {"export": str(path), "questions": 2}
    rows = rows_of(path)
    given = [{"fingerprint": row["fingerprint"], "prediction": row["answers"][0], "seconds": 2.0} for row in rows]
    for name in ("right", "late"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    asked = ("--suite", "records", "--data", path, "--systems", "window", "--window", 300)
    joined = ("--answers", f"snapkv={tmp_path}/right.jsonl", "--answers", f"other={tmp_path}/late.jsonl")
    result = cli("eval", "demo", *asked, *joined, "--batch", 2, *kept, "--json")
    assert result.code == 0, result.err
    found = {row["system"]: row for row in result.json["results"]}
    assert list(found) == ["window", "snapkv", "other"]
    # the same question is the same, wherever it comes from
    assert found["window"] == direct.json["results"][0]
    assert found["snapkv"]["score"] == found["other"]["score"] == 1.0
    assert (result.json["answers"], result.json["answers_kept"]) == (6, 2)
    table = cli("eval", "demo", *asked, *joined, *kept).out.splitlines()
    assert [line.split()[2:5] for line in table[2:]] == [["snapkv", "2", "100.0"], ["other", "2", "100.0"]]
    assert all(line.endswith("2.00 s") for line in table[2:])
    (tmp_path / "late.jsonl").write_text(json.dumps(given[0]) + "\n")
    result = cli("eval", "demo", *asked, *joined, *kept)
    assert result.code == 1
    assert re.search(r"late.jsonl: expected an answer to passkey/400/1 \(fingerprint .*\), got none", result.err)


def test_export_of_a_base_and_of_none(cli: Cli, base: Path, tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = write_gguf(LlamaForCausalLM.from_pretrained(base), tmp_path / "a.gguf", quantised=True, tokenizer=tokenizer)
    asked = ("--tasks", "passkey", "--lengths", 900, "--questions", 1, "--export")
    for number, model in enumerate((base, path)):
        assert cli("eval", model, *asked, tmp_path / f"{number}.jsonl").code == 0
    assert rows_of(tmp_path / "0.jsonl") == rows_of(tmp_path / "1.jsonl")
    result = cli("eval", tmp_path / "nothing", *asked, tmp_path / "2.jsonl")
    assert (result.code, result.out) == (1, "")
    assert result.err == f"sharedllm: error: {tmp_path}/nothing: no such folder\n"
    assert not (tmp_path / "2.jsonl").exists()


def test_embedder_that_is_not_installed(
    cli: Cli, kept: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    result = cli("eval", "demo", *SHORT, *kept, "--systems", "embedding", "--embedder", tmp_path)
    assert result.code == 1
    assert result.err.splitlines()[-1] == (
        "sharedllm: error: --embedder: sentence-transformers is not installed (pip install sentence-transformers)"
    )


DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text()


def test_commands_of_the_document_are_understood() -> None:
    commands = re.findall(r"^    sharedllm (eval .*)$", DOCUMENT, re.MULTILINE)
    assert len(commands) > 5
    for command_line in commands:
        args = build_parser().parse_args(command_line.split())
        assert set(args.systems or ()) <= set(command.SYSTEMS)
        known = {"ruler", "infinitebench", *TASKS, *LONGBENCH}
        assert set(args.tasks or ()) <= known


def test_python_of_the_document_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = DOCUMENT.split("### In Python\n")[1].split("\n### ")[0]
    names: dict[str, Any] = {
        "Path": Path,
        "model": SharedLLMForCausalLM.from_pretrained(DEMO_MODEL).eval(),
        "tokenizer": AutoTokenizer.from_pretrained(DEMO_MODEL),
    }
    exec(compile(textwrap.dedent(code.replace("questions=10", "questions=1")), "evaluation.md", "exec"), names)
    assert capsys.readouterr().out.startswith("passkey 1024 memory ")
    assert len(rows_of(tmp_path / "answers.jsonl")) == 1


BAD: list[tuple[str, tuple[object, ...], int, str]] = [
    ("unknown system", ("--systems", "memory,x"), 2, "--systems: expected some of memory, pick, .*, got 'x'"),
    ("same system twice", ("--systems", "full,full"), 2, "expected different names divided by commas, got 'full,full'"),
    (
        "no pick",
        ("--systems", "pick"),
        2,
        "--systems pick: expected a model with a trained pick, got one without",
    ),
    ("unknown task", ("--tasks", "x"), 2, "--tasks: expected some of niah_single_1, .*, got 'x'"),
    ("task without its file", ("--tasks", "qa_squad"), 2, "--tasks: expected a file of squad questions for qa_squad"),
    ("no task", ("--tasks", ""), 2, "expected different names divided by commas, got ''"),
    ("depth above 100", ("--depths", "0,101"), 2, "expected different numbers from 0 to 100, got '0,101'"),
    ("depth no number", ("--depths", "nan"), 2, "expected different numbers from 0 to 100, got 'nan'"),
    ("no length", ("--lengths", "0,9"), 2, "--lengths: expected whole numbers of at least 1, got 0"),
    ("no questions", ("--questions", "0"), 2, "number of at least 1, got '0'"),
    (
        "length without room",
        ("--tasks", "passkey,cwe", "--lengths", "400"),
        2,
        r"--lengths: expected at least \d+ tokens for cwe with this tokenizer, got 400",
    ),
    ("suite without data", ("--suite", "ruler"), 2, "--suite: expected --data with it, got none"),
    ("data without suite", ("--data", "{folder}"), 2, "--data: expected --suite with it, got none"),
    ("prompts without suite", ("--prompts", "{text}"), 2, "--prompts: expected --suite with it, got none"),
    (
        "lengths of a suite",
        ("--suite", "ruler", "--data", "{folder}", "--lengths", "4k"),
        2,
        "--lengths: expected no --suite with it, got ruler",
    ),
    ("suite without files", ("--suite", "ruler", "--data", "{folder}"), 1, "{folder}: expected files of ruler tasks"),
    ("suite that is nowhere", ("--suite", "ruler", "--data", "{nothing}"), 1, "{nothing}: no such file or folder"),
    ("unknown suite", ("--suite", "x", "--data", "{folder}"), 2, "--suite: expected .*, got 'x'"),
    ("haystack that is nowhere", ("--haystack", "{nothing}"), 1, "{nothing}: no such file or folder"),
    ("haystack of bytes", ("--haystack", "{bytes}"), 1, "{bytes}: expected UTF-8 text, got byte 0xff"),
    ("squad that is none", ("--squad", "{text}"), 1, "{text}: expected a JSON object with SQuAD's data, got"),
    ("hotpotqa that is none", ("--hotpotqa", "{json}"), 1, r"{json}: expected a JSON array, got \{{\}}"),
    ("empty path", ("--haystack", ""), 2, "--haystack: expected a path, got an empty one"),
    ("predictions of another kind", ("--predictions", "{text}"), 1, "{text} line 1: expected a prediction, got"),
    ("predictions into nowhere", ("--predictions", "{nothing}/p"), 1, "--predictions: no such folder: {nothing}"),
    ("predictions onto a folder", ("--predictions", "{folder}"), 1, "--predictions: expected a file, got the folder"),
    (
        "predictions onto the haystack",
        ("--haystack", "{text}", "--predictions", "{text}"),
        2,
        "--predictions: expected another file than those that are read, got {text}",
    ),
    ("plot of another kind", ("--plot", "x.gif"), 2, "--plot: expected a file name that ends in .png"),
    ("plot without depths", ("--plot", "x.png", "--tasks", "vt"), 2, "--plot: expected a task with one place of the"),
    (
        "yarn that stretches nothing",
        ("--systems", "yarn"),
        2,
        "--systems yarn: expected --rope-factor, or",
    ),
    (
        "chat without a template",
        ("--chat-template",),
        1,
        "--chat-template: chat: expected a tokenizer with",
    ),
    (
        "a window too small",
        ("--systems", "window", "--window", "10"),
        1,
        "expected at most 10 tokens in the window for",
    ),
    ("embedding without a model", ("--systems", "embedding"), 2, "--systems embedding: expected --embedder with it"),
    (
        "embedder that is nowhere",
        ("--systems", "embedding", "--embedder", "{nothing}"),
        1,
        "--embedder: {nothing}: expected the folder of a Sentence Transformers model, got none",
    ),
    ("answers without a name", ("--answers", "{text}"), 2, "--answers: expected NAME=FILE, got '{text}'"),
    ("answers of a known name", ("--answers", "full={text}"), 2, "--answers: expected a name of its own for each file"),
    ("answers of another kind", ("--answers", "x={text}"), 1, "{text} line 1: expected a JSON object, got"),
    ("answers that are nowhere", ("--answers", "x={nothing}"), 1, "{nothing}: no such file"),
    ("batch of none", ("--batch", "0"), 2, "number of at least 1, got '0'"),
    ("export of another kind", ("--export", "x.txt"), 2, "--export: expected a file name that ends in .jsonl"),
    ("export with a plot", ("--export", "x.jsonl", "--plot", "x.png"), 2, "--plot: expected no --export with it"),
    (
        "export onto what is read",
        ("--suite", "records", "--data", "{rows}", "--export", "{rows}"),
        2,
        "--export: expected another file than those that are read, got {rows}",
    ),
    ("base that is nowhere", ("--base", "{nothing}"), 1, "{nothing}: no such folder"),
]


@pytest.mark.parametrize(("options", "code", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_one_clear_line(
    cli: Cli,
    options: tuple[object, ...],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {name: tmp_path / name for name in ("nothing", "folder", "text", "json", "bytes")}
    places["folder"].mkdir()
    places["text"].write_text("only words\n")
    places["json"].write_text("{}")
    places["bytes"].write_bytes(b"\xff\n")
    places["rows"] = tmp_path / "rows.jsonl"
    places["rows"].write_text("{}\n")
    if "x.png" in options:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    before = places["text"].read_text()
    result = cli("eval", "demo", *(str(option).format(**places) for option in options))
    assert result.err.startswith("sharedllm: error: "), result.err
    assert result.err.count("\n") == 1, result.err
    assert re.search(message.format(**{name: re.escape(str(path)) for name, path in places.items()}), result.err)
    assert (result.code, result.out) == (code, "")
    assert places["text"].read_text() == before


def test_plot_without_matplotlib(cli: Cli, kept: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = cli("eval", "demo", *SHORT, *kept, "--plot", "a.png")
    assert result.code == 1
    assert result.err == "sharedllm: error: --plot: matplotlib is not installed (pip install matplotlib)\n"


@pytest.mark.parametrize("place", ["nothing", "file", "bert"])
def test_models_that_are_none(cli: Cli, kept: tuple[str, Path], tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    result = cli("eval", tmp_path / place, *SHORT, *kept)
    assert (result.code, result.out) == (1, "")
    assert result.err.count("\n") == 1 and str(tmp_path / place) in result.err
    assert cli("eval", tmp_path / "nothing.gguf", *SHORT, *kept).code == 1

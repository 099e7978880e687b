"""Batches: a pure function of seed, step and part; every place holds what the answer says; records; bad input."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sharedllm_ext.evaluation.texts import TextError
from sharedllm_ext.training import Mix, PromptTokens, Sizes, Sources, read_sources, token_classes
from sharedllm_ext.training.data import insert, needed_segments, segments_of
from sharedllm_ext.training.wordings import SEVERAL, WORDINGS, facts

from ..cli.conftest import VOCABULARY
from .conftest import SIZES


def flat(batch: Any) -> str:
    return repr(
        [(e.context.tolist(), e.questions, e.turns, e.running.tolist()) for e in batch.examples]
        + [batch.gates, [index.tolist() for index in batch.chunk_index], batch.end]
    )


def test_a_batch_follows_from_seed_step_and_part(mix: Callable[..., Mix]) -> None:
    one, other = mix(), mix()
    later = [flat(one.batch(step, part)) for step in (5, 0, 1) for part in (1, 0)]
    assert later == [flat(other.batch(step, part)) for step in (5, 0, 1) for part in (1, 0)]
    assert len(set(later)) == 6
    assert flat(mix(seed=1).batch(0, 0)) != flat(one.batch(0, 0))


def test_places_hold_the_answers(mix: Callable[..., Mix], tokenizer: Any) -> None:
    """The statements of a question about facts hold all values that the answer lists; a passage goes on as asked."""
    made = mix()
    kinds = {"facts": 0, "several": 0, "passages": 0}
    for step in range(100):
        for example in made.batch(step, 0).examples:
            assert len(example.context) == 6 * 64 and len(example.running) == 24 and example.turns
            for question in example.questions:
                shown = [example.context[a : a + n].tolist() for a, n in question.places]
                answer = tokenizer.decode(question.answer)
                if shown[0][-len(question.answer) :] == question.answer:
                    kinds["passages"] += 1
                    given = len(shown[0]) - len(question.answer)
                    assert question.question[-given:] == shown[0][:given]
                    continue
                values = answer.split(", ")
                kinds["facts" if len(values) == 1 else "several"] += 1
                assert len(values) == len(shown)
                ordered = [t for _, t in sorted(zip(question.places, shown, strict=True))]
                for value, tokens in zip(values, ordered, strict=True):
                    assert value in tokenizer.decode(tokens)
    assert min(kinds.values()) >= 10, kinds


def test_wordings_hold_key_and_value() -> None:
    assert len(WORDINGS) >= 16 and len({s for s, _ in WORDINGS}) == len(WORDINGS)
    assert all("{k}" in s and "{v}" in s and "{k}" in q and "{v}" not in q for s, q in (*WORDINGS, *SEVERAL))
    rng, counts = np.random.default_rng(0), set()
    for _ in range(200):
        statements, about = facts(rng)
        counts.add((len(statements), len(about)))
        for fact in about:
            assert all(v in statements[i] for v, i in zip(fact.values, fact.statements, strict=True))
    # one question about several values beside two distractors; one question for each of up to six keys
    assert {(4, 1), (5, 1), (6, 1)} <= counts and {(n, n) for n in range(1, 7)} <= counts


def test_pieces_stand_where_they_are_said_to() -> None:
    context, first = insert(np.arange(10), [[91, 92], [93]], np.array([7, 3]))
    assert context.tolist() == [0, 1, 2, 93, 3, 4, 5, 6, 91, 92, 7, 8, 9] and first == [8, 3]
    assert segments_of([(7, 2), (30, 1)], 8) == [0, 1, 3]
    assert needed_segments([(6, 6)], 8, 4) == {0}
    assert needed_segments([(6, 7)], 8, 4) == {0, 1}


def test_chunks_are_spread(mix: Callable[..., Mix]) -> None:
    made, ends = mix(), set()
    for step in range(40):
        batch = made.batch(step, 0)
        ends.add(batch.end)
        for index in batch.chunk_index:
            assert len(index) == 6 and (np.diff(index) > 0).all() and index[0] >= 0 and index[-1] < batch.end
    assert min(ends) == 6 and max(ends) > 500
    plain = mix(sizes=dataclasses.replace(SIZES, spread=False))
    assert {plain.batch(step, 0).end for step in range(10)} == {6}


def test_token_arrays_need_no_tokenizer(mix: Callable[..., Mix]) -> None:
    for example in mix(tokens=True).batch(0, 0).examples:
        for question in example.questions:
            ((start, size),) = question.places
            assert [*question.question, *question.answer] == example.context[start : start + size].tolist()


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_records_know_their_evidence(tmp_path: Path, tokenizer: Any, mix: Callable[..., Mix]) -> None:
    context = "alpha delta 42 naïve gamma_1 (eps) return x=3"
    start = context.index("gamma_1")
    path = write(
        tmp_path / "q.jsonl",
        {"context": context, "question": "which?", "answer": "gamma_1"},
        {"context": context, "question": "which?", "answer": "none", "place": [start, start + 7]},
        {"context": context, "question": "which?", "answer": "elsewhere"},
        {"context": [5, 6, 7, 8, 6, 7], "question": [3], "answer": [6, 7]},
        {"context": [5, 6, 7, 8], "question": [3], "answer": [9], "place": [[1, 3], [3, 4]]},
        {"text": "plain"},
    )
    sources = read_sources([path], tokenizer, VOCABULARY)
    assert [len(d) for d in sources.documents] == [len(tokenizer("plain").input_ids)]
    first, given, unknown, ids, several = sources.records
    for record in (first, given):
        ((a, n),) = record.places
        shown = tokenizer.decode(record.context[a : a + n])
        assert "gamma_1" in shown and len(shown) <= len(" gamma_1 ")
    assert unknown.places == []
    assert ids.places == [(1, 2), (4, 2)] and several.places == [(1, 2), (3, 1)]
    long = first._replace(context=np.concatenate([first.context] * 20), places=[(first.places[0][0] + 200, 3)])
    made = mix(records=[first, long])
    seen = 0
    for step in range(20):
        for example in made.batch(step, 0).examples:
            for question in example.questions:
                if question.question == first.question:
                    seen += 1
                    assert not question.everywhere and question.places
                    for a, n in question.places:
                        shown = example.context[a : a + n].tolist()
                        assert shown in (
                            first.context[(b := first.places[0][0]) : b + n].tolist(),
                            long.context[(b := long.places[0][0]) : b + n].tolist(),
                        )
    assert seen > 10


def test_a_folder_holds_all_kinds_of_files(tmp_path: Path, tokenizer: Any) -> None:
    """Questions in a folder are questions, not text with braces."""
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("alpha delta")
    np.save(folder / "deep" / "ids.npy", np.arange(9))
    (folder / "picture.png").write_bytes(bytes(range(256)))
    write(folder / "deep" / "q.jsonl", {"context": "alpha 42", "question": "which?", "answer": "42"}, {"text": "Beta"})
    sources = read_sources([str(folder)], tokenizer, VOCABULARY)
    plain = tokenizer("# a.txt\nalpha delta\n\n", add_special_tokens=False).input_ids
    beta = tokenizer("Beta", add_special_tokens=False).input_ids
    assert sorted(d.tolist() for d in sources.documents) == sorted([list(range(9)), plain, beta])
    (record,) = sources.records
    assert record.answer == tokenizer("42").input_ids and record.places
    (folder / "a.txt").unlink()
    assert len(read_sources([str(folder)], tokenizer, VOCABULARY).documents) == 2
    write(folder / "deep" / "q.jsonl", {"context": "alpha", "question": "which?"})
    with pytest.raises(TextError, match=r'q\.jsonl line 1: expected a string "answer"'):
        read_sources([str(folder)], tokenizer, VOCABULARY)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ids.npy", np.zeros(5), r"expected a 1-d array of integers, got shape \[5\] of float64"),
        ("ids.npy", np.zeros((2, 5), dtype=np.int64), r"expected a 1-d array of integers, got shape \[2, 5\] of int64"),
        ("ids.npy", np.array([1, 320]), "expected token ids from 0 to 319, got 320"),
        ("ids.npy", b"abc", "expected a .npy array of token ids, got another file"),
        ("q.jsonl", b'{"text": "a"', "q.jsonl line 1: expected a JSON object, got expecting"),
        ("q.jsonl", b"\n", "q.jsonl: expected JSON lines, got none"),
        ("a.txt", b"", "a.txt: expected text, got an empty file"),
        ("a.txt", bytes(range(256)), "a.txt: expected text, got a binary file"),
        ("a.txt", b"na\xefve", "a.txt: expected UTF-8 text, got byte 0xef at offset 2"),
        ("nothing", None, "nothing: expected a folder with text files, found none"),
    ],
)
def test_bad_files_are_refused(name: str, content: Any, message: str, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / name
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(TextError, match=message):
        read_sources([str(path)], tokenizer, VOCABULARY)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"context": "abc", "question": "q", "answer": "a", "place": [2, 9]},
            r'q.jsonl line 1: expected "place" as \[first, end\] in 0 to 3 characters, got \[2, 9\]',
        ),
        ({"context": [1, 2], "question": [1], "answer": [2], "place": [1]}, r"in 0 to 2 tokens, got \[1\]"),
        (
            {"context": [1, 999], "question": [1], "answer": [2]},
            'expected token ids from 0 to 319 in "context", got 999',
        ),
        ({"context": "abc", "question": "q"}, 'expected a string "answer"'),
        ({"context": "", "question": "q", "answer": "a"}, "of at least one token each, got none of one"),
        ({"context": 7, "question": "q", "answer": "a"}, 'expected a string "context", got 7'),
        ({"words": 7}, 'expected a string "text"'),
    ],
)
def test_bad_rows_are_refused(row: Any, message: str, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(TextError, match=message):
        read_sources([write(tmp_path / "q.jsonl", row)], tokenizer, VOCABULARY)


def test_text_needs_a_tokenizer_and_room(tmp_path: Path, mix: Callable[..., Mix], build: Callable[..., Any]) -> None:
    path = write(tmp_path / "q.jsonl", {"context": "abc", "question": "q", "answer": "a"})
    with pytest.raises(TextError, match="expected lists of token ids, because the base has no tokenizer; got text"):
        read_sources([path], None, VOCABULARY)
    config = build().config
    prompt = PromptTokens.of(config, None, 4)
    with pytest.raises(
        ValueError, match=r"expected plain text of at least 408 tokens .6 chunks of 64 and 24 .*got 400"
    ):
        Mix(Sources([np.arange(400)], []), None, prompt, config, SIZES, 0)
    # short documents follow each other
    Mix(Sources([np.arange(300), np.arange(200)], []), None, prompt, config, SIZES, 0).batch(0, 0)
    tight = Sizes(contexts=1, chunks=6, question_tokens=2, running=24)
    with pytest.raises(ValueError, match=r"expected questions that fit 2 tokens, .* got none in 50 tries"):
        mix(sizes=tight).batch(0, 0)


def test_classes_tell_words_apart(tokenizer: Any) -> None:
    classes = token_classes(tokenizer, VOCABULARY + 8)
    ids = dict(zip(("a", "A", "b"), (tokenizer(t).input_ids[0] for t in "aAb"), strict=True))
    assert classes[ids["a"]] == classes[ids["A"]] != classes[ids["b"]] and classes[ids["b"]] > 0
    for nothing in (",", " ", "\n"):
        assert classes[tokenizer(nothing).input_ids[0]] == 0
    assert not classes[VOCABULARY:].any() and classes[tokenizer.eos_token_id] == 0

"""Every metric against values computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from sharedllm_ext.evaluation.metrics import METRICS, common_length, normal_words, score
from sharedllm_ext.evaluation.records import Record


def record(metric: str, answers: list[str], **more: Any) -> Record:
    fields = {"task": "t", "context": "c", "question": "q", "answer_prefix": "", "max_new_tokens": 1, "id": "1"}
    return Record(**{**fields, "answers": answers, "metric": metric, **more})


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("", "", 0),
        ("abc", "", 0),
        ("abcbdab", "bdcaba", 4),
        ("kitten", "sitting", 4),
        ("aaa", "aa", 2),
        ("x" * 200 + "y", "y" + "x" * 150, 150),
    ],
)
def test_longest_common_subsequence(first: str, second: str, expected: int) -> None:
    assert common_length(first, second) == expected
    assert common_length(second, first) == expected
    assert common_length(list(first), list(second)) == expected


def test_normalisation_drops_articles_and_punctuation() -> None:
    assert normal_words("The  cat, an a-b; 'Theatre'!") == ["cat", "ab", "theatre"]


@pytest.mark.parametrize(
    ("metric", "answers", "prediction", "expected"),
    [
        # RULER: each answer as a part of the prediction
        ("part", ["1234", "ABCD"], "they are abcd and 12345", 1.0),
        ("part", ["12", "34", "56", "78"], "12, 78", 0.5),
        ("part", ["12"], "", 0.0),
        ("any", ["Paris", "the capital"], "it is PARIS.", 1.0),
        ("any", ["Paris", "Rome"], "London", 0.0),
        # F1: 2 shared of 3 and 2 words; 1 of 1 and 2; words as often as they come
        ("f1", ["green house"], "The green, old house", 2 * 2 / (3 + 2)),
        ("f1", ["nobody", "New York"], "york", 2 * 1 / (1 + 2)),
        ("f1", ["no no yes"], "no yes yes", 2 * 2 / (3 + 3)),
        ("f1", ["a"], "the", 0.0),
        ("f1", ["x"], "", 0.0),
        # ROUGE-L over different words: {a b c} of {a b c d} and {a b c e}
        ("rouge_l", ["a b c d"], "a b e c", 2 * 3 / (4 + 4)),
        # in another order only one of two words is in the common subsequence
        ("rouge_l", ["a b"], "b a", 2 * 1 / (2 + 2)),
        # two sentences: a b from the first, c from the second; 3 of {a b c d} and {a b x c}
        ("rouge_l", ["a b. c d"], "a b x. c", 2 * 3 / (4 + 4)),
        # a word said twice counts once
        ("rouge_l", ["a a a"], "a", 1.0),
        ("rouge_l", ["a b"], "", 0.0),
        ("rouge_l", ["x", "a b"], "a b", 1.0),
        # ROUGE-Lsum: the example of Lin (2004), union of w1 w2 and w1 w3 w5: 4 of 5 and of 10 words
        (
            "rouge_lsum",
            ["w1 w2 w3 w4 w5"],
            "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5",
            2 * 4 / (5 + 10),
        ),
        ("rouge_lsum", ["The Cat\nsat"], "cat the\nSAT", 2 * 2 / (3 + 3)),
        # the one "a" of the prediction counts once for both lines of the answer
        ("rouge_lsum", ["a\na"], "a", 2 * 1 / (2 + 1)),
        ("rouge_lsum", ["a"], "!", 0.0),
        # retrieval and count
        ("paragraph", ["Paragraph 7"], "Paragraph 7", 1.0),
        ("paragraph", ["Paragraph 7"], "7 or 17, 7 again or 3", 0.5),
        ("paragraph", ["段落7"], "7", 1.0),
        ("paragraph", ["Paragraph 7"], "none", 0.0),
        ("count", ["5"], "5 of 20", 0.5),
        ("count", ["5"], "", 0.0),
        # kitten and sitting share 4 in order: 2 * 4 / 13 = 61.5 %, whole per cent
        ("code_similarity", ["sitting"], "\n\n# no\n// no\n`no`\nkitten\nsitting", 0.62),
        ("code_similarity", ["x = 1"], "x = 1", 1.0),
        ("code_similarity", ["x"], "# only a comment", 0.0),
        # LongBench v2
        ("choice_v2", ["B"], "I think: The correct answer is (B).", 1.0),
        ("choice_v2", ["B"], "**The correct answer is B**", 1.0),
        ("choice_v2", ["B"], "The correct answer is (C), not (B)", 0.0),
        ("choice_v2", ["B"], "B", 0.0),
        # InfiniteBench
        ("first_number", ["71432"], "key 71432. 5", 1.0),
        ("first_number", ["71432"], "5 71432", 0.0),
        ("first_number", ["71432"], "no", 0.0),
        ("among_words", ["ab-cd"], '{"value": "ab-cd"}', 1.0),
        ("among_words", ["ab"], "ab-cd", 0.0),
        ("name_among_words", ["STEVE"], "It's Steve.", 1.0),
        ("name_among_words", ["STEVE"], "Steven", 0.0),
        ("multiple_choice", ["a red car", "C"], "C. a red car", 1.0),
        ("multiple_choice", ["a red car", "C"], "A red car", 0.0),
        ("multiple_choice", ["a red car", "C"], "a red car", 1.0),
        ("multiple_choice", ["a red car", "C"], "the answer is: C", 1.0),
        ("multiple_choice", ["a red car", "C"], "the answer is B, not C", 0.0),
        ("multiple_choice", ["a red car", "C"], "it's C or D", 1.0),
        ("multiple_choice", ["a red car", "C"], "it's D or C", 0.0),
        ("multiple_choice", ["a red car", "C"], "  ", 0.0),
        ("math_find", ["12"], "12.5", 1.0),
        ("math_find", ["12"], "-12", 1.0),
        ("math_find", ["-12"], "12", 1.0),
        ("math_find", ["13"], "12.5", 0.0),
        ("math_find", ["12.5"], "is 12.5, or 3", 1.0),
        ("math_find", ["12.5"], "12", 0.0),
        ("math_find", ["12"], "none", 0.0),
        ("code_debug", ["my_fn", "B"], "B", 1.0),
        ("code_debug", ["my_fn", "B"], "A or B", 1.0),
        ("code_debug", ["my_fn", "B"], "B or A", 1.0),
        ("code_debug", ["my_fn", "B"], "my_fn", 1.0),
        ("code_debug", ["my_fn", "B"], "the answer is: `my_fn`", 1.0),
        ("code_debug", ["my_fn", "B"], "the answer is: other_fn", 0.0),
        ("code_debug", ["my_fn", "B"], "", 0.0),
        ("last_whole_number", ["-7"], "returns -7.", 1.0),
        ("last_whole_number", ["-7"], "returns 7", 0.0),
        ("last_whole_number", ["7"], "7 or 8", 0.0),
        ("last_whole_number", ["7"], "seven", 0.0),
        ("last_whole_number", ["7"], "", 0.0),
        ("right_begin", ["3", "5", "9", "2"], "[3, 5, 8, 2]", 0.5),
        ("right_begin", ["3", "5"], "3 5 9", 1.0),
        ("right_begin", ["3", "5"], "", 0.0),
    ],
)
def test_value(metric: str, answers: list[str], prediction: str, expected: float) -> None:
    assert score(record(metric, answers), prediction) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("Location", 1.0),
        ("City or Location", 0.5),
        ("Location: country, City", 0.5),
        ("Location country", 1.0),
        ("city", 0.0),
        ("", 0.0),
    ],
)
def test_classification_shares_one_between_the_classes_named(prediction: str, expected: float) -> None:
    classes = ["Location", "City", "Person"]
    assert score(record("classification", ["Location"], all_classes=classes), prediction) == expected


def test_a_class_within_the_right_one_is_not_counted_against_it() -> None:
    one = record("classification", ["Other location"], all_classes=["location", "Other location", "Other"])
    assert score(one, "Other location") == 1.0
    assert score(one, "location") == 0.0


def test_only_the_first_line_counts_where_the_record_says_so() -> None:
    assert score(record("f1", ["yes"], first_line=True), "\n\nyes\nno no no") == 1.0
    assert score(record("f1", ["yes"]), "\n\nyes\nno no no") == 0.4


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_no_prediction_raises(metric: str) -> None:
    answers = {"multiple_choice": ["x", "B"], "code_debug": ["x", "B"]}.get(metric, ["7"])
    one = record(metric, answers, all_classes=["7"])
    # more digits than Python turns into an int, and than a float holds
    for prediction in ("", "\n", "9" * 5000, "9" * 5000 + ".5", "-", "answer is:", "[", "\ud83d", "1e999"):
        assert 0.0 <= score(one, prediction) <= 1.0

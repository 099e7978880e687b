"""Counts in messages: the noun fits the number, and no message of the package writes a plural itself."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sharedllm_ext
from sharedllm_ext.counted import counted

PACKAGE = Path(sharedllm_ext.__file__).parent
#: What messages count.
NOUNS = (
    "answers arguments blocks bytes characters chunks columns contexts dimensions documents entries files frequencies "
    "integers keys layers lists matrices models nodes numbers ones parameters parts passages points positions "
    "processes questions records rows shards slots steps stretches tasks tensors texts times tokens tries values words"
)
#: Values that are no numbers, or never 1, before such a noun.
NOT_COUNTED = {
    "cli._turns: {text.count(mark)} times",
    "cli.ask: {args.context.count('-')} times",
    "cli.info: {number} reads documents",
    "cli.train: {amount(report.tokens_per_second)} tokens",
    "evaluation.generators: {name.removeprefix('qa_')} questions",
    "evaluation.lm_eval_pick: {self.model.config.window} tokens",
    "evaluation.prompts: {len(rest)} times",
    "evaluation.suite_files: {suite} tasks",
    "model.compression: {expected} tokens",
    "model.context_index: {shorten(rests)} token ids",
    "ops.decode_step: {MATRICES} matrices",
}


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [
        (0, "chunk", "0 chunks"),
        (1, "chunk", "1 chunk"),
        (2, "chunk", "2 chunks"),
        (1, "process", "1 process"),
        (3, "process", "3 processes"),
        (2, "index", "2 indexes"),
        (2, "stretch", "2 stretches"),
        (2, "query", "2 queries"),
        (2, "key", "2 keys"),
        (1, "memory slot", "1 memory slot"),
        (12345, "token", "12345 tokens"),
    ],
)
def test_the_noun_fits_the_number(number: int, noun: str, words: str) -> None:
    assert counted(number, noun) == words


def test_digits_are_grouped_where_that_is_asked_for() -> None:
    assert counted(12345, "token", ",") == "12,345 tokens"


def plurals(path: Path) -> Iterator[str]:
    """Every value in an f-string that a plural follows."""
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.JoinedStr):
            continue
        for value, text in zip(node.values, node.values[1:], strict=False):
            if isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant):
                words = re.match(rf" (?:[a-z-]+ )?({NOUNS.replace(' ', '|')}|token ids)\b", text.value)
                if words and "counted" not in (expression := ast.unparse(value.value)):
                    yield f"{module}: {{{expression}}}{words[0]}"


def test_plurals_are_written_in_one_place() -> None:
    found = {one for path in PACKAGE.rglob("*.py") for one in plurals(path)}
    assert sorted(found) == sorted(NOT_COUNTED)

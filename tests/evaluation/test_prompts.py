"""Token ids of records: parts that make up the prompt, chats, special tokens, and clear errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers import processors

from sharedllm_ext.evaluation.prompts import Prompts
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.texts import TextError

from .conftest import END

TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}<|model|>"


def record(**more: Any) -> Record:
    fields: dict[str, Any] = {"task": "t", "context": "The sky", "question": "\nWhy?", "answer_prefix": " Because"}
    return Record(**{**fields, "answers": ["x"], "max_new_tokens": 5, "metric": "part", "id": "t/0", **more})


def text_of(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode([int(token) for token in ids]))


def test_parts_without_a_chat(tokenizer: Any) -> None:
    prompts = Prompts(tokenizer)
    begin, context, question = prompts.ids(record())
    assert begin == []
    assert (text_of(tokenizer, context), text_of(tokenizer, question)) == ("The sky", "\nWhy? Because")
    assert prompts.length(record()) == len(context) + len(question) + 5 == len(prompts.ids(record())) + 5


def test_parts_of_a_chat(tokenizer: Any) -> None:
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = TEMPLATE
    begin, context, question = Prompts(chatty).ids(record())
    assert [text_of(tokenizer, ids) for ids in (begin, context, question)] == [
        "<|user|>",
        "The sky",
        "\nWhy?<|model|>Because",
    ]
    # some records are asked without, and so are all where it is switched off
    for plain in (Prompts(chatty).ids(record(chat=False)), Prompts(chatty, chat=False).ids(record())):
        assert plain.begin == [] and text_of(tokenizer, plain.question) == "\nWhy? Because"


def test_start_token_stands_before_the_context(tokenizer: Any) -> None:
    starting = copy.deepcopy(tokenizer)
    starting.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A <|user|>", special_tokens=[(END, 0), ("<|user|>", 1)]
    )
    begin, context, question = Prompts(starting).ids(record())
    assert begin == [0]
    assert text_of(tokenizer, context) + text_of(tokenizer, question) == "The sky\nWhy? Because"


def test_special_tokens_of_a_text_are_text(tokenizer: Any) -> None:
    ids = Prompts(tokenizer).ids(record(context=f"a {END} b", question=f" {END}?"))
    assert 0 not in [*ids.context.tolist(), *ids.question]
    assert text_of(tokenizer, ids.context) == f"a {END} b"


def test_what_cannot_be_asked(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="chat: expected a tokenizer with a chat template, got one without"):
        Prompts(tokenizer, chat=True)
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{{ raise_exception('no\nuser') }}"
    with pytest.raises(ValueError, match="chat: expected a template that takes one user message, got no user"):
        Prompts(chatty)
    chatty.chat_template = "always the same"
    with pytest.raises(ValueError, match="expected a template that says the message once, got it 0 times"):
        Prompts(chatty)
    with pytest.raises(TextError, match="t/0: expected a question of at least one token, got none"):
        Prompts(tokenizer).ids(record(question="", answer_prefix=""))
    with pytest.raises(TextError, match="t/0: context: expected text, got half of a surrogate pair"):
        Prompts(tokenizer).ids(record(context="\ud83d"))
    assert len(Prompts(tokenizer).ids(record(context="")).context) == 0

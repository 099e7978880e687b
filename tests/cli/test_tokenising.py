"""Token ids of documents: special tokens are text, and pieces give the ids of the whole, for each kind of tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sharedllm_ext.evaluation import tokenising
from sharedllm_ext.evaluation.texts import TextError
from sharedllm_ext.evaluation.tokenising import encode, split_pieces, text_only

from .conftest import sentences

SPECIAL = ["<s>", "</s>", "<unk>", "<|endoftext|>", "<pad>"]
#: Added, but not marked special, as chat formats have them.
UNMARKED = ["<tool_call>", "[INST]"]
CORPUS = [sentences(300), "日本語のテキスト。 naïve café 👩‍👩‍👧 e\u0301 ﬁ \u00a0x\n" * 50]


def _train(inner: Tokenizer, trainer: Callable[..., Any], **options: Any) -> Tokenizer:
    inner.train_from_iterator(
        [line for text in CORPUS for line in text.split("\n")],
        trainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False, **options),
    )
    return inner


def _byte_level() -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _train(inner, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def _sentence_pieces() -> Tokenizer:
    """As in Llama 2: a space before the text, and the whole text is one word."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _train(inner, trainers.BpeTrainer)


def _whole_words() -> Tokenizer:
    inner = Tokenizer(models.BPE(unk_token="<unk>", ignore_merges=True))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _train(inner, trainers.BpeTrainer)


def _unigram() -> Tokenizer:
    inner = Tokenizer(models.Unigram())
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    return _train(inner, trainers.UnigramTrainer, unk_token="<unk>")


KINDS = {
    "byte level": _byte_level,
    "sentence pieces": _sentence_pieces,
    "whole words": _whole_words,
    "unigram": _unigram,
}


@pytest.fixture(scope="module", params=KINDS, ids=lambda name: name.replace(" ", "-"))
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[request.param](), bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.add_tokens(UNMARKED)
    return tokenizer


def _hostile(size: int, seed: int) -> str:
    """Text with runs that cannot be cut, names of special tokens, and characters of all kinds."""
    draw = random.Random(seed)
    parts: list[str] = []
    while sum(map(len, parts)) < size:
        kind = draw.randrange(5)
        if kind < 2:
            start = draw.randrange(len(CORPUS[0]))
            parts.append(CORPUS[0][start : start + draw.randrange(1, 900)])
        elif kind == 2:
            parts.append(
                draw.choice(["a", "=", "\n", " ", "ab", "é", "日", "\t ", "0", "👩‍👩‍👧"]) * draw.randrange(1, 900)
            )
        elif kind == 3:
            parts.append(" ".join(draw.choice(SPECIAL + UNMARKED) for _ in range(9)))
        else:
            parts.append("".join(chr(draw.randrange(0xA0, 0x3000)) for _ in range(draw.randrange(200))))
    return "".join(parts)


@pytest.mark.parametrize(("size", "overlap"), [(300, 64), (2000, 256)])
def test_pieces_give_the_ids_of_the_whole_text(
    any_tokenizer: Any, size: int, overlap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "PIECE_CHARACTERS", size)
    monkeypatch.setattr(tokenising, "OVERLAP", overlap)
    twin = text_only(any_tokenizer)
    for seed in range(4):
        text = _hostile(6 * size, seed)
        whole = twin(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        seen: list[int] = []
        assert encode(any_tokenizer, [text], progress=seen.append)[0].tolist() == whole
        assert sum(seen) == len(text)


def test_names_of_special_tokens_are_text(any_tokenizer: Any) -> None:
    names = [name for name in SPECIAL if name != "<unk>"] + UNMARKED
    (ids,) = encode(any_tokenizer, ["stop at " + " or ".join(names) + " ".join(names) + "".join(names)])
    assert not set(ids.tolist()) & set(any_tokenizer.convert_tokens_to_ids(names))
    # and the tokenizer itself is as before
    assert any_tokenizer("<pad>", add_special_tokens=False)["input_ids"][-1] == any_tokenizer.pad_token_id


def test_ordinary_added_words_stay_tokens() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_byte_level(), eos_token="</s>")
    tokenizer.add_tokens(["covid", "    "])
    (ids,) = encode(tokenizer, ["a covid b    c"])
    assert {tokenizer.convert_tokens_to_ids("covid"), tokenizer.convert_tokens_to_ids("    ")} <= set(ids.tolist())


def test_saved_truncation_and_padding_do_not_apply(any_tokenizer: Any) -> None:
    state = json.loads(any_tokenizer.backend_tokenizer.to_str())
    inner = Tokenizer.from_str(json.dumps(state))
    inner.enable_truncation(4)
    inner.enable_padding(length=4)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    assert encode(tokenizer, [CORPUS[0]])[0].tolist() == encode(any_tokenizer, [CORPUS[0]])[0].tolist()


def test_half_of_a_surrogate_pair_names_its_place(any_tokenizer: Any) -> None:
    with pytest.raises(TextError, match=r"^b: expected text, got half of a surrogate pair \(\\ud83d at character 3\)"):
        encode(any_tokenizer, ["fine", "abc\ud83d"], names=["a", "b"])


def test_pieces_are_short_and_lose_nothing() -> None:
    text = sentences(400, seed=3)
    pieces = list(split_pieces(text, 500))
    assert len(pieces) > 20
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 500

"""Passages ranked by sentence embeddings: by a stand-in that counts letters, and by a real model of random weights."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharedllm_ext.evaluation.passage_search import EmbeddingSearch, PassageSearch, WordSearch
from sharedllm_ext.evaluation.prompts import Prompts
from sharedllm_ext.evaluation.records import Record

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class LetterCounts:
    """Has the methods of ``SentenceTransformer`` that are used; a text is the counts of its letters."""

    def __init__(self, path: str, **how: Any) -> None:
        assert how == {"device": "cpu", "local_files_only": True}
        self.path = path
        self.documents: list[str] = []

    def encode_query(self, texts: list[str], **how: Any) -> Any:
        assert how == {"normalize_embeddings": True, "show_progress_bar": False}
        return self._encode(texts)

    def encode_document(self, texts: list[str], batch_size: int, **how: Any) -> Any:
        self.documents += texts
        return self._encode(texts)

    @staticmethod
    def _encode(texts: list[str]) -> Any:
        counts = np.array([[text.count(letter) for letter in LETTERS] for text in texts], dtype=np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = LetterCounts  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)


def record(context: str, question: str) -> Record:
    return Record("t", context, question, " It is", ["x"], 6, "part", "t/0")


def test_passages_are_the_text_of_their_tokens(letters: None, tokenizer: Any, tmp_path: Path) -> None:
    prompts = Prompts(tokenizer)
    search: PassageSearch = EmbeddingSearch(prompts, tmp_path)
    context = " amber" * 8 + " bold" * 8 + " calm" * 3
    ids = prompts.encode(context)
    size = len(prompts.encode(" amber" * 8))
    found = search.scores(record(context, "\n\ncalm "), ids, size)
    texts = [tokenizer.decode(ids[i : i + size].tolist()) for i in range(0, len(ids), size)]
    assert search.model.documents == texts and "".join(texts) == context  # type: ignore[attr-defined]
    assert texts[0] == " amber" * 8
    vectors = LetterCounts._encode([*texts, "calm"])
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, vectors[:-1] @ vectors[-1], rtol=1e-6)
    assert int(found.argmax()) == len(texts) - 1
    # an empty context has no passages
    assert len(search.scores(record("", "calm"), ids[:0], size)) == 0


def test_another_model_is_another_system(letters: None, tokenizer: Any, tmp_path: Path) -> None:
    prompts = Prompts(tokenizer)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    first = EmbeddingSearch(prompts, tmp_path).settings
    assert EmbeddingSearch(prompts, tmp_path).settings == first
    (tmp_path / "1_Pooling" / "config.json").write_text("[]")
    assert EmbeddingSearch(prompts, tmp_path).settings != first


def test_what_is_missing(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = Prompts(tokenizer)
    with pytest.raises(FileNotFoundError, match=r"nothing: expected the folder of a Sentence Transformers model, got"):
        EmbeddingSearch(prompts, tmp_path / "nothing")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"not installed \(pip install sentence-transformers\)"):
        EmbeddingSearch(prompts, tmp_path)


def test_words_are_those_of_bm25(tokenizer: Any) -> None:
    prompts = Prompts(tokenizer)
    context = " amber" * 8 + " bold" * 8 + " calm" * 3
    search: PassageSearch = WordSearch(prompts)
    size = len(prompts.encode(" amber" * 8))
    found = search.scores(record(context, " calm"), prompts.encode(context), size)
    assert int(found.argmax()) == len(found) - 1 and found[0] == 0


def test_a_model_of_sentence_transformers(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "amber", "bold", "calm"])
    )
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=8, initializer_range=0.5, **sizes)).eval()
    model.save_pretrained(tmp_path)
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    prompts = Prompts(tokenizer)
    context = " amber" * 8 + " bold calm" * 4
    ids = prompts.encode(context)
    size = len(prompts.encode(" amber" * 8))
    found = EmbeddingSearch(prompts, tmp_path).scores(record(context, " bold"), ids, size)
    vectors = []
    for words in ([5] * 8, [6, 7] * 4, [6]):
        states = model(torch.tensor([[2, *words, 3]])).last_hidden_state[0].mean(0)
        vectors.append(torch.nn.functional.normalize(states, dim=0))
    expected = torch.stack(vectors[:2]) @ vectors[2]
    np.testing.assert_allclose(found, expected.detach().double().numpy(), rtol=1e-4)

"""Searches that rank the passages of a context for a question, to be read by a model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sharedllm_ext.evaluation import bm25
from sharedllm_ext.evaluation.prompts import Prompts
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.texts import Tokens, shown


class PassageSearch(Protocol):
    """Something that scores passages.

    Attributes:
        name: its name in tables.
        settings: plain values that decide its scores.
    """

    name: str
    settings: dict[str, Any]

    def scores(self, record: Record, context: Tokens, size: int) -> bm25.Scores:
        """Scores ``[passages]`` of consecutive passages of ``size`` tokens; the last one may be shorter."""
        ...


class WordSearch:
    """BM25 over token ids; the query is the record's question without template and answer prefix."""

    name = "bm25"

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts
        self.settings: dict[str, Any] = {}

    def scores(self, record: Record, context: Tokens, size: int) -> bm25.Scores:
        """BM25's scores ``[passages]``."""
        return bm25.scores(context, self.prompts.encode(record.question, record.id).tolist(), size)


class EmbeddingSearch:
    """Cosines between a sentence embedding of the question and those of the passages.

    The passages are the text of their tokens; the model tokenises them anew, and cuts those that are longer than its
    own ``max_seq_length``. Where the model has prompts for queries and documents, they are used.

    Args:
        prompts: of the model whose tokens the passages are counted in.
        path: the folder of a Sentence Transformers model.
        device: where it runs.

    Raises:
        FileNotFoundError: no folder there.
        ImportError: the package ``sentence-transformers`` is not installed.
    """

    name = "embedding"

    def __init__(self, prompts: Prompts, path: str | Path, device: Any = None) -> None:
        place = Path(path)
        if not place.is_dir():
            raise FileNotFoundError(f"{shown(place)}: expected the folder of a Sentence Transformers model, got none")
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "sentence_transformers":
                raise
            raise ImportError("sentence-transformers is not installed (pip install sentence-transformers)") from None
        self.prompts = prompts
        # a local folder holds all that is needed; the hub is not asked
        self.model = SentenceTransformer(str(place), device=str(device or "cpu"), local_files_only=True)
        self.settings: dict[str, Any] = {"embedder": _digest(place)}

    def scores(self, record: Record, context: Tokens, size: int) -> bm25.Scores:
        """Cosines ``[passages]``, from -1 to 1."""
        if not len(context):
            return np.zeros(0)
        decode = self.prompts.tokenizer.decode
        texts = [decode(context[i : i + size].tolist()) for i in range(0, len(context), size)]
        how: dict[str, Any] = {"normalize_embeddings": True, "show_progress_bar": False}
        asked = self.model.encode_query([record.question.strip()], **how)
        found = self.model.encode_document(texts, batch_size=256, **how)
        return np.asarray(found @ asked[0], dtype=np.float64)


def _digest(folder: Path) -> str:
    """SHA-256 of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()

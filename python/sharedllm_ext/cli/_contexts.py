"""What ``ask`` and ``chat`` share: options of sampling, contexts and their tokens, the model, and saved memories."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import sys
from typing import TYPE_CHECKING, Any

from sharedllm_ext.cli._adapter import PASSAGES, load_adapted
from sharedllm_ext.cli._base_package import ADAPTER, BASE_PACKAGE
from sharedllm_ext.cli._common import (
    characters,
    count,
    load_model,
    load_tokenizer,
    model_path,
    positive,
    some_path,
    warn_if_silent,
)
from sharedllm_ext.cli._output import CommandError, UsageError

if TYPE_CHECKING:
    import torch

    from sharedllm_ext.cli._places import Places
    from sharedllm_ext.cli._progress import Progress
    from sharedllm_ext.evaluation.texts import Texts, Tokens
    from sharedllm_ext.model import ContextMemory
    from sharedllm_ext.model.sources import Source

#: Contexts that the name of a saved memory lists.
NAMES = 8
#: Texts whose names a saved memory keeps; of more it keeps the tokens and its own name.
TEXTS = 1 << 17


def add_answer_options(parser: Any, *, wrapped: str, passages: str) -> None:
    """``--adapter``, ``--passages``, ``--max-new-tokens``, ``--temperature``, ``--top-p``, ``--chat-template``.

    ``wrapped`` is what the chat template is put around, ``passages`` the help of that option without its default.
    """
    parser.add_argument(
        "--adapter",
        type=some_path,
        metavar="NAME_OR_FILE",
        help="put this adapter on MODEL, its base checkpoint: a folder, a hub name, a GGUF file, or "
        f"{BASE_PACKAGE}, the Python package of the base of {ADAPTER}",
    )
    parser.add_argument("--passages", type=count, metavar="N", help=f"{passages} (default: {PASSAGES})")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=_temperature, metavar="T", help="sample; 0 is greedy (default)")
    parser.add_argument(
        "--top-p", type=_top_p, metavar="P", help="sample from the most likely tokens (default: greedy)"
    )
    parser.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help=f"wrap {wrapped} in the tokenizer's chat template (default: where there is one)",
    )


def _number(text: str, low: float, high: float, expected: str, *, low_too: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (low < value <= high or (low_too and value == low)):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def _temperature(text: str) -> float:
    return _number(text, 0, 100, "a number from 0 (greedy) to 100", low_too=True)


def _top_p(text: str) -> float:
    return _number(text, 0, 1, "a number above 0 and at most 1")


def check_characters(question: str, name: str = "QUESTION") -> None:
    """Refuse bytes of the command line that Python cannot decode."""
    try:
        question.encode()
    except UnicodeEncodeError as error:
        code = ord(question[error.start])
        # bytes of the command line that Python cannot decode arrive in this form
        came = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
        raise UsageError(
            f"{name}: expected text in {sys.getfilesystemencoding()}, got {came} at character {error.start}"
        ) from None


def read_contexts(paths: list[str], progress: Progress) -> list[Texts]:
    """Every ``--context``; a file stands under a line with its path where it is not the only one."""
    from sharedllm_ext.evaluation.texts import read_texts, size_of, under_heading

    found = []
    for path in paths:
        with progress.bar(f"reading {path}", size_of(path), "B") as update:
            texts = read_texts(path, progress=update)
        if len(paths) > 1 and texts.kind == "text":
            texts = dataclasses.replace(texts, documents=[under_heading(texts.source, str(texts.documents[0]))])
        found.append(texts)
    return found


def load_pair(args: argparse.Namespace, device: torch.device, progress: Progress) -> tuple[Any, Any]:
    """Model and tokenizer."""
    if args.adapter is not None:
        model, tokenizer = load_adapted(args.adapter, args.model, args.dtype, device, progress=progress)
    else:
        path = model_path(args.model)
        model = load_model(path, args.dtype, device, progress=progress)
        tokenizer = load_tokenizer(path)
    warn_if_silent(model, args.model)
    return model, tokenizer


def tokenise(contexts: list[Texts], tokenizer: Any, vocabulary: int, progress: Progress) -> tuple[Tokens, Places]:
    """Token ids of all contexts, joined, and where each text stands in them."""
    import numpy as np

    from sharedllm_ext.cli._places import Places
    from sharedllm_ext.evaluation.tokenising import join_documents, read_tokens

    parts: list[Tokens] = []
    spans: list[tuple[Texts, list[Tokens], int, int]] = []
    with progress.bar("tokenising", sum(map(characters, contexts)), "characters") as update:
        for texts in contexts:
            documents = read_tokens(texts, tokenizer, vocabulary, join=False, progress=update)
            joined, gap = join_documents(texts, documents, tokenizer)
            spans.append((texts, documents, sum(len(part) for part in parts), gap))
            parts.append(joined)
    tokens = np.concatenate(parts)
    places = Places(tokenizer, tokens)
    for texts, documents, start, gap in spans:
        headings = texts.kind == "folder" or (len(contexts) > 1 and texts.kind == "text")
        places.add_texts(texts, documents, start, headings=headings, only=len(contexts) == 1, gap=gap)
    return tokens, places


def source_of(contexts: list[Texts], tokens: Tokens, tokenizer: Any, places: Places) -> Source:
    """The source of all contexts, joined: token ids and, of each text, its name, lines and digest."""
    import torch

    from sharedllm_ext.model.sources import Source, SourceText, tokenizer_digest

    ids = torch.from_numpy(tokens.astype("int32"))
    names = [texts.source for texts in contexts]
    name = ", ".join(names[:NAMES]) + (f" and {len(names) - NAMES} more" if len(names) > NAMES else "")
    held = places.documents if len(places.documents) <= TEXTS else []
    texts: list[Any] = [text for texts in contexts for text in texts.documents]
    if len(texts) != len(held):
        # some have no tokens, by a tokenizer that leaves characters out
        texts = [None] * len(held)
    alone = len(held) == 1 and held[0].source == name
    stretches, done = [], 0
    for document, text in zip(held, texts, strict=True):
        if document.start > done:
            # what divides two texts
            stretches.append(SourceText(document.start - done, ids[done : document.start]))
        done = document.end
        stretch = SourceText(document.end - document.start, ids[document.start : document.end])
        if isinstance(text, str):
            digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
            stretch = dataclasses.replace(stretch, characters=len(text), sha256=digest)
        if not alone:
            stretch = dataclasses.replace(
                stretch, name=document.source, line_ends=document.line_ends, heading=document.heading
            )
        stretches.append(stretch)
    if done < len(tokens):
        stretches.append(SourceText(len(tokens) - done, ids[done:]))
    return Source(tuple(stretches), name, tokenizer_digest(tokenizer))


def load_memory(path: str, model: Any, tokenizer: Any) -> ContextMemory:
    """A saved memory of one document in the model's dtype.

    Raises:
        CommandError: several documents are read.
        ValueError: the file is damaged, or another model or another tokenizer made it.
    """
    from sharedllm_ext.model import ContextMemory
    from sharedllm_ext.model.sources import check_tokenizer

    # saved by a run in another dtype, it is still this model's
    memory = ContextMemory.load(path, model).to(model.dtype)
    if memory.batch_size != 1:
        raise CommandError(f"{path}: expected a memory of one document, got {memory.batch_size}")
    (row,) = memory.memory_index
    if isinstance(row, tuple):
        raise CommandError(f"{path}: expected a memory of one document, got a row that reads {len(row)}")
    check_tokenizer(path, [None if source is None else source.tokenizer for source in memory.sources or ()], tokenizer)
    return memory


def knows_tokens(path: str) -> bool:
    """Whether a saved memory has kept the tokens of its documents."""
    from sharedllm_ext.model.file_description import describe_file

    return all(document["token_ids"] for document in describe_file(path)["documents"])


def kept_context(memory: ContextMemory, tokenizer: Any) -> tuple[torch.Tensor, Places]:
    """The tokens ``[1, C]`` that a memory of one document has kept, and where they stand as far as it knows."""
    from sharedllm_ext.cli._places import kept_places

    (document,) = memory.memory_index
    assert memory.sources is not None and isinstance(document, int)
    source = memory.sources[document]
    assert source is not None
    ids = source.token_ids
    assert ids is not None  # see knows_tokens
    if source.name is None:
        source = dataclasses.replace(source, name="the memory's text")
    return ids.long().unsqueeze(0).to(memory.device), kept_places(source, tokenizer)

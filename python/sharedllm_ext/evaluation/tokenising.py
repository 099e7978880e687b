"""Token ids of documents: special tokens stay text, and pieces of a document give the ids of the whole."""

from __future__ import annotations

import copy
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from sharedllm_ext.evaluation.texts import TextError, Texts, Tokens, half_surrogate

#: Characters of a piece: one long string is slow, and many pieces run in parallel.
PIECE_CHARACTERS = 32768
#: Characters that a piece reads on either side of its own; neighbours must agree on the middle half of what they share.
OVERLAP = 512
#: Different tokens that neighbours must share on either side of a seam.
SEAM_VARIETY = 8
#: Pieces in one call of the tokenizer, so that a progress bar moves.
PIECES_PER_CALL = 16
# how chat and tool formats write their control tokens, also those that are not marked special: <tool_call>, [INST]
_CONTROL_NAME = re.compile(r"<.+>|\[.+\]", re.DOTALL)
# two noncharacters of Unicode, which no interchanged text holds
_UNREACHABLE = "\ufdd0\ufdd1"

Progress = Callable[[int], object]


def split_pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Pieces of at most ``size`` characters, cut where tokenizers cut as well, as far as there is such a place.

    A line end before a letter or a digit is one. Where none is near, the cut falls on another line end, on a space, or
    anywhere.
    """
    start = 0
    while len(text) - start > size:
        limit = start + size
        cut = text.rfind("\n", start, limit)
        while cut > start and not text[cut + 1].isalnum():
            cut = text.rfind("\n", start, cut)
        if cut <= start:
            cut = max(text.rfind("\n", start, limit), text.rfind(" ", start, limit) - 1)
        if cut <= start:
            cut = limit - 1
        yield text[start : cut + 1]
        start = cut + 1
    if start < len(text):
        yield text[start:]


def text_only(tokenizer: Any) -> Any:
    """The tokenizer, or a twin of it, whose control tokens never come from text under ``split_special_tokens=True``.

    That option skips the added tokens that are marked special. In a twin the other control tokens, and those that the
    model itself would find, have names that no text contains.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer
    control = _control_tokens(tokenizer)
    # merges never produce a control token; whole words and pieces of a unigram model may
    merges = type(backend.model).__name__ == "BPE" and not backend.model.ignore_merges
    found = not merges and any(backend.model.token_to_id(name) is not None for name in control)
    if not found and all(token.special for token in control.values()):
        return tokenizer
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        if token["content"] in control:
            token["content"] = _UNREACHABLE + token["content"]
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {_UNREACHABLE * (name in control) + name: number for name, number in model["vocab"].items()}
    else:
        model["vocab"] = [[_UNREACHABLE * (name in control) + name, score] for name, score in model["vocab"]]
    twin = copy.copy(tokenizer)
    twin._tokenizer = type(backend).from_str(json.dumps(state))
    return twin


def _control_tokens(tokenizer: Any) -> dict[str, Any]:
    """The added tokens by name that text must not become; not the unknown token, which it does become."""
    special = set(tokenizer.all_special_tokens)
    unknown = getattr(tokenizer, "unk_token", None)
    return {
        token.content: token
        for token in tokenizer.added_tokens_decoder.values()
        if token.content != unknown
        and (token.special or token.content in special or _CONTROL_NAME.fullmatch(token.content))
    }


class _Window(NamedTuple):
    """Tokens of ``text[begin:end]``: ids, and the characters of each in the whole text."""

    begin: int
    ids: list[int]
    offsets: list[tuple[int, int]]

    def first_from(self, place: int) -> int:
        """Index of the first token that starts at the character ``place`` or after it."""
        return bisect_left(self.offsets, (place - self.begin,))

    def around(self, place: int) -> list[tuple[int, int, int]]:
        """(id, first character, end) of the tokens that start within half an overlap of ``place``."""
        first, last = self.first_from(place - OVERLAP // 2), self.first_from(place + OVERLAP // 2)
        return [
            (token, start + self.begin, end + self.begin)
            for token, (start, end) in zip(self.ids[first:last], self.offsets[first:last], strict=True)
        ]


def _sound(tokens: list[tuple[int, int, int]], seam: int) -> bool:
    """Whether both sides of a seam are varied: how a run like ``0000…`` is cut depends on its whole length."""
    before = {token for token, begin, _ in tokens if begin < seam}
    after = {token for token, begin, _ in tokens if begin >= seam}
    return min(len(before), len(after)) >= SEAM_VARIETY


class _Encoder:
    """Tokenises one document after the other."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = text_only(tokenizer)
        self.fast = bool(getattr(tokenizer, "is_fast", False))
        names = [name for name in _control_tokens(tokenizer) if _CONTROL_NAME.fullmatch(name)] if self.fast else []
        self.control = {tokenizer.convert_tokens_to_ids(name): name for name in names}

    def pieces(self, text: str, name: str) -> Iterator[tuple[int, Tokens]]:
        """(characters, ids) of consecutive parts of the document."""
        _refuse_surrogates(text, name)
        if not self.fast:
            # without offsets seams cannot be found
            yield len(text), np.asarray(self._call([text])["input_ids"][0], dtype=np.int32)
            return
        cuts = [0]
        for piece in split_pieces(text, PIECE_CHARACTERS):
            cuts.append(cuts[-1] + len(piece))
        for begin, end, ids in self._joined(text, cuts):
            tokens = np.asarray(ids, dtype=np.int32)
            self._refuse_control(tokens, name)
            yield end - begin, tokens

    def _joined(self, text: str, cuts: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
        """(begin, end, ids) of parts whose seams both neighbours tokenise alike; others are tokenised as one."""
        last = len(cuts) - 1
        windows: dict[int, _Window] = {}
        piece, begun = 0, 0
        while piece < last:
            span = 1
            window = self._window(text, cuts, piece, windows, span)
            while piece + span < last:
                following = self._window(text, cuts, piece + span, windows, 1)
                seam = cuts[piece + span]
                if _sound(agreed := window.around(seam), seam) and agreed == following.around(seam):
                    break
                # a run without a place to cut, longer than the overlap
                span = min(2 * span, last - piece)
                window = self._window(text, cuts, piece, windows, span)
            end = cuts[min(piece + span, last)]
            first = window.first_from(begun) if piece else 0
            yield begun, end, window.ids[first : window.first_from(end) if piece + span < last else None]
            for done in range(piece, min(piece + span, last)):
                windows.pop(done, None)
            piece, begun = piece + span, end

    def _window(self, text: str, cuts: Sequence[int], piece: int, windows: dict[int, _Window], span: int) -> _Window:
        """The tokens of ``span`` pieces and the overlap on either side."""
        last = len(cuts) - 1
        if span == 1 and piece in windows:
            return windows[piece]
        group = range(piece, min(piece + PIECES_PER_CALL, last)) if span == 1 else range(piece, piece + 1)
        places = [
            (max(0, cuts[first] - OVERLAP), min(len(text), cuts[min(first + span, last)] + OVERLAP)) for first in group
        ]
        batch = self._call([text[begin:end] for begin, end in places])
        found = [
            _Window(begin, encoding.ids, encoding.offsets)
            for (begin, _), encoding in zip(places, batch.encodings, strict=True)
        ]
        if span == 1:
            windows.update(zip(group, found, strict=True))
        return found[0]

    def _call(self, texts: list[str]) -> Any:
        # verbose=False: no warning about the length of the text, which is the point here
        options = {"add_special_tokens": False, "padding": False, "truncation": False, "verbose": False}
        if type(self.tokenizer).__name__ != "MistralCommonBackend":
            # this tokenizer refuses the option, and has no other way
            options |= {"split_special_tokens": True, "return_attention_mask": False}
        return self.tokenizer(texts, **options)

    def _refuse_control(self, tokens: Tokens, name: str) -> None:
        if self.control and (found := np.isin(tokens, list(self.control))).any():
            control = self.control[int(tokens[found.argmax()])]
            raise TextError(
                f"{name}: expected a tokenizer that can read {control!r} as text, got one that makes it a special token"
            )


def _refuse_surrogates(text: str, name: str) -> None:
    if (place := half_surrogate(text)) >= 0:
        raise TextError(
            f"{name}: expected text, got half of a surrogate pair (\\u{ord(text[place]):04x} at character {place})"
        )


def encode(
    tokenizer: Any,
    texts: Iterable[str],
    *,
    limit: int | None = None,
    progress: Progress | None = None,
    names: Sequence[str] = (),
) -> list[Tokens]:
    """Token ids of every text, without special tokens: text that looks like one is tokenised as text.

    Long texts go through the tokenizer in pieces that overlap, joined where both agree, so the ids are those of the
    whole text.

    Args:
        tokenizer: a Transformers tokenizer.
        texts: the documents.
        limit: stop after this many tokens in all; the last document is cut there.
        progress: called with the characters done since the last call.
        names: what errors call the documents.

    Returns:
        One int32 array for each text read.

    Raises:
        TextError: half of a surrogate pair, or a tokenizer that cannot read a special token's name as text.
    """
    encoder = _Encoder(tokenizer)
    documents: list[Tokens] = []
    total = 0
    for number, text in enumerate(texts):
        ids: list[Tokens] = []
        name = names[number] if number < len(names) else f"document {number + 1}"
        for characters, tokens in encoder.pieces(text, name):
            ids.append(tokens)
            total += len(tokens)
            if progress is not None:
                progress(characters)
            if limit is not None and total >= limit:
                break
        document = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int32)
        if limit is not None and total >= limit:
            documents.append(document[: len(document) - (total - limit)])
            break
        documents.append(document)
    return documents


def check_ids(tokens: Tokens, vocabulary: int, name: str) -> None:
    """Raise :class:`TextError` unless every id lies in ``0 .. vocabulary - 1``."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise TextError(f"{name}: expected token ids from 0 to {vocabulary - 1}, got {low if low < 0 else high}")


def read_tokens(
    texts: Texts,
    tokenizer: Any,
    vocabulary: int,
    *,
    join: bool = True,
    progress: Progress | None = None,
) -> list[Tokens]:
    """Token ids of the documents, checked against the vocabulary.

    Args:
        texts: from :func:`read_texts`.
        tokenizer: a Transformers tokenizer; ``None`` is enough where the file holds token ids.
        vocabulary: number of ids the model knows.
        join: return all documents as one array. The documents of a ``.jsonl`` file are then divided by the
            tokenizer's end token, where it has one.
        progress: called with the characters done since the last call.

    Raises:
        TextError: no tokens, ids outside the vocabulary, or text without a tokenizer.
    """
    documents: Sequence[Tokens]
    if isinstance(texts.documents[0], np.ndarray):
        documents = [np.asarray(document) for document in texts.documents]
    elif tokenizer is None:
        raise TextError(
            f"{texts.source}: expected a .npy file of token ids, because the model has no tokenizer; got text"
        )
    else:
        names = [texts.source if texts.kind == "text" else f"{texts.source} {name}" for name in texts.names]
        documents = encode(tokenizer, (str(document) for document in texts.documents), progress=progress, names=names)
    kept = [document for document in documents if len(document)]
    if not kept:
        raise TextError(f"{texts.source}: expected text, got 0 tokens")
    if join and len(kept) > 1:
        kept = [join_documents(texts, kept, tokenizer)[0]]
    for document in kept:
        check_ids(document, vocabulary, texts.source)
    return kept


def join_documents(texts: Texts, documents: Sequence[Tokens], tokenizer: Any) -> tuple[Tokens, int]:
    """Token ids of the texts' documents as one array, and how many tokens divide them.

    The documents of a ``.jsonl`` file are divided by the tokenizer's end token, where it has one.
    """
    end = getattr(tokenizer, "eos_token_id", None) if texts.kind == "lines" else None
    if end is None:
        return np.concatenate(documents), 0
    parts = []
    for document in documents:
        parts += [document, np.asarray([end], dtype=document.dtype)]
    return np.concatenate(parts[:-1]), 1

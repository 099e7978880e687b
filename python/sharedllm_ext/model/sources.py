"""Where a memory's documents come from: names, token ids, characters, and digests of text and tokenizer."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..counted import counted


class Place(NamedTuple):
    """Characters of a document.

    Attributes:
        name: the document's name, ``None`` where it has none.
        first: the first character.
        end: the character after the last one.
    """

    name: str | None
    first: int
    end: int


@dataclasses.dataclass(frozen=True, eq=False)
class SourceText:
    """A stretch of a document's text; a document that has grown has several. What is not known is ``None``.

    Attributes:
        tokens: how many tokens it has.
        token_ids: ``[tokens]`` int32 on the CPU.
        offsets: ``[tokens, 2]`` int32 on the CPU, first character and end of each token in this text.
        characters: its length.
        sha256: of the text in UTF-8, hexadecimal.
    """

    tokens: int
    token_ids: Tensor | None = None
    offsets: Tensor | None = None
    characters: int | None = None
    sha256: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """The source of one document.

    Attributes:
        texts: stretches of its text, one after the other.
        name: of the document.
        tokenizer: :func:`tokenizer_digest` of what has made the tokens.
    """

    texts: tuple[SourceText, ...]
    name: str | None = None
    tokenizer: str | None = None

    @classmethod
    def of(cls, text: str, tokenizer: Any, name: str | None = None) -> "Source":
        """Tokenise a text; what looks like a special token in it is text.

        Args:
            text: the document.
            tokenizer: the base checkpoint's; characters of tokens are known if it is a fast one.
            name: of the document.
        """
        fast = bool(getattr(tokenizer, "is_fast", False))
        made = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=fast)
        ids = torch.tensor(made["input_ids"], dtype=torch.int32)
        offsets = torch.tensor(made["offset_mapping"], dtype=torch.int32).view(-1, 2) if fast else None
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
        one = SourceText(ids.numel(), ids, offsets, len(text), digest)
        return cls((one,), name, tokenizer_digest(tokenizer))

    @classmethod
    def of_ids(cls, token_ids: Tensor, name: str | None = None, tokenizer: str | None = None) -> "Source":
        """A document of which only the token ids ``[T]`` are known."""
        ids = token_ids.detach().to("cpu", torch.int32, copy=True)
        return cls((SourceText(ids.numel(), ids),), name, tokenizer)

    @property
    def tokens(self) -> int:
        """How many tokens the document has."""
        return sum(text.tokens for text in self.texts)

    @property
    def token_ids(self) -> Tensor | None:
        """``[T]`` int32 on the CPU; ``None`` unless all are known."""
        # put together when it is asked for: a document that grows copies nothing
        parts = [text.token_ids for text in self.texts if text.token_ids is not None]
        if len(parts) != len(self.texts):
            return None
        return parts[0] if len(parts) == 1 else torch.cat([torch.empty(0, dtype=torch.int32), *parts])

    @property
    def sha256(self) -> list[str | None]:
        """SHA-256 of each stretch of text."""
        return [text.sha256 for text in self.texts]

    def place(self, start: int, end: int) -> Place | None:
        """Characters of the tokens ``start`` to ``end``, ``None`` where they are not known."""
        if not 0 <= start < end <= self.tokens:
            return None
        first, last = self._offsets(start), self._offsets(end - 1)
        return None if first is None or last is None else Place(self.name, first[0], last[1])

    def _offsets(self, token: int) -> tuple[int, int] | None:
        before = 0
        for text, begin in zip(
            self.texts, itertools.accumulate((t.tokens for t in self.texts), initial=0), strict=False
        ):
            if token < begin + text.tokens:
                if text.offsets is None:
                    return None
                first, end = text.offsets[token - begin].tolist()
                return before + first, before + end
            if text.characters is None:
                return None
            before += text.characters
        return None

    def extended(self, more: "Source | None", tokens: Tensor) -> "Source":
        """The source of the document that goes on.

        Args:
            more: the source of what was appended; ``None`` where nothing but its tokens is known.
            tokens: ``[T]`` what was appended.
        """
        if more is None:
            known = all(text.token_ids is not None for text in self.texts)
            more = Source.of_ids(tokens) if known else Source((SourceText(tokens.numel()),))
        return dataclasses.replace(self, texts=(*self.texts, *more.texts))

    def check(self, name: str, tokens: int) -> None:
        """Check it against a document's number of tokens, and its parts against each other.

        Raises:
            ValueError: 'name: expected …, got …'.
        """
        if self.tokens != tokens:
            raise ValueError(f"{name}: expected the source of {counted(tokens, 'token')}, got one of {self.tokens}")
        for text in self.texts:
            for what, tensor, shape in (
                ("token_ids", text.token_ids, (text.tokens,)),
                ("offsets", text.offsets, (text.tokens, 2)),
            ):
                if tensor is None:
                    continue
                if tuple(tensor.shape) != shape or tensor.dtype != torch.int32 or tensor.device.type != "cpu":
                    raise ValueError(
                        f"{name}: expected {what} of shape {shape}, int32, on the CPU, got {tuple(tensor.shape)}, "
                        f"{tensor.dtype}, {tensor.device}"
                    )


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer does: its vocabulary and rules, or of a slow one its class and vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # settings of the latest call
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def check_tokenizer(name: str, digests: Iterable[str | None], tokenizer: Any) -> None:
    """Compare a tokenizer with those by which texts were tokenised, as far as that is known.

    Args:
        name: of what holds the texts, for the error.
        digests: of :func:`tokenizer_digest`, or ``None``.
        tokenizer: the one at hand.

    Raises:
        ValueError: 'name: expected …, got …'.
    """
    known = {digest for digest in digests if digest is not None}
    if not known:
        return
    own = tokenizer_digest(tokenizer)
    for digest in sorted(known - {own}):
        raise ValueError(
            f"{name}: expected text in the tokens of the model's tokenizer (SHA-256 {own[:12]}…), got tokens of "
            f"another tokenizer ({digest[:12]}…)"
        )


# pickles of memories are read without trust
torch.serialization.add_safe_globals([Place, Source, SourceText])

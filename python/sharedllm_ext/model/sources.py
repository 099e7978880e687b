"""Where a memory's documents come from: names, token ids, characters, and digests of text and tokenizer."""

import bisect
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
    """Characters of a text.

    Attributes:
        name: the name of the text, or of the document where the text has none of its own; ``None`` without either.
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
        name: of the text that it is of, such as one file of a folder; ``None``: the document's own.
        line_ends: how many the stretch has.
        heading: lines at its begin that are not of the text named, such as one with its path.
    """

    tokens: int
    token_ids: Tensor | None = None
    offsets: Tensor | None = None
    characters: int | None = None
    sha256: str | None = None
    name: str | None = None
    line_ends: int | None = None
    heading: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """The source of one document.

    Stretches of one name are one text: the characters of a later one go on after those of the earlier ones. A stretch
    without a name of its own has the document's.

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

    @property
    def names(self) -> list[str | None]:
        """Of the text that each stretch is of."""
        return [self.name if text.name is None else text.name for text in self.texts]

    def text_of(self, start: int, end: int) -> tuple[str | None, int, int] | None:
        """The text that has most of the tokens ``start`` to ``end``, of equally many the first one.

        Returns:
            Its name, and the first and the end of its tokens among these; ``None`` where there are no such tokens.
        """
        if not 0 <= start < end <= self.tokens:
            return None
        begins, names = self._begins(), self.names
        found: list[tuple[str | None, int, int]] = []
        for index in range(self._stretch(begins, start), self._stretch(begins, end - 1) + 1):
            first, last = max(start, begins[index]), min(end, begins[index + 1])
            if found and found[-1][0] == names[index]:
                found[-1] = (names[index], found[-1][1], last)
            elif first < last:
                found.append((names[index], first, last))
        return max(found, key=lambda text: text[2] - text[1])

    def place(self, start: int, end: int) -> Place | None:
        """Characters of the tokens ``start`` to ``end``, ``None`` where they are not known.

        A place is in one text. Of tokens over several it is that of those which :meth:`text_of` chooses: most of them.
        """
        text = self.text_of(start, end)
        if text is None:
            return None
        name, start, end = text
        first, last = self._offsets(start), self._offsets(end - 1)
        return None if first is None or last is None else Place(name, first[0], last[1])

    def _begins(self) -> list[int]:
        """The first token of each stretch, and the end."""
        return list(itertools.accumulate((text.tokens for text in self.texts), initial=0))

    def _stretch(self, begins: list[int], token: int) -> int:
        # the last one that begins there: those before it have no tokens
        return bisect.bisect_right(begins, token) - 1

    def _offsets(self, token: int) -> tuple[int, int] | None:
        """First character and end of a token in the text that it is of."""
        begins, before = self._begins(), 0
        index = self._stretch(begins, token)
        offsets, names = self.texts[index].offsets, self.names
        if offsets is None:
            return None
        for text, name in zip(self.texts[:index], names[:index], strict=True):
            if name == names[index]:
                if text.characters is None:
                    return None
                before += text.characters
        first, end = offsets[token - begins[index]].tolist()
        return before + first, before + end

    def extended(self, more: "Source | None", tokens: Tensor) -> "Source":
        """The source of the document that goes on.

        What was appended keeps its name: where that is another than the document's, its stretches are named. Without a
        name it is more of the document's own text.

        Args:
            more: the source of what was appended; ``None`` where nothing but its tokens is known.
            tokens: ``[T]`` what was appended.
        """
        if more is None:
            known = all(text.token_ids is not None for text in self.texts)
            more = Source.of_ids(tokens) if known else Source((SourceText(tokens.numel()),))
        before = self
        if not self.texts and self.name is None:
            # a document that begins here
            before = Source((), more.name, more.tokenizer if self.tokenizer is None else self.tokenizer)
        names = [None if name == before.name else name for name in more.names]
        texts = [
            text if text.name == name else dataclasses.replace(text, name=name)
            for text, name in zip(more.texts, names, strict=True)
        ]
        return dataclasses.replace(before, texts=(*self.texts, *texts))

    def check(self, name: str, tokens: int) -> None:
        """Check it against a document's number of tokens, and its parts against each other.

        Raises:
            ValueError: 'name: expected …, got …'.
        """
        if self.tokens != tokens:
            raise ValueError(f"{name}: expected the source of {counted(tokens, 'token')}, got one of {self.tokens}")
        for text in self.texts:
            if text.name is not None and not isinstance(text.name, str):
                raise ValueError(f"{name}: expected the name of a text to be a str or None, got {text.name!r}")
            for what, number in (("line_ends", text.line_ends), ("heading", text.heading)):
                right = type(number) is int and number >= 0
                if not right and (what == "heading" or number is not None):
                    raise ValueError(f"{name}: expected {what} of a text to be an int of at least 0, got {number!r}")
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

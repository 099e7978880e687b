"""The trained retriever as it is evaluated: contexts, prompts, and what is written after them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hiding import IntArray, Tokens
from questions import QuestionSource
from retriever import Memory, RawKeys, Retriever, Weights, picked_passages
from shared_words import WordIndex
from torch import Tensor
from transformers import AutoTokenizer

PICKED = 8
# chunks compressed at a time
MICRO_BATCH = 128


class Context(NamedTuple):
    """A context with its memory, as the decoder and as the pick read it."""

    tokens: IntArray
    memory: Memory
    raw_keys: RawKeys
    words: WordIndex
    query_position: Tensor


class Prompt(NamedTuple):
    """A prompt with its answer, whose first ``scored`` tokens count: neither full stop nor end of turn."""

    prompt: Tokens
    answer: Tokens
    scored: int


@dataclass(frozen=True)
class Models:
    """The trained retriever with its weights, and what makes prompts for it."""

    retriever: Retriever
    compressor: Weights
    decoder: Weights
    tokenizer: Any
    data: Path
    user: Tokens
    separators: Tensor

    @property
    def device(self) -> torch.device:
        return self.retriever.device

    def source(self, seed: int) -> QuestionSource:
        return QuestionSource(self.data, self.tokenizer, "test", seed, self.retriever.layout)

    def context(self, tokens: IntArray) -> Context:
        """Compress whole chunks."""
        ids = torch.from_numpy(tokens).to(self.device).view(-1, self.retriever.layout.chunk_size)
        parts = [self.retriever.compress(self.compressor, part) for part in ids.split(MICRO_BATCH)]
        memory = [
            (torch.cat([keys for keys, _ in layers]), torch.cat([values for _, values in layers]))
            for layers in zip(*(memory for memory, _ in parts), strict=True)
        ]
        raw_keys = {layer: torch.cat([raw[layer] for _, raw in parts]) for layer in parts[0][1]}
        placed = self.retriever.place(memory, torch.arange(len(ids), device=self.device), 1)
        words = self.retriever.word_index(ids.view(1, -1))
        return Context(tokens, placed, raw_keys, words, torch.tensor([len(ids) + 1], device=self.device))

    def picked(self, context: Context, question: Tokens, by_words: bool = True) -> list[int]:
        """The best segments, best first."""
        ids = torch.tensor([question], device=self.device)
        used = torch.ones_like(ids, dtype=torch.bool)
        words = context.words if by_words else None
        scores = self.retriever.scores(self.compressor, ids, used, context.raw_keys, words)[0]
        order: list[int] = scores.topk(min(PICKED, len(scores))).indices.tolist()
        return order

    def window(self, context: IntArray, segments: Sequence[int], turn: Tokens) -> Tokens:
        """The prompt: ``segments``, best first, in the text's order with their ranks, and what follows them."""
        order = sorted(range(len(segments)), key=lambda i: segments[i])
        text = picked_passages(
            torch.from_numpy(context[None]),
            torch.tensor([[segments[i] for i in order]]),
            torch.tensor([order]),
            self.separators,
            self.retriever.layout,
        )
        return [*self.user, *text[0].tolist(), *turn]

    def padded(self, rows: Sequence[Tokens]) -> Tensor:
        """``[rows, longest]`` token ids, zeros after the end."""
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids.to(self.device)

    def exact(
        self, weights: Weights, prompts: Sequence[Prompt], memory: Memory | None, query_position: Tensor
    ) -> list[bool]:
        """Which answers greedy decoding writes in full."""
        ids = self.padded([p.prompt + p.answer for p in prompts])
        hidden = self.retriever.decode(weights, ids, memory, query_position)
        right = []
        for row, tokens, p in zip(hidden, ids, prompts, strict=True):
            start, end = len(p.prompt), len(p.prompt) + p.scored
            written = self.retriever.logits(row[start - 1 : end - 1]).argmax(-1)
            right.append(bool((written == tokens[start:end]).all()))
        return right

    def written(
        self,
        weights: Weights,
        prompts: Sequence[Tokens],
        memory: Memory | None,
        query_position: Tensor,
        count: int,
        guesses: Sequence[Tokens] | None = None,
    ) -> list[str]:
        """Greedy continuations of ``count`` tokens, cut at the end of the turn.

        ``guesses`` save time where they are right, and change nothing: what greedy decoding writes up to its first
        token that is another one is read off one pass.
        """
        end = self.tokenizer.eos_token_id
        rows = [list(prompt) for prompt in prompts]
        guesses = guesses or [[] for _ in rows]

        def tokens_after(places: Sequence[int], tails: Sequence[Tokens]) -> Iterator[Tokens]:
            """The likeliest token after each token of the tails, and after what stands before them."""
            hidden = self.retriever.decode(
                weights, self.padded([rows[i] + tail for i, tail in zip(places, tails, strict=True)]), memory, at
            )
            for i, row, tail in zip(places, hidden, tails, strict=True):
                yield self.retriever.logits(row[len(rows[i]) - 1 : len(rows[i]) + len(tail)]).argmax(-1).tolist()

        at = query_position
        live = list(range(len(rows)))
        tails = [guess[: count - 1] for guess in guesses]
        while live:
            for i, tail, likeliest in zip(live, tails, list(tokens_after(live, tails)), strict=True):
                right = next((n for n, token in enumerate(tail) if token != likeliest[n]), len(tail))
                rows[i] += likeliest[: right + 1]
            new = {i: rows[i][len(prompts[i]) :] for i in live}
            live = [i for i in live if end not in new[i] and len(new[i]) < count]
            tails = [[] for _ in live]
        texts = []
        for row, prompt in zip(rows, prompts, strict=True):
            tokens = row[len(prompt) :]
            texts.append(self.tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens))
        return texts


def models_of(data: Path, retriever: Retriever, tokenizer_folder: Path) -> Models:
    """What evaluates a retriever on the test part of ``data``."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    source = QuestionSource(data, tokenizer, "test", 0, retriever.layout)
    return Models(
        retriever,
        retriever.compressor_weights(),
        retriever.decoder_weights(),
        tokenizer,
        data,
        source.user,
        torch.from_numpy(source.separators(PICKED)),
    )

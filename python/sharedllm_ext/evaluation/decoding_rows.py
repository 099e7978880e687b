"""Greedy answers to several prompts at once: each prompt is read alone, then all answers grow together.

It needs PyTorch and Transformers alone, so that programs in other environments may load this file by its path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

#: The cache's keyword, as in model/cache_name.py: its name changed with Transformers 5.24
CACHE = (
    "cache" if "cache" in {field.name for field in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"
)


class Row(NamedTuple):
    """A prompt that was read.

    Attributes:
        keys, values: of each layer, ``[1, Hkv, L, D]``; all layers hold the same number of entries.
        position: the position of the next token, which is L unless entries were dropped.
        token: the first token of the answer.
    """

    keys: list[Tensor]
    values: list[Tensor]
    position: int
    token: int

    @classmethod
    def of(cls, cache: Any, position: int, logits: Tensor) -> Row:
        """Row of a Transformers cache of one row and the logits ``[1, 1, vocabulary]`` of its last token."""
        return cls(
            [layer.keys for layer in cache.layers],
            [layer.values for layer in cache.layers],
            position,
            int(logits[0, -1].argmax()),
        )


class RowRotary(nn.Module):
    """Rotary embeddings that differ from row to row: each row is rotated by its own module."""

    def __init__(self, rotaries: Sequence[nn.Module]) -> None:
        super().__init__()
        self.rotaries = nn.ModuleList(rotaries)

    def forward(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[B, L, D]`` at ``position_ids [B, L]``."""
        pairs = [rotary(states[row : row + 1], position_ids[row : row + 1]) for row, rotary in enumerate(self.rotaries)]
        return torch.cat([cos for cos, _ in pairs]), torch.cat([sin for _, sin in pairs])


@torch.inference_mode()
def read_prompt(model: Any, ids: Tensor) -> Row:
    """Read the tokens ``[1, L]`` of a prompt with a Transformers decoder."""
    # without a configuration every layer keeps all of its entries; the masks see to sliding windows
    cache = DynamicCache()
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: cache})
    return Row.of(cache, ids.shape[1], output.logits)


def _together(tensors: Sequence[Tensor], length: int) -> Tensor:
    """``[B, Hkv, length, D]``, each padded with zeros on the left."""
    first = tensors[0]
    together = first.new_zeros(len(tensors), first.shape[1], length, first.shape[3])
    for row, tensor in enumerate(tensors):
        together[row, :, length - tensor.shape[2] :] = tensor[0]
    return together


@torch.inference_mode()
def decode_rows(
    model: Any, rows: Sequence[Row], most: Sequence[int], stops: Sequence[Collection[int]], *, pad: int = 0
) -> list[list[int]]:
    """Greedy answers after prompts that were read.

    Args:
        model: the Transformers decoder that has read them.
        rows: the prompts, in any number of tokens.
        most: most tokens of each answer, at least 1.
        stops: the tokens that end each answer; one is the answer's last token.
        pad: a token for rows that have ended.

    Returns:
        For each row its tokens.
    """
    answers = [[row.token] for row in rows]
    lengths = [row.keys[0].shape[2] for row in rows]
    longest, device = max(lengths), rows[0].keys[0].device
    cache = DynamicCache()
    for layer in range(len(rows[0].keys)):
        keys, values = ([getattr(row, name)[layer] for row in rows] for name in ("keys", "values"))
        cache.update(_together(keys, longest), _together(values, longest), layer)
    column = torch.arange(longest, device=device)
    mask = (column >= longest - torch.tensor(lengths, device=device)[:, None]).long()
    position = torch.tensor([[row.position] for row in rows], device=device)
    while True:
        going = [
            len(answer) < limit and answer[-1] not in ends
            for answer, limit, ends in zip(answers, most, stops, strict=True)
        ]
        if not any(going):
            return answers
        last = [answer[-1] if goes else pad for answer, goes in zip(answers, going, strict=True)]
        mask = torch.cat((mask, mask.new_ones(len(rows), 1)), 1)
        output = model(
            input_ids=torch.tensor(last, device=device)[:, None],
            attention_mask=mask,
            position_ids=position,
            use_cache=True,
            **{CACHE: cache},
        )
        position = position + 1
        for answer, goes, token in zip(answers, going, output.logits[:, -1].argmax(-1).tolist(), strict=True):
            if goes:
                answer.append(token)

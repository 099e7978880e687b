"""Batches of ragged contexts for training."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass
class SharedLLMDataCollator:
    """Pads examples with contexts and running texts of different lengths.

    Each example holds ``input_ids`` (running text) and optionally ``labels`` (default: the input ids), ``context_ids``.
    Running text is padded on the right and its labels with -100; contexts are padded on the right, with a mask.

    Args:
        pad_token_id: id that fills padded places; the masks hide it.
    """

    pad_token_id: int = 0

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate examples into ``input_ids, attention_mask, labels`` and, where any has one, the context and its mask.

        Raises:
            ValueError: an example has no ``input_ids``, or labels of another length.
        """
        texts, labels, contexts = [], [], []
        for i, feature in enumerate(features):
            if "input_ids" not in feature:
                raise ValueError(f"example {i}: expected 'input_ids', got {sorted(feature)}")
            text = torch.as_tensor(feature["input_ids"], dtype=torch.int64)
            label = torch.as_tensor(feature.get("labels", text), dtype=torch.int64)
            if label.shape != text.shape:
                raise ValueError(
                    f"example {i}: expected labels of the running text's shape {tuple(text.shape)},"
                    f" got {tuple(label.shape)}"
                )
            texts.append(text)
            labels.append(label)
            contexts.append(torch.as_tensor(feature.get("context_ids", ()), dtype=torch.int64))
        batch = {
            "input_ids": _pad(texts, self.pad_token_id),
            "attention_mask": _mask(texts),
            "labels": _pad(labels, -100),
        }
        if any(len(context) for context in contexts):
            batch["context_ids"] = _pad(contexts, self.pad_token_id)
            batch["context_attention_mask"] = _mask(contexts)
        return batch


def _pad(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def _mask(rows: Sequence[Tensor]) -> Tensor:
    return _pad([torch.ones_like(row) for row in rows], 0)

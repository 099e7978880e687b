"""Batches of ragged contexts for training."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# fields of an example: values for tokens of the running text, of the context, and of the query
_TEXT_FIELDS = ("input_ids", "attention_mask", "labels")
_CONTEXT_FIELDS = ("context_ids", "context_attention_mask")
_QUERY_FIELDS = ("query_ids", "query_attention_mask")
_FIELDS = (*_TEXT_FIELDS, *_CONTEXT_FIELDS, *_QUERY_FIELDS)


@dataclasses.dataclass
class SharedLLMDataCollator:
    """Pads examples with contexts and running texts of different lengths.

    Each example holds ``input_ids`` (running text) and optionally ``labels`` (default: the input ids), ``context_ids``
    and ``query_ids``, the text that picks the nodes (default: the running text before its first label). Tokens that an
    example's ``attention_mask``, ``context_attention_mask`` or ``query_attention_mask`` hides are left out. Texts,
    contexts and queries are padded on the right, labels with -100.

    Args:
        pad_token_id: id that fills padded places; the masks hide it.
        window: of a longer running text the last ``window`` tokens stay, and those before them are appended to its
            context, as the model itself would do. Labels are then counted, smoothed and shifted as those of any text,
            which a loss outside the model needs. Default: texts stay as they are.
    """

    pad_token_id: int = 0
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and (isinstance(self.window, bool) or self.window < 1):
            raise ValueError(f"window: expected None or at least 1 token, got {self.window!r}")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate examples into ``input_ids, attention_mask, labels`` and, where any has one, context and query.

        Raises:
            ValueError: an example has no ``input_ids``, a field of another length than its text, or an unknown field.
        """
        rows = [self._row(i, feature) for i, feature in enumerate(features)]
        texts = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": _pad(texts, self.pad_token_id),
            "attention_mask": _mask(texts),
            "labels": _pad([row["labels"] for row in rows], -100),
        }
        if any(len(row["context_ids"]) for row in rows):
            for name in ("context", "query"):
                parts = [row[f"{name}_ids"] for row in rows]
                batch[f"{name}_ids"] = _pad(parts, self.pad_token_id)
                batch[f"{name}_attention_mask"] = _mask(parts)
        return batch

    def _row(self, i: int, feature: Mapping[str, Any]) -> dict[str, Tensor]:
        """Running text, labels, context and query of an example, without padding."""
        if "input_ids" not in feature:
            raise ValueError(f"example {i}: expected 'input_ids', got {sorted(feature)}")
        unknown = sorted(set(feature) - set(_FIELDS))
        if unknown:
            raise ValueError(f"example {i}: expected fields of {', '.join(_FIELDS)}, got {unknown[0]!r}")
        text = _tokens(i, feature, "input_ids")
        label = text if feature.get("labels") is None else _tokens(i, feature, "labels")
        if label.shape != text.shape:
            raise ValueError(
                f"example {i}: expected labels of the running text's shape {tuple(text.shape)},"
                f" got {tuple(label.shape)}"
            )
        own = _own(i, feature, "attention_mask", "the running text", text)
        text, label = text[own], label[own]
        context, query = (
            _tokens(i, feature, f"{name}_ids")[_own(i, feature, f"{name}_attention_mask", f"{name}_ids")]
            for name in ("context", "query")
        )
        if self.window is not None and len(text) > self.window:
            context = torch.cat((context, text[: -self.window]))
            text, label = text[-self.window :], label[-self.window :]
        if feature.get("query_ids") is None:
            query = text[(label != -100).cumsum(0) == 0]
        return {"input_ids": text, "labels": label, "context_ids": context, "query_ids": query}


def _tokens(i: int, feature: Mapping[str, Any], name: str) -> Tensor:
    """A field of one example as ``[L]`` int64; a missing one is empty."""
    value = feature.get(name)
    tokens = torch.as_tensor(() if value is None else value)
    if tokens.numel() and (tokens.is_floating_point() or tokens.is_complex()):
        raise ValueError(f"example {i}: expected integers in {name}, got dtype {tokens.dtype}")
    if tokens.dim() != 1:
        raise ValueError(f"example {i}: expected {name} of one dimension, got shape {tuple(tokens.shape)}")
    return tokens.to(torch.int64)


def _own(i: int, feature: Mapping[str, Any], name: str, of: str, tokens: Tensor | None = None) -> Tensor:
    """Which tokens of a field the example's mask does not hide, ``[L]`` booleans."""
    tokens = _tokens(i, feature, of) if tokens is None else tokens
    value = feature.get(name)
    if value is None:
        return torch.ones(len(tokens), dtype=torch.bool)
    mask = torch.as_tensor(value)
    if mask.shape != tokens.shape:
        raise ValueError(
            f"example {i}: expected {name} of the shape of {of} {tuple(tokens.shape)}, got {tuple(mask.shape)}"
        )
    return mask.bool()


def _pad(rows: Sequence[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def _mask(rows: Sequence[Tensor]) -> Tensor:
    return _pad([torch.ones_like(row) for row in rows], 0)

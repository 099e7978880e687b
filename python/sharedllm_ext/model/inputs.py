"""Checks of what a caller hands to the model, and what is derived from it: context, running text, query."""

import contextlib
import difflib
import functools
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from .modeling import SharedLLMForCausalLM

# Tensors of token ids whose values have been looked at: their version then, and the vocabulary.
_CHECKED_IDS: Any = WeakTensorKeyDictionary()
# The model whose generate runs in this thread.
_TRUSTED = threading.local()


@contextlib.contextmanager
def trusted_ids(model: "SharedLLMForCausalLM | None") -> Iterator[None]:
    """While it lasts, this thread does not look at the values of ids given to the model: the caller has done so."""
    outer, _TRUSTED.model = getattr(_TRUSTED, "model", None), model
    try:
        yield
    finally:
        _TRUSTED.model = outer


def check_ids(model: "SharedLLMForCausalLM", name: str, ids: Tensor, *, range_too: bool) -> None:
    """Token ids ``[B, L]`` of an integer dtype on the model's device, and in its vocabulary if ``range_too``."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: expected integer token ids (int64 or int32), got dtype {ids.dtype}")
    if ids.dim() != 2:
        raise ValueError(f"{name}: expected shape [batch, tokens], got {tuple(ids.shape)}")
    device = model.model.embed_tokens.weight.device
    if ids.device != device:
        raise ValueError(f"{name}: expected device {device} as the model, got {ids.device}")
    # looking at values waits for the device: once for a tensor is enough
    if range_too and ids.numel() and not _has_checked(model, ids):
        _check_range(model, name, ids)
        # tensors made in inference mode do not count their changes
        if not ids.is_inference():
            _CHECKED_IDS[ids] = (ids._version, model.model.embed_tokens.num_embeddings)


def _check_range(model: "SharedLLMForCausalLM", name: str, ids: Tensor, others: str = "") -> None:
    low, high = (int(bound) for bound in torch.stack(torch.aminmax(ids)).tolist())
    vocabulary = model.model.embed_tokens.num_embeddings
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{name}: expected token ids from 0 to {vocabulary - 1}{others}, got {low if low < 0 else high}"
        )


def _has_checked(model: "SharedLLMForCausalLM", ids: Tensor) -> bool:
    # generate has checked the running text, and what it generates is right
    if getattr(_TRUSTED, "model", None) is model:
        return True
    if ids.is_inference():
        return False
    return _CHECKED_IDS.get(ids) == (ids._version, model.model.embed_tokens.num_embeddings)


def check_not_empty(input_ids: Tensor) -> None:
    """At least one token a row."""
    if input_ids.shape[1] == 0:
        raise ValueError(f"input_ids: expected at least one token a row, got shape {tuple(input_ids.shape)}")


def check_labels(model: "SharedLLMForCausalLM", labels: Tensor) -> None:
    """Labels are int64 and either -100 or in the vocabulary."""
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected dtype torch.int64, got {labels.dtype}")
    # on CUDA every look waits for the device, in every step of a training
    if labels.numel() and not (model.training and labels.is_cuda):
        _check_range(model, "labels", labels.masked_fill(labels == -100, 0), " or -100")


def check_mask(name: str, mask: Tensor | None, ids_name: str, ids: Tensor) -> Tensor | None:
    """The mask as booleans, ``None`` if nothing is masked."""
    if mask is None:
        return None
    if mask.shape != ids.shape:
        raise ValueError(f"{name}: expected the shape of {ids_name} {tuple(ids.shape)}, got {tuple(mask.shape)}")
    if mask.device != ids.device:
        raise ValueError(f"{name}: expected device {ids.device} as {ids_name}, got {mask.device}")
    return mask.bool()


def check_running_text(
    model: "SharedLLMForCausalLM", input_ids: Tensor | None, mask: Tensor | None, context_ids: Tensor
) -> None:
    """What becomes the query, by the names that the caller knows."""
    if input_ids is None or not model.config.query_aware:
        return
    check_ids(model, "context_ids", context_ids, range_too=False)
    if input_ids.shape[0] != context_ids.shape[0]:
        raise ValueError(
            f"context_ids: expected {input_ids.shape[0]} rows, one for each row of input_ids, got "
            f"{context_ids.shape[0]}"
        )
    if mask is not None and mask.dim() == 2:
        check_mask("attention_mask", mask, "input_ids", input_ids)


@functools.lru_cache(maxsize=256)
def _looks_like_context(name: str) -> bool:
    ours = ("context_ids", "context_attention_mask", "memory", "query_ids")
    return bool(difflib.get_close_matches(name, ours, 1, 0.7))


def check_keywords(names: Iterable[str]) -> None:
    """Transformers' models take any keyword and leave out what they do not know: not so the context."""
    for name in names:
        if _looks_like_context(name):
            raise TypeError(
                f"forward: expected context_ids, context_attention_mask or memory beside the base model's arguments, "
                f"got {name!r}"
            )


def split_window(
    window: int, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Context and running text of a long plain input: (context, its mask, running text, its mask)."""
    if input_ids.shape[1] <= window:
        return None, None, input_ids, attention_mask
    if attention_mask is None:
        return input_ids[:, :-window], None, input_ids[:, -window:], None
    check_mask("attention_mask", attention_mask, "input_ids", input_ids)
    return input_ids[:, :-window], attention_mask[:, :-window], input_ids[:, -window:], attention_mask[:, -window:]


def query_of(
    query_aware: bool, input_ids: Tensor | None, attention_mask: Tensor | None, labels: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The text that picks the nodes, and its mask; (None, None) where the policy is fixed."""
    if not query_aware or input_ids is None or input_ids.shape[1] == 0:
        return None, None
    mask = None if attention_mask is None or attention_mask.dim() != 2 else attention_mask[:, -input_ids.shape[1] :]
    if labels is None:
        return input_ids, mask
    prompt = (labels != -100).cumsum(1) == 0
    return input_ids, prompt if mask is None else prompt & mask.bool()

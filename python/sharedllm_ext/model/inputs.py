"""Checks of the model's inputs, and what is derived from them: context, running text, query."""

import contextlib
import difflib
import functools
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..counted import counted
from .protocols import Decoder

# Id tensors already range-checked, with tensor version and vocabulary size at the time.
_CHECKED_IDS: Any = WeakTensorKeyDictionary()
# The model whose generate runs in this thread.
_TRUSTED = threading.local()


@contextlib.contextmanager
def trusted_ids(model: Decoder | None) -> Iterator[None]:
    """While active, this thread does not check the values of ids given to the model: the caller has done so."""
    outer, _TRUSTED.model = getattr(_TRUSTED, "model", None), model
    try:
        yield
    finally:
        _TRUSTED.model = outer


def check_ids(model: Decoder, name: str, ids: Tensor, *, range_too: bool) -> None:
    """Token ids ``[B, L]`` of an integer dtype on the model's device, and in its vocabulary if ``range_too``."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: expected integer token ids (int64 or int32), got dtype {ids.dtype}")
    if ids.dim() != 2:
        raise ValueError(f"{name}: expected shape [batch, tokens], got {tuple(ids.shape)}")
    device = model.device
    if ids.device != device:
        raise ValueError(f"{name}: expected device {device} as the model, got {ids.device}")
    # reading values waits for the device: once per tensor is enough
    if range_too and ids.numel() and not _has_checked(model, ids):
        _check_range(model, name, ids)
        # tensors made in inference mode do not count their changes
        if not ids.is_inference():
            _CHECKED_IDS[ids] = (ids._version, model.model.embed_tokens.num_embeddings)


def _check_range(model: Decoder, name: str, ids: Tensor, others: str = "") -> None:
    low, high = (int(bound) for bound in torch.stack(torch.aminmax(ids)).tolist())
    vocabulary = model.model.embed_tokens.num_embeddings
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{name}: expected token ids from 0 to {vocabulary - 1}{others}, got {low if low < 0 else high}"
        )


def _has_checked(model: Decoder, ids: Tensor) -> bool:
    # generate has checked the running text, and what it generates is right
    if getattr(_TRUSTED, "model", None) is model:
        return True
    if ids.is_inference():
        return False
    return _CHECKED_IDS.get(ids) == (ids._version, model.model.embed_tokens.num_embeddings)


def check_embeds(model: Decoder, name: str, embeds: Tensor) -> None:
    """Embeddings ``[B, L, d]`` of at least one token a row."""
    if not isinstance(embeds, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(embeds).__name__}")
    width = model.model.embed_tokens.embedding_dim
    if embeds.dim() != 3 or embeds.shape[2] != width:
        raise ValueError(f"{name}: expected shape [batch, tokens, {width}], got {tuple(embeds.shape)}")
    if not embeds.is_floating_point():
        raise ValueError(f"{name}: expected a floating point dtype, got {embeds.dtype}")
    if embeds.shape[1] == 0:
        raise ValueError(f"{name}: expected at least one token a row, got shape {tuple(embeds.shape)}")


def check_not_empty(input_ids: Tensor) -> None:
    """At least one token a row."""
    if input_ids.shape[1] == 0:
        raise ValueError(f"input_ids: expected at least one token a row, got shape {tuple(input_ids.shape)}")


def check_labels(model: Decoder, labels: Tensor) -> None:
    """Labels are int64 and either -100 or in the vocabulary."""
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected dtype torch.int64, got {labels.dtype}")
    # on CUDA every check would wait for the device, in every training step
    if labels.numel() and not (model.training and labels.is_cuda):
        _check_range(model, "labels", labels.masked_fill(labels == -100, 0), " or -100")


def check_mask(name: str, mask: Tensor | None, ids_name: str, ids: Tensor) -> Tensor | None:
    """The mask as booleans, ``None`` if nothing is masked."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(mask).__name__}")
    if mask.shape != ids.shape[:2]:
        raise ValueError(f"{name}: expected the shape of {ids_name} {tuple(ids.shape[:2])}, got {tuple(mask.shape)}")
    if mask.device != ids.device:
        raise ValueError(f"{name}: expected device {ids.device} as {ids_name}, got {mask.device}")
    return mask.bool()


def check_running_text(
    model: Decoder, name: str, inputs: Tensor | None, mask: Tensor | None, context_ids: Tensor
) -> None:
    """The arguments that become the query, under the names that the caller knows."""
    if inputs is None or not model.config.query_aware:
        return
    check_ids(model, "context_ids", context_ids, range_too=False)
    if inputs.shape[0] != context_ids.shape[0]:
        raise ValueError(
            f"context_ids: expected {counted(inputs.shape[0], 'row')}, one for each row of {name}, got "
            f"{context_ids.shape[0]}"
        )
    if mask is not None and mask.dim() == 2:
        check_mask("attention_mask", mask, name, inputs)


#: Keywords that callers of Transformers' models send in addition to the base model's own: Trainer, generate, PEFT, and
#: those of other families. Some are spelt like ours; none is a misspelling.
_FOREIGN_KEYWORDS = frozenset(
    """
    adapter_names alora_offsets cache_position cross_attn_head_mask cu_seq_lens_k cu_seq_lens_q decoder_attention_mask
    decoder_head_mask decoder_input_ids decoder_inputs_embeds encoder_attention_mask encoder_hidden_states
    encoder_outputs head_mask image_attention_mask input_lengths is_causal max_length_k max_length_q mm_token_type_ids
    num_items_in_batch num_logits_to_keep output_attentions output_hidden_states output_router_logits return_dict
    seq_idx shift_labels task_ids text_attention_mask text_ids token_type_ids
    """.split()  # noqa: SIM905
)
_OWN_KEYWORDS = ("context_ids", "context_attention_mask", "memory", "query_ids", "query_attention_mask")
_SUFFIXES = ("_input_ids", "_ids", "_id", "_attention_masks", "_attention_mask", "_masks", "_mask", "_embeds")


@functools.lru_cache(maxsize=256)
def _looks_like_context(name: str) -> bool:
    if name in _FOREIGN_KEYWORDS:
        return False
    # parts that our names share with others' say nothing
    stem = next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), name)
    return name.startswith(("context", "memor")) or bool(
        difflib.get_close_matches(stem, ("context", "contexts", "memory", "query", "queries"), 1, 0.8)
    )


def check_keywords(names: Iterable[str]) -> None:
    """Refuse misspelt context keywords: Transformers' models ignore any keyword that they do not know."""
    for name in names:
        if _looks_like_context(name):
            raise TypeError(
                f"forward: expected {', '.join(_OWN_KEYWORDS)} beside the base model's arguments, got {name!r}"
            )


def query_of(
    query_aware: bool, input_ids: Tensor | None, attention_mask: Tensor | None, labels: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The text that picks the nodes, ``[B, L]`` ids or ``[B, L, d]`` embeddings, and its mask.

    It ends before the first label, so that no choice depends on what is to be predicted.

    Returns:
        The text and its mask; (None, None) where the policy is fixed.
    """
    if not query_aware or input_ids is None or input_ids.shape[1] == 0:
        return None, None
    mask = None if attention_mask is None or attention_mask.dim() != 2 else attention_mask[:, -input_ids.shape[1] :]
    if labels is None:
        return input_ids, mask
    prompt = (labels != -100).cumsum(1) == 0
    return input_ids, prompt if mask is None else prompt & mask.bool()


def labels_of_shifted(shift_labels: Tensor) -> Tensor:
    """Labels at their own token, ``[B, L]``, from labels at the token before, as some trainers give them."""
    return torch.nn.functional.pad(shift_labels[:, :-1], (1, 0), value=-100)


def check_query(query_ids: Tensor | None, query_mask: Tensor | None, memory: Any) -> None:
    """Check a query given separately from the running text: there must be nodes left to choose."""
    if query_ids is None and query_mask is not None:
        raise ValueError("query_attention_mask: expected query_ids with it, got none")
    if query_ids is not None and memory is not None:
        raise ValueError("query_ids: expected context_ids with it, got a memory, whose nodes have been chosen")


def check_shape_of_labels(name: str, labels: Tensor | None, inputs_name: str, inputs: Tensor) -> None:
    """One label for each token."""
    if labels is not None and not isinstance(labels, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(labels).__name__}")
    if labels is not None and labels.shape != inputs.shape[:2]:
        raise ValueError(
            f"{name}: expected the shape of {inputs_name} {tuple(inputs.shape[:2])}, got {tuple(labels.shape)}"
        )


def check_labels_given(training: bool, logits_to_keep: int | Tensor, counted: bool) -> None:
    """Refuse labels for a loss outside the model: they have the text's length, but logits that of its running text.

    Raises:
        ValueError: such labels for a text that has been split.
    """
    keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
    if counted or (training and torch.is_grad_enabled() and keeps_all):
        raise ValueError(
            "labels: expected them in training with an input_ids longer than config.window, got none; for a loss "
            "outside of the model (label smoothing, compute_loss_func) give the text in front as context_ids, or let "
            "SharedLLMDataCollator(window=…) do so"
        )


def say_past_window(model: Decoder, tokens: int, mask: Tensor | None, past: Any) -> None:
    """Warn, once per model, about more running text than the window: ``tokens`` after those of the cache ``past``."""
    window = model.config.window
    total = tokens if past is None else tokens + int(past.get_seq_length())
    if total <= window:
        return
    if mask is not None and mask.dim() == 2:
        total = int((mask != 0).sum(1).max())
        if total <= window:
            return
    model._said_past_window = True
    warnings.warn(
        f"running text: expected at most {counted(window, 'token')} (config.window), got {total}; the model was not "
        "made for more of it, so give what is older as context_ids",
        UserWarning,
        stacklevel=3,
    )


def padded_rows(rows: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Rows in one tensor, and the mask of what is no padding."""
    longest = max(row.numel() for row in rows)
    if all(row.numel() == longest for row in rows):
        return torch.stack(rows), None
    ids = rows[0].new_zeros((len(rows), longest))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : row.numel()], mask[i, : row.numel()] = row, True
    return ids, mask


def end_ids(eos: int | Sequence[int] | Tensor | None) -> list[int]:
    """The tokens that end a text, of an ``eos_token_id`` in any of the forms that Transformers takes."""
    return [] if eos is None else torch.as_tensor(eos).flatten().tolist()

"""What finding passages derives from a memory and its text, kept while the memory lives."""

import dataclasses
import itertools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from ..counted import counted
from .families import attention_norm
from .layer_math import version_of
from .lower_model import LowerModel, embed_tokens, project
from .managed_layers import is_managed
from .memory import ContextMemory
from .pick import SlotPlaces, unrotated
from .word_index import WordIndex

#: Bytes of all indexes that a model keeps. One of the shipped adapter has 305 bytes a token in float32, so these are
#: three memories of 1M tokens; a larger index is made anew for each call.
KEPT_BYTES = 1 << 30
# slots of a document that are compared with its text, and how far rounding may take their values
_COMPARED, _ROUNDING = 64, 0.25
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True)
class PickIndex:
    """One document of a memory, as the pick asks it.

    Attributes:
        ids: ``[T]`` int32, its tokens.
        keys: for each of the pick's layers ``[S, Hkv, D]``, not rotated.
        segment: ``[S]`` int64, the segment of each slot.
        count: how many segments there are.
        words: the runs of tokens in every segment.
    """

    ids: Tensor
    keys: list[Tensor]
    segment: Tensor
    count: int
    words: WordIndex

    @classmethod
    def of(cls, ids: Tensor, keys: list[Tensor], places: SlotPlaces, pick: Any, config: Any) -> "PickIndex":
        """The index of a document.

        Args:
            ids: ``[T]`` its tokens; copied, the caller may change its own.
            keys: for each of the pick's layers ``[S, Hkv, D]``, not rotated.
            places: of its slots.
            pick: the model's :class:`Pick`, for its classes and its runs of words.
            config: the model's.
        """
        size = config.segment_size
        return cls(
            ids=ids.to(torch.int32, copy=True),
            keys=keys,
            segment=(places.token // size).to(ids.device),
            count=-(-ids.numel() // size),
            words=WordIndex.of(pick.token_class[ids].long(), size, pick.word_runs),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in (self.ids, *self.keys, self.segment)) + self.words.nbytes


@dataclasses.dataclass
class _Kept:
    """An index, the sources that it was made of, and when it was last used."""

    index: PickIndex
    sources: list[tuple[TensorWeakRef, int]]
    dtype: torch.dtype
    used: int


class PickIndexes:
    """The indexes of a model's memories.

    An index goes with the tensors that it was made of, whichever :class:`ContextMemory` holds them: one with other rows
    (``select``, ``expand``) has the same, one on another device, in another dtype or with more text makes its own.
    It is dropped when a source is freed or changed in place, and the one that was not used for longest when
    :data:`KEPT_BYTES` are exceeded.
    """

    def __init__(self) -> None:
        # by the memory's keys in the pick's first layer, then by first slot and end
        self._kept: Any = WeakTensorKeyDictionary()
        self._lock = threading.Lock()
        self._clock = itertools.count()

    # a copy of the model makes its own
    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return PickIndexes, ()

    @property
    def nbytes(self) -> int:
        """Bytes of all indexes that are kept."""
        with self._lock:
            return sum(kept.index.nbytes for _, _, kept in self._all())

    def get(self, memory: ContextMemory, slots: slice, ids: Tensor, pick: Any, dtype: torch.dtype) -> PickIndex | None:
        """The index of a document, if it was made of these very tensors and this text.

        Args:
            memory: holds the document.
            slots: of the document.
            ids: ``[T]`` its text.
            pick: the model's :class:`Pick`.
            dtype: of the index's keys.
        """
        with self._lock:
            kept = self._kept.get(memory.keys[pick.layers[0]], {}).get((slots.start, slots.stop))
            if kept is not None:
                kept.used = next(self._clock)
        if kept is None or kept.dtype != dtype or kept.index.words.runs != pick.word_runs:
            return None
        if not torch.equal(kept.index.ids, ids.to(torch.int32)):
            return None
        sources = _sources(memory, pick)
        same = len(sources) == len(kept.sources) and all(
            ref() is tensor and version == _version(tensor)
            for (ref, version), tensor in zip(kept.sources, sources, strict=True)
        )
        return kept.index if same else None

    def put(self, memory: ContextMemory, slots: slice, index: PickIndex, pick: Any, dtype: torch.dtype) -> None:
        """Keep an index, in place of one of the same document."""
        if index.nbytes > KEPT_BYTES:
            return
        sources = [(TensorWeakRef(tensor), _version(tensor)) for tensor in _sources(memory, pick)]
        with self._lock:
            own = self._kept.setdefault(memory.keys[pick.layers[0]], {})
            own[slots.start, slots.stop] = _Kept(index, sources, dtype, next(self._clock))
            held = sorted(self._all(), key=lambda entry: entry[2].used)
            total = sum(kept.index.nbytes for _, _, kept in held)
            for documents, key, kept in held:
                if total <= KEPT_BYTES:
                    break
                del documents[key]
                total -= kept.index.nbytes

    def _all(self) -> list[tuple[dict[tuple[int, int], _Kept], tuple[int, int], _Kept]]:
        return [
            (documents, key, kept) for documents in list(self._kept.values()) for key, kept in list(documents.items())
        ]


def _sources(memory: ContextMemory, pick: Any) -> list[Tensor]:
    """The tensors that an index is made of; layer 0's values tell whose text the memory is."""
    return [*(memory.keys[layer] for layer in pick.layers), memory.values[0], pick.token_class]


def _version(tensor: Tensor) -> int:
    """A number that changes when a tensor is changed in place.

    A tensor made in inference mode counts no changes: its elements are summed, each times a number of its row.
    """
    if not tensor.is_inference():
        return version_of(tensor)
    if not tensor.numel():
        return 0
    rows = tensor.reshape(tensor.shape[0], -1).contiguous()
    # eight bytes at a time where rows have so many: the sum wraps around, as it may
    whole = rows.shape[1] * rows.element_size() % 8 == 0
    sums = rows.view(torch.int64 if whole else _INTEGERS[rows.element_size()]).sum(1, dtype=torch.int64)
    return int((sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum())


def unrotated_keys(model: Any, layer: int, keys: Tensor, positions: Tensor) -> Tensor:
    """A layer's keys ``[S, Hkv, D]`` without their rotation by ``positions [S]``, in the model's dtype."""
    if not positions.numel():
        return keys.to(model.dtype)
    tables = model._rope_tables(int(positions.max()) + 1, keys.device)
    place = positions.to(keys.device)
    return unrotated(keys, tables.of(model.lower_model.layers[layer]), place).to(model.dtype)


def check_text(lower: LowerModel, ids: Tensor, places: SlotPlaces, values_of: Callable[[Tensor], Tensor]) -> None:
    """Refuse a text that a document's memory was not made of: layer 0's values depend on the slots' tokens alone.

    Args:
        lower: the compressor's modules.
        ids: ``[T]`` the text.
        places: its slots.
        values_of: gives layer 0's values ``[n, Hkv, D]`` in the memory at slots ``[n]`` of the document.

    Raises:
        ValueError: says how many tokens differ.
    """
    layer, count = lower.layers[0], places.token.numel()
    if not count or is_managed(layer):
        return
    chosen = torch.linspace(0, count - 1, min(count, _COMPARED)).long()
    tokens = places.token[chosen]
    normed = attention_norm(layer)(embed_tokens(lower, ids[tokens.to(ids.device)]))
    expected = project(layer, normed, "v").float().flatten(1)
    held = values_of(chosen).float().flatten(1).to(expected.device)
    other = (held - expected).norm(dim=1) > _ROUNDING * expected.norm(dim=1)
    if bool(other.any()):
        first = int(tokens[other.cpu()].min())
        raise ValueError(
            "context_ids: expected the text that the memory was made of, got another: "
            f"{int(other.sum())} of {counted(len(tokens), 'token')} that were compared differ, the first is token "
            f"{first}"
        )

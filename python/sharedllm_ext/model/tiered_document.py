"""One document of a tiered memory: its pages, its text, and the keys by which the pick chooses chunks."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..counted import counted
from .layer_math import version_of
from .memory_fields import Tail
from .pages import Page
from .pick import slot_places
from .pick_index import PickIndex, check_text, unrotated_keys
from .sources import Source
from .storage import Version, grow

# slots whose keys lose their rotation at a time
_SLOTS = 1 << 16


class PickKeys:
    """What the pick asks of one document, on the device: keys of its layers without their rotation, and the words.

    Args:
        keys: for each of the pick's layers ``[S, Hkv, D]``.
        version: of the storage that they lie in, if they can grow there.
    """

    def __init__(self, keys: list[Tensor], version: Version | None = None) -> None:
        self.keys, self._version = keys, version
        if version is not None:
            version.watch([keys])
        self._index: tuple[Any, PickIndex, torch.cuda.Event | None] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the keys."""
        return 0 if self._version is not None and self._version.overwritten else sum(key.nbytes for key in self.keys)

    def extended(self, kept: int, new: list[Tensor], *, keep: bool) -> "PickKeys":
        """The first slots, and new ones after them; in place where there is room.

        Args:
            kept: so many slots stay.
            new: by layer.
            keep: whether this object must stay readable.
        """
        version, total = grow(self.keys, new, [(0, 0, kept), (1, 0, new[0].shape[0])], self._version, keep=keep)
        return PickKeys([tensor[:total] for tensor in version.storage.tensors], version)

    def index(self, ids: Tensor, config: Any, pick: Any, dtype: torch.dtype) -> PickIndex:
        """What a question is compared with; what does not depend on the question is kept.

        Args:
            ids: ``[T]`` the document's tokens, on the keys' device.
            config: the model's.
            pick: the model's :class:`Pick`.
            dtype: the model's.
        """
        if self._version is not None:
            self._version.check()
        classes = pick.token_class
        # what was made in inference mode counts no changes
        state = None if classes.is_inference() else (id(classes), version_of(classes), pick.word_runs, dtype)
        known = self._index
        if known is not None and state is not None and known[0] == state:
            if known[2] is not None:
                # another thread's stream may have made it
                known[2].wait()
            return known[1]
        places = slot_places(ids.numel(), config)
        index = PickIndex.of(ids, [key.to(dtype) for key in self.keys], places, pick, config)
        self._index = state, index, torch.cuda.current_stream(ids.device).record_event() if ids.is_cuda else None
        return index


@dataclasses.dataclass(frozen=True, eq=False)
class TieredDocument:
    """One document; documents that go on are new objects with the old pages.

    Attributes:
        pages: one after the other; all but the last have equally many chunks.
        num_tokens, num_slots: of the document.
        tail: its partial last chunk, ``None`` where its token ids are not known.
        source: where it comes from.
        pick: of a model with a pick.
    """

    pages: tuple[Page, ...]
    num_tokens: int
    num_slots: int
    tail: Tail | None
    source: Source | None
    pick: PickKeys | None


def document_of(
    model: Any,
    device: torch.device,
    slots_of_chunk: int,
    pages: Sequence[Page],
    num_tokens: int,
    tail: Tail | None,
    source: Source | None,
    rows: Callable[[str, int, int], Tensor],
) -> TieredDocument:
    """A document of pages that exist, after a check of its slots and its text.

    Args:
        model: that will read it.
        device: where questions are answered.
        slots_of_chunk: what :func:`chunk_slots` gives.
        pages, num_tokens, tail, source: see :class:`TieredDocument`.
        rows: gives slots ``first`` to ``end`` of a tensor, named as in files.

    Raises:
        ValueError: chunks have other numbers of slots, or the source's tokens are not those of the memory.
    """
    slots = sum(page.slots for page in pages)
    full, rest = divmod(num_tokens, model.config.chunk_size)
    last = slots - full * slots_of_chunk
    if not 0 <= last <= slots_of_chunk or bool(last) != bool(rest) or (tail is not None and tail.slots != last):
        raise ValueError(
            f"memory: expected {counted(slots_of_chunk, 'slot')} in each of {counted(full, 'full chunk')} of "
            f"{counted(num_tokens, 'token')}, got {counted(slots, 'slot')}"
        )
    if source is None and not num_tokens:
        # the tokens of a document that begins here will be known
        source = Source(())
    if model.pick is None:
        return TieredDocument(tuple(pages), num_tokens, slots, tail, source, None)
    places = slot_places(num_tokens, model.config)
    if places.token.numel() != slots:
        raise ValueError(f"memory: expected {counted(places.token.numel(), 'slot')} for the pick, got {slots}")
    ids = None if source is None else source.token_ids
    if ids is not None:
        check_text(
            model.lower_model,
            ids.to(device),
            places,
            lambda chosen: torch.cat([rows("values.0", slot, slot + 1) for slot in chosen.tolist()]),
        )
    keys = []
    for layer in model.pick.layers:
        parts = []
        for first in range(0, max(slots, 1), _SLOTS):
            end = min(first + _SLOTS, slots)
            part = rows(f"keys.{layer}", first, end).to(device)
            parts.append(unrotated_keys(model, layer, part, places.position[first:end]))
        keys.append(torch.cat(parts))
    return TieredDocument(tuple(pages), num_tokens, slots, tail, source, PickKeys(keys))


def chunk_slots(config: Any) -> int:
    """Slots of a full chunk in one layer.

    Raises:
        ValueError: they depend on the question.
    """
    size, depth, slots = config.chunk_size, config.tree_depth, config.slots_per_node
    uneven = any(size % 2**level and size // 2**level < slots for level in range(1, depth + 1))
    if config.query_aware and uneven:
        raise ValueError(
            f"tiers: expected chunks of equally many slots, got chunk_size={size}, tree_depth={depth}, "
            f"slots_per_node={slots} and query_aware=True, where the question decides how many there are"
        )
    return slot_places(size, config).token.numel()

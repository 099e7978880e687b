"""A KV cache that stays in place while it grows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

#: A cache has room for a multiple of this many tokens, so that the next generate's mostly fits into the same storage.
CAPACITY_STEP = 256
#: Called with a :class:`PreallocatedCache` before states are appended to it.
BEFORE_UPDATE: list[Callable[[Cache], None]] = []


class PreallocatedLayer(DynamicLayer):
    """A cache layer that behaves as Transformers' ``DynamicLayer`` but keeps its tensors in place.

    Storage is ``[B, capacity, Hkv, D]``, allocated with room to grow; ``keys`` and ``values`` are views
    ``[B, Hkv, length, D]`` of the part in use. A new token is written, not concatenated. Views taken before a crop see
    what is written after it: clone them to keep their values.

    Args:
        limit: most tokens, if known; no more room is reserved. ``None``: unknown.
        spare: storage of keys and of values that nobody else uses, taken if the first states fit into it.
    """

    def __init__(self, limit: int | None = None, spare: tuple[Tensor, Tensor] | None = None) -> None:
        self._spare = spare
        self._key_storage: Tensor | None = None
        self._value_storage: Tensor | None = None
        self._length = 0
        self._limit = limit
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        """Keys in use, ``[B, Hkv, length, D]``; ``None`` before the first."""
        return None if self._key_storage is None else self._key_storage[:, : self._length].transpose(1, 2)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._key_storage = self._adopt(self._key_storage, value)

    @property
    def values(self) -> Tensor | None:
        """Values in use, ``[B, Hkv, length, D]``; ``None`` before the first."""
        return None if self._value_storage is None else self._value_storage[:, : self._length].transpose(1, 2)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._value_storage = self._adopt(self._value_storage, value)

    def _adopt(self, storage: Tensor | None, value: Tensor | None) -> Tensor | None:
        """Storage for an assigned tensor; reused if it is a prefix view of ours."""
        if value is None:
            self._length = 0
            return None
        seen = value.transpose(1, 2)
        self._length = seen.shape[1]
        if (
            storage is not None
            and seen.data_ptr() == storage.data_ptr()
            and seen.stride() == storage.stride()
            and (seen.shape[0], *seen.shape[2:]) == (storage.shape[0], *storage.shape[2:])
        ):
            return storage
        return seen.clone(memory_format=torch.contiguous_format)

    @property
    def capacity(self) -> int:
        """Tokens that fit without another allocation."""
        return 0 if self._key_storage is None else self._key_storage.shape[1]

    @property
    def storage(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, capacity, Hkv, D]``; what lies past the length in use is undefined."""
        assert self._key_storage is not None and self._value_storage is not None
        return self._key_storage, self._value_storage

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take over batch, heads, dtype and device of the first states ``[B, Hkv, tokens, D]``."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._length = 0
        self.is_initialized = True
        spare, self._spare = self._spare, None
        batch, heads, _, size = key_states.shape
        if spare is not None and all(
            (storage.shape[0], *storage.shape[2:]) == (batch, heads, size)
            and storage.dtype == states.dtype
            and storage.device == states.device
            for storage, states in zip(spare, (key_states, value_states), strict=True)
        ):
            self._key_storage, self._value_storage = spare
            return
        self._key_storage = key_states.transpose(1, 2)[:, :0].contiguous()
        self._value_storage = value_states.transpose(1, 2)[:, :0].contiguous()

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` in total, plus a quarter (at least 1024) if the limit allows it, rounded up."""
        if self._key_storage is None or self._value_storage is None:
            return
        # tensors made in inference mode cannot be written outside it
        locked = self._key_storage.is_inference() and not torch.is_inference_mode_enabled()
        if tokens <= self.capacity and not locked:
            return
        room = self.room(tokens)
        self._key_storage = self._moved(self._key_storage, room)
        self._value_storage = self._moved(self._value_storage, room)

    def room(self, tokens: int) -> int:
        """Tokens that a new storage has room for if it must hold so many."""
        room = tokens + max(tokens // 4, 1024)
        if self._limit is not None and self._limit >= tokens:
            room = min(room, self._limit)
        return -(-room // CAPACITY_STEP) * CAPACITY_STEP

    def adopt(self, storage: tuple[Tensor, Tensor], tokens: int) -> None:
        """Take over a storage that begins with so many tokens."""
        self._key_storage, self._value_storage = storage
        self.dtype, self.device = storage[0].dtype, storage[0].device
        self._spare, self._length, self.is_initialized = None, tokens, True

    @torch.inference_mode(False)
    @torch.no_grad()
    def _moved(self, storage: Tensor, capacity: int) -> Tensor:
        batch, _, heads, size = storage.shape
        moved = torch.empty((batch, capacity, heads, size), dtype=storage.dtype, device=storage.device)
        moved[:, : self._length] = storage[:, : self._length]
        return moved

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states ``[B, Hkv, tokens, D]``.

        Returns:
            All keys and values, ``[B, Hkv, length, D]``, as views.
        """
        if not self.is_initialized or self._key_storage is None:
            self.lazy_initialization(key_states, value_states)
        begin, end = self._length, self._length + key_states.shape[-2]
        if any(x.requires_grad for x in (key_states, value_states, *self.storage)):
            # written in place they would be missing from the gradient, or corrupt it
            pairs = zip(self.storage, (key_states, value_states), strict=True)
            self._key_storage, self._value_storage = (
                torch.cat((storage[:, :begin], states.transpose(1, 2)), 1) for storage, states in pairs
            )
        else:
            self.reserve(end)
            key_storage, value_storage = self.storage
            key_storage[:, begin:end] = key_states.transpose(1, 2)
            value_storage[:, begin:end] = value_states.transpose(1, 2)
        self._length = end
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens in use."""
        return self._length

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: ``-n`` removes ``n``, a positive number is the length to keep (as Transformers once
        had it)."""
        keep = self._length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        self._length = min(max(keep, 0), self._length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch rows."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every batch row ``repeats`` times in a row."""
        if self._length > 0:
            self._replace(lambda storage: storage.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows, in that order."""
        if self._length > 0:
            self._replace(lambda storage: storage[indices.to(storage.device)])

    def _replace(self, change: Any) -> None:
        key_storage, value_storage = self.storage
        self._key_storage, self._value_storage = change(key_storage), change(value_storage)


class PreallocatedCache(Cache):
    """A cache with the meaning of Transformers' ``DynamicCache`` whose tensors stay in place while it grows.

    Made for inference; tensors with gradients are concatenated, as Transformers' caches do. Sliding-window layers keep
    all tokens; masks and decoding steps look at the window alone.

    Args:
        config: of the decoder (``num_hidden_layers``).
        limit: most tokens, if known; saves memory.
        spares: for each layer a storage that nobody else uses.
    """

    layers: Any

    def __init__(
        self, config: Any, limit: int | None = None, spares: list[tuple[Tensor, Tensor]] | None = None
    ) -> None:
        count = config.num_hidden_layers
        own: list[Any] = [None] * count if spares is None else spares
        super().__init__(layers=[PreallocatedLayer(limit, spare) for spare in own])

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Append states to a layer; the hook is called first, because a step started ahead wrote to the same place."""
        for told in BEFORE_UPDATE:
            told(self)
        parent: Any = super()
        return parent.update(*args, **kwargs)

    def fill(self, states: Tensor) -> None:
        """Give an empty cache the states of all layers, ``[layers, 2, B, tokens, Hkv, D]``, in one copy."""
        for told in BEFORE_UPDATE:
            told(self)
        tokens = states.shape[3]
        storages = [layer._spare if layer._key_storage is None else layer.storage for layer in self.layers]
        block = _block_of(storages, states)
        if block is None:
            block, storages = _new_block(states, max(layer.room(tokens) for layer in self.layers))
        block[:, :, :, :tokens] = states
        for layer, storage in zip(self.layers, storages, strict=True):
            layer.adopt(storage, tokens)

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` in total; if that moves the storage, the decoding step is captured again."""
        for layer in self.layers:
            layer.reserve(tokens)


# a layer that grows leaves the block, which is freed with the last of its views
@torch.inference_mode(False)
@torch.no_grad()
def _new_block(states: Tensor, capacity: int) -> tuple[Tensor, list[Any]]:
    """Room for states ``[layers, 2, B, tokens, Hkv, D]`` in one tensor, and its views, the storage of each layer."""
    block = states.new_empty((*states.shape[:3], capacity, *states.shape[4:]))
    return block, [(block[index, 0], block[index, 1]) for index in range(len(block))]


def _block_of(storages: list[Any], states: Tensor) -> Tensor | None:
    """The block whose views in order the storages are, if the states fit into it; else ``None``."""
    block = None if storages[0] is None else storages[0][0]._base
    if block is None or block.dim() != states.dim() or (block.dtype, block.device) != (states.dtype, states.device):
        return None
    tokens, capacity = states.shape[3], block.shape[3]
    if tokens > capacity or block.shape != (*states.shape[:3], capacity, *states.shape[4:]):
        return None
    views = [x for pair in storages if pair is not None for x in pair]
    places = [index * block.stride(1) for index in range(2 * len(block))]
    in_order = [x.storage_offset() for x in views] == places and all(x._base is block for x in views)
    return block if in_order else None

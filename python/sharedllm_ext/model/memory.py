"""The context memory: what the compressor hands to the decoder."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from .modeling import SharedLLMForCausalLM

_FORMAT = "sharedllm-context-memory"
_VERSION = 1


@dataclasses.dataclass
class ContextMemory:
    """Compressed keys and values of one or more documents, for the ``M`` injected layers.

    Attributes:
        keys: ``M`` tensors ``[S, Hkv, D]``; all documents' slots one after the other, keys rotated by position in their
            node plus chunk index.
        values: ``M`` tensors ``[S, Hkv, D]``.
        cu_slots: cumulative slots by document, ``documents + 1`` integers.
        num_chunks: chunks of each document.
        num_tokens: context tokens of each document.
        memory_index: the document that each batch row reads; rows may share one.
        signature: what made the memory: model sizes, tree and a fingerprint of the compressor's weights.
    """

    keys: list[Tensor]
    values: list[Tensor]
    cu_slots: list[int]
    num_chunks: list[int]
    num_tokens: list[int]
    memory_index: list[int]
    signature: dict[str, Any]

    @property
    def num_documents(self) -> int:
        """Documents held."""
        return len(self.num_chunks)

    @property
    def batch_size(self) -> int:
        """Batch rows that read the memory."""
        return len(self.memory_index)

    @property
    def num_slots(self) -> int:
        """Slots of one layer, over all documents."""
        return self.cu_slots[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    @property
    def device(self) -> torch.device:
        """Device of the keys and values."""
        return self.keys[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the keys and values."""
        return self.keys[0].dtype

    def to(self, *args: Any, **kwargs: Any) -> "ContextMemory":
        """The memory on another device or in another dtype, arguments as for :meth:`torch.Tensor.to`."""
        return dataclasses.replace(
            self, keys=[k.to(*args, **kwargs) for k in self.keys], values=[v.to(*args, **kwargs) for v in self.values]
        )

    def expand(self, repeats: int) -> "ContextMemory":
        """Every batch row ``repeats`` times in a row (beams, returned sequences); keys and values are not copied."""
        rows = [document for document in self.memory_index for _ in range(repeats)]
        return dataclasses.replace(self, memory_index=rows)

    def select(self, rows: Sequence[int]) -> "ContextMemory":
        """The given batch rows, in that order; keys and values are not copied.

        Raises:
            IndexError: a row is not in ``0 .. batch_size-1``.
        """
        for row in rows:
            if not 0 <= row < self.batch_size:
                raise IndexError(f"rows: expected batch rows 0 to {self.batch_size - 1}, got {row}")
        return dataclasses.replace(self, memory_index=[self.memory_index[row] for row in rows])

    def slot_ranges(self) -> list[tuple[int, int]]:
        """First slot and end of every batch row's memory."""
        return [(self.cu_slots[i], self.cu_slots[i + 1]) for i in self.memory_index]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the memory to a safetensors file with a header that names model, layers and tree."""
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "cu_slots": self.cu_slots,
            "num_chunks": self.num_chunks,
            "num_tokens": self.num_tokens,
            "memory_index": self.memory_index,
            "signature": self.signature,
        }
        tensors = {f"keys.{i}": k.detach().contiguous() for i, k in enumerate(self.keys)}
        tensors |= {f"values.{i}": v.detach().contiguous() for i, v in enumerate(self.values)}
        # a half-written file must never stand under the final name
        partial = f"{os.fspath(path)}.partial"
        try:
            save_file(tensors, partial, metadata={"header": json.dumps(header)})
            os.replace(partial, path)
        finally:
            if os.path.exists(partial):
                os.remove(partial)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: "SharedLLMForCausalLM | None" = None,
        device: torch.device | str | None = None,
    ) -> "ContextMemory":
        """Read a memory written by :meth:`save`.

        Args:
            path: the file.
            model: the model that will read it; the memory must be its own. Also the default device.
            device: where to put the tensors; default: the model's device, or the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated or no context memory, or another model made it.
        """
        name = os.fspath(path)
        if not os.path.isfile(name):
            what = "is a folder" if os.path.isdir(name) else "does not exist"
            raise FileNotFoundError(f"context memory file: expected a file, got {name!r}, which {what}")
        target = torch.device(device) if device is not None else (model.device if model is not None else "cpu")
        try:
            with safe_open(name, framework="pt", device=str(target)) as file:
                header = json.loads((file.metadata() or {}).get("header", "{}"))
                if header.get("format") != _FORMAT:
                    raise ValueError(f"{name}: expected a {_FORMAT} file, got a safetensors file without that header")
                if header["version"] != _VERSION:
                    raise ValueError(f"{name}: expected {_FORMAT} version {_VERSION}, got {header['version']}")
                layers = header["signature"]["injection_layers"]
                keys = [file.get_tensor(f"keys.{i}") for i in range(layers)]
                values = [file.get_tensor(f"values.{i}") for i in range(layers)]
        except (SafetensorError, json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{name}: expected a complete {_FORMAT} file, got a truncated or foreign one ({error})"
            ) from None
        fields = ("cu_slots", "num_chunks", "num_tokens", "memory_index", "signature")
        memory = cls(keys=keys, values=values, **{field: header[field] for field in fields})
        memory._check_shapes(name)
        if model is not None:
            model.check_memory(memory)
        return memory

    def _check_shapes(self, name: str) -> None:
        heads, size = self.signature["num_key_value_heads"], self.signature["head_dim"]
        expected = (self.num_slots, heads, size)
        for kind, tensors in (("keys", self.keys), ("values", self.values)):
            for i, tensor in enumerate(tensors):
                if tuple(tensor.shape) != expected:
                    raise ValueError(f"{name}: expected {kind}.{i} of shape {expected}, got {tuple(tensor.shape)}")

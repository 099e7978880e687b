"""What the parts of this package need from the whole model, which they must not import."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn


class Decoder(Protocol):
    """:class:`~sharedllm_ext.SharedLLMForCausalLM`, as far as inputs, memories and decoding know it.

    Attributes:
        config: its :class:`~sharedllm_ext.SharedLLMConfig`.
        model: the base checkpoint's own model.
        lm_head: the output projection.
        training: whether it is in training mode.
    """

    config: Any
    model: Any
    lm_head: Any
    compressor: Any
    training: bool
    _said_past_window: bool

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""

    def modules(self) -> Iterator[nn.Module]:
        """All modules."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """All parameters."""

    def check_memory(self, memory: Any) -> None:
        """Refuse a memory that another model has made."""

    def check_index(self, index: Any) -> None:
        """Refuse an index that another model has made."""

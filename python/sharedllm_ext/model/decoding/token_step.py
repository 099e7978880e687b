"""The operators of one decoding step: one token a row, over storage that stays in place."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops import decode_append, injected_attention
from ..fp8_linear import stored_weight
from ..protocols import Decoder
from ..rotary import Tables
from .layers import PREFETCH_BYTES, MemoryContext, StepLayer, logits_of, product, run_layers


class TokenStep:
    """One token a row: its key and value go into the cache, the logits of the next one come out.

    Everything that changes between two steps lies in tensors that stay in place, so that a graph of it can be replayed.

    Args:
        model: the model; :func:`~.support.obstacle_in_model` says which.
        storages: keys and values ``[B, capacity, Hkv, D]`` of each layer.
        batch: rows.
        context: what injected layers read, for one token a row; ``None`` for nothing.
        tables: cos and sin of each layer for every position that the cache has room for.
        live: by how many tokens a step extends each row, ``[B]`` int64, 0 where its token does not count; default: one.
    """

    # its buffers are written in later calls, which may be outside inference mode
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        model: Decoder,
        storages: Sequence[tuple[Tensor, Tensor]],
        batch: int,
        *,
        context: MemoryContext | None,
        tables: list[Tables],
        live: Tensor | None = None,
    ) -> None:
        device = model.device
        self.batch = batch
        self._model = weakref.ref(model)
        self._storages = list(storages)
        self._context = context
        self._tables = tables
        size = model.model.layers[0].self_attn.head_dim
        # queries are rotated when the cache gets their key
        # not in the default dtype, which may be different
        angle = torch.zeros(1, size // 2, dtype=torch.float32, device=device)
        self._no_rotation = (angle.cos(), angle.sin())
        self._no_position = torch.zeros(batch, dtype=torch.int64, device=device)
        self._cu_q = torch.arange(batch + 1, device=device)
        self._length = torch.zeros(batch, dtype=torch.int64, device=device)
        self._first = torch.zeros(batch, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self._live = live
        self._layers: list[StepLayer] = []

    def step(self) -> Tensor:
        """Logits ``[B, vocabulary]``."""
        model: Any = self._model()
        logits = logits_of(model, run_layers(model, self._tokens, self._layers, self._attend, self._context))
        self._length.add_(1 if self._live is None else self._live)
        return logits

    def _attend(self, x: Tensor, layer: StepLayer, index: int) -> Tensor:
        keys, values = self._storages[index]
        qkv = product(x, layer.qkv, layer.attention_norm)
        q_norm, k_norm = layer.q_norm, layer.k_norm
        q, slot_range = decode_append(
            qkv,
            keys,
            values,
            self._length,
            self._first,
            *self._tables[index],
            q_norm=None if q_norm is None else q_norm.weight,
            k_norm=None if k_norm is None else k_norm.weight,
            eps=0.0 if q_norm is None else q_norm.variance_epsilon,
            window=layer.window,
            overlap=True,
            prefetch=stored_weight(layer.output[0]),
            prefetch_bytes=PREFETCH_BYTES,
        )
        out, _ = injected_attention(
            q,
            keys.flatten(0, 1),
            values.flatten(0, 1),
            self._cu_q,
            slot_range,
            self._no_position,
            *self._no_rotation,
            scale=layer.scaling,
        )
        return out.flatten(1)

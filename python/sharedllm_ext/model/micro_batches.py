"""Compressing in micro-batches: how many tokens at a time, where the memory is stored, errors of lacking memory."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..counted import counted
from .chunks import Chunk, micro_batch
from .compressor import compress_chunks
from .families import projection
from .fp8_linear import Fp8Linear
from .layer_math import Fp8Products, Products, refuse_fp8
from .lower_model import LowerModel, activation_bytes
from .memory import ContextMemory
from .memory_fields import Tail
from .rotary import LayerTables
from .stopwatch import Stopwatch
from .tree import TreeShape

# Larger micro-batches make matmuls no faster; on CUDA 4.4 GB of activations for an 8B model. On the CPU activations of
# more than 32 MiB come from fresh pages each time, which the system clears first.
_MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}


@dataclasses.dataclass(frozen=True)
class Work:
    """Inputs of one call of compress: packed tokens, their documents and chunks, tables, query vectors."""

    ids: Tensor
    lengths: list[int]
    chunks: list[Chunk]
    counts: list[int]
    tables: LayerTables
    query: Tensor | None
    has_query: list[bool] | None


def tree_shape(config: Any, training: bool) -> TreeShape:
    """The tree of a configuration; splits are noisy only in training."""
    noise = config.split_noise if training else 0.0
    return TreeShape(config.tree_depth, config.slots_per_node, float(noise), config.slot_position == "end")


def compress_in_micro_batches(
    lower: LowerModel,
    work: Work,
    config: Any,
    fp8: Fp8Products,
    signature: Callable[[], dict[str, Any]],
    *,
    model_dtype: torch.dtype,
    generator: torch.Generator | None,
    watch: Stopwatch,
    progress: Callable[[int], None] | None,
    training: bool,
    checkpointing: bool,
) -> ContextMemory:
    """Compress all chunks, as many at a time as the configuration or free memory says.

    Args:
        lower: the compressor's modules.
        work: what to compress.
        config: of the model.
        fp8: weights in 8 bits, kept from call to call.
        signature: gives the memory's.
        model_dtype: of the keys and values, where weights do not tell.
        generator: source of the split noise.
        watch: stopwatch for the laps.
        progress: called with the context tokens compressed so far.
        training, checkpointing: whether splits are noisy, and layers recomputed in the backward pass.

    Raises:
        torch.OutOfMemoryError: says how much was needed, and which settings need less.
    """
    ids, lengths, chunks = work.ids, work.lengths, work.chunks
    shape = tree_shape(config, training)
    pieces: list[list[Tensor]] = [[] for _ in range(2 * len(lower.layers))]
    store: list[Tensor] | None = None
    slots_by_chunk: list[int] = []
    room = sum(min(chunk.length, (config.tree_depth + 1) * config.slots_per_node) for chunk in chunks)
    if not chunks or not torch.is_grad_enabled():
        # the whole memory at once: appending would copy it again and again
        store = memory_store(lower, room, model_dtype, ids.device)
    products = products_of(config, lower, fp8)

    def compress(part: Tensor, batch: Sequence[Chunk]) -> tuple[list[Tensor], list[Tensor], list[int]]:
        return compress_chunks(
            lower,
            part,
            batch,
            shape,
            work.tables,
            work.query,
            work.has_query,
            generator,
            checkpointing,
            watch,
            products,
        )

    needed = activation_bytes(lower)
    for batch, (keys, values, slots) in in_micro_batches(work, config, compress, store, token_bytes=needed):
        written = sum(slots_by_chunk)
        slots_by_chunk += slots
        if store is None:
            for piece, tensor in zip(pieces, (*keys, *values), strict=True):
                piece.append(tensor)
        else:
            for target, tensor in zip(store, (*keys, *values), strict=True):
                target[written : written + tensor.shape[0]] = tensor
        if progress is not None:
            progress(batch[-1].start + batch[-1].length)
    total = sum(slots_by_chunk)
    tensors = [torch.cat(piece) for piece in pieces] if store is None else [target[:total] for target in store]
    by_document = [0] * len(lengths)
    for chunk, slots_of_chunk in zip(chunks, slots_by_chunk, strict=True):
        by_document[chunk.document] += slots_of_chunk
    cu_slots = [0, *itertools.accumulate(by_document)]
    half = len(lower.layers)
    last_slots = {chunk.document: slots for chunk, slots in zip(chunks, slots_by_chunk, strict=True)}
    return ContextMemory(
        keys=tensors[:half],
        values=tensors[half:],
        cu_slots=cu_slots,
        num_chunks=work.counts,
        num_tokens=lengths,
        memory_index=list(range(len(lengths))),
        signature=signature(),
        tails=_tails(ids, lengths, config.chunk_size, last_slots),
    )


def _tails(ids: Tensor, lengths: list[int], chunk_size: int, slots: dict[int, int]) -> list[Tail | None]:
    """The partial last chunk of each document; ``slots`` are those of each document's last chunk."""
    ends, rests = itertools.accumulate(lengths), [length % chunk_size for length in lengths]
    parts = [ids[end - rest : end] for end, rest in zip(ends, rests, strict=True)]
    # one copy, which does not keep the whole context alive
    kept = torch.cat([ids[:0], *parts]).to(torch.int32, copy=True).split(rests)
    return [Tail(part, slots[i] if rest else 0) for i, (part, rest) in enumerate(zip(kept, rests, strict=True))]


T = TypeVar("T")


def in_micro_batches(
    work: Work,
    config: Any,
    compress: Callable[[Tensor, Sequence[Chunk]], T],
    store: list[Tensor] | None,
    *,
    token_bytes: int,
) -> Iterator[tuple[Sequence[Chunk], T]]:
    """Compress all chunks, as many at a time as the configuration or free memory says.

    Args:
        work: what to compress.
        config: of the model.
        compress: called with the tokens and chunks of every micro-batch.
        store: where results are written, so that a micro-batch may be tried again; ``None`` for one with gradients.
        token_bytes: of the activations of one token.

    Yields:
        The chunks of a micro-batch, and what ``compress`` gives for them.

    Raises:
        torch.OutOfMemoryError: says how much was needed, and which settings need less.
    """
    ids, chunks = work.ids, work.chunks
    limit = config.micro_batch_tokens or _micro_batch_tokens(token_bytes, ids.device)
    first = 0
    while first < len(chunks):
        batch = micro_batch(chunks, first, limit)
        part = ids[batch[0].start : batch[-1].start + batch[-1].length]
        failure: str | None = None
        try:
            result = compress(part, batch)
        except RuntimeError as error:
            if not _is_out_of_memory(error, ids.device):
                raise
            failure = str(error).split("\n", maxsplit=1)[0]
        if failure is not None:
            # outside the handler, which would keep the failed call's tensors alive
            torch.cuda.empty_cache()
            if config.micro_batch_tokens is None and len(batch) > 1 and store is not None:
                limit = part.numel() // 2
                continue
            raise torch.OutOfMemoryError(_out_of_memory(config, token_bytes, part, store, failure))
        first += len(batch)
        yield batch, result
        # the next micro-batch needs its room
        del result


def products_of(config: Any, lower: LowerModel, fp8: Fp8Products) -> Products:
    if config.compressor_precision == "model":
        if any(type(projection(layer.self_attn, "o")) is Fp8Linear for layer in lower.layers):
            raise ValueError(
                "compressor_precision: expected 'fp8', as the tied compressor shares the decoder's weights in 8 bits, "
                "got 'model'; load the checkpoint with it for its own weights"
            )
        fp8.forget()
        return Products()
    if torch.is_grad_enabled():
        raise ValueError("compressor_precision: expected 'model' for a compressor in training, got 'fp8'")
    refuse_fp8(lower.layers)
    return fp8


def memory_store(lower: LowerModel, slots: int, model_dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    attention, layers = lower.layers[0].self_attn, len(lower.layers)
    dtype = _memory_dtype(projection(attention, "v"), model_dtype, device)
    shape = (slots, projection(attention, "k").out_features // attention.head_dim, attention.head_dim)
    try:
        return [torch.empty(shape, dtype=dtype, device=device) for _ in range(2 * layers)]
    except torch.OutOfMemoryError:
        # raised after the handler, which would keep the failed call's tensors alive
        pass
    torch.cuda.empty_cache()
    needed = 2 * layers * slots * shape[1] * shape[2] * dtype.itemsize
    raise torch.OutOfMemoryError(
        f"context memory: expected {needed / 1e9:.2f} GB of free device memory for {counted(slots, 'slot')} in "
        f"{counted(layers, 'layer')}, got {_free_bytes(device) / 1e9:.2f} GB; fewer injection_layers, fewer "
        "slots_per_node, a larger chunk_size or a shorter context needs less"
    )


def _memory_dtype(module: Any, model_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype of the keys and values that a compressor's value projection gives."""
    weight = getattr(module, "weight", None)
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else model_dtype
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device.type)
    return dtype


def _micro_batch_tokens(token_bytes: int, device: torch.device) -> int:
    """Tokens of a micro-batch when the configuration names none."""
    most = _MICRO_BATCH_TOKENS.get(device.type, _MICRO_BATCH_TOKENS["cpu"])
    if device.type != "cuda":
        return most
    return max(1, min(most, int(0.95 * _free_bytes(device)) // token_bytes))


def _out_of_memory(config: Any, token_bytes: int, ids: Tensor, store: list[Tensor] | None, failure: str) -> str:
    tokens, device = ids.numel(), ids.device
    needed = tokens * token_bytes
    kept = sum(tensor.nbytes for tensor in store or ())
    knob = f"micro_batch_tokens below {tokens}" if store is not None else "gradient checkpointing or a shorter context"
    return (
        f"compress: expected about {needed / 1e9:.2f} GB of free device memory for the activations of "
        f"{counted(tokens, 'context token')} beside {kept / 1e9:.2f} GB of context memory, got "
        f"{_free_bytes(device) / 1e9:.2f} GB; {knob} "
        f"(config.micro_batch_tokens is {config.micro_batch_tokens}) needs less ({failure})"
    )


def _free_bytes(device: torch.device) -> int:
    """Device memory that an allocation could get: free on the device, or cached by PyTorch and unused."""
    if device.type != "cuda":
        return 0
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _is_out_of_memory(error: RuntimeError, device: torch.device) -> bool:
    """Whether device memory ran out: PyTorch has a class for it, but an extension's operator raises another one."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return device.type == "cuda" and str(error).startswith("out of memory: ")

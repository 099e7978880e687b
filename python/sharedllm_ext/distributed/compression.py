"""One context compressed by several processes, each its own chunks."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..model.inputs import check_ids, check_mask
from ..model.memory import ContextMemory
from ..model.signature_fields import describe_difference
from .ranks import Ranks
from .sharded_memory import ShardedMemory
from .shares import shares_of

#: What becomes of the memory: whole in all processes, whole in the first one, or every process keeps its slots.
GATHER = ("all", "first", "none")


def compress(
    model: Any,
    context_ids: Tensor,
    context_attention_mask: Tensor | None = None,
    query_ids: Tensor | None = None,
    query_attention_mask: Tensor | None = None,
    *,
    ranks: Ranks,
    gather: str = "all",
    progress: Callable[[int], None] | None = None,
    query_embeds: Tensor | None = None,
) -> ContextMemory | None:
    """``model.compress`` by all processes: each compresses a slice of the chunks, of as many tokens as the others.

    Every process calls it with the same model and inputs. Chunks do not see each other, so the memory is that of one
    process, up to the rounding of matrix products of other sizes.

    Args:
        model: the model, on this process's device.
        context_ids, context_attention_mask, query_ids, query_attention_mask, query_embeds: as for ``model.compress``.
        ranks: the processes.
        gather: ``all``: every process gets the whole memory; ``first``: only process 0 does; ``none``: each keeps its
            own slots, as a :class:`ShardedMemory` that ``forward`` and ``generate`` read together.
        progress: called with the context tokens compressed so far, as if the others had come as far as this one.

    Returns:
        The memory; ``None`` with ``first`` in the other processes.

    Raises:
        ValueError: inputs that ``model.compress`` refuses, or that differ between the processes.
        RankError: another process has failed, or does not answer.
    """
    if gather not in GATHER:
        raise ValueError(f"gather: expected {', '.join(GATHER)}, got {gather!r}")
    ranks.expect_same(
        "compress",
        {
            "context_ids": context_ids,
            "context_attention_mask": context_attention_mask,
            "query_ids": query_ids,
            "query_attention_mask": query_attention_mask,
            "query_embeds": query_embeds,
            "gather": gather,
        },
    )

    def own_part() -> ShardedMemory:
        check_ids(model, "context_ids", context_ids, range_too=True)
        mask = check_mask("context_attention_mask", context_attention_mask, "context_ids", context_ids)
        used = torch.ones_like(context_ids, dtype=torch.bool) if mask is None else mask
        lengths = used.sum(1).tolist()
        size = model.config.chunk_size
        share = shares_of(lengths, size, ranks.size)[ranks.rank]
        # each row's tokens by their number in the row
        number = used.long().cumsum(1) - 1
        edges = torch.tensor(share.tokens, dtype=torch.int64, device=used.device).view(len(lengths), 2)
        inside = used & (number >= edges[:, :1]) & (number < edges[:, 1:])
        own = share.total

        def tell(done: int) -> None:
            if progress is not None:
                progress(done * sum(lengths) // own)

        part = model._compress_part(
            context_ids,
            inside,
            query_ids,
            query_attention_mask,
            query_embeds,
            first_chunks=share.first_chunks,
            progress=tell,
            training=False,
        )
        return ShardedMemory(
            keys=part.keys,
            values=part.values,
            cu_slots=part.cu_slots,
            num_chunks=[-(-length // size) for length in lengths],
            num_tokens=lengths,
            memory_index=part.memory_index,
            signature=part.signature,
            tails=part.tails,
            ranks=ranks,
        )

    memory: ShardedMemory = ranks.run("compress", own_part)
    _check_signatures(memory, ranks)
    if gather == "none":
        return memory
    return memory.gather(to=None if gather == "all" else 0)


def _check_signatures(memory: ShardedMemory, ranks: Ranks) -> None:
    """Refuse slots that other models have made."""
    own = json.dumps([memory.signature, str(memory.dtype)])
    makers = [json.loads(text) for text in ranks.exchange(own.encode(), "compress")]
    for rank, (signature, dtype) in enumerate(makers):
        difference = describe_difference(makers[0][0], signature)
        if difference is None and dtype != makers[0][1]:
            difference = f"dtype: expected {makers[0][1]}, got {dtype}"
        if difference is not None:
            raise ValueError(
                f"compress: expected the same model in all processes, got another in process {rank}; {difference}"
            )

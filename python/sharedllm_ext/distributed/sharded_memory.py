"""A context memory whose slots lie in several processes, each with its own."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from ..counted import counted
from ..model.memory import ContextMemory
from ..model.memory_fields import Tail
from .ranks import Ranks

# settings of generate that would let processes choose or end differently, and what to do instead
_REFUSED = {
    "max_time": "clocks differ; give stopping_criteria=[MaxTimeCriteria(…)], whose answer is the first process's",
    "assistant_model": "drafts of another model are not compared",
    "custom_generate": "its loop is not known",
}


@dataclasses.dataclass
class ShardedMemory(ContextMemory):
    """This process's slots of a memory that several processes hold; made by :func:`sharedllm_ext.distributed.compress`.

    All of them call ``forward`` and ``generate`` alike, with the same inputs: each attends to its own slots, and what
    they have read is joined by its log-sum-exp. Keys, values, ``cu_slots`` and ``num_slots`` are this process's,
    ``num_chunks`` and ``num_tokens`` those of the whole documents. For inference only.

    Attributes:
        ranks: the processes.
    """

    ranks: Ranks = dataclasses.field(kw_only=True, repr=False, compare=False)

    @property
    def processes(self) -> int:  # type: ignore[override]
        """How many processes hold the slots."""
        return self.ranks.size

    def merge(self, out: Tensor, lse: Tensor) -> Tensor:
        """Join what all processes have read.

        Args:
            out: ``[T, Hq, D]`` attention over this process's slots.
            lse: ``[T, Hq]`` its log-sum-exp, -inf where there is no slot.

        Returns:
            ``[T, Hq, D]`` attention over all slots, the same bits in all processes with the same device.
        """
        if out.requires_grad:
            self.expect_whole()
        # one message: a short one costs its latency alone
        own = torch.cat([part.contiguous().reshape(-1).view(torch.uint8) for part in (out, lse)])
        parts = [part.split([out.nbytes, lse.nbytes]) for part in self.ranks.gather(own, "attention")]
        outs = [part[0].view(out.dtype).view(out.shape) for part in parts]
        lses = [part[1].clone().view(lse.dtype).view(lse.shape) for part in parts]
        return merge_parts(outs, lses)

    def expect_same(self, **inputs: Tensor | None) -> None:
        """Refuse inputs of a ``forward`` that differ between processes."""
        if not self.ranks.generating:
            self.ranks.expect_same("forward", inputs)

    @contextlib.contextmanager
    def generate_alike(self, text: Tensor | None, config: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator:
        """Let all processes choose the same tokens and end together in one ``generate``: those of the first one.

        Args:
            text: the running text.
            config: the generation configuration.
            args, kwargs: further arguments of ``generate``; changed in place.

        Raises:
            ValueError: settings by which the processes would part, or other inputs in another process.
        """
        ranks = self.ranks
        if args:
            raise ValueError(
                "generate: expected keywords after generation_config with a memory in "
                f"{counted(ranks.size, 'process')}, got {counted(len(args), 'positional argument')}"
            )
        for name, reason in _REFUSED.items():
            value = kwargs.get(name, getattr(config, name, None))
            if value is not None:
                got = value if isinstance(value, (int, float, str)) else type(value).__name__
                raise ValueError(
                    f"{name}: expected None with a memory in {counted(ranks.size, 'process')} ({reason}), got {got}"
                )
        ranks.expect_same("generate", {"input_ids": text, "attention_mask": kwargs.get("attention_mask")})
        _share_random_state(ranks)
        processors = LogitsProcessorList(kwargs.get("logits_processor") or ())
        processors.append(_FirstScores(ranks))
        kwargs["logits_processor"] = processors
        criteria = kwargs.get("stopping_criteria")
        if criteria is not None:
            several = criteria if isinstance(criteria, (list, tuple)) else [criteria]
            kwargs["stopping_criteria"] = StoppingCriteriaList([_FirstAnswer(ranks, one) for one in several])
        outer, ranks.generating = ranks.generating, True
        try:
            yield
        finally:
            ranks.generating = outer

    def gather(self, to: int | None = None) -> ContextMemory | None:
        """Put all slots together; every process calls it.

        Args:
            to: the process that gets them; default: all of them.

        Returns:
            The whole memory, ``None`` in a process that does not get it.

        Raises:
            ValueError: there is no such process.
            RankError: a process has failed or does not answer.
        """
        ranks = self.ranks
        if to is not None and not 0 <= to < ranks.size:
            raise ValueError(f"to: expected a process from 0 to {ranks.size - 1}, or None, got {to!r}")
        tails = [[0, []] if tail is None else [tail.slots, tail.token_ids.tolist()] for tail in self.tails or ()]
        told = ranks.exchange(json.dumps([self.cu_slots, tails]).encode(), "gather")
        by_process, tails_by_process = zip(*map(json.loads, told), strict=True)
        gets = to is None or to == ranks.rank
        cu_slots = [sum(cu[index] for cu in by_process) for index in range(len(self.cu_slots))]
        edges = [0]
        for cu in by_process:
            edges.append(edges[-1] + cu[-1])
        wholes = ranks.run(
            "gather", lambda: [one.new_empty((edges[-1], *one.shape[1:])) for one in self._tensors() if gets]
        )
        for index, own in enumerate(self._tensors()):
            whole = wholes[index] if gets else None
            if whole is not None:
                whole[edges[ranks.rank] : edges[ranks.rank + 1]] = own
            for source in range(ranks.size):
                low, high = edges[source], edges[source + 1]
                if to is None:
                    assert whole is not None
                    # chunks lie in the order of the processes: a process's slots are one piece of the whole
                    ranks.broadcast(whole[low:high], source, "gather")
                elif source == ranks.rank and not gets:
                    ranks.send(own, to, "gather")
                elif gets and source != ranks.rank:
                    assert whole is not None
                    ranks.receive(whole[low:high], source, "gather")
        if not gets:
            return None
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(ContextMemory)}
        half = len(self.keys)
        # a document ends in one process only: the others' parts of it end with full chunks
        ends = [max(of_document, key=lambda tail: len(tail[1])) for of_document in zip(*tails_by_process, strict=True)]
        fields |= {
            "keys": wholes[:half],
            "values": wholes[half:],
            "cu_slots": cu_slots,
            "tails": [Tail(torch.tensor(ids, dtype=torch.int32, device=self.device), slots) for slots, ids in ends],
        }
        return ContextMemory(**fields)

    def save(self, path: str | os.PathLike[str], *, max_shard_size: int | str | None = None) -> None:
        """Write the whole memory, in the first process; every process calls it.

        Raises:
            OSError: the file cannot be written, in the first process; :class:`RankError` in the others.
        """
        whole = self.gather(to=0)
        self.ranks.run("save", lambda: None if whole is None else whole.save(path, max_shard_size=max_shard_size))

    def _tensors(self) -> list[Tensor]:
        return [*self.keys, *self.values]


def merge_parts(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> Tensor:
    """Attention over all slots, from attention over disjoint parts of them.

    ``sum(exp(lse_i) out_i) / sum(exp(lse_i))``, in the order of the parts.

    Args:
        outs: ``[T, Hq, D]`` of each part.
        lses: ``[T, Hq]`` float32 or float64 of each part; -inf for a part without slots.

    Returns:
        ``[T, Hq, D]`` in the parts' dtype; zeros where no part has slots.
    """
    most = torch.stack(list(lses)).amax(0)
    # without any slot the difference would be NaN
    most = torch.where(most == -torch.inf, torch.zeros_like(most), most)
    weights = [torch.exp(lse - most) for lse in lses]
    total = weights[0].clone()
    for weight in weights[1:]:
        total += weight
    total = torch.where(total == 0, torch.ones_like(total), total)
    joined = torch.zeros(outs[0].shape, dtype=most.dtype, device=most.device)
    for out, weight in zip(outs, weights, strict=True):
        joined += out.to(most.dtype) * (weight / total).unsqueeze(-1)
    return joined.to(outs[0].dtype)


class _FirstScores(LogitsProcessor):
    """The first process's scores, in all of them: a device may round otherwise, and a close choice would differ."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Scores ``[B, V]``."""
        shared = scores.clone(memory_format=torch.contiguous_format)
        self.ranks.broadcast(shared, 0, "generate")
        return shared


class _FirstAnswer(StoppingCriteria):
    """Whether to stop, as the first process's criterion says: clocks and counters may differ."""

    def __init__(self, ranks: Ranks, criterion: Any) -> None:
        self.ranks, self.criterion = ranks, criterion

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Booleans ``[B]``."""
        own = torch.as_tensor(self.criterion(input_ids, scores, **kwargs), device=input_ids.device)
        done = own.to(torch.bool).expand(input_ids.shape[0]).contiguous().clone()
        self.ranks.broadcast(done, 0, "generate")
        return done


def _share_random_state(ranks: Ranks) -> None:
    """Give all processes the first one's random state: they draw the same tokens as it would alone."""
    states = [torch.get_rng_state()]
    if ranks.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(ranks.device))
    sizes = [len(state) for state in states]
    shared = ranks.share(torch.cat(states).numpy().tobytes(), "generate")
    first, *rest = torch.frombuffer(bytearray(shared), dtype=torch.uint8).split(sizes)
    torch.set_rng_state(first)
    for state in rest:
        torch.cuda.set_rng_state(state, ranks.device)

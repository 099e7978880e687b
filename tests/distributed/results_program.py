"""Compression and reading by several processes, beside one; test_results.py starts it with the number of processes.

Prints one JSON object: for each case what every process has found.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.generation import MaxTimeCriteria

from sharedllm_ext import ContextMemory, SharedLLMForCausalLM, decoding_obstacle
from sharedllm_ext.distributed import Ranks, ShardedMemory, compress, join
from sharedllm_ext.model.decoding import support
from tests.model import builders

from .processes import start

torch.set_num_threads(1)


def _inputs(rows: int = 3) -> dict[str, Any]:
    """Ragged documents (one empty) with padding on either side, and a query for each."""
    lengths = [210, 0, 230][:rows]
    context = builders.ids(rows, max(lengths))
    mask = torch.zeros_like(context)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if row % 2 else slice(max(lengths) - length, None)] = 1
    return {"context_ids": context, "context_attention_mask": mask, "query_ids": builders.ids(rows, 7)}


def _difference(got: ContextMemory, want: ContextMemory, *, tails: bool = True) -> float:
    for field in ("cu_slots", "num_chunks", "num_tokens", "memory_index", "signature"):
        assert getattr(got, field) == getattr(want, field), field
    for one, other in zip(got.tails or [], want.tails or [], strict=True) if tails else ():
        assert one is not None and other is not None and one.slots == other.slots
        assert torch.equal(one.token_ids, other.token_ids) and one.token_ids.dtype == other.token_ids.dtype
    assert type(got) is ContextMemory and got.dtype == want.dtype
    pairs = zip((*got.keys, *got.values), (*want.keys, *want.values), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def _model(family: str = "llama", **fields: Any) -> SharedLLMForCausalLM:
    torch.manual_seed(0)
    return builders.model(family, **fields)


def gathered(ranks: Ranks, family: str, dtype: str, gather: str) -> Any:
    model = _model(family, dtype=getattr(torch, dtype))
    inputs = _inputs()
    want = model.compress(**inputs, training=False)
    got = compress(model, **inputs, ranks=ranks, gather=gather)
    return None if got is None else _difference(got, want)


def exact(ranks: Ranks) -> Any:
    """Micro-batches of one chunk: every matrix product has the same shape in both."""
    model = _model(micro_batch_tokens=32)
    context = builders.ids(1, 32 * 11)
    told: list[int] = []
    got = compress(model, context, ranks=ranks, gather="all", progress=told.append)
    assert got is not None
    return [_difference(got, model.compress(context)), told[-1] - context.numel(), told == sorted(told)]


def more_processes_than_chunks(ranks: Ranks) -> Any:
    model = _model()
    context = builders.ids(1, 20)
    sharded = compress(model, context, ranks=ranks, gather="none")
    assert isinstance(sharded, ShardedMemory)
    whole = sharded.gather()
    assert whole is not None
    want = model.compress(context)
    text = builders.ids(1, 9)
    with torch.no_grad():
        error = (model(text, memory=sharded).logits - model(text, memory=want).logits).abs().max().item()
    return [_difference(whole, want), sharded.num_slots, error]


def logits(ranks: Ranks, family: str, dtype: str) -> Any:
    """Largest error of logits over a sharded memory, and over the whole one, against float64."""
    model = _model(family, dtype=getattr(torch, dtype))
    inputs, text = _inputs(), builders.ids(3, 9)
    mask = torch.ones_like(text)
    mask[0, :4] = 0
    exactly = _model(family).double()
    with torch.no_grad():
        oracle = exactly(text, mask, memory=exactly.compress(**inputs)).logits
        sharded = compress(model, **inputs, ranks=ranks, gather="none")
        assert isinstance(sharded, ShardedMemory) and sharded.processes == ranks.size
        whole = model.compress(**inputs)
        got, want = (model(text, mask, memory=memory).logits for memory in (sharded, whole))
    ranks.expect_same("logits", {"logits": got})
    used = mask.bool()
    # one has no context
    used[1] = False
    return [(one.double() - oracle)[used].abs().max().item() for one in (got, want)]


def tokens(ranks: Ranks, family: str, **settings: Any) -> Any:
    model, inputs, text = _model(family), _inputs(), builders.ids(3, 6)
    settings = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, **settings}
    sharded, whole = compress(model, **inputs, ranks=ranks, gather="none"), model.compress(**inputs)
    torch.manual_seed(3)
    want = model.generate(text, memory=whole, **settings)
    # each process has another random state; the first one's counts
    torch.manual_seed(3 + ranks.rank)
    got = model.generate(text, memory=sharded, **settings)
    ranks.expect_same("tokens", {"tokens": got})
    return [torch.equal(got, want), len(set(got[:, 6:].flatten().tolist()))]


def tokens_where_steps_could_run(ranks: Ranks) -> Any:
    """With the cache of decoding steps, which the sharded memory keeps from running."""
    support.RUN_ON_CPU = True
    try:
        return tokens(ranks, "llama", do_sample=False)
    finally:
        support.RUN_ON_CPU = False


def follow_up(ranks: Ranks) -> Any:
    """A second question over the cache of a first, which has the sharded memory with it."""
    model, inputs, text = _model(), _inputs(), builders.ids(3, 6)
    results = []
    for memory in (compress(model, **inputs, ranks=ranks, gather="none"), model.compress(**inputs)):
        first = model.generate(
            text, memory=memory, max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True
        )
        again = torch.cat([first.sequences, text], 1)
        results.append(
            model.generate(
                again, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False, eos_token_id=None
            )
        )
    return torch.equal(*results)


def rows_of_several(ranks: Ranks) -> Any:
    """Rows that read several documents, of which a process may hold no slots."""
    model, inputs, rows = _model(), _inputs(), [[0, 2], [1], [2, 1, 0]]
    sharded = compress(model, **inputs, ranks=ranks, gather="none")
    assert isinstance(sharded, ShardedMemory)
    sharded, whole = sharded.with_rows(rows), model.compress(**inputs).with_rows(rows)
    assert isinstance(sharded, ShardedMemory)
    text = builders.ids(3, 6)
    with torch.no_grad():
        error = (model(text, memory=sharded).logits - model(text, memory=whole).logits).abs().max().item()
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    got, want = (model.generate(text, memory=memory, **settings) for memory in (sharded, whole))
    gathered = sharded.gather()
    assert gathered is not None and gathered.memory_index == whole.memory_index
    return [error, torch.equal(got, want)]


def clocks(ranks: Ranks) -> Any:
    """A criterion that only the first process's clock fulfils, and one that only another's does."""
    model, text = _model(), builders.ids(1, 6)
    sharded = compress(model, builders.ids(1, 100), ranks=ranks, gather="none")
    found = []
    for stopped in (0, 1):
        criterion = MaxTimeCriteria(0.0 if ranks.rank == stopped else 1e6)
        result = model.generate(
            text, memory=sharded, max_new_tokens=5, do_sample=False, eos_token_id=None, stopping_criteria=[criterion]
        )
        found.append(result.shape[1] - 6)
    return found


def other_scores(ranks: Ranks) -> Any:
    """A processor that makes the others choose another token: the first process's choice counts."""
    model, text = _model(), builders.ids(1, 6)
    sharded = compress(model, builders.ids(1, 100), ranks=ranks, gather="none")
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    want = model.generate(text, memory=sharded, **settings)

    def change(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores if ranks.rank == 0 else -scores

    got = model.generate(text, memory=sharded, logits_processor=[change], **settings)
    return torch.equal(got, want)


def saved(ranks: Ranks, folder: str) -> Any:
    model, inputs = _model(), _inputs()
    sharded = compress(model, **inputs, ranks=ranks, gather="none")
    assert sharded is not None
    path = Path(folder) / f"of {ranks.size}.safetensors"
    sharded.save(path)
    found = [_difference(ContextMemory.load(path, model), model.compress(**inputs), tails=False)]
    try:
        sharded.save(Path(folder) / "missing" / "x.safetensors")
    except (OSError, RuntimeError, ValueError) as error:
        found.append(f"{type(error).__name__}: {error}")  # type: ignore[arg-type]
    return found


def refusals(ranks: Ranks) -> dict[str, str]:
    """Texts of what is refused; every process refuses it, and they go on together."""
    model, text = _model(), builders.ids(1, 6)
    context = builders.ids(1, 100)
    sharded = compress(model, context, ranks=ranks, gather="none")
    assert isinstance(sharded, ShardedMemory)
    greedy: dict[str, Any] = {"memory": sharded, "max_new_tokens": 2, "do_sample": False}
    own = context if ranks.rank == 0 else context + 1
    other = _model()
    if ranks.rank:
        with torch.no_grad():
            other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    cases: dict[str, Callable[[], Any]] = {
        "gather": lambda: compress(model, context, ranks=ranks, gather="some"),
        "to": lambda: sharded.gather(to=ranks.size),
        "context_ids": lambda: compress(model, own, ranks=ranks),
        "vocabulary": lambda: compress(model, context + builders.VOCABULARY, ranks=ranks),
        "query": lambda: compress(model, context, query_ids=builders.ids(2, 3), ranks=ranks),
        "model": lambda: compress(other, context, ranks=ranks),
        "input_ids of forward": lambda: model(text + min(ranks.rank, 1), memory=sharded),
        "input_ids of generate": lambda: model.generate(text + min(ranks.rank, 1), **greedy),
        "gradients": lambda: model(text, memory=sharded),
        "append": lambda: model.append(sharded, text),
        "max_time": lambda: model.generate(text, max_time=5.0, **greedy),
        "assistant_model": lambda: model.generate(text, assistant_model=_model(), **greedy),
        "positional": lambda: model.generate(text, None, [], **greedy),
    }
    found = {}
    for name, case in cases.items():
        try:
            case()
            found[name] = "nothing"
        except (ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    support.RUN_ON_CPU = True
    try:
        found["obstacle"] = str(decoding_obstacle(model, memory=sharded))
        assert decoding_obstacle(model, memory=sharded.gather()) is None
    finally:
        support.RUN_ON_CPU = False
    picking = _model(pick_layers=[0, 1], query_aware=False)
    try:
        picking.find_passages(text, context, memory=compress(picking, context, ranks=ranks, gather="none"))
    except ValueError as error:
        found["passages"] = str(error)
    return found


def tensor_parallel(ranks: Ranks, folder: str) -> Any:
    """Transformers' plan: the base's own work is right, and a context is refused."""
    if ranks.size > 2:
        # of the model's two key and value heads
        return None
    model, text, context = _model(), builders.ids(1, 6), builders.ids(1, 100)
    path = Path(folder) / "model"
    ranks.run("saving", lambda: model.save_pretrained(path) if ranks.rank == 0 else None)
    shared: Any = SharedLLMForCausalLM.from_pretrained(path, tp_plan="auto")
    texts = []
    with torch.no_grad():
        error = (shared(text).logits - model(text).logits).abs().max().item()
        for call in (lambda: shared(text, context_ids=context), lambda: shared(text, memory=model.compress(context))):
            try:
                call()
                texts.append("nothing")
            except (ValueError, RuntimeError) as refusal:
                texts.append(f"{type(refusal).__name__}: {refusal}")
    return [error, *texts]


def cases_of(folder: str) -> dict[str, Callable[[Ranks], Any]]:
    cases: dict[str, Callable[[Ranks], Any]] = {
        "exact": exact,
        "few chunks": more_processes_than_chunks,
        "follow-up": follow_up,
        "rows of several": rows_of_several,
        "clocks": clocks,
        "other scores": other_scores,
        "saved": lambda ranks: saved(ranks, folder),
        "refusals": refusals,
        "tensor parallel": lambda ranks: tensor_parallel(ranks, folder),
        "gathered first": lambda ranks: gathered(ranks, "llama", "float32", "first"),
        "gathered bfloat16": lambda ranks: gathered(ranks, "llama", "bfloat16", "all"),
        "greedy": lambda ranks: tokens(ranks, "llama", do_sample=False),
        "greedy beside steps": tokens_where_steps_could_run,
        "sample": lambda ranks: tokens(ranks, "llama", do_sample=True, temperature=2.0, top_k=0),
        "beams": lambda ranks: tokens(ranks, "llama", do_sample=False, num_beams=3),
        "several sequences": lambda ranks: tokens(ranks, "llama", do_sample=True, top_k=0, num_return_sequences=2),
        "logits bfloat16": lambda ranks: logits(ranks, "llama", "bfloat16"),
    }
    for family in ("llama", *builders.CONTINUOUS):
        cases[f"gathered {family}"] = lambda ranks, family=family: gathered(ranks, family, "float32", "all")
        cases[f"logits {family}"] = lambda ranks, family=family: logits(ranks, family, "float32")
    return cases


def main() -> None:
    size, folder = int(sys.argv[1]), sys.argv[2]

    def work() -> dict[str, Any]:
        found = {}
        with join("cpu", timeout=120) as ranks:
            for name, case in cases_of(folder).items():
                torch.manual_seed(1)
                found[name] = case(ranks)
        return found

    ended = start(size, work, seconds=280)
    for rank, one in enumerate(ended):
        if one.code != 0 or one.result is None:
            sys.exit(f"process {rank}: code {one.code}, {one.error}\n{one.stderr}")
    results = [one.result for one in ended]
    assert all(one is not None for one in results)
    sys.stdout.write(json.dumps({name: [one[name] for one in results] for name in results[0]}))


if __name__ == "__main__":
    main()

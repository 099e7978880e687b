"""A training step in several processes, parameters sharded by FSDP; test_sharded.py starts it.

Prints one line a run: its name and the largest relative error of a gradient against one process, or what was raised.
"""

import copy
import functools
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from sharedllm_ext import SharedLLMForCausalLM

from ..support import end_of_rank
from . import builders


def shard(model: SharedLLMForCausalLM, half: bool) -> SharedLLMForCausalLM:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else None
    fields = {"mp_policy": policy} if half else {}
    layers = [*model.model.layers, *([] if model.compressor is None else model.compressor.layers)]
    for layer in layers:
        fully_shard(layer, **fields)
    return fully_shard(model, **fields)


def gradients(*, tied: bool, reentrant: bool | None, half: bool, family: str = "llama") -> float:
    torch.manual_seed(0)
    model = builders.model(family, tie_compressor=tied).train()
    text, context = builders.ids(4, 12), builders.ids(4, 130)
    labels = text.clone()
    labels[:, :6] = -100
    whole = copy.deepcopy(model)
    whole(text, context_ids=context, labels=labels).loss.backward()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    sharded = shard(model, half)
    own = slice(dist.get_rank() * 2, dist.get_rank() * 2 + 2)
    sharded(text[own], context_ids=context[own], labels=labels[own], use_cache=False).loss.backward()
    worst = 0.0
    for (name, got), want in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        gradient = torch.zeros_like(want) if got.grad is None else got.grad.full_tensor()
        expected = torch.zeros_like(want) if want.grad is None else want.grad
        assert (got.grad is None) <= (want.grad is None or not want.grad.any()), name
        worst = max(worst, ((gradient - expected).norm() / (expected.norm() + 1e-6)).item())
    return worst


def fsdp1(*, reentrant: bool) -> float:
    torch.manual_seed(0)
    model = builders.model().train()
    text, context = builders.ids(1, 12), builders.ids(1, 130)
    want = model(text, context_ids=context).logits
    if reentrant:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    classes = {type(layer) for layer in model.model.layers}
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)
    sharded = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    got = sharded(text, context_ids=context, use_cache=False).logits
    got.sum().backward()
    return ((got - want).norm() / want.norm()).item()


def outside_of_forward(*, registered: bool) -> float:
    torch.manual_seed(0)
    model = builders.model()
    text, context = builders.ids(1, 12), builders.ids(1, 130)
    want = model.compress(context, query_ids=text)
    tokens = model.generate(text, context_ids=context, max_new_tokens=4, do_sample=False)
    picked = model.retrieve(context, query_ids=text)[0][0]
    sharded = shard(model, half=False)
    if registered:
        register_fsdp_forward_method(sharded, "compress")
        register_fsdp_forward_method(sharded, "retrieve")
        register_fsdp_forward_method(sharded, "index")
        register_fsdp_forward_method(sharded, "memory_for")
    got = sharded.compress(context, query_ids=text)
    assert torch.equal(sharded.retrieve(context, query_ids=text)[0][0], picked)
    assert torch.equal(sharded.generate(text, context_ids=context, max_new_tokens=4, do_sample=False), tokens)
    chosen = sharded.memory_for(sharded.index(context), text)
    pairs = [*zip(got.keys, want.keys, strict=True), *zip(chosen.values, want.values, strict=True)]
    return max((a - b).abs().max().item() for a, b in pairs)


RUNS: dict[str, Callable[[], float]] = {
    **{
        f"gradients tied={tied} reentrant={reentrant} half={half}": functools.partial(
            gradients, tied=tied, reentrant=reentrant, half=half
        )
        for tied in (True, False)
        for reentrant in (None, False, True)
        for half in (False, True)
    },
    **{
        f"gradients of {family}": functools.partial(gradients, tied=True, reentrant=None, half=False, family=family)
        for family in builders.LATER
    },
    "fsdp1": functools.partial(fsdp1, reentrant=False),
    "fsdp1 reentrant": functools.partial(fsdp1, reentrant=True),
    "outside": functools.partial(outside_of_forward, registered=False),
    "outside registered": functools.partial(outside_of_forward, registered=True),
}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, run in RUNS.items():
        try:
            result = f"{run():.3e}"
        except (ValueError, RuntimeError, AssertionError) as error:
            result = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if dist.get_rank() == 0:
            sys.stdout.write(f"RUN {name} = {result}\n")
            sys.stdout.flush()
    end_of_rank()


if __name__ == "__main__":
    main()

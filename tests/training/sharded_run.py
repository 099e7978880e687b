"""Trainings in several processes, one after the other; test_sharding.py starts them.

    python -m torch.distributed.run … -m tests.training.sharded_run BASE FOLDER RUNS

RUNS is a JSON list of objects: ``name`` (a folder in FOLDER), ``source`` (the folder whose checkpoint it goes on from)
and keywords of :func:`train`. Prints one line a run, a JSON object of the losses by step and of what a process holds.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.training import (
    Losses,
    Mix,
    Options,
    PromptTokens,
    Report,
    Sizes,
    Sources,
    Trained,
    Trainer,
    default_prompt,
    parse_parts,
    token_classes,
)
from sharedllm_ext.training.sharding import is_share

from ..support import end_of_rank

PASSAGES, VOCABULARY = 4, 320


def train(
    base: str,
    folder: Path,
    *,
    parts: str = "injected,upper,compressor",
    accumulate: int = 1,
    sharding: str = "ddp",
    stop: int | None = None,
    resume: bool = False,
    checkpointing: bool = False,
    bfloat16: bool = False,
) -> dict[str, Any]:
    """Train for four steps, or until a signal after ``stop`` of them."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = SharedLLMForCausalLM.from_base(
        base,
        injection_layers=2,
        chunk_size=64,
        slots_per_node=4,
        query_aware=False,
        tie_compressor=False,
        pick_layers=[0, 1],
        segment_size=8,
        segment_margin=4,
        passage_prompt=default_prompt(tokenizer),
    )
    model.pick.token_class.copy_(token_classes(tokenizer, VOCABULARY))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    prompt = PromptTokens.of(model.config, tokenizer, PASSAGES)
    text = np.random.default_rng(0).integers(1, VOCABULARY, 4000).astype(np.int32)
    sizes = Sizes(contexts=1, chunks=6, questions=3, running=24, tail=256)
    mix = Mix(Sources([text], []), tokenizer, prompt, model.config, sizes, 0)
    history: list[Report] = []

    def report(one: Report) -> None:
        history.append(one)
        if one.step + 1 == stop:
            # in the first process alone: the others learn of it after the next step
            trainer._note(signal.SIGTERM)

    # without clipping, which would hide gradients of another size
    options = Options(
        clip=1e9, steps=4, warmup=1, accumulate=accumulate, report_seconds=0.0, sharding=sharding, bfloat16=bfloat16
    )
    # shares of two dtypes beside each other
    trained = Trained(model, parse_parts(parts), 1, frozen_dtype=torch.bfloat16 if bfloat16 else None)
    folder.mkdir(exist_ok=True)
    trainer = Trainer(trained, Losses(model, prompt, PASSAGES), mix, options, folder, report=report)
    if resume:
        trainer.resume()
    code = trainer.run()
    held = [p.to_local() if is_share(p) else p for p in trainer.parameters]  # type: ignore[attr-defined]
    states = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    return {
        "code": code,
        "steps": [r.step for r in history],
        "losses": [[r.answer, r.pick, r.text] for r in history],
        "held": sum(p.numel() for p in held),
        "states": sum((s.to_local() if is_share(s) else s).numel() for s in states),  # type: ignore[operator]
        "all": sum(p.numel() for p in trainer.parameters),
    }


def main() -> None:
    base, folder, runs = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for run in runs:
        source = run.pop("source", None)
        if source is not None:
            if dist.get_rank() == 0:
                shutil.copytree(folder / source, folder / run["name"])
            dist.barrier()
        run["resume"] = source is not None
        found = train(base, folder / run.pop("name"), **run)
        if dist.get_rank() == 0:
            sys.stdout.write(f"RUN {json.dumps(found)}\n")
            sys.stdout.flush()
    end_of_rank()


if __name__ == "__main__":
    main()

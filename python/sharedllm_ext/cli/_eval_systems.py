"""The systems that ``sharedllm eval`` asks."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sharedllm_ext.cli._common import (
    _fast_on_cpu,
    checkpoint_type,
    gguf_tokenizer,
    load_model,
    load_tokenizer,
    one_line,
    quiet_transformers,
)
from sharedllm_ext.cli._output import CommandError, UsageError
from sharedllm_ext.cli._progress import Progress
from sharedllm_ext.counted import counted
from sharedllm_ext.evaluation.passage_search import EmbeddingSearch, PassageSearch, WordSearch
from sharedllm_ext.evaluation.prompts import Prompts
from sharedllm_ext.evaluation.systems import (
    FullSystem,
    MemorySystem,
    NtkSystem,
    PassagesSystem,
    PickSystem,
    System,
    WindowSystem,
    YarnSystem,
    plain_decoder,
    yarn_parameters,
)
from sharedllm_ext.model import SharedLLMForCausalLM
from sharedllm_ext.model.families import FAMILIES


def load_system_model(path: str, dtype: str, device: Any, progress: Progress) -> tuple[Any, Any, bool]:
    """Model, tokenizer, and whether it is a base checkpoint without a compressor."""
    gguf = Path(path).suffix.lower() == ".gguf"
    family = None if gguf else checkpoint_type(path)
    if not gguf and family not in FAMILIES:
        model = load_model(path, dtype, device, progress=progress)
        return model, load_tokenizer(path), False
    quiet_transformers(progress.terminal)
    try:
        with progress.bar(f"loading {path}", None, "", lines_only=True), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model = SharedLLMForCausalLM.from_base(
                path, dtype=None if dtype == "auto" else getattr(torch, dtype), injection_layers=1
            )
    except Exception as error:
        # damaged files end in errors of any kind
        raise CommandError(f"{path}: the checkpoint cannot be loaded: {one_line(error)}") from error
    if dtype == "auto" and device.type == "cpu":
        model = _fast_on_cpu(path, model)
    tokenizer = gguf_tokenizer(path) if gguf else load_tokenizer(path)
    return model.to(device).eval(), tokenizer, True


def identity_of(path: str) -> list[Any]:
    """What identifies a model: its path, and name, size and time of its files."""
    place = Path(path)
    files = sorted(file for file in place.iterdir() if file.is_file()) if place.is_dir() else [place]
    stats = [(file.name, file.stat()) for file in files if file.exists()]
    return [str(place.resolve()), *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]


def systems_of(args: argparse.Namespace, names: Sequence[str], model: Any, base: Any, prompts: Prompts) -> list[System]:
    """The systems of these names; raises :class:`UsageError` for stretched positions without a factor."""
    positions = base.config.text_config.max_position_embeddings
    factor = args.rope_factor
    if "yarn" in names and factor is None:
        if args.suite is not None:
            raise UsageError("--systems yarn: expected --rope-factor with --suite, got none")
        factor = math.ceil(max(args.lengths) / positions)
        if factor == 1:
            raise UsageError(
                "--systems yarn: expected --rope-factor, or --lengths above the model's "
                f"{counted(positions, 'position')}, got {max(args.lengths)}"
            )
    plain = plain_decoder(base) if set(names) & {"full", "window", "bm25", "embedding"} else None
    embedding: PassageSearch | None = None
    if any(name.endswith("embedding") for name in names):
        try:
            embedding = EmbeddingSearch(prompts, args.embedder, model.device)
        except Exception as error:
            # damaged files end in errors of any kind
            raise CommandError(f"--embedder: {one_line(error)}") from error
    found: list[System] = []
    for name in names:
        if name == "memory":
            found.append(MemorySystem(model, prompts))
        elif name.startswith("pick"):
            search = {"pick": None, "pick-bm25": WordSearch(prompts), "pick-embedding": embedding}[name]
            found.append(PickSystem(model, prompts, count=args.passages, search=search))
        elif name == "full":
            found.append(FullSystem(plain, prompts))
        elif name == "yarn":
            found.append(YarnSystem(plain_decoder(base, rope=yarn_parameters(base.config, factor)), prompts))
        elif name == "ntk":
            found.append(NtkSystem(plain_decoder(base, rope={}), prompts))
        elif name == "window":
            found.append(WindowSystem(plain, prompts, window=args.window, sinks=args.sinks))
        else:
            sizes = {"window": args.window, "count": args.passages, "size": args.passage_tokens}
            found.append(PassagesSystem(plain, prompts, search=embedding if name == "embedding" else None, **sizes))
    return found

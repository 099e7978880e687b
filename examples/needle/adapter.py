"""Reading the base checkpoint, and the adapter: what was trained, in one safetensors file that names its base."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from layout import Layout
from retriever import READING, Ranks, Retriever, Shape, Weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shared_words import RUNS, Run

WEIGHTS, CONFIG, SOURCE, CLASSES = "model.safetensors", "config.json", "source.json", "classes.npy"


@dataclasses.dataclass(frozen=True)
class Base:
    """The base checkpoint in a folder written by ``prepare.py``, with the classes of its tokens.

    ``source`` says where it came from; ``digest`` is the SHA-256 of its weights' file.
    """

    folder: Path
    config: dict[str, Any]
    source: dict[str, str]
    digest: str
    weights: Weights
    classes: torch.Tensor


def load_base(folder: Path, device: torch.device) -> Base:
    """Weights in bfloat16 on CUDA, in float32 on the CPU."""
    for path in (*(folder / name for name in (WEIGHTS, CONFIG, SOURCE)), folder.parent / CLASSES):
        if not path.is_file():
            raise SystemExit(f"{path} is missing: run prepare.py first")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tensors = load_file(folder / WEIGHTS)
    return Base(
        folder=folder,
        config=json.loads((folder / CONFIG).read_text()),
        source=json.loads((folder / SOURCE).read_text()),
        digest=file_digest(folder / WEIGHTS),
        classes=torch.from_numpy(np.load(folder.parent / CLASSES)),
        weights={name.removeprefix("model."): tensor.to(device, dtype) for name, tensor in tensors.items()},
    )


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_adapter(path: Path, retriever: Retriever, base: Base, training: dict[str, Any]) -> None:
    """Matrices in bfloat16, as they are computed with on CUDA; vectors in float32."""
    tensors = {
        name: (tensor.to(torch.bfloat16) if tensor.dim() > 1 else tensor.float()).contiguous()
        for name, tensor in retriever.state_dict().items()
    }
    settings = {
        "memory_layers": retriever.shape.memory_layers,
        "reading": retriever.shape.reading,
        "layout": dataclasses.asdict(retriever.layout),
        "ranks": list(retriever.ranks),
        "runs": [list(run) for run in retriever.runs],
    }
    metadata = {
        "format": "pt",
        "base": json.dumps(base.source),
        "base_sha256": base.digest,
        "settings": json.dumps(settings),
        "training": json.dumps(training),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=metadata)


def load_adapter(path: Path, base: Base) -> Retriever:
    """The retriever that an adapter and its base make.

    Raises:
        ValueError: the adapter was trained on another base.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if metadata["base_sha256"] != base.digest:
        raise ValueError(
            f"{path}: expected the base {metadata['base']} with SHA-256 {metadata['base_sha256']}, "
            f"got {json.dumps(base.source)} with {base.digest}"
        )
    settings = json.loads(metadata["settings"])
    retriever = Retriever(
        Shape.of(base.config, settings["memory_layers"], settings.get("reading", READING[0])),
        Layout(**settings["layout"]),
        base.weights,
        base.classes,
        Ranks(*settings["ranks"]),
        [Run(*run) for run in settings.get("runs", RUNS)],
    )
    retriever.load_state_dict(load_file(path))
    return retriever

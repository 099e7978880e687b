"""Write a trained adapter in the package's own format, for ``SharedLLMForCausalLM.from_adapter``.

python export.py --data data --adapter adapter.safetensors --out smollm2.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapter import load_adapter, load_base
from package_form import fields_of
from retriever import LORA_SCALE, LowRankUpdates, Retriever
from torch import Tensor

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.model.adapter import DOWN, UP, write_adapter

ABOUT = "trained by examples/needle: finds passages and answers from them"


def updates(prefix: str, part: LowRankUpdates) -> dict[str, Tensor]:
    """Low-rank updates by the names that their matrices have in the package."""
    tensors = {}
    for key in part.down:
        for i, layer in enumerate(part.layers):
            name = f"{prefix}.layers.{layer}.{key.replace('/', '.')}.weight"
            tensors[name + DOWN], tensors[name + UP] = part.down[key][i], part.up[key][i]
    return tensors


def exported(retriever: Retriever) -> dict[str, Tensor]:
    """All trained tensors; all but a few scalars in bfloat16."""
    tensors = {
        **updates("compressor", retriever.lower),
        **updates("model", retriever.upper),
        **updates("model", retriever.mlp),
    }
    blocks = retriever.injected
    for i in range(retriever.shape.memory_layers):
        name = f"model.layers.{i}.injection"
        tensors[f"{name}.norm.weight"] = blocks.norm[i]
        tensors[f"{name}.q_proj.weight{DOWN}"] = blocks.query_down[i]
        tensors[f"{name}.q_proj.weight{UP}"] = blocks.query_up[i]
        tensors[f"{name}.o_proj.weight{DOWN}"] = blocks.output_down[i]
        tensors[f"{name}.o_proj.weight{UP}"] = blocks.output_up[i]
    pick = retriever.pick
    tensors |= {f"pick.queries.{i}.weight": query for i, query in enumerate(pick.query)}
    for name in ("token_weight", "word_weight"):
        tensors[f"pick.{name}"] = torch.stack(list(getattr(pick, name)))
    for name in ("token_bias", "word_bias", "beta", "word_beta"):
        tensors[f"pick.{name}"] = getattr(pick, name)
    halved = ("weight", "token_weight", "word_weight")
    tensors = {
        name: tensor.to(torch.bfloat16 if name.split(":")[0].endswith(halved) else torch.float32)
        for name, tensor in tensors.items()
    }
    # 16 bits are enough for the classes and half the size
    tensors["pick.token_class"] = torch.from_numpy(retriever.classes.cpu().numpy().astype(np.uint16))
    return tensors


def export(path: Path, retriever: Retriever, base: Any, name: str, end_ids: Sequence[int] = ()) -> None:
    """Write the package's adapter; ``base`` is the base checkpoint as ``from_base`` takes it.

    ``end_ids`` are tokens that end an answer, where training had others than the base.
    """
    model = SharedLLMForCausalLM.from_base(base, answer_end_ids=list(end_ids) or None, **fields_of(retriever))
    write_adapter(path, model, exported(retriever), base=name, scale=LORA_SCALE, about=ABOUT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder written by prepare.py")
    parser.add_argument("--adapter", type=Path, required=True, help="file written by train.py")
    parser.add_argument("--out", type=Path, required=True, help="the package's adapter")
    parser.add_argument(
        "--end-ids", type=int, nargs="*", default=[], help="tokens that end an answer, where training had other ones"
    )
    arguments = parser.parse_args()
    base = load_base(arguments.data / "base", torch.device("cpu"))
    retriever = load_adapter(arguments.adapter, base)
    name = f"SmolLM2-135M-Instruct ({base.source['package']}, {base.source['file']})"
    export(arguments.out, retriever, base.folder, name, arguments.end_ids)
    print(f"wrote {arguments.out}, {arguments.out.stat().st_size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()

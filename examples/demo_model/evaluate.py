"""Perplexity of the same running text with growing context, on packages that training never saw.

    python evaluate.py --data work/data --model work/everything --out work/results/everything.json

A point is 2048 running tokens of a held-out package. Its context is the text right before them in the same package:
the longest context is 131072 tokens, the shorter ones are its last tokens, so every length scores the same tokens.
Intervals: 95%, paired bootstrap over points.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import Document, load_documents, machine, pick_device, synchronize
from files import log, read_json, write_json
from torch import Tensor
from transformers import AutoModelForCausalLM

RESAMPLES = 10_000


@dataclass(frozen=True)
class Point:
    """Running text ``tokens[start : start + window]`` of a document."""

    document: int
    start: int


def choose_points(sizes: list[int], window: int, context: int, count: int) -> list[Point]:
    """Evenly spaced points, as many from each document as it can give up to an equal share, running texts disjoint."""
    room = [max(0, (size - context) // window) for size in sizes]
    share = [0] * len(sizes)
    while sum(share) < min(count, sum(room)):
        open_documents = [i for i in range(len(sizes)) if share[i] < room[i]]
        for i in open_documents[: count - sum(share)]:
            share[i] += 1
    points = []
    for i, taken in enumerate(share):
        if taken:
            spaced = (
                np.linspace(context, sizes[i] - window, taken) if taken > 1 else [(context + sizes[i] - window) / 2]
            )
            points += [Point(i, int(start)) for start in spaced]
    return points


def pool_small(documents: list[Document], needed: int) -> list[Document]:
    """Join the packages that are too short for one point into one stream, so that they are not lost."""
    large = [d for d in documents if len(d) >= needed]
    small = [d for d in documents if len(d) < needed]
    if sum(map(len, small)) >= needed:
        name = "+".join(d.name for d in small)
        large.append(Document(name, np.concatenate([d.tokens for d in small])))
    return large


@torch.no_grad()
def score(model: Any, running: Tensor, context: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``[B]`` float64 mean loss of tokens 1 .. window-1 of each running text, given ``context [B, n]``."""
    device = running.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.float32 and device.type == "cuda"):
        if context is None:
            logits = model(input_ids=running, use_cache=False).logits
        else:
            logits = model(input_ids=running, memory=model.compress(context), use_cache=False).logits
    losses = [
        F.cross_entropy(row[:-1].float(), target[1:], reduction="none").double().mean()
        for row, target in zip(logits, running, strict=True)
    ]
    return torch.stack(losses)


def bootstrap(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of ``values`` under resampling of its entries."""
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [values[generator.integers(0, len(values), (1000, len(values)))].mean(1) for _ in range(RESAMPLES // 1000)]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def compare(losses: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """Relative change of perplexity against ``baseline`` on the same points, with its paired interval, in percent."""
    difference = losses - baseline
    low, high = bootstrap(difference)
    return {
        "percent": 100 * math.expm1(float(difference.mean())),
        "low": 100 * math.expm1(low),
        "high": 100 * math.expm1(high),
        "points_better": int((difference < 0).sum()),
    }


def summarise(losses: dict[int, np.ndarray], reference: np.ndarray | None) -> list[dict[str, Any]]:
    """One row for each context length."""
    shortest = min((length for length in losses if length), default=0)
    rows = []
    for length, values in losses.items():
        low, high = bootstrap(values)
        row: dict[str, Any] = {
            "context": length,
            "perplexity": math.exp(float(values.mean())),
            "low": math.exp(low),
            "high": math.exp(high),
        }
        if length and 0 in losses:
            row["against_window_only"] = compare(values, losses[0])
        if length > shortest:
            row["against_shortest_context"] = compare(values, losses[shortest])
        if reference is not None:
            row["against_base"] = compare(values, reference)
        rows.append(row)
    return rows


def _interval(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return "-"
    change = row[key]
    return f"{change['percent']:+.2f}% [{change['low']:+.2f}, {change['high']:+.2f}]"


def markdown(result: dict[str, Any]) -> str:
    rows = result["rows"]
    shortest = min((row["context"] for row in rows if row["context"]), default=0)
    header = ["context tokens", "perplexity [95%]", "against window only", f"against {shortest} tokens"]
    keys = ["against_window_only", "against_shortest_context"]
    if any("against_base" in row for row in rows):
        header.append("against the base model's window")
        keys.append("against_base")
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for row in rows:
        cells = [f"{row['context']}", f"{row['perplexity']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"]
        lines.append("| " + " | ".join(cells + [_interval(row, key) for key in keys]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder written by prepare_data.py")
    parser.add_argument("--model", type=Path, required=True, help="SharedLLM or base checkpoint (base: window only)")
    parser.add_argument("--out", type=Path, required=True, help="JSON result; the table goes beside it as .md")
    parser.add_argument("--base-result", type=Path, help="JSON result of the base model, to compare with")
    parser.add_argument("--lengths", default="0,8192,16384,32768,65536,131072", help="context tokens")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--points", type=int, default=192)
    parser.add_argument("--batch-tokens", type=int, help="tokens in one batch (default 262144 on a GPU, else 16384)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--device")
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    batch_tokens = args.batch_tokens or (262144 if device.type == "cuda" else 16384)
    lengths = sorted({int(length) for length in args.lengths.split(",")})
    if lengths[0] < 0:
        parser.error(f"--lengths must not be negative, got {lengths[0]}")

    documents = pool_small(load_documents(args.data, "heldout"), args.window + lengths[-1])
    points = choose_points([len(d) for d in documents], args.window, lengths[-1], args.points)
    if not points:
        raise SystemExit(f"no held-out text of {args.window + lengths[-1]} tokens: use shorter --lengths")
    if len(points) < args.points:
        log(f"the held-out text has room for {len(points)} points, {args.points} wanted")

    if _is_shared(args.model):
        import sharedllm_ext  # noqa: F401  registers the model type
    else:
        lengths = [0]
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    model.to(device).eval()
    if hasattr(model.config, "micro_batch_tokens"):
        # one pass over each batch's context: this model's activations are small
        model.config.micro_batch_tokens = batch_tokens
    log(f"{args.model}: {len(points)} points of {len(documents)} held-out documents, {dtype}, {device}")

    losses: dict[int, np.ndarray] = {}
    seconds: dict[int, float] = {}
    for length in lengths:
        synchronize(device)
        begin = time.monotonic()
        # the window's logits are the largest tensor where there is little context
        batch = max(1, batch_tokens // (length + 8 * args.window))
        parts = []
        for first in range(0, len(points), batch):
            chosen = points[first : first + batch]
            texts = [documents[p.document].tokens[p.start - length : p.start + args.window] for p in chosen]
            tokens = torch.from_numpy(np.stack(texts).astype(np.int64)).to(device)
            parts.append(score(model, tokens[:, length:], tokens[:, :length] if length else None, dtype))
        losses[length] = torch.cat(parts).cpu().numpy()
        seconds[length] = time.monotonic() - begin
        log(f"context {length}: perplexity {math.exp(losses[length].mean()):.4f} in {seconds[length]:.1f} s")

    reference = None
    if args.base_result:
        base = read_json(args.base_result)
        if base["points"] != [[documents[p.document].name, p.start] for p in points]:
            raise SystemExit(f"{args.base_result} was measured on other points: evaluate the base model again")
        reference = np.array(base["losses"]["0"])
    result: dict[str, Any] = {
        "model": args.model.name,
        "window": args.window,
        "scored_tokens": args.window - 1,
        "dtype": str(dtype).removeprefix("torch."),
        "machine": machine(device),
        "documents": {d.name: sum(p.document == i for p in points) for i, d in enumerate(documents)},
        "rows": summarise(losses, reference),
        "by_document": {
            document.name: {
                str(length): math.exp(float(values[[p.document == i for p in points]].mean()))
                for length, values in losses.items()
            }
            for i, document in enumerate(documents)
            if any(p.document == i for p in points)
        },
        "seconds": {str(length): value for length, value in seconds.items()},
        "points": [[documents[p.document].name, p.start] for p in points],
        "losses": {str(length): values.tolist() for length, values in losses.items()},
    }
    write_json(args.out, result)
    table = markdown(result)
    args.out.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    print(table)


def _is_shared(path: Path) -> bool:
    if not (path / "config.json").is_file():
        raise SystemExit(f"{path} is not a checkpoint: config.json is missing")
    return read_json(path / "config.json").get("model_type") == "sharedllm"


if __name__ == "__main__":
    main()

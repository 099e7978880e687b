"""What the demo scripts share: token arrays, sampling, learning-rate schedule, machine description."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from files import read_json
from torch import Tensor


@dataclass(frozen=True)
class Document:
    """The tokens of one package: its files in path order, each under a ``# path`` line."""

    name: str
    tokens: np.ndarray

    def __len__(self) -> int:
        return int(self.tokens.shape[0])


def load_documents(data: Path, split: str) -> list[Document]:
    """Token arrays of one split (``train`` or ``heldout``), in the order of ``packages.json``."""
    listing = data / "packages.json"
    if not listing.is_file():
        raise SystemExit(f"{listing} is missing: run prepare_data.py first")
    rows = [row for row in read_json(listing)["packages"] if row["split"] == split]
    documents = [Document(row["name"], np.load(data / "tokens" / f"{row['name']}.npy")) for row in rows]
    if not documents:
        raise SystemExit(f"{listing} lists no package in split {split!r}: this machine has too few Python packages")
    return documents


class Windows:
    """Random windows of training text that never cross a package boundary; all tokens stay on ``device``."""

    def __init__(self, documents: list[Document], length: int, device: torch.device, seed: int) -> None:
        usable = [d for d in documents if len(d) >= length]
        if not usable:
            longest = max(len(d) for d in documents)
            raise SystemExit(f"no package has {length} tokens: the longest has {longest}")
        self.length = length
        # int32, because CUDA has no gather for uint16
        self.stream = torch.from_numpy(np.concatenate([d.tokens for d in usable]).astype(np.int32)).to(device)
        starts = torch.tensor([len(d) - length + 1 for d in usable], device=device)
        self.last = torch.cumsum(starts, 0)
        self.shift = torch.arange(len(usable), device=device) * (length - 1)
        self.total = int(self.last[-1])
        self.offsets = torch.arange(length, device=device)
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def sample(self, batch: int) -> Tensor:
        """``[batch, length]`` int64, every possible start equally likely."""
        start = torch.randint(self.total, (batch,), generator=self.generator, device=self.stream.device)
        # each earlier package has length - 1 positions that cannot start a window
        first = start + self.shift[torch.searchsorted(self.last, start, right=True)]
        return self.stream[first[:, None] + self.offsets].long()


def evenly_spaced_windows(documents: list[Document], length: int, count: int) -> np.ndarray:
    """``[about count, length]`` windows spread over the documents, the same on every run."""
    per_document = max(1, -(-count // len(documents)))
    rows = []
    for document in documents:
        slots = min(per_document, len(document) // length)
        for start in np.linspace(0, len(document) - length, slots).astype(np.int64) if slots else []:
            rows.append(document.tokens[start : start + length].astype(np.int64))
    if not rows:
        raise SystemExit(f"no held-out package has {length} tokens")
    return np.stack(rows)


def learning_rate_factor(progress: float, warmup: float = 0.04, floor: float = 0.02) -> float:
    """Linear warm-up, then half a cosine down to ``floor``; ``progress`` is the fraction of the time budget used."""
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    decay = min((progress - warmup) / (1 - warmup), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * decay))


def pick_device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> dict[str, str]:
    """What a result was measured on."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def save_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files into a checkpoint folder."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())

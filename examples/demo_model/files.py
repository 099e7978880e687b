"""What the demo scripts share without torch: special tokens, logging, JSON files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

EOS = "<|endoftext|>"
PAD = "<|pad|>"
_START = time.monotonic()


def log(message: str) -> None:
    """Print one line with the seconds since the script started."""
    print(f"[{time.monotonic() - _START:7.1f}s] {message}", flush=True)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

"""Copy the better of the trained models to the output folder, if it fits the size limit.

python pick_model.py --work work --out work/model
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path

from files import log, read_json, write_json

MODELS = ("injected+upper-attention", "everything")
# what belongs to the shipped model; training.json stays behind with the results
SUFFIXES = {".json", ".safetensors", ".jinja"}
LIMIT = 16 * 2**20


def quality(result: dict[str, object]) -> float:
    """Mean log-perplexity over all context lengths above 0; lower is better."""
    rows = result["rows"]
    assert isinstance(rows, list)
    values = [math.log(row["perplexity"]) for row in rows if row["context"]]
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints and of results/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the chosen model")
    args = parser.parse_args()
    scores = {}
    for name in MODELS:
        result = args.work / "results" / f"{name}.json"
        if result.is_file():
            scores[name] = quality(read_json(result))
    if not scores:
        raise SystemExit(f"{args.work / 'results'} holds no evaluation of {' or '.join(MODELS)}: run evaluate.py first")
    best = min(scores, key=lambda name: scores[name])
    files = [f for f in sorted((args.work / best).iterdir()) if f.suffix in SUFFIXES and f.name != "training.json"]
    size = sum(f.stat().st_size for f in files)
    if size > LIMIT:
        raise SystemExit(f"{best} has {size} bytes, more than the {LIMIT} that a shipped model may have")
    if args.out.exists():
        shutil.rmtree(args.out)
    args.out.mkdir(parents=True)
    for file in files:
        shutil.copy(file, args.out / file.name)
    write_json(args.work / "results" / "pick.json", {"model": best, "bytes": size, "files": [f.name for f in files]})
    log(f"{best}: {size / 2**20:.2f} MiB in {args.out}")


if __name__ == "__main__":
    main()

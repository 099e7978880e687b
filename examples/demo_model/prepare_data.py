"""Collect permissively licensed Python source from this machine, split it by package, train a tokenizer, tokenise.

    python prepare_data.py --out work/data

Nothing is downloaded. Writes ``packages.json`` (name, version, licence, bytes, tokens, split), ``tokenizer/`` and
``tokens/<package>.npy`` (uint16).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from files import EOS, PAD, log, write_json

PERMISSIVE = {
    "0bsd", "apache-2.0", "blueoak-1.0.0", "bsd-1-clause", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0",
    "cnri-python", "hpnd", "isc", "mit", "mit-0", "mit-cmu", "ncsa", "psf-2.0", "python-2.0", "python-2.0.1",
    "unlicense", "x11", "zlib",
}  # fmt: skip
PERMISSIVE_CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "Boost Software License 1.0 (BSL-1.0)": "BSL-1.0",
    "CC0 1.0 Universal (CC0 1.0) Public Domain Dedication": "CC0-1.0",
    "Historical Permission Notice and Disclaimer (HPND)": "HPND",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "MIT No Attribution License (MIT-0)": "MIT-0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
    "University of Illinois/NCSA Open Source License": "NCSA",
    "Zero-Clause BSD (0BSD)": "0BSD",
    "zlib/libpng License": "Zlib",
}
# free-text License fields, lower case with punctuation and the words "the" and "license" removed
FREE_TEXT = {
    r"mit|expat|mit x11": "MIT",
    r"(new |modified |simplified )?bsd( [023](\.0)?)?( clause)?( new)?|[023] clause( new| modified)? bsd": "BSD",
    r"bsd [23] clause( new or revised| new| revised)?|revised bsd": "BSD",
    r"apache( software)?( foundation)?( version| v)? ?(2|2 0|v2|v2 0)": "Apache-2.0",
    r"asl 2( 0)?|apache2( 0)?|apache software": "Apache-2.0",
    r"isc|iscl": "ISC",
    r"psf( 2( 0)?)?|psfl|python software foundation( version 2)?|python( 2 0)?": "PSF-2.0",
    r"zlib|zlib libpng": "Zlib",
    r"unlicense": "Unlicense",
    r"hpnd|mit cmu": "HPND",
}
COPYLEFT = re.compile(r"\b(A|L)?GPL|GNU (Affero |Lesser |Library )?General Public|\bMPL\b|Mozilla Public|\bEUPL|\bCDDL|"
                      r"proprietary|non-?commercial|\bCC[- ]BY[- ]NC", re.IGNORECASE)  # fmt: skip

# Packages kept out of training by name where the machine has them; the hash rule below adds a few more.
HELD_OUT = {
    "botorch", "dask", "django", "flask", "gpytorch", "mpmath", "networkx", "pydantic", "pyro-ppl", "seaborn",
    "sqlalchemy", "statsmodels", "sympy", "tornado", "werkzeug", "xarray",
}  # fmt: skip
# Never held out by the hash rule: the bulk of the training text, and lightning, a copy of which is pytorch-lightning.
ALWAYS_TRAIN = {
    "jax", "lightning", "numba", "numpy", "pandas", "scikit-learn", "scipy", "torch", "transformers", "triton",
}  # fmt: skip
STDLIB = "python-stdlib"

# other people's code inside a package may be under another licence
VENDORED = {"_vendor", "_vendored", "vendor", "vendored", "third_party", "thirdparty", "extern", "externals",
            "_distutils", "_bundled", "node_modules"}  # fmt: skip
STDLIB_SKIP = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}
MIN_FILE_BYTES, MAX_FILE_BYTES = 200, 400_000
# machine-written tables and packed data have few and long lines
MAX_MEAN_LINE = 150


@dataclass
class Package:
    name: str
    version: str
    licence: str
    source: str
    split: str
    files: list[tuple[str, Path]]
    texts: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(len(text.encode()) for text in self.texts)


def normalise(name: str) -> str:
    """Package name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def spdx_permissive(expression: str) -> bool:
    """Whether an SPDX expression can be satisfied with permissive licences only; unknown identifiers count as not."""
    words = re.findall(r"[()]|[^\s()]+", expression)
    position = 0

    def peek() -> str:
        return words[position].upper() if position < len(words) else ""

    def take() -> str:
        nonlocal position
        position += 1
        return words[position - 1]

    def atom() -> bool:
        if position >= len(words):
            raise ValueError("expression ends early")
        if peek() == "(":
            take()
            value = either()
            if peek() != ")":
                raise ValueError("parenthesis not closed")
            take()
            return value
        value = take().lower() in PERMISSIVE
        if peek() == "WITH":
            take()
            if position >= len(words):
                raise ValueError("WITH names no exception")
            take()
        return value

    def both() -> bool:
        value = atom()
        while peek() == "AND":
            take()
            value = atom() and value
        return value

    def either() -> bool:
        value = both()
        while peek() == "OR":
            take()
            value = both() or value
        return value

    try:
        result = either()
    except ValueError:
        return False
    return result and position == len(words)


def _free_text(text: str) -> str | None:
    words = re.sub(r"[^a-z0-9.]+", " ", text.lower()).replace(".", " ")
    words = " ".join(w for w in words.split() if w not in ("the", "license", "licence", "licensed", "under"))
    for pattern, name in FREE_TEXT.items():
        if re.fullmatch(pattern, words):
            return name
    if len(text) > 200:
        if "Permission is hereby granted, free of charge" in text:
            return "MIT"
        if "Redistribution and use in source and binary forms" in re.sub(r"\s+", " ", text):
            return "BSD"
        if "Apache License" in text and "Version 2.0" in text:
            return "Apache-2.0"
    return None


def permissive_licence(fields: Any) -> tuple[str, str] | None:
    """(licence, metadata field that says so) of a distribution, or None unless the metadata clearly says permissive.

    ``fields`` is the distribution's metadata, an email message.
    """
    expression = fields.get("License-Expression")
    if expression:
        return (expression, "License-Expression") if spdx_permissive(expression) else None
    text = (fields.get("License") or "").strip()
    if COPYLEFT.search(text):
        return None
    named = [c.split(" :: ")[-1] for c in fields.get_all("Classifier") or [] if c.startswith("License :: ")]
    named = [c for c in named if c != "OSI Approved"]
    if named:
        known = [PERMISSIVE_CLASSIFIERS.get(c) for c in named]
        return (" / ".join(sorted({k for k in known if k})), "Classifier") if all(known) else None
    if not text:
        return None
    if re.search(r"\b(AND|OR|WITH)\b", text) and len(text) < 200:
        return (text, "License") if spdx_permissive(text) else None
    found = text if text.lower() in PERMISSIVE else _free_text(text)
    return (found, "License") if found else None


def split_of(name: str, fraction: float) -> str:
    """``heldout`` for the fixed list and for a stable hash of the name below ``fraction``, else ``train``."""
    if name == STDLIB or name in HELD_OUT:
        return "heldout"
    if name in ALWAYS_TRAIN:
        return "train"
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "heldout" if draw < fraction else "train"


def stdlib_package() -> Package:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in STDLIB_SKIP | VENDORED and not f.startswith("config-"))
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder) / name
                files.append((path.relative_to(root).as_posix(), path))
    return Package(STDLIB, platform.python_version(), "PSF-2.0", "interpreter", "heldout", sorted(files))


def installed_packages(paths: list[str], fraction: float) -> tuple[list[Package], list[dict[str, str]]]:
    """Packages on ``paths`` whose metadata says permissive, and those left out with the reason."""
    packages, left_out, seen, claimed = [], [], set(), set()
    # a broken installation may have no name at all
    named = [(normalise(dist.name or ""), dist) for dist in metadata.distributions(path=paths) if dist.metadata]
    for name, dist in sorted(named, key=lambda pair: pair[0]):
        if not name or name in seen or name.startswith("sharedllm"):
            continue
        seen.add(name)
        stored: Any = dist.metadata
        decision = permissive_licence(stored)
        if decision is None:
            stated = stored.get("License-Expression") or stored.get("License") or "not stated"
            left_out.append({"name": name, "version": dist.version, "licence": stated.splitlines()[0][:120]})
            continue
        files = []
        for entry in dist.files or []:
            relative = entry.as_posix()
            if entry.suffix != ".py" or ".." in entry.parts or VENDORED & set(entry.parts) or relative in claimed:
                continue
            claimed.add(relative)
            files.append((relative, Path(str(dist.locate_file(entry)))))
        if files:
            packages.append(Package(name, dist.version, *decision, split_of(name, fraction), sorted(files)))
    return packages, left_out


def read_source(path: Path) -> tuple[str | None, str]:
    """(text, "") or (None, why the file is left out)."""
    try:
        size = path.stat().st_size
        if size < MIN_FILE_BYTES:
            return None, "short"
        if size > MAX_FILE_BYTES:
            return None, "long"
        text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return None, "unreadable"
    if len(text) / (text.count("\n") + 1) > MAX_MEAN_LINE:
        return None, "data"
    if COPYLEFT.search(text[:3000]):
        return None, "licence header"
    return text, ""


def read_package(package: Package) -> Package:
    for relative, path in package.files:
        text, reason = read_source(path)
        if text is None:
            package.dropped[reason] = package.dropped.get(reason, 0) + 1
        else:
            package.texts.append(f"# {relative}\n{text.rstrip()}\n\n")
    return package


def drop_duplicates(packages: Iterable[Package]) -> None:
    """Keep one copy of every file; held-out packages come first, so what they hold leaves the training text."""
    seen: set[bytes] = set()
    for package in sorted(packages, key=lambda p: (p.split != "heldout", p.name != STDLIB, p.name)):
        kept = []
        for text in package.texts:
            body = text.split("\n", 1)[1]
            digest = hashlib.sha256("\n".join(line.rstrip() for line in body.split("\n")).encode()).digest()
            if digest not in seen:
                seen.add(digest)
                kept.append(text)
        if len(kept) < len(package.texts):
            package.dropped["duplicate"] = len(package.texts) - len(kept)
        package.texts = kept


def tokenizer_sample(packages: list[Package], limit: int) -> Iterator[str]:
    """Training files in a stable random order, up to ``limit`` characters."""
    texts = [text for package in packages if package.split == "train" for text in package.texts]
    used = 0
    for index in np.random.default_rng(0).permutation(len(texts)):
        if used >= limit:
            return
        used += len(texts[index])
        yield texts[index]


def train_tokenizer(texts: Iterator[str], vocab_size: int, out: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)


_tokenizer = None


def _start_worker(path: str) -> None:
    global _tokenizer
    from tokenizers import Tokenizer

    _tokenizer = Tokenizer.from_file(path)


def _encode(texts: list[str]) -> np.ndarray:
    assert _tokenizer is not None
    encodings = _tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array(e.ids, dtype=np.uint16) for e in encodings])


def tokenise(packages: list[Package], tokenizer: Path, out: Path, workers: int) -> dict[str, int]:
    """Write one uint16 array for each package and return its length; the end token closes a package."""
    jobs: list[tuple[str, list[str]]] = []
    for package in packages:
        batch: list[str] = []
        size = 0
        for text in package.texts:
            batch.append(text)
            size += len(text)
            # jobs of about 1 MB keep all workers busy until the end
            if size > 1_000_000:
                jobs.append((package.name, batch))
                batch, size = [], 0
        if batch:
            jobs.append((package.name, batch))
    end = np.array([json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"][EOS]], dtype=np.uint16)
    parts: dict[str, list[np.ndarray]] = {}
    # one thread in each worker: the workers already use every core
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("spawn")
    arguments = (str(tokenizer / "tokenizer.json"),)
    with context.Pool(workers, initializer=_start_worker, initargs=arguments) as pool:
        for (name, _), ids in zip(jobs, pool.imap(_encode, (texts for _, texts in jobs)), strict=True):
            parts.setdefault(name, []).append(ids)
    out.mkdir(parents=True, exist_ok=True)
    lengths = {}
    for name, arrays in parts.items():
        ids = np.concatenate([*arrays, end])
        np.save(out / f"{name}.npy", ids)
        lengths[name] = len(ids)
    return lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the token arrays and the tokenizer")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--tokenizer", type=Path, help="use this tokenizer folder instead of training one")
    parser.add_argument("--tokenizer-bytes", type=int, default=48_000_000, help="text the tokenizer is trained on")
    parser.add_argument("--held-out-fraction", type=float, default=0.05, help="share of the other packages held out")
    parser.add_argument("--max-bytes", type=int, help="stop adding training packages at this size (for a quick trial)")
    parser.add_argument("--path", action="append", help="folder of installed packages (default: this interpreter's)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    if not 512 <= args.vocab_size <= 65536:
        parser.error(f"--vocab-size must be 512 to 65536, got {args.vocab_size}")

    packages, left_out = installed_packages(args.path or sys.path, args.held_out_fraction)
    packages.insert(0, stdlib_package())
    if args.max_bytes:
        small, budget = [], args.max_bytes
        for package in packages:
            size = sum(path.stat().st_size for _, path in package.files if path.is_file())
            if package.split == "train":
                if size > budget:
                    continue
                budget -= size
            small.append(package)
        packages = small
    log(f"{len(packages)} packages with a permissive licence, {len(left_out)} left out")
    with multiprocessing.get_context("spawn").Pool(min(args.workers, 16)) as pool:
        packages = pool.map(read_package, packages, chunksize=1)
    drop_duplicates(packages)
    packages = [p for p in packages if p.texts]
    for split in ("train", "heldout"):
        chosen = [p for p in packages if p.split == split]
        log(f"{split}: {len(chosen)} packages, {sum(p.bytes for p in chosen) / 1e6:.1f} MB")
    if not any(p.split == "train" for p in packages):
        raise SystemExit("no training text: this interpreter has no package with a permissive licence installed")

    tokenizer = args.out / "tokenizer"
    if args.tokenizer:
        tokenizer.mkdir(parents=True, exist_ok=True)
        for file in args.tokenizer.glob("*token*.json"):
            shutil.copy(file, tokenizer / file.name)
        if not (tokenizer / "tokenizer.json").is_file():
            raise SystemExit(f"{args.tokenizer} holds no tokenizer.json")
    else:
        train_tokenizer(tokenizer_sample(packages, args.tokenizer_bytes), args.vocab_size, tokenizer)
    log(f"tokenizer in {tokenizer}")

    lengths = tokenise(packages, tokenizer, args.out / "tokens", args.workers)
    rows = [
        {
            "name": p.name,
            "version": p.version,
            "licence": p.licence,
            "licence_from": p.source,
            "split": p.split,
            "files": len(p.texts),
            "bytes": p.bytes,
            "tokens": lengths[p.name],
            "files_left_out": p.dropped,
        }
        for p in packages
    ]
    totals = {
        split: {
            "packages": sum(r["split"] == split for r in rows),
            "bytes": sum(p.bytes for p in packages if p.split == split),
            "tokens": sum(lengths[p.name] for p in packages if p.split == split),
        }
        for split in ("train", "heldout")
    }
    write_json(args.out / "packages.json", {"totals": totals, "packages": rows, "left_out": left_out})
    for split, total in totals.items():
        log(f"{split}: {total['tokens'] / 1e6:.2f}M tokens, {total['bytes'] / total['tokens']:.2f} bytes a token")


if __name__ == "__main__":
    main()

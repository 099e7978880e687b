"""Reading texts and their token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sharedllm_ext.evaluation.texts import TextError, read_texts, text_files
from sharedllm_ext.evaluation.tokenising import encode, read_tokens, split_pieces

from .conftest import VOCABULARY, sentences


@pytest.mark.parametrize("text", ["", "a", "\n" * 50, "x" * 50, "one two " * 9, " y" * 30, "a\n b" * 20, "q" * 10])
@pytest.mark.parametrize("size", [1, 2, 7, 10])
def test_pieces_of_hostile_texts(text: str, size: int) -> None:
    pieces = list(split_pieces(text, size))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces)


def test_encode_takes_long_texts_in_pieces_and_stops_at_the_limit(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharedllm_ext.evaluation.tokenising.PIECES_PER_CALL", 2)
    text = sentences(4000, seed=4)
    seen: list[int] = []
    (ids,) = encode(tokenizer, [text], progress=seen.append)
    assert len(seen) > 1
    assert sum(seen) == len(text)
    assert ids.tolist() == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    cut = encode(tokenizer, [text[:1000], text[1000:], text], limit=1234)
    assert [len(part) for part in cut][:1] == [len(encode(tokenizer, [text[:1000]])[0])]
    assert sum(map(len, cut)) == 1234
    assert len(cut) == 2


def test_folder_is_read_in_order_of_the_paths(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "a.txt", "a/b/c.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}\n\n\n", encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text(" \n")
    for hidden in (".git/config", "__pycache__/m.py", "node_modules/p.js", ".hidden"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_text("not the user's text")
    texts = read_texts(tmp_path)
    assert texts.names == ["a.txt", "a/b/c.md", "a/z.py", "b.py"]
    assert texts.documents[1] == "# a/b/c.md\ntext of a/b/c.md\n\n"
    assert texts.skipped == 2
    assert len(list(text_files(tmp_path))) == 7


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "dos.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_texts(path).documents == ["one\ntwo\nthree\n"]


def test_json_lines_are_joined_by_the_end_token(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "alpha Beta", "id": 1}) + "\n\n" + json.dumps({"text": "delta 42"}) + "\n")
    texts = read_texts(path)
    assert texts.names == ["line 1", "line 3"]
    first, second = read_tokens(texts, tokenizer, VOCABULARY, join=False)
    (joined,) = read_tokens(texts, tokenizer, VOCABULARY)
    assert joined.tolist() == [*first.tolist(), tokenizer.eos_token_id, *second.tolist()]


def test_token_array(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.array([5, 0, 319], dtype=np.uint16))
    (ids,) = read_tokens(read_texts(path), None, VOCABULARY)
    assert ids.tolist() == [5, 0, 319]


def _write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\t\n", r"a\.txt: expected text, got an empty file"),
        ("a.txt", b"caf\xe9!", r"a\.txt: expected UTF-8 text, got byte 0xe9 at offset 3"),
        ("a.bin", b"ab\0c", r"a\.bin: expected text, got a binary file \(a zero byte at offset 2\)"),
        ("folder", None, r"folder: expected a folder with text files, found none"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{oops}\n',
            r"a\.jsonl line 2: expected a JSON object, got expecting property name",
        ),
        ("a.jsonl", b'{"body": "x"}\n', r"line 1: expected an object with a string \"text\", got the keys \['body'\]"),
        ("a.jsonl", b"[1, 2]\n", r"line 1: expected an object with a string \"text\", got \[1, 2\]"),
        ("a.jsonl", b'{"text": " "}\n', r"a\.jsonl: expected text, got none in any line"),
        ("a.npy", b"not numpy", r"a\.npy: expected a \.npy array of token ids"),
        ("a.npy", np.zeros((2, 2), np.int64), r"expected a 1-d array of integers, got shape \[2, 2\] of int64"),
        ("a.npy", np.zeros(3, np.float32), r"expected a 1-d array of integers, got shape \[3\] of float32"),
        ("a.npy", np.zeros(0, np.int64), r"a\.npy: expected token ids, got an empty array"),
        ("a.npy", np.array([3, -2, 400]), r"a\.npy: expected token ids from 0 to 319, got -2"),
        ("a.npy", np.array([3, 320, 1]), r"a\.npy: expected token ids from 0 to 319, got 320"),
    ],
)
def test_unreadable_texts(tmp_path: Path, tokenizer: Any, name: str, content: Any, message: str) -> None:
    path = _write(tmp_path, name, content)
    with pytest.raises(TextError, match=message):
        read_tokens(read_texts(path), tokenizer, VOCABULARY)


def test_missing_file_and_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing: no such file or folder"):
        read_texts(tmp_path / "nothing")
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(TextError, match="the model has no tokenizer; got text"):
        read_tokens(read_texts(tmp_path / "a.txt"), None, VOCABULARY)

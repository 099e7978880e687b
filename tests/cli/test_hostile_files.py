"""Files, folders and pipes that hold no plain UTF-8 text: each is read within limits or refused in one line."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sharedllm_ext.evaluation import texts as module
from sharedllm_ext.evaluation.texts import TextError, read_texts, shown

UNDECODABLE = os.fsdecode(b"caf\xe9.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"%PDF-1.7\nall ASCII\n", r"expected text, got a PDF file \(pdftotext FILE FILE.txt\)"),
        ("a.txt", b"%PDF-1.4\n%\xe2\xe3", r"got a PDF file"),
        ("a.gz", b"\x1f\x8b\x08\0", r"got a gzip file \(gunzip -c"),
        ("a.docx", b"PK\x03\x04\x14\0", r"got a zip archive or an office document \(unzip FILE, or pandoc"),
        ("a.txt", "wide".encode("utf-16"), r"got UTF-16 text \(iconv -f UTF-16 -t UTF-8"),
        ("a.txt", "wide".encode("utf-32"), r"got UTF-32 text \(iconv -f UTF-32"),
        ("a.txt", "wide text".encode("utf-16-le"), r"zero byte at offset 1\): perhaps UTF-16 \(iconv -f UTF-16LE"),
        ("a.txt", "wide text".encode("utf-16-be"), r"zero byte at offset 0\): perhaps UTF-16 \(iconv -f UTF-16BE"),
        ("a.txt", b"caf\xe9", r"got byte 0xe9 at offset 3 \(in another encoding: iconv -f LATIN1"),
        ("a.txt", b"x" * (1 << 20) + b"\xc3", r"got byte 0xc3 at offset 1048576"),
        ("a.txt", b"x" * ((1 << 20) - 1) + b"\xc3(", r"got byte 0xc3 at offset 1048575"),
        ("a.jsonl", b"[" * 200_000, r"line 1: expected a JSON object, got one nested too deeply"),
        ("a.jsonl", b'{"text": "x"}\n{"n": ' + b"9" * 5000 + b"}", r"line 2: .* got a number of too many digits"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "half \\ud83d"}', r"line 2: .* got half of a surrogate pair \(\\ud83d"),
        ("a.npy", b"\x93NUMPY\x01\0\x0a\0[[[[[[[[[[", r"expected a .npy array of token ids: "),
        ("a.npy", b"plain words", r"expected a .npy array of token ids, got another file"),
        ("a.txt", b"\x93NUMPY\x01\0", r"got a numpy array \(a file of token ids needs the ending .npy\)"),
    ],
)
def test_one_line_for_each_kind(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TextError, match=message) as caught:
        read_texts(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_token_array_that_is_a_zip_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.arange(3))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    assert zipfile.is_zipfile(tmp_path / "a.npy")
    with pytest.raises(TextError, match=r"a\.npy: expected a \.npy array of token ids, got a zip archive.*np\.savez"):
        read_texts(tmp_path / "a.npy")


def test_characters_across_blocks_and_a_byte_order_mark(tmp_path: Path) -> None:
    text = "é" * (1 << 20) + "\r\nend"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfx" + text.encode())
    seen: list[int] = []
    assert read_texts(tmp_path / "a.txt", progress=seen.append).documents == ["x" + text.replace("\r\n", "\n")]
    assert sum(seen) == (tmp_path / "a.txt").stat().st_size


@pytest.mark.skipif(sys.platform != "linux", reason="sparse file, counted reads")
def test_large_binary_is_refused_after_its_first_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "book.txt").write_text("words")
    with open(tmp_path / "disk.img", "wb") as file:
        file.truncate(4 << 30)
    blocks: list[int] = []
    original = module._read_text

    def counted(file: Any, *args: Any) -> str:
        class Counting:
            def read(self, size: int) -> bytes:
                blocks.append(size)
                return file.read(size)  # type: ignore[no-any-return]

        return original(Counting(), *args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_read_text", counted)
    texts = read_texts(tmp_path)
    assert (texts.names, texts.skipped) == (["book.txt"], 1)
    assert sum(blocks) <= 4 * module.BLOCK_BYTES


def test_folder_survives_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "secret.txt").write_text("not yours")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "b.txt").write_text("unseen")
    os.mkfifo(tmp_path / "pipe.txt")
    original_open, original_scan = open, os.scandir

    def refusing_open(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).endswith("secret.txt"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original_open(path, *args, **kwargs)

    def refusing_scan(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original_scan(path)

    monkeypatch.setattr("builtins.open", refusing_open)
    monkeypatch.setattr("os.scandir", refusing_scan)
    texts = read_texts(tmp_path)
    assert texts.names == ["a.txt"]
    assert sorted(texts.unreadable) == [
        f"{tmp_path}/gone.txt: no such file or directory",
        f"{tmp_path}/locked: permission denied",
        f"{tmp_path}/secret.txt: permission denied",
    ]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(TextError, match=r"found none \(3 that cannot be read, the first is .*: permission denied\)"):
        read_texts(tmp_path)


def test_undecodable_file_name(tmp_path: Path) -> None:
    (tmp_path / UNDECODABLE).write_text("words")
    texts = read_texts(tmp_path)
    assert texts.documents == ["# caf\\xe9.txt\nwords\n\n"]
    json.dumps(texts.names).encode()
    assert read_texts(tmp_path / UNDECODABLE).names == ["caf\\xe9.txt"]
    (tmp_path / UNDECODABLE).write_text("")
    with pytest.raises(TextError, match=r"caf\\xe9\.txt: expected text, got an empty file"):
        read_texts(tmp_path / UNDECODABLE)
    with pytest.raises(FileNotFoundError, match=r"n\\xe9: no such file or folder"):
        read_texts(os.fsdecode(b"n\xe9"))
    assert shown("naïve") == "naïve"


def test_pipe_is_read_within_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def fill(data: bytes) -> None:
        def write() -> None:
            try:
                pipe.write_bytes(data)
            except BrokenPipeError:
                return

        threading.Thread(target=write, daemon=True).start()

    fill(b"words\r\nin a pipe")
    assert read_texts(pipe).documents == ["words\nin a pipe"]
    fill(b" \n")
    with pytest.raises(TextError, match="pipe: expected text, got white space"):
        read_texts(pipe)
    fill(b"\x7fELF\0")
    with pytest.raises(TextError, match="pipe: expected text, got a program"):
        read_texts(pipe)
    monkeypatch.setattr(module, "PIPE_BYTES", 1 << 20)
    fill(b"y\n" * (1 << 20))
    with pytest.raises(TextError, match="pipe: expected at most 1 MiB from a pipe, got more"):
        read_texts(pipe)


def test_standard_input_and_process_substitution(monkeypatch: pytest.MonkeyPatch) -> None:
    def piped(data: bytes) -> int:
        read, write = os.pipe()
        os.write(write, data)
        os.close(write)
        return read

    # what the shell passes for <(…)
    read = piped(b"caf\xc3\xa9")
    assert read_texts(f"/dev/fd/{read}").documents == ["café"]
    os.close(read)
    for data, expected in ((b"caf\xc3\xa9\r\n", "café\n"), (b"", None)):
        with open(piped(data)) as source:
            monkeypatch.setattr(sys, "stdin", source)
            if expected is None:
                with pytest.raises(TextError, match=r"^-: expected text, got none"):
                    read_texts("-")
            else:
                assert read_texts("-").documents == [expected]
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(TextError, match=r"^-: expected text on standard input, got a closed one"):
        read_texts("-")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/dev/null", "/dev/null: expected text, got none"),
        ("/dev/zero", "/dev/zero: expected text, got a binary file"),
        ("/dev/urandom", "/dev/urandom: expected "),
    ],
)
def test_devices(path: str, message: str) -> None:
    with pytest.raises(TextError, match=message):
        read_texts(path)


def test_sockets_and_files_that_fail_while_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(TextError, match="expected a regular file, a folder or a pipe, got a socket"):
            read_texts("socket")
    memory = Path("/proc/self/mem")
    if memory.exists():
        # reading address 0 is an error of input and output, which does not know its file
        with pytest.raises(OSError) as caught:
            read_texts(memory)
        assert caught.value.filename == "/proc/self/mem"

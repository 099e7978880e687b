"""What kind of file it is, if not UTF-8 text, and how to convert it to text."""

from __future__ import annotations

# first bytes, the kind of file, and the command that converts such a FILE to text
_FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"%PDF-", "a PDF file", "pdftotext FILE FILE.txt"),
    (b"%!PS", "a PostScript file", "ps2ascii FILE FILE.txt"),
    (b"{\\rtf", "an RTF file", "pandoc -t plain -o FILE.txt FILE"),
    (b"\x1f\x8b", "a gzip file", "gunzip -c FILE > FILE.txt"),
    (b"BZh91AY&SY", "a bzip2 file", "bunzip2 -c FILE > FILE.txt"),
    (b"\xfd7zXZ\0", "an xz file", "xz -dc FILE > FILE.txt"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "zstd -dc FILE > FILE.txt"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x FILE"),
    (b"PK\x03\x04", "a zip archive or an office document", "unzip FILE, or pandoc -t plain -o FILE.txt FILE"),
    (b"PK\x05\x06", "an empty zip archive", ""),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old office document", "libreoffice --convert-to txt FILE"),
    (b"\xff\xfe\0\0", "UTF-32 text", "iconv -f UTF-32 -t UTF-8 FILE > FILE.txt"),
    (b"\0\0\xfe\xff", "UTF-32 text", "iconv -f UTF-32 -t UTF-8 FILE > FILE.txt"),
    (b"\xff\xfe", "UTF-16 text", "iconv -f UTF-16 -t UTF-8 FILE > FILE.txt"),
    (b"\xfe\xff", "UTF-16 text", "iconv -f UTF-16 -t UTF-8 FILE > FILE.txt"),
    (b"\x93NUMPY", "a numpy array", "a file of token ids needs the ending .npy"),
    (b"PAR1\x15", "a Parquet file", "write its text column as .jsonl"),
    (b"SQLite format 3\0", "an SQLite database", "sqlite3 FILE .dump > FILE.txt"),
    (b"\x89HDF\r\n", "an HDF5 file", ""),
    (b"\x89PNG", "an image", ""),
    (b"\xff\xd8\xff", "an image", ""),
    (b"GIF89a", "an image", ""),
    (b"\x7fELF", "a program", ""),
    (b"GGUF\x03\0", "GGUF weights", ""),
)


def binary_format(start: bytes) -> str | None:
    """The kind of a file that begins with ``start``, and how to convert it to text; ``None`` if it may be text."""
    for magic, name, hint in _FORMATS:
        if start.startswith(magic):
            return f"{name} ({hint})" if hint else name
    return None


def encoding_hint() -> str:
    """How to convert text in an encoding of one byte per character, which its bytes do not name."""
    return " (in another encoding: iconv -f LATIN1 -t UTF-8 FILE > FILE.txt)"


def zero_byte_hint(start: bytes) -> str:
    """A hint where every other byte is zero, as in UTF-16 text without a byte order mark; else nothing."""
    sample = start[:4096]
    for first, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        half = sample[first::2]
        if len(half) > 1 and half.count(0) >= 0.9 * len(half) and sample[1 - first :: 2].count(0) <= 0.1 * len(half):
            return f": perhaps UTF-16 (iconv -f {name} -t UTF-8 FILE > FILE.txt)"
    return ""

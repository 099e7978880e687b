"""A folder in parts of a given size and back again, for machines that take files in small transfers only.

    python parts.py split data parts --size 60
    python parts.py join parts data

A part may be sent and removed as soon as it is there; ``join`` wants all of them and compares every file's SHA-256.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

LIST = "files.json"
BLOCK = 1 << 20


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def part_of(parts: Path, number: int) -> Path:
    return parts / f"part-{number:03d}"


def split(folder: Path, parts: Path, size: int, left_out: Sequence[str] = ()) -> int:
    """Write all files of ``folder``, but for the names ``left_out``, end to end into parts of ``size`` bytes.

    Returns:
        How many parts there are.
    """
    if size < 1:
        raise SystemExit(f"size: expected at least one byte, got {size}")
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in names if name not in left_out]
    parts.mkdir(parents=True, exist_ok=True)
    files = [
        {"name": name, "bytes": (folder / name).stat().st_size, "sha256": digest_of(folder / name)} for name in names
    ]
    number, room = 0, size
    out = part_of(parts, number).open("wb")
    for name in names:
        with (folder / name).open("rb") as file:
            while block := file.read(min(BLOCK, room)):
                out.write(block)
                room -= len(block)
                if not room:
                    out.close()
                    number, room = number + 1, size
                    out = part_of(parts, number).open("wb")
    out.close()
    (parts / LIST).write_text(json.dumps({"parts": number + 1, "files": files}, indent=1) + "\n")
    return number + 1


def _blocks(paths: Sequence[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                yield block


def join(parts: Path, folder: Path) -> None:
    """Write the files of :func:`split` into ``folder``.

    Raises:
        SystemExit: a part is missing, or a file is not what it was.
    """
    if not (parts / LIST).is_file():
        raise SystemExit(f"{parts / LIST} is missing")
    listed = json.loads((parts / LIST).read_text())
    paths = [part_of(parts, number) for number in range(listed["parts"])]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise SystemExit(f"{parts}: expected {len(paths)} parts, got none of {', '.join(missing)}")
    blocks, held = _blocks(paths), b""
    for entry in listed["files"]:
        path, left = folder / entry["name"], entry["bytes"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            while left:
                held = held or next(blocks, b"")
                if not held:
                    break
                file.write(held[:left])
                held, left = held[left:], max(0, left - len(held))
        found = digest_of(path)
        if found != entry["sha256"]:
            raise SystemExit(f"{path}: expected SHA-256 {entry['sha256']}, got {found}: send the parts again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("split", help="a folder into parts")
    one.add_argument("folder", type=Path)
    one.add_argument("parts", type=Path)
    one.add_argument("--size", type=float, default=60.0, help="of a part, in MB")
    one.add_argument("--without", nargs="*", default=[], help="files that are left out, such as base/model.safetensors")
    other = commands.add_parser("join", help="parts into a folder")
    other.add_argument("parts", type=Path)
    other.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "split":
        count = split(arguments.folder, arguments.parts, int(arguments.size * 1e6), arguments.without)
        print(f"wrote {count} parts and {LIST}")
    else:
        join(arguments.parts, arguments.folder)


if __name__ == "__main__":
    main()

"""What the file of a memory or a conversation holds, told by its header: no key and no value is read."""

import os
from typing import Any

from ..counted import counted
from .memory import ContextMemory
from .memory_fields import open_memory
from .memory_file import CONVERSATION, MEMORY, MemoryFile, are_sizes, shorten


def describe_file(path: str | os.PathLike[str], *, verify: bool = False) -> dict[str, Any]:
    """What a file holds that a memory's or a conversation's ``save`` has written; a memory's shards lie beside it.

    As :meth:`ContextMemory.describe`, without the device, and in addition ``format``, ``version``, ``file`` (the path),
    ``file_bytes`` (with the shards) and ``shards`` (their names); of a conversation ``running_tokens``, ``window``,
    ``keep_first`` and ``tokenizer`` too.

    Args:
        path: the file.
        verify: whether to read the data too, and compare their checksums.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file or a shard is missing, truncated, damaged or of another kind.
    """
    with open_memory(path, CONVERSATION) as file:
        others = running_shape(file) if file.form is CONVERSATION else {}
        told = ContextMemory.outline(file, others).describe()
        if verify:
            file.verify(list(file.names))
        del told["device"], told["reserved_bytes"]
        shards = [shard["file"] for shard in file.header.get("shards", ())]
        report = {
            "format": file.form.name,
            "version": file.header["version"],
            "file": file.name,
            "file_bytes": file.total_size,
            "shards": shards,
            **told,
        }
        if file.form is CONVERSATION:
            report["running_tokens"] = others["running_ids"][0]
            report |= {name: file.header[name] for name in ("window", "keep_first", "tokenizer")}
        return report


def find_memory_file(folder: str | os.PathLike[str]) -> str:
    """The one memory or conversation that a folder holds, which may have shards.

    Raises:
        ValueError: there is none, or more than one.
    """
    name = os.fsdecode(folder)
    files = sorted(entry.path for entry in os.scandir(name) if entry.name.endswith(".safetensors") and entry.is_file())
    found, problems = [], []
    for path in files:
        try:
            with MemoryFile(path, MEMORY, CONVERSATION):
                found.append(path)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if len(found) == 1:
        return found[0]
    if found:
        got = f"{len(found)}: {', '.join(os.path.basename(path) for path in found[:3])}{' …' * (len(found) > 3)}"
    else:
        got = f"none in {len(files)} .safetensors files" + (f"; {problems[0]}" if problems else "")
    raise ValueError(f"{name}: expected a folder with one memory or conversation, got {got}")


def running_shape(file: MemoryFile) -> dict[str, tuple[int, ...]]:
    """The shape of a conversation's running text in its file.

    Raises:
        ValueError: the header's window and first tokens contradict it, or it has none.
    """
    window, keep_first = (file.header[name] for name in ("window", "keep_first"))
    if not are_sizes([window, keep_first]) or keep_first >= window:
        raise ValueError(
            f"{file.name}: expected a window and keep_first below it, integers of at least 0, got {window!r} and "
            f"{keep_first!r}"
        )
    digest = file.header["tokenizer"]
    if digest is not None and not isinstance(digest, str):
        raise ValueError(f"{file.name}: expected a tokenizer that is null or a text, got {shorten(digest)}")
    shape = file.shape_of("running_ids")
    if len(shape) != 1 or shape[0] > window:
        raise ValueError(
            f"{file.name}: expected running_ids of at most {counted(window, 'token')} (window), got shape {shape}"
        )
    return {"running_ids": shape}

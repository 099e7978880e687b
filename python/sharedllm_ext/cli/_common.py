"""What the commands share: errors, argument types, loading a model, progress, printing."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from sharedllm_ext.evaluation import Texts

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
DTYPES = ("auto", "float32", "bfloat16", "float16")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_EXPECTED = (ValueError, OSError, RuntimeError, TypeError, ImportError)


class CommandError(Exception):
    """The command cannot be done; the message is one line for the user."""


class UsageError(CommandError):
    """The arguments contradict each other."""


def print_error(message: str) -> None:
    """One line on stderr."""
    print(f"sharedllm: error: {message}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """The message of an exception without its line breaks; unforeseen kinds are named."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror.lower()}"
    text = " ".join(str(error).split())
    if len(text) > 400:
        text = text[:400] + " …"
    if isinstance(error, CommandError) or (text and isinstance(error, _EXPECTED)):
        return text
    return f"{type(error).__name__}: {text or 'no message'} (SHAREDLLM_DEBUG=1 shows where)"


def count(text: str) -> int:
    """A whole number of at least 0; ``8k`` is 8192 and ``1m`` 1048576."""
    match = re.fullmatch(r"(\d+)([kKmM]?)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()]


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = count(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def counts(text: str) -> list[int]:
    """Different whole numbers of at least 0, divided by commas."""
    values = [count(part) for part in text.split(",")]
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"expected different numbers, got {text!r}")
    return values


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """``--dtype``, ``--device``, ``--json``."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="default: the checkpoint's own; on a CPU float32 for float16, and for bfloat16 where the CPU has no"
        " instructions for it",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where torch has it)")
    add_json_option(parser)


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout, no progress")


def pick_device(name: str | None) -> torch.device:
    """The device to run on; raises :class:`CommandError` if it is not there."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CommandError(
            f"--device: expected cpu, because torch {torch.__version__} sees no CUDA device; got {name!r}"
        )
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise CommandError(f"--device: expected cuda:0 to cuda:{torch.cuda.device_count() - 1}, got {name!r}")
    return device


def quiet_transformers(progress: bool) -> None:
    """Keep Transformers' warnings off the terminal, and its progress bars too unless wanted."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not progress:
        logging.disable_progress_bar()


def checkpoint_type(path: str) -> str | None:
    """``model_type`` of a checkpoint folder; ``None`` for a name that only the model hub may know.

    Raises:
        CommandError: nothing there, or not a checkpoint.
    """
    folder = Path(path)
    if not folder.exists():
        if _HUB_NAME.fullmatch(path):
            return None
        raise CommandError(f"{path}: no such folder")
    if not folder.is_dir():
        raise CommandError(f"{path}: expected a checkpoint folder, got a file")
    file = folder / "config.json"
    if not file.is_file():
        raise CommandError(f"{path}: not a checkpoint (no config.json in it)")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(f"{file}: expected a JSON object: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CommandError(f"{path}: not a checkpoint (its config.json names no model_type)")
    return str(config["model_type"])


def load_model(path: str, dtype: str, device: torch.device, *, progress: bool) -> Any:
    """The SharedLLM checkpoint at ``path``, ready to run.

    Raises:
        CommandError: nothing there, not a checkpoint, another model type, or weights that cannot be read.
    """
    family = checkpoint_type(path)
    if family not in (None, "sharedllm"):
        from sharedllm_ext.model.configuration import BASE_MODEL_TYPES

        advice = f" (make one from it: sharedllm init {path} OUT)" if family in BASE_MODEL_TYPES else ""
        raise CommandError(f"{path}: expected a sharedllm checkpoint, got a {family} one{advice}")
    import torch
    from safetensors import SafetensorError

    from sharedllm_ext.model import SharedLLMForCausalLM

    quiet_transformers(progress)
    try:
        loaded: Any = SharedLLMForCausalLM.from_pretrained(
            path, dtype="auto" if dtype == "auto" else getattr(torch, dtype), output_loading_info=True
        )
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise CommandError(f"{path}: the checkpoint cannot be loaded: {one_line(error)}") from error
    model, report = loaded
    unknown = sorted(report["unexpected_keys"])
    if unknown:
        # Transformers would leave them out
        raise CommandError(
            f"{path}: the checkpoint has {len(unknown)} tensors for which its configuration has no place, the first is "
            f"{unknown[0]}"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        # Transformers would go on with random weights in their place
        raise CommandError(f"{path}: the checkpoint lacks {len(missing)} tensors, the first is {missing[0]}")
    if dtype == "auto" and device.type == "cpu":
        model = _fast_on_cpu(path, model)
    return model.to(device).eval()


def _fast_on_cpu(path: str, model: Any) -> Any:
    """The model in the dtype that this CPU computes fast; bfloat16 stays, and a line says so, where memory is short."""
    import torch

    from sharedllm_ext.cpu import available_memory, preferred_dtype

    dtype = preferred_dtype(model.dtype)
    if dtype == model.dtype:
        return model
    needed, room = model.num_parameters() * dtype.itemsize, available_memory()
    if model.dtype == torch.bfloat16 and room is not None and needed > room:
        say(
            f"sharedllm: {path}: computing in bfloat16, which this CPU has no instructions for: float32 would be many"
            f" times faster, but takes {needed / 2**30:.1f} GiB of memory, and {room / 2**30:.1f} are left"
        )
        return model
    return model.to(dtype)


def load_tokenizer(path: str) -> Any:
    """The tokenizer beside a checkpoint; raises :class:`CommandError` if there is none."""
    tokenizer = find_tokenizer(path)
    if tokenizer is None:
        raise CommandError(f"{path}: expected a tokenizer beside the model (tokenizer.json), found none")
    return tokenizer


def find_tokenizer(path: str) -> Any:
    """The tokenizer beside a checkpoint, or ``None``."""
    from transformers import AutoTokenizer

    folder = Path(path)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if folder.is_dir() and not any((folder / name).is_file() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise CommandError(f"{path}: the tokenizer cannot be loaded: {one_line(error)}") from error


class Progress:
    """A progress bar on stderr; silent where that is no terminal, and with ``--json``."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled and sys.stderr.isatty()

    @contextlib.contextmanager
    def bar(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        """Yield a function that is told how much more is done."""
        from tqdm import tqdm  # type: ignore[import-untyped]

        with tqdm(
            total=total, desc=name, unit=unit, unit_scale=True, disable=not self.enabled, file=sys.stderr, leave=False
        ) as bar:
            yield bar.update


@contextlib.contextmanager
def compression_progress(model: Any, update: Callable[[int], object], tokens: int) -> Iterator[None]:
    """Report the context tokens compressed: the compressor embeds one micro-batch after the other."""
    embedding = model.lower_model.embed_tokens
    left, begun = tokens, 0

    def tell(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal left, begun
        # a micro-batch is done when the next one begins
        done = min(begun, left)
        left -= done
        begun = int(inputs[0].numel())
        update(done)

    handle = embedding.register_forward_hook(tell)
    try:
        yield
    finally:
        handle.remove()
    update(left)


def characters(texts: Texts) -> int:
    """Length of all documents, the total of a progress bar."""
    return sum(len(document) for document in texts.documents)


def say(message: str = "") -> None:
    """One line on stderr, where everything goes that is not the result."""
    print(message, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """The one JSON document of ``--json``."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join(lines)


def mebibytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"


def seconds(value: float) -> str:
    """A time for people."""
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def writable_target(option: str, path: str, suffixes: Sequence[str] = ()) -> None:
    """Refuse a file that cannot be written before the long work, not after it."""
    target = Path(path)
    if suffixes and target.suffix.lower() not in suffixes:
        raise UsageError(f"{option}: expected a file name that ends in {' or '.join(suffixes)}, got {path!r}")
    if target.is_dir():
        raise CommandError(f"{option}: expected a file, got the folder {path}")
    if not target.absolute().parent.is_dir():
        raise CommandError(f"{option}: no such folder: {target.parent}")
    if not os.access(target if target.exists() else target.absolute().parent, os.W_OK):
        raise CommandError(f"{option}: {path} cannot be written")

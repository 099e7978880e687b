"""What the commands share: argument types, loading a model, numbers for people."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharedllm_ext.cli._base_package import ADAPTER, means_base
from sharedllm_ext.cli._output import CommandError, UsageError, say
from sharedllm_ext.counted import counted

if TYPE_CHECKING:
    import torch

    from sharedllm_ext.cli._progress import Progress
    from sharedllm_ext.evaluation import Texts

#: Context tokens compressed at a time on a CPU: as fast as more of them, and progress is told sooner.
CPU_MICRO_BATCH = 2048
#: Seconds to wait for the model hub's first answer.
HUB_SECONDS = 5.0
EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
DEMO_MODEL = Path(__file__).parent.parent / "demo_model"
#: The name by which MODEL means the shipped model.
DEMO_NAME = "demo"
DTYPES = ("auto", "float32", "bfloat16", "float16")
# "gpt2" is one as well as "somebody/some-model"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_EXPECTED = (ValueError, OSError, RuntimeError, TypeError, ImportError)


def one_line(error: BaseException) -> str:
    """The message of an exception without its line breaks; unforeseen kinds are named."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        name = str(error.filename)
        return f"{name if len(name) <= 400 else name[:400] + ' …'}: {error.strerror.lower()}"
    text = " ".join(str(error).split())
    if len(text) > 400:
        text = text[:400] + " …"
    if isinstance(error, CommandError) or (text and isinstance(error, _EXPECTED)):
        return text
    return f"{type(error).__name__}: {text or 'no message'} (SHAREDLLM_DEBUG=1 shows where)"


def some_path(text: str) -> str:
    """A path that is not empty: an unset variable in the shell must not become the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty one")
    return text


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


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def add_model_options(parser: argparse.ArgumentParser, *, json: bool = True) -> None:
    """``--dtype``, ``--device`` and, unless ``json`` is false, ``--json``."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="default: the checkpoint's own; on a CPU float32 for float16, and for bfloat16 where the CPU has no"
        " instructions for it",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where torch has it)")
    if json:
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
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    # it logs two lines for every retry
    hub_logging.set_verbosity_error()
    if not progress:
        logging.disable_progress_bar()


def import_model(progress: Progress) -> None:
    """Import the model and all that it needs, which takes seconds, under a bar."""
    with progress.bar("importing torch and Transformers", None, ""):
        import sharedllm_ext.model.registered  # noqa: F401

        quiet_transformers(progress.terminal)


def prepare_hub(name: str, file: str = "config.json") -> None:
    """Ask the model hub once whether it answers; without it, only what was fetched before is used.

    Raises:
        CommandError: no answer, and ``file`` of the model was never fetched.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import get_session

    reason = "the offline mode is on (HF_HUB_OFFLINE)"
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
            return
        except Exception as error:
            # of whichever HTTP library the hub's client uses
            reason = f"{constants.ENDPOINT} cannot be reached: {' '.join(str(error).split()) or type(error).__name__}"
        # or each file would be tried again and again
        constants.HF_HUB_OFFLINE = True
    if not isinstance(try_to_load_from_cache(name, file), str):
        raise CommandError(
            f"{name}: expected a checkpoint folder or a model of the hub, got a name that is no folder here and was "
            f"never fetched; {reason}"
        )


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
    except RecursionError:
        raise CommandError(f"{file}: expected a JSON object, got one nested too deeply") from None
    except ValueError as error:
        raise CommandError(f"{file}: expected a JSON object: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CommandError(f"{path}: not a checkpoint (its config.json names no model_type)")
    return str(config["model_type"])


def model_path(name: str) -> str:
    """The folder of MODEL: ``demo``, where no folder has that name, is the shipped model."""
    if means_base(name):
        raise CommandError(
            f"{name}: expected a model, got the package of a base checkpoint; --adapter {ADAPTER} makes a model of it "
            "for ask, chat and eval, and init and train take it as their base"
        )
    if name != DEMO_NAME or Path(name).exists():
        return name
    if not (DEMO_MODEL / "config.json").is_file():
        raise CommandError(
            f"{DEMO_MODEL}: this installation holds no demo model (the scripts in examples/demo_model train one)"
        )
    return str(DEMO_MODEL)


def load_model(path: str, dtype: str, device: torch.device, *, progress: Progress) -> Any:
    """The SharedLLM checkpoint at ``path``, ready to run.

    Raises:
        CommandError: nothing there, not a checkpoint, another model type, or weights that cannot be read.
    """
    family = checkpoint_type(path)
    if family not in (None, "sharedllm"):
        from sharedllm_ext.model.families import FAMILIES

        advice = f" (make one from it: sharedllm init {path} OUT)" if family in FAMILIES else ""
        raise CommandError(f"{path}: expected a sharedllm checkpoint, got a {family} one{advice}")
    import_model(progress)
    import torch

    from sharedllm_ext.model import SharedLLMForCausalLM

    if family is None:
        prepare_hub(path)
    try:
        with progress.bar(f"loading {path}", None, "", lines_only=True):
            loaded: Any = SharedLLMForCausalLM.from_pretrained(
                path, dtype="auto" if dtype == "auto" else getattr(torch, dtype), output_loading_info=True
            )
    except Exception as error:
        # damaged files end in errors of any kind
        raise CommandError(f"{path}: the checkpoint cannot be loaded: {one_line(error)}") from error
    model, report = loaded
    unknown = sorted(report["unexpected_keys"])
    if unknown:
        # Transformers would leave them out
        raise CommandError(
            f"{path}: the checkpoint has {counted(len(unknown), 'tensor')} for which its configuration has no place, "
            f"the first is {unknown[0]}"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        # Transformers would go on with random weights in their place
        raise CommandError(f"{path}: the checkpoint lacks {counted(len(missing), 'tensor')}, the first is {missing[0]}")
    return ready_model(path, model, dtype, device)


def ready_model(path: str, model: Any, dtype: str, device: torch.device) -> Any:
    """A loaded model on its device, in a dtype that is fast there unless ``dtype`` names one."""
    if dtype == "auto" and device.type == "cpu":
        model = _fast_on_cpu(path, model)
    if device.type == "cpu" and model.config.micro_batch_tokens is None:
        model.config.micro_batch_tokens = CPU_MICRO_BATCH
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

    # some tokenizers are found by the checkpoint's model type, which this registers
    import sharedllm_ext.model.registered  # noqa: F401

    folder = Path(path)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if folder.is_dir() and not any((folder / name).is_file() for name in names):
        return None
    try:
        # a tokenizer may name code of its own folder, which must never run, nor be asked about on stdin
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise CommandError(
                f"{path}: expected a tokenizer that Transformers knows, got one that needs code of its own folder "
                "(auto_map in tokenizer_config.json), which is never run here"
            ) from error
        # tokenizer files come in many formats, and damaged ones end in errors of any kind
        raise CommandError(f"{path}: the tokenizer cannot be loaded: {one_line(error)}") from error


def gguf_tokenizer(base: str, gguf_file: str | None = None) -> Any:
    """The tokenizer that a GGUF file holds, its chat template with it."""
    from transformers import AutoTokenizer

    from sharedllm_ext.model.gguf_checkpoint import complete_tokenizer, find_gguf, read_header

    path = find_gguf(base, gguf_file)
    assert path is not None  # the model was read from it
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=str(path), trust_remote_code=False)
        complete_tokenizer(tokenizer, read_header(path))
        return tokenizer
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise CommandError(f"{path}: the tokenizer cannot be loaded: {one_line(error)}") from error


def characters(texts: Texts) -> int:
    """Length of all documents, the total of a progress bar."""
    return sum(len(document) for document in texts.documents)


def say_left_out(begin: str, skipped: int, unreadable: Sequence[str]) -> None:
    """Say how many files of a folder are no text, and how many could not be read, if there are any.

    ``begin`` begins the line.
    """
    if skipped:
        say(f"{begin} left out {counted(skipped, 'file')} of other kinds than text")
    if unreadable:
        say(f"{begin} left out {counted(len(unreadable), 'file')} that cannot be read, the first is {unreadable[0]}")


def warn_if_silent(model: Any, path: str) -> None:
    """Warn if no injected block can add anything: such a model answers as if there were no context."""
    from sharedllm_ext.model.reading import can_read_context

    if not can_read_context(model):
        # the model would warn a second time
        model._said_it_cannot_read = True
        say(
            f"sharedllm: warning: {path}: every injected output projection is zero, so the context changes nothing: "
            "this model was never trained (sharedllm init makes such models)"
        )


def mebibytes(size: int) -> str:
    """Bytes for people, in at most nine characters below 100 GiB."""
    return f"{size / 2**20:,.1f} MiB" if size < 999.95 * 2**20 else f"{size / 2**30:,.2f} GiB"


def seconds(value: float) -> str:
    """A time for people."""
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def writable_target(option: str, path: str, suffixes: Sequence[str] = (), keep: Sequence[str] = ()) -> None:
    """Refuse a file that cannot be written before the long work, not after it; nor may it be one of ``keep``."""
    target = Path(path)
    if suffixes and target.suffix.lower() not in suffixes:
        raise UsageError(f"{option}: expected a file name that ends in {' or '.join(suffixes)}, got {path!r}")
    if target.is_dir():
        raise CommandError(f"{option}: expected a file, got the folder {path}")
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        raise CommandError(f"{option}: expected a regular file, got {path}, which is a pipe or a device")
    for other in map(Path, keep):
        used = (other, *other.iterdir()) if other.is_dir() else (other,)
        if target.exists() and any(file.exists() and target.samefile(file) for file in used):
            raise UsageError(f"{option}: expected another file than those that are read, got {path}")
    folder = target.resolve().parent
    if not folder.is_dir():
        raise CommandError(f"{option}: no such folder: {target.parent}")
    if not os.access(target if target.exists() else folder, os.W_OK):
        raise CommandError(f"{option}: {path} cannot be written")

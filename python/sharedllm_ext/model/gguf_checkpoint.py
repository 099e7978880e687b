"""GGUF files as base checkpoints: where they are, and what Transformers leaves out when it reads one."""

from __future__ import annotations

import functools
import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from ..counted import counted
from .families import FAMILIES, check_gguf_family

_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)/(.+\.gguf)", re.IGNORECASE)
# ggml's names of the types that hold plain numbers
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufHeader(NamedTuple):
    """Metadata of a GGUF file.

    Attributes:
        path: the file.
        values: its metadata, without the vocabulary.
        types: ggml type of each tensor by its name.
        rope_factors: divisors of the rotary frequencies, ``[R/2]``, or ``None``.
    """

    path: Path
    values: dict[str, Any]
    types: dict[str, str]
    rope_factors: torch.Tensor | None

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model family."""
        return str(self.values.get("general.architecture"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the weights are stored in; float32, which holds their values exactly, for quantised ones."""
        kinds = set(self.types.values())
        if not kinds <= set(_FLOATS):
            return torch.float32
        # norms are float32 in files of half precision too
        return next((_FLOATS[kind] for kind in ("BF16", "F16") if kind in kinds), torch.float32)

    def of(self, key: str) -> Any:
        """A value of the architecture's own, or ``None``."""
        return self.values.get(f"{self.architecture}.{key}")


def find_gguf(
    base: str | os.PathLike[str], gguf_file: str | None, revision: str | None = None, token: str | bool | None = None
) -> Path | None:
    """The local path of the GGUF file meant, downloaded if it lies on the hub; ``None`` if none is meant.

    Raises:
        OSError: no such file.
    """
    base = os.fspath(base)
    if gguf_file is None:
        if not base.lower().endswith(".gguf"):
            return None
        if Path(base).is_file():
            return Path(base).absolute()
        hub = None if Path(base).is_absolute() or Path(base).parent.exists() else _HUB_FILE.fullmatch(base)
        if hub is None:
            raise FileNotFoundError(f"base: expected a GGUF file, got no such file: {base}")
        base, gguf_file = hub[1], hub[2]
    folder = Path(base)
    if folder.is_dir():
        path = folder / gguf_file
        if not path.is_file():
            there = ", ".join(sorted(file.name for file in folder.glob("*.gguf"))) or "none"
            raise FileNotFoundError(f"gguf_file: expected one of the GGUF files in {base} ({there}), got {gguf_file!r}")
        return path.absolute()
    if folder.is_file():
        raise FileNotFoundError(f"base: expected the folder or hub name that holds {gguf_file}, got the file {base}")
    found = cached_file(base, gguf_file, revision=revision, token=token)
    assert found is not None  # cached_file raises otherwise
    return Path(found)


def read_header(path: Path) -> GgufHeader:
    """Metadata of a GGUF file of a supported family.

    Raises:
        ImportError: the ``gguf`` or ``accelerate`` package, by which Transformers reads the file, is missing.
        ValueError: damaged, one part of several, or of another family.
    """
    state = path.stat() if path.is_file() else None
    return _read_header(path, None if state is None else (state.st_ino, state.st_size, state.st_mtime_ns))


# a large vocabulary takes seconds to read, and model and tokenizer both ask
@functools.lru_cache(maxsize=4)
def _read_header(path: Path, state: tuple[int, int, int] | None) -> GgufHeader:
    """The metadata of a file in a state, by which a changed one is known."""
    try:
        import accelerate  # noqa: F401
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(
            f"{path.name}: expected the packages gguf and accelerate, by which Transformers reads GGUF files "
            f"(pip install gguf accelerate), got none of the name {error.name!r}"
        ) from None
    try:
        reader = GGUFReader(str(path))
        values = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.ggml.") or name == "tokenizer.ggml.model" or name.endswith("_token_id")
        }
        types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        factors = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: expected a GGUF file, got one that cannot be read: {error}") from error
    header = GgufHeader(path, values, types, None if factors is None else torch.tensor(factors, dtype=torch.float32))
    if (values.get("split.count") or 1) > 1:
        raise ValueError(
            f"{path}: expected a whole GGUF file, got one of {counted(values['split.count'], 'part')} "
            "(llama-gguf-split --merge joins them)"
        )
    check_gguf_family(str(path), header.architecture)
    return header


def complete_config(config: PreTrainedConfig, header: GgufHeader) -> None:
    """Add to Transformers' configuration what the file says and Transformers does not read.

    That is the size of a head, biases of Llama's layers, rotary frequencies scaled linearly, by YaRN or by factors
    (Llama 3.1), and a sliding window. Warns of a Mistral file, which names no window.

    Raises:
        ValueError: a rotary scaling that Transformers has no name for.
    """
    settings: Any = config
    head = header.of("attention.key_length")
    if head is not None:
        settings.head_dim = int(head)
    if "blk.0.attn_q.bias" in header.types and hasattr(settings, "attention_bias"):
        settings.attention_bias = True
    if hasattr(settings, "mlp_bias") and "blk.0.ffn_gate.bias" in header.types:
        settings.mlp_bias = True
    settings.rope_parameters = _rope_parameters(dict(settings.rope_parameters), header, settings)
    window = header.of("attention.sliding_window")
    name = str(header.values.get("general.name", "")) + str(header.values.get("general.basename", ""))
    takes_window = FAMILIES[settings.model_type].gguf_window
    if takes_window:
        # Transformers puts its own default there, which most Mistral models do not have
        settings.sliding_window = int(window) if window else None
    if window is None and (takes_window or "mistral" in name.lower()):
        warnings.warn(
            f"{header.path.name}: a Mistral GGUF file names no sliding window, so every layer sees all running text; "
            "Mistral 7B v0.1 looks back on 4096 tokens only: keep `window` and what is generated within them there",
            stacklevel=2,
        )
    elif window and not takes_window:
        raise ValueError(
            f"{header.path}: expected a {settings.model_type} file without a sliding window, which Transformers "
            f"would lose, got one of {counted(window, 'token')}; load the original checkpoint instead"
        )


def complete_tokenizer(tokenizer: Any, header: GgufHeader) -> None:
    """Give a tokenizer the special tokens that the file names; Transformers 5.17 takes the first for the last one."""
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = header.values.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(int(index)))


def _rope_parameters(parameters: dict[str, Any], header: GgufHeader, config: Any) -> dict[str, Any]:
    kind, factor = header.of("rope.scaling.type"), header.of("rope.scaling.factor")
    original = header.of("rope.scaling.original_context_length")
    if header.rope_factors is not None:
        return {**parameters, **_by_factors(header.rope_factors, parameters["rope_theta"], config)}
    # older files state the linear factor by itself
    factor = factor or header.of("rope.scale_linear")
    if (kind in (None, "none", "linear") and (factor or 1.0) == 1.0) or kind == "none":
        return parameters
    if kind in (None, "linear"):
        return {**parameters, "rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and original:
        return {
            **parameters,
            "rope_type": "yarn",
            "factor": float(factor),
            "original_max_position_embeddings": int(original),
        }
    raise ValueError(
        f"{header.path}: expected rotary frequencies scaled linearly, by YaRN or by factors, got {kind!r} with factor "
        f"{factor} and original length {original}"
    )


def _by_factors(factors: torch.Tensor, theta: float, config: Any) -> dict[str, Any]:
    """Rotary parameters that divide each frequency by its factor: Llama 3.1's if they fit, else the factors."""
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    frequencies = theta ** -(torch.arange(len(factors), dtype=torch.float64) / len(factors))
    share = ((original * frequencies / (2 * torch.pi) - low) / (high - low)).clamp(0, 1)
    if torch.allclose(factors.double(), 1 / (share + (1 - share) / factor), rtol=1e-4):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "original_max_position_embeddings": config.max_position_embeddings,
    }

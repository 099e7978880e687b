"""What is trained of a model: a choice of parts, each whole or by a low-rank update that merges."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..counted import counted
from ..model.adapter import DOWN, UP
from ..model.families import attention_norm
from ..model.managed_layers import is_sharded
from .sharding import like

PARTS = ("injected", "upper", "compressor")
#: Factor of the low-rank updates.
SCALE = 2.0


class Part(NamedTuple):
    """A part of the model, whole or by updates of a rank."""

    name: str
    rank: int | None = None


def parse_parts(text: str, rank: int | None = None) -> list[Part]:
    """The parts of ``injected,upper,compressor``; ``upper:16`` is an update of rank 16.

    Args:
        text: names divided by commas.
        rank: of ``upper`` and ``compressor`` where they have none of their own.

    Raises:
        ValueError: an unknown part, one named twice, no injected blocks, or a rank that is no positive number.
    """
    parts = []
    for item in text.split(","):
        name, _, own = item.strip().partition(":")
        if name not in PARTS:
            raise ValueError(f"trained: expected parts of {', '.join(PARTS)}, got {name!r}")
        if own and not (own.isascii() and own.isdigit() and int(own)):
            raise ValueError(f"trained: expected a rank of at least 1 after {name!r}, got {own!r}")
        parts.append(Part(name, int(own) if own else None if name == "injected" else rank))
    names = [part.name for part in parts]
    if len(set(names)) < len(names):
        raise ValueError(f"trained: expected each part once, got {text!r}")
    if "injected" not in names:
        raise ValueError(f"trained: expected injected among the parts, without which no memory is read, got {text!r}")
    return parts


class LowRankLinear(nn.Linear):
    """A linear module with an update: ``SCALE * x @ down.T @ up.T`` is added, ``up [N, r]``, ``down [r, K]``."""

    up: nn.Parameter
    down: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``."""
        return super().forward(x) + SCALE * F.linear(F.linear(x, self.down), self.up)


def add_update(module: nn.Linear, rank: int, generator: torch.Generator) -> None:
    """Give a linear module an update that begins with zero; its own weight stays in its place, under its name."""
    if type(module) is not nn.Linear:
        raise ValueError(f"trained: expected plain linear modules for updates of a rank, got {type(module).__name__}")
    weight, features = module.weight, module.in_features
    down = torch.randn(rank, features, generator=generator) / math.sqrt(features)
    module.__class__ = LowRankLinear
    module.up = nn.Parameter(torch.zeros(module.out_features, rank, dtype=torch.float32, device=weight.device))
    module.down = nn.Parameter(down.to(weight.device))


@torch.no_grad()
def merge_updates(model: nn.Module) -> None:
    """Add every update to its weight; the modules are plain linear ones again."""
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.weight += (SCALE * (module.up @ module.down)).to(module.weight.dtype)
            del module.up, module.down
            plain: Any = module
            plain.__class__ = nn.Linear


def add_lora(model: nn.Module, ranks: Mapping[str, int], seed: int) -> None:
    """Put PEFT's LoRA layers in the place of linear modules; what they add is scaled by ``SCALE``.

    Args:
        model: the model.
        ranks: by the modules' names.
        seed: of the layers' beginning.

    Raises:
        ValueError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("updates: expected an installed peft for LoRA layers of PEFT, found none") from None
    patterns = {re.escape(name): rank for name, rank in ranks.items()}
    config = LoraConfig(
        target_modules=list(ranks),
        rank_pattern=patterns,
        alpha_pattern={pattern: SCALE * rank for pattern, rank in patterns.items()},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def remove_lora(model: nn.Module) -> None:
    """Put the linear modules back that :func:`add_lora` has wrapped, as they were before the training."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            model.set_submodule(name, module.base_layer)  # type: ignore[arg-type]


def is_update(name: str) -> bool:
    """Whether a parameter of that name is of a low-rank update, this package's or PEFT's."""
    return name.endswith((".up", ".down")) or ".lora_" in name


def _place(name: str) -> str:
    """Where an adapter has a parameter of a model in training: its own name, or a side of an update."""
    for end, side in ((".up", UP), (".down", DOWN), (".lora_B.default.weight", UP), (".lora_A.default.weight", DOWN)):
        if name.endswith(end):
            return f"{name.removesuffix(end)}.weight{side}"
    return name.replace(".base_layer.", ".")


class Trained:
    """The trained parameters of a model by name, everything else frozen.

    Args:
        model: a :class:`SharedLLMForCausalLM` with float32 or float64 parameters; its pick is always trained.
        parts: from :func:`parse_parts`.
        seed: of the updates' beginning.
        peft: whether PEFT's LoRA layers make the updates, in place of this package's.
        frozen_dtype: of the frozen linear modules' weights, for training under autocast to that dtype: products are the
            same and memory is less. Embeddings, also as tied output projections, and norms stay as they are.

    Raises:
        ValueError: a part that the model lacks, half-precision parameters, or sharded ones; no PEFT where it is needed.
    """

    def __init__(
        self,
        model: Any,
        parts: Iterable[Part],
        seed: int = 0,
        *,
        peft: bool = False,
        frozen_dtype: torch.dtype | None = None,
    ) -> None:
        if any(is_sharded(module) for module in model.modules()):
            raise ValueError("model: expected whole parameters in every process, got ones sharded by FSDP")
        self.model, self.parts = model, list(parts)
        generator = torch.Generator().manual_seed(seed)
        chosen = [(part, module) for part in self.parts for module in _modules(model, part.name)]
        if peft:
            names = {module: name for name, module in model.named_modules()}
            wide = [(p.rank, m) for p, m in chosen if p.rank is not None and isinstance(m, nn.Linear)]
            add_lora(model, {names[module]: rank for rank, module in wide}, seed)
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        for part, module in chosen:
            updated = part.rank is not None and isinstance(module, nn.Linear)
            if part.rank is not None and updated and not peft:
                add_update(module, part.rank, generator)
            for own, parameter in module.named_parameters(recurse=False):
                # of what has no updates (norms, biases, experts) the vectors are trained whole
                whole = part.rank is None or parameter.dim() == 1
                parameter.requires_grad_(whole or (updated and own in ("up", "down")))
        if model.pick is not None:
            model.pick.requires_grad_(True)
        self.parameters: dict[str, nn.Parameter] = {}
        self.find_parameters()
        narrow = [name for name, p in self.parameters.items() if p.dtype not in (torch.float32, torch.float64)]
        if narrow:
            raise ValueError(
                f"model: expected float32 parameters where they are trained, got {narrow[0]} in half precision"
            )

        if frozen_dtype is not None:
            _convert_frozen(model, frozen_dtype)

    def find_parameters(self) -> None:
        """Look the parameters up again: sharding puts others in their places."""
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def new(self, name: str) -> bool:
        """Whether a parameter is none of the base checkpoint's: of a block, of the pick, or of an update."""
        return ".injection." in name or name.startswith("pick.") or is_update(name)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """What :func:`write_adapter` takes, with ``SCALE``: whole tensors, updates as pairs by the weight's name."""
        tensors: dict[str, Tensor] = {_place(name): parameter for name, parameter in self.parameters.items()}
        if self.model.pick is not None:
            tensors["pick.token_class"] = self.model.pick.token_class
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into the parameters.

        Raises:
            ValueError: other names or shapes.
        """
        if tensors.keys() != self.parameters.keys():
            other = sorted(tensors.keys() ^ self.parameters.keys())
            raise ValueError(f"checkpoint: expected the trained parameters of this run, got others, such as {other[0]}")
        for name, parameter in self.parameters.items():
            if tensors[name].shape != parameter.shape:
                raise ValueError(
                    f"checkpoint: expected {name} of shape {tuple(parameter.shape)}, got {tuple(tensors[name].shape)}"
                )
            parameter.copy_(like(tensors[name], parameter))


def _convert_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the frozen weights and biases of linear modules another dtype; not those that an embedding shares."""
    looked_up = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad and parameter not in looked_up:
                    parameter.data = parameter.data.to(dtype)


def _modules(model: Any, part: str) -> list[Any]:
    """The modules of a part whose parameters are trained."""
    count, total = model.config.injection_layers, len(model.model.layers)
    if part == "injected":
        found = [module for block in model.injected_blocks for module in block.modules()]
    elif part == "upper":
        if count == total:
            raise ValueError(
                f"trained: expected injection_layers below the base's {counted(total, 'layer')} for upper, got {count}"
            )
        found = [module for layer in model.model.layers[count:] for module in layer.self_attn.modules()]
    else:
        if model.compressor is None:
            raise ValueError("trained: expected tie_compressor=False for compressor, got True")
        *lower, last = model.compressor.layers
        found = [module for layer in lower for module in layer.modules()]
        # of the last layer nothing but keys and values is read
        unread = {"q_proj", "o_proj", "q_norm"}
        found += [module for name, module in last.self_attn.named_modules() if name not in unread]
        found.append(attention_norm(last))
    return found

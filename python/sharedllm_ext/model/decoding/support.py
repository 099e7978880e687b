"""Why a model, or one ``generate``, decodes by its layers' own forward instead of by the operators of a step."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from ..._library import cpu_kernels, cuda_kernels
from ...counted import counted
from ...ops.injected_attention import head_size_obstacle
from ..cache_name import CACHE_NAME, one_cache
from ..examined import examined
from ..families import attention_norm, family_of, mlp_norm
from ..fp8_linear import Fp8Linear
from ..hooks import forward_hook, global_hook, own_forward
from ..protocols import Decoder
from .cache import PreallocatedCache
from .layers import MOST_FP8_ROWS

#: Most rows of one step; with more, its matmuls and not its launches are the limit.
MAX_BATCH = 256
#: Rope types whose frequencies do not follow the sequence length.
FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
#: For tests: on the CPU run steps of every dtype, and start them ahead too, which gains nothing there.
RUN_ON_CPU = False

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_KERNELS = ("decode_linear", "decode_append", "injected_attention")
_CPU_KERNELS = ("decode_linear", "injected_attention")
_CPU_DTYPES = (torch.float32, torch.bfloat16)
# generation modes that choose tokens one by one
_SINGLE = ("greedy_search", "sample")
_WATCHING = ("output_attentions", "output_hidden_states")
_NO_HOOK = "expected no hook and no forward of its own"
_HOOK_ENDS = "its handle's remove() ends it"
_logger = logging.getLogger("sharedllm_ext")
_said: set[str] = set()


def say_slow(reason: str, what: str = "generate decodes by the model's own forward") -> None:
    """Log, once in a process, why a decoding step takes the ordinary path, or what else does."""
    if f"{what}: {reason}" not in _said:
        _said.add(f"{what}: {reason}")
        _logger.info("%s: %s", what, reason)


def decoding_obstacle(
    model: Decoder,
    *,
    rows: int = 1,
    memory: Any = None,
    attention_mask: Tensor | None = None,
    generation_config: Any = None,
    **settings: Any,
) -> str | None:
    """Why ``generate`` would decode by the model's own forward, several times as slow as a decoding step.

    The model is examined in its present state. ``generate`` itself logs the reason to ``sharedllm_ext`` at level INFO,
    once.

    Args:
        model: the model.
        rows: ``B``, rows of ``input_ids`` times returned sequences.
        memory: what it will read, or ``None``.
        attention_mask: ``[B, L]``, or ``None``.
        generation_config: as for ``generate``; default: the model's own.
        settings: keywords of ``generate`` that change the configuration, ``num_beams`` for instance, and
            ``past_key_values``.

    Returns:
        The first reason, "what: expected …, got …"; ``None`` if steps run by their own operators.
    """
    cache = one_cache(settings.pop("past_key_values", None), settings.pop("cache", None))
    config = generation_config if generation_config is not None else getattr(model, "generation_config", None)
    values = {**({} if config is None else config.to_dict()), **settings}
    # generate runs without gradients, whatever its caller does
    with torch.no_grad():
        return (
            obstacle_in_settings(values, _mode_of(values))
            or obstacle_in_outputs(values.get)
            or obstacle_in_cache(cache)
            or obstacle_in_model(model)
            or obstacle_in_call(model, rows, memory, attention_mask)
        )


def _mode_of(values: dict[str, Any]) -> str:
    """Transformers' name of the generation mode, as far as it matters here."""
    if (values.get("num_beams") or 1) > 1:
        return "beam_search"
    if values.get("assistant_model") is not None or values.get("prompt_lookup_num_tokens") is not None:
        return "assisted_generation"
    return "sample" if values.get("do_sample") else "greedy_search"


def obstacle_in_settings(values: Any, mode: Any) -> str | None:
    """What speaks against steps in a generation configuration (a mapping, or an object with attributes) and mode."""
    get = values.get if isinstance(values, dict) else lambda name: getattr(values, name, None)
    if not is_single(mode):
        return f"generation mode: expected {' or '.join(_SINGLE)}, got {getattr(mode, 'value', mode)}"
    if get("use_cache") is False:
        return "use_cache: expected True, got False"
    if get("cache_implementation") is not None:
        return f"cache_implementation: expected None, got {get('cache_implementation')!r}"
    return None


def is_single(mode: Any) -> bool:
    """Whether a generation mode chooses tokens one by one."""
    return str(getattr(mode, "value", mode)) in _SINGLE


def obstacle_in_outputs(get: Any) -> str | None:
    """What speaks against steps in settings that ``get`` gives by name: outputs that they do not have."""
    for name in ("disable_compile", *_WATCHING):
        if get(name):
            return f"{name}: expected False, got True"
    return None


def obstacle_in_cache(cache: Any) -> str | None:
    """What speaks against steps in a caller's cache."""
    if cache is None or type(cache) is PreallocatedCache:
        return None
    return f"{CACHE_NAME}: expected none, or the PreallocatedCache of an earlier generate, got {type(cache).__name__}"


def obstacle_in_call(model: Decoder, rows: int, memory: Any, mask: Tensor | None) -> str | None:
    """What speaks against steps in rows, memory and mask of a ``generate``."""
    if memory is not None and memory.processes > 1:
        return f"memory: expected all slots in this process, got those of one of {counted(memory.processes, 'process')}"
    if memory is not None and (memory.dtype != model.dtype or memory.device != model.device):
        return f"memory: expected {model.dtype} on {model.device} as the model, got {memory.dtype} on {memory.device}"
    if mask is not None and mask.dim() != 2:
        return f"attention_mask: expected shape [batch, tokens], got {tuple(mask.shape)}"
    rows = rows if mask is None else max(rows, mask.shape[0])
    obstacle = obstacle_in_rows(model, rows)
    if obstacle is not None:
        return obstacle
    if mask is not None:
        total = mask.shape[1]
        is_padding = torch.arange(total, device=mask.device) < padding_of(mask)[:, None]
        if bool((mask.bool() == is_padding).any()):
            return "attention_mask: expected padding on the left alone, got a zero after a token"
    return None


def padding_of(mask: Tensor) -> Tensor:
    """Zeros in each row of a mask ``[B, L]``: ``[B]`` int64."""
    return mask.shape[1] - mask.long().sum(1)


def obstacle_in_model(model: Decoder, *, just_examined: bool = False) -> str | None:
    """What speaks against steps in the model as it is now.

    There is nothing for the supported families with plain modules without hooks, in evaluation mode, all on one CUDA
    device in bfloat16 or float16 with head sizes that the attention has fast kernels for, or on the CPU in float32 or
    bfloat16. For ``just_examined`` see :func:`~..examined.examined`.
    """
    if model.training:
        return "model: expected evaluation mode (model.eval()), got training mode"
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return f"model: expected no {'gradients' if torch.is_grad_enabled() else 'tracing'}, got a call with it"
    kind: Any = type(model)
    if kind.forward is not kind._own_forward:
        return f"model: expected the forward of {kind._own_forward.__qualname__.partition('.')[0]}, got another one"
    return _obstacle_in_place(model) or _obstacle_in_settings_of(model) or _obstacle_in_modules(model, just_examined)


def _obstacle_in_place(model: Decoder) -> str | None:
    weight = model.model.embed_tokens.weight
    device, dtype = weight.device, weight.dtype
    size = model.model.layers[0].self_attn.head_dim
    if device.type not in ("cuda", "cpu"):
        return f"device: expected a CUDA device or the CPU, got {device}"
    if torch.is_autocast_enabled(device.type):
        return f"autocast: expected none, got one on {device.type}"
    if dtype not in _DTYPES:
        expected = "torch.bfloat16 or torch.float16" if device.type == "cuda" else "torch.float32 or torch.bfloat16"
        return f"dtype: expected {expected}, got {dtype}"
    if device.type == "cpu":
        return None if RUN_ON_CPU else _obstacle_on_cpu(dtype, model)
    if dtype == torch.float32:
        return f"dtype: expected torch.bfloat16 or torch.float16, got {dtype}"
    obstacle = head_size_obstacle(size)
    if obstacle is not None:
        return obstacle
    return _missing_kernels("CUDA", _KERNELS, cuda_kernels(), model)


def _obstacle_on_cpu(dtype: torch.dtype, model: Decoder) -> str | None:
    if dtype not in _CPU_DTYPES:
        return f"dtype: expected torch.float32 or torch.bfloat16 on the CPU, got {dtype}"
    return _missing_kernels("CPU", _CPU_KERNELS, cpu_kernels(), model)


def obstacle_in_rows(model: Decoder, rows: int) -> str | None:
    """What speaks against steps of so many rows."""
    if in_8_bits(model):
        most = MOST_FP8_ROWS[model.model.embed_tokens.weight.device.type]
        if rows > most:
            return f"input_ids: expected at most {counted(most, 'row')} of a decoder in 8 bits, got {rows}"
        return None
    return None if rows <= MAX_BATCH else f"input_ids: expected at most {counted(MAX_BATCH, 'row')}, got {rows}"


def in_8_bits(model: Decoder) -> bool:
    """Whether the decoder's weights are in 8 bits."""
    return bool(getattr(model, "_decoder_is_fp8", False))


def _missing_kernels(place: str, names: tuple[str, ...], there: frozenset[str], model: Decoder) -> str | None:
    needed = (*names, "decode_linear_fp8") if in_8_bits(model) else names
    missing = [name for name in needed if name not in there]
    return (
        f"{place} library: expected kernels of {', '.join(needed)}, got none of {', '.join(missing)}"
        if missing
        else None
    )


def _obstacle_in_settings_of(model: Decoder) -> str | None:
    config = model.config.text_config
    family, rope = family_of(model.model.layers[0]), getattr(model.model.rotary_emb, "rope_type", "default")
    if family.not_decoded is not None:
        return f"{family.title}: {family.not_decoded}"
    if rope not in FIXED_ROPE_TYPES:
        return f"rope_type: expected {', '.join(FIXED_ROPE_TYPES)}, got {rope}"
    if getattr(config, "hidden_act", None) != "silu":
        return f"hidden_act: expected silu, got {getattr(config, 'hidden_act', None)}"
    watching = (name for name in _WATCHING if getattr(model.config, name, False))
    return next((f"config.{name}: expected False, got True" for name in watching), None)


def _obstacle_in_modules(model: Decoder, just_examined: bool) -> str | None:
    everywhere = global_hook(backward=False)
    if everywhere is not None:
        return f"all modules: {_NO_HOOK}, got {everywhere}; {_HOOK_ENDS}"
    own, known = _obstacle_in_forward(model), examined(model, just_now=just_examined)
    if own is not None:
        return f"model: {own}"
    if known.plain:
        return None
    obstacle = _obstacle_below(model)
    known.plain = obstacle is None
    return obstacle


def _obstacle_below(model: Decoder) -> str | None:
    inner: Any = model.model
    named = [(f"model.{name}", one) for name, one in inner.named_modules() if name]
    for name, one in (*named, ("model", inner), ("lm_head", model.lm_head)):
        obstacle = _obstacle_in_forward(one)
        if obstacle is not None:
            return f"{name}: {obstacle}"
    if type(inner.embed_tokens) is not nn.Embedding or inner.embed_tokens.max_norm is not None:
        return f"model.embed_tokens: expected a plain Embedding, got {type(inner.embed_tokens).__name__}"
    family = family_of(inner.layers[0])
    linear, norms = {"lm_head": model.lm_head}, {"model.norm": inner.norm}
    for index, layer in enumerate(inner.layers):
        place = f"model.layers.{index}"
        for part, its in ((layer, family.layer), (layer.self_attn, family.attention), (layer.mlp, family.mlp)):
            if not isinstance(part, its):
                return f"{place}: expected {its.__name__}, got {type(part).__name__}"
        norms[f"{place}.{family.attention_norm}"] = attention_norm(layer)
        norms[f"{place}.{family.mlp_norm}"] = mlp_norm(layer)
        for name, its_name in family.projections.items():
            owner = "self_attn" if name in "qkvo" else "mlp"
            linear[f"{place}.{owner}.{its_name}"] = getattr(getattr(layer, owner), its_name)
        injection: Any = getattr(layer, "injection", None)
        if injection is not None:
            linear |= {f"{place}.injection.{name}": getattr(injection, name) for name in ("q_proj", "o_proj")}
            norms[f"{place}.injection.norm"] = injection.norm
    for name, one in linear.items():
        if type(one) not in (nn.Linear, Fp8Linear):
            return f"{name}: expected a plain Linear, got {type(one).__name__}"
    for name, one in norms.items():
        if not isinstance(one, family.norm):
            return f"{name}: expected {family.norm.__name__}, got {type(one).__name__}"
    weight = inner.embed_tokens.weight
    for name, one in linear.items():
        if type(one) is Fp8Linear and one.codes.device != weight.device:
            return f"{name}: expected weights on {weight.device} as the embedding, got some on {one.codes.device}"
    for prefix, module in (("model", inner), ("lm_head", model.lm_head)):
        for name, parameter in module.named_parameters():
            if type(parameter) is not nn.Parameter:
                return f"{prefix}.{name}: expected a plain parameter, got {type(parameter).__name__}"
            if parameter.device != weight.device or parameter.dtype != weight.dtype:
                expected, got = f"{weight.dtype} on {weight.device}", f"{parameter.dtype} on {parameter.device}"
                return f"{prefix}.{name}: expected {expected} as the embedding, got {got}"
    return None


def _obstacle_in_forward(module: Any) -> str | None:
    """What a call of a module does besides its class's forward."""
    if not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__):
        # spelled out: hundreds of modules are asked
        return None
    hook, replaced, kind = forward_hook(module), own_forward(module), type(module).__name__
    if hook is not None:
        return f"{_NO_HOOK}, got {hook} on {kind}; {_HOOK_ENDS}"
    return None if replaced is None else f"{_NO_HOOK}, got forward `{replaced}` on {kind}"

"""Building a SharedLLM model from a base checkpoint: a folder, a name on the hub, a GGUF file or a loaded model."""

import copy
import os
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..counted import counted
from .configuration import SharedLLMConfig
from .families import attention_norm, check_family
from .gguf_checkpoint import complete_config, find_gguf, read_header
from .inputs import end_ids

Model = TypeVar("Model", bound=PreTrainedModel)
# set by Transformers on a model whose weights it has quantised
_QUANTISED_MARKS = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


def build_from_base(
    model_class: type[Model],
    base: str | os.PathLike[str] | PreTrainedModel,
    loading: dict[str, Any],
    fields: dict[str, Any],
) -> Model:
    """What :meth:`SharedLLMForCausalLM.from_base` does; arguments and errors as there."""
    _check_names(fields)
    given = {name: value for name, value in loading.items() if value is not None}
    if isinstance(base, (str, os.PathLike)):
        return assemble(model_class, load_base(base, fields, **given), fields)
    if not isinstance(base, PreTrainedModel):
        inner = getattr(base, "peft_config", None)
        advice = "; merge its adapters first (base.merge_and_unload())" if inner is not None else ""
        raise TypeError(f"base: expected a path, a hub name or a Transformers model, got {type(base).__name__}{advice}")
    if given:
        raise ValueError(
            f"{', '.join(given)}: expected None with a model as base (it keeps its own), got "
            # never a token in a message
            + ", ".join("a token" if name == "token" else str(value) for name, value in given.items())
        )
    return assemble(model_class, base, fields)


def load_base(
    base: str | os.PathLike[str],
    fields: dict[str, Any],
    *,
    dtype: torch.dtype | str | None = None,
    gguf_file: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a base checkpoint; its configuration first, so that errors come before the weights are read."""
    source: dict[str, Any] = {"revision": revision, "token": token}
    source = {name: value for name, value in source.items() if value is not None}
    gguf = find_gguf(base, gguf_file, revision, token)
    header = None if gguf is None else read_header(gguf)
    if header is not None:
        # an absolute path, since Transformers looks for a relative one in the working directory first
        base, source = header.path.parent, {"gguf_file": str(header.path)}
        dtype = header.dtype if dtype in (None, "auto") else dtype
        if "quantization_config" in options:
            raise ValueError("quantization_config: expected None with a GGUF file (it is dequantised), got one")
    else:
        stored, _ = PreTrainedConfig.get_config_dict(base, **source)
        _check_family(str(base), stored)
    config = AutoConfig.from_pretrained(base, trust_remote_code=False, **source)
    if header is not None:
        complete_config(config, header)
    SharedLLMConfig(text_config=config, **fields)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        base,
        config=config,
        dtype="auto" if dtype is None else dtype,
        trust_remote_code=False,
        output_loading_info=True,
        # reported as an error instead of a table
        ignore_mismatched_sizes=True,
        **source,
        **options,
    )
    model, report = loaded
    # Transformers would go on with random weights in their place
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, there, expected = mismatched[0]
        raise ValueError(
            f"{base}: expected {name} of shape {tuple(expected)} by its configuration, got {tuple(there)}, the "
            f"first of {counted(len(mismatched), 'tensor')} with another shape"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{base}: expected a whole checkpoint, got one that lacks {counted(len(missing), 'tensor')}, the first is "
            f"{missing[0]}"
        )
    return model


def assemble(model_class: type[Model], base: PreTrainedModel, fields: dict[str, Any]) -> Model:
    """Compressor and decoder around the modules of a loaded base checkpoint."""
    _check_model(base)
    inner: Any = base.model
    quantised = _has_quantised_weights(base)
    config = _config_of(base, quantised, fields)
    with torch.device("meta"):
        model: Any = model_class(config)
    model.model.rotary_emb = copy.deepcopy(inner.rotary_emb)
    _share(model, base)
    _copy_buffers(model, base)
    for layer in model.model.layers[: config.injection_layers]:
        norm = attention_norm(layer).weight
        layer.injection.to_empty(device=norm.device).to(norm.dtype)
        layer.injection.start_from(layer)
    if model.compressor is not None:
        state = {name: tensor.detach().clone() for name, tensor in inner.state_dict().items()}
        model.compressor.rotary_emb = copy.deepcopy(inner.rotary_emb)
        model.compressor.load_state_dict({name: state[name] for name in model.compressor.state_dict()}, assign=True)
        _copy_buffers(model.compressor, inner)
        model.compressor.requires_grad_(True)
    if model.pick is not None:
        layers = (model.model if model.compressor is None else model.compressor).layers
        norm = attention_norm(layers[0]).weight
        model.pick.to_empty(device=norm.device).to(norm.dtype)
        model.pick.start_from(layers)
    if not quantised:
        model.tie_weights()
    if base.generation_config is not None:
        model.generation_config = copy.deepcopy(base.generation_config)
    if config.answer_end_ids is not None:
        # each once, the base's own first
        ends = [*end_ids(model.generation_config.eos_token_id), *config.answer_end_ids]
        model.generation_config.eos_token_id = list(dict.fromkeys(ends))
    if quantised:
        for name in _QUANTISED_MARKS:
            if hasattr(base, name):
                setattr(model, name, getattr(base, name))
    return model.eval()


def _check_names(fields: dict[str, Any]) -> None:
    unknown = sorted(set(fields) - set(SharedLLMConfig.__annotations__))
    if not unknown:
        return
    known = sorted(set(SharedLLMConfig.__annotations__) - {"text_config", "tie_word_embeddings"})
    raise ValueError(
        f"fields: expected fields of SharedLLMConfig ({', '.join(known)}), got {', '.join(unknown)}; for other options "
        "of loading give a model: from_base(AutoModelForCausalLM.from_pretrained(…), …)"
    )


def _check_family(base: str, stored: dict[str, Any]) -> None:
    family = stored.get("model_type")
    advice = "; it is one already, load it with from_pretrained" if family == "sharedllm" else ""
    check_family(base, family, advice=advice)


def _check_model(base: PreTrainedModel) -> None:
    family = base.config.model_type
    check_family("base", family)
    if not hasattr(base, "model") or not hasattr(base, "lm_head"):
        raise ValueError(f"base: expected a causal language model ({family} …ForCausalLM), got {type(base).__name__}")
    for name, module in base.named_modules():
        if hasattr(module, "base_layer"):
            raise ValueError(f"base: expected a model without adapters, got one on {name}; merge or remove it first")
    devices = sorted({str(parameter.device) for parameter in base.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        raise ValueError(
            f"base: expected all weights on one device, got {', '.join(devices)} (meta: not in memory); build the "
            "model on one device, device_map='cpu' for instance, and save it"
        )


def _has_quantised_weights(base: PreTrainedModel) -> bool:
    """Whether weights are not plain floating point, whatever the configuration says."""
    plain = all(
        type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.element_size() > 1
        for parameter in base.parameters()
    )
    return not plain or any(type(m) is not nn.Linear for m in base.modules() if hasattr(m, "in_features"))


def _config_of(base: PreTrainedModel, quantised: bool, fields: dict[str, Any]) -> SharedLLMConfig:
    text_config = copy.deepcopy(base.config)
    mark = getattr(text_config, "quantization_config", None)
    # Transformers leaves this mark on a dequantised model, which has no quantised weights
    if hasattr(text_config, "quantization_config"):
        del text_config.quantization_config
    config = SharedLLMConfig(text_config=text_config, **fields)
    # set last: it goes on to the base's configuration
    config._attn_implementation = base.config._attn_implementation
    config.text_config._experts_implementation = base.config._experts_implementation
    config.dtype = base.dtype
    if not quantised:
        return config
    if not config.tie_compressor:
        raise ValueError(
            "tie_compressor: expected True with a quantised base, whose weights cannot be trained, got False"
        )
    for name in ("compressor_precision", "decoder_precision"):
        if getattr(config, name) != "model":
            raise ValueError(f"{name}: expected 'model' with a quantised base, got {getattr(config, name)!r}")
    if mark is not None:
        config.quantization_config = _with_plain_injection(mark, base, config.injection_layers)
    return config


def _with_plain_injection(mark: Any, base: Any, layers: int) -> Any:
    """The settings of quantisation, with the new blocks excluded: loading must not expect them to be quantised."""
    mark = copy.deepcopy(mark)
    names = [f"model.layers.{index}.injection" for index in range(layers)]
    if type(base.lm_head) is nn.Linear and type(base.lm_head.weight) is nn.Parameter:
        names.append("lm_head")
    for attribute in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(mark, attribute):
            kept = getattr(mark, attribute) or []
            setattr(mark, attribute, [*kept, *(name for name in names if name not in kept)])
    return mark


def _copy_buffers(model: Any, base: Any) -> None:
    """Give a model on the meta device the base's buffers that no state dictionary holds."""
    own = dict(model.named_buffers())
    for name, buffer in base.named_buffers():
        if name in own and own[name].is_meta:
            path, _, key = name.rpartition(".")
            model.get_submodule(path)._buffers[key] = buffer.clone()


def _share(model: Any, base: PreTrainedModel) -> None:
    """Give a model on the meta device the base's parameters, and its modules where those are of other classes.

    A quantised layer has its own weights, scales and matmul, so it is taken as it is.
    """
    taken: tuple[str, ...] = ()
    for name, module in base.named_modules():
        if name.startswith(taken) and taken:
            continue
        own = model.get_submodule(name)
        if name and not isinstance(own, type(module)):
            model.set_submodule(name, module)
            taken += (f"{name}.",)
            continue
        for key, parameter in module._parameters.items():
            shapes = [None if x is None else tuple(x.shape) for x in (own._parameters.get(key), parameter)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"base: expected {name}.{key} of shape {shapes[0]} by its configuration, got {shapes[1]}"
                )
            own._parameters[key] = parameter

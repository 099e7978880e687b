"""The base families: one row for each, and the only place where one is added.

A row says which Transformers classes a family is made of, what is particular about it, and which of the fast paths it
does not take, with the reason. Everything else in this package asks the row. A new family is a row here, a builder in
``tests/model/builders.py``, and its name in the texts that ``tests/model/test_family_rows.py`` checks.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3Attention,
    Gemma3DecoderLayer,
    Gemma3MLP,
    Gemma3RMSNorm,
)
from transformers.models.granite.modeling_granite import (
    GraniteAttention,
    GraniteDecoderLayer,
    GraniteMLP,
    GraniteRMSNorm,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralMLP,
    MistralRMSNorm,
)
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3DecoderLayer, Phi3MLP, Phi3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP, Qwen3RMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeDecoderLayer,
    Qwen3MoeMLP,
    Qwen3MoeRMSNorm,
    Qwen3MoeSparseMoeBlock,
)
from transformers.models.smollm3.modeling_smollm3 import (
    SmolLM3Attention,
    SmolLM3DecoderLayer,
    SmolLM3MLP,
    SmolLM3RMSNorm,
)

from .fp8_linear import Fp8Linear
from .hooks import is_untouched

#: Name of the rotation of layers without rotary embedding.
STILL = "none"
_EACH_ITS_OWN = MappingProxyType({name: f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")})


def no_window(attention: Any) -> int | None:
    """Every query sees all tokens before it."""
    return None


def window_of_layer(attention: Any) -> int | None:
    """Each layer's attention has its own window, or none."""
    window: int | None = attention.sliding_window
    return window


def window_of_config(attention: Any) -> int | None:
    """One window for all layers, in the configuration alone."""
    window: int | None = attention.config.sliding_window
    return window


def one_rotation(attention: Any) -> str:
    """All layers use the model's one rotary embedding."""
    return ""


def rotation_or_none(attention: Any) -> str:
    """Layers that do not use the rotary embedding are not rotated at all."""
    return "" if attention.use_rope else STILL


def rotation_of_type(attention: Any) -> str:
    """Each type of layers (full, sliding) has a rotation of its own."""
    return str(attention.layer_type)


def plain_logits(scores: Tensor, config: Any) -> Tensor:
    """Logits are what the output projection gives."""
    return scores


def divided_logits(scores: Tensor, config: Any) -> Tensor:
    """Logits are divided by a number of the configuration."""
    return scores / config.logits_scaling


def capped_logits(scores: Tensor, config: Any) -> Tensor:
    """Logits are soft-capped by tanh if the configuration says so."""
    cap = config.final_logit_softcapping
    return scores if cap is None else torch.tanh(scores / cap) * cap


def takes_all(config: Any) -> str | None:
    """Nothing in the configuration is refused."""
    return None


def without_router_logits(config: Any) -> str | None:
    """The experts' balancing loss is not computed."""
    if config.output_router_logits:
        return "output_router_logits: expected False (the experts' balancing loss is not computed), got True"
    return None


def causal_with_fixed_rotations(config: Any) -> str | None:
    """Only causal attention, and rotations that do not follow the length."""
    if config.use_bidirectional_attention:
        return "use_bidirectional_attention: expected False, as text is generated token by token, got True"
    kinds = {name: parameters["rope_type"] for name, parameters in config.rope_parameters.items()}
    changing = {name: kind for name, kind in kinds.items() if kind in ("dynamic", "longrope")}
    if changing:
        name, kind = next(iter(changing.items()))
        return f"rope_parameters[{name!r}]: expected a rope_type that does not follow the length, got {kind!r}"
    return None


class LinearPart:
    """Some of the outputs of a linear module that joins several projections; a view, to read and to compute with.

    Args:
        whole: the module, ``K`` to ``N``.
        outputs: which of its ``N`` outputs.
    """

    def __init__(self, whole: Any, outputs: slice) -> None:
        self.whole, self.outputs = whole, outputs
        self.in_features, self.out_features = whole.in_features, outputs.stop - outputs.start

    @property
    def weight(self) -> Tensor:
        """``[outputs, K]``, a plain parameter's own memory; of other classes, which cannot be cut, the whole."""
        weight: Tensor = self.whole.weight
        return weight[self.outputs] if self._is_plain else weight

    @property
    def codes(self) -> Tensor:
        """``[outputs, K]`` of weights in 8 bits."""
        codes: Tensor = self.whole.codes
        return codes[self.outputs]

    @property
    def scale(self) -> Tensor:
        """``[outputs, 1]`` of weights in 8 bits."""
        scale: Tensor = self.whole.scale
        return scale[self.outputs]

    @property
    def _is_plain(self) -> bool:
        return type(self.whole) is nn.Linear and type(self.whole.weight) in (nn.Parameter, Tensor)

    @property
    def bias(self) -> Tensor | None:
        """``[outputs]``, or ``None``."""
        return None if self.whole.bias is None else self.whole.bias[self.outputs]

    def __call__(self, x: Tensor) -> Tensor:
        """``x [..., K]`` to ``[..., outputs]``."""
        if self._is_plain and is_untouched(self.whole):
            return F.linear(x, self.weight, self.bias)
        if type(self.whole) is Fp8Linear and is_untouched(self.whole):
            return self.whole(x, self.outputs)
        # quantised, adapted, offloaded or with hooks: only its own matmul is right
        out: Tensor = self.whole(x)[..., self.outputs]
        return out


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """A row of the table.

    Attributes:
        model_type: Transformers' name of the family, and llama.cpp's.
        title: its name in texts for readers.
        layer, attention, mlp, norm: the classes of a decoder layer and of what it is made of.
        window: tokens that a query of an attention sees, including itself; ``None`` without a limit.
        projections: attribute of each projection of an attention (``q, k, v, o``) and of an MLP (``gate, up, down``);
            projections with the same attribute are joined in it, in this order.
        attention_norm, mlp_norm: attributes of the norms before attention and MLP.
        rotation: name of an attention's rotary embedding, see :mod:`.rotary`.
        experts: class that replaces the MLP in some layers, with experts chosen token by token, or ``None``.
        activation: field of the configuration that names an MLP's activation.
        after: modules of a layer that the output of its ``attention`` and ``mlp`` passes before it is added.
        embedding_factor: field of the configuration by which the model multiplies its embeddings, or ``None``.
        residual_factor: attribute of a layer by which it multiplies the outputs of attention and MLP, or ``None``.
        logits: of what the output projection gives, and the configuration.
        refused: what in a configuration cannot be honoured, "field: expected …, got …", or ``None``.
        gguf: whether GGUF files of it are read.
        gguf_window: whether the configuration takes a GGUF file's sliding window; elsewhere such a file is refused.
        not_fused: of ``norm``, ``attention`` and ``mlp`` those without a fused class, with the reason.
        not_decoded: why decoding steps run by the layers' own forward, "expected …, got …"; ``None``: they need not.
    """

    model_type: str
    title: str
    layer: type
    attention: type
    mlp: type
    norm: type
    window: Callable[[Any], int | None] = no_window
    projections: Mapping[str, str] = dataclasses.field(default_factory=lambda: _EACH_ITS_OWN)
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    rotation: Callable[[Any], str] = one_rotation
    experts: type | None = None
    activation: str = "hidden_act"
    after: Mapping[str, str] = dataclasses.field(default_factory=dict)
    embedding_factor: str | None = None
    residual_factor: str | None = None
    logits: Callable[[Tensor, Any], Tensor] = plain_logits
    refused: Callable[[Any], str | None] = takes_all
    gguf: bool = True
    gguf_window: bool = False
    not_fused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    not_decoded: str | None = None

    def projection(self, module: Any, name: str) -> Any:
        """A projection of an attention or MLP: a linear module, or its part of a joined one."""
        own = self._own.get(name)
        return getattr(module, own) if own is not None else self._part(module, name)

    def _part(self, module: Any, name: str) -> LinearPart:
        attribute = self.projections[name]
        joined = [other for other, its in self.projections.items() if its == attribute]
        whole = getattr(module, attribute)
        sizes = {"q": module.config.num_attention_heads, "k": module.config.num_key_value_heads}
        sizes["v"] = sizes["k"]
        shares = [sizes.get(other, 1) for other in joined]
        unit = whole.out_features // sum(shares)
        begin = sum(shares[: joined.index(name)]) * unit
        return LinearPart(whole, slice(begin, begin + shares[joined.index(name)] * unit))

    @property
    def adds_plainly(self) -> bool:
        """Whether every layer adds what its attention and MLP give as it is."""
        return self.residual_factor is None and not self.after

    @functools.cached_property
    def _own(self) -> dict[str, str]:
        """Attributes of the projections that are modules of their own."""
        attributes = list(self.projections.values())
        return {name: its for name, its in self.projections.items() if attributes.count(its) == 1}


_ROWS = (
    Family("llama", "Llama", LlamaDecoderLayer, LlamaAttention, LlamaMLP, LlamaRMSNorm),
    Family(
        "mistral",
        "Mistral",
        MistralDecoderLayer,
        MistralAttention,
        MistralMLP,
        MistralRMSNorm,
        window=window_of_config,
        gguf_window=True,
    ),
    Family("qwen2", "Qwen2/2.5", Qwen2DecoderLayer, Qwen2Attention, Qwen2MLP, Qwen2RMSNorm, window=window_of_layer),
    Family("qwen3", "Qwen3", Qwen3DecoderLayer, Qwen3Attention, Qwen3MLP, Qwen3RMSNorm, window=window_of_layer),
    Family(
        "smollm3",
        "SmolLM3",
        SmolLM3DecoderLayer,
        SmolLM3Attention,
        SmolLM3MLP,
        SmolLM3RMSNorm,
        window=window_of_layer,
        rotation=rotation_or_none,
        gguf=False,
    ),
    Family(
        "qwen3_moe",
        "Qwen3-MoE",
        Qwen3MoeDecoderLayer,
        Qwen3MoeAttention,
        Qwen3MoeMLP,
        Qwen3MoeRMSNorm,
        window=window_of_layer,
        experts=Qwen3MoeSparseMoeBlock,
        refused=without_router_logits,
        gguf=False,
        not_decoded="expected one MLP in every layer, got experts that a router chooses",
    ),
    Family(
        "phi3",
        "Phi-3/Phi-4",
        Phi3DecoderLayer,
        Phi3Attention,
        Phi3MLP,
        Phi3RMSNorm,
        window=window_of_config,
        projections={
            **{name: "qkv_proj" for name in "qkv"},
            "o": "o_proj",
            "gate": "gate_up_proj",
            "up": "gate_up_proj",
            "down": "down_proj",
        },
        after={"attention": "resid_attn_dropout", "mlp": "resid_mlp_dropout"},
        gguf=False,
        not_fused={
            "attention": "expected projections and rotation of whole heads, got joined projections and a rotated part",
            "mlp": "expected a product each for gate and up, got one for both",
        },
    ),
    Family(
        "gemma3_text",
        "Gemma 3",
        Gemma3DecoderLayer,
        Gemma3Attention,
        Gemma3MLP,
        Gemma3RMSNorm,
        window=window_of_layer,
        mlp_norm="pre_feedforward_layernorm",
        rotation=rotation_of_type,
        activation="hidden_activation",
        after={"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"},
        logits=capped_logits,
        refused=causal_with_fixed_rotations,
        gguf=False,
        not_fused={"norm": "expected a norm whose weights are factors, got one that adds 1 to them"},
        not_decoded="expected norms before attention and MLP alone, got one behind each too",
    ),
    Family(
        "granite",
        "Granite",
        GraniteDecoderLayer,
        GraniteAttention,
        GraniteMLP,
        GraniteRMSNorm,
        embedding_factor="embedding_multiplier",
        residual_factor="residual_multiplier",
        logits=divided_logits,
        gguf=False,
    ),
)
#: The rows by ``model_type``.
# no proxy, which torch.compile does not follow where dictionaries change (longrope)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ROWS}


def family_of(module: Any) -> Family:
    """The row of a decoder layer, or of its attention or MLP, however it may be wrapped."""
    # this package's own classes know theirs; wrappers pass attributes on, so the configuration tells the rest
    known: Family | None = getattr(type(module), "base_family", None)
    if known is not None:
        return known
    config = getattr(module, "config", None)
    if config is None:
        config = module.self_attn.config
    return FAMILIES[config.model_type]


def projection(module: Any, name: str) -> Any:
    """A projection of an attention (``q, k, v, o``) or MLP (``gate, up, down``) of any family."""
    return family_of(module).projection(module, name)


def attention_norm(layer: Any) -> Any:
    """The norm before a layer's attention."""
    return getattr(layer, family_of(layer).attention_norm)


def mlp_norm(layer: Any) -> Any:
    """The norm before a layer's MLP."""
    return getattr(layer, family_of(layer).mlp_norm)


def sliding_window(layer: Any) -> int | None:
    """Tokens that a query of this layer sees, including itself; ``None`` without a limit."""
    return family_of(layer.self_attn).window(layer.self_attn)


def rotation_of(layer: Any) -> str:
    """The name of a layer's rotation."""
    return family_of(layer.self_attn).rotation(layer.self_attn)


def mlp_width(layer: Any) -> int:
    """Width of a layer's MLP for each token, over all experts that a token goes to."""
    mlp = layer.mlp
    if has_experts(layer):
        return int(mlp.gate.top_k * mlp.experts.intermediate_dim)
    return int(projection(mlp, "gate").out_features)


def has_experts(layer: Any) -> bool:
    """Whether a layer has experts instead of one MLP."""
    experts = family_of(layer).experts
    return experts is not None and isinstance(layer.mlp, experts)


def embedding_factor(layer: Any) -> float:
    """Factor of a model's embeddings before its first layer; any of its layers may be given."""
    attention = layer.self_attn
    name = family_of(attention).embedding_factor
    return 1.0 if name is None else float(getattr(attention.config, name))


def residual_factor(layer: Any) -> float:
    """Factor of the outputs of a layer's attention and MLP, before they are added."""
    name = family_of(layer).residual_factor
    return 1.0 if name is None else float(getattr(layer, name))


def norm_eps(norm: Any) -> float | None:
    """What a norm adds to its mean square, ``None`` if it does not say."""
    eps: float | None = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return eps


def after_output(layer: Any, part: str) -> Any:
    """The module that the output of a layer's ``attention`` or ``mlp`` passes before it is added, or ``None``."""
    name = family_of(layer).after.get(part)
    module = None if name is None else getattr(layer, name)
    return None if isinstance(module, nn.Dropout) and not (module.training and module.p > 0) else module


def check_settings(name: str, config: Any) -> None:
    """Refuse settings of a base checkpoint's configuration that cannot be honoured.

    Raises:
        ValueError: "name.field: expected …, got …".
    """
    refusal = FAMILIES[config.model_type].refused(config)
    if refusal is not None:
        raise ValueError(f"{name}.{refusal}")


def check_gguf_family(name: str, architecture: Any) -> None:
    """Refuse a GGUF file of a family that is not read from one.

    Raises:
        ValueError: "name: expected …, got …".
    """
    read = [family.model_type for family in FAMILIES.values() if family.gguf]
    if architecture not in read:
        advice = "; load the original checkpoint instead" if architecture in FAMILIES else ""
        raise ValueError(
            f"{name}: expected a GGUF file of architecture {', '.join(read)}, got {architecture!r}{advice}"
        )


def check_family(name: str, model_type: Any, advice: str = "") -> None:
    """Refuse a family without a row.

    Raises:
        ValueError: "name: expected a base checkpoint …, got …", and the advice.
    """
    if model_type not in FAMILIES:
        names = ", ".join(FAMILIES)
        raise ValueError(f"{name}: expected a base checkpoint of type {names}, got {model_type!r}{advice}")

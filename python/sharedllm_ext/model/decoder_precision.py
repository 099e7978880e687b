"""A decoder whose weights are in 8 bits: made of a loaded model, for inference, and refused where they are missing."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from .configuration import lower_config
from .decoding.session import release
from .families import family_of
from .fp8_linear import Fp8Linear
from .hooks import is_untouched
from .injection import install_steps
from .layer_math import install_fused
from .managed_layers import is_managed

_NAME = "decoder_precision='fp8'"


class DecoderPrecision:
    """Mixin of the model: ``decoder_precision``."""

    _decoder_is_fp8 = False

    @torch.no_grad()
    def quantize_decoder(self: Any) -> None:
        """Round the decoder's weights to 8 bits (e4m3, one scale a row), in place; for inference from here on.

        Those are the projections of all layers and of the injected blocks. The embedding and the output projection,
        norms and biases stay, and so do a separate compressor and the trained queries. A tied compressor keeps the
        weights of its layers in their own dtype with ``config.compressor_precision = "model"``, so that memories do not
        change; with ``"fp8"`` it shares the decoder's. Weights that nothing else holds are freed one by one: the peak
        is that of the loaded model and one matrix. No parameter takes gradients any more.

        ``from_pretrained``, ``from_base`` and ``from_adapter`` call it where ``config.decoder_precision`` is "fp8".

        Raises:
            ValueError: layers that are no plain linear modules with weights in memory: quantised otherwise, adapted,
                sharded, offloaded, with experts; or weights that are not finite.
        """
        if self._decoder_is_fp8:
            return
        _refuse_others(self)
        release(self)
        self._fp8_products.forget()
        if self.compressor is None and self.config.compressor_precision == "model":
            self.compressor = _own_compressor(self)
        for place, parent, name in _linear_places(self):
            try:
                setattr(parent, name, Fp8Linear(getattr(parent, name)))
            except ValueError as error:
                raise ValueError(f"{_NAME}: {place}: {error}") from None
        self.requires_grad_(False)
        self.config.decoder_precision = "fp8"
        self._decoder_is_fp8 = True

    def finish_loading(self: Any) -> Any:
        """The model, with the decoder in the configuration's precision."""
        if self.config.decoder_precision == "fp8":
            self.quantize_decoder()
        return self

    def _check_decoder_precision(self: Any) -> None:
        wanted = self.config.decoder_precision == "fp8"
        if wanted and not self._decoder_is_fp8:
            raise ValueError(
                f"{_NAME}: expected weights in 8 bits, got those of the checkpoint; "
                "model.quantize_decoder() rounds them"
            )
        if self._decoder_is_fp8 and not wanted:
            raise ValueError(
                f"decoder_precision: expected 'fp8', as the weights are in 8 bits, got "
                f"{self.config.decoder_precision!r}; load the checkpoint again for its own weights"
            )
        if wanted and self.training:
            raise ValueError(
                f"{_NAME}: expected evaluation mode (model.eval()), got training mode; load the "
                "checkpoint with decoder_precision='model' to train it"
            )

    def refuse_fp8_decoder(self, what: str) -> None:
        """Refuse what needs the weights that were rounded.

        Raises:
            ValueError: the decoder is in 8 bits.
        """
        if self._decoder_is_fp8:
            raise ValueError(
                f"{what}: expected the checkpoint's own weights, got a decoder in 8 bits, which lacks them; load the "
                "checkpoint with decoder_precision='model' for that"
            )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save configuration and weights; see the model."""
        self.refuse_fp8_decoder("save_pretrained")
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize the vocabulary; see the model."""
        self.refuse_fp8_decoder("resize_token_embeddings")
        return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]


def _linear_places(model: Any) -> Iterator[tuple[str, Any, str]]:
    """Names, parents and attributes of the modules that are rounded."""
    for index, layer in enumerate(model.model.layers):
        for part, name in sorted(set(_parts(family_of(layer)))):
            yield f"model.layers.{index}.{part}.{name}", getattr(layer, part), name
        injection: Any = getattr(layer, "injection", None)
        if injection is not None:
            for name in ("q_proj", "o_proj"):
                yield f"model.layers.{index}.injection.{name}", injection, name


def _parts(family: Any) -> Iterator[tuple[str, str]]:
    # joined projections have one attribute
    for projection, name in family.projections.items():
        yield "self_attn" if projection in "qkvo" else "mlp", name


def _refuse_others(model: Any) -> None:
    for index, layer in enumerate(model.model.layers):
        family = family_of(layer)
        if is_managed(layer):
            raise ValueError(f"{_NAME}: expected all weights in place, got a sharded or offloaded layer {index}")
        if not isinstance(layer.mlp, family.mlp):
            raise ValueError(
                f"{_NAME}: expected {family.mlp.__name__} as layer {index}'s mlp, got {type(layer.mlp).__name__}"
            )
    for place, parent, name in _linear_places(model):
        module = getattr(parent, name)
        if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or not is_untouched(module):
            hooks = "" if is_untouched(module) else " with hooks or its own forward"
            raise ValueError(f"{_NAME}: {place}: expected a plain Linear, got {type(module).__name__}{hooks}")
        if module.weight.is_meta or not module.weight.is_floating_point():
            raise ValueError(
                f"{_NAME}: {place}: expected weights in memory, got {module.weight.dtype} on {module.weight.device}"
            )


def _own_compressor(model: Any) -> Any:
    """The lowest layers around the parameters that they share with the decoder until those are rounded."""
    with torch.device("meta"):
        lower = AutoModel.from_config(lower_config(model.config))
    install_steps(lower.layers)
    install_fused(lower)
    lower.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    for name, module in lower.named_modules():
        if name.startswith("rotary_emb"):
            continue
        source = model.model.get_submodule(name)
        for key in module._parameters:
            module._parameters[key] = source._parameters[key]
        for key in module._buffers:
            module._buffers[key] = source._buffers[key]
    return lower.train(model.training)

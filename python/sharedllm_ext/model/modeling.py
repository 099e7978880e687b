"""The SharedLLM model: compressor and decoder assembled around a base checkpoint's own Transformers modules."""

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, initialization
from transformers.cache_utils import Cache
from transformers.utils.generic import can_return_tuple

from .adapter import (
    adapter_fields,
    apply_adapter,
    changed_tensors,
    check_base,
    find_adapter,
    read_header,
    write_adapter,
)
from .appending import ContextAppending
from .base_checkpoint import build_from_base
from .cache_name import CACHE_NAME, cache_of, one_cache
from .cached_memory import forget_memory, has_read, remember_memory, remembered_memory
from .configuration import SharedLLMConfig, lower_config
from .decoder_precision import DecoderPrecision
from .decoding.prefill import read_short
from .decoding.session import removed_tokens, was_checked
from .families import FAMILIES, projection
from .generation import ContextGeneration
from .hooks import keep_signatures
from .indexing import ContextIndexing
from .injection import InjectedAttention, install_injection, install_steps
from .inputs import (
    check_embeds,
    check_ids,
    check_keywords,
    check_labels,
    check_labels_given,
    check_not_empty,
    check_query,
    check_running_text,
    check_shape_of_labels,
    labels_of_shifted,
    query_of,
    say_past_window,
)
from .layer_math import Fp8Products, install_fused
from .loading import check_loaded
from .managed_layers import device_of
from .memory import ContextMemory
from .outputs import SharedLLMOutput
from .passages import PassageRetrieval
from .pick import Pick
from .pick_index import PickIndexes
from .reading import say_if_it_cannot_read
from .rotary import RopeTables
from .signature import Fingerprint
from .split import refuse_packed, split_open_end, split_rows
from .split_prompt import SplitPrompt, mask_over_cache, remember_prompt
from .training_mark import TrainingMark


class SharedLLMForCausalLM(DecoderPrecision, ContextIndexing, ContextAppending, PassageRetrieval, ContextGeneration):
    """A causal language model that reads long contexts through a compressed memory (SharedLLM).

    The ``M`` lowest layers compress ``context_ids`` into a :class:`ContextMemory`; the whole model decodes the running
    text ``input_ids`` and reads the memory in its ``M`` lowest layers. Build one from a base checkpoint with
    :meth:`from_base`, or load one with ``from_pretrained``.
    """

    config_class = SharedLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _own_forward: Any = None
    _skip_keys_device_placement = ["past_key_values", "cache", "memory"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: SharedLLMConfig) -> None:
        super().__init__(config)
        text_config = config.text_config
        self.model: Any = AutoModel.from_config(text_config)
        install_injection(self.model.layers, config.injection_layers)
        self.lm_head: Any = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.compressor: Any = None if config.tie_compressor else AutoModel.from_config(lower_config(config))
        if self.compressor is not None:
            install_steps(self.compressor.layers)
        self.pick: Pick | None = None
        if config.pick_layers is not None:
            self.pick = Pick(config, projection(self.model.layers[0].self_attn, "q").out_features)
        install_fused(self)
        self._watch: Any = None
        self._fp8_products = Fp8Products()
        self._tables = RopeTables()
        self._pick_indexes = PickIndexes()
        self._fingerprint = Fingerprint()
        self._training_mark = TrainingMark()
        self._said_past_window = self._said_it_cannot_read = False
        self._reads_context: tuple[Any, bool] | None = None
        self.post_init()
        # only classes that exist in the model: FSDP's wrapping policies look for every one of them
        self._no_split_modules = {type(layer).__name__ for layer in self._all_layers()}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, InjectedAttention):
            initialization.zeros_(module.o_proj.weight)

    def initialize_weights(self) -> None:
        """Initialise the weights that were not loaded."""
        super().initialize_weights()
        # the nested model's own initialisation, which comes first, does not include these
        for block in self.injected_blocks:
            self._init_weights(block)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load a checkpoint; arguments as for Transformers' ``from_pretrained``.

        Raises:
            ValueError: weights of the compressor or of an injected block are missing, have no place in the model, or
                are not finite. A block without any output projection starts with a zero one.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        check_loaded(loaded[0], loaded[1]["missing_keys"], loaded[1]["unexpected_keys"])
        loaded[0].finish_loading()
        return loaded if output_loading_info else loaded[0]

    @classmethod
    def from_base(
        cls,
        base: str | os.PathLike[str] | PreTrainedModel,
        *,
        dtype: torch.dtype | str | None = None,
        gguf_file: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        quantization_config: Any = None,
        **fields: Any,
    ) -> "SharedLLMForCausalLM":
        """Build compressor and decoder from one base checkpoint.

        The new blocks start from the layer's own norm and query projection with a zero output projection, so the model
        equals its base checkpoint until it is trained.

        Args:
            base: a local folder or hub name of a checkpoint of one of the families (Llama, Mistral, Qwen2/2.5, Qwen3,
                Qwen3-MoE, SmolLM3, Phi-3/Phi-4, Gemma 3 or Granite), a ``.gguf`` file (Llama, Mistral, Qwen2/2.5 or
                Qwen3), which is dequantised, or such a model; its parameters are shared, not copied. Layers that
                bitsandbytes, torchao or others have quantised stay so; the new blocks are not quantised.
            dtype: dtype of the parameters (``base`` a path); default: the checkpoint's own, float32 for quantised GGUF.
            gguf_file: name of the GGUF file, where ``base`` is the folder or hub name that holds it.
            revision, token, device_map, attn_implementation, quantization_config: as for Transformers'
                ``from_pretrained``, ``base`` a path; one device only.
            fields: fields of :class:`SharedLLMConfig`; checked before any weights are read.

        Raises:
            TypeError: ``base`` is neither a path nor a Transformers model.
            ValueError: the checkpoint's family is not supported, it lacks weights, or a field is out of range.
            OSError: no checkpoint at ``base``.
        """
        loading = {
            "dtype": dtype,
            "gguf_file": gguf_file,
            "revision": revision,
            "token": token,
            "device_map": device_map,
            "attn_implementation": attn_implementation,
            "quantization_config": quantization_config,
        }
        return build_from_base(cls, base, loading, fields).finish_loading()

    @classmethod
    def from_adapter(
        cls,
        adapter: str | os.PathLike[str],
        base: str | os.PathLike[str] | PreTrainedModel,
        **loading: Any,
    ) -> "SharedLLMForCausalLM":
        """Build a model from a base checkpoint and an adapter, which holds what was trained of it.

        Args:
            adapter: the file, or the name of one that the package ships (:func:`shipped_adapters`).
            base: as for :meth:`from_base`.
            loading: options of loading the base as for :meth:`from_base` (``dtype``, ``device_map``, …), and
                ``decoder_precision``.

        Returns:
            The model in evaluation mode; low-rank updates are merged.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: it is damaged, or the base is not the one that it was trained on; the message names the
                difference.
        """
        path = find_adapter(adapter)
        header = read_header(path)
        precision = {"decoder_precision": "model", **header["config"], **loading}["decoder_precision"]
        model = cls.from_base(base, **{**header["config"], **loading, "decoder_precision": "model"})
        check_base(path, header, model)
        apply_adapter(path, header, model)
        model.config.set_decoder_precision(precision)
        # of what the adapter has changed, too
        return model.finish_loading()

    def save_adapter(
        self,
        path: str | os.PathLike[str],
        base: str | os.PathLike[str] | PreTrainedModel,
        *,
        name: str | None = None,
        about: str = "",
    ) -> None:
        """Write what was trained of the model: every tensor that differs from what its base checkpoint gives.

        Args:
            path: the file, replaced as a whole.
            base: the checkpoint that the model was made of, as for :meth:`from_base`.
            name: the base's name for others; default: the last part of its path.
            about: free words on the training.

        Raises:
            ValueError: the base is another one, or the decoder is in 8 bits.
        """
        self.refuse_fp8_decoder("save_adapter")
        called = name or os.path.basename(
            str(getattr(base, "name_or_path", "") if isinstance(base, PreTrainedModel) else base)
        )
        inner = copy.deepcopy(base) if isinstance(base, PreTrainedModel) else base
        options: dict[str, Any] = {} if isinstance(base, PreTrainedModel) else {"dtype": self.dtype}
        fresh = type(self).from_base(inner, **adapter_fields(self.config), **options)
        write_adapter(path, fresh, changed_tensors(self, fresh), base=called or "unnamed", about=about)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """No operation: every saved folder names this package, so its source is not copied."""

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's token embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The output projection."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output projection."""
        self.lm_head = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the vocabulary; arguments and result as for Transformers.

        A compressor with its own weights is resized too: its new rows are those of the decoder.
        """
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        rows = embeddings.num_embeddings
        if self.compressor is not None and self.compressor.embed_tokens.num_embeddings != rows:
            old = self.compressor.embed_tokens.num_embeddings
            own = self.compressor.resize_token_embeddings(rows, mean_resizing=False)
            with torch.no_grad():
                own.weight[old:].copy_(embeddings.weight[old:])
        return embeddings

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save configuration and weights; arguments as for Transformers.

        Raises:
            ValueError: decoder and compressor have vocabularies of different sizes, which could not be loaded; or the
                decoder is in 8 bits, and the checkpoint's weights are gone.
        """
        self._check_vocabularies()
        super().save_pretrained(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        """The device of the inputs, on which the first layer computes."""
        return device_of(self.model.embed_tokens)

    def _all_layers(self) -> list[Any]:
        """The decoder's layers, and the compressor's own."""
        return [*self.model.layers, *([] if self.compressor is None else self.compressor.layers)]

    @property
    def injected_blocks(self) -> list[InjectedAttention]:
        """The ``M`` injected attention blocks."""
        return [layer.injection for layer in self._reading_layers()]

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[…, vocabulary]`` of the last layer's normed output ``[…, d]``."""
        text_config = self.config.text_config
        return FAMILIES[text_config.model_type].logits(self.lm_head(hidden), text_config)

    # -- decoding -----------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        context_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        memory: ContextMemory | None = None,
        query_ids: Tensor | None = None,
        query_attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        split_window: bool = True,
        **kwargs: Any,
    ) -> SharedLLMOutput:
        """Logits of the running text, given a context or its memory.

        Args:
            input_ids: ``[B, L]`` running text. Longer than ``config.window``, without context, memory, cache, it is
                split row by row: of each row's own tokens the last ``window`` are running text, the rest is context.
                Logits then belong to the last columns of ``input_ids``, from the first that is running text in any row;
                they are NaN where the column is context of its own row. Without a mask, zeros at the end of a row may
                be padding: they are running text beyond the window.
            attention_mask: ``[B, L]`` (with a cache: cached tokens + ``L``), 0 for padding.
            labels: ``[B, L]``, -100 where no loss is taken; those of a context's tokens do not count. With
                ``config.query_aware`` the query is then the text before the first label, so that no choice depends on
                what is to be predicted; a row whose first token has a label is read with the fixed policy, and so is
                everything where labels are kept from the model in training.
            logits_to_keep: the last so many columns, or positions in ``input_ids``; 0 for all.
            context_ids: ``[B, C]`` past context, compressed on the spot.
            context_attention_mask: ``[B, C]``, 0 for padding.
            memory: a memory from :meth:`compress` or of an earlier output, instead of ``context_ids``; one row serves
                any batch.
            query_ids: ``[B, Q]`` the text whose last token picks the nodes, instead of the running text.
            query_attention_mask: ``[B, Q]``, 0 for padding; a row without any token is read with the fixed policy.
            past_key_values, cache: as for the base model, by either of Transformers' two names. Over a cache of an
                earlier call that read a memory, that memory is read again if no other is given.
            split_window: whether an ``input_ids`` longer than ``config.window`` is split.
            kwargs, position_ids, inputs_embeds, use_cache: as for the base model.

        Returns:
            :class:`SharedLLMOutput` with ``loss, logits, past_key_values, hidden_states, attentions, memory``; cache,
            hidden states and attentions hold the running text as it was computed, padded on the left.

        Raises:
            TypeError: a keyword that looks like a misspelt one of these.
            ValueError: inputs that contradict each other; the message names what was expected and what came.
        """
        compiling = torch.compiler.is_compiling()
        self._check_decoder_precision()
        if kwargs and not compiling:
            check_keywords(kwargs)
            if kwargs.get("output_router_logits") and FAMILIES[self.config.text_config.model_type].experts is not None:
                raise ValueError(
                    "output_router_logits: expected False (logits of experts are not returned), got "
                    f"{kwargs['output_router_logits']}"
                )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "input_ids, inputs_embeds: expected exactly one of them, got "
                + ("none" if input_ids is None else "both")
            )
        past_key_values = one_cache(past_key_values, cache)
        fresh = past_key_values is None or past_key_values.get_seq_length() == 0
        if input_ids is not None:
            checked = fresh and not compiling and not (self.training and input_ids.is_cuda)
            check_ids(self, "input_ids", input_ids, range_too=checked)
            check_not_empty(input_ids)
        inputs: Any = input_ids if input_ids is not None else inputs_embeds
        inputs_name = "inputs_embeds" if input_ids is None else "input_ids"
        if inputs_embeds is not None:
            check_embeds(self, inputs_name, inputs_embeds)
        if context_ids is not None and memory is not None:
            raise ValueError("context_ids, memory: expected at most one of them, got both")
        if context_ids is None and context_attention_mask is not None:
            raise ValueError("context_attention_mask: expected context_ids with it, got none")
        check_query(query_ids, query_attention_mask, memory)
        shift_labels = kwargs.get("shift_labels")
        check_shape_of_labels("labels", labels, inputs_name, inputs)
        check_shape_of_labels("shift_labels", shift_labels, inputs_name, inputs)
        if labels is not None and not compiling:
            check_labels(self, labels)
        counted = kwargs.get("num_items_in_batch")
        targets = labels if labels is not None or shift_labels is None else labels_of_shifted(shift_labels)
        labels_elsewhere = targets is None and (self.training or counted is not None)

        split, examined, query_mask = None, False, attention_mask
        if memory is None and context_ids is None and input_ids is not None and fresh and split_window:
            whole = attention_mask is not None or compiling
            cut = split_rows(self.config.window, input_ids, attention_mask) if whole else None
            split = cut if whole else split_open_end(self.config.window, input_ids)
        elif memory is None and context_ids is None:
            memory = remembered_memory(past_key_values)
        if not fresh and not compiling:
            attention_mask = mask_over_cache(past_key_values, attention_mask, inputs.shape[1])
        prompt = None
        if split is not None:
            prompt = SplitPrompt.of(inputs, split, attention_mask)
            if labels_elsewhere:
                check_labels_given(self.training, logits_to_keep, counted is not None)
            refuse_packed(kwargs, position_ids, attention_mask)
            kept = split.kept_columns(logits_to_keep)
            context_ids, context_attention_mask = split.context_ids, split.context_mask
            inputs = input_ids = split.input_ids
            attention_mask, query_mask = split.attention_mask, split.query_mask
            position_ids = None if position_ids is None else split.take(position_ids)
            targets = None if targets is None else split.take_labels(targets)
            labels, kwargs = split.take_targets(labels, kwargs)
        if context_ids is not None:
            check_running_text(self, inputs_name, inputs, query_mask if past_key_values is None else None, context_ids)
            if query_ids is None and not labels_elsewhere:
                query, query_attention_mask = query_of(self.config.query_aware, inputs, query_mask, targets)
            else:
                query = query_ids
            embedded = query is not None and query.dim() == 3
            memory = self.compress(
                context_ids,
                context_attention_mask,
                None if embedded else query,
                query_attention_mask,
                query_embeds=query if embedded else None,
            )
        elif memory is None or compiling or was_checked(self, memory):
            pass
        elif fresh or not has_read(past_key_values, memory):
            self.check_memory(memory)
            examined = True
        if memory is not None and fresh and not compiling:
            say_if_it_cannot_read(self)
        if split is None and split_window and not compiling and not self._said_past_window:
            say_past_window(self, inputs.shape[1], attention_mask, None if fresh else past_key_values)

        if memory is not None:
            memory.expect_same(**{inputs_name: inputs}, attention_mask=attention_mask)
        use_cache = self.config.text_config.use_cache if use_cache is None else use_cache
        outputs: Any = None
        if fresh and split is None and labels is None:
            text = (input_ids, attention_mask, position_ids)
            outputs = read_short(self, *text, past_key_values, memory, use_cache, kwargs, just_examined=examined)
        if outputs is None:
            context = None if memory is None else self._context_of(memory, inputs.shape, inputs.device)
            injected = {} if context is None else {"injected_context": context}
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE_NAME: past_key_values},
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                return_dict=True,
                **injected,
                **kwargs,
            )
        used_cache = cache_of(outputs)
        if used_cache is not None and not compiling:
            if memory is not None:
                remember_memory(used_cache, memory)
            elif fresh:
                forget_memory(used_cache)
            # a generate that has split its prompt remembers the whole of it
            if fresh and not removed_tokens():
                remember_prompt(used_cache, prompt)
        hidden, loss = outputs.last_hidden_state, None
        if split is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if labels is None:
            logits = self._logits(hidden[:, kept] if split is None else split.spread(hidden, kept))
        else:
            # the loss is of all labels, whichever logits are returned
            logits = self._logits(hidden)
            counting = labels if split is None else split.drop_first(labels)
            loss = self.loss_function(logits=logits, labels=counting, vocab_size=self.config.vocab_size, **kwargs)
            logits = logits[:, kept] if split is None else split.spread(logits, kept)
        if split is not None:
            logits = split.hide_context(logits, kept)
        return SharedLLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: used_cache},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            memory=memory,
        )


# this shows whether a subclass reads its inputs in another way
SharedLLMForCausalLM._own_forward = SharedLLMForCausalLM.forward
keep_signatures(SharedLLMForCausalLM.forward, SharedLLMForCausalLM.prepare_inputs_for_generation)

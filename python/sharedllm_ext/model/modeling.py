"""The SharedLLM model: compressor and decoder assembled around a base checkpoint's own Transformers modules."""

import copy
import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, initialization
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .base_checkpoint import build_from_base
from .cache_name import CACHE_NAME, cache_of, one_cache
from .cached_memory import forget_memory, has_read, remember_memory, remembered_memory
from .compressor import (
    Chunk,
    LowerModel,
    TreeShape,
    activation_bytes,
    choose_nodes,
    compress_chunks,
    cut_into_chunks,
    embed_tokens,
    micro_batch,
    query_vectors,
    upload,
)
from .configuration import SharedLLMConfig
from .decoding import removed_tokens
from .families import FAMILIES, projection
from .generation import ContextGeneration
from .injection import InjectedAttention, InjectedContext, install_injection, install_steps
from .inputs import (
    check_embeds,
    check_ids,
    check_keywords,
    check_labels,
    check_labels_given,
    check_mask,
    check_not_empty,
    check_query,
    check_running_text,
    check_shape_of_labels,
    labels_of_shifted,
    query_of,
    say_past_window,
)
from .layer_math import Fp8Products, Products, install_fused, refuse_fp8
from .loading import check_loaded
from .managed_layers import check_whole, device_of
from .memory import ContextMemory
from .reading import say_if_it_cannot_read
from .rotary import LayerTables, RopeTables, Rotation, rotations_of
from .signature import Fingerprint, Subject, describe_difference, has_details, memory_signature
from .split import refuse_packed, split_open_end, split_rows
from .split_prompt import SplitPrompt, mask_over_cache, remember_prompt
from .stopwatch import Stopwatch
from .training_mark import TrainingMark, is_training_mark

# The number of chunks, nodes and slots follows from the ids' values.
_NOT_TRACED = "compress the context first (memory = model.compress(context_ids, …)) and give forward the memory"
# Larger micro-batches make products no faster; on CUDA 4.4 GB of activations for an 8B model. On the CPU activations of
# more than 32 MiB come from fresh pages each time, which the system clears first.
_MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}


@dataclasses.dataclass
class SharedLLMOutput(CausalLMOutputWithPast):
    """Output of :class:`SharedLLMForCausalLM`: Transformers' causal language model output and the memory it read."""

    memory: ContextMemory | None = None


class SharedLLMForCausalLM(ContextGeneration):
    """A causal language model that reads long contexts through a compressed memory (SharedLLM).

    The ``M`` lowest layers compress ``context_ids`` into a :class:`ContextMemory`; the whole model decodes the running
    text ``input_ids`` and reads the memory in its ``M`` lowest layers. Build one from a base checkpoint with
    :meth:`from_base`, or load one with ``from_pretrained``.
    """

    config_class = SharedLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
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
        self.compressor: Any = None if config.tie_compressor else AutoModel.from_config(_lower_config(config))
        if self.compressor is not None:
            install_steps(self.compressor.layers)
        install_fused(self)
        self._watch: Stopwatch | None = None
        self._fp8_products: Fp8Products | None = None
        self._tables = RopeTables()
        self._fingerprint = Fingerprint()
        self._training_mark = TrainingMark()
        self._said_past_window = self._said_it_cannot_read = False
        self._reads_context: tuple[Any, bool] | None = None
        self.post_init()
        # those that are there: FSDP's wrapping policies look for every one of them
        self._no_split_modules = {type(layer).__name__ for layer in self._all_layers()}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, InjectedAttention):
            initialization.zeros_(module.o_proj.weight)

    def initialize_weights(self) -> None:
        """Initialise the weights that were not loaded."""
        super().initialize_weights()
        # the nested model's own initialisation, which comes first, does not know these
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
                Qwen3-MoE, SmolLM3, Phi-3/Phi-4, Gemma 3 or Granite), a ``.gguf`` file of one of the first four, which
                is dequantised, or such a model; its parameters are shared, not copied. Layers that bitsandbytes,
                torchao or others have quantised stay so; the new blocks are not quantised.
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
        return build_from_base(cls, base, loading, fields)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing to do: every saved folder names this package, whose source needs no copy there."""

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
            ValueError: decoder and compressor have vocabularies of different sizes, which could not be loaded.
        """
        self._check_vocabularies()
        super().save_pretrained(*args, **kwargs)

    def _check_vocabularies(self) -> None:
        if self.compressor is None:
            return
        expected, got = (getattr(m.embed_tokens, "num_embeddings", None) for m in (self.model, self.compressor))
        if expected != got and expected is not None and got is not None:
            raise ValueError(
                f"compressor: expected an embedding of {expected} tokens as in the decoder, got {got}; "
                "resize_token_embeddings of the whole model changes both"
            )

    @property
    def lower_model(self) -> LowerModel:
        """The compressor's modules; the decoder's own while they are tied."""
        source = self.model if self.compressor is None else self.compressor
        return LowerModel(source.embed_tokens, source.layers[: self.config.injection_layers], source.norm)

    @property
    def device(self) -> torch.device:
        """The device that inputs come on and that the first layer computes on."""
        return device_of(self.model.embed_tokens)

    def _all_layers(self) -> list[Any]:
        """The decoder's layers, and the compressor's own."""
        return [*self.model.layers, *([] if self.compressor is None else self.compressor.layers)]

    @property
    def injected_blocks(self) -> list[InjectedAttention]:
        """The ``M`` injected attention blocks."""
        return [layer.injection for layer in self.model.layers[: self.config.injection_layers]]

    # -- compression --------------------------------------------------------------------------------------------------

    @torch.compiler.disable(reason=_NOT_TRACED)
    def compress(
        self,
        context_ids: Tensor,
        context_attention_mask: Tensor | None = None,
        query_ids: Tensor | None = None,
        query_attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        progress: Callable[[int], None] | None = None,
        query_embeds: Tensor | None = None,
        training: bool | None = None,
    ) -> ContextMemory:
        """Compress past contexts into a memory.

        Gradients reach the compressor in training mode only. There the model reads the memory until its weights change:
        one context may serve several questions, whose losses are summed before the backward pass.

        Args:
            context_ids: ``[B, C]`` integers, one document a row; rows may be ragged, see the mask.
            context_attention_mask: ``[B, C]``, 0 for padding (on either side); default: no padding.
            query_ids: ``[B, L]`` the running text whose last token picks the nodes (``config.query_aware``); without it
                the right children are taken, as for language modelling.
            query_attention_mask: ``[B, L]``, 0 for padding; a row without any token uses the right children.
            generator: source of the split noise (training mode, ``config.split_noise > 0``).
            progress: called with the context tokens compressed so far, after every micro-batch.
            query_embeds: ``[B, L, d]`` embeddings of the query, instead of ``query_ids``.
            training: whether it is for training (gradients, split noise, checkpoints); default: the model's mode.

        Returns:
            The memory; a document without tokens has no slots.

        Raises:
            ValueError: shapes, dtypes, devices or token ids that cannot be; the message names what was expected.
        """
        if torch.compiler.is_exporting():
            raise ValueError(f"compress: expected to run outside of torch.export, got a call inside; {_NOT_TRACED}")
        lower = self.lower_model
        check_whole("compress", lower.embed_tokens)
        watch = Stopwatch(self.device)
        training = self.training if training is None else training
        with torch.set_grad_enabled(training and torch.is_grad_enabled() and _any_trainable(lower)):
            work = self._prepare(context_ids, context_attention_mask, query_ids, query_attention_mask, query_embeds)
            watch.lap("retrieve")
            memory = self._compress_in_micro_batches(lower, work, generator, watch, progress, training)
        watch.lap("compress")
        watch.facts = {"context_tokens": sum(work.lengths), "chunks": len(work.chunks), "slots": memory.num_slots}
        self._watch = watch
        return memory

    @torch.no_grad()
    def retrieve(
        self,
        context_ids: Tensor,
        context_attention_mask: Tensor | None = None,
        query_ids: Tensor | None = None,
        query_attention_mask: Tensor | None = None,
        query_embeds: Tensor | None = None,
    ) -> list[tuple[Tensor, Tensor | None]]:
        """The nodes that :meth:`compress` retains, to see what a query picks; arguments as there.

        Returns:
            For each document: nodes ``[n, tree_depth + 1, 2]`` int64, (first token, length) in the document, in slot
            order (leaf left, leaf right, then from the deepest level to the chunk's child); and the cosine similarities
            of left and right child at each level, ``[n, tree_depth - 1, 2]``, -inf for an empty child, or ``None``
            without a query.
        """
        lower = self.lower_model
        check_whole("retrieve", lower.embed_tokens)
        work = self._prepare(context_ids, context_attention_mask, query_ids, query_attention_mask, query_embeds)
        found: list[tuple[Tensor, Tensor | None]] = []
        for document, count in enumerate(work.counts):
            chunks = [chunk for chunk in work.chunks if chunk.document == document]
            if not chunks:
                found.append((torch.empty((0, self.config.tree_depth + 1, 2), dtype=torch.int64), None))
                continue
            part = work.ids[chunks[0].start : chunks[-1].start + chunks[-1].length]
            embeddings = embed_tokens(lower, part)
            shape = self._tree_shape(self.training)
            tree = choose_nodes(lower, embeddings, chunks, shape, work.tables, work.query, work.has_query)
            assert tree.nodes.shape[0] == count
            found.append((tree.nodes, tree.similarity))
        return found

    def _prepare(
        self,
        context_ids: Tensor,
        context_mask: Tensor | None,
        query_ids: Tensor | None,
        query_mask: Tensor | None,
        query_embeds: Tensor | None,
    ) -> "_Work":
        """Check and pack the inputs, cut the chunks, compute tables and query vectors."""
        self._check_vocabularies()
        check_ids(self, "context_ids", context_ids, range_too=True)
        mask = check_mask("context_attention_mask", context_mask, "context_ids", context_ids)
        lengths = [context_ids.shape[1]] * context_ids.shape[0] if mask is None else mask.sum(1).tolist()
        ids = context_ids.flatten() if mask is None else context_ids[mask]
        size = self.config.chunk_size
        counts = [-(-length // size) for length in lengths]
        queries = self._rows_with_query(query_ids, query_mask, query_embeds, len(lengths))
        longest = 0 if queries is None else max(queries[1], default=0)
        tables = self._rope_tables(max([size, longest, *counts]) + size, context_ids.device)
        query = has_query = None
        if queries is not None and longest:
            has_query = [length > 0 for length in queries[1]]
            upper = LowerModel(self.model.embed_tokens, self.model.layers[:1], self.model.norm)
            query = query_vectors(upper, *queries, tables)
        return _Work(ids, lengths, cut_into_chunks(lengths, size), counts, tables, query, has_query)

    def _tree_shape(self, training: bool) -> TreeShape:
        noise = self.config.split_noise if training else 0.0
        return TreeShape(self.config.tree_depth, self.config.slots_per_node, float(noise))

    @property
    def last_timings(self) -> dict[str, float]:
        """Of the latest :meth:`compress`: seconds in ``retrieve`` (query vector and choice of nodes) and ``compress``
        (everything else), and the counts ``context_tokens``, ``chunks`` and ``slots``. Empty before the first."""
        return {} if self._watch is None else self._watch.read()

    def _compress_in_micro_batches(
        self,
        lower: LowerModel,
        work: "_Work",
        generator: torch.Generator | None,
        watch: Stopwatch,
        progress: Callable[[int], None] | None,
        training: bool,
    ) -> ContextMemory:
        config, ids, lengths, chunks, counts = self.config, work.ids, work.lengths, work.chunks, work.counts
        shape = self._tree_shape(training)
        checkpointing = training and bool(getattr(self.model, "gradient_checkpointing", False))
        pieces: list[list[Tensor]] = [[] for _ in range(2 * len(lower.layers))]
        store: list[Tensor] | None = None
        slots_by_chunk: list[int] = []
        room = sum(min(chunk.length, (config.tree_depth + 1) * config.slots_per_node) for chunk in chunks)
        if not chunks or not torch.is_grad_enabled():
            # the whole memory at once: appending would copy it again and again
            store = self._memory_store(lower, room, ids.device)
        products = self._products(lower)
        limit = config.micro_batch_tokens or self._micro_batch_tokens(lower, ids.device)
        first = 0
        while first < len(chunks):
            batch = micro_batch(chunks, first, limit)
            part = ids[batch[0].start : batch[-1].start + batch[-1].length]
            failure: str | None = None
            try:
                keys, values, slots = compress_chunks(
                    lower,
                    part,
                    batch,
                    shape,
                    work.tables,
                    work.query,
                    work.has_query,
                    generator,
                    checkpointing,
                    watch,
                    products,
                )
            except RuntimeError as error:
                if not _is_out_of_memory(error, self.device):
                    raise
                failure = str(error).split("\n", maxsplit=1)[0]
            if failure is not None:
                # outside of the handler, which would keep the failed call's tensors alive
                torch.cuda.empty_cache()
                if config.micro_batch_tokens is None and len(batch) > 1 and store is not None:
                    limit = part.numel() // 2
                    continue
                raise torch.OutOfMemoryError(self._out_of_memory(lower, part.numel(), store, failure))
            first += len(batch)
            written = sum(slots_by_chunk)
            slots_by_chunk += slots
            if store is None:
                for piece, tensor in zip(pieces, (*keys, *values), strict=True):
                    piece.append(tensor)
            else:
                for target, tensor in zip(store, (*keys, *values), strict=True):
                    target[written : written + tensor.shape[0]] = tensor
            if progress is not None:
                progress(batch[-1].start + batch[-1].length)
        total = sum(slots_by_chunk)
        tensors = [torch.cat(piece) for piece in pieces] if store is None else [target[:total] for target in store]
        by_document = [0] * len(lengths)
        for chunk, slots_of_chunk in zip(chunks, slots_by_chunk, strict=True):
            by_document[chunk.document] += slots_of_chunk
        cu_slots = [0]
        for count in by_document:
            cu_slots.append(cu_slots[-1] + count)
        half = len(lower.layers)
        return ContextMemory(
            keys=tensors[:half],
            values=tensors[half:],
            cu_slots=cu_slots,
            num_chunks=counts,
            num_tokens=lengths,
            memory_index=list(range(len(lengths))),
            # weights in training change with every step, too often for a digest of them
            signature=self.memory_signature(fingerprint=not training),
        )

    def _products(self, lower: LowerModel) -> Products:
        if self.config.compressor_precision == "model":
            self._fp8_products = None
            return Products()
        if torch.is_grad_enabled():
            raise ValueError("compressor_precision: expected 'model' for a compressor in training, got 'fp8'")
        refuse_fp8(lower.layers)
        if self._fp8_products is None:
            self._fp8_products = Fp8Products()
        return self._fp8_products

    def _memory_store(self, lower: LowerModel, slots: int, device: torch.device) -> list[Tensor]:
        attention, layers = lower.layers[0].self_attn, len(lower.layers)
        dtype = self._memory_dtype(projection(attention, "v"), device)
        shape = (slots, projection(attention, "k").out_features // attention.head_dim, attention.head_dim)
        try:
            return [torch.empty(shape, dtype=dtype, device=device) for _ in range(2 * layers)]
        except torch.OutOfMemoryError:
            # the message comes after the handler, which would keep what could be allocated alive
            pass
        torch.cuda.empty_cache()
        needed = 2 * layers * slots * shape[1] * shape[2] * dtype.itemsize
        raise torch.OutOfMemoryError(
            f"context memory: expected {needed / 1e9:.2f} GB of free device memory for {slots} slots in {layers} "
            f"layers, got {_free_bytes(device) / 1e9:.2f} GB; fewer injection_layers, fewer slots_per_node, a larger "
            "chunk_size or a shorter context needs less"
        )

    def _memory_dtype(self, module: Any, device: torch.device) -> torch.dtype:
        """Dtype of the keys and values that a compressor's value projection gives."""
        weight = getattr(module, "weight", None)
        dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else self.dtype
        if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
            return torch.get_autocast_dtype(device.type)
        return dtype

    def _micro_batch_tokens(self, lower: LowerModel, device: torch.device) -> int:
        """Tokens of a micro-batch when the configuration names none."""
        most = _MICRO_BATCH_TOKENS.get(device.type, _MICRO_BATCH_TOKENS["cpu"])
        if device.type != "cuda":
            return most
        return max(1, min(most, int(0.95 * _free_bytes(device)) // activation_bytes(lower)))

    def _out_of_memory(self, lower: LowerModel, tokens: int, store: list[Tensor] | None, failure: str) -> str:
        needed, device = tokens * activation_bytes(lower), self.device
        kept = sum(tensor.nbytes for tensor in store or ())
        knob = (
            f"micro_batch_tokens below {tokens}" if store is not None else "gradient checkpointing or a shorter context"
        )
        return (
            f"compress: expected about {needed / 1e9:.2f} GB of free device memory for the activations of {tokens} "
            f"context tokens beside {kept / 1e9:.2f} GB of context memory, got {_free_bytes(device) / 1e9:.2f} GB; "
            f"{knob} (config.micro_batch_tokens is {self.config.micro_batch_tokens}) needs less ({failure})"
        )

    def _rows_with_query(
        self, query_ids: Tensor | None, mask: Tensor | None, query_embeds: Tensor | None, documents: int
    ) -> tuple[Tensor, list[int]] | None:
        """Packed query tokens (or their embeddings) and how many each document has; ``None`` without a query."""
        if query_ids is not None and query_embeds is not None:
            raise ValueError("query_ids, query_embeds: expected at most one of them, got both")
        query = query_ids if query_embeds is None else query_embeds
        if query is None:
            if mask is not None:
                raise ValueError("query_attention_mask: expected query_ids with it, got none")
            return None
        name = "query_ids" if query_embeds is None else "query_embeds"
        if query_embeds is None:
            check_ids(self, name, query, range_too=True)
        else:
            check_embeds(self, name, query)
        if query.shape[0] != documents:
            raise ValueError(
                f"{name}: expected {documents} rows, one for each row of context_ids, got {query.shape[0]}"
            )
        used = check_mask("query_attention_mask", mask, name, query)
        if not self.config.query_aware:
            return None
        if used is None:
            return query.flatten(0, 1), [query.shape[1]] * documents
        return query[used], used.sum(1).tolist()

    def _rotations(self, layers: Iterable[Any] | None = None) -> dict[str, Rotation]:
        """The rotations of decoder layers by name; default: those that read the memory."""
        own = self.model.layers[: self.config.injection_layers] if layers is None else layers
        return rotations_of(self.model.rotary_emb, own)

    def _rope_tables(self, rows: int, device: torch.device, layers: Iterable[Any] | None = None) -> LayerTables:
        """cos and sin of decoder layers, at least ``rows`` positions; default: of those that read the memory."""
        return self._tables.get(self._rotations(layers), rows, device)

    # -- memories and models ------------------------------------------------------------------------------------------

    def memory_signature(self, *, fingerprint: bool = True, details: bool = True) -> dict[str, Any]:
        """What a memory must share with the model that reads it: sizes, tree, and what the compressor computes.

        Args:
            fingerprint: whether to tell the weights; else, for a memory of a model in training, their place holds a
                mark of the compressor as it is now, good in this process until it changes.
            details: whether to tell more than sizes and weights. That runs the compressor on a few fixed tokens, once
                for as long as nothing in it changes.
        """
        subject = Subject(self.lower_model, self._rotations(), self._rope_tables, self.config.chunk_size)
        if fingerprint:
            return memory_signature(self.config, subject, self._fingerprint.of(subject, details=details))
        return memory_signature(self.config, subject, {"weights": self._training_mark.of(subject)})

    def check_memory(self, memory: ContextMemory) -> None:
        """Refuse a memory that another model or tree has made; or this one in training, before its weights changed.

        Raises:
            TypeError: not a :class:`ContextMemory`.
            ValueError: names the first difference.
        """
        if not isinstance(memory, ContextMemory):
            raise TypeError(f"memory: expected a ContextMemory, got {type(memory).__name__}")
        in_training = is_training_mark(memory.signature.get("weights"))
        signature = self.memory_signature(fingerprint=not in_training, details=has_details(memory.signature))
        difference = describe_difference(signature, memory.signature)
        if difference is not None and in_training and difference.startswith("weights: "):
            raise ValueError(
                "memory: expected one made since the weights last changed, got one made in training before a step or "
                "by another model; compress the context again after every step"
            )
        if difference is not None:
            raise ValueError(f"memory: made by another model or another setting of this one; {difference}")

    def _injected_context(
        self, memory: ContextMemory, batch: int, length: int, device: torch.device
    ) -> InjectedContext:
        if memory.batch_size == 1 and batch > 1:
            memory = memory.expand(batch)
        if memory.batch_size != batch:
            raise ValueError(f"memory: expected {batch} batch rows as in input_ids, or 1, got {memory.batch_size}")
        if memory.device != device:
            raise ValueError(
                f"memory: expected device {device} as input_ids, got {memory.device}; use memory.to({str(device)!r})"
            )
        positions = [memory.num_chunks[i] + self.config.query_position_offset for i in memory.memory_index]
        layers = self.model.layers[: self.config.injection_layers]
        tables = self._rope_tables(max([0, *positions]) + 1, device)
        return InjectedContext(
            keys=memory.keys,
            values=memory.values,
            cu_q=torch.arange(batch + 1, device=device) * length,
            slot_range=upload(torch.tensor(memory.slot_ranges(), dtype=torch.int64).view(batch, 2), device),
            q_position=upload(torch.tensor(positions, dtype=torch.int64), device),
            cos=[tables.of(layer)[0] for layer in layers],
            sin=[tables.of(layer)[1] for layer in layers],
        )

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

        split = None
        query_mask = attention_mask
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
        elif memory is not None and not compiling and (fresh or not has_read(past_key_values, memory)):
            self.check_memory(memory)
        if memory is not None and fresh and not compiling:
            say_if_it_cannot_read(self)
        if split is None and split_window and not compiling and not self._said_past_window:
            say_past_window(self, inputs.shape[1], attention_mask, None if fresh else past_key_values)

        injected = {}
        if memory is not None:
            injected["injected_context"] = self._injected_context(
                memory, inputs.shape[0], inputs.shape[1], inputs.device
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: past_key_values},
            inputs_embeds=inputs_embeds,
            use_cache=self.config.text_config.use_cache if use_cache is None else use_cache,
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


@dataclasses.dataclass(frozen=True)
class _Work:
    """What one call of compress works on: packed tokens, their documents and chunks, tables, query vectors."""

    ids: Tensor
    lengths: list[int]
    chunks: list[Chunk]
    counts: list[int]
    tables: LayerTables
    query: Tensor | None
    has_query: list[bool] | None


def _free_bytes(device: torch.device) -> int:
    """Device memory that an allocation could get: free on the device, or cached by PyTorch and unused."""
    if device.type != "cuda":
        return 0
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _is_out_of_memory(error: RuntimeError, device: torch.device) -> bool:
    """Whether device memory ran out: PyTorch has a class for it, but what an extension's operator raises has not."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return device.type == "cuda" and str(error).startswith("out of memory: ")


def _lower_config(config: SharedLLMConfig) -> PreTrainedConfig:
    """Configuration of a compressor with its own weights: the base checkpoint's with ``M`` layers."""
    lower = copy.deepcopy(config.text_config)
    lower.num_hidden_layers = config.injection_layers
    if getattr(lower, "layer_types", None) is not None:
        lower.layer_types = lower.layer_types[: config.injection_layers]
    return lower


def _any_trainable(lower: LowerModel) -> bool:
    modules = (lower.embed_tokens, lower.norm, *lower.layers)
    return any(
        parameter.requires_grad
        for module in modules
        for name, parameter in module.named_parameters()
        if not name.startswith("injection.")
    )

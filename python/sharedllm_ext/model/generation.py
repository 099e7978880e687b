"""Generate: the one room that overrides private parts of Transformers' generation, and follows its versions."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMixin

from .cache_name import CACHE_NAME, take_cache
from .decoding import (
    PreallocatedCache,
    add_run_ahead,
    begin_generate,
    end_generate,
    expect_steps,
    new_cache,
    offer_call,
    supports,
    take_call,
)
from .inputs import check_ids, check_not_empty, check_running_text, query_of, trusted_ids
from .split import split_rows


class ContextGeneration(PreTrainedModel, GenerationMixin):
    """What a model that reads a context memory does in ``generate``; the model itself gives everything else."""

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self: Any,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Generate after a running text, given ``context_ids`` or ``memory``; arguments as for Transformers' generate.

        The context is compressed once. ``input_ids`` longer than ``config.window``, without context or memory, are
        split as in :meth:`forward`; the result still begins with all of them.
        """
        context_ids = kwargs.pop("context_ids", None)
        context_mask = kwargs.pop("context_attention_mask", None)
        memory = kwargs.pop("memory", None)
        if context_ids is not None and memory is not None:
            raise ValueError("context_ids, memory: expected at most one of them, got both")
        if context_ids is None and context_mask is not None:
            raise ValueError("context_attention_mask: expected context_ids with it, got none")
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        attention_mask = kwargs.get("attention_mask")
        past = take_cache(kwargs)
        whole = None
        if input_ids is not None:
            check_ids(self, "input_ids", input_ids, range_too=True)
            check_not_empty(input_ids)
            if memory is None and context_ids is None and (past is None or past.get_seq_length() == 0):
                if attention_mask is None and input_ids.shape[1] > self.config.window:
                    attention_mask = self._mask_of_padding(input_ids, generation_config)
                split = split_rows(self.config.window, input_ids, attention_mask)
                if split is not None:
                    context_ids, context_mask = split.context_ids, split.context_mask
                    whole = input_ids
                    input_ids, attention_mask = split.input_ids, split.attention_mask
                    removed = whole.shape[1] - input_ids.shape[1]
                    generation_config = self._shorten(generation_config, kwargs, removed)
                    if attention_mask is not None:
                        kwargs["attention_mask"] = attention_mask
        if context_ids is not None:
            modes = [(module, module.training) for module in self.modules()]
            check_running_text(self, "input_ids", input_ids, attention_mask if past is None else None, context_ids)
            query_ids, query_mask = query_of(self.config.query_aware, input_ids, attention_mask, None)
            try:
                memory = self.eval().compress(context_ids, context_mask, query_ids, query_mask)
            finally:
                for module, mode in modes:
                    module.training = mode
        elif memory is not None:
            self.check_memory(memory)
            rows = (
                input_ids.shape[0]
                if input_ids is not None
                else kwargs["inputs_embeds"].shape[0]
                if "inputs_embeds" in kwargs
                else 1
            )
            if memory.batch_size == 1 and rows > 1:
                memory = memory.expand(rows)
        if memory is not None:
            kwargs["memory"] = memory
        parent: Any = super()
        seen = True  # whether somebody else may hold the cache
        generating = None
        try:
            # other loops may ask the criteria about tokens that they do not keep
            generating = begin_generate(may_run_ahead=kwargs.get("custom_generate") is None)
            with trusted_ids(self if input_ids is not None else None):
                result = parent.generate(input_ids, generation_config, *args, **kwargs)
            seen = not isinstance(result, Tensor) or "custom_generate" in kwargs
        finally:
            end_generate(self, seen, generating)
        if whole is None:
            return result
        sequences = result if isinstance(result, Tensor) else result.sequences
        answers = sequences[:, input_ids.shape[1] :]
        sequences = torch.cat((whole.repeat_interleave(sequences.shape[0] // whole.shape[0], 0), answers), 1)
        if isinstance(result, Tensor):
            return sequences
        result.sequences = sequences
        return result

    def _mask_of_padding(self, input_ids: Tensor, generation_config: GenerationConfig | None) -> Tensor | None:
        """Mask of leading padding when the caller gave none, as Transformers infers it."""
        settings = generation_config or self.generation_config
        pad, eos = settings.pad_token_id, settings.eos_token_id
        stops = eos if isinstance(eos, list) else [eos]
        if pad is None or pad in stops or not bool((input_ids == pad).any()):
            return None
        return (input_ids != pad).long()

    def _shorten(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any], removed: int
    ) -> GenerationConfig | None:
        """Lengths that count the prompt must not count the part of it that became context."""
        for name in ("max_length", "min_length"):
            if kwargs.get(name) is not None:
                kwargs[name] = max(kwargs[name] - removed, 0)
        if generation_config is None:
            return None
        generation_config = copy.deepcopy(generation_config)
        for name in ("max_length", "min_length"):
            value = getattr(generation_config, name, None)
            if value:
                setattr(generation_config, name, max(value - removed, 0))
        return generation_config

    def _prepare_cache_for_generation(  # type: ignore[override]
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """A cache that stays in place, where decoding steps can use it."""
        plain = generation_config.use_cache is not False and generation_config.cache_implementation is None
        single = str(getattr(generation_mode, "value", generation_mode)) in ("greedy_search", "sample")
        cache = model_kwargs.get(CACHE_NAME)
        if plain and single and cache is None and supports(self):
            limit = kwargs.get("max_cache_length", args[1] if len(args) > 1 else None)
            cache = model_kwargs[CACHE_NAME] = new_cache(self, limit)
            expect_steps(cache)
            return None
        # drafts are short, and mostly other tokens come next
        if single and type(cache) is PreallocatedCache and not getattr(generation_config, "is_assistant", False):
            expect_steps(cache)
        parent: Any = super()
        return parent._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        parent: Any = super()
        criteria = parent._get_stopping_criteria(*args, **kwargs)
        add_run_ahead(criteria)
        return criteria

    def _valid_auto_compile_criteria(  # type: ignore[override]
        self: Any, model_kwargs: dict[str, Any], generation_config: Any
    ) -> bool:
        if offer_call(self, model_kwargs, generation_config):
            return True
        parent: Any = super()
        return parent._valid_auto_compile_criteria(model_kwargs, generation_config)

    def get_compiled_call(self, compile_config: Any) -> Any:  # type: ignore[override]
        """The forward pass of a generate's decoding steps: a CUDA graph where there can be one."""
        parent: Any = super()
        return take_call() or parent.get_compiled_call(compile_config)

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        memory = kwargs.pop("memory", None)
        parent: Any = super()
        input_ids, model_kwargs = parent._expand_inputs_for_generation(*args, **kwargs)
        if memory is not None:
            expand_size = kwargs.get("expand_size", args[0] if args else 1)
            model_kwargs["memory"] = memory.expand(expand_size) if expand_size > 1 else memory
        return input_ids, model_kwargs

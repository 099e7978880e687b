"""Generate: the only module that overrides private parts of Transformers' generation, and follows its versions."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMixin, MaxLengthCriteria
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from ..counted import counted
from .cache_name import CACHE_NAME, take_cache
from .cached_memory import remembered_memory
from .decoding.cache import PreallocatedCache
from .decoding.session import (
    add_run_ahead,
    begin_generate,
    end_generate,
    expect_steps,
    new_cache,
    offer_call,
    removed_tokens,
    take_call,
    was_examined,
)
from .decoding.support import is_single, obstacle_in_cache, obstacle_in_model, obstacle_in_settings, say_slow
from .inputs import check_ids, check_not_empty, check_running_text, end_ids, query_of, say_past_window, trusted_ids
from .memory import ContextMemory, choosing_alike
from .outputs import with_memory
from .passage_reading import PassageRequest
from .reading import say_if_it_cannot_read
from .rotary import switch_of
from .signature_fields import describe_difference
from .slow_paths import say_slow_parts
from .split import Split, split_rows
from .split_prompt import (
    RunningTextCandidates,
    SplitPrompt,
    for_assistant,
    remember_prompt,
    remembered_prompt,
    without_padding,
)


def _can_read(model: Any, memory: ContextMemory) -> bool:
    """Whether the memory is of this model's compressor, and has the model's device and dtype."""
    fits = (memory.dtype, memory.device) == (model.dtype, model.device)
    return fits and describe_difference(model.memory_signature(), memory.signature) is None


class ContextGeneration(PreTrainedModel, GenerationMixin):
    """Mixin of the model: ``generate`` with a context memory."""

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self: Any,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Generate after a running text, given ``context_ids`` or ``memory``; arguments as for Transformers' generate.

        The context is compressed once, as in evaluation, whatever the model's mode is. ``input_ids`` longer
        than ``config.window``, without context or memory, are split once, as in :meth:`forward` with a mask: of each
        row the last ``window`` tokens are running text. Lengths, logits processors, stopping criteria, streamers and
        the result refer to the whole text; ``split_window=False`` reads a long text as it is. Rows may be padded on
        either side: an answer continues from the row's last token.

        Tokens join the running text, which may grow past ``config.window``: none of it becomes context.

        A cache that an earlier call has filled is read with the memory of that call, unless another is given. If that
        call split its prompt, ``input_ids`` are the whole text again, or only what is new with an attention mask over
        everything, or running text that goes on from that of the cache.

        An assistant model reads the running text, and the memory too if it has the same compressor.

        With ``passages``, ``input_ids`` are questions: the model reads passages of ``context_ids`` in front of each, by
        ``config.passage_prompt``. The loop and the result know the questions alone.

        Args:
            inputs: ``[B, L]`` token ids, also by the name ``input_ids``.
            generation_config: as for Transformers.
            args: as for Transformers.
            kwargs: as for Transformers, and of :meth:`forward` ``context_ids``, ``context_attention_mask``, ``memory``,
                ``query_ids``, ``query_attention_mask`` and ``split_window``. Of its own ``passages``, how many to find
                for ``query_ids`` (default: ``input_ids``), or what :meth:`find_passages` has found; with it
                ``tokenizer``, and ``answer_begin``, the text with which the answer begins; a ``memory``, also one in
                tiers, then comes with its ``context_ids`` or knows them, or it is made here.

        Returns:
            ``[B, L + n]`` token ids; with ``return_dict_in_generate=True`` Transformers' output with an additional
            ``memory`` and ``passages``.

        Raises:
            ValueError: inputs that contradict each other; the message names what was expected and what came.
        """
        context_ids = kwargs.pop("context_ids", None)
        context_mask = kwargs.pop("context_attention_mask", None)
        memory = kwargs.pop("memory", None)
        query_ids, query_mask = kwargs.pop("query_ids", None), kwargs.pop("query_attention_mask", None)
        split_window = kwargs.pop("split_window", True)
        request, found = PassageRequest.take(kwargs), None
        if context_ids is not None and memory is not None and request is None:
            raise ValueError("context_ids, memory: expected at most one of them, got both")
        if context_ids is None and context_mask is not None:
            raise ValueError("context_attention_mask: expected context_ids with it, got none")
        if context_ids is None and query_ids is not None and request is None:
            raise ValueError("query_ids: expected context_ids with it, got none")
        if kwargs.get("cache_implementation") == "paged":
            raise ValueError(
                "cache_implementation: expected one for a single generate, got 'paged', which batches many"
            )
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        past = take_cache(kwargs)
        cached = 0 if past is None else past.get_seq_length()
        # of a conversation, whose earlier text is in the memory
        prompt = kwargs.pop("split_prompt", None)
        if input_ids is not None:
            check_ids(self, "input_ids", input_ids, range_too=True)
            check_not_empty(input_ids)
        if request is not None:
            mask = None if input_ids is None else self._mask_of(input_ids, generation_config, kwargs)
            context, query = (context_ids, context_mask), (query_ids, query_mask)
            memory, prompt, found = request.read(self, input_ids, mask, context, memory, query, cached)
            context_ids = query_ids = None
        elif cached:
            chosen = memory is not None or context_ids is not None
            prompt = self._follow(remembered_prompt(past), input_ids, cached, chosen, kwargs)
            if not chosen:
                memory = remembered_memory(past)
            if prompt is None and input_ids is not None:
                self._check_whole(input_ids, cached, kwargs.get("attention_mask"))
        elif input_ids is not None and split_window and memory is None and context_ids is None:
            split = self._split(input_ids, generation_config, kwargs)
            if split is not None:
                context_ids, context_mask = split.context_ids, split.context_mask
                prompt = SplitPrompt.of(input_ids, split, self._mask_of(input_ids, generation_config, kwargs))
                if kwargs.get("position_ids") is not None:
                    kwargs["position_ids"] = split.take(kwargs["position_ids"])
        if prompt is None and input_ids is not None and not cached:
            prompt = self._align(input_ids, generation_config, kwargs)
        text = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        if prompt is not None:
            text = prompt.running
            self._give(prompt, generation_config, kwargs)
        mask = kwargs.get("attention_mask")
        if context_ids is not None:
            name = "input_ids" if input_ids is not None else "inputs_embeds"
            check_running_text(self, name, text, mask if past is None else None, context_ids)
            if query_ids is None:
                query_ids, query_mask = query_of(self.config.query_aware, text, mask, None)
            embedded = query_ids is not None and query_ids.dim() == 3
            memory = self.compress(
                context_ids,
                context_mask,
                None if embedded else query_ids,
                query_mask,
                query_embeds=query_ids if embedded else None,
                training=False,
            )
        elif memory is not None:
            self.check_memory(memory)
            rows = 1 if text is None else text.shape[0]
            if memory.batch_size == 1 and rows > 1:
                memory = memory.expand(rows)
        if memory is not None:
            kwargs["memory"] = memory
            say_if_it_cannot_read(self)
        if not split_window:
            kwargs["split_window"] = False
        say_slow_parts(self)
        parent: Any = super()
        seen = True  # whether somebody else may hold the cache
        generating = None
        try:
            # other loops may check criteria for tokens that they do not keep
            may_run_ahead = kwargs.get("custom_generate") is None
            removed = 0 if prompt is None else prompt.removed
            generating = begin_generate(self, may_run_ahead, removed, memory, made=context_ids is not None)
            alike = choosing_alike(memory, text, generation_config or self.generation_config, args, kwargs)
            with trusted_ids(self if input_ids is not None else None), alike:
                result = parent.generate(input_ids, generation_config, *args, **kwargs)
            seen = not isinstance(result, Tensor) or "custom_generate" in kwargs
        finally:
            end_generate(self, seen, generating)
        if split_window and not self._said_past_window and isinstance(getattr(result, "sequences", result), Tensor):
            self._say_past_window(getattr(result, "sequences", result), text, prompt, input_ids, mask, cached)
        return with_memory(result, memory, found)

    def _split(self: Any, input_ids: Tensor, generation_config: Any, kwargs: dict[str, Any]) -> Split | None:
        """How a fresh prompt is split, ``None`` for one within the window."""
        if input_ids.shape[1] <= self.config.window:
            return None
        return split_rows(self.config.window, input_ids, self._mask_of(input_ids, generation_config, kwargs))

    def _align(self: Any, input_ids: Tensor, generation_config: Any, kwargs: dict[str, Any]) -> SplitPrompt | None:
        """Rows with padding on the right, which would come between the prompt and its answer; ``None`` without."""
        mask = self._mask_of(input_ids, generation_config, kwargs)
        if mask is None or mask.shape != input_ids.shape or bool((mask[:, -1] != 0).all()):
            return None
        prompt, positions = SplitPrompt.aligned(input_ids, mask), kwargs.get("position_ids")
        if positions is not None:
            kwargs["position_ids"] = SplitPrompt.aligned(positions.expand_as(mask), mask).running
        return prompt

    def _follow(
        self: Any,
        prompt: SplitPrompt | None,
        input_ids: Tensor | None,
        cached: int,
        chosen: bool,
        kwargs: dict[str, Any],
    ) -> SplitPrompt | None:
        """What follows the split prompt of a filled cache; ``None`` where the running text alone goes on."""
        if prompt is None or input_ids is None:
            return None
        rows, mask = prompt.whole.shape[0], kwargs.get("attention_mask")
        if input_ids.shape[0] != rows:
            raise ValueError(f"input_ids: expected {counted(rows, 'row')} as in {CACHE_NAME}, got {input_ids.shape[0]}")
        if mask is not None and mask.shape[1] > input_ids.shape[1]:
            # only what is new; the mask says from where the caller counts
            new = input_ids.shape[1]
            if mask.shape[1] == prompt.removed + cached + new:
                kwargs["attention_mask"] = prompt.read_mask(mask, mask.shape[1] - prompt.whole.shape[1])
            elif mask.shape[1] != cached + new:
                raise ValueError(
                    f"attention_mask: expected {counted(cached + new, 'column')} (the cache and input_ids), or "
                    f"{prompt.removed + cached + new} with the context that was split from it, got {mask.shape[1]}"
                )
            return None
        if prompt.begins(input_ids):
            positions = kwargs.get("position_ids")
            if positions is not None:
                # it contains the cached tokens; only the new ones are examined
                kwargs["position_ids"] = positions[..., prompt.removed :]
            return prompt.followed(input_ids, mask)
        if chosen or prompt.begins_as_running_text(input_ids):
            return None
        raise ValueError(
            f"input_ids: expected a text that begins with the {counted(prompt.whole.shape[1], 'token')} of the prompt "
            f"that {CACHE_NAME} was split from, or with the last {prompt.running.shape[1]} of them, got another text"
        )

    def _give(self: Any, prompt: SplitPrompt, generation_config: Any, kwargs: dict[str, Any]) -> None:
        """Replace the whole text's mask and positions by the running text's."""
        settings = generation_config or self.generation_config
        if prompt.inserted and kwargs.get("position_ids") is not None:
            raise ValueError("position_ids: expected none where passages stand in front of input_ids, got some")
        if kwargs.get("token_healing", getattr(settings, "token_healing", None)):
            raise ValueError(
                f"token_healing: expected False where input_ids are longer than config.window ({self.config.window}) "
                "or padded on the right, or passages are read, got True"
            )
        mask = prompt.mask
        if mask is None:
            mask = torch.ones_like(prompt.running)
        kwargs["attention_mask"], kwargs["split_prompt"] = mask, prompt
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)

    def _say_past_window(
        self: Any,
        sequences: Tensor,
        text: Tensor | None,
        prompt: SplitPrompt | None,
        input_ids: Tensor | None,
        mask: Tensor | None,
        cached: int,
    ) -> None:
        """Warn, once per model, about a text that has grown past the window."""
        total = sequences.shape[1] - (0 if prompt is None else prompt.removed)
        if input_ids is None and text is not None:
            total += text.shape[1]
        elif prompt is None and mask is not None and input_ids is not None and mask.shape[1] > input_ids.shape[1]:
            total += cached
        if total > self.config.window and mask is not None and mask.dim() == 2:
            total -= int((mask == 0).sum(1).min())
        say_past_window(self, total, None, None)

    def _mask_of(
        self: Any, input_ids: Tensor, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """The caller's mask, or that of padding."""
        mask = kwargs.get("attention_mask")
        return self._mask_of_padding(input_ids, generation_config, kwargs) if mask is None else mask

    def _mask_of_padding(
        self: Any, input_ids: Tensor, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Mask of padding when the caller gave none, as Transformers infers it."""
        sources = (generation_config, self.generation_config)
        pad, eos = (
            next((x for x in (kwargs.get(name), *(getattr(s, name, None) for s in sources)) if x is not None), None)
            for name in ("pad_token_id", "eos_token_id")
        )
        if pad is None or pad in end_ids(eos) or not bool((input_ids == pad).any()):
            return None
        return (input_ids != pad).long()

    # -- what Transformers' loops ask ---------------------------------------------------------------------------------

    def prepare_inputs_for_generation(  # type: ignore[override]
        self: Any,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        split_prompt: SplitPrompt | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The inputs of forward in a step of ``generate``, from all tokens ``[B, T]`` and generate's own state."""
        cache = kwargs.get(CACHE_NAME)
        if self._still_rotated(cache, input_ids, attention_mask, inputs_embeds, split_prompt) is not cache:
            # the whole running text is read again
            kwargs[CACHE_NAME] = next_sequence_length = None
            kwargs["position_ids"] = None if attention_mask is None else (attention_mask.cumsum(1) - 1).clamp(min=0)
        if split_prompt is not None:
            new = input_ids.shape[1] - split_prompt.whole.shape[1]
            if attention_mask is not None:
                attention_mask = split_prompt.fit_mask(attention_mask, new)
            if next_sequence_length is None or next_sequence_length > new:
                input_ids = split_prompt.read(input_ids)
        parent: Any = super()
        inputs: dict[str, Any] = parent.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        text = inputs.get("input_ids")
        if text is not None and text.shape[1] > self.config.window:
            # splitting is done: a text without a cache only grows past the window
            inputs["split_window"] = False
        return inputs

    def _check_whole(self: Any, input_ids: Tensor, cached: int, mask: Tensor | None) -> None:
        """Refuse a text that only follows its cache where the whole of it may have to be read again."""
        switch, columns = switch_of(self.model.rotary_emb), input_ids.shape[1]
        partly = columns <= cached or (mask is not None and mask.shape[1] > columns)
        if switch is not None and cached <= switch and partly:
            raise ValueError(
                "input_ids: expected the whole text, which this base rotates otherwise beyond "
                f"{counted(switch, 'token')} (longrope), got {counted(columns, 'token')} that follow the {cached} of "
                f"{CACHE_NAME}"
            )

    def _still_rotated(
        self: Any, cache: Any, input_ids: Tensor, mask: Tensor | None, embeds: Tensor | None, prompt: SplitPrompt | None
    ) -> Any:
        """The cache, or ``None`` where its keys were rotated by other frequencies than a text of this length is."""
        switch = switch_of(self.model.rotary_emb)
        before = 0 if cache is None or switch is None else cache.get_seq_length()
        columns = input_ids.shape[1] if prompt is None else prompt.running.shape[1] - prompt.whole.shape[1]
        columns += 0 if prompt is None else input_ids.shape[1]
        now = columns if embeds is None else before + 1
        if switch is None or before == 0 or now <= switch:
            return cache
        if mask is not None:
            # positions do not count padding
            before, now = (int(mask[:, :end].sum(1).max()) for end in (before, now))
        if not before <= switch < now:
            return cache
        if embeds is not None:
            raise ValueError(
                f"inputs_embeds: expected at most {counted(switch, 'token')} of prompt and answer, beyond which this "
                f"base rotates all of them otherwise (longrope), got {now}; give input_ids, which can be read again"
            )
        return None

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:  # type: ignore[override]
        model_kwargs.pop("split_prompt", None)
        parent: Any = super()
        parent._validate_model_kwargs(model_kwargs)

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        # the first call, whole or in parts, gets the running text only
        prompt: SplitPrompt | None = model_kwargs.pop("split_prompt", None)
        parent: Any = super()
        if prompt is None:
            return parent._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        try:
            return parent._prefill(prompt.read(input_ids), generation_config, model_kwargs, *args, **kwargs)
        finally:
            model_kwargs["split_prompt"] = prompt

    def _prepare_cache_for_generation(  # type: ignore[override]
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """A cache that stays in place, where decoding steps can use it, for the running text."""
        prompt: SplitPrompt | None = model_kwargs.get("split_prompt")
        if prompt is not None:
            # (batch_size, max_cache_length), positional or by name
            if "max_cache_length" in kwargs:
                kwargs["max_cache_length"] -= prompt.removed
            elif len(args) > 1:
                args = (args[0], args[1] - prompt.removed, *args[2:])
        cache = model_kwargs.get(CACHE_NAME)
        single = is_single(generation_mode)
        obstacle = obstacle_in_settings(generation_config, generation_mode) or obstacle_in_cache(cache)
        obstacle = obstacle or obstacle_in_model(self, just_examined=was_examined(self))
        if obstacle is not None:
            say_slow(obstacle)
        result = None
        if obstacle is None and cache is None:
            limit = kwargs.get("max_cache_length", args[1] if len(args) > 1 else None)
            cache = model_kwargs[CACHE_NAME] = new_cache(self, limit)
            expect_steps(cache)
        else:
            # drafts are short, and other tokens usually come next
            if single and type(cache) is PreallocatedCache and not getattr(generation_config, "is_assistant", False):
                expect_steps(cache)
            parent: Any = super()
            result = parent._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, *args, **kwargs
            )
            cache = model_kwargs.get(CACHE_NAME)
        if cache is not None and (prompt is not None or cache.get_seq_length() == 0):
            remember_prompt(cache, prompt)
        return result

    def _prepare_generated_length(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        generation_config = kwargs.get("generation_config", args[0] if args else None)
        default = None if generation_config is None else generation_config.max_length
        parent: Any = super()
        prepared = parent._prepare_generated_length(*args, **kwargs)
        removed, limit = removed_tokens(), getattr(self.config, "max_position_embeddings", None)
        if removed and kwargs.get("has_default_max_length") and prepared.max_new_tokens is None and default is not None:
            # positions count the running text alone
            length = default + kwargs["input_ids_length"]
            prepared.max_length = length if limit is None else min(length, limit + removed)
        return prepared

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        model_kwargs = kwargs.get("model_kwargs") or {}
        prompt: SplitPrompt | None = model_kwargs.get("split_prompt")
        parent: Any = super()
        if prompt is None:
            return parent._get_logits_processor(*args, **kwargs)
        # padding is found by the mask, which is the running text's, while the processors see the whole text
        kwargs["model_kwargs"] = {name: value for name, value in model_kwargs.items() if name != "attention_mask"}
        return without_padding(parent._get_logits_processor(*args, **kwargs), prompt)

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        parent: Any = super()
        criteria = parent._get_stopping_criteria(*args, **kwargs)
        removed = removed_tokens()
        for criterion in criteria if removed else ():
            # its warning is about positions, which count the running text alone
            if type(criterion) is MaxLengthCriteria and criterion.max_position_embeddings is not None:
                criterion.max_position_embeddings += removed
        add_run_ahead(criteria)
        return criteria

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Drafts of an assistant model: of the running text, and with the memory only if it can read it."""
        model_kwargs = dict(kwargs["model_kwargs"])
        memory, prompt = model_kwargs.pop("memory", None), model_kwargs.pop("split_prompt", None)
        model_kwargs.pop("split_window", None)
        parent: Any = super()
        generator = parent._get_candidate_generator(*args, **{**kwargs, "model_kwargs": model_kwargs})
        if not isinstance(generator, AssistedCandidateGenerator):
            return generator
        assistant = generator.assistant_model
        if isinstance(assistant, ContextGeneration):
            # it drafts from the same running text, however short its own window is
            generator.assistant_kwargs["split_window"] = False
            if memory is not None and _can_read(assistant, memory):
                generator.assistant_kwargs["memory"] = memory
        if prompt is None:
            return generator
        generator.logits_processor = for_assistant(generator.logits_processor, prompt)
        return RunningTextCandidates(generator, prompt)

    def _valid_auto_compile_criteria(  # type: ignore[override]
        self: Any, model_kwargs: dict[str, Any], generation_config: Any
    ) -> bool:
        if offer_call(self, self._rope_tables, model_kwargs, generation_config):
            return True
        parent: Any = super()
        return parent._valid_auto_compile_criteria(model_kwargs, generation_config)

    def get_compiled_call(self, compile_config: Any) -> Any:  # type: ignore[override]
        """The forward pass of a generate's decoding steps: a CUDA graph where there can be one."""
        parent: Any = super()
        return take_call() or parent.get_compiled_call(compile_config)

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        own = {name: kwargs.pop(name) for name in ("memory", "split_prompt") if kwargs.get(name) is not None}
        parent: Any = super()
        input_ids, model_kwargs = parent._expand_inputs_for_generation(*args, **kwargs)
        expand_size = kwargs.get("expand_size", args[0] if args else 1)
        for name, value in own.items():
            model_kwargs[name] = value.expand(expand_size) if expand_size > 1 else value
        return input_ids, model_kwargs

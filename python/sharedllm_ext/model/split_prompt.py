"""A prompt of which generate has turned a part into context: its loop sees the whole, the model reads the rest."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation.candidate_generator import CandidateGenerator

from .inputs import check_mask
from .split import Split

_ATTRIBUTE = "_sharedllm_prompt"


@dataclasses.dataclass(frozen=True, eq=False)
class SplitPrompt:
    """What the loop of a ``generate`` sees and what the model reads instead: the running text, padded on the left.

    Lengths, logits processors, stopping criteria, streamers and the result are of the whole text. New tokens follow
    both, so that only the first call and calls without a cache need this.

    Attributes:
        whole: ``[B, L]``, the prompt as the caller gave it.
        running: ``[B, W]``, its running text, padded on the left.
        mask: ``[B, W]``, 0 for padding, or ``None``.
        whole_mask: ``[B, L]``, 0 for padding of the prompt as it was given, or ``None``.
        inserted: whether the running text is a question with passages in front of it, and longer than the whole text.
    """

    whole: Tensor
    running: Tensor
    mask: Tensor | None
    whole_mask: Tensor | None = None
    inserted: bool = False

    @classmethod
    def of(cls, input_ids: Tensor, split: Split, whole_mask: Tensor | None = None) -> "SplitPrompt":
        """From a prompt ``[B, L]`` and how it was split."""
        mask = split.attention_mask
        return cls(input_ids, split.input_ids, None if mask is None or bool(mask.all()) else mask, whole_mask)

    @classmethod
    def aligned(cls, input_ids: Tensor, mask: Tensor) -> "SplitPrompt":
        """From a prompt ``[B, L]`` without context whose rows are padded on the right, where ``mask`` is 0."""
        # stable: the tokens keep their order after the padding
        columns = mask.bool().to(torch.uint8).argsort(dim=1, stable=True)
        return cls(input_ids, input_ids.gather(1, columns), mask.gather(1, columns), mask)

    @property
    def removed(self) -> int:
        """How many columns the running text is shorter than the whole text; below 0 for one that is longer."""
        return self.whole.shape[1] - self.running.shape[1]

    def read(self, text: Tensor) -> Tensor:
        """The running text ``[B, W + n]`` of the prompt and ``n`` new tokens, ``text`` being ``[B, L + n]``."""
        new = text[:, self.whole.shape[1] :]
        return torch.cat((self.running, new), 1) if new.shape[1] else self.running

    def restore(self, text: Tensor) -> Tensor:
        """The inverse of :meth:`read`."""
        return torch.cat((self.whole, text[:, self.running.shape[1] :]), 1)

    def read_mask(self, mask: Tensor | None, new: int) -> Tensor | None:
        """The running text's mask ``[B, W + n]``, of the whole text's ``[B, L + n]``; ``None`` where all is text."""
        if mask is None and self.mask is None:
            return None
        like = self.mask if mask is None else mask
        assert like is not None
        old = like.new_ones(self.running.shape) if self.mask is None else self.mask.to(like.dtype)
        tail = like.new_ones(like.shape[0], new) if mask is None else mask[:, self.whole.shape[1] :]
        return torch.cat((old, tail), 1)

    def fit_mask(self, mask: Tensor, new: int) -> Tensor:
        """The running text's mask ``[B, W + n]``, of one that assisted generation made as wide as the whole text."""
        width = self.running.shape[1] + new
        if mask.shape[1] >= width:
            return mask[:, :width]
        fitted = self.read_mask(None, new)
        return mask.new_ones(mask.shape[0], width) if fitted is None else fitted.to(mask.dtype)

    def followed(self, text: Tensor, mask: Tensor | None) -> "SplitPrompt":
        """The same with more text, ``[B, L + n]`` in total: what became context stays context."""
        check_mask("attention_mask", mask, "input_ids", text)
        new = text.shape[1] - self.whole.shape[1]
        whole_mask = mask
        if mask is None and self.whole_mask is not None:
            whole_mask = torch.nn.functional.pad(self.whole_mask, (0, new), value=1)
        return SplitPrompt(text, self.read(text), self.read_mask(mask, new), whole_mask, self.inserted)

    def begins(self, text: Tensor) -> bool:
        """Whether a text ``[B, T]`` begins with this prompt."""
        length = self.whole.shape[1]
        same_rows = text.shape[0] == self.whole.shape[0] and text.shape[1] >= length
        return same_rows and torch.equal(text[:, :length], self.whole.to(text.device))

    def begins_as_running_text(self, text: Tensor) -> bool:
        """Whether a text ``[B, T]`` begins with the running text of this prompt."""
        length = self.running.shape[1]
        same_rows = text.shape[0] == self.running.shape[0] and text.shape[1] >= length
        return same_rows and torch.equal(text[:, :length], self.running.to(text.device))

    def expand(self, count: int) -> "SplitPrompt":
        """Every row ``count`` times in a row."""
        if count == 1:
            return self
        mask, whole_mask = (None if m is None else m.repeat_interleave(count, 0) for m in (self.mask, self.whole_mask))
        whole, running = self.whole.repeat_interleave(count, 0), self.running.repeat_interleave(count, 0)
        return SplitPrompt(whole, running, mask, whole_mask, self.inserted)

    def __copy__(self) -> "SplitPrompt":
        return self

    def __deepcopy__(self, _: Any) -> "SplitPrompt":
        # it never changes, and copies of a cache share it
        return self


def remember_prompt(cache: Cache, prompt: SplitPrompt | None) -> None:
    """Keep with a cache which prompt it was made for; ``None``: one that was not split."""
    if prompt is not None:
        setattr(cache, _ATTRIBUTE, prompt)
    elif hasattr(cache, _ATTRIBUTE):
        delattr(cache, _ATTRIBUTE)


def remembered_prompt(cache: Cache | None) -> SplitPrompt | None:
    """The split prompt that a cache was made for; ``None`` for another one, or an empty cache."""
    prompt = getattr(cache, _ATTRIBUTE, None)
    return None if cache is None or prompt is None or cache.get_seq_length() == 0 else prompt


def mask_over_cache(cache: Any, mask: Tensor | None, new: int) -> Tensor | None:
    """The mask of ``new`` tokens over a filled cache, ``[B, cached + new]`` or ``None``.

    Args:
        cache: perhaps one whose prompt was split.
        mask: the caller's, which may count the whole text.
        new: tokens a row.
    """
    prompt = remembered_prompt(cache)
    if prompt is None or (mask is None and prompt.mask is None):
        return mask
    total = cache.get_seq_length() + new
    if mask is None:
        assert prompt.mask is not None
        old = prompt.mask[:, : total - new]
        return torch.cat((old, old.new_ones(old.shape[0], total - old.shape[1])), 1)
    if mask.dim() == 2 and mask.shape[1] == prompt.removed + total:
        return prompt.read_mask(mask, mask.shape[1] - prompt.whole.shape[1])
    return mask


class _OfWholeText(LogitsProcessor):
    """A logits processor that an assistant calls with running text, and that sees the whole."""

    def __init__(self, inner: Any, prompt: SplitPrompt) -> None:
        self.inner = inner
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        return self.inner(self.prompt.restore(input_ids), scores)


def for_assistant(processors: Any, prompt: SplitPrompt) -> Any:
    """The logits processors of a ``generate``, for an assistant model that is given the running text alone."""
    # those of a least length are left out of drafts by their class
    return LogitsProcessorList(
        processor if isinstance(processor, MinLengthLogitsProcessor) else _OfWholeText(processor, prompt)
        for processor in processors or ()
    )


class _OfOwnTokens(LogitsProcessor):
    """A logits processor of a row's set of tokens, which ignores padding wherever it is."""

    def __init__(self, inner: Any, prompt: SplitPrompt) -> None:
        self.inner = inner
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        mask, length = self.prompt.whole_mask, self.prompt.whole.shape[1]
        if mask is not None:
            # a token that the row has adds nothing to the set
            held = self.prompt.whole.gather(1, mask.bool().to(torch.uint8).argmax(1, keepdim=True))
            own = torch.where(mask.bool(), input_ids[:, :length], held)
            input_ids = torch.cat((own, input_ids[:, length:]), 1)
        return self.inner(input_ids, scores)


def without_padding(processors: Any, prompt: SplitPrompt) -> Any:
    """The logits processors of a ``generate``; those that penalise repetition ignore the prompt's padding."""
    return LogitsProcessorList(
        _OfOwnTokens(processor, prompt) if type(processor) is RepetitionPenaltyLogitsProcessor else processor
        for processor in processors
    )


class RunningTextCandidates(CandidateGenerator):
    """Drafts of an assistant model that continues the running text, for a loop that holds the whole text.

    Args:
        inner: the generator, made for the running text.
        prompt: both texts.
    """

    def __init__(self, inner: Any, prompt: SplitPrompt) -> None:
        self.inner = inner
        self.prompt = prompt
        self.requires_model_outputs = inner.requires_model_outputs
        # lengths that the generator compares with its own text
        for name in ("main_model_max_length", "main_model_min_length"):
            length = getattr(inner, name, None)
            if length is not None:
                setattr(inner, name, max(length - prompt.removed, 0))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Whole text ``[1, T]`` to whole text with a draft ``[1, T + n]``, and the draft's logits if there are any."""
        text = self.prompt.read(input_ids)
        candidates, logits = self.inner.get_candidates(text, **kwargs)
        return torch.cat((input_ids, candidates[:, text.shape[1] :].to(input_ids.device)), 1), logits

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Pass on how much of the last draft was right."""
        self.inner.update_candidate_strategy(self.prompt.read(input_ids), scores, num_matches)

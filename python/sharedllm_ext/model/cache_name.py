"""The KV cache, under the name that the installed Transformers uses for it.

It is ``past_key_values`` up to Transformers 5.23 and ``cache`` from 5.24 on, in outputs and in every forward.
"""

import dataclasses
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

_NAMES = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
#: The name in outputs, and of the keyword that Transformers' own modules take.
CACHE_NAME = "cache" if "cache" in _NAMES else "past_key_values"


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache that a caller has passed under either name; ``None`` for none.

    Raises:
        ValueError: two different ones.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values, cache: expected one of them (two names of the same), got two caches")
    return past_key_values if cache is None else cache


def take_cache(kwargs: dict[str, Any]) -> Any:
    """Rename the cache in keywords, from either name to that of the installed Transformers.

    Returns:
        The cache, or ``None``.

    Raises:
        ValueError: two different ones.
    """
    found = one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
    if found is not None:
        kwargs[CACHE_NAME] = found
    return found


def cache_of(output: Any) -> Any:
    """The cache in a model's output."""
    return getattr(output, CACHE_NAME)

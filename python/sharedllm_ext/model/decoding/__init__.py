"""Decoding token by token at the speed of memory: a cache that stays in place, and one CUDA graph of a whole step."""

from .batch import ContinuousBatch, Question
from .cache import PreallocatedCache, PreallocatedLayer
from .step import DecodeRunner
from .support import decoding_obstacle

__all__ = ["ContinuousBatch", "DecodeRunner", "PreallocatedCache", "PreallocatedLayer", "Question", "decoding_obstacle"]

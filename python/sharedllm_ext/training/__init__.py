"""Training a model's reading of its memory, and its pick: data, losses, what is trained, the loop."""

from .data import Batch, Mix, Sizes
from .losses import Losses, Weights
from .prompt import PromptTokens, default_prompt, token_classes
from .sources import Record, Sources, read_sources
from .trained import Part, Trained, merge_updates, parse_parts

__all__ = [
    "Batch",
    "Losses",
    "Mix",
    "Part",
    "PromptTokens",
    "Record",
    "Sizes",
    "Sources",
    "Trained",
    "Weights",
    "default_prompt",
    "merge_updates",
    "parse_parts",
    "read_sources",
    "token_classes",
]

"""Training a model's reading of its memory, and its pick: data, losses, what is trained, the loop."""

from .checkpoint import TrainingError
from .data import Batch, Mix, Sizes
from .loop import Options, Report, Trainer
from .losses import Losses, Weights
from .prompt import PromptTokens, default_prompt, token_classes
from .sources import Record, Sources, read_sources
from .trained import Part, Trained, merge_updates, parse_parts

__all__ = [
    "Batch",
    "Losses",
    "Mix",
    "Options",
    "Part",
    "PromptTokens",
    "Record",
    "Report",
    "Sizes",
    "Sources",
    "Trained",
    "Trainer",
    "TrainingError",
    "Weights",
    "default_prompt",
    "merge_updates",
    "parse_parts",
    "read_sources",
    "token_classes",
]

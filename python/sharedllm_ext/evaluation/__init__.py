"""Perplexity with growing context, questions about long contexts, the reading of texts, and the memory that it took."""

from sharedllm_ext.evaluation.generators import TASKS, generate_records, make_record
from sharedllm_ext.evaluation.harness import Evaluation, Prediction, PredictionFile, Share, evaluate
from sharedllm_ext.evaluation.haystacks import Haystack, haystack_of
from sharedllm_ext.evaluation.metrics import METRICS, score
from sharedllm_ext.evaluation.peak_memory import PeakMemory, keep_no_freed_blocks, measure_peak
from sharedllm_ext.evaluation.perplexity import (
    LengthResult,
    PerplexityReport,
    evaluate_perplexity,
    pick_points,
    running_losses,
)
from sharedllm_ext.evaluation.prompts import Prompts
from sharedllm_ext.evaluation.questions import read_hotpotqa, read_squad
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.suites import SUITES, read_suite
from sharedllm_ext.evaluation.systems import (
    FullSystem,
    MemorySystem,
    NtkSystem,
    PassagesSystem,
    PickSystem,
    System,
    WindowSystem,
    YarnSystem,
    plain_decoder,
)
from sharedllm_ext.evaluation.tasks import Sources
from sharedllm_ext.evaluation.texts import TextError, Texts, read_texts
from sharedllm_ext.evaluation.tokenising import encode, read_tokens

__all__ = [
    "METRICS",
    "SUITES",
    "TASKS",
    "Evaluation",
    "FullSystem",
    "Haystack",
    "LengthResult",
    "MemorySystem",
    "NtkSystem",
    "PassagesSystem",
    "PeakMemory",
    "PerplexityReport",
    "PickSystem",
    "Prediction",
    "PredictionFile",
    "Prompts",
    "Record",
    "Share",
    "Sources",
    "System",
    "TextError",
    "Texts",
    "WindowSystem",
    "YarnSystem",
    "encode",
    "evaluate",
    "evaluate_perplexity",
    "generate_records",
    "haystack_of",
    "keep_no_freed_blocks",
    "make_record",
    "measure_peak",
    "pick_points",
    "plain_decoder",
    "read_hotpotqa",
    "read_squad",
    "read_suite",
    "read_texts",
    "read_tokens",
    "running_losses",
    "score",
]

"""Configuration of a SharedLLM model."""

import copy
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .families import FAMILIES, check_family, check_settings
from .peft_defaults import register_target_modules
from .word_index import LONGEST_RUN, RUNS

PRECISIONS = ("model", "fp8")
SLOT_POSITIONS = ("start", "end")
PROMPT_PARTS = ("begin", "passage", "question", "answer")
# Fields that other libraries read from a language model's configuration; the base checkpoint's values.
_OF_THE_BASE = frozenset(
    (
        "attention_bias",
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "max_position_embeddings",
        "mlp_bias",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "rms_norm_eps",
        "use_cache",
        "vocab_size",
    )
)
_AUTO_CLASSES = {"AutoConfig": "SharedLLMConfig", "AutoModelForCausalLM": "SharedLLMForCausalLM"}
_STUB = "modeling_sharedllm"
_STUB_TEXT = '''"""Lets Transformers' Auto classes find the installed sharedllm_ext (with trust_remote_code=True).

`import sharedllm_ext` before loading does the same without running any code of this folder.
"""

from sharedllm_ext import SharedLLMConfig, SharedLLMForCausalLM  # noqa: F401
'''


class SharedLLMConfig(PreTrainedConfig):
    """Configuration of :class:`SharedLLMForCausalLM`.

    Args:
        text_config: configuration of the base checkpoint (copied) or its dictionary; of the families Llama, Mistral,
            Qwen2/2.5, Qwen3, Qwen3-MoE, SmolLM3, Phi-3/Phi-4, Gemma 3 or Granite.
        injection_layers: ``M``, how many of the lowest layers compress the context and read the memory (paper: 4 for
            language modelling, 16 for instruction following).
        chunk_size: ``c``, context tokens in a chunk (paper: 1024).
        tree_depth: ``h``, splits from a chunk to its leaves; a chunk retains ``h + 1`` nodes (paper: 3).
        slots_per_node: ``s``, positions kept of a node; shorter nodes keep every token (paper: 32).
        window: running text in tokens; of a longer plain ``input_ids`` the last ``window`` tokens are running text and
            the rest becomes context.
        query_aware: whether the query picks the children that split further; otherwise always the right one.
        slot_position: which token of its stride a slot keeps: "start" as published, or "end", which has seen the whole
            stride (with "start" the last 28 tokens of a chunk's 1024 reach no slot).
        pick_layers: the layers whose keys :meth:`SharedLLMForCausalLM.find_passages` asks, by trained queries; ``None``
            is a model without them. Needs ``query_aware=False``.
        segment_size: ``g``, tokens of the segments that it chooses from (a leaf's).
        segment_margin: tokens that are read on both sides of a segment.
        word_runs: the words that are looked for beside the queries, each with a trained factor: pairs of the length of
            a run of tokens, up to 8, and of the tokens on both sides of a segment that are searched with it.
        passage_prompt: the texts around what is read, see :meth:`SharedLLMForCausalLM.passage_prompt`: ``begin``,
            ``passage`` (before each passage, with ``{rank}``), ``question`` (before it), ``answer``.
        answer_end_ids: tokens by which the model ends an answer, beside the base's ``eos_token_id``; a model made of a
            base generates until one of them (its ``generation_config``).
        query_position_offset: queries are rotated by the number of chunks plus this offset (1 in the code that produced
            the paper's results, 0 in its text).
        split_noise: standard deviation, in tokens, of the split point during training (paper, "structural noise").
        tie_compressor: whether the compressor uses the decoder's weights (before it is trained on its own).
        micro_batch_tokens: context tokens compressed at a time; bounds the activations, changes no result. ``None``
            chooses by device and free memory.
        decoder_precision: of the decoder's weights, "model" (the checkpoint's dtype) or "fp8" (8-bit floating point
            with a scale for every row, made when a checkpoint is loaded; inference only: see
            :meth:`SharedLLMForCausalLM.quantize_decoder`).
        compressor_precision: of the compressor's matmuls, "model" (the weights' dtype) or "fp8" (8-bit floating point
            with a scale for every row of activations and weights; bfloat16 models on CUDA, compute capability 8.9 and
            newer, inference only: about 60% of the time for a small error in the memory, see docs/architecture.md).

    Sizes and special tokens (``hidden_size``, ``num_hidden_layers``, ``max_position_embeddings``, ``eos_token_id``,
    ``use_cache``, …) are read from the base checkpoint's configuration, and written there.

    Raises:
        ValueError: a field is out of range, or the base checkpoint's family is not supported.
    """

    model_type = "sharedllm"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "cache", "memory"]

    text_config: Any = None
    injection_layers: int = 4
    chunk_size: int = 1024
    tree_depth: int = 3
    slots_per_node: int = 32
    window: int = 4096
    query_aware: bool = True
    slot_position: str = "start"
    pick_layers: list[int] | None = None
    segment_size: int = 128
    segment_margin: int = 64
    word_runs: tuple[tuple[int, int], ...] = RUNS
    passage_prompt: dict[str, str] | None = None
    answer_end_ids: list[int] | None = None
    query_position_offset: int = 1
    split_noise: float = 0.0
    tie_compressor: bool = True
    micro_batch_tokens: int | None = None
    compressor_precision: str = "model"
    decoder_precision: str = "model"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            family = fields.pop("model_type", "llama")
            check_family("text_config", family)
            self.text_config = AutoConfig.for_model(family, **fields)
        elif self.text_config is None:
            self.text_config = AutoConfig.for_model("llama")
        check_family("text_config", getattr(self.text_config, "model_type", type(self.text_config).__name__))
        check_settings("text_config", self.text_config)
        # Transformers sets the attention of inner configurations too: a loaded base must keep its own
        self.text_config = copy.deepcopy(self.text_config)
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        super().__post_init__(**kwargs)
        self.auto_map = {auto_class: f"{_STUB}.{name}" for auto_class, name in _AUTO_CLASSES.items()}
        self._check_fields()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration from a checkpoint's ``config.json``.

        Raises:
            ValueError: the checkpoint is of another type, or a field is out of range.
        """
        family = config_dict.get("model_type", cls.model_type)
        if family != cls.model_type:
            advice = "; make one from it with from_base" if family in FAMILIES else ""
            raise ValueError(f"model_type: expected a {cls.model_type} checkpoint, got a {family} one{advice}")
        return super().from_dict(config_dict, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # only asked for what is not found otherwise
        text_config = self.__dict__.get("text_config") if name in _OF_THE_BASE else None
        if text_config is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(text_config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        text_config = self.__dict__.get("text_config") if name in _OF_THE_BASE else None
        if text_config is None:
            super().__setattr__(name, value)
        else:
            setattr(text_config, name, value)

    def set_decoder_precision(self, precision: str) -> None:
        """Set ``decoder_precision``, checked as all fields are."""
        self.decoder_precision = precision
        self._check_fields()

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary."""
        # PEFT, which may be imported after this package, asks for it before it looks for target modules
        register_target_modules()
        return super().to_dict()

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write ``config.json``, and the few lines by which Auto classes find this package (trust_remote_code)."""
        folder = Path(save_directory)
        if not folder.is_file():  # Transformers says so
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{_STUB}.py").write_text(_STUB_TEXT, encoding="utf-8")
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: every saved folder names this package, whose source needs no copy there."""

    def _check_fields(self) -> None:
        layers = self.text_config.num_hidden_layers
        ranges = {
            "injection_layers": (1, layers),
            "chunk_size": (1, None),
            "tree_depth": (1, 32),
            "slots_per_node": (1, None),
            "window": (1, None),
            "query_position_offset": (0, None),
            "segment_size": (1, None),
            "segment_margin": (0, None),
        }
        if self.micro_batch_tokens is not None:
            ranges["micro_batch_tokens"] = (1, None)
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}: expected an integer, got {value!r}")
            if value < low or (high is not None and value > high):
                upper = "" if high is None else f" and at most {high}"
                reason = " (the layers of the base checkpoint)" if name == "injection_layers" else ""
                raise ValueError(f"{name}: expected at least {low}{upper}{reason}, got {value}")
        for name in ("query_aware", "tie_compressor"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.slot_position not in SLOT_POSITIONS:
            raise ValueError(f"slot_position: expected {' or '.join(SLOT_POSITIONS)}, got {self.slot_position!r}")
        self._check_ends()
        self._check_runs()
        self._check_pick()
        for name in ("compressor_precision", "decoder_precision"):
            if getattr(self, name) not in PRECISIONS:
                raise ValueError(f"{name}: expected {' or '.join(PRECISIONS)}, got {getattr(self, name)!r}")
        noise = self.split_noise
        if isinstance(noise, bool) or not isinstance(noise, (int, float)) or not 0.0 <= noise < float("inf"):
            raise ValueError(f"split_noise: expected a finite standard deviation of at least 0 tokens, got {noise!r}")

    def _check_ends(self) -> None:
        ends, vocabulary = self.answer_end_ids, self.text_config.vocab_size
        if ends is None:
            return
        right = isinstance(ends, (list, tuple)) and all(type(end) is int and 0 <= end < vocabulary for end in ends)
        if not right or not ends or len(set(ends)) < len(ends):
            raise ValueError(f"answer_end_ids: expected different token ids below {vocabulary}, got {ends!r}")
        self.answer_end_ids = list(ends)

    def _check_runs(self) -> None:
        runs = self.word_runs
        right = isinstance(runs, (list, tuple)) and all(isinstance(run, (list, tuple)) for run in runs)
        right = right and all(len(run) == 2 and all(type(number) is int for number in run) for run in runs)
        right = right and all(1 <= length <= LONGEST_RUN and margin >= 0 for length, margin in runs)
        if not right or not runs or len(set(map(tuple, runs))) < len(runs):
            raise ValueError(
                f"word_runs: expected different pairs of a length from 1 to {LONGEST_RUN} and a margin of at least 0 "
                f"tokens, got {runs!r}"
            )
        # JSON has no tuples, and a default has to be one
        self.word_runs = tuple((length, margin) for length, margin in runs)

    def _check_pick(self) -> None:
        layers, most = self.pick_layers, self.injection_layers - 1
        if layers is None:
            return
        whole = isinstance(layers, (list, tuple)) and all(type(layer) is int for layer in layers)
        if not whole or not layers or sorted(set(layers)) != list(layers) or not 0 <= layers[0] <= layers[-1] <= most:
            raise ValueError(f"pick_layers: expected rising layers from 0 to {most}, got {layers!r}")
        self.pick_layers = list(layers)
        prompt = self.passage_prompt
        if prompt is not None and (not isinstance(prompt, dict) or set(prompt) != set(PROMPT_PARTS)):
            raise ValueError(f"passage_prompt: expected texts {', '.join(PROMPT_PARTS)}, got {prompt!r}")
        if self.query_aware:
            raise ValueError("pick_layers: expected query_aware=False with it, got True")


def lower_config(config: SharedLLMConfig) -> PreTrainedConfig:
    """Configuration of a compressor with its own weights: the base checkpoint's with ``M`` layers."""
    lower: PreTrainedConfig = copy.deepcopy(config.text_config)
    lower.num_hidden_layers = config.injection_layers
    if getattr(lower, "layer_types", None) is not None:
        lower.layer_types = lower.layer_types[: config.injection_layers]
    return lower

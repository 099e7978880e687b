"""A tiny base checkpoint with a tokenizer, made on the fly, and a SharedLLM checkpoint whose context matters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.cli import main

VOCABULARY = 320
WINDOW = 64
TREE = ("--chunk-size", "32", "--slots-per-node", "4", "--injection-layers", "2", "--window", str(WINDOW))
END = "<|end|>"
PICK_FIELDS: dict[str, Any] = {
    "injection_layers": 2,
    "chunk_size": 32,
    "slots_per_node": 4,
    "window": 128,
    "query_aware": False,
    "slot_position": "end",
    "pick_layers": [0, 1],
    "segment_size": 8,
    "segment_margin": 4,
    "passage_prompt": {"begin": "(", "passage": "[{rank}]", "question": "?", "answer": ")"},
}
FACT, QUESTION = "The owl sleeps in the quince.", "owl quince"


def sentences(count: int, seed: int = 0) -> str:
    """Plain text of ``count`` lines that tokenizers find ordinary: words, numbers, indents, blank lines."""
    generator = torch.Generator().manual_seed(seed)
    words = ["alpha", "Beta", "gamma_1", "delta", "x=3", "(eps)", "zeta,", "42", "naïve", "return"]
    lines = []
    for i in range(count):
        picks = torch.randint(len(words), (6,), generator=generator).tolist()
        lines.append("    " * (i % 3) + " ".join(words[j] for j in picks) + ("\n" if i % 5 == 0 else ""))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small for two: waiting threads only slow the rest of the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with an end token."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([sentences(500)], trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Llama checkpoint folder."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A SharedLLM checkpoint made by ``init``, its injected blocks then filled so that the context matters."""
    folder = tmp_path_factory.mktemp("models") / "sharedllm"
    assert main(["init", str(base), str(folder), *TREE]) == 0
    model = SharedLLMForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    for block in model.injected_blocks:
        torch.nn.init.normal_(block.o_proj.weight, std=0.3)
    model.save_pretrained(folder)
    return folder


def pretend_training(model: Any) -> Any:
    """As if trained: the context changes answers, and the pick goes by words more than by anything else."""
    torch.manual_seed(1)
    with torch.no_grad():
        for block in model.injected_blocks:
            block.o_proj.weight.normal_(std=0.3)
        model.pick.token_class.copy_(torch.arange(model.pick.token_class.numel()))
        model.pick.word_beta.fill_(5.0)
    return model


@pytest.fixture(scope="session")
def picking(tmp_path_factory: pytest.TempPathFactory, base: Path, tokenizer: Any) -> Path:
    """A checkpoint with a pick."""
    folder = tmp_path_factory.mktemp("picking") / "model"
    pretend_training(SharedLLMForCausalLM.from_base(base, **PICK_FIELDS)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The same as an adapter."""
    path = tmp_path_factory.mktemp("adapter") / "tiny.safetensors"
    pretend_training(SharedLLMForCausalLM.from_base(base, **PICK_FIELDS)).save_adapter(path, base)
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few thousand tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(sentences(100, seed=1), encoding="utf-8")
    return path


@dataclass
class Result:
    """What one run of the command line left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in this process."""

    def run(*args: object) -> Result:
        capfd.readouterr()
        code = main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return run

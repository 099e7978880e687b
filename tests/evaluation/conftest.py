"""A byte-level tokenizer, made on the fly."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sharedllm_ext.evaluation.haystacks import NOISE
from sharedllm_ext.evaluation.words import ADJECTIVES, NOUNS

END = "<|end|>"
TEXT = (
    NOISE + " One of the special magic numbers for is mentioned in the provided text. " + " ".join(ADJECTIVES + NOUNS)
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words of the generators' texts are a token or two."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[END, "<|user|>", "<|model|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT] * 3, trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)

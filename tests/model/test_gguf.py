"""GGUF files as base checkpoints: the same function, no trace of the quantisation, nothing lost in silence."""

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sharedllm_ext import SharedLLMForCausalLM
from sharedllm_ext.model import gguf_checkpoint

from . import builders
from .gguf_files import write_gguf

pytest.importorskip("gguf")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def load(path: Path, **fields: Any) -> SharedLLMForCausalLM:
    """The model of a file, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SharedLLMForCausalLM.from_base(path, **{**builders.TREE, **fields})


def factors_of(parameters: dict[str, Any], size: int) -> np.ndarray:
    """What llama.cpp's converter writes as rope_freqs.weight for Llama 3.1."""
    frequencies = parameters["rope_theta"] ** -(np.arange(0, size, 2) / size)
    waves = 2 * np.pi / frequencies
    original, low, high = (
        parameters[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth = (original / waves - low) / (high - low)
    middle = 1 / ((1 - smooth) / parameters["factor"] + smooth)
    return np.where(
        waves < original / high, 1.0, np.where(waves > original / low, parameters["factor"], middle)
    ).astype(np.float32)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Logits of the same text for every model."""
    return model(torch.arange(3, 23)[None]).logits


# llama_tied has biases on its attention, qwen3 heads of another size than hidden_size / heads
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "llama_tied"])
def test_same_function_as_the_checkpoint(tmp_path: Path, family: str) -> None:
    base = builders.base(family)
    model = load(write_gguf(base, tmp_path / "model.gguf"))
    torch.testing.assert_close(logits(model), logits(base))
    assert model.config.text_config.model_type == base.config.model_type
    assert model.config.eos_token_id == base.config.eos_token_id


def test_a_tokenizer_gets_the_special_tokens_of_the_file(tmp_path: Path) -> None:
    """Transformers 5.17 reads the token that begins a turn as the one that ends it."""
    words = {word: index for index, word in enumerate(["?", "<begin>", "<end>", "a"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "?")), bos_token="<begin>", eos_token="<begin>"
    )
    base = builders.base()
    base.config.eos_token_id = 2
    header = gguf_checkpoint.read_header(write_gguf(base, tmp_path / "model.gguf"))
    assert header.values["tokenizer.ggml.eos_token_id"] == 2
    gguf_checkpoint.complete_tokenizer(tokenizer, header)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == ("<begin>", "<end>", 2)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 2


def test_a_file_is_read_again_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, path = builders.base(), tmp_path / "model.gguf"
    base.config.eos_token_id = 2
    write_gguf(base, path)
    first = gguf_checkpoint.read_header(path)
    with monkeypatch.context() as patch:
        patch.setattr("gguf.GGUFReader", None)
        assert gguf_checkpoint.read_header(path) is first
    base.config.eos_token_id = 3
    write_gguf(base, tmp_path / "other.gguf").replace(path)
    assert gguf_checkpoint.read_header(path).values["tokenizer.ggml.eos_token_id"] == 3


def test_trained_halved_and_saved_twice(tmp_path: Path) -> None:
    base = builders.base()
    path = write_gguf(base, tmp_path / "model.gguf", quantised=True)
    model = load(path)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model.config.text_config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    model.train()
    text = builders.ids(1, 12)
    model(text, context_ids=builders.ids(1, 64), labels=text).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.eval().half().float().save_pretrained(tmp_path / "first")
    again = SharedLLMForCausalLM.from_pretrained(tmp_path / "first")
    again.to(torch.bfloat16).save_pretrained(tmp_path / "second")
    last = SharedLLMForCausalLM.from_pretrained(tmp_path / "second")
    assert last.dtype == torch.bfloat16
    assert all(torch.equal(tensor, last.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_a_model_that_transformers_dequantised_is_no_quantised_one(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = write_gguf(builders.base(), tmp_path / "model.gguf", quantised=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    model = SharedLLMForCausalLM.from_base(base, **builders.TREE, tie_compressor=False)
    assert not hasattr(model.config, "quantization_config")
    model.half().save_pretrained(tmp_path / "saved")
    assert SharedLLMForCausalLM.from_pretrained(tmp_path / "saved").dtype == torch.float16


@pytest.mark.parametrize(("half", "dtype"), [(False, torch.float32), (True, torch.float16)])
def test_weights_keep_the_dtype_they_are_stored_in(tmp_path: Path, half: bool, dtype: torch.dtype) -> None:
    path = write_gguf(builders.base(), tmp_path / "model.gguf", half=half)
    assert load(path).dtype == dtype
    assert load(path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_folder_and_file_name_and_a_file_of_the_same_name_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meant, other = builders.base(), builders.base("qwen2")
    (tmp_path / "there").mkdir()
    write_gguf(meant, tmp_path / "there" / "model.gguf")
    write_gguf(other, tmp_path / "model.gguf")
    # Transformers would take the one in the working directory
    monkeypatch.chdir(tmp_path)
    for base, file in ((tmp_path / "there", "model.gguf"), ("there", "model.gguf"), ("there/model.gguf", None)):
        model = SharedLLMForCausalLM.from_base(base, gguf_file=file, **builders.TREE)
        torch.testing.assert_close(logits(model), logits(meant))


def test_scaled_rotary_frequencies_of_llama_3(tmp_path: Path) -> None:
    base = builders.base(rope_parameters=LLAMA3)
    model = load(
        write_gguf(
            base, tmp_path / "model.gguf", tensors={"rope_freqs.weight": factors_of(LLAMA3, base.config.head_dim)}
        )
    )
    assert model.config.text_config.rope_parameters == pytest.approx(LLAMA3)
    torch.testing.assert_close(logits(model), logits(base))


def test_other_factors_of_the_rotary_frequencies(tmp_path: Path) -> None:
    base = builders.base()
    factors = np.linspace(1, 3, base.config.head_dim // 2).astype(np.float32)
    model = load(write_gguf(base, tmp_path / "model.gguf", tensors={"rope_freqs.weight": factors}))
    expected = copy.deepcopy(base)
    expected.model.rotary_emb.inv_freq /= torch.from_numpy(factors)
    torch.testing.assert_close(logits(model), logits(expected))
    assert not torch.allclose(logits(model), logits(base))


@pytest.mark.parametrize(
    ("rope", "values"),
    [
        (
            {"rope_type": "linear", "factor": 4.0},
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        ),
        ({"rope_type": "linear", "factor": 4.0}, {"llama.rope.scale_linear": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 128,
            },
        ),
        ({"rope_type": "default"}, {"llama.rope.scaling.type": "none"}),
    ],
)
def test_scaled_positions(tmp_path: Path, rope: dict[str, Any], values: dict[str, Any]) -> None:
    base = builders.base(rope_parameters={"rope_theta": 10000.0, **rope})
    model = load(write_gguf(base, tmp_path / "model.gguf", values=values))
    torch.testing.assert_close(logits(model), logits(base))


def test_a_mistral_file_says_that_it_has_no_window(tmp_path: Path) -> None:
    base = builders.base("mistral", sliding_window=None)
    path = write_gguf(base, tmp_path / "m.gguf", architecture="llama", values={"general.name": "Mistral-7B-v0.1"})
    with pytest.warns(UserWarning, match=r"m\.gguf: a Mistral GGUF file names no sliding window"):
        model = SharedLLMForCausalLM.from_base(path, **builders.TREE)
    torch.testing.assert_close(logits(model), logits(base))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"architecture": name}, f"qwen2, qwen3, got '{name}'; load the original checkpoint instead")
            for name in ("smollm3", "granite", "phi3")
        ),
        *(({"architecture": name}, f"qwen2, qwen3, got '{name}'") for name in ("gemma3", "qwen3moe")),
        ({"architecture": "gemma2"}, "expected a GGUF file of architecture llama, mistral, qwen2, qwen3, got 'gemma2'"),
        ({"values": {"split.count": 3}}, r"expected a whole GGUF file, got one of 3 parts"),
        ({"values": {"llama.attention.sliding_window": 64}}, r"without a sliding window, .* got one of 64 tokens"),
        ({"values": {"llama.rope.scaling.type": "longrope"}}, "rotary frequencies scaled linearly, .* got 'longrope'"),
    ],
)
def test_files_that_would_not_be_the_same_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = write_gguf(builders.base(), tmp_path / "model.gguf", **options)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_shapes_other_than_the_file_says(tmp_path: Path) -> None:
    base = builders.base()
    base.config.intermediate_size = 80
    with pytest.raises(ValueError, match=r"expected .*mlp\.\w+\.weight of shape \(.*80.*\) by .*, got \(.*96"):
        load(write_gguf(base, tmp_path / "model.gguf"))


def test_a_file_without_a_tensor(tmp_path: Path) -> None:
    base = builders.base()
    del base.model.layers[2].mlp.up_proj
    with pytest.raises(ValueError, match=r"got one that lacks 1 tensor, the first is model\.layers\.2\.mlp\.up_proj"):
        load(write_gguf(base, tmp_path / "model.gguf"))


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    whole = write_gguf(builders.base(), tmp_path / "model.gguf").read_bytes()
    with pytest.raises(OSError, match=r"expected a GGUF file, got no such file: .*none\.gguf"):
        load(tmp_path / "none.gguf")
    with pytest.raises(OSError, match=r"expected one of the GGUF files in .* \(model\.gguf\), got 'other\.gguf'"):
        load(tmp_path, gguf_file="other.gguf")
    for size in (0, 10, 200, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf: expected a GGUF file, got one that cannot be read"):
            load(tmp_path / "cut.gguf")
    (tmp_path / "text.gguf").write_text("no model at all, and long enough for a header")
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "text.gguf")

"""What other libraries read from a configuration, and how a saved folder is found without importing the package."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from sharedllm_ext import SharedLLMConfig, SharedLLMForCausalLM

from . import builders


def test_sizes_and_special_tokens_are_the_base_s() -> None:
    config = builders.model("qwen3").config
    for name in ("hidden_size", "num_hidden_layers", "max_position_embeddings", "num_key_value_heads", "head_dim"):
        assert getattr(config, name) == getattr(config.text_config, name)
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (128, 1, 2, 0)
    assert not hasattr(config, "n_positions")
    assert not hasattr(config, "quantization_config")


def test_what_is_set_reaches_the_base_s_configuration() -> None:
    config = builders.model().config
    config.eos_token_id = 5
    config.use_cache = False
    assert config.text_config.eos_token_id == config.eos_token_id == 5
    assert config.text_config.use_cache is False
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        other.eos_token_id = 6
        assert (config.eos_token_id, other.eos_token_id) == (5, 6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "make",
    [
        lambda base: SharedLLMConfig(text_config=base.config, **builders.TREE),
        lambda base: SharedLLMForCausalLM.from_base(base, **builders.TREE).config,
    ],
    ids=["configuration", "from_base"],
)
def test_a_loaded_base_keeps_its_own_configuration(make: Callable[[Any], SharedLLMConfig], attention: str) -> None:
    base: Any = builders.base()
    base.set_attn_implementation(attention)
    ids, fields = builders.ids(2, 12), base.config.to_dict()
    with torch.no_grad():
        expected = base(ids).logits
        config = make(base)
        config.eos_token_id = 7
        assert base.config._attn_implementation == attention
        assert base.config.to_dict() == fields
        assert torch.equal(base(ids).logits, expected)


def test_use_cache_false_is_followed() -> None:
    model = builders.model()
    assert model(builders.ids(1, 4)).past_key_values is not None
    model.config.use_cache = False
    assert model(builders.ids(1, 4)).past_key_values is None


def test_saved_values_are_written_once(tmp_path: Path) -> None:
    builders.model().config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "eos_token_id" not in written
    assert written["text_config"]["eos_token_id"] == 2
    assert AutoConfig.from_pretrained(tmp_path).eos_token_id == 2


WITHOUT_IMPORT = """
import sys
from transformers import AutoModelForCausalLM
assert "sharedllm_ext" not in sys.modules
source, target = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("loaded without being allowed to")
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
assert type(model).__module__ == "sharedllm_ext.model.modeling", type(model)
model.save_pretrained(target)
assert type(AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)) is type(model)
"""


def test_auto_classes_find_the_package_when_allowed_to(tmp_path: Path) -> None:
    builders.model().save_pretrained(tmp_path / "first")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_IMPORT, tmp_path / "first", tmp_path / "second"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # the second save neither copies the package's source nor names another file
    names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("first", "second")]
    assert names[0] == names[1]
    assert [name for name in names[0] if name.endswith(".py")] == ["modeling_sharedllm.py"]


@pytest.mark.parametrize("owner", [SharedLLMConfig, SharedLLMForCausalLM])
def test_registering_for_auto_classes_copies_nothing(tmp_path: Path, owner: type) -> None:
    owner.register_for_auto_class("AutoConfig")  # type: ignore[attr-defined]
    builders.model().save_pretrained(tmp_path)
    assert not (tmp_path / "configuration.py").exists()


def test_a_folder_cannot_name_other_code(tmp_path: Path) -> None:
    builders.model().config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps({**written, "auto_map": {"AutoModelForCausalLM": "other.Model"}}))
    assert AutoConfig.from_pretrained(tmp_path).auto_map == written["auto_map"]

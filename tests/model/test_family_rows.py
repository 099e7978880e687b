"""The table of base families: every row is injected, fused and decoded fast, or says why not."""

import importlib
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3MLP

from sharedllm_ext import SharedLLMConfig, SharedLLMForCausalLM
from sharedllm_ext.model import decoding
from sharedllm_ext.model.families import (
    FAMILIES,
    Family,
    LinearPart,
    attention_norm,
    family_of,
    mlp_norm,
    projection,
    sliding_window,
)

from . import builders

ROOT = Path(__file__).resolve().parents[2]
ROWS = list(FAMILIES.values())
PARTS = ("norm", "attention", "mlp")


def _is_norm(module: Any) -> bool:
    return type(module).__name__.endswith("Norm")


def _modules(model: Any, part: str) -> list[Any]:
    layers = model.model.layers
    if part == "norm":
        # before and behind attention and MLP, whatever their names
        norms = [child for layer in layers for child in layer.children() if _is_norm(child)]
        assert {attention_norm(layer) for layer in layers} | {mlp_norm(layer) for layer in layers} <= set(norms)
        return [*norms, *(block.norm for block in model.injected_blocks), model.model.norm]
    return [layer.self_attn if part == "attention" else layer.mlp for layer in layers]


def test_every_row_has_a_builder() -> None:
    assert set(FAMILIES) == {config_class.model_type for config_class, _, _ in builders.FAMILIES.values()}
    assert all(name == row.model_type for name, row in FAMILIES.items())


@pytest.mark.parametrize("row", ROWS, ids=list(FAMILIES))
def test_injected(row: Family) -> None:
    model = builders.model(row.model_type, tie_compressor=False)
    lowest, above = model.model.layers[:2], model.model.layers[2:]
    assert {type(layer).__name__ for layer in lowest} == {f"Injected{row.layer.__name__}"}
    assert {type(layer).__name__ for layer in model.compressor.layers} == {f"Compressor{row.layer.__name__}"}
    assert all(isinstance(layer, row.layer) for layer in (*lowest, *model.compressor.layers))
    assert {type(layer) for layer in above} == {row.layer}
    assert all(family_of(module) is row for layer in lowest for module in (layer, layer.self_attn))
    assert all(family_of(layer.mlp) is row for layer in lowest if isinstance(layer.mlp, row.mlp))
    for module in (lowest[0], model.compressor.layers[0], lowest[0].mlp, lowest[0].self_attn, model.model.norm):
        assert pickle.loads(pickle.dumps(type(module))) is type(module)


@pytest.mark.parametrize("row", ROWS, ids=list(FAMILIES))
@pytest.mark.parametrize("part", PARTS)
def test_fused_or_why_not(row: Family, part: str) -> None:
    family_class = getattr(row, part)
    modules = _modules(builders.model(row.model_type), part)
    experts = [module for module in modules if row.experts is not None and isinstance(module, row.experts)]
    assert bool(experts) == (part == "mlp" and row.experts is not None)
    names = {type(module).__name__ for module in modules if module not in experts}
    if part in row.not_fused:
        assert names == {family_class.__name__} and "expected" in row.not_fused[part]
    else:
        assert names == {f"Fused{family_class.__name__}"}
    assert set(row.not_fused) <= set(PARTS)


@pytest.mark.parametrize("row", ROWS, ids=list(FAMILIES))
def test_decoded_fast_or_why_not(row: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding.support, "RUN_ON_CPU", True)
    model, text = builders.model(row.model_type), builders.ids(2, 9)
    settings: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    expected = model.generate(text, disable_compile=True, **settings)
    steps = []
    end = decoding.DecodeRunner._end
    monkeypatch.setattr(decoding.DecodeRunner, "_end", lambda *a: (steps.append(1), end(*a))[1])
    assert torch.equal(model.generate(text, **settings), expected)
    if row.not_decoded is None:
        assert len(steps) == 4
    else:
        assert not steps and "expected" in row.not_decoded


@pytest.mark.parametrize("row", ROWS, ids=list(FAMILIES))
def test_the_window_is_what_the_layer_looks_back_on(row: Family) -> None:
    fields: dict[str, Any] = {
        "num_hidden_layers": 1,
        "sliding_window": 5,
        "use_sliding_window": True,
        "max_window_layers": 0,
    }
    # SmolLM3 has its window in layers without rotation
    fields |= {"no_rope_layers": [0], "layer_types": ["sliding_attention"]}
    known = builders.FAMILIES[row.model_type][0]()
    model = builders.base(row.model_type, **{name: value for name, value in fields.items() if hasattr(known, name)})
    embeds = torch.randn(1, 9, model.config.hidden_size, requires_grad=True)
    model(inputs_embeds=embeds).logits[0, -1].sum().backward()
    assert embeds.grad is not None
    seen = int((embeds.grad[0] != 0).any(-1).sum())
    assert seen == (sliding_window(model.model.layers[0]) or 9)
    assert seen == (5 if hasattr(known, "sliding_window") else 9)


TEXTS: dict[str, str] = {
    "README.md": (ROOT / "README.md").read_text(),
    "docs/cli.md": (ROOT / "docs" / "cli.md").read_text(),
    "cli/init.py": Path(str(importlib.import_module("sharedllm_ext.cli.init").__file__)).read_text(),
    "SharedLLMConfig": str(SharedLLMConfig.__doc__),
    "from_base": str(SharedLLMForCausalLM.from_base.__doc__),
    "CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text(),
}
# "or a Llama, … or Qwen3 GGUF file", "`.gguf` file (Llama, … or Qwen3)"
GGUF_LIST = re.compile(r"or a ((?:[\w/.]+, )+[\w/.]+ or [\w/.]+) GGUF file|``.gguf`` file \(([^)]*)\)")


@pytest.mark.parametrize("row", ROWS, ids=list(FAMILIES))
@pytest.mark.parametrize("text", TEXTS)
def test_texts_name_every_family(text: str, row: Family) -> None:
    # Qwen3 is not named by Qwen3-MoE, nor Llama by LlamaConfig
    assert re.search(rf"(?<![\w-]){re.escape(row.title)}(?![\w-])", TEXTS[text])


@pytest.mark.parametrize("text", ["docs/cli.md", "cli/init.py", "from_base"])
def test_texts_name_the_families_of_gguf_files(text: str) -> None:
    (found,) = GGUF_LIST.findall(re.sub(r"\s+", " ", TEXTS[text]))
    titles = re.split(r", | or ", "".join(found))
    assert titles == [row.title for row in ROWS if row.gguf]


@pytest.mark.parametrize("row", ROWS, ids=list(FAMILIES))
def test_the_table_of_families_says_what_the_row_says(row: Family) -> None:
    table = (ROOT / "docs" / "ecosystem.md").read_text().splitlines()
    (line,) = [line for line in table if f"| `{row.model_type}` |" in line]
    decoding, gguf = (cell.strip() for cell in line.strip(" |").split("|")[-2:])
    assert decoding.startswith("fast" if row.not_decoded is None else "ordinary")
    assert gguf == ("read" if row.gguf else "refused")


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_parts_of_joined_projections(bias: bool) -> None:
    config = Phi3Config(hidden_size=32, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2)
    attention, mlp = Phi3Attention(config, 0), Phi3MLP(config)
    if bias:
        attention.qkv_proj.bias = torch.nn.Parameter(torch.randn(64))
    joined = {name: "qkv_proj" for name in "qkv"} | {"o": "o_proj"}
    joined |= {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}
    row = Family("phi3", "Phi", torch.nn.Module, Phi3Attention, Phi3MLP, torch.nn.Module, projections=joined)
    x = torch.randn(3, 32)
    for module, whole, names, widths in (
        (attention, attention.qkv_proj, ("q", "k", "v"), [32, 16, 16]),
        (mlp, mlp.gate_up_proj, ("gate", "up"), [24, 24]),
    ):
        parts = [row.projection(module, name) for name in names]
        assert [part.out_features for part in parts] == widths and {part.in_features for part in parts} == {32}
        expected = whole(x).split(widths, -1)
        for part, own in zip(parts, expected, strict=True):
            assert isinstance(part, LinearPart)
            torch.testing.assert_close(part(x), own)
            # a view: what is written to the whole is seen
            assert part.weight.untyped_storage().data_ptr() == whole.weight.untyped_storage().data_ptr()
            assert (part.bias is None) == (whole.bias is None)
    seen: list[Any] = []
    attention.qkv_proj.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(row.projection(attention, "k")(x), attention.qkv_proj(x)[:, 32:48])
    assert len(seen) == 2
    assert row.projection(attention, "o") is attention.o_proj


def test_projections_of_their_own_are_the_modules_themselves() -> None:
    layer = builders.model().model.layers[0]
    assert projection(layer.self_attn, "q") is layer.self_attn.q_proj
    assert projection(layer.mlp, "down") is layer.mlp.down_proj


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_joined_projections_run(register: str) -> None:
    attention, seen = builders.model("phi3").model.layers[3].self_attn, []
    getattr(attention.qkv_proj, register)(lambda *_: seen.append(1))
    projection(attention, "k")(torch.randn(3, 64, requires_grad=True)).sum().backward()
    assert seen

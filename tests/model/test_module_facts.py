"""Whether a model is still what it was when it was examined: everything that a decoding step or a signature reads."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sharedllm_ext.model import examined as examined_module
from sharedllm_ext.model import signature
from sharedllm_ext.model.decoding import session, step, support
from sharedllm_ext.model.examined import examined
from sharedllm_ext.model.module_facts import ModuleFacts

from . import builders

STEPS = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "RUN_ON_CPU", True)


def _layer(model: Any) -> Any:
    return model.model.layers[1]


class _OtherLinear(nn.Linear):
    pass


def _replace_module(model: Any) -> None:
    old = _layer(model).mlp.down_proj
    _layer(model).mlp.down_proj = nn.Linear(old.in_features, old.out_features, bias=False)


def _replace_parameter(model: Any) -> None:
    _layer(model).mlp.down_proj.weight = nn.Parameter(_layer(model).mlp.down_proj.weight.detach().clone())


def _replace_data(model: Any) -> None:
    _layer(model).input_layernorm.weight.data = _layer(model).input_layernorm.weight.data.clone()


def _restride(model: Any) -> None:
    weight = _layer(model).self_attn.o_proj.weight
    # the same address
    weight.data = weight.data.as_strided(weight.shape, (1, weight.shape[0]))


def _write(model: Any) -> None:
    with torch.no_grad():
        _layer(model).self_attn.q_proj.weight.mul_(2)


def _assign(model: Any) -> None:
    model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)


def _change_class(model: Any) -> None:
    _layer(model).self_attn.v_proj.__class__ = _OtherLinear


def _hook(model: Any) -> None:
    _layer(model).mlp.register_forward_hook(lambda *_: None)


def _pre_hook(model: Any) -> None:
    _layer(model).self_attn.q_proj.register_forward_pre_hook(lambda *_: None)


def _forward(model: Any) -> None:
    module = _layer(model).mlp.down_proj
    module.forward = module.forward


def _add_a_bias(model: Any) -> None:
    module = _layer(model).mlp.down_proj
    module.bias = nn.Parameter(torch.zeros(module.out_features))


def _rename(model: Any) -> None:
    modules = _layer(model).mlp._modules
    order = ["up_proj", "gate_proj", *(name for name in modules if name not in ("gate_proj", "up_proj"))]
    pairs = [(name, modules[name]) for name in modules]
    modules.clear()
    for name, (_, module) in zip(order, pairs, strict=True):
        modules[name] = module


def _swap_layers(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def _remove_a_layer(model: Any) -> None:
    del model.model.layers[-1]


def _frequencies(model: Any) -> None:
    model.model.rotary_emb.original_inv_freq.mul_(0.5)


def _scaling(model: Any) -> None:
    _layer(model).self_attn.scaling = 0.7


def _scaling_of_injection(model: Any) -> None:
    _layer(model).injection.scaling = 0.7


def _epsilon(model: Any) -> None:
    model.model.norm.variance_epsilon = 0.5


def _config(model: Any) -> None:
    model.config.text_config.sliding_window = 7


def _nested_config(model: Any) -> None:
    model.config.text_config.rope_parameters["rope_theta"] = 7.0


def _in_a_list(model: Any) -> None:
    _layer(model).self_attn.listed[1]["two"] = 4


CHANGES = (
    _replace_module,
    _replace_parameter,
    _replace_data,
    _restride,
    _write,
    _assign,
    _change_class,
    _hook,
    _pre_hook,
    _forward,
    _add_a_bias,
    _rename,
    _swap_layers,
    _remove_a_layer,
    _frequencies,
    _scaling,
    _scaling_of_injection,
    _epsilon,
    _config,
    _nested_config,
    _in_a_list,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_change_is_seen(change: Callable[[Any], None]) -> None:
    model = builders.model()
    _layer(model).self_attn.listed = [1, {"two": 3}]
    roots = (model.model, model.lm_head)
    facts = ModuleFacts.of(roots)
    assert facts is not None and facts.hold_for(roots)
    known = examined(model)
    assert examined(model) is known
    change(model)
    assert not facts.hold_for(roots) and examined(model) is not known


def test_what_makes_no_difference() -> None:
    model = builders.model()
    known = examined(model)
    with torch.no_grad():
        memory = model.compress(builders.ids(1, 70))
        model.generate(builders.ids(2, 9), memory=memory, **STEPS)
        model(builders.ids(2, 9), memory=memory)
    assert examined(model) is known
    model.train()
    model.eval()
    model.requires_grad_(False)
    handle = _layer(model).register_full_backward_hook(lambda *_: None)
    handle.remove()
    assert examined(model) is known


def test_a_removed_hook_is_examined_again() -> None:
    model = builders.model()
    with torch.no_grad():
        assert support.obstacle_in_model(model) is None
        handle = _layer(model).mlp.register_forward_hook(lambda *_: None)
        for _ in range(2):
            assert "forward hook" in (support.obstacle_in_model(model) or "")
        handle.remove()
        assert support.obstacle_in_model(model) is None


@pytest.mark.parametrize("change", [_scaling, _scaling_of_injection, _epsilon, _replace_parameter, _frequencies])
def test_a_step_fixes_what_changes(change: Callable[[Any], None]) -> None:
    model = builders.model()
    before = step.state_of_step(model, None)
    assert step.state_of_step(model, None) == before
    change(model)
    assert step.state_of_step(model, None) != before


def test_what_was_written_in_place_needs_no_other_graph() -> None:
    model = builders.model()
    before, known = step.state_of_step(model, None), examined(model)
    _write(model)
    # other facts, of equal weight for a graph
    assert examined(model) is not known and step.state_of_step(model, None) == before


def test_an_object_at_the_same_address_is_another_one() -> None:
    model = builders.model()
    roots = (model.model, model.lm_head)
    for number in range(2000):
        _layer(model).self_attn.scaling = 0.5 + number
        facts = ModuleFacts.of(roots)
        assert facts is not None
        _layer(model).self_attn.scaling = None
        # a float that was freed may have been where this one is
        _layer(model).self_attn.scaling = 0.25 + number
        assert not facts.hold_for(roots)


def test_nothing_large_is_kept() -> None:
    model = builders.model()
    examined(model)
    module, weight = weakref.ref(_layer(model).mlp), weakref.ref(model.lm_head.weight)
    _layer(model).mlp = copy.deepcopy(_layer(model).mlp)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    gc.collect()
    assert module() is None and weight() is None
    examined(model)
    whole = weakref.ref(model)
    count = len(examined_module._EXAMINED)
    del model
    gc.collect()
    assert whole() is None and len(examined_module._EXAMINED) == count - 1


def test_tensors_that_tell_less_are_never_known() -> None:
    class Other(torch.Tensor):
        pass

    model = builders.model()
    _layer(model).mlp.down_proj.weight = nn.Parameter(_layer(model).mlp.down_proj.weight.detach().as_subclass(Other))
    assert ModuleFacts.of((model.model, model.lm_head)) is None
    with torch.no_grad():
        for _ in range(2):
            assert "expected a plain parameter, got Other" in (support.obstacle_in_model(model) or "")


def test_a_module_with_fields_before_those_of_modules_is_never_known() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            self.__dict__["early"] = 1
            super().__init__()

    assert ModuleFacts.of((Early(),)) is None


def test_inference_tensors() -> None:
    with torch.inference_mode():
        model = builders.model()
    roots = (model.model, model.lm_head)
    facts = ModuleFacts.of(roots)
    assert facts is not None and facts.hold_for(roots)
    _scaling(model)
    assert not facts.hold_for(roots)


# -- a generate looks once --------------------------------------------------------------------------------------------


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The costly looks at a model: facts that are compared or told, states, whole examinations."""
    calls: list[str] = []

    def count(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(ModuleFacts, "hold_for")
    count(support, "_obstacle_below")
    count(step, "_constants_of")
    count(signature, "state_of")
    return calls


def test_a_second_question_looks_once(looked: list[str]) -> None:
    model, text = builders.model(), builders.ids(1, 9)
    memory = model.compress(builders.ids(1, 70))
    model.generate(text, memory=memory, **STEPS)
    looked.clear()
    for _ in range(3):
        model.generate(text, memory=memory, **{**STEPS, "max_new_tokens": 1})
        assert looked == ["hold_for"]
        looked.clear()


def test_a_forward_looks_once(looked: list[str]) -> None:
    model, text = builders.model(), builders.ids(1, 9)
    memory = model.compress(builders.ids(1, 70))
    with torch.no_grad():
        model(text, memory=memory)
        looked.clear()
        model(text, memory=memory)
    assert looked == ["hold_for"]


@pytest.mark.parametrize("change", [_write, _scaling, _replace_module, _epsilon])
def test_generate_after_a_change(change: Callable[[Any], None]) -> None:
    model, text = builders.model(), builders.ids(2, 9)
    with torch.no_grad():
        for block in model.injected_blocks:
            block.o_proj.weight.normal_(std=0.5)
    for _ in range(2):
        memory = model.compress(builders.ids(1, 70))
        for _ in range(3):
            got = model.generate(text, memory=memory, **STEPS)
        expected = model.generate(text, memory=memory, disable_compile=True, **STEPS)
        assert torch.equal(got, expected)
        torch.manual_seed(3)
        change(model)


@pytest.mark.parametrize("change", [_write, _epsilon, _replace_module])
def test_a_memory_of_other_weights_is_refused(change: Callable[[Any], None]) -> None:
    model, text = builders.model(), builders.ids(2, 9)
    memory = model.compress(builders.ids(1, 70))
    model.generate(text, memory=memory, **STEPS)
    if change is _replace_module:
        torch.manual_seed(3)
    change(model)
    if change is _epsilon:
        # that of the compressor's layers, which the last norm is not among
        _layer(model).input_layernorm.variance_epsilon = 0.5
    with pytest.raises(ValueError, match="memory: made by another model"):
        model.generate(text, memory=memory, **STEPS)
    with pytest.raises(ValueError, match="memory: made by another model"), torch.no_grad():
        model(text, memory=memory)


def test_another_memory_is_checked_in_the_loop() -> None:
    model, text = builders.model(), builders.ids(1, 9)
    memory = model.compress(builders.ids(1, 70))
    own = session.begin_generate(model, True, 0, memory)
    try:
        assert not session.was_checked(builders.model(), memory) and not session.was_examined(builders.model())
        # once, and of no other memory
        assert session.was_examined(model) and not session.was_examined(model)
        assert session.was_checked(model, memory) and not session.was_checked(model, memory)
    finally:
        session.end_generate(model, True, own)
    own = session.begin_generate(model, False, 0, memory)
    try:
        assert not session.was_checked(model, memory) and not session.was_examined(model)
    finally:
        session.end_generate(model, True, own)
    assert not session.was_checked(model, memory) and text.shape == (1, 9)

"""torch.compile in one graph, torch.export with a memory, and outputs as the base model gives them."""

import io

import pytest
import torch

from sharedllm_ext import ContextMemory, SharedLLMForCausalLM

from . import builders


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@torch.no_grad()
def test_one_graph_takes_every_memory() -> None:
    model = builders.model()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    text = builders.ids(2, 10)
    torch.testing.assert_close(compiled(text).logits, model(text).logits)
    # more of them than a function may be compiled for
    for length in (130, 200, 64, 33, 300, 90, 170, 250, 270, 140):
        memory = model.compress(builders.ids(2, length), query_ids=text)
        torch.testing.assert_close(compiled(text, memory=memory).logits, model(text, memory=memory).logits)


@pytest.mark.parametrize("family", builders.LATER)
@torch.no_grad()
def test_one_graph_of_every_family(family: str) -> None:
    model = builders.model(family)
    text = builders.ids(2, 10)
    if family == "phi3_longrope":
        # older Transformers (5.17) ask on the host which factors to take
        try:
            torch.compile(builders.base(family), backend="eager", fullgraph=True)(text)
        except torch._dynamo.exc.TorchDynamoException:
            pytest.skip("this Transformers traces no longrope")
        torch.compiler.reset()
    memory = model.compress(builders.ids(2, 130), query_ids=text)
    got = torch.compile(model, backend="eager", fullgraph=True)(text, memory=memory).logits
    torch.testing.assert_close(got, model(text, memory=memory).logits)


@torch.no_grad()
def test_contexts_are_compressed_outside_of_the_graph() -> None:
    model = builders.model()
    text, context = builders.ids(2, 10), builders.ids(2, 130)
    want = model(text, context_ids=context).logits
    torch.testing.assert_close(torch.compile(model, backend="eager")(text, context_ids=context).logits, want)
    torch.compiler.reset()
    with pytest.raises(Exception, match="compress the context first"):
        torch.compile(model, backend="eager", fullgraph=True)(text, context_ids=context)


def test_gradients_through_one_graph() -> None:
    model = builders.model(query_aware=False).train()
    text = builders.ids(2, 10)
    memory = model.compress(builders.ids(2, 130))
    model(text, memory=memory, labels=text, use_cache=False).loss.backward(retain_graph=True)
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(text, memory=memory, labels=text, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        if name in want:
            torch.testing.assert_close(parameter.grad, want[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_export_with_a_memory(strict: bool) -> None:
    model = builders.model()
    text, context = builders.ids(2, 10), builders.ids(2, 130)
    memory = model.compress(context, query_ids=text)
    program = torch.export.export(model, (text,), {"memory": memory, "use_cache": False}, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    other = builders.ids(2, 10)
    again = model.compress(builders.ids(2, 130), query_ids=other)
    got = loaded(other, memory=again, use_cache=False)
    torch.testing.assert_close(got.logits, model(other, memory=again).logits)
    assert isinstance(got.memory, ContextMemory) and got.memory.signature == again.signature


@torch.no_grad()
def test_export_with_a_context_names_the_way() -> None:
    model = builders.model()
    with pytest.raises(ValueError, match=r"compress: expected to run outside of torch\.export.*compress the context"):
        torch.export.export(model, (builders.ids(1, 5),), {"context_ids": builders.ids(1, 70)}, strict=False)


@pytest.mark.parametrize("labelled", [False, True])
@torch.no_grad()
def test_tuples_instead_of_outputs(labelled: bool) -> None:
    model = builders.model()
    text, context = builders.ids(1, 5), builders.ids(1, 70)
    labels = {"labels": text} if labelled else {}
    want = model(text, context_ids=context, **labels)
    got = model(text, context_ids=context, return_dict=False, **labels)
    assert isinstance(got, tuple) and len(got) == (4 if labelled else 3)
    assert torch.equal(got[int(labelled)], want.logits) and isinstance(got[-1], ContextMemory)
    model.config.return_dict = model.config.text_config.return_dict = False
    again = model(text, context_ids=context, **labels)
    assert isinstance(again, tuple) and torch.equal(again[int(labelled)], want.logits)
    assert model.generate(text, context_ids=context, max_new_tokens=3).shape == (1, 8)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", *builders.LATER])
@torch.no_grad()
def test_attention_maps_and_hidden_states_are_the_bases(family: str, attention: str) -> None:
    base = builders.base(family)
    model = SharedLLMForCausalLM.from_base(builders.base(family), **builders.TREE)
    model.load_state_dict(base.state_dict(), strict=False)
    text, context = builders.ids(2, 8), builders.ids(2, 70)
    for one in (base, model):
        one.set_attn_implementation(attention)
    wanted = {"output_attentions": True, "output_hidden_states": True}
    want = base(text, **wanted)
    # the zero projections of new blocks leave the base as it is
    for got in (model(text, **wanted), model(text, context_ids=context, **wanted)):
        for name in ("attentions", "hidden_states"):
            ours, theirs = getattr(got, name), getattr(want, name)
            assert (ours is None) == (theirs is None)
            for mine, other in zip(ours or (), theirs or (), strict=True):
                assert (mine is None) == (other is None)
                if mine is not None:
                    torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)
    assert model(text, output_attentions=None).attentions is None

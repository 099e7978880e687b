"""Short running texts that begin a cache, read in one step: what the ordinary forward gives."""

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, StaticCache

from sharedllm_ext import ContextMemory
from sharedllm_ext.model.cache_name import cache_of
from sharedllm_ext.model.decoding import PreallocatedCache, graph, prompt, session, support
from sharedllm_ext.model.decoding.prompt import MOST_TOKENS, ShortPrompt, columns_of

from ..support import needs_cuda
from . import builders
from .recorded import Recorded, use_recordings

STEPS = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}


@pytest.fixture(params=["operators", "graphs"])
def read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Turns the steps on for the CPU, also with what stands for graphs; rows and columns of each text read by one."""
    if request.param == "graphs":
        use_recordings(monkeypatch)
    shapes: list[tuple[int, int]] = []
    run = ShortPrompt.run

    def counting(self: ShortPrompt, *args: Any) -> Tensor:
        shapes.append((self.batch, self.columns))
        return run(self, *args)

    monkeypatch.setattr(support, "RUN_ON_CPU", True)
    monkeypatch.setattr(ShortPrompt, "run", counting)
    yield shapes


def _left_padded(rows: int, length: int) -> Tensor:
    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        mask[row, : row % 4] = 0
    return mask


def _ordinary(model: Any, *args: Any, **kwargs: Any) -> Any:
    before, support.RUN_ON_CPU = support.RUN_ON_CPU, False
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    finally:
        support.RUN_ON_CPU = before


def _twice(model: Any, text: Tensor, **kwargs: Any) -> Any:
    """A text after one of the same form, by a replay where there are graphs."""
    with torch.no_grad():
        model(text.flip(1), **kwargs)
        if graph.uses_graphs(text.device):
            # the first one loads the kernels, and a graph is captured at the one after it
            model(text.roll(1, 1), **kwargs)
        return model(text, **kwargs)


def _same(got: Any, expected: Any, mask: Tensor | None = None) -> None:
    shown = slice(None) if mask is None else mask.bool()[:, -got.logits.shape[1] :]
    torch.testing.assert_close(got.logits[shown], expected.logits[shown], rtol=0, atol=3e-5)
    for own, other in zip(cache_of(got).layers, cache_of(expected).layers, strict=True):
        for mine, its in ((own.keys, other.keys), (own.values, other.values)):
            assert mine.shape == its.shape
            kept = slice(None) if mask is None else mask.bool()[:, -mine.shape[2] :]
            mine, its = mine.transpose(1, 2)[kept], its.transpose(1, 2)[kept]
            torch.testing.assert_close(mine, its, rtol=0, atol=3e-5)


@pytest.mark.parametrize("family", builders.DECODED)
@pytest.mark.parametrize("memory", ["none", "one", "each"])
def test_logits_and_cache(read: list[tuple[int, int]], family: str, memory: str) -> None:
    model, rows = builders.model(family), 3
    more = {}
    if memory != "none":
        more["memory"] = model.compress(builders.ids(rows if memory == "each" else 1, 70))
    for length, columns in ((5, 8), (8, 8), (20, 32)):
        text, mask = builders.ids(rows, length), _left_padded(rows, length)
        for masks in ({}, {"attention_mask": mask}):
            expected = _ordinary(model, text, **masks, **more)
            assert not read
            got = _twice(model, text, **masks, **more)
            assert set(read) == {(rows, columns)}
            _same(got, expected, masks.get("attention_mask"))
            read.clear()


@pytest.mark.parametrize("kind", [PreallocatedCache, DynamicCache, None])
def test_caches(read: list[tuple[int, int]], kind: Any) -> None:
    model, text = builders.model(), builders.ids(2, 9)
    memory = model.compress(builders.ids(1, 70))
    if kind is None:
        caches: list[Any] = [None] * 3
    else:
        caches = [kind(config=model.config.text_config) for _ in range(3)]
    with torch.no_grad():
        outs = [model(text + number, memory=memory, past_key_values=cache) for number, cache in enumerate(caches)]
        expected = [_ordinary(model, text + number, memory=memory) for number in range(3)]
        assert len(read) == 3
        for got, its in zip(outs, expected, strict=True):
            # the later texts did not touch the caches of the earlier ones
            _same(got, its)
            assert got.memory is memory and type(cache_of(got)) is (kind or DynamicCache)
        more = builders.ids(2, 3)
        over = [model(more, past_key_values=cache_of(out)).logits for out in (outs[2], expected[2])]
    torch.testing.assert_close(*over, rtol=0, atol=3e-5)
    assert len(read) == 3


def test_generate(read: list[tuple[int, int]]) -> None:
    model, texts = builders.model(), [builders.ids(2, length) for length in (9, 7, 11, 14)]
    memory = model.compress(builders.ids(1, 70))
    expected = [model.generate(text, memory=memory, disable_compile=True, **STEPS) for text in texts]
    assert not read
    mask = _left_padded(2, 9)
    padded = model.generate(texts[0], attention_mask=mask, memory=memory, disable_compile=True, **STEPS)
    for text, tokens in zip(texts, expected, strict=True):
        assert torch.equal(model.generate(text, memory=memory, **STEPS), tokens)
    assert torch.equal(model.generate(texts[0], attention_mask=mask, memory=memory, **STEPS), padded)
    # 9, 11 and 14 tokens are of 16 columns, 7 of 8
    assert read == [(2, 16), (2, 8), (2, 16), (2, 16), (2, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_question_has_one_answer(read: list[tuple[int, int]], dtype: torch.dtype) -> None:
    model, text = builders.model(dtype=dtype), builders.ids(2, 9)
    memory = model.compress(builders.ids(1, 70))
    before = Recorded.replays
    with torch.no_grad():
        first = model(text, memory=memory)
        # many memories are asked once
        assert Recorded.replays == before
        later = [model(text, memory=memory) for _ in range(3)]
    assert len(read) == 4 and Recorded.replays - before == (3 if graph.uses_graphs(text.device) else 0)
    for again in later:
        assert torch.equal(again.logits, first.logits)
        for own, other in zip(cache_of(again).layers, cache_of(first).layers, strict=True):
            assert torch.equal(own.keys, other.keys) and torch.equal(own.values, other.values)


def test_logits_to_keep(read: list[tuple[int, int]]) -> None:
    model, text = builders.model(), builders.ids(2, 9)
    memory = model.compress(builders.ids(1, 70))
    for kept in (1, 3, torch.tensor([0, 4])):
        got, expected = (call(model, text, memory=memory, logits_to_keep=kept) for call in (_twice, _ordinary))
        torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=3e-5)
    assert read


def test_bfloat16(read: list[tuple[int, int]]) -> None:
    model, text = builders.model(dtype=torch.bfloat16), builders.ids(3, 20)
    memory = model.compress(builders.ids(1, 70))
    got, expected = (call(model, text, memory=memory).logits.float() for call in (_twice, _ordinary))
    assert read and (got - expected).norm() / expected.norm() < 0.05


def test_columns() -> None:
    assert [columns_of(1, length) for length in (1, 8, 9, 64, 65, 256, 257)] == [8, 8, 16, 64, 96, 256, None]
    assert columns_of(4, 64) == 64 and columns_of(5, 64) is None and columns_of(MOST_TOKENS, 1) is None


@pytest.mark.parametrize(
    "what",
    ["hole", "positions", "hook", "training", "gradients", "long", "states", "static", "labels", "filled", "embeds"],
)
def test_what_the_ordinary_forward_reads(read: list[tuple[int, int]], what: str) -> None:
    model, text = builders.model(), builders.ids(2, 9)
    settings: dict[str, Any] = {"memory": model.compress(builders.ids(1, 70))}
    if what == "hole":
        settings["attention_mask"] = torch.ones_like(text)
        settings["attention_mask"][0, 4] = 0
    elif what == "positions":
        settings["position_ids"] = torch.arange(9).expand(2, 9) + 3
    elif what == "hook":
        model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    elif what == "training":
        model.train()
    elif what == "long":
        text = builders.ids(20, 20)
    elif what == "states":
        settings["output_hidden_states"] = True
    elif what == "static":
        settings["past_key_values"] = StaticCache(config=model.config.text_config, max_cache_len=32)
    elif what == "labels":
        settings["labels"] = text
    elif what == "filled":
        settings["past_key_values"] = cache_of(_ordinary(model, text, **settings))
    for _ in range(3):
        if what == "embeds":
            with torch.no_grad():
                model(inputs_embeds=model.get_input_embeddings()(text), **settings)
        else:
            with torch.set_grad_enabled(what == "gradients"):
                model(text, **settings)
        if what == "static":
            settings["past_key_values"].reset()
    assert not read


def test_another_memory_and_other_weights(read: list[tuple[int, int]]) -> None:
    model, text = builders.model(), builders.ids(2, 9)
    for change in range(4):
        memory = model.compress(builders.ids(1, 70))
        _same(_twice(model, text, memory=memory), _ordinary(model, text, memory=memory))
        if change == 1:
            model.load_state_dict({name: x.clone().roll(1) for name, x in model.state_dict().items()}, assign=True)
        elif change == 2:
            with torch.no_grad():
                model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
                model.model.layers[0].mlp.down_proj.weight.neg_()
    assert len(read) == (12 if graph.uses_graphs(text.device) else 8)


def test_what_is_kept(read: list[tuple[int, int]]) -> None:
    model, text = builders.model(), builders.ids(2, 9)
    memory = model.compress(builders.ids(1, 70))
    held = weakref.ref(memory.keys[0])
    _twice(model, text, memory=memory)
    for rows in range(1, prompt.KEPT_PROMPTS + 4):
        _twice(model, builders.ids(rows, 9), memory=memory)
    assert len(prompt._KEPT[model]._steps) == prompt.KEPT_PROMPTS
    memory = None
    gc.collect()
    # what stands for a graph holds what it reads, unlike a graph
    assert (held() is None) != graph.uses_graphs(text.device)
    session.release(model)
    assert model not in prompt._KEPT


def test_an_error_on_the_way_leaves_no_step(read: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = builders.model(), builders.ids(2, 9)
    memory = model.compress(builders.ids(1, 70))
    expected = _ordinary(model, text, memory=memory)
    _twice(model, text, memory=memory)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt), torch.no_grad():
        context.setattr(ShortPrompt, "states", fail)
        model(text, memory=memory)
    assert list(prompt._KEPT[model]._steps.values()) == [None]
    with torch.no_grad():
        _same(model(text, memory=memory), expected)


def test_threads(read: list[tuple[int, int]]) -> None:
    model, texts = builders.model(), [builders.ids(1, 9) for _ in range(8)]
    memory = model.compress(builders.ids(1, 70))
    expected = [_ordinary(model, text, memory=memory).logits for text in texts]
    failed: list[int] = []

    def ask(number: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                got = model(texts[number], memory=memory).logits
                if not torch.allclose(got, expected[number], atol=3e-5):
                    failed.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and read


@needs_cuda
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "granite", "phi3"])
@pytest.mark.parametrize(("rows", "length"), [(1, 5), (1, 64), (1, 200), (3, 20), (9, 16)])
def test_graphs_on_cuda(family: str, rows: int, length: int) -> None:
    own = builders.FAMILIES[family][2]
    sizes = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": own.get("num_attention_heads", 4)}
    base = builders.base(family, **{**own, **sizes}).to("cuda", torch.bfloat16)
    model = builders.SharedLLMForCausalLM.from_base(base, **{**builders.TREE, "window": 256})
    for block in model.injected_blocks:
        nn.init.normal_(block.o_proj.weight, std=0.1)
    mask = _left_padded(rows, length).cuda()
    documents = ContextMemory.concat([model.compress(builders.ids(1, tokens).cuda()) for tokens in (40, 100, 70)])
    with torch.no_grad():
        for memory in (documents.select([0]), documents.select([row % 3 for row in range(rows)])):
            for number in range(5):
                text = builders.ids(rows, length).cuda()
                more = {"attention_mask": mask} if number % 2 else {}
                got, again = (model(text, memory=memory, **more) for _ in range(2))
                assert torch.equal(got.logits, again.logits)
                model.train()
                expected = model(text, memory=memory, **more)
                model.eval()
                for mine, its in (
                    (got.logits, expected.logits),
                    (cache_of(got).layers[-1].values, cache_of(expected).layers[-1].values),
                ):
                    mine, its = (x if x.dim() == 3 else x.transpose(1, 2) for x in (mine, its))
                    # the cache of a layer with a sliding window keeps the last tokens
                    kept = mask.bool()[:, -mine.shape[1] :] if more else slice(None)
                    mine, its = mine[kept].float(), its[kept].float()
                    assert (mine - its).norm() / its.norm() < 0.05
    steps = [step for step in prompt._KEPT[model]._steps.values() if step is not None]
    assert steps and all(step._graph is not None for step in steps)


def _states(layers: int, rows: int, length: int) -> Tensor:
    return torch.randn(layers, 2, rows, length, 2, 16)


def _holds(cache: PreallocatedCache, states: Tensor) -> bool:
    return all(
        torch.equal(layer.keys, keys.transpose(1, 2)) and torch.equal(layer.values, values.transpose(1, 2))
        for layer, (keys, values) in zip(cache.layers, states, strict=True)
    )


def test_a_cache_takes_the_states_of_all_layers() -> None:
    config = builders.base().config
    count = config.num_hidden_layers
    cache = PreallocatedCache(config, limit=300)
    states = _states(count, 2, 9)
    cache.fill(states)
    assert _holds(cache, states) and cache.get_seq_length() == 9
    storages = [layer.storage for layer in cache.layers]
    assert {x.untyped_storage().data_ptr() for pair in storages for x in pair} == {
        storages[0][0].untyped_storage().data_ptr()
    }
    # the next one writes to the same storages
    after = PreallocatedCache(config, limit=300, spares=storages)
    other = _states(count, 2, 14)
    after.fill(other)
    assert _holds(after, other)
    assert all(
        x is y for pair, own in zip(storages, after.layers, strict=True) for x, y in zip(pair, own.storage, strict=True)
    )
    # others do not fit, or do not lie in a block in this order
    for kept, rows, length in (
        (storages, 1, 9),
        (storages, 2, storages[0][0].shape[1] + 1),
        (storages[::-1], 2, 9),
        ([(keys.clone(), values.clone()) for keys, values in storages], 2, 9),
        ([storages[0], *[None] * (count - 1)], 2, 9),
    ):
        fresh, states = PreallocatedCache(config, spares=kept), _states(count, rows, length)
        fresh.fill(states)
        assert _holds(fresh, states) and _holds(after, other)
    # growing leaves the block
    more = torch.randn(2, 2, 500, 16)
    for index in range(count):
        after.update(more, more, index)
    assert after.get_seq_length() == 514 and all(torch.equal(layer.keys[:, :, 14:], more) for layer in after.layers)
    after.reset()
    after.fill(other)
    assert _holds(after, other)


def test_a_cache_filled_in_inference_mode() -> None:
    config = builders.base().config
    cache, states = PreallocatedCache(config), _states(config.num_hidden_layers, 1, 5)
    with torch.inference_mode():
        cache.fill(states.clone())
    more = torch.randn(1, 2, 3, 16)
    for index in range(config.num_hidden_layers):
        cache.update(more, more, index)
    assert cache.get_seq_length() == 8 and torch.equal(cache.layers[0].keys[:, :, 5:], more)

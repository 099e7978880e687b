"""What a user can get wrong with the model, and the message that comes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sharedllm_ext import ContextMemory, SharedLLMConfig, SharedLLMForCausalLM, load_published_checkpoint

from . import builders

IDS, CONTEXT = torch.full((2, 6), 5), torch.full((2, 40), 7)


@pytest.fixture(scope="module")
def model() -> SharedLLMForCausalLM:
    return builders.model()


def _config(**fields: Any) -> SharedLLMConfig:
    return SharedLLMConfig(text_config=builders.base().config, **{**builders.TREE, **fields})


def _load(change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    config = _config()
    state = SharedLLMForCausalLM(config).state_dict()
    published = {
        name.replace("injection.norm", "cross_attn.layernorm").replace("injection", "cross_attn"): tensor
        for name, tensor in state.items()
    }
    change(published)
    load_published_checkpoint(published, config)


CASES: dict[str, tuple[Callable[[SharedLLMForCausalLM], Any], str]] = {
    "input_ids: floats": (
        lambda m: m(IDS.float()),
        r"input_ids: expected integer token ids .int64 or int32., got dtype torch.float32",
    ),
    "context_ids: NaN": (
        lambda m: m(IDS, context_ids=torch.full((2, 4), float("nan"))),
        r"context_ids: expected integer token ids .int64 or int32., got dtype torch.float32",
    ),
    "input_ids: one dimension": (lambda m: m(IDS[0]), r"input_ids: expected shape \[batch, tokens\], got \(6,\)"),
    "context_ids: by chunk": (
        lambda m: m(IDS, context_ids=CONTEXT.view(2, 4, 10)),
        r"context_ids: expected shape \[batch, tokens\], got \(2, 4, 10\)",
    ),
    "context_ids: a list": (lambda m: m(IDS, context_ids=[[1, 2]]), r"context_ids: expected a tensor, got list"),
    "input_ids: out of vocabulary": (lambda m: m(IDS + 200), r"input_ids: expected token ids from 0 to 127, got 205"),
    "context_ids: negative": (
        lambda m: m(IDS, context_ids=CONTEXT - 8),
        r"context_ids: expected token ids from 0 to 127, got -1",
    ),
    "generate: out of vocabulary": (
        lambda m: m.generate(IDS + 123, max_new_tokens=1),
        r"input_ids: expected token ids from 0 to 127, got 128",
    ),
    "context_ids: other device": (
        lambda m: m(IDS, context_ids=CONTEXT.to("meta")),
        r"context_ids: expected device cpu as the model, got meta",
    ),
    "context mask: shape": (
        lambda m: m(IDS, context_ids=CONTEXT, context_attention_mask=torch.ones(2, 39)),
        r"context_attention_mask: expected the shape of context_ids \(2, 40\), got \(2, 39\)",
    ),
    "context mask without context": (
        lambda m: m(IDS, context_attention_mask=torch.ones(2, 40)),
        r"context_attention_mask: expected context_ids with it, got none",
    ),
    "generate: context mask without context": (
        lambda m: m.generate(IDS, context_attention_mask=torch.ones(2, 40)),
        r"context_attention_mask: expected context_ids with it, got none",
    ),
    "context: other batch": (
        lambda m: m(IDS, context_ids=CONTEXT[:1]),
        r"context_ids: expected 2 rows, one for each row of input_ids, got 1",
    ),
    "generate: other batch": (
        lambda m: m.generate(IDS, context_ids=CONTEXT[:1], max_new_tokens=1),
        r"context_ids: expected 2 rows, one for each row of input_ids, got 1",
    ),
    "mask of the running text": (
        lambda m: m(IDS, context_ids=CONTEXT, attention_mask=torch.ones(2, 5)),
        r"attention_mask: expected the shape of input_ids .2, 6., got .2, 5.",
    ),
    "input_ids: small integers": (lambda m: m.compress(CONTEXT.to(torch.uint16)), r"int64 or int32.*torch.uint16"),
    "no running text": (
        lambda m: m(IDS[:, :0], context_ids=CONTEXT),
        r"input_ids: expected at least one token a row, got shape .2, 0.",
    ),
    "generate: no running text": (
        lambda m: m.generate(IDS[:, :0], context_ids=CONTEXT),
        r"input_ids: expected at least one token a row, got shape .2, 0.",
    ),
    "query mask without query": (
        lambda m: m(IDS, context_ids=CONTEXT, query_attention_mask=torch.ones(2, 6)),
        r"query_attention_mask: expected query_ids with it, got none",
    ),
    "query of a memory": (
        lambda m: m(IDS, memory=m.compress(CONTEXT), query_ids=IDS),
        r"query_ids: expected context_ids with it, got a memory, whose nodes have been chosen",
    ),
    "query: both": (
        lambda m: m.compress(CONTEXT, query_ids=IDS, query_embeds=torch.ones(2, 6, 64)),
        r"query_ids, query_embeds: expected at most one of them, got both",
    ),
    "query of embeddings: width": (
        lambda m: m.compress(CONTEXT, query_embeds=torch.ones(2, 6, 63)),
        r"query_embeds: expected shape \[batch, tokens, 64\], got \(2, 6, 63\)",
    ),
    "inputs_embeds: integers": (
        lambda m: m(inputs_embeds=torch.ones(2, 6, 64, dtype=torch.int64)),
        r"inputs_embeds: expected a floating point dtype, got torch.int64",
    ),
    "inputs_embeds: no tokens": (
        lambda m: m(inputs_embeds=torch.ones(2, 0, 64)),
        r"inputs_embeds: expected at least one token a row, got shape \(2, 0, 64\)",
    ),
    "inputs_embeds: other batch": (
        lambda m: m(inputs_embeds=torch.ones(3, 6, 64), context_ids=CONTEXT),
        r"context_ids: expected 3 rows, one for each row of inputs_embeds, got 2",
    ),
    "inputs_embeds: labels": (
        lambda m: m(inputs_embeds=torch.ones(2, 6, 64), labels=IDS[:, 1:]),
        r"labels: expected the shape of inputs_embeds \(2, 6\), got \(2, 5\)",
    ),
    "labels: a list": (lambda m: m(IDS, labels=IDS.tolist()), r"labels: expected a tensor, got list"),
    "mask: a list": (
        lambda m: m.compress(CONTEXT, [[1] * 40] * 2),
        r"context_attention_mask: expected a tensor, got list",
    ),
    "mask of a long text: four dimensions": (
        lambda m: m(CONTEXT, attention_mask=torch.ones(2, 1, 40, 40)),
        r"attention_mask: expected the shape of input_ids \(2, 40\), got \(2, 1, 40, 40\)",
    ),
    "logits_to_keep: negative": (
        lambda m: m(CONTEXT, logits_to_keep=-3),
        r"logits_to_keep: expected at least 0, got -3",
    ),
    "misspelt context": (lambda m: m(IDS, contxt_ids=CONTEXT), r"expected context_ids.*got 'contxt_ids'"),
    "context": (lambda m: m(IDS, context=CONTEXT), r"expected context_ids.*got 'context'"),
    "labels: floats": (lambda m: m(IDS, labels=IDS.float()), r"labels: expected dtype torch.int64, got torch.float32"),
    "labels: out of vocabulary": (
        lambda m: m(IDS, labels=IDS + 123),
        r"labels: expected token ids from 0 to 127 or -100, got 128",
    ),
    "config: a word for yes or no": (
        lambda m: _config(query_aware="no"),
        r"query_aware: expected True or False, got 'no'",
    ),
    "another family's checkpoint": (
        lambda m: SharedLLMConfig.from_dict({"model_type": "llama"}),
        r"expected a sharedllm checkpoint, got a llama one; make one from it with from_base",
    ),
    "an unsupported family's checkpoint": (
        lambda m: SharedLLMConfig.from_dict({"model_type": "gpt2"}),
        r"expected a sharedllm checkpoint, got a gpt2 one$",
    ),
    "labels: negative": (
        lambda m: m(IDS, labels=IDS - 6),
        r"labels: expected token ids from 0 to 127 or -100, got -1",
    ),
    "a folder as memory": (lambda m: ContextMemory.load("/", m), r"expected a file, got '/', which is a folder"),
    "query: other batch": (
        lambda m: m.compress(CONTEXT, query_ids=IDS[:1]),
        r"query_ids: expected 2 rows, one for each row of context_ids, got 1",
    ),
    "query: floats": (
        lambda m: m.compress(CONTEXT, query_ids=IDS / 2),
        r"query_ids: expected integer token ids .int64 or int32., got dtype torch.float32",
    ),
    "query mask: shape": (
        lambda m: m.compress(CONTEXT, query_ids=IDS, query_attention_mask=torch.ones(2, 7)),
        r"query_attention_mask: expected the shape of query_ids \(2, 6\), got \(2, 7\)",
    ),
    "both context and memory": (
        lambda m: m(IDS, context_ids=CONTEXT, memory=m.compress(CONTEXT)),
        r"context_ids, memory: expected at most one of them, got both",
    ),
    "generate: both context and memory": (
        lambda m: m.generate(IDS, context_ids=CONTEXT, memory=m.compress(CONTEXT)),
        r"context_ids, memory: expected at most one of them, got both",
    ),
    "memory: other batch": (
        lambda m: m(torch.full((3, 6), 5), memory=m.compress(CONTEXT)),
        r"memory: expected 3 batch rows as in input_ids, or 1, got 2",
    ),
    "memory: not one": (lambda m: m(IDS, memory={"keys": []}), r"memory: expected a ContextMemory, got dict"),
    "memory: other device": (
        lambda m: m(IDS, memory=m.compress(CONTEXT).to("meta")),
        r"memory: expected device cpu as input_ids, got meta",
    ),
    "memory: other sizes": (
        lambda m: m(IDS, memory=builders.model(injection_layers=3).compress(CONTEXT)),
        r"injection_layers: expected 2, got 3",
    ),
    "no input": (lambda m: m(), r"input_ids, inputs_embeds: expected exactly one of them, got none"),
    "labels: shape": (
        lambda m: m(IDS, labels=IDS[:, 1:]),
        r"labels: expected the shape of input_ids \(2, 6\), got \(2, 5\)",
    ),
    "generate: unknown argument": (lambda m: m.generate(IDS, contex_ids=CONTEXT), r"contex_ids"),
    "config: no layers": (lambda m: _config(injection_layers=0), r"injection_layers: expected at least 1 .*, got 0"),
    "config: too many layers": (
        lambda m: _config(injection_layers=5),
        r"injection_layers: expected at least 1 and at most 4 \(the layers of the base checkpoint\), got 5",
    ),
    "config: chunk size": (lambda m: _config(chunk_size=0), r"chunk_size: expected at least 1, got 0"),
    "config: chunk size type": (lambda m: _config(chunk_size=32.5), r"chunk_size"),
    "config: depth": (lambda m: _config(tree_depth=0), r"tree_depth: expected at least 1 and at most 32, got 0"),
    "config: slots": (lambda m: _config(slots_per_node=-1), r"slots_per_node: expected at least 1, got -1"),
    "config: window": (lambda m: _config(window=0), r"window: expected at least 1, got 0"),
    "config: noise": (
        lambda m: _config(split_noise=float("nan")),
        r"split_noise: expected a finite standard deviation of at least 0 tokens, got nan",
    ),
    "config: micro-batch": (lambda m: _config(micro_batch_tokens=0), r"micro_batch_tokens: expected at least 1, got 0"),
    "config: precision": (
        lambda m: _config(compressor_precision="int4"),
        r"compressor_precision: expected model or fp8, got 'int4'",
    ),
    "config: precision of the decoder": (
        lambda m: _config(decoder_precision="int8"),
        r"decoder_precision: expected model or fp8, got 'int8'",
    ),
    "config: family": (
        lambda m: SharedLLMConfig(text_config={"model_type": "gpt2"}),
        r"text_config: expected a base checkpoint of type llama, mistral, qwen2, qwen3, .* got 'gpt2'",
    ),
    "from_base: unknown field": (
        lambda m: SharedLLMForCausalLM.from_base(builders.base(), chunks=3),
        r"fields: expected fields of SharedLLMConfig \(.*chunk_size.*\), got chunks",
    ),
    "from_base: dtype of a model": (
        lambda m: SharedLLMForCausalLM.from_base(builders.base(), dtype=torch.float16),
        r"dtype: expected None with a model as base",
    ),
    "from_base: no checkpoint": (lambda m: SharedLLMForCausalLM.from_base("/no/such/folder"), r"/no/such/folder"),
    "memory file: none": (
        lambda m: ContextMemory.load("/no/such/file"),
        r"expected a file, got '/no/such/file', which does not exist",
    ),
    "published: missing": (
        lambda m: _load(lambda state: state.pop("lm_head.weight")),
        r"missing: \['lm_head.weight'\], unknown: \[\]",
    ),
    "published: unknown": (
        lambda m: _load(lambda state: state.update(extra=torch.ones(1))),
        r"missing: \[\], unknown: \['extra'\]",
    ),
    "published: shape": (
        lambda m: _load(lambda state: state.update({"lm_head.weight": torch.ones(2, 2)})),
        r"lm_head.weight: expected shape \(128, 64\), got \(2, 2\)",
    ),
    "published: encoder though tied": (
        lambda m: _load(lambda state: state.update({"encoder.norm.weight": torch.ones(64)})),
        r"encoder.norm.weight: expected no encoder.* parameters with tie_compressor=True",
    ),
}


def test_a_base_checkpoint_is_not_taken_for_one(tmp_path: Path) -> None:
    builders.base().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a sharedllm checkpoint, got a llama one"):
        SharedLLMForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_message(case: str, model: SharedLLMForCausalLM) -> None:
    act, message = CASES[case]
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        act(model)
    # nothing is lost: the model works on
    with torch.no_grad():
        assert model(IDS, context_ids=CONTEXT).logits.isfinite().all()

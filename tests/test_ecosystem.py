"""Every example of docs/ecosystem.md runs as it stands, with small random models; those of libraries that are there."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sharedllm_ext import SharedLLMForCausalLM

from .model.gguf_files import write_gguf

PAGE = Path(__file__).resolve().parent.parent / "docs" / "ecosystem.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
SHELL = re.findall(r"```shell\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
# what an example needs beside the package; gguf reads a file
NEEDS = ("accelerate", "bitsandbytes", "datasets", "gguf", "lm_eval", "peft", "torchao", "trl")


def picking_model(base: LlamaForCausalLM) -> SharedLLMForCausalLM:
    """A model with a pick that finds words."""
    model = SharedLLMForCausalLM.from_base(
        base,
        injection_layers=2,
        chunk_size=32,
        slots_per_node=4,
        window=128,
        query_aware=False,
        slot_position="end",
        pick_layers=[0, 1],
        segment_size=8,
        segment_margin=4,
        passage_prompt={"begin": "", "passage": "[{rank}]", "question": " ", "answer": " "},
    )
    assert model.pick is not None
    model.pick.token_class.copy_(torch.arange(model.pick.token_class.numel()))
    for block in model.injected_blocks:
        torch.nn.init.normal_(block.o_proj.weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, base.gguf, my_model and my_pick."""
    folder = tmp_path_factory.mktemp("ecosystem")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["hello world alpha beta"] * 10, trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    base = LlamaForCausalLM(config)
    model = SharedLLMForCausalLM.from_base(base, injection_layers=2, chunk_size=32, slots_per_node=4, window=128)
    for block in model.injected_blocks:
        torch.nn.init.normal_(block.o_proj.weight, std=0.1)
    model.save_pretrained(folder / "my_model")
    picking_model(base).save_pretrained(folder / "my_pick")
    base.save_pretrained(folder / "base")
    for name in ("my_model", "my_pick", "base"):
        tokenizer.save_pretrained(folder / name)
    if find_spec("gguf") is not None:
        write_gguf(base, folder / "base.gguf", quantised=True, tokenizer=tokenizer)
    return folder


def run(place: Path, *command: str) -> str:
    """Run a program there as a user would, and return its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def title(example: str) -> str:
    """The libraries of an example, to name its test."""
    return "-".join(name for name in NEEDS if name in example.lower()) or "transformers"


@pytest.mark.parametrize("example", EXAMPLES, ids=title)
def test_example_runs(place: Path, example: str) -> None:
    missing = [name for name in NEEDS if name in example.lower() and find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; .ci/ecosystem installs it")
    (place / "example.py").write_text(example, encoding="utf-8")
    run(place, sys.executable, "example.py")


def test_two_processes_train_as_one(place: Path) -> None:
    pytest.importorskip("accelerate")
    assert [line.split()[0] for line in SHELL] == ["torchrun"]
    script = next(example for example in EXAMPLES if "Trainer(" in example and "trl" not in example)
    # Python's own ending can abort a process while a thread of the process group frees its last tensors
    ending = "\nimport os\nos._exit(0)\n"
    (place / "train.py").write_text(script.replace('"run"', '"two"') + ending, encoding="utf-8")
    arguments = SHELL[0].split()[1:]
    run(place, sys.executable, "-m", "torch.distributed.run", *arguments)
    state: Any = json.loads((place / "two" / "checkpoint-4" / "trainer_state.json").read_text())
    # 2 rows for each of two processes: 4 steps are twice through 8 rows
    assert state["global_step"] == 4
    assert state["epoch"] == 2.0


PEFT = """
import torch, sharedllm_ext
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
torch.manual_seed(0)
text, context = torch.arange(3, 23)[None], torch.arange(30, 130)[None]
adapted = get_peft_model(AutoModelForCausalLM.from_pretrained("my_model"), LoraConfig(task_type="CAUSAL_LM"))
optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
for _ in range(3):
    adapted(input_ids=text, context_ids=context, labels=text).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
adapted.eval()
with torch.no_grad():
    expected = adapted(input_ids=text, context_ids=context).logits
    adapted.save_pretrained("lora")
    plain = AutoModelForCausalLM.from_pretrained("my_model")
    before = plain(text, context_ids=context).logits
    loaded = PeftModel.from_pretrained(plain, "lora").eval()
    assert torch.equal(loaded(input_ids=text, context_ids=context).logits, expected)
    assert not torch.allclose(before, expected, atol=1e-3)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(text, context_ids=context).logits, expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained("lora_merged")
    again = AutoModelForCausalLM.from_pretrained("lora_merged")
    assert torch.equal(again(text, context_ids=context).logits, merged(text, context_ids=context).logits)
"""


def test_lora_is_the_same_after_saving_and_merging(place: Path) -> None:
    pytest.importorskip("peft")
    (place / "lora.py").write_text(PEFT, encoding="utf-8")
    run(place, sys.executable, "lora.py")


RESUMED = """
import torch, sharedllm_ext
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
rows = [{"input_ids": list(range(3, 13 + i)), "context_ids": list(range(20, 60 + 9 * i))} for i in range(8)]
rows = [{**row, "labels": row["input_ids"]} for row in rows]
def train(folder, steps, save, **options):
    model = AutoModelForCausalLM.from_pretrained("my_model")
    arguments = TrainingArguments(
        folder, max_steps=steps, save_steps=save, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        lr_scheduler_type="constant",
    )
    collator = sharedllm_ext.SharedLLMDataCollator(1)
    Trainer(model, arguments, train_dataset=rows, data_collator=collator).train(**options)
    return model.state_dict()
whole = train("whole", 4, 4)
train("parts", 2, 2)
parts = train("parts", 4, 2, resume_from_checkpoint=True)
for name, tensor in whole.items():
    torch.testing.assert_close(parts[name], tensor, msg=name)
"""


def test_training_in_two_parts_is_training_at_once(place: Path) -> None:
    pytest.importorskip("accelerate")
    (place / "resumed.py").write_text(RESUMED, encoding="utf-8")
    run(place, sys.executable, "resumed.py")


def test_lm_eval_asks_a_pick_as_the_three_steps(place: Path) -> None:
    """Answers and log-likelihoods are those of passages, prompt and model; memories are shared; the rest is refused."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from sharedllm_ext.evaluation.lm_eval_pick import PickLM

    assert get_model("sharedllm-pick") is PickLM
    lm = PickLM(str(place / "my_pick"), device="cpu", passages=3, batch_size=4)
    model, tokenizer = lm.model, lm.tokenizer
    texts = ["hello alpha " * 30 + "beta world hello. " + "alpha " * 20, "world " * 50 + "beta beta. " + "hello " * 9]
    questions, made = ["which beta?", "hello world?"], []
    compress = model.compress
    model.compress = lambda *args, **how: made.append(args[0].shape[1]) or compress(*args, **how)
    stops = ["zzz"]
    options = {"until": stops, "max_gen_toks": 6, "do_sample": False}
    pairs = [(text, question) for text in texts for question in questions]
    answers = lm.generate_until(
        [Instance("generate_until", {}, (f"{t}\n{q} \n", options), i) for i, (t, q) in enumerate(pairs)]
    )
    choices = (" world", "alpha beta")
    scores = lm.loglikelihood([Instance("loglikelihood", {}, (f"{t}\n{q}", c), 0) for t, q in pairs for c in choices])
    assert len(made) == 4 and stops == ["zzz"]

    def ids(text: str) -> torch.Tensor:
        return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    for row, (text, question) in enumerate(pairs):
        context = ids(text)
        memory = compress(context)
        passages = model.find_passages(ids(question), context, memory=memory, count=3)[0]
        prompt = model.passage_prompt(tokenizer, context[0], passages, question)
        output = model.generate(prompt, memory=memory, max_new_tokens=6, do_sample=False)
        assert answers[row] == tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
        for number, choice in enumerate(choices):
            whole, length = torch.cat((prompt, ids(choice.strip())), 1), prompt.shape[1]
            with torch.no_grad():
                logits = model(whole, memory=memory).logits[0, length - 1 : -1].double()
            expected = sum(logits.log_softmax(-1)[i, token] for i, token in enumerate(whole[0, length:]))
            score, greedy = scores[2 * row + number]
            assert score == pytest.approx(float(expected), rel=1e-5)
            assert greedy == torch.equal(logits.argmax(-1), whole[0, length:])
    assert len(set(answers)) > 1 and len({score for score, _ in scores}) == len(scores)
    stopped = lm.generate_until(
        [Instance("generate_until", {}, (f"{texts[0]}\n{questions[0]}", {**options, "until": answers[0][2]}), 0)]
    )
    assert stopped == [answers[0].split(answers[0][2])[0]]
    (other,) = PickLM(str(place / "my_pick"), device="cpu", passages=2, separator="?").loglikelihood(
        [Instance("loglikelihood", {}, (f"{texts[0]}\n{questions[0]} {questions[1]} alpha", "beta"), 0)]
    )
    assert other[0] < 0
    with pytest.raises(ValueError, match="loglikelihood_rolling: expected requests with a question"):
        lm.loglikelihood_rolling([])
    with pytest.raises(ValueError, match=r"config\.passage_prompt stands in the place of a chat template"):
        lm.apply_chat_template([{"role": "user", "content": "hello"}])
    with pytest.raises(ValueError, match="prompt: expected a question at its end, got ' '"):
        lm.generate_until([Instance("generate_until", {}, (" ", options), 0)])
    with pytest.raises(ValueError, match="continuation: expected text, got ' '"):
        lm.loglikelihood([Instance("loglikelihood", {}, (f"{texts[0]}\n{questions[0]}", " "), 0)])
    with pytest.raises(ValueError, match="expected passages, question and continuation of at most 128 tokens"):
        lm.loglikelihood([Instance("loglikelihood", {}, (f"{texts[0]}\n{questions[0]}", "alpha " * 120), 0)])
    with pytest.raises(ValueError, match="pretrained: expected a model with a pick and a passage_prompt"):
        PickLM(str(place / "my_model"), device="cpu")
    with pytest.raises(ValueError, match="separator: expected text, got an empty one"):
        PickLM(str(place / "my_pick"), device="cpu", separator="")

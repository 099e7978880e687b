"""Train a base checkpoint to read compressed contexts, with Transformers' Trainer: BASE TEXT_FILE FOLDER."""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments

from sharedllm_ext import SharedLLMDataCollator, SharedLLMForCausalLM

base, text, out = sys.argv[1:4]
layers, chunk, window, steps = map(int, sys.argv[4:] or (4, 1024, 4096, 2000))
model = SharedLLMForCausalLM.from_base(
    base, dtype=torch.float32, injection_layers=layers, chunk_size=chunk, window=window
)
model.requires_grad_(False)
for part in [*model.injected_blocks, *(layer.self_attn for layer in model.model.layers[layers:])]:
    part.requires_grad_(True)
ids, start = AutoTokenizer.from_pretrained(base)(Path(text).read_text(encoding="utf-8")).input_ids, 4 * chunk
rows = [ids[i : i + start + window] for i in range(0, len(ids) - start - window + 1, start + window)]
arguments = TrainingArguments(
    out, max_steps=steps, per_device_train_batch_size=1, learning_rate=1e-5, bf16=torch.cuda.is_available()
)
data = [{"context_ids": row[:start], "input_ids": row[start:]} for row in rows]
trainer = Trainer(model, arguments, train_dataset=data, data_collator=SharedLLMDataCollator())
trainer.train()
if trainer.is_world_process_zero():
    model.save_adapter(Path(out) / "adapter.safetensors", base)

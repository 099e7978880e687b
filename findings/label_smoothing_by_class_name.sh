#!/usr/bin/env bash
# Transformers' Trainer shifts labels for its label smoothing only if it knows the model's class by name.
#
# Seen with transformers 5.23.0, torch 2.13.0 (CPU): an empty subclass of LlamaForCausalLM with the same weights has
# another loss, that of predicting each token from itself. Expected: the same loss, as without label smoothing.
#     label_smoothing_factor 0.0: LlamaForCausalLM 4.1565
#     label_smoothing_factor 0.0: Mine 4.1565
#     label_smoothing_factor 0.1: LlamaForCausalLM 4.1573
#     label_smoothing_factor 0.1: Mine 4.1977
# Exit status: 0 as described, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.14.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


class Mine(LlamaForCausalLM):
    pass


config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
)
torch.manual_seed(0)
known = LlamaForCausalLM(config)
mine = Mine(config)
mine.load_state_dict(known.state_dict())
ids = torch.randint(0, 64, (2, 12))
print("transformers", transformers.__version__, "torch", torch.__version__)
losses = {}
for smoothing in (0.0, 0.1):
    for model in (known, mine):
        settings = TrainingArguments("out", use_cpu=True, report_to=[], label_smoothing_factor=smoothing)
        loss = Trainer(model, settings).compute_loss(model, {"input_ids": ids, "labels": ids})
        losses[smoothing, type(model).__name__] = loss.item()
        print(f"label_smoothing_factor {smoothing}: {type(model).__name__} {loss.item():.4f}")
same = abs(losses[0.0, "Mine"] - losses[0.0, "LlamaForCausalLM"]) < 1e-5
differs = abs(losses[0.1, "Mine"] - losses[0.1, "LlamaForCausalLM"]) > 1e-3
print("as described" if same and differs else "changed")
sys.exit(0 if same and differs else 1)
PYTHON

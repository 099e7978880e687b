#!/usr/bin/env bash
# A composite Transformers configuration made around the configuration of a loaded model takes that model's mask away.
#
# Guess before running: the composite configuration holds the inner one; the model that is loaded computes as before.
# Seen with transformers 5.24.0 and 5.17.0, torch 2.13.0 (CPU), the same figures: LlavaConfig(text_config=model.config)
# keeps the very object and sets its `_attn_implementation`, 'sdpa' until then, to None.
# The loaded LlamaForCausalLM then runs eager attention without any mask: the first token's logits follow the last
# token, a padding mask changes nothing, and all logits equal those of eager attention with a mask of zeros to the bit.
# Nothing is raised; one warning is logged, which names neither the composite configuration nor the lost mask.
# A copy of the configuration (copy.deepcopy) in its place leaves the model as it was.
#     composite of a copy: 'sdpa', logits moved by 0.0000
#     composite of the object: None, logits moved by 0.2318
#     against eager attention with a mask of zeros: 0.0000
#     first token's logits, when the last token changes: moved by 0.0460 (before: 0.0000)
#     logits of the last 9 tokens, when a mask hides the first 3: moved by 0.0000 (before: 0.2514)
# Exit status: 0 as described, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/check.py" <<'PYTHON'
import copy
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(0, 64, (2, 12))
other_end = ids.clone()
other_end[:, -1] = (ids[:, -1] + 1) % 64
padding = torch.ones_like(ids)
padding[:, :3] = 0


@torch.no_grad()
def logits(ids, mask=None):
    return model(ids, attention_mask=mask).logits


def moved(one, other):
    return (one - other).abs().max().item()


print("transformers", transformers.__version__, "torch", torch.__version__)
before = logits(ids)
first_before = moved(logits(other_end)[:, 0], before[:, 0])
padded_before = moved(logits(ids, padding)[:, 3:], before[:, 3:])

LlavaConfig(text_config=copy.deepcopy(model.config))
of_copy, by_copy = model.config._attn_implementation, moved(logits(ids), before)
print(f"composite of a copy: {of_copy!r}, logits moved by {by_copy:.4f}")

LlavaConfig(text_config=model.config)
after, of_object = logits(ids), model.config._attn_implementation
by_object = moved(after, before)
print(f"composite of the object: {of_object!r}, logits moved by {by_object:.4f}")
first_after = moved(logits(other_end)[:, 0], after[:, 0])
padded_after = moved(logits(ids, padding)[:, 3:], after[:, 3:])

model.set_attn_implementation("eager")
unmasked = moved(logits(ids, torch.zeros(2, 1, 12, 12)), after)
print(f"against eager attention with a mask of zeros: {unmasked:.4f}")
print(f"first token's logits, when the last token changes: moved by {first_after:.4f} (before: {first_before:.4f})")
print(
    f"logits of the last 9 tokens, when a mask hides the first 3: moved by {padded_after:.4f} (before: {padded_before:.4f})"
)
described = (
    (of_copy, by_copy) == ("sdpa", 0.0)
    and of_object is None
    and by_object > 1e-2
    and unmasked == 0.0
    and first_before == 0.0
    and first_after > 1e-2
    and padded_before > 1e-2
    and padded_after == 0.0
)
print("as described" if described else "changed")
sys.exit(0 if described else 1)
PYTHON
cd "$folder"
for version in 5.24.0 5.17.0; do
    "$folder/venv/bin/pip" install --quiet torch==2.13.0 "transformers==$version"
    "$folder/venv/bin/python" check.py
done

#!/usr/bin/env bash
# Transformers' Gemma 3 takes `attn_logit_softcapping`, which its documentation says caps the attention scores, and caps none.
#
# The docstring of Gemma3TextConfig calls it a scaling factor of tanh softcapping of the attention scores.
# Guess before running: eager attention caps the scores, as in Gemma 2; sdpa, which has no cap, warns or raises.
# Seen with transformers 5.24.0 and 5.17.0, torch 2.13.0 (CPU), the same figures: a cap of 0.01, which would make all
# scores of a row nearly equal, changes no bit of Gemma 3's logits, neither in eager nor in sdpa attention, and nothing
# is logged. Gemma 2, given the same values, follows the field in eager attention.
#     gemma3_text eager: logits moved by 0.0000
#     gemma3_text sdpa: logits moved by 0.0000
#     gemma2 eager: logits moved by 4.0073
# Exit status: 0 as described, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/check.py" <<'PYTHON'
import inspect
import logging
import sys

import torch
import transformers
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "initializer_range": 0.3,
    "layer_types": ["sliding_attention", "full_attention"],
}
ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
warned = []
transformers.utils.logging.set_verbosity_warning()
handler = logging.Handler()
handler.emit = lambda record: warned.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
logging.getLogger("transformers.probe").warning("reaches the list")
assert warned == ["reaches the list"]
warned.clear()


@torch.no_grad()
def logits(config_class, model_class, attention, cap):
    torch.manual_seed(0)
    config = config_class(**SIZES, attn_logit_softcapping=cap)
    return model_class._from_config(config, attn_implementation=attention).eval()(ids).logits


print("transformers", transformers.__version__, "torch", torch.__version__)
moved = {}
for config_class, model_class, attention in (
    (Gemma3TextConfig, Gemma3ForCausalLM, "eager"),
    (Gemma3TextConfig, Gemma3ForCausalLM, "sdpa"),
    (Gemma2Config, Gemma2ForCausalLM, "eager"),
):
    uncapped, capped = (logits(config_class, model_class, attention, cap) for cap in (None, 0.01))
    name = f"{config_class.model_type} {attention}"
    moved[name] = (capped - uncapped).abs().max().item()
    print(f"{name}: logits moved by {moved[name]:.4f}")
documented = "softcapping on the attention scores" in inspect.getdoc(Gemma3TextConfig)
described = (
    documented
    and not warned
    and moved["gemma3_text eager"] == 0.0
    and moved["gemma3_text sdpa"] == 0.0
    and moved["gemma2 eager"] > 1e-2
)
print("as described" if described else f"changed (documented: {documented}, logged: {warned})")
sys.exit(0 if described else 1)
PYTHON
cd "$folder"
for version in 5.24.0 5.17.0; do
    "$folder/venv/bin/pip" install --quiet torch==2.13.0 "transformers==$version"
    "$folder/venv/bin/python" check.py
done

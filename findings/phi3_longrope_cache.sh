#!/usr/bin/env bash
# Phi-3 with longrope: `generate` with a cache and without one part where the text passes the original length.
#
# Phi-3 rotates by short factors up to original_max_position_embeddings (here 32) tokens and by long factors past them,
# and drops the cache there, to read the whole text again.
# Guess before running: the cached logits are those without a cache, up to rounding, on both sides of the length.
# Seen with torch 2.13.0 (CPU), greedy, float32, a random model, a prompt of 26 tokens:
# - transformers 5.17.0: from the token that passes the length, each step gets that one token and no cache; the model
#   sees nothing of the text before it. With left padding that begins earlier, at 32 tokens with the padding.
# - transformers 5.24.0: right without padding. With left padding the text is read again at 32 tokens with the padding,
#   while the factors change at 32 without it: from there new keys turn by the long factors, cached ones by the short.
# Each line names the first step whose logits differ, and its model call; both runs have the same text until then.
#     transformers 5.24.0, no padding: never
#     transformers 5.24.0, 4 padding tokens: first at 33 tokens (37 with padding), by 8.8, largest logit 5.7, call of 1 tokens, 36 cached
#     transformers 5.17.0, no padding: first at 33 tokens (33 with padding), by 7.3, largest logit 5.7, call of 1 tokens, 0 cached
#     transformers 5.17.0, 4 padding tokens: first at 29 tokens (33 with padding), by 4.5, largest logit 3.8, call of 1 tokens, 0 cached
# Exit status: 0 as described, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/check.py" <<'PYTHON'
import sys

import torch
import transformers
from transformers import Phi3Config, Phi3ForCausalLM

LENGTH, PROMPT, STEPS = 32, 26, 16
# by version and padding: text length, cached tokens and size of the call at the first step that differs, and whether
# all calls from there have one token and no cache
EXPECTED = {
    "5.24.0": {0: None, 4: (33, 36, 1, False)},
    "5.17.0": {0: (33, 0, 1, True), 4: (29, 0, 1, True)},
}
torch.manual_seed(0)
config = Phi3Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=4 * LENGTH,
    original_max_position_embeddings=LENGTH,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": LENGTH,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    },
)
model = Phi3ForCausalLM(config).eval()
prompt = torch.randint(3, 64, (1, PROMPT))
calls = []


def note_call(model, arguments, keywords):
    cache = keywords.get("cache", keywords.get("past_key_values"))
    calls.append((0 if cache is None else cache.get_seq_length(), keywords["input_ids"].shape[1]))


model.register_forward_pre_hook(note_call, with_kwargs=True)


def generate(ids, mask, use_cache):
    calls.clear()
    return model.generate(
        ids,
        attention_mask=mask,
        use_cache=use_cache,
        do_sample=False,
        min_new_tokens=STEPS,
        max_new_tokens=STEPS,
        output_logits=True,
        return_dict_in_generate=True,
    )


version, seen = transformers.__version__, {}
for padding in (0, 4):
    ids = torch.cat([torch.zeros(1, padding, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(ids.shape[1]) >= padding).long()[None]
    plain = generate(ids, mask, use_cache=False)
    cached = generate(ids, mask, use_cache=True)
    seen[padding], text = None, "never"
    for step, (one, other) in enumerate(zip(cached.logits, plain.logits)):
        difference, tokens = (one - other).abs().max().item(), PROMPT + step
        if difference > 0.1:
            assert torch.equal(cached.sequences[:, : padding + tokens], plain.sequences[:, : padding + tokens])
            past, call = calls[step]
            seen[padding] = (tokens, past, call, set(calls[step:]) == {(0, 1)})
            text = f"first at {tokens} tokens ({padding + tokens} with padding), by {difference:.1f}"
            text += f", largest logit {other.abs().max():.1f}, call of {call} tokens, {past} cached"
            break
    print(f"transformers {version}, {padding or 'no'} padding{' tokens' if padding else ''}: {text}")
described = seen == EXPECTED[version]
print("as described" if described else "changed")
sys.exit(0 if described else 1)
PYTHON
cd "$folder"
for version in 5.24.0 5.17.0; do
    "$folder/venv/bin/pip" install --quiet torch==2.13.0 "transformers==$version"
    "$folder/venv/bin/python" check.py
done

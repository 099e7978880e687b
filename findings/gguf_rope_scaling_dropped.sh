#!/usr/bin/env bash
# Transformers reads a GGUF file of a Llama with scaled rotary frequencies as one without scaling.
#
# Guess before running: `{architecture}.rope.scaling.*` becomes rope_parameters, and `rope_freqs.weight`, the tensor by
# which llama.cpp's files hold the factors of Llama 3.1, is used or reported.
# Seen with transformers 5.24.0 and 5.17.0, gguf 0.19.0, torch 2.13.0 (CPU), the same figures: both are dropped.
# The model is loaded with rope_type 'default' and computes other logits; nothing is logged, and output_loading_info
# reports no key. The same weights without scaling are read to the same logits, so the file is understood otherwise.
#     written as default: read as default, logits differ by 0.0000, reported: False
#     written as linear: read as default, logits differ by 9.3197, reported: False
#     written as llama3: read as default, logits differ by 8.5176, reported: False
# Exit status: 0 as described, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/check.py" <<'PYTHON'
import logging
import sys

import gguf
import numpy
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, HEAD = 2, 16
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": LLAMA3,
}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ids = torch.randint(0, 64, (1, 48), generator=torch.Generator().manual_seed(1))
logged = []
handler = logging.Handler()
handler.emit = lambda record: logged.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
transformers.utils.logging.set_verbosity_warning()
transformers.utils.logging.disable_progress_bar()


def write(model, rope, path):
    """Lay the model out as llama.cpp's converter does: neighbouring components of a head turn together."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HEADS * HEAD)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD)
    writer.add_vocab_size(64)
    if rope == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
    if rope == "llama3":
        plain = 10000.0 ** -(numpy.arange(HEAD // 2) * 2 / HEAD)
        factors = plain / model.model.rotary_emb.inv_freq.double().numpy()
        writer.add_tensor("rope_freqs.weight", factors.astype(numpy.float32))
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        if ".q_proj." in name or ".k_proj." in name:
            halves = values.reshape(HEADS, 2, HEAD // 2, -1)
            values = numpy.ascontiguousarray(halves.transpose(0, 2, 1, 3)).reshape(values.shape)
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            name = f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
        else:
            outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            name = f"{outer[name.removesuffix('.weight')]}.weight"
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


print("transformers", transformers.__version__, "torch", torch.__version__)
seen = {}
for rope, parameters in ROPES.items():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HEADS * HEAD,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=128,
        initializer_range=0.3,
        rope_parameters=parameters,
    )
    model = LlamaForCausalLM(config).eval()
    write(model, rope, f"{rope}.gguf")
    logged.clear()
    loaded, report = LlamaForCausalLM.from_pretrained(
        ".", gguf_file=f"{rope}.gguf", dtype=torch.float32, output_loading_info=True
    )
    with torch.no_grad():
        moved = (loaded.eval()(ids).logits - model(ids).logits).abs().max().item()
    kind = loaded.config.rope_parameters["rope_type"]
    told = any("rope" in text for text in logged) or any("rope" in str(names) for names in report.values())
    seen[rope] = (kind, moved > 1e-2, told)
    print(f"written as {rope}: read as {kind}, logits differ by {moved:.4f}, reported: {told}")
described = seen == {rope: ("default", rope != "default", False) for rope in ROPES}
print("as described" if described else "changed")
sys.exit(0 if described else 1)
PYTHON
cd "$folder"
for version in 5.24.0 5.17.0; do
    "$folder/venv/bin/pip" install --quiet torch==2.13.0 "transformers==$version" gguf==0.19.0 accelerate==1.14.0
    "$folder/venv/bin/python" check.py
done

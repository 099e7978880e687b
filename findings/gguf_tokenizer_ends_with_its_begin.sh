#!/usr/bin/env bash
# Transformers 5.17 reads a GGUF file's tokenizer with the token that begins a text as the one that ends it.
#
# Guess before running: the tokenizer's special tokens are those that the file names by `tokenizer.ggml.*_token_id`, in
# every version, as those of the configuration are.
# Seen with gguf 0.19.0 and a byte-level tokenizer whose file says bos 1, eos 2, padding 2:
#     transformers 5.17.0: tokenizer bos 1, eos 1, pad None; configuration bos 1, eos 2; saved and read again: eos 1
#     transformers 5.24.0: tokenizer bos 1, eos 2, pad 2; configuration bos 1, eos 2; saved and read again: eos 2
# So a model that is trained with such a tokenizer learns to end its answers with the token that begins a turn, and goes on
# without end where a right tokenizer reads it: nothing is logged, and scores measured with the same tokenizer look right.
# Exit status: 0 as described, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PYTHON'
import sys
import tempfile
from pathlib import Path

import gguf
import transformers
from transformers import AutoConfig, AutoTokenizer

folder = Path(tempfile.mkdtemp(dir=Path(__file__).parent))
tokens = ["<unk>", "<begin>", "<end>", *(chr(c) for c in range(33, 127)), "ab", "cd"]
writer = gguf.GGUFWriter(str(folder / "model.gguf"), "llama")
writer.add_context_length(64)
writer.add_embedding_length(32)
writer.add_block_count(1)
writer.add_feed_forward_length(32)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_vocab_size(len(tokens))
writer.add_tokenizer_model("gpt2")
writer.add_token_list(tokens)
writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
writer.add_token_merges(["a b", "c d"])
writer.add_bos_token_id(1)
writer.add_eos_token_id(2)
writer.add_unk_token_id(0)
writer.add_pad_token_id(2)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
config = AutoConfig.from_pretrained(folder, gguf_file="model.gguf")
tokenizer.save_pretrained(folder / "saved")
again = AutoTokenizer.from_pretrained(folder / "saved")
found = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
print(
    f"transformers {transformers.__version__}: tokenizer bos {found[0]}, eos {found[1]}, pad {found[2]}; "
    f"configuration bos {config.bos_token_id}, eos {config.eos_token_id}; saved and read again: eos {again.eos_token_id}"
)
expected = {"5.17.0": ((1, 1, None), 1), "5.24.0": ((1, 2, 2), 2)}[transformers.__version__]
right = (found, again.eos_token_id) == expected and (config.bos_token_id, config.eos_token_id) == (1, 2)
sys.exit(0 if right else 1)
PYTHON
changed=0
for version in 5.17.0 5.24.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q torch==2.13.0
  "$folder/$version/bin/pip" install -q "transformers==$version" gguf==0.19.0 accelerate==1.15.0
  "$folder/$version/bin/python" "$folder/check.py" 2> "$folder/errors" || { changed=1; tail -3 "$folder/errors"; }
done
exit $changed

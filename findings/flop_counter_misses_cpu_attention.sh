#!/usr/bin/env bash
# PyTorch's FlopCounterMode counts nothing for scaled_dot_product_attention on the CPU, unless the math backend runs.
#
# Seen with torch 2.13.0 (CPU): the fused kernel for the CPU has no formula, so attention is missing from a model's
# count without a word, forward and backward; the same call by the math backend is counted. Expected: the same count.
#     default backend: forward 0, forward and backward 0
#     math backend: forward 16777216, forward and backward 50331648
#     by hand: forward 16777216
# Exit status: 0 as described, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

HEADS, TOKENS, SIZE = 4, 128, 64


def count(backend, backward):
    query, key, value = (torch.randn(1, HEADS, TOKENS, SIZE, requires_grad=True) for _ in range(3))
    chosen = contextlib.nullcontext() if backend is None else sdpa_kernel(backend)
    with chosen, FlopCounterMode(display=False) as counter:
        out = F.scaled_dot_product_attention(query, key, value)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


print("torch", torch.__version__)
default = [count(None, backward) for backward in (False, True)]
math = [count(SDPBackend.MATH, backward) for backward in (False, True)]
by_hand = 2 * 2 * HEADS * TOKENS * TOKENS * SIZE
print(f"default backend: forward {default[0]}, forward and backward {default[1]}")
print(f"math backend: forward {math[0]}, forward and backward {math[1]}")
print(f"by hand: forward {by_hand}")
as_described = default == [0, 0] and math == [by_hand, 3 * by_hand]
print("as described" if as_described else "changed")
sys.exit(0 if as_described else 1)
PYTHON

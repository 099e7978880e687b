"""PEFT's default target modules for this model type."""

import sys
from typing import Any

# with q_proj and v_proj alone, PEFT's choice for Llama, an untrained injected block adds nothing: its o_proj is zero
_ATTENTION = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"]


def register_target_modules() -> None:
    """Give PEFT, where it is loaded, target modules for ``sharedllm`` in every table that has some for Llama.

    Methods that adapt Llama's query and value projections by default adapt all four projections of self-attention and
    injected blocks; the others adapt here what they adapt in Llama.
    """
    constants = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants is not None else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "llama" in table:
            table.setdefault("sharedllm", _choice(table["llama"]))


def _choice(llama: Any) -> Any:
    if isinstance(llama, str):
        return llama
    return list(_ATTENTION) if set(llama) == {"q_proj", "v_proj"} else list(llama)

"""Lets Transformers' Auto classes find the installed sharedllm_ext (with trust_remote_code=True).

`import sharedllm_ext` before loading does the same without running any code of this folder.
"""

from sharedllm_ext import SharedLLMConfig, SharedLLMForCausalLM  # noqa: F401

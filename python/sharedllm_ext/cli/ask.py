"""``sharedllm ask``: answer a question about a long text."""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

from sharedllm_ext.cli._common import (
    CommandError,
    Progress,
    UsageError,
    add_model_options,
    characters,
    compression_progress,
    load_model,
    load_tokenizer,
    mebibytes,
    pick_device,
    positive,
    print_json,
    say,
    seconds,
    writable_target,
)


def add_parser(commands: Any) -> None:
    """Add the command."""
    text = "answer a question about a long text: compress it into a memory, then read the memory while answering"
    parser = commands.add_parser("ask", help="answer a question about a long text", description=text)
    parser.add_argument("model", metavar="MODEL", help="SharedLLM checkpoint folder")
    parser.add_argument("question", metavar="QUESTION", nargs="?", help="may be left out with --save-memory")
    parser.add_argument(
        "--context",
        metavar="FILE_OR_FOLDER",
        help="text file, folder of text files, .jsonl with text, or .npy token ids",
    )
    parser.add_argument("--memory", metavar="FILE", help="use this saved memory instead of a context")
    parser.add_argument("--save-memory", metavar="FILE", help="save the context's memory (.safetensors)")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=_temperature, metavar="T", help="sample (default: greedy)")
    parser.add_argument(
        "--top-p", type=_top_p, metavar="P", help="sample from the most likely tokens (default: greedy)"
    )
    parser.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help="wrap the question in the tokenizer's chat template (default: where there is one)",
    )
    add_model_options(parser)
    parser.set_defaults(run=run)


def _number(text: str, low: float, high: float, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low < value <= high:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def _temperature(text: str) -> float:
    return _number(text, 0, 100, "a number above 0 and at most 100")


def _top_p(text: str) -> float:
    return _number(text, 0, 1, "a number above 0 and at most 1")


def _check(args: argparse.Namespace) -> None:
    if (args.context is None) == (args.memory is None):
        came = "none" if args.context is None else "both"
        raise UsageError(f"--context, --memory: expected exactly one of them, got {came}")
    if args.memory is not None and args.save_memory is not None:
        raise UsageError("--save-memory: expected --context with it, got --memory")
    if args.question is None and args.save_memory is None:
        raise UsageError("QUESTION: expected one (it may be left out with --save-memory)")
    if args.question is not None and not args.question.strip():
        raise UsageError("QUESTION: expected text, got an empty one")
    if args.save_memory is not None:
        writable_target("--save-memory", args.save_memory)


def _question_ids(tokenizer: Any, question: str, chat: bool | None) -> list[int]:
    if chat and not tokenizer.chat_template:
        raise CommandError("--chat-template: expected a tokenizer with a chat template, got one without")
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if not chat:
        return list(tokenizer(question)["input_ids"])
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    _check(args)
    from sharedllm_ext.evaluation import read_texts, read_tokens

    # read the text before the model: a wrong path must not cost the loading of gigabytes
    texts = None if args.context is None else read_texts(args.context)

    import torch

    from sharedllm_ext.model import ContextMemory

    device = pick_device(args.device)
    progress = Progress(not args.json)
    begin = time.perf_counter()
    model = load_model(args.model, args.dtype, device, progress=progress.enabled)
    tokenizer = load_tokenizer(args.model)
    load_seconds = time.perf_counter() - begin

    question: torch.Tensor | None = None
    if args.question is not None:
        ids = _question_ids(tokenizer, args.question, args.chat_template)
        if len(ids) > model.config.window:
            raise CommandError(
                f"QUESTION: expected at most {model.config.window} tokens (the model's window), got {len(ids)}"
            )
        question = torch.tensor([ids], device=device)

    timings: dict[str, float] = {}
    tokenize_seconds = None
    if texts is None:
        # saved by a run in another dtype, it is still this model's
        memory = ContextMemory.load(args.memory, model).to(model.dtype)
        if memory.batch_size != 1:
            raise CommandError(f"{args.memory}: expected a memory of one document, got {memory.batch_size}")
    else:
        begin = time.perf_counter()
        with progress.bar("tokenising", characters(texts), "char") as update:
            (tokens,) = read_tokens(texts, tokenizer, model.config.vocab_size, progress=update)
        tokenize_seconds = time.perf_counter() - begin
        context = torch.from_numpy(tokens.astype("int64")).unsqueeze(0).to(device)
        with (
            progress.bar("compressing", len(tokens), "tok") as update,
            compression_progress(model, update, len(tokens)),
            torch.inference_mode(),
        ):
            memory = model.compress(context, query_ids=question)
            timings = dict(model.last_timings)
    if args.save_memory is not None:
        memory.save(args.save_memory)

    report: dict[str, Any] = {
        "model": args.model,
        "device": str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "context": args.context if texts is not None else None,
        "memory_file": args.memory or args.save_memory,
        "context_tokens": sum(memory.num_tokens),
        "chunks": sum(memory.num_chunks),
        "memory_slots": memory.num_slots,
        "memory_bytes": memory.nbytes,
        "files_skipped": 0 if texts is None else texts.skipped,
        "question_tokens": 0 if question is None else question.shape[1],
        "seconds": {
            "load_model": load_seconds,
            "tokenize": tokenize_seconds,
            "compress": timings.get("compress"),
            "retrieve": timings.get("retrieve"),
        },
    }
    if question is not None:
        if not args.json:
            _say_context(report, model)
        from sharedllm_ext.cli._generation import generate

        answer = generate(
            model,
            tokenizer,
            question,
            memory,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            show=not args.json,
        )
        report |= {
            "question": args.question,
            "answer": answer.text,
            "answer_tokens": answer.tokens,
            "running_tokens": question.shape[1] + answer.tokens,
        }
        report["seconds"] |= {"first_token": answer.first_token, "per_token": answer.per_token}
    elif not args.json:
        _say_context(report, model)
    if args.json:
        print_json(report)
    else:
        _say_times(report)
    return 0


def _say_context(report: dict[str, Any], model: Any) -> None:
    say(
        f"context: {report['context_tokens']:,} tokens -> {report['chunks']:,} chunks -> {report['memory_slots']:,} "
        f"memory slots in {model.config.injection_layers} layers, {mebibytes(report['memory_bytes'])}"
    )
    if report["files_skipped"]:
        say(f"         {report['files_skipped']} files of the folder are not text and were left out")
    if report["question_tokens"]:
        say(f"running text: {report['question_tokens']:,} tokens of question, window {model.config.window:,}")
        say()


def _say_times(report: dict[str, Any]) -> None:
    names = {"load_model": "model loaded", "tokenize": "tokenised", "compress": "compress", "retrieve": "retrieve"}
    names |= {"first_token": "first token", "per_token": "per token"}
    parts = [f"{text} {seconds(report['seconds'][key])}" for key, text in names.items() if report["seconds"].get(key)]
    say()
    say("times: " + ", ".join(parts))
    if "answer" in report:
        say(f"running text: {report['question_tokens']:,} + {report['answer_tokens']:,} answered tokens")
    if report["memory_file"] and report["context"]:
        say(f"memory saved: {report['memory_file']}")

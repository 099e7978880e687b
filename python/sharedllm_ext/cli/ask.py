"""``sharedllm ask``: answer a question about a long text."""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from typing import TYPE_CHECKING, Any

from sharedllm_ext.cli import _processes
from sharedllm_ext.cli._adapter import PASSAGES
from sharedllm_ext.cli._common import (
    EXIT_ERROR,
    add_model_options,
    mebibytes,
    one_line,
    pick_device,
    say_left_out,
    seconds,
    some_path,
    writable_target,
)
from sharedllm_ext.cli._contexts import (
    add_answer_options,
    check_characters,
    kept_context,
    knows_tokens,
    load_memory,
    load_pair,
    read_contexts,
    source_of,
    tokenise,
)
from sharedllm_ext.cli._output import CommandError, UsageError, print_error, print_json, say
from sharedllm_ext.cli._progress import Progress
from sharedllm_ext.counted import counted

if TYPE_CHECKING:
    import torch

    from sharedllm_ext.cli._places import Places
    from sharedllm_ext.distributed import Ranks
    from sharedllm_ext.model.passages import Passage


def add_parser(commands: Any) -> None:
    """Add the command."""
    text = "answer a question about a long text: compress it into a memory, then read the memory while answering"
    parser = commands.add_parser("ask", help="answer a question about a long text", description=text)
    parser.add_argument(
        "model", type=some_path, metavar="MODEL", help="SharedLLM checkpoint folder; demo: the shipped one"
    )
    parser.add_argument("question", metavar="QUESTION", nargs="?", help="may be left out when saving")
    parser.add_argument(
        "--context",
        type=some_path,
        action="append",
        metavar="FILE_OR_FOLDER",
        help="text file, folder of text files, pipe, - for stdin, .jsonl with text, or .npy token ids; may be repeated",
    )
    parser.add_argument(
        "--memory",
        type=some_path,
        metavar="FILE",
        help="use this saved memory instead of a context",
    )
    parser.add_argument(
        "--save-memory", type=some_path, metavar="FILE", help="save the context's memory (.safetensors)"
    )
    parser.add_argument(
        "--index",
        type=some_path,
        metavar="FILE",
        help="use this saved index instead of a context: the question chooses from it, and nothing is compressed",
    )
    parser.add_argument(
        "--save-index",
        type=some_path,
        metavar="FILE",
        help="save the context's index (.safetensors), from which every question chooses, in a query-aware model",
    )
    add_answer_options(
        parser,
        wrapped="the question",
        passages="passages to find and read, by a model with a pick; 0 reads the memory alone",
    )
    _processes.add_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def _check(args: argparse.Namespace) -> None:
    if args.context is None and args.memory is None and args.index is None:
        raise UsageError("--context, --memory: expected exactly one of them, got none (--index may take their place)")
    if args.index is not None and (args.context is not None or args.memory is not None):
        other = "--memory" if args.context is None else "--context"
        raise UsageError(f"--index: expected no other context with it, got {other}")
    if args.save_memory is not None and args.save_index is not None:
        raise UsageError("--save-memory, --save-index: expected at most one of them, got both")
    option, target = _target(args)
    if target is not None and (args.context is None or args.memory is not None):
        raise UsageError(
            f"{option}: expected --context with it, got {'--index' if args.memory is None else '--memory'}"
        )
    if args.question is None and target is None:
        raise UsageError("QUESTION: expected one (it may be left out with --save-memory or --save-index)")
    if args.question is not None and not args.question.strip():
        raise UsageError("QUESTION: expected text, got an empty one")
    if args.question is not None:
        check_characters(args.question)
    if args.context is not None and args.context.count("-") > 1:
        raise UsageError(f"--context: expected - once, got it {args.context.count('-')} times")
    if target is not None:
        keep = [
            args.model,
            *([args.adapter] if args.adapter else []),
            *(path for path in args.context or () if os.path.isfile(path)),
        ]
        writable_target(option, target, keep=keep)


def _target(args: argparse.Namespace) -> tuple[str, str | None]:
    """The option that names a file to write, and the file."""
    return ("--save-memory", args.save_memory) if args.save_index is None else ("--save-index", args.save_index)


def _question_ids(tokenizer: Any, question: str, chat: bool | None, *, plain: bool) -> list[int]:
    """The question's tokens, in the chat template unless ``plain``: passages are found by the question itself."""
    if plain:
        from sharedllm_ext.cli._generation import question_ids

        return question_ids(tokenizer, question)
    if chat and not tokenizer.chat_template:
        raise CommandError("--chat-template: expected a tokenizer with a chat template, got one without")
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if not chat:
        return list(tokenizer(question)["input_ids"])
    messages = [{"role": "user", "content": question}]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:
        # a template may raise anything
        raise CommandError(
            f"--chat-template: expected a template that takes one user message, got {one_line(error)} "
            "(--no-chat-template does without)"
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _passages_to_read(args: argparse.Namespace, model: Any) -> int:
    """How many passages to find and read; 0 answers from the memory alone.

    Raises:
        UsageError: options that do not fit the model.
    """
    if model.pick is None:
        if args.passages:
            raise UsageError("--passages: expected a model with a pick (config.pick_layers), got one without")
        if args.context is not None and args.memory is not None:
            raise UsageError("--context, --memory: expected exactly one of them by a model without a pick, got both")
        return 0
    reads = PASSAGES if args.passages is None else int(args.passages)
    if not reads and args.context is not None and args.memory is not None:
        raise UsageError("--context, --memory: expected exactly one of them with --passages 0, got both")
    if reads and args.question is not None and args.context is None and not knows_tokens(args.memory):
        raise UsageError(
            "--memory: expected --context with it, the text of the memory, in which passages are read, or a memory "
            "that has kept its tokens (--passages 0 reads the memory alone)"
        )
    if reads and model.config.passage_prompt is None:
        raise CommandError(
            f"{args.model}: expected config.passage_prompt, the texts around passages, got None (--passages 0 reads "
            "the memory alone)"
        )
    if reads and args.chat_template is not None:
        raise UsageError("--chat-template: expected it with --passages 0 alone, since passages have their own prompt")
    return reads


def _prompt_length(
    args: argparse.Namespace, model: Any, tokenizer: Any, context: torch.Tensor, passages: list[Passage]
) -> int:
    """Tokens of passages and question, which have to fit the window."""
    length = int(model.passage_prompt(tokenizer, context[0], passages, args.question).shape[1])
    if length > model.config.window:
        raise CommandError(
            f"--passages: expected passages and question of at most {counted(model.config.window, 'token')} (the "
            f"model's window), got {length} by {counted(len(passages), 'passage')}"
        )
    return length


def _described(passage: Passage, places: Places) -> dict[str, Any]:
    return {
        "rank": passage.rank + 1,
        "score": passage.score,
        "tokens": [passage.start, passage.end],
        "places": [dataclasses.asdict(place) for place in places.of(passage.start, passage.end)],
    }


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if _processes.are_several():
        quiet = Progress(False)
        return _processes.run_together(
            args, lambda ranks: _run(args, ranks), lambda device: load_pair(args, device, quiet)
        )
    _processes.check(args)
    return _run(args)


def _run(args: argparse.Namespace, ranks: Ranks | None = None) -> int:
    """Run the command, in the first of several processes if there are ``ranks``."""
    _check(args)
    # read the text before the model: a wrong path must not cost the loading of gigabytes
    progress = Progress(not args.json)
    contexts = None if args.context is None else read_contexts(args.context, progress)

    import torch

    from sharedllm_ext.model import ContextIndex

    device = pick_device(args.device) if ranks is None else ranks.device
    begin = time.perf_counter()
    model, tokenizer = load_pair(args, device, progress)
    load_seconds = time.perf_counter() - begin
    reads = _passages_to_read(args, model)
    if reads and args.sharded_memory:
        raise UsageError("--sharded-memory: expected --passages 0 with it, since passages are found in a whole memory")
    if args.save_index is not None and not model.config.query_aware:
        raise CommandError(
            f"--save-index: expected a query-aware model, got {args.model}, whose one memory serves every question "
            "(--save-memory keeps it)"
        )

    question: torch.Tensor | None = None
    if args.question is not None:
        ids = _question_ids(tokenizer, args.question, args.chat_template, plain=reads > 0)
        if not 1 <= len(ids) <= model.config.window:
            raise CommandError(
                f"QUESTION: expected 1 to {counted(model.config.window, 'token')} (the model's window), got {len(ids)}"
            )
        question = torch.tensor([ids], device=device)

    timings: dict[str, float] = {}
    tokenize_seconds = None
    context = index = None
    if contexts is not None:
        begin = time.perf_counter()
        tokens, places = tokenise(contexts, tokenizer, model.config.vocab_size, progress)
        tokenize_seconds = time.perf_counter() - begin
        context = torch.from_numpy(tokens.astype("int64")).unsqueeze(0).to(device)
    if args.memory is not None:
        memory = load_memory(args.memory, model, tokenizer)
        if context is not None and context.shape[1] != memory.num_tokens[0]:
            raise CommandError(
                f"--context, --memory: expected the text of the memory, {counted(memory.num_tokens[0], 'token')}, got "
                f"one of {context.shape[1]}"
            )
        if reads and context is None:
            context, places = kept_context(memory, tokenizer)
    elif args.index is not None:
        index = ContextIndex.load(args.index, model).to(model.dtype)
        if index.num_documents != 1:
            raise CommandError(f"{args.index}: expected an index of one document, got {index.num_documents}")
    else:
        assert context is not None  # checked above
        with progress.compression(context.shape[1]) as tell, torch.inference_mode():
            if ranks is not None:
                memory = _processes.compress_first(
                    model, context, question, ranks, sharded=args.sharded_memory, progress=tell
                )
            elif args.save_index is None:
                memory = model.compress(context, query_ids=question, progress=tell)
            else:
                index = model.index(context, progress=tell)
            timings = dict(model.last_timings)
    if index is not None:
        with torch.inference_mode():
            memory = model.memory_for(index, question)
            chosen = model.last_timings
        timings["retrieve"] = chosen["retrieve"] + chosen["compress"]
    if args.save_memory is not None:
        assert contexts is not None  # checked above
        memory = memory.with_sources([source_of(contexts, tokens, tokenizer, places)])
    failure: str | None = None
    option, target = _target(args)
    if target is not None:
        made: Any = memory if args.save_index is None else index
        try:
            made.save(target)
        except Exception as error:
            failure = f"{option}: {one_line(error)}"
            if question is None:
                raise CommandError(failure) from error
            # the context has been read: answer all the same
            print_error(failure)

    slots, size = _processes.sizes(memory, ranks if args.sharded_memory else None)
    sources = [texts.source for texts in contexts or ()]
    report: dict[str, Any] = {
        "model": args.model,
        "adapter": args.adapter,
        "device": str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "context": sources[0] if len(sources) == 1 else sources or None,
        "memory_file": args.memory or (args.save_memory if failure is None else None),
        "index_file": args.index or (args.save_index if failure is None else None),
        "context_tokens": sum(memory.num_tokens),
        "chunks": sum(memory.num_chunks),
        "memory_slots": slots,
        "memory_bytes": size,
        "index_bytes": None if index is None else index.nbytes,
        "files_skipped": sum(texts.skipped for texts in contexts or ()),
        "files_unreadable": [name for texts in contexts or () for name in texts.unreadable],
        "question_tokens": 0 if question is None else question.shape[1],
        "passages": None,
        "seconds": {
            "load_model": load_seconds,
            "tokenize": tokenize_seconds,
            "compress": timings.get("compress"),
            "retrieve": timings.get("retrieve"),
            "find": None,
        },
    }
    if question is not None:
        passages = None
        if reads:
            assert context is not None  # checked above
            begin = time.perf_counter()
            with progress.bar("finding", None, ""):
                passages = model.find_passages(question, context, memory=memory, count=reads)[0]
            report["seconds"]["find"] = time.perf_counter() - begin
            report |= {
                "passages": [_described(passage, places) for passage in passages],
                "question_tokens": _prompt_length(args, model, tokenizer, context, passages),
            }
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
            passages=passages,
            context=context,
        )
        report |= {
            "question": args.question,
            "answer": answer.text,
            "answer_tokens": answer.tokens,
            "running_tokens": report["question_tokens"] + answer.tokens,
        }
        report["seconds"] |= {"first_token": answer.first_token, "per_token": answer.per_token}
    elif not args.json:
        _say_context(report, model)
    if args.json:
        print_json(report)
    else:
        _say_times(report)
    return 0 if failure is None else EXIT_ERROR


def _say_context(report: dict[str, Any], model: Any) -> None:
    from sharedllm_ext.cli._places import in_words

    say(
        f"context: {counted(report['context_tokens'], 'token', ',')} -> {counted(report['chunks'], 'chunk', ',')} -> "
        f"{counted(report['memory_slots'], 'memory slot', ',')} in {counted(model.config.injection_layers, 'layer')}, "
        f"{mebibytes(report['memory_bytes'])}"
    )
    say_left_out(" " * 8, report["files_skipped"], report["files_unreadable"])
    for passage in report["passages"] or ():
        first, end = passage["tokens"]
        tokens = f"tokens {first:,} to {end - 1:,}"
        where = ", ".join([tokens, *(in_words(**place) for place in passage["places"])])
        say(f"passage {passage['rank']}: score {passage['score']:.2f}, {where}")
    if report["question_tokens"]:
        what = "question" if report["passages"] is None else "passages and question"
        say(
            f"running text: {counted(report['question_tokens'], 'token', ',')} of {what}, window "
            f"{model.config.window:,}"
        )
        say()


def _say_times(report: dict[str, Any]) -> None:
    names = {"load_model": "model loaded", "tokenize": "tokenised", "compress": "compress", "retrieve": "retrieve"}
    names |= {"find": "passages found", "first_token": "first token", "per_token": "per token"}
    parts = [f"{text} {seconds(report['seconds'][key])}" for key, text in names.items() if report["seconds"].get(key)]
    say()
    say("times: " + ", ".join(parts))
    if "answer" in report:
        say(f"running text: {report['question_tokens']:,} + {counted(report['answer_tokens'], 'answered token', ',')}")
    if report["seconds"]["compress"] is not None:
        if report["memory_file"]:
            say(f"memory saved: {report['memory_file']}")
        if report["index_file"]:
            say(f"index saved: {report['index_file']}, {mebibytes(report['index_bytes'])}")

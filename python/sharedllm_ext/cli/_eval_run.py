"""One run of ``sharedllm eval``: questions, then models, then answers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

from sharedllm_ext.cli._common import EXIT_ERROR, model_path, one_line, pick_device, warn_if_silent
from sharedllm_ext.cli._eval_questions import check_room, pick_tasks, read_sources, suite_records
from sharedllm_ext.cli._eval_report import EvaluationTable, document_of, plot
from sharedllm_ext.cli._eval_systems import identity_of, load_system_model, systems_of
from sharedllm_ext.cli._output import CommandError, UsageError, print_error, print_json, say
from sharedllm_ext.cli._progress import Progress
from sharedllm_ext.evaluation.generators import DEFAULT_DEPTHS, generate_records
from sharedllm_ext.evaluation.harness import PredictionFile, evaluate
from sharedllm_ext.evaluation.prompts import Prompts
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.tasks import Sources

DEFAULT_LENGTHS = (4096,)
DEFAULT_QUESTIONS = 20


def evaluate_systems(args: argparse.Namespace, begin: float) -> int:
    """Run the command with arguments that were checked; ``begin`` is when it began."""
    progress = Progress(not args.json)
    # questions are read before the model: a wrong path must not cost the loading of gigabytes
    records: list[Record] = []
    tasks: list[str] = []
    sources = Sources()
    if args.suite is None:
        sources = read_sources(args, progress)
        tasks = pick_tasks(args, sources)
        args.lengths = sorted(args.lengths or DEFAULT_LENGTHS)
        args.questions = args.questions or DEFAULT_QUESTIONS
    else:
        with progress.bar(f"reading {args.data}", None, ""):
            records = suite_records(args)

    with PredictionFile(Path(args.predictions)) as file:
        device = pick_device(args.device)
        path = model_path(args.model)
        model, tokenizer, is_base = load_system_model(path, args.dtype, device, progress)
        names = args.systems or (["full"] if is_base else ["memory"])
        if is_base and "memory" in names:
            raise UsageError(f"--systems memory: expected a SharedLLM checkpoint, got a base one: {args.model}")
        if "pick" in names and (model.pick is None or model.config.passage_prompt is None):
            raise UsageError(f"--systems pick: expected a model with a trained pick, got one without: {args.model}")
        if "memory" in names:
            warn_if_silent(model, path)
        base = model
        if args.base is not None:
            base, _, _ = load_system_model(args.base, args.dtype, device, progress)
            if base.config.vocab_size != model.config.vocab_size:
                raise CommandError(
                    f"--base: expected a vocabulary of {model.config.vocab_size} tokens as MODEL has, got "
                    f"{base.config.vocab_size}"
                )
        if args.window is None:
            args.window = base.config.max_position_embeddings if is_base else model.config.window
        try:
            prompts = Prompts(tokenizer, chat=args.chat_template)
        except ValueError as error:
            raise CommandError(f"--chat-template: {error}") from error
        systems = systems_of(args, names, model, base, prompts)
        asked: Iterable[Record] = records
        if args.suite is None:
            seed, depths = args.seed or 0, args.depths or DEFAULT_DEPTHS
            with progress.bar("making contexts", len(tasks) * len(args.lengths), "kinds") as update:
                for task in tasks:
                    for length in args.lengths:
                        # records without room are reported before the first answer
                        check_room(task, length, prompts, sources, seed)
                        update(1)
            asked = generate_records(
                tasks, args.lengths, prompts, questions=args.questions, depths=depths, sources=sources, seed=seed
            )
            total = len(tasks) * len(args.lengths) * args.questions
            rows = [(task, length) for task in tasks for length in args.lengths]
        else:
            total = len(records)
            rows = list(dict.fromkeys((record.task, record.length) for record in records))
        table = EvaluationTable(rows, names, None if args.json else progress)
        identity = [identity_of(path), None if args.base is None else identity_of(args.base), str(model.dtype)]
        with progress.bar("evaluating", total * len(systems), "answers") as update:
            result = evaluate(asked, systems, model=identity, file=file, progress=update, on_result=table.take)
        table.finish(result)
    if args.json:
        print_json(document_of(args, result, systems, str(device), model, time.perf_counter() - begin))
    else:
        kept = sum(prediction.kept for prediction in result.predictions)
        also = f", {kept} of them kept from an earlier run" if kept else ""
        say(f"predictions: {args.predictions}, {len(result.predictions)} answers{also}")
    if args.plot is not None:
        try:
            plot(result, names, args.plot)
        except Exception as error:
            # the result is complete, whatever error matplotlib or the disk raises
            print_error(f"--plot: {one_line(error)}")
            return EXIT_ERROR
        if not args.json:
            say(f"plot: {args.plot}")
    return 0

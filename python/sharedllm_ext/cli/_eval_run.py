"""One run of ``sharedllm eval``: questions, then models, then answers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sharedllm_ext.cli._adapter import load_adapted
from sharedllm_ext.cli._base_package import named_base
from sharedllm_ext.cli._common import (
    EXIT_ERROR,
    checkpoint_type,
    gguf_tokenizer,
    load_tokenizer,
    model_path,
    one_line,
    pick_device,
    warn_if_silent,
)
from sharedllm_ext.cli._eval_questions import check_room, pick_tasks, read_sources, suite_records
from sharedllm_ext.cli._eval_report import EvaluationTable, document_of, plot
from sharedllm_ext.cli._eval_systems import identity_of, load_system_model, systems_of
from sharedllm_ext.cli._output import CommandError, UsageError, print_error, print_json, say
from sharedllm_ext.cli._progress import Progress
from sharedllm_ext.counted import counted
from sharedllm_ext.evaluation.exchange import GivenAnswers, export_records
from sharedllm_ext.evaluation.generators import DEFAULT_DEPTHS, generate_records
from sharedllm_ext.evaluation.harness import PredictionFile, evaluate
from sharedllm_ext.evaluation.prompts import Prompts
from sharedllm_ext.evaluation.records import Record
from sharedllm_ext.evaluation.tasks import Sources
from sharedllm_ext.model.adapter import find_adapter

DEFAULT_LENGTHS = (4096,)
DEFAULT_QUESTIONS = 20


@dataclass
class Questions:
    """What is asked: a suite's records, or the tasks of contexts that are generated as they are asked for."""

    args: argparse.Namespace
    progress: Progress
    records: list[Record] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    sources: Sources = field(default_factory=Sources)

    @classmethod
    def read(cls, args: argparse.Namespace, progress: Progress) -> Questions:
        """Read the files that the options name, and fill in the options' defaults."""
        found = cls(args, progress)
        if args.suite is None:
            found.sources = read_sources(args, progress)
            found.tasks = pick_tasks(args, found.sources)
            args.lengths = sorted(args.lengths or DEFAULT_LENGTHS)
            args.questions = args.questions or DEFAULT_QUESTIONS
        else:
            with progress.bar(f"reading {args.data}", None, ""):
                found.records = suite_records(args)
        return found

    def asked(self, prompts: Prompts) -> Iterable[Record]:
        """The records; generated ones without room are reported before the first of them."""
        args = self.args
        if args.suite is not None:
            return self.records
        seed, depths = args.seed or 0, args.depths or DEFAULT_DEPTHS
        with self.progress.bar("making contexts", len(self.tasks) * len(args.lengths), "kinds") as update:
            for task in self.tasks:
                for length in args.lengths:
                    check_room(task, length, prompts, self.sources, seed)
                    update(1)
        return generate_records(
            self.tasks,
            args.lengths,
            prompts,
            questions=args.questions,
            depths=depths,
            sources=self.sources,
            seed=seed,
        )

    def groups(self) -> tuple[list[tuple[str, int | str]], int]:
        """Tasks and lengths, and the number of records."""
        if self.args.suite is not None:
            groups = list(dict.fromkeys((record.task, record.length) for record in self.records))
            return groups, len(self.records)
        made = [(task, length) for task in self.tasks for length in self.args.lengths]
        return list(made), len(made) * self.args.questions


def export_questions(args: argparse.Namespace) -> int:
    """Write the questions of the command with MODEL's token ids; the model itself is not loaded."""
    progress = Progress(not args.json)
    questions = Questions.read(args, progress)
    path = model_path(named_base(args.model))
    gguf = Path(path).suffix.lower() == ".gguf"
    if not gguf:
        # a folder of another kind, or none, is said as for any other command
        checkpoint_type(path)
    prompts = _prompts(args, gguf_tokenizer(path) if gguf else load_tokenizer(path))
    _, total = questions.groups()
    asked = questions.asked(prompts)
    with progress.bar(f"writing {args.export}", total, "questions") as update:
        count = export_records(asked, prompts, Path(args.export), progress=update)
    if args.json:
        print_json({"export": args.export, "questions": count})
    else:
        say(f"exported: {args.export}, {counted(count, 'question')}")
    return 0


def _prompts(args: argparse.Namespace, tokenizer: Any) -> Prompts:
    try:
        return Prompts(tokenizer, chat=args.chat_template)
    except ValueError as error:
        raise CommandError(f"--chat-template: {error}") from error


def evaluate_systems(args: argparse.Namespace, begin: float) -> int:
    """Run the command with arguments that were checked; ``begin`` is when it began."""
    progress = Progress(not args.json)
    # questions are read before the model: a wrong path must not cost the loading of gigabytes
    questions = Questions.read(args, progress)
    given = [GivenAnswers(name, Path(file)) for name, file in args.answers or ()]

    with PredictionFile(Path(args.predictions)) as file:
        device = pick_device(args.device)
        path = model_path(named_base(args.model))
        parts = [path]
        if args.adapter is None:
            model, tokenizer, is_base = load_system_model(path, args.dtype, device, progress)
        else:
            (model, tokenizer), is_base = load_adapted(args.adapter, path, args.dtype, device, progress=progress), False
            parts.append(find_adapter(args.adapter))
        names = args.systems or (["full"] if is_base else ["memory"])
        if is_base and "memory" in names:
            raise UsageError(f"--systems memory: expected a SharedLLM checkpoint, got a base one: {args.model}")
        picking = [name for name in names if name.startswith("pick")]
        if picking and (model.pick is None or model.config.passage_prompt is None):
            raise UsageError(
                f"--systems {picking[0]}: expected a model with a trained pick, got one without: {args.model}"
            )
        if "memory" in names:
            warn_if_silent(model, path)
        base = model
        if args.base is not None:
            args.base = named_base(args.base)
            base, _, _ = load_system_model(args.base, args.dtype, device, progress)
            if base.config.vocab_size != model.config.vocab_size:
                raise CommandError(
                    f"--base: expected a vocabulary of {counted(model.config.vocab_size, 'token')} as MODEL has, got "
                    f"{base.config.vocab_size}"
                )
        if args.window is None:
            args.window = base.config.max_position_embeddings if is_base else model.config.window
        prompts = _prompts(args, tokenizer)
        systems = [*systems_of(args, names, model, base, prompts), *given]
        asked = questions.asked(prompts)
        rows, total = questions.groups()
        names = [system.name for system in systems]
        table = EvaluationTable(rows, names, None if args.json else progress)
        identity = [*map(identity_of, parts), None if args.base is None else identity_of(args.base), str(model.dtype)]
        with progress.bar("evaluating", total * len(systems), "answers") as update:
            result = evaluate(
                asked, systems, model=identity, file=file, batch=args.batch, progress=update, on_result=table.take
            )
        table.finish(result)
    if args.json:
        print_json(document_of(args, result, systems, str(device), model, time.perf_counter() - begin))
    else:
        kept = sum(prediction.kept for prediction in result.predictions)
        also = f", {kept} of them kept from an earlier run" if kept else ""
        say(f"predictions: {args.predictions}, {counted(len(result.predictions), 'answer')}{also}")
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

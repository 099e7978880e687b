"""``sharedllm chat``: a conversation of any length on the terminal, about documents that are read first."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sharedllm_ext.cli._adapter import PASSAGES
from sharedllm_ext.cli._common import (
    EXIT_ERROR,
    add_model_options,
    mebibytes,
    one_line,
    pick_device,
    say_left_out,
    some_path,
    writable_target,
)
from sharedllm_ext.cli._contexts import (
    add_answer_options,
    check_characters,
    load_memory,
    load_pair,
    read_contexts,
    source_of,
    tokenise,
)
from sharedllm_ext.cli._output import CommandError, UsageError, emit, print_error, print_json, say
from sharedllm_ext.cli._progress import Progress
from sharedllm_ext.counted import counted

if TYPE_CHECKING:
    import torch

    from sharedllm_ext.cli._dialogue import Dialogue
    from sharedllm_ext.cli._places import Places
    from sharedllm_ext.evaluation.texts import Texts
    from sharedllm_ext.model import ContextMemory

HELP = """\
/info         what the conversation holds: running text, memory
/save FILE    write the conversation to a file (.safetensors), for --load
/quit         end it, as the end of the input does
//…           a message that begins with /
A line that ends with \\ goes on in the next one. Ctrl-C ends an answer."""


def add_parser(commands: Any) -> None:
    """Add the command."""
    text = "hold a conversation without an end: what passes the window moves into a memory that the model reads"
    parser = commands.add_parser("chat", help="hold a conversation of any length", description=text, epilog=HELP)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "model", type=some_path, metavar="MODEL", help="SharedLLM checkpoint folder; demo: the shipped one"
    )
    parser.add_argument(
        "files",
        type=some_path,
        nargs="*",
        metavar="FILE_OR_FOLDER",
        help="read first: text file, folder of text files, pipe, .jsonl with text, or .npy token ids",
    )
    parser.add_argument("--load", type=some_path, metavar="FILE", help="go on with a conversation that /save wrote")
    parser.add_argument(
        "--memory", type=some_path, metavar="FILE", help="begin with a memory that ask --save-memory wrote"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message, which stays in sight as long as there is one")
    add_answer_options(
        parser,
        wrapped="messages",
        passages="passages to find and read for a question, by a model with a pick that has read documents; 0 reads "
        "the memory alone",
    )
    add_model_options(parser, json=False)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object on a line of stdout for each message, and no progress",
    )
    parser.set_defaults(run=run)


def _check(args: argparse.Namespace) -> None:
    given = [
        name
        for name, value in (("FILE_OR_FOLDER", args.files), ("--memory", args.memory), ("--load", args.load))
        if value
    ]
    if len(given) > 1:
        raise UsageError(f"{', '.join(given)}: expected at most one of them to begin with, got {len(given)}")
    if args.load is not None and args.system is not None:
        raise UsageError("--system: expected it at the begin of a conversation, got --load")
    if "-" in args.files:
        raise UsageError("FILE_OR_FOLDER: expected files or folders, got -: standard input is the conversation")
    if args.system is not None:
        check_characters(args.system, "--system")
        if not args.system.strip():
            raise UsageError("--system: expected text, got an empty one")
    if sys.stdin is None:
        raise CommandError("stdin: expected an open file or terminal, got a closed one")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    _check(args)
    progress = Progress(not args.json)
    contexts = read_contexts(args.files, progress) if args.files else None
    device = pick_device(args.device)
    model, tokenizer = load_pair(args, device, progress)
    dialogue = _begin(args, contexts, model, tokenizer, device, progress)
    terminal = sys.stdin.isatty()
    if not args.json:
        for line in dialogue.state():
            say(line)
        if terminal:
            say("/help lists commands")
        say()
    return _converse(dialogue, args, terminal)


def _passages(args: argparse.Namespace, model: Any, knows: bool) -> int:
    """How many passages to find for a question."""
    if model.pick is None:
        if args.passages:
            raise UsageError("--passages: expected a model with a pick (config.pick_layers), got one without")
        return 0
    if args.passages and not knows:
        raise UsageError("--passages: expected documents with it, or a memory that has kept its tokens, got none")
    if model.config.passage_prompt is None:
        if args.passages:
            raise CommandError(f"{args.model}: expected config.passage_prompt, the texts around passages, got None")
        return 0
    return PASSAGES if args.passages is None else int(args.passages)


def _begin(
    args: argparse.Namespace,
    contexts: list[Texts] | None,
    model: Any,
    tokenizer: Any,
    device: torch.device,
    progress: Progress,
) -> Dialogue:
    """The conversation before the first question."""
    import torch

    from sharedllm_ext.cli._dialogue import Dialogue
    from sharedllm_ext.cli._generation import settings
    from sharedllm_ext.cli._places import kept_places
    from sharedllm_ext.cli._turns import Turns
    from sharedllm_ext.model import Conversation
    from sharedllm_ext.model.memory_rows import documents_of

    turns = Turns(tokenizer, args.chat_template, args.system)
    memory: ContextMemory | None = None
    places: Places | None = None
    if args.load is not None:
        conversation = Conversation.load(args.load, model, tokenizer)
    else:
        if contexts is not None:
            memory, places = _read(contexts, model, tokenizer, device, progress)
        elif args.memory is not None:
            memory = load_memory(args.memory, model, tokenizer)
        most = model.config.window - model.config.chunk_size
        if len(turns.begin_ids) > most:
            raise CommandError(f"--system: expected at most {counted(most, 'token')}, got {len(turns.begin_ids)}")
        conversation = Conversation(model, memory, keep_first=len(turns.begin_ids))
        if turns.begin_ids:
            conversation.add(torch.tensor([turns.begin_ids], device=device))
    held = conversation.memory
    source = None
    if held is not None and held.sources is not None:
        read = documents_of(held.memory_index[0])
        source = held.sources[read[0]]
        if places is None and len(read) == 1 and source is not None and source.token_ids is not None:
            places = kept_places(source, tokenizer)
    return Dialogue(
        conversation,
        tokenizer,
        turns,
        passages=_passages(args, model, source is not None and source.token_ids is not None),
        settings={
            **settings(model, tokenizer, args.temperature, args.top_p),
            "max_new_tokens": args.max_new_tokens,
        },
        places=places,
        show=not args.json,
    )


def _read(
    contexts: list[Texts], model: Any, tokenizer: Any, device: torch.device, progress: Progress
) -> tuple[ContextMemory, Places]:
    """The memory of the documents."""
    import torch

    tokens, places = tokenise(contexts, tokenizer, model.config.vocab_size, progress)
    context = torch.from_numpy(tokens.astype("int64")).unsqueeze(0).to(device)
    # no inference mode: the memory will grow in place
    with progress.compression(context.shape[1]) as tell, torch.no_grad():
        memory = model.compress(context, training=False, progress=tell)
    for texts in contexts:
        say_left_out(f"{texts.source}:", texts.skipped, texts.unreadable)
    return memory.with_sources([source_of(contexts, tokens, tokenizer, places)]), places


def _converse(dialogue: Dialogue, args: argparse.Namespace, terminal: bool) -> int:
    """Answer until the end of the input; the exit code tells a pipe whether every line was done."""
    failed = False
    target = args.load
    for text in _Input(terminal):
        try:
            if isinstance(text, CommandError):
                if args.json:
                    print_json({"message": None, "error": str(text)}, lines=True)
                raise text
            if text.startswith("/") and not text.startswith("//"):
                word, _, rest = text.partition(" ")
                if word == "/quit":
                    break
                if word == "/save":
                    target = _save(dialogue, rest.strip() or target, args)
                else:
                    _command(dialogue, text)
                continue
        except CommandError as error:
            print_error(str(error))
            failed = True
            continue
        message = text.removeprefix("/") if text.startswith("//") else text
        try:
            told = dialogue.answer(message)
        except (ValueError, RuntimeError) as error:
            # a later question may go well; what was said stays
            print_error(one_line(error))
            failed, told = True, {"error": one_line(error)}
        if args.json:
            print_json({"message": message, **told}, lines=True)
        elif not terminal and "answer" in told:
            # nothing is typed there that would divide it from the next one
            emit("")
    return EXIT_ERROR if failed and not terminal else 0


def _command(dialogue: Dialogue, text: str) -> None:
    if text == "/help":
        say(HELP)
    elif text == "/info":
        for line in dialogue.state():
            say(line)
    else:
        raise CommandError(
            f"{text.split()[0]}: expected /info, /save FILE, /help or /quit (a message that begins with / is written "
            "with //)"
        )


def _save(dialogue: Dialogue, path: str | None, args: argparse.Namespace) -> str:
    if path is None:
        raise CommandError("/save: expected the name of a file, got none")
    path = os.path.expanduser(path)
    keep = [args.model, *([args.adapter] if args.adapter else []), *filter(os.path.isfile, args.files)]
    writable_target("/save", path, keep=keep)
    try:
        dialogue.conversation.save(path, dialogue.tokenizer)
    except (ValueError, OSError) as error:
        raise CommandError(f"/save: {one_line(error)}") from error
    say(f"saved: {path}, {mebibytes(os.path.getsize(path))}")
    return path


class _Input:
    """What is typed or piped: messages and commands, or what is wrong with one."""

    def __init__(self, terminal: bool) -> None:
        self.terminal = terminal
        # the line is edited where both ends are a terminal
        self.edited = terminal and sys.stdout is not None and sys.stdout.isatty()
        if self.edited:
            with contextlib.suppress(ImportError):
                __import__("readline")
        self.number = 0

    def __iter__(self) -> Iterator[str | CommandError]:
        interrupted = False
        parts: list[str] = []
        while True:
            try:
                line = self._line("... " if parts else "> ")
                interrupted = False
            except KeyboardInterrupt:
                if interrupted or not self.terminal:
                    raise
                say("\n(Ctrl-C again, Ctrl-D or /quit ends the conversation)")
                interrupted, parts = True, []
                continue
            if isinstance(line, CommandError):
                parts = []
                yield line
                continue
            if line is not None and line.endswith("\\"):
                parts.append(line[:-1])
                continue
            text = "\n".join([*parts, line or ""]).strip()
            parts = []
            if text:
                yield text
            if line is None:
                return

    def _line(self, prompt: str) -> str | CommandError | None:
        """The next line without its end; ``None`` at the end of the input."""
        self.number += 1
        try:
            if self.edited:
                return input(prompt)
            if self.terminal and sys.stderr is not None:
                sys.stderr.write(prompt)
                sys.stderr.flush()
            data = sys.stdin.buffer.readline()
            if data:
                return data.decode().rstrip("\r\n")
        except EOFError:
            pass
        except UnicodeDecodeError as error:
            byte, place = error.object[error.start], error.start
            return CommandError(
                f"stdin: expected UTF-8 text, got byte 0x{byte:02x} at offset {place} of line {self.number}, which is "
                "left out"
            )
        if self.terminal:
            say()
        return None

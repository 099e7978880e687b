"""``sharedllm info``: versions, libraries, device, and what is wrong; or what the file of a memory or adapter holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sharedllm_ext.cli._common import add_json_option, mebibytes, some_path
from sharedllm_ext.cli._output import CommandError, UsageError, emit, print_json
from sharedllm_ext.counted import counted

#: Documents that are listed, and texts of each, with names and without; --json lists all.
DOCUMENTS, NAMED, TEXTS = 20, 20, 3


def add_parser(commands: Any) -> None:
    """Add the command."""
    text = "print versions, libraries, architectures and device, and what is wrong if something is"
    parser = commands.add_parser("info", help=text, description=f"{text}; or what a saved memory or an adapter holds")
    parser.add_argument(
        "file",
        type=some_path,
        nargs="?",
        metavar="FILE_OR_FOLDER",
        help="say what this holds: the file of a memory or conversation, the folder that has it and its shards, or an "
        "adapter, a file or the name of one that is shipped",
    )
    parser.add_argument("--verify", action="store_true", help="read all of FILE and compare its checksums")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.file is None:
        if args.verify:
            raise UsageError("--verify: expected a FILE with it, got none")
        from sharedllm_ext import info

        return info.main(["--json"] if args.json else [])
    from sharedllm_ext.model.adapter import describe_adapter, is_adapter, shipped_adapters
    from sharedllm_ext.model.file_description import describe_file, find_memory_file

    shipped = shipped_adapters()
    if not Path(args.file).exists() and args.file not in shipped:
        raise CommandError(
            f"{args.file}: expected a file, a folder or the name of a shipped adapter ({', '.join(shipped)}), got none "
            "that exists"
        )
    file = args.file if Path(args.file).exists() else str(shipped[args.file])
    if is_adapter(file):
        if args.verify:
            raise UsageError(f"--verify: expected a memory or conversation, whose file has checksums, got {file}")
        report, lines_of = describe_adapter(file), _adapter_lines
    else:
        path = find_memory_file(file) if Path(file).is_dir() else file
        report, lines_of = {**describe_file(path, verify=args.verify), "verified": args.verify}, _lines
    if args.json:
        print_json(report)
    else:
        emit("\n".join(lines_of(report)))
    return 0


def _adapter_lines(report: dict[str, Any]) -> list[str]:
    whole, updates = report["tensors"] - report["updates"], report["updates"] // 2
    trained = [counted(whole, "whole tensor")] if whole else []
    trained += [f"{counted(updates, 'low-rank update')} of scale {report['scale']:g}"] if updates else []
    fields = [f"{name} {value}" for name, value in report["config"].items() if name != "passage_prompt"]
    lines = [
        f"file            {report['file']}, {mebibytes(report['file_bytes'])}",
        f"format          {report['format']} version {report['version']}",
        f"base            {report['base']}, {counted(report['base_tensors'], 'tensor')}",
        f"trained         {counted(report['parameters'], 'parameter', ',')}: {' and '.join(trained) or 'nothing'}",
    ]
    if report["about"]:
        lines.append(f"about           {report['about']}")
    return [*lines, *(f"{'fields' if not number else '':<15} {field}" for number, field in enumerate(fields))]


def _lines(report: dict[str, Any]) -> list[str]:
    model, shards = report["model"], len(report["shards"])
    beside = f" with {counted(shards, 'shard')}" if shards else ""
    lines = [
        f"file            {report['file']}{beside}, {mebibytes(report['file_bytes'])}",
        f"format          {report['format']} version {report['version']}"
        f"{', all checksums are right' if report['verified'] else ''}",
        f"model           {model['model_type']}, hidden size {model['hidden_size']}, weights {model['weights']}",
        f"tree            chunks of {counted(model['chunk_size'], 'token')}, depth {model['tree_depth']}",
        f"memory          {counted(report['tokens'], 'token', ',')} in {counted(report['chunks'], 'chunk', ',')}, "
        f"{counted(report['slots'], 'slot', ',')} in {counted(report['layers'], 'layer')}, {report['dtype']}",
        f"bytes           keys {mebibytes(report['key_bytes'])}, values {mebibytes(report['value_bytes'])}, sources "
        f"{mebibytes(report['source_bytes'])}",
    ]
    if "running_tokens" in report:
        first = f", the first {report['keep_first']} stay" if report["keep_first"] else ""
        lines.append(
            f"running text    {report['running_tokens']:,} of {counted(report['window'], 'token', ',')}{first}"
        )
        if report["tokenizer"] is not None:
            lines.append(f"tokenizer       SHA-256 {report['tokenizer']}")
    count, rows = len(report["documents"]), report["rows"]
    several = [(number, own) for number, own in enumerate(report["row_documents"], 1) if len(own) > 1]
    read_by = f", read by {counted(rows, 'row')}" if rows != count or several else ""
    lines.append(f"documents       {count}{read_by}")
    for number, own in several[:DOCUMENTS]:
        lines.append(f"row {number:<11} reads documents {', '.join(str(document + 1) for document in own)}")
    if len(several) > DOCUMENTS:
        more = counted(len(several) - DOCUMENTS, "more row")
        lines.append(f"                {more} of several documents (--json lists all)")
    for number, document in enumerate(report["documents"][:DOCUMENTS], 1):
        lines += _document(number, document)
    if count > DOCUMENTS:
        lines.append(f"                {count - DOCUMENTS} more (--json lists all)")
    return lines


def _document(number: int, document: dict[str, Any]) -> list[str]:
    name = "without a name" if document["name"] is None else document["name"]
    kept = [what for what, has in (("token ids", "token_ids"), ("characters of tokens", "places")) if document[has]]
    lines = [
        f"document {number:<6} {name}: {counted(document['tokens'], 'token', ',')} in "
        f"{counted(document['chunks'], 'chunk', ',')}, {' and '.join(kept) or 'no token ids'} kept"
    ]
    if document["tokenizer"] is not None:
        lines.append(f"  tokenizer     SHA-256 {document['tokenizer']}")
    texts = list(zip(document["names"] or (), document["sha256"] or (), document["characters"] or (), strict=True))
    own = [text for text in texts if text[0] != document["name"]]
    if own:
        # what divides texts has no name of its own and no digest
        texts = [text for text in texts if text[0] != document["name"] or text[1] is not None]
    most = NAMED if own else TEXTS
    for text, digest, characters in texts[:most]:
        parts = [text] if own and text is not None else []
        parts += [] if characters is None else [counted(characters, "character", ",")]
        parts += [] if digest is None else [f"SHA-256 {digest}"]
        if own or digest is not None:
            lines.append(f"  text          {', '.join(parts)}")
    if len(texts) > most:
        lines.append(f"                {counted(len(texts) - most, 'more stretch')} of text (--json lists all)")
    return lines

"""``sharedllm info``: versions, libraries, device, and what is wrong if something is."""

from __future__ import annotations

import argparse
from typing import Any

from sharedllm_ext.cli._common import add_json_option


def add_parser(commands: Any) -> None:
    """Add the command."""
    text = "print versions, libraries, architectures and device, and what is wrong if something is"
    parser = commands.add_parser("info", help=text, description=text)
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from sharedllm_ext import info

    return info.main(["--json"] if args.json else [])

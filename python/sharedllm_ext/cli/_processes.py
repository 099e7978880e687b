"""``sharedllm ask`` in several processes that torchrun has started: the first one reads, answers and prints."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sharedllm_ext.cli._common import EXIT_ERROR, pick_device
from sharedllm_ext.cli._output import UsageError

if TYPE_CHECKING:
    import torch

    from sharedllm_ext.distributed import Ranks
    from sharedllm_ext.model import ContextMemory

# seconds in which another process prints why all end, before the launcher sees this one's exit code and ends all
_PAUSE = 2.0


def add_options(parser: Any) -> None:
    """``--sharded-memory``, ``--timeout``."""
    group = parser.add_argument_group("several processes (torchrun)")
    group.add_argument(
        "--sharded-memory", action="store_true", help="each process keeps its part of the memory, and all answer"
    )
    group.add_argument(
        "--timeout", type=_seconds, metavar="S", help="that a process waits for the others at most (default: 600)"
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def are_several() -> bool:
    """Whether torchrun has started more than one process."""
    return os.environ.get("WORLD_SIZE", "1").isdigit() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def check(args: argparse.Namespace) -> None:
    """Refuse what does not go with one process, or with several.

    Raises:
        UsageError: names the option.
    """
    if not are_several():
        for option in ("sharded_memory", "timeout"):
            if getattr(args, option):
                name = option.replace("_", "-")
                raise UsageError(f"--{name}: expected several processes (torchrun … -m sharedllm_ext ask …), got one")
        return
    for option in ("memory", "index", "save_index"):
        if getattr(args, option) is not None:
            name = option.replace("_", "-")
            raise UsageError(f"--{name}: expected --context alone with several processes, got --{name}")
    if args.device is not None and ":" in args.device:
        raise UsageError(f"--device: expected cpu or cuda with several processes, got {args.device!r}")
    if args.sharded_memory and args.save_memory is not None:
        raise UsageError("--save-memory: expected no --sharded-memory with it, got both")
    if args.sharded_memory and args.question is None:
        raise UsageError("--sharded-memory: expected a QUESTION with it, got none")


def run_together(
    args: argparse.Namespace, first: Callable[[Ranks], int], load: Callable[[torch.device], tuple[Any, Any]]
) -> int:
    """Run the command in this process, one of several; one of them says what went wrong.

    Args:
        args: the command line's.
        first: does the first process's work.
        load: gives the others' model and tokenizer on a device.
    """
    from sharedllm_ext.distributed import RankError, join
    from sharedllm_ext.distributed.ranks import TIMEOUT

    rank = int(os.environ["RANK"])
    try:
        check(args)
        device = pick_device(args.device)
        with join(device.type, TIMEOUT if args.timeout is None else args.timeout) as ranks:
            return first(ranks) if rank == 0 else _follow(args, ranks, load)
    except Exception as error:
        silent = error.silent if isinstance(error, RankError) else ()
        if rank == min(other for other in range(rank + 1) if other not in silent):
            raise
        time.sleep(_PAUSE)
        return EXIT_ERROR


def compress_first(
    model: Any, context: torch.Tensor, question: torch.Tensor | None, ranks: Ranks, *, sharded: bool, progress: Any
) -> ContextMemory:
    """The first process's part: hand context and question to the others, and compress with them.

    The others end here, unless the memory stays sharded.
    """
    import torch

    ranks.agree("loading")
    asked = [] if question is None else question[0].tolist()
    ranks.share(json.dumps({"question": asked, "sharded": sharded}).encode())
    ranks.share(context[0].to("cpu", torch.int32).numpy().tobytes())
    memory = _compress(model, context, question, ranks, sharded, progress)
    assert memory is not None
    if not sharded:
        ranks.close()
    return memory


def sizes(memory: ContextMemory, ranks: Ranks | None) -> tuple[int, int]:
    """Slots of one layer and bytes, over all processes that hold a sharded memory."""
    if ranks is None:
        return memory.num_slots, memory.nbytes
    told = [json.loads(text) for text in ranks.exchange(json.dumps([memory.num_slots, memory.nbytes]).encode())]
    return sum(slots for slots, _ in told), sum(size for _, size in told)


def _compress(
    model: Any, context: torch.Tensor, question: torch.Tensor | None, ranks: Ranks, sharded: bool, progress: Any = None
) -> ContextMemory | None:
    from sharedllm_ext.distributed import compress

    gather = "none" if sharded else "first"
    return compress(model, context, query_ids=question, ranks=ranks, gather=gather, progress=progress)


def _follow(args: argparse.Namespace, ranks: Ranks, load: Callable[[torch.device], tuple[Any, Any]]) -> int:
    """Another process's part."""
    import torch

    model, tokenizer = ranks.run("loading", lambda: load(ranks.device))
    task = json.loads(ranks.share(None))
    tokens = torch.frombuffer(bytearray(ranks.share(None)), dtype=torch.int32)
    context = tokens.to(ranks.device, torch.int64).unsqueeze(0)
    question = torch.tensor([task["question"]], device=ranks.device) if task["question"] else None
    with torch.inference_mode():
        memory = _compress(model, context, question, ranks, task["sharded"])
    if not task["sharded"]:
        return 0
    assert memory is not None and question is not None
    sizes(memory, ranks)
    from sharedllm_ext.cli._generation import generate

    generate(
        model,
        tokenizer,
        question,
        memory,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        show=False,
    )
    return 0

"""Answer exported questions with a base model whose cache kvpress has pruned, in kvpress's own environment.

    sharedllm eval BASE --tasks … --export questions.jsonl                      # in the package's environment
    python kvpress_answers.py --base BASE --records questions.jsonl --press snapkv --out snapkv.jsonl
    sharedllm eval MODEL --suite records --data questions.jsonl --answers snapkv=snapkv.jsonl

kvpress 0.5.5 needs Transformers older than 5.3, which the package cannot import; so nothing of the package is imported
here but one file, by its path.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

SHARED = Path(__file__).parents[2] / "python" / "sharedllm_ext" / "evaluation" / "decoding_rows.py"
PRESSES = ("snapkv", "expected_attention", "none")
#: Presses that score entries by the queries of the prompt's last tokens, so that the question has to be there.
ASKED_LAST = ("snapkv",)


def load_file(path: Path) -> Any:
    """A module, by the path of its file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


decoding = load_file(SHARED)


def kept_entries(context: int, share: float, tokens: int) -> int:
    """Cache entries that each layer keeps of a context of so many tokens."""
    return min(context, round(share * context) + tokens)


def make_press(name: str) -> Any:
    """A press of kvpress, ``None`` for ``none``; its ratio is set for each prompt."""
    if name == "none":
        return None
    import kvpress

    kinds = {"snapkv": kvpress.SnapKVPress, "expected_attention": kvpress.ExpectedAttentionPress}
    return kinds[name]()


@contextlib.contextmanager
def stretched(model: Any, tokens: int, rope: str) -> Iterator[Any]:
    """The rotary module for so many tokens: for ``ntk`` theta grows with them beyond the trained positions."""
    own = model.model.rotary_emb
    config = copy.deepcopy(model.config)
    ratio = max(1.0, tokens / config.max_position_embeddings) if rope == "ntk" else 1.0
    if ratio > 1:
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        theta = config.rope_parameters["rope_theta"] * ratio ** (size / (size - 2))
        config.rope_parameters = {**config.rope_parameters, "rope_theta": theta}
        model.model.rotary_emb = type(own)(config).to(model.device)
    try:
        yield model.model.rotary_emb
    finally:
        model.model.rotary_emb = own


class Pruned:
    """A base model that reads prompts, prunes its cache by a press, and goes on from what is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.press, self.name, self.rope = make_press(args.press), args.press, args.rope
        self.share, self.tokens = args.kept_share, args.kept_tokens
        dtype = getattr(torch, args.dtype)
        self.model: Any = AutoModelForCausalLM.from_pretrained(args.base, dtype=dtype).to(args.device).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(args.base)
        end = self.model.generation_config.eos_token_id
        end = self.tokenizer.eos_token_id if end is None else end
        self.ends = set(end) if isinstance(end, (list, tuple)) else set() if end is None else {end}

    @torch.inference_mode()
    def read(self, row: dict[str, Any]) -> tuple[Any, Any, int]:
        """The row that was read, its rotary module, and the entries that each layer kept."""
        context = [*row["begin_ids"], *row["context_ids"]]
        asked = row["question_ids"]
        if self.name in ASKED_LAST:
            # all but the last token, whose logits begin the answer
            context, asked = context + asked[:-1], asked[-1:]
        kept = kept_entries(len(row["context_ids"]), self.share, self.tokens)
        kept = min(len(context), kept + len(context) - len(row["context_ids"]))
        cache, model = DynamicCache(), self.model
        with stretched(model, len(context) + len(asked) + row["max_new_tokens"], self.rope) as rotary:
            pruning: Any = contextlib.nullcontext()
            if self.press is not None:
                # kvpress keeps int(n (1 - ratio)); the half is for rounding
                self.press.compression_ratio = max(0.0, 1 - (kept + 0.5) / len(context))
                pruning = self.press(model)
            with pruning:
                model.model(input_ids=self._tensor(context), **{decoding.CACHE: cache})
            left = cache.layers[0].keys.shape[2]
            positions = torch.arange(len(context), len(context) + len(asked), device=model.device)[None]
            output = model(
                input_ids=self._tensor(asked), position_ids=positions, logits_to_keep=1, **{decoding.CACHE: cache}
            )
        return decoding.Row.of(cache, len(context) + len(asked), output.logits), rotary, left

    def _tensor(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([ids], device=self.model.device)

    def answer(self, rows: list[dict[str, Any]]) -> tuple[list[str], list[int]]:
        """Answers, and the entries that each layer kept of each prompt."""
        read, rotaries, kept = zip(*map(self.read, rows), strict=True)
        newline = self.tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
        stops = [self.ends | (set(newline) if row["stop_at_newline"] else set()) for row in rows]
        own = self.model.model.rotary_emb
        self.model.model.rotary_emb = decoding.RowRotary(rotaries)
        try:
            tokens = decoding.decode_rows(self.model, read, [row["max_new_tokens"] for row in rows], stops)
        finally:
            self.model.model.rotary_emb = own
        return [str(self.tokenizer.decode(answer, skip_special_tokens=True)) for answer in tokens], list(kept)


def batches(rows: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Neighbours of one task and length, at most ``size``."""
    waiting: list[dict[str, Any]] = []
    for row in rows:
        if waiting and (len(waiting) == size or any(row[key] != waiting[0][key] for key in ("task", "length"))):
            yield waiting
            waiting = []
        waiting.append(row)
    if waiting:
        yield waiting


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", required=True, help="checkpoint folder of the base")
    parser.add_argument("--records", required=True, type=Path, help="what sharedllm eval --export wrote")
    parser.add_argument("--press", required=True, choices=PRESSES, help="none: nothing is pruned, to compare")
    parser.add_argument("--out", required=True, type=Path, help="the answers, JSON lines")
    parser.add_argument(
        "--kept-share", type=float, default=1 / 30, help="entries kept by each layer for a token of context"
    )
    parser.add_argument("--kept-tokens", type=int, default=2048, help="and beside these (default: %(default)s)")
    parser.add_argument("--rope", choices=("ntk", "none"), default="ntk", help="beyond the trained positions")
    parser.add_argument("--batch", type=int, default=1, help="questions of a task and length answered at once")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="begin no batch after so many seconds")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Answer the records, and go on where an earlier run stopped."""
    args = parse(argv)
    begin = time.perf_counter()
    done = set()
    if args.out.exists():
        done = {json.loads(line)["fingerprint"] for line in args.out.read_text().splitlines()}
    rows = [json.loads(line) for line in args.records.read_text().splitlines()]
    rows = [row for row in rows if row["fingerprint"] not in done]
    system = Pruned(args)
    with open(args.out, "a", encoding="ascii") as file:
        for group in batches(rows, args.batch):
            if args.seconds is not None and time.perf_counter() - begin > args.seconds:
                sys.exit(f"{args.out}: stopped after {args.seconds:g} s; the same command goes on")
            start = time.perf_counter()
            answers, kept = system.answer(group)
            spent = (time.perf_counter() - start) / len(group)
            for row, answer, left in zip(group, answers, kept, strict=True):
                given = {"id": row["id"], "fingerprint": row["fingerprint"], "prediction": answer}
                file.write(json.dumps({**given, "seconds": spent, "kept": left, "press": args.press}) + "\n")
            file.flush()


if __name__ == "__main__":
    main()

"""Fit how the pick weighs tokens and words, on texts as long as those that will be read; all else stays as it is.

    python fit_words.py --data data --adapter adapter.safetensors --wide --out fitted.safetensors

Training compares a question with the few hundred segments of a batch, half of them running text. Here they are a
thousand of one text, which is compressed once for all of its questions. What is fitted is so small that a CPU does it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from adapter import file_digest, load_base, save_adapter
from batches import answer_segments
from package_form import any_adapter
from questions import QuestionSource
from retriever import Pick, Retriever, Weights
from shared_words import RUNS, WIDE
from torch import Tensor, nn
from train import begin_with, rate_factor
from transformers import AutoTokenizer

QUESTION_TOKENS = 64
BATCH, WARMUP_STEPS = 16, 20
TOP = 8
# in units of the score: how near to the last place among the best counts
SOFTNESS = 2.0
# chunks compressed at a time
MICRO_BATCH = 8


class Evidence(NamedTuple):
    """What the scores of ``S`` segments for a question of ``L`` tokens are made of.

    Attributes:
        layers: ``[layers, L, S]`` float16, see :meth:`Retriever.layer_evidence`.
        words: ``[runs, S, L]`` float16, see :meth:`WordIndex.evidence`.
        inputs: ``[layers, L, d]`` float16, what the weights of the tokens see.
        right: the segments that hold the answer.
        kind: ``"statements"`` or ``"paragraphs"``.
    """

    layers: Tensor
    words: Tensor
    inputs: Tensor
    right: list[int]
    kind: str


def scores(pick: Pick, evidence: Evidence) -> Tensor:
    """``[S]``, as :meth:`Retriever.scores` gives them."""
    total = torch.zeros((), device=evidence.inputs.device)
    by_run = torch.zeros((), device=evidence.inputs.device)
    for i, h in enumerate(evidence.inputs.float()):
        weight = torch.sigmoid(h @ pick.token_weight[i] + pick.token_bias[i])
        total = total + pick.beta[i] * (weight @ evidence.layers[i].float())
        weight = torch.sigmoid(h @ pick.word_weight[i] + pick.word_bias[i])
        by_run = by_run + pick.word_beta[i][:, None] * weight
    return total + torch.einsum("gsl,gl->s", evidence.words.float(), by_run)


@torch.no_grad()
def evidence_of(
    retriever: Retriever, weights: Weights, source: QuestionSource, paragraphs: bool, chunks: int, questions: int
) -> Iterator[Evidence]:
    """The evidence of the questions of a new text; what is asked twice is left out, as it has two answers."""
    layout = retriever.layout
    try:
        text = source.long_text(chunks * layout.chunk_size, questions, QUESTION_TOKENS, paragraphs)
    except ValueError as error:
        raise SystemExit(f"{error}; ask fewer by --questions, or give more --chunks") from None
    ids = torch.from_numpy(text.context).to(retriever.device)
    parts = [retriever.compress(weights, part)[1] for part in ids.view(-1, layout.chunk_size).split(MICRO_BATCH)]
    raw_keys = {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}
    words = retriever.word_index(ids[None])
    asked = Counter(tuple(row.question) for row in text.rows)
    for row in text.rows:
        if asked[tuple(row.question)] > 1:
            continue
        question = torch.tensor([row.question], device=retriever.device)
        inputs = list(retriever.pick_inputs(weights, question))
        layers = [retriever.layer_evidence(i, h, raw_keys)[0] for i, h in enumerate(inputs)]
        shared = words.evidence(retriever.classes[question], torch.ones_like(question, dtype=torch.bool))
        yield Evidence(
            torch.stack(layers).half(),
            shared[:, :, 0].half(),
            torch.cat(inputs).half(),
            answer_segments(row.places, layout.segment),
            "paragraphs" if paragraphs else "statements",
        )


def loss_of(pick: Pick, evidence: Evidence) -> Tensor:
    """How far the answer's segments are from being among the best: 0 far above the place that they need.

    That is what reading asks of them. Cross-entropy would also ask that one score far above all others, and that all
    segments of an answer score alike.
    """
    found = scores(pick, evidence)
    others = torch.ones_like(found, dtype=torch.bool)
    others[evidence.right] = False
    last = found[others].topk(max(1, TOP + 1 - len(evidence.right))).values[-1]
    return SOFTNESS * F.softplus((last - found[evidence.right]) / SOFTNESS).mean()


@torch.no_grad()
def report(pick: Pick, held_out: Sequence[Evidence]) -> dict[str, str]:
    """Mean loss, and how often all segments of the answer are among the best, by kind."""
    told = {}
    for kind in sorted({evidence.kind for evidence in held_out}):
        some = [evidence for evidence in held_out if evidence.kind == kind]
        loss = sum(float(loss_of(pick, evidence)) for evidence in some) / len(some)
        best = [set(scores(pick, evidence).topk(TOP).indices.tolist()) for evidence in some]
        found = sum(best >= set(evidence.right) for best, evidence in zip(best, some, strict=True)) / len(some)
        told[kind] = f"{len(some)} questions, loss {loss:.3f}, found {found:.1%}"
    return told


def fit(pick: Pick, evidence: Sequence[Evidence], epochs: int, rate: float, rng: np.random.Generator) -> None:
    """Adam over the weights of tokens and words and their factors, at a rate that rises and falls to nothing."""
    fitted = [*pick.token_weight, *pick.word_weight, pick.token_bias, pick.word_bias, pick.beta, pick.word_beta]
    optimizer = torch.optim.Adam(fitted, lr=rate, betas=(0.9, 0.98))
    steps = epochs * (len(evidence) // BATCH)
    for step in range(steps):
        if step % (len(evidence) // BATCH) == 0:
            order = rng.permutation(len(evidence)).tolist()
        optimizer.param_groups[0]["lr"] = rate * rate_factor(step, step / steps, WARMUP_STEPS)
        for _ in range(BATCH):
            (loss_of(pick, evidence[order.pop()]) / BATCH).backward()
        nn.utils.clip_grad_norm_(fitted, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder written by prepare.py")
    parser.add_argument("--adapter", type=Path, required=True, help="train.py's or the package's form")
    parser.add_argument("--out", type=Path, required=True, help="the adapter, in train.py's form")
    parser.add_argument("--wide", action="store_true", help="add the words of all that is read with a segment")
    parser.add_argument("--texts", type=int, default=8, help="half of paragraphs, half with hidden statements")
    parser.add_argument("--chunks", type=int, default=126, help="of a text")
    parser.add_argument("--questions", type=int, default=200, help="of a text")
    parser.add_argument("--held-out", type=float, default=0.06, help="share of questions that tells how it went")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=3e-3, help="of learning, at its peak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device, start = torch.device(arguments.device), time.monotonic()
    base = load_base(arguments.data / "base", device)
    given = any_adapter(arguments.adapter, base)
    runs = (*RUNS, WIDE) if arguments.wide else given.runs
    retriever = Retriever(given.shape, given.layout, base.weights, base.classes, given.ranks, runs)
    begin_with(retriever, given)
    weights = retriever.compressor_weights()
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    source = QuestionSource(arguments.data, tokenizer, "train", 50_000 + arguments.seed, retriever.layout)
    evidence: list[Evidence] = []
    for number in range(arguments.texts):
        paragraphs = number % 2 == 0
        evidence += evidence_of(retriever, weights, source, paragraphs, arguments.chunks, arguments.questions)
        print(f"{number + 1} texts, {len(evidence)} questions, {time.monotonic() - start:.0f} s", flush=True)
    rng = np.random.default_rng(arguments.seed)
    order = rng.permutation(len(evidence)).tolist()
    count = math.ceil(arguments.held_out * len(evidence))
    if len(evidence) - count < BATCH:
        raise SystemExit(f"questions: expected at least {BATCH} beside {count} held out, got {len(evidence) - count}")
    held_out = [evidence[i] for i in order[:count]]
    told = {"before": report(retriever.pick, held_out)}
    fit(retriever.pick, [evidence[i] for i in order[count:]], arguments.epochs, arguments.rate, rng)
    told["after"] = report(retriever.pick, held_out)
    print(json.dumps(told, indent=1), flush=True)
    fitting: dict[str, Any] = {
        "begun with": file_digest(arguments.adapter),
        "questions": len(evidence) - len(held_out),
        "seconds": round(time.monotonic() - start, 1),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "flags": {
            name: value for name, value in vars(arguments).items() if name not in ("data", "adapter", "out", "device")
        },
    }
    save_adapter(arguments.out, retriever, base, {"words fitted": fitting})
    print(f"wrote {arguments.out}, {arguments.out.stat().st_size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()

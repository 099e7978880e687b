"""Train the pick and the reading of what it finds, for a given time, on one GPU.

    python train.py --data data --out adapter.safetensors

A step sees 8 contexts of 7 chunks with 6 questions each and learns three things at once: which of all segments answer a
question (contrastive, over the whole batch), to answer from passages in the window, and to go on with the text.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from adapter import file_digest, load_base, save_adapter
from batches import IGNORED, PICKED, Batch, BatchQueue, BatchSizes
from layout import Layout
from mix import Mix
from package_form import any_adapter
from questions import QuestionSource
from retriever import READING, Retriever, Shape, picked_passages
from shared_words import RUNS, WIDE
from torch import Tensor, nn
from transformers import AutoTokenizer

TEXT_WEIGHT = 0.5
WARMUP_STEPS = 60
FLOOR = 0.02
# steps on a side stream before the step is captured
EAGER_STEPS = 4
REPORTED = ("answer loss", "pick loss", "text loss", "found in the top 8")


class LearningRates(NamedTuple):
    """Peaks: of the injected blocks and the pick, and of the low-rank updates."""

    blocks: float = 1e-3
    updates: float = 1e-3


class LossWeights(NamedTuple):
    """Of the pick without words within the loss of the pick, and of the running text."""

    hidden: float = 0.5
    text: float = TEXT_WEIGHT


class Frame(NamedTuple):
    """Tokens that are the same in every window: ``[u]`` the begin of the user's turn, ``[k, n]`` separators."""

    user: Tensor
    separators: Tensor


def pick_loss(scores: Tensor, targets: Tensor, compared: Tensor) -> Tensor:
    """Cross-entropy of the scores ``[R, segments]`` against the answer's segments, which share 1."""
    log_shares = F.log_softmax(scores.masked_fill(~compared, -1e4), -1)
    return -(targets * log_shares).sum(-1).mean()


def found_share(scores: Tensor, targets: Tensor, count: int = PICKED) -> Tensor:
    """Share of questions with one of the answer's segments among the ``count`` best."""
    best = scores.topk(min(count, scores.shape[1]), 1).indices
    return targets.gather(1, best).gt(0).any(1).float().mean()


def windows(retriever: Retriever, batch: Batch, scores: Tensor, frame: Frame, contexts: int) -> tuple[Tensor, Tensor]:
    """``[B, tokens]`` what is read, and ``[B]`` where the tail begins; what follows the tail is not used.

    The passages are the reader's own best segments of its context, or the best of a search by words; those that answers
    need take the last places if they are not among them. Ranks are the scores', so that they say as much as they will
    say later. All sizes are those of PICKED passages, whatever their number is.
    """
    documents, device = batch.chunks.view(contexts, -1), scores.device
    own = scores.view(len(scores), contexts, -1)[batch.reader, torch.arange(contexts, device=device)].detach()
    own = torch.where(batch.by_words[:, None], batch.word_scores, own)
    segments = (own + 1e4 * batch.needed - 1e4 * batch.left_out).topk(PICKED, 1).indices
    dropped = torch.arange(PICKED, device=device) >= batch.passages[:, None]
    ranks = own.gather(1, segments).masked_fill(dropped, -1e5).argsort(1, descending=True).argsort(1)
    place = torch.where(batch.order < 0, segments.float(), batch.order).masked_fill(dropped, 1e9).argsort(1)
    text = picked_passages(
        documents, segments.gather(1, place), ranks.gather(1, place), frame.separators, retriever.layout
    )
    ids = torch.cat((frame.user.expand(contexts, -1), text, batch.tail), 1)
    # the tail follows the last passage that is read
    passage = text.shape[1] // PICKED
    tail = len(frame.user) + batch.passages * passage
    token = torch.arange(ids.shape[1], device=device).expand(contexts, -1)
    moved = token + ((PICKED - batch.passages) * passage)[:, None]
    return ids.gather(1, torch.where(token < tail[:, None], token, moved).clamp(max=ids.shape[1] - 1)), tail


def losses(
    retriever: Retriever, batch: Batch, frame: Frame, contexts: int, weights: LossWeights
) -> tuple[Tensor, Tensor]:
    """The loss to minimise, and ``[4]`` what is reported (REPORTED)."""
    compressor, decoder = retriever.compressor_weights(), retriever.decoder_weights()
    memory, raw_keys = retriever.compress(compressor, batch.chunks)
    words = retriever.word_index(batch.chunks.view(contexts, -1))
    hidden, shared = retriever.score_parts(compressor, batch.questions, batch.question_used, raw_keys, words)
    assert shared is not None
    scores = hidden + shared
    pick = (1 - weights.hidden) * pick_loss(scores, batch.targets, batch.compared)
    if weights.hidden:
        pick = pick + weights.hidden * pick_loss(hidden, batch.targets, batch.compared)
    placed = retriever.place(memory, batch.chunk_index, contexts)
    ids, tail = windows(retriever, batch, scores, frame, contexts)
    states = retriever.decode(decoder, ids, placed, batch.query_position, batch.gate)
    places = (tail[:, None] + batch.answer_places)[..., None].expand(-1, -1, states.shape[-1])
    answer_logits = retriever.logits(states.gather(1, places))
    answer = F.cross_entropy(answer_logits.flatten(0, 1), batch.answers.flatten(), ignore_index=IGNORED)
    states = retriever.decode(decoder, batch.running, placed, batch.query_position, batch.gate)[:, :-1]
    text = F.cross_entropy(retriever.logits(states).flatten(0, 1), batch.running[:, 1:].flatten())
    with torch.no_grad():
        found = found_share(scores.masked_fill(~batch.compared, -1e4), batch.targets)
        reported = torch.stack((answer, pick, text, found))
    return answer + pick + weights.text * text, reported


def rate_factor(step: int, progress: float, warmup: int = WARMUP_STEPS) -> float:
    """Linear warm-up over the first steps, times half a cosine over the time (``progress`` 0 to 1)."""
    return min(1.0, (step + 1) / warmup) * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


class Trainer:
    """One optimiser step after the other; on CUDA the whole step is one graph over buffers that stay in place."""

    def __init__(
        self,
        retriever: Retriever,
        first: Batch,
        frame: Frame,
        contexts: int,
        peaks: LearningRates,
        weights: LossWeights | None = None,
    ) -> None:
        self.retriever, self.frame, self.contexts, self.peaks = retriever, frame, contexts, peaks
        self.weights = weights or LossWeights()
        self.cuda = retriever.device.type == "cuda"
        self.buffers = Batch(*(torch.from_numpy(array).to(retriever.device) for array in first))
        # tensors, because a graph reads them anew at every replay
        self.rates = [torch.tensor(peak, device=retriever.device) for peak in peaks]
        blocks = [*retriever.injected.parameters(), *retriever.pick.parameters()]
        updates = [*retriever.lower.parameters(), *retriever.upper.parameters(), *retriever.mlp.parameters()]
        self.parameters = blocks + updates
        self.optimizer = torch.optim.AdamW(
            [{"params": blocks, "lr": self.rates[0]}, {"params": updates, "lr": self.rates[1]}],
            betas=(0.9, 0.95),
            weight_decay=0.01,
            fused=self.cuda,
            capturable=self.cuda,
        )
        self.steps, self.seconds = 0, 0.0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graph_reports: Tensor | None = None
        self.eager = 0
        self.side_stream = torch.cuda.Stream() if self.cuda else None

    def step(self, batch: Batch, progress: float) -> Tensor:
        """Train on ``batch``; returns ``[4]`` what is reported (REPORTED)."""
        for rate, peak in zip(self.rates, self.peaks, strict=True):
            rate.fill_(peak * rate_factor(self.steps, progress))
        for buffer, array in zip(self.buffers, batch, strict=True):
            buffer.copy_(torch.from_numpy(array))
        if self.side_stream is None:
            reports = self._update()
        elif self.eager < EAGER_STEPS:
            self.eager += 1
            self.side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side_stream):
                reports = self._update()
            torch.cuda.current_stream().wait_stream(self.side_stream)
        else:
            reports = self._replay()
        self.steps += 1
        return reports

    def save_state(self, path: Path) -> None:
        """Everything that the next step needs: an exact continuation but for the order of the batches."""
        state = {
            "parameters": self.retriever.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "seconds": self.seconds,
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load_state(self, path: Path) -> None:
        state = torch.load(path, map_location=self.retriever.device)
        self.retriever.load_state_dict(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        # what was loaded has rates of its own
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
        self.steps, self.seconds = state["steps"], state["seconds"]

    def _update(self) -> Tensor:
        loss, reports = losses(self.retriever, self.buffers, self.frame, self.contexts, self.weights)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return reports

    def _replay(self) -> Tensor:
        if self.graph is None:
            torch.cuda.synchronize()
            # the graph has memory of its own; what the first steps took is given back to the device
            torch.cuda.empty_cache()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.graph_reports = self._update()
            self.graph = graph
        self.graph.replay()
        assert self.graph_reports is not None
        # the graph overwrites its own
        return self.graph_reports.clone()


def train(trainer: Trainer, batches: BatchQueue, seconds: float, stop: float, max_steps: int | None) -> None:
    """Steps until ``stop`` seconds of training, with a line now and then; rates decline over ``seconds``."""
    recent: list[Tensor] = []
    start = time.monotonic() - trainer.seconds
    waited = 0.0
    while max_steps is None or trainer.steps < max_steps:
        trainer.seconds = time.monotonic() - start
        if trainer.seconds > stop:
            break
        asked = time.monotonic()
        batch = batches.get()
        waited += time.monotonic() - asked
        recent = [*recent[-199:], trainer.step(batch, min(1.0, trainer.seconds / seconds))]
        if trainer.cuda and trainer.steps % 8 == 0:
            torch.cuda.synchronize()  # the clock must not run ahead of the GPU
        if trainer.steps in (2, 10, 30, 100) or trainer.steps % 250 == 0:
            means = torch.stack(recent).mean(0).tolist()
            if not all(math.isfinite(mean) for mean in means):
                raise RuntimeError(f"training: expected finite losses, got {means} at step {trainer.steps}")
            report = ", ".join(f"{name} {mean:.3f}" for name, mean in zip(REPORTED, means, strict=True))
            print(
                f"step {trainer.steps}, {trainer.seconds:.0f} s: {report}; waited {waited:.0f} s for data", flush=True
            )


def begin_with(retriever: Retriever, other: Retriever) -> None:
    """Take over the trained weights of another retriever, which may look for fewer kinds of words.

    Raises:
        SystemExit: it has another shape, layout or ranks.
    """
    for name in ("shape", "layout", "ranks"):
        wanted, got = getattr(retriever, name), getattr(other, name)
        if wanted != got:
            raise SystemExit(f"--init: expected an adapter with {wanted}, got one with {got}")
    count = len(other.runs)
    if retriever.runs[:count] != other.runs:
        raise SystemExit(f"--init: expected an adapter with words {retriever.runs}, got one with {other.runs}")
    state = other.state_dict()
    # what the other one does not look for begins at nothing
    state["pick.word_beta"] = F.pad(state["pick.word_beta"], (0, len(retriever.runs) - count))
    retriever.load_state_dict(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder written by prepare.py")
    parser.add_argument("--out", type=Path, required=True, help="the adapter, a safetensors file")
    parser.add_argument("--seconds", type=float, default=900.0, help="of training, over which the rates decline")
    parser.add_argument("--stop", type=float, help="stop after so many seconds of training; go on later with --state")
    parser.add_argument("--state", type=Path, help="continue from this file if it is there; written at the end")
    parser.add_argument("--init", type=Path, help="begin with this adapter's weights: train.py's or the package's form")
    parser.add_argument("--max-steps", type=int, help="stop earlier (for a quick trial)")
    parser.add_argument("--workers", type=int, default=13, help="processes that make batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    batch = parser.add_argument_group("a batch")
    batch.add_argument("--contexts", type=int, default=8)
    batch.add_argument("--chunks", type=int, default=7, help="of each context")
    batch.add_argument("--questions", type=int, default=6, help="of each context")
    batch.add_argument("--question-tokens", type=int, default=64, help="longer questions are not asked")
    batch.add_argument("--running-tokens", type=int, default=1024, help="of running text after each context")
    changed = parser.add_argument_group("what runs since C change, and ablations")
    changed.add_argument(
        "--mix", choices=("d", "c"), default="d", help="texts and windows: run C's, or those since run D (mix.py)"
    )
    changed.add_argument("--hidden-weight", type=float, default=0.5, help="of the pick without words, 0 to 1")
    changed.add_argument("--wide", action="store_true", help="words of all that is read with a segment count, too")
    changed.add_argument("--text-weight", type=float, default=TEXT_WEIGHT, help="of the running text")
    changed.add_argument("--rate", type=float, default=1e-3, help="peak of the learning rate")
    changed.add_argument("--memory-layers", type=int, default=8)
    changed.add_argument("--reading", choices=READING, default=READING[0], help="layers that read the memory")
    changed.add_argument("--slot-position", choices=("end", "start"), default="end", help="of its stride")
    changed.add_argument("--depth", type=int, default=3, help="splits of a chunk; a segment is what a leaf holds")
    changed.add_argument("--slots", type=int, default=32, help="of a node")
    arguments = parser.parse_args()
    if not 0 <= arguments.hidden_weight <= 1:
        parser.error(f"--hidden-weight: expected 0 to 1, got {arguments.hidden_weight}")

    layout = Layout(
        tree_depth=arguments.depth,
        slots_per_node=arguments.slots,
        keep_stride_ends=arguments.slot_position == "end",
    )
    sizes = BatchSizes(
        contexts=arguments.contexts,
        chunks=arguments.chunks,
        questions=arguments.questions,
        question_tokens=arguments.question_tokens,
        running_tokens=arguments.running_tokens,
    )
    device = torch.device(arguments.device)
    base = load_base(arguments.data / "base", device)
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    if tokenizer.eos_token_id != base.config["eos_token_id"]:
        raise SystemExit(
            f"{base.folder}: expected a tokenizer that ends with token {base.config['eos_token_id']} as the base does, "
            f"got one with {tokenizer.eos_token_id}; run prepare.py again"
        )
    mix = Mix.run_c() if arguments.mix == "c" else Mix()
    batches = BatchQueue(arguments.data, base.folder, layout, sizes, arguments.workers, arguments.seed, mix)
    source = QuestionSource(arguments.data, tokenizer, "train", 0, layout)
    frame = Frame(torch.tensor(source.user, device=device), torch.from_numpy(source.separators(PICKED)).to(device))
    try:
        torch.manual_seed(arguments.seed)
        shape = Shape.of(base.config, arguments.memory_layers, arguments.reading)
        runs = (*RUNS, WIDE) if arguments.wide else RUNS
        retriever = Retriever(shape, layout, base.weights, base.classes, runs=runs)
        if arguments.init:
            begin_with(retriever, any_adapter(arguments.init, base))
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            retriever.compile_elementwise()
        trainer = Trainer(
            retriever,
            batches.get(),
            frame,
            sizes.contexts,
            LearningRates(arguments.rate, arguments.rate),
            LossWeights(arguments.hidden_weight, arguments.text_weight),
        )
        if arguments.state and arguments.state.is_file():
            trainer.load_state(arguments.state)
        print(f"{sum(p.numel() for p in trainer.parameters) / 1e6:.2f} M parameters are trained", flush=True)
        train(trainer, batches, arguments.seconds, arguments.stop or arguments.seconds, arguments.max_steps)
        if arguments.state:
            trainer.save_state(arguments.state)
    finally:
        batches.close()
    training = {
        "steps": trainer.steps,
        "seconds": round(trainer.seconds, 1),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "most memory, GB": round(torch.cuda.max_memory_allocated(device) / 1e9, 1) if device.type == "cuda" else None,
        "begun with": file_digest(arguments.init) if arguments.init else None,
        "flags": {
            name: value
            for name, value in vars(arguments).items()
            if name not in ("data", "out", "state", "stop", "max_steps", "workers", "device", "init")
        },
    }
    save_adapter(arguments.out, retriever, base, training)
    print(f"wrote {arguments.out}, {arguments.out.stat().st_size / 1e6:.2f} MB; {json.dumps(training)}", flush=True)


if __name__ == "__main__":
    main()

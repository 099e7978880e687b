"""The three losses: of the pick, of answers read from picked passages, and of the text that follows a context."""

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..model.memory import ContextMemory
from ..model.passages import passage_span
from ..model.pick import SlotPlaces, rotated, slot_places, unrotated
from ..model.rotary import Tables
from ..model.upload import upload
from ..model.word_index import WordIndex, joint_evidence
from .data import Batch, Example, needed_segments, segments_of
from .prompt import PromptTokens

IGNORED = -100
# logits of one block, in numbers: they are computed again in the backward pass
_BLOCK = 1 << 27
_LEFT_OUT = -1e4


@dataclasses.dataclass(frozen=True)
class Weights:
    """Factors of the losses, and how many passages an answer is read from."""

    answer: float = 1.0
    pick: float = 1.0
    text: float = 0.5
    passages: int = 8


class Counts(NamedTuple):
    """What the losses are means over: tokens of answers, questions with a known place, tokens of text."""

    answer: int
    pick: int
    text: int

    def __add__(self, other: Any) -> "Counts":
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


class Sums(NamedTuple):
    """Sums of the losses of a batch, and how many questions have their place among the best segments."""

    answer: Tensor
    pick: Tensor
    text: Tensor
    found: Tensor

    def total(self, counts: Counts, weights: Weights) -> Tensor:
        """The loss: weighted means over ``counts``, which may be those of several batches together."""
        terms = zip(self[:3], counts, (weights.answer, weights.pick, weights.text), strict=True)
        return torch.stack([factor * term / max(1, count) for term, count, factor in terms]).sum()


def count(batch: Batch, prompt: PromptTokens, has_pick: bool) -> Counts:
    """The counts of a batch."""
    answer = pick = text = 0
    for example in batch.examples:
        answer += sum(len(example.questions[i].answer) + len(prompt.end) for i in example.turns)
        pick += sum(bool(q.places) for q in example.questions) if has_pick else 0
        text += max(0, len(example.running) - 1)
    return Counts(answer, pick, text)


class Losses:
    """The losses of a model.

    Args:
        model: a :class:`SharedLLMForCausalLM` with ``query_aware=False``; without a pick answers are read from the
            memory alone.
        prompt: tokens around passages, questions and answers.
        passages: that an answer is read from, of ``config.segment_size`` tokens with their margins.

    Raises:
        ValueError: a query-aware model, or split noise beside a pick.
    """

    def __init__(self, model: Any, prompt: PromptTokens, passages: int = 8) -> None:
        if model.config.query_aware:
            raise ValueError("query_aware: expected False for training on several questions a context, got True")
        if model.config.split_noise:
            raise ValueError(f"split_noise: expected 0 for this training, got {model.config.split_noise}")
        self.model, self.prompt, self.passages = model, prompt, passages

    def __call__(self, batch: Batch) -> Sums:
        """The sums of a batch, with gradients."""
        model, device = self.model, self.model.device
        lengths = [len(example.context) for example in batch.examples]
        ids, used = _padded([example.context.tolist() for example in batch.examples])
        ragged = len(set(lengths)) > 1
        memory = model.compress(upload(ids, device), upload(used, device) if ragged else None, training=True)
        places = [slot_places(length, model.config) for length in lengths]
        scores = None
        pick = found = torch.zeros((), device=device)
        if model.pick is not None:
            scores = pick_scores(model, memory, places, batch)
            pick, found = pick_loss(scores, batch.examples, model.config.segment_size, self.passages)
        placed = placed_memory(model, memory, places, batch)
        answer = self._answers(batch.examples, placed, scores)
        text = self._text(batch.examples, placed)
        return Sums(answer, pick, text, found.detach())

    def windows(self, examples: list[Example], scores: Tensor | None) -> list[tuple[list[int], list[int]]]:
        """Tokens and labels of what is read for each example: passages, questions and answers.

        The passages are the best segments of the context for the window's first question; those that its answers need
        take the last places if they are not among them.
        """
        size, margin = self.model.config.segment_size, self.model.config.segment_margin
        offsets = segment_offsets(examples, size)
        # one transfer in place of several for each example
        held = None if scores is None else scores.detach().float().cpu()
        rows, row = [], 0
        for number, example in enumerate(examples):
            ids = list(self.prompt.begin)
            if held is not None:
                own = held[row + example.turns[0], offsets[number] : offsets[number + 1]]
                needed = {
                    s
                    for i in example.turns
                    for s in needed_segments(example.questions[i].places, size, margin)
                    if s < len(own)
                }
                boosted = own.clone()
                boosted[sorted(needed)] -= _LEFT_OUT
                picked = boosted.topk(min(self.passages, len(own))).indices.sort().values
                ranks = own[picked].argsort(descending=True, stable=True).argsort().tolist()
                for segment, rank in zip(picked.tolist(), ranks, strict=True):
                    start, end = passage_span(segment, len(example.context), size, margin)
                    ids += [*self.prompt.passages[rank], *example.context[start:end].tolist()]
            labels = [IGNORED] * len(ids)
            for i in example.turns:
                question = example.questions[i]
                tokens, wanted = self.prompt.turn(question.question, question.answer, first=i == example.turns[0])
                ids, labels = ids + tokens, labels + wanted
            rows.append((ids, labels))
            row += len(example.questions)
        return rows

    def _answers(self, examples: list[Example], placed: ContextMemory, scores: Tensor | None) -> Tensor:
        rows = self.windows(examples, scores)
        ids, _ = _padded([row for row, _ in rows])
        labels, own = _padded([row for _, row in rows])
        labels = torch.where(own, labels, IGNORED)
        return _next_token_loss(self.model, _hidden(self.model, ids, placed), labels)

    def _text(self, examples: list[Example], placed: ContextMemory) -> Tensor:
        running = [example.running.tolist() for example in examples]
        if not any(len(row) > 1 for row in running):
            return torch.zeros((), device=self.model.device)
        ids, own = _padded(running)
        return _next_token_loss(self.model, _hidden(self.model, ids, placed), torch.where(own, ids, IGNORED))


def segment_offsets(examples: list[Example], size: int) -> list[int]:
    """First segment of each context among those of the whole batch, and the end."""
    offsets = [0]
    for example in examples:
        offsets.append(offsets[-1] + -(-len(example.context) // size))
    return offsets


def placed_memory(model: Any, memory: ContextMemory, places: list[SlotPlaces], batch: Batch) -> ContextMemory:
    """The memory with its chunks at the batch's positions, read by the rows whose gate is open."""
    size, device = model.config.chunk_size, memory.device
    moved = torch.cat(
        [
            torch.from_numpy(index)[place.token // size] - place.token // size
            for place, index in zip(places, batch.chunk_index, strict=True)
        ]
    )
    layers = model.lower_model.layers
    tables = model._rope_tables(int(moved.max()) + 1, device)
    moved = upload(moved, device)
    keys = [_rotated(key, tables.of(layer), moved) for key, layer in zip(memory.keys, layers, strict=True)]
    documents = memory.num_documents
    return dataclasses.replace(
        memory,
        keys=keys,
        # one more document, without any slot
        cu_slots=[*memory.cu_slots, memory.cu_slots[-1]],
        num_chunks=[batch.end] * documents + [0],
        num_tokens=[*memory.num_tokens, 0],
        memory_index=[i if gate else documents for i, gate in enumerate(batch.gates)],
    )


def pick_scores(model: Any, memory: ContextMemory, places: list[SlotPlaces], batch: Batch) -> Tensor:
    """Scores ``[Q, S]`` of all segments of the batch for all questions of the batch, float32."""
    config, pick, device = model.config, model.pick, memory.device
    size, lower = config.segment_size, model.lower_model
    offsets = segment_offsets(batch.examples, size)
    segment = torch.cat([p.token // size + offset for p, offset in zip(places, offsets, strict=False)])
    position = torch.cat([p.position for p in places])
    tables = model._rope_tables(int(position.max()) + 1, device)
    segment, position = upload(segment, device), upload(position, device)
    keys = [unrotated(memory.keys[layer], tables.of(lower.layers[layer]), position) for layer in pick.layers]
    asked = [question.question for example in batch.examples for question in example.questions]
    ids, used = (upload(x, device) for x in _padded(asked))
    inputs = model._layer_inputs(ids)
    evidence = _evidence(model, batch, ids, used)
    rows = []
    for row, question in enumerate(asked):
        length = len(question)
        words = evidence[:, :, row * (ids.shape[1] + 1) :][:, :, :length]
        rows.append(pick([x[row, :length] for x in inputs], lower.layers, [keys], segment, offsets[-1], words))
    return torch.stack(rows)


@torch.no_grad()
def _evidence(model: Any, batch: Batch, ids: Tensor, used: Tensor) -> Tensor:
    """Evidence ``[runs, S, Q * (L + 1)]`` of the words that questions and segments share, rarities over the batch."""
    classes, runs = model.pick.token_class, model.pick.word_runs
    size = model.config.segment_size
    indexes = [
        WordIndex.of(classes[upload(torch.from_numpy(example.context), ids.device)].long(), size, runs)
        for example in batch.examples
    ]
    # a class of 0 between questions keeps their words apart
    asked = F.pad(torch.where(used, classes[ids].long(), 0), (0, 1)).flatten()
    return joint_evidence(indexes, asked)


def pick_loss(scores: Tensor, examples: list[Example], size: int, best: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the segments that hold an answer, which share 1, summed over the questions with a known place.

    A question that another context could answer too is compared with the segments of its own context only.

    Args:
        scores: ``[Q, S]``.
        examples: the batch's.
        size: tokens of a segment.
        best: segments among which one of the answer's is found.

    Returns:
        The loss, and how many questions found one.
    """
    offsets, row = segment_offsets(examples, size), 0
    # filled in on the host, then sent at once
    rows, targets = [], torch.zeros(scores.shape, dtype=scores.dtype)
    compared = torch.ones(scores.shape, dtype=torch.bool)
    for number, example in enumerate(examples):
        own = slice(offsets[number], offsets[number + 1])
        for question in example.questions:
            if question.places:
                wanted = [own.start + s for s in segments_of(question.places, size)]
                targets[row, wanted] = 1 / len(wanted)
                if not question.everywhere:
                    compared[row] = False
                    compared[row, own] = True
                rows.append(row)
            row += 1
    if not rows:
        # a graph that reaches the parameters, so that every batch gives the same gradients
        return scores.sum() * 0, scores.new_zeros(())
    compared, wanted_shares = upload(compared, scores.device), upload(targets[rows], scores.device)
    kept = scores.masked_fill(~compared, _LEFT_OUT).index_select(0, upload(torch.tensor(rows), scores.device))
    loss = -(wanted_shares * F.log_softmax(kept, -1)).sum()
    chosen = kept.topk(min(best, kept.shape[1]), 1).indices
    return loss, wanted_shares.gather(1, chosen).gt(0).any(1).sum()


def _rotated(keys: Tensor, tables: Tables, positions: Tensor) -> Tensor:
    """Keys ``[S, Hkv, D]``, already rotated, turned on by ``positions [S]``; what scales cos and sin counts once."""
    cos, sin = (table.index_select(0, positions).unsqueeze(1) for table in tables)
    scale = (cos.square() + sin.square()).sqrt()
    return rotated(keys, cos / scale, sin / scale)


def _hidden(model: Any, ids: Tensor, memory: ContextMemory) -> Tensor:
    """The decoder's last normed output ``[B, L, d]`` of texts ``[B, L]`` on the host that end with padding."""
    ids = upload(ids, model.device)
    context = model._context_of(memory, ids.shape, ids.device)
    hidden: Tensor = model.model(input_ids=ids, use_cache=False, injected_context=context).last_hidden_state
    return hidden


def _next_token_loss(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of the labels that are not ignored, each of the token before.

    Args:
        model: whose logits.
        hidden: ``[B, L, d]``.
        labels: ``[B, L]``, on the host.
    """
    # which they are is known here, without waiting for the device
    row, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    places = upload(row * labels.shape[1] + column, hidden.device)
    targets = upload(labels[:, 1:][row, column], hidden.device)
    rows = hidden.flatten(0, 1).index_select(0, places)
    step = max(1, _BLOCK // model.config.text_config.vocab_size)
    losses = [torch.zeros((), device=hidden.device)]
    for part, target in zip(rows.split(step), targets.split(step), strict=True):
        if len(rows) > step:
            losses.append(checkpoint(_cross_entropy, model, part, target, use_reentrant=False))
        else:
            losses.append(_cross_entropy(model, part, target))
    return torch.stack(losses).sum()


def _cross_entropy(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = model._logits(hidden)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of tokens with zeros at their ends ``[B, L]``, and which places are their own; on the host."""
    longest = max(1, *map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])

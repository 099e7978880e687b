"""A plain text longer than the window, cut into context and running text, and arguments that refer to its columns."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import check_mask


@dataclasses.dataclass(frozen=True)
class Split:
    """A plain text ``[B, L]`` cut row by row: the last tokens of each row are running text, the others context.

    Attributes:
        context_ids: ``[B, C]``, the first columns of the text.
        context_mask: ``[B, C]`` booleans, or ``None`` where nothing is masked; a row may have no context.
        input_ids: ``[B, W]`` running text.
        attention_mask: ``[B, W]`` in the dtype of the caller's mask, or ``None`` where nothing is masked.
        query_mask: ``[B, W]``, the tokens that may be the query's, or ``None`` for all.
        columns: ``[B, W]`` int64, the column of the text in each place of the running text; ``None`` where these are
            the last ``W`` columns in every row.
        first: the first column of the text that is running text of any row.
        length: ``L``.
    """

    context_ids: Tensor
    context_mask: Tensor | None
    input_ids: Tensor
    attention_mask: Tensor | None
    query_mask: Tensor | None
    columns: Tensor | None
    first: int
    length: int

    def take(self, values: Tensor) -> Tensor:
        """The running text's part of a tensor with one value for each column, ``[B or 1, L] -> [B or 1, W]``."""
        if self.columns is None:
            # Transformers' losses flatten targets by a view, which needs them contiguous
            return values[..., -self.input_ids.shape[1] :].contiguous()
        return values.expand(self.columns.shape[0], -1).gather(1, self.columns)

    def take_labels(self, labels: Tensor) -> Tensor:
        """The running text's labels, ``[B, L] -> [B, W]``: those of its own tokens."""
        taken = self.take(labels)
        return taken if self.attention_mask is None else taken.masked_fill(self.attention_mask == 0, -100)

    def drop_first(self, labels: Tensor) -> Tensor:
        """Labels ``[B, W]`` without that of a row's first token, which no earlier token predicts."""
        if self.attention_mask is None:
            return labels
        return labels.masked_fill(F.pad(self.attention_mask[:, :-1], (1, 0)) == 0, -100)

    def take_targets(self, labels: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
        """Arguments of the loss: the running text's labels, and keywords that match them.

        Args:
            labels: ``[B, L]``, at their own tokens.
            kwargs: keywords of the loss. ``shift_labels``, ``[B, L]``, stand at the tokens before, as some trainers
                give them beside ``labels``; ``num_items_in_batch`` counts labels of all micro-batches of a step, and
                loses the share that labels lose here by becoming context.

        Returns:
            The labels, ``[B, W]``, and the keywords.

        Raises:
            ValueError: no label is left, and the mean over the labels would be that of none.
        """
        own, kwargs = None if labels is None else self.take_labels(labels), dict(kwargs)
        shift_labels = kwargs.get("shift_labels")
        own_shifted = None if shift_labels is None else self.take_labels(shift_labels)
        if own_shifted is not None:
            kwargs["shift_labels"] = own_shifted
        if labels is None or own is None:
            return own, kwargs
        if shift_labels is not None and own_shifted is not None:
            given, used = shift_labels, own_shifted
        else:
            given, used = labels[:, 1:], self.drop_first(own)[:, 1:]
        before, after = (given != -100).sum(), (used != -100).sum()
        count = kwargs.get("num_items_in_batch")
        if count is not None:
            total = torch.as_tensor(count, device=labels.device)
            # nothing lost leaves the count as it is, to the last bit
            is_whole = (after == 0) | (after == before)
            kwargs["num_items_in_batch"] = torch.where(is_whole, total, total * after / before.clamp(min=1))
        elif bool((after == 0) & (before > 0)):
            raise ValueError(
                "labels: expected at least one among the last config.window tokens of a row, got labels of tokens that "
                "have become context; give the text in front of them as context_ids"
            )
        return own, kwargs

    def kept_columns(self, logits_to_keep: int | Tensor) -> slice | Tensor:
        """Columns of the text that logits are wanted of, less ``first``.

        Raises:
            ValueError: no positions, or one that no row's running text reaches.
        """
        if isinstance(logits_to_keep, int):
            if logits_to_keep < 0:
                raise ValueError(f"logits_to_keep: expected at least 0, got {logits_to_keep}")
            return slice(max(self.length - logits_to_keep - self.first, 0) if logits_to_keep else 0, None)
        kept = self._positions(logits_to_keep)
        columns = torch.where(kept < 0, kept + self.length, kept) - self.first
        outside = (columns < 0) | (columns >= self.length - self.first)
        if bool(outside.any()):
            raise ValueError(
                f"logits_to_keep: expected positions {self.first} to {self.length - 1} (the text in front of them has "
                f"become context, which has no logits), got {int(kept[outside][0])}"
            )
        return columns

    def _positions(self, logits_to_keep: Tensor) -> Tensor:
        """Positions ``[K]`` in the text, of themselves or of a mask ``[L]`` of booleans."""
        got = f"dtype {logits_to_keep.dtype} and shape {tuple(logits_to_keep.shape)}"
        if logits_to_keep.dtype == torch.bool:
            if logits_to_keep.shape != (self.length,):
                raise ValueError(f"logits_to_keep: expected a mask of shape ({self.length},), got {got}")
            return logits_to_keep.nonzero()[:, 0]
        if logits_to_keep.dtype not in (torch.int64, torch.int32) or logits_to_keep.dim() != 1:
            raise ValueError(f"logits_to_keep: expected integer positions of one dimension, got {got}")
        return logits_to_keep

    def spread(self, values: Tensor, columns: slice | Tensor) -> Tensor:
        """Move values computed for each place of the running text back to the text's columns.

        Args:
            values: ``[B, W, n]``.
            columns: of :meth:`kept_columns`.

        Returns:
            ``[B, K, n]``; 0 for padding, of rows whose places are not the last columns.
        """
        if self.columns is None:
            return values[:, columns]
        batch, width = self.columns.shape
        span = self.length - self.first
        # one column more for the places that hold nothing, one place more for the columns that have none
        place = torch.full((batch, span + 1), width, dtype=torch.int64, device=values.device)
        target = self.columns - self.first
        if self.attention_mask is not None:
            target = target.masked_fill(self.attention_mask == 0, span)
        place.scatter_(1, target, torch.arange(width, device=values.device).expand(batch, -1))
        place = place[:, :span][:, columns]
        padded = torch.cat((values, values.new_zeros(batch, 1, values.shape[2])), 1)
        return padded.gather(1, place[..., None].expand(-1, -1, values.shape[2]))

    def hide_context(self, logits: Tensor, columns: slice | Tensor) -> Tensor:
        """Logits ``[B, K, V]`` with NaN where a row's column is context, so that they are not taken for predictions."""
        if self.context_mask is None or self.context_mask.shape[1] <= self.first:
            return logits
        context = F.pad(self.context_mask, (0, self.length - self.context_mask.shape[1]))[:, self.first :]
        return logits.masked_fill(context[:, columns, None], float("nan"))


def split_rows(window: int, input_ids: Tensor, attention_mask: Tensor | None) -> Split | None:
    """Cut a plain text ``[B, L]``: of each row the last ``window`` of its own tokens are running text.

    A row's own tokens are those that the mask does not hide, wherever padding stands; without a mask all of them. A
    row of at most ``window`` tokens has no context. The running text is padded on the left: its last column holds each
    row's last token.

    Returns:
        The two parts; ``None`` if no row has more than ``window`` tokens.

    Raises:
        ValueError: the mask has another shape or device than the text.
    """
    length = input_ids.shape[1]
    if length <= window:
        return None
    cut = length - window
    own = check_mask("attention_mask", attention_mask, "input_ids", input_ids)
    if attention_mask is None or own is None:
        return Split(input_ids[:, :cut], None, input_ids[:, cut:], None, None, None, cut, length)
    running = own & (own.flip(1).cumsum(1).flip(1) <= window)
    context = own & ~running
    aligned = (running[:, 1:] >= running[:, :-1]).all()
    in_context, in_running, kind = torch.stack((context.any(0), running.any(0), aligned.expand(length))).tolist()
    if not any(in_context):
        return None
    end, first = length - in_context[::-1].index(True), in_running.index(True)
    columns = None
    text, mask = input_ids[:, cut:], attention_mask[:, cut:]
    if not kind[0]:
        # stable: what is not running text comes first, and the running text keeps its order
        columns = running.to(torch.uint8).argsort(dim=1, stable=True)[:, cut:]
        text, mask = input_ids.gather(1, columns), running.gather(1, columns).to(attention_mask.dtype)
    return Split(input_ids[:, :end], context[:, :end], text, mask, mask, columns, first, length)


def split_open_end(window: int, input_ids: Tensor) -> Split | None:
    """Cut a plain text ``[B, L]`` without a mask, whose rows may be padded on the right with zeros.

    Evaluators pad so and give no mask, and 0 may be a token too. Zeros at a row's end are therefore running text beyond
    the ``window`` tokens before them: as padding they change nothing, as tokens they are not lost.

    Returns:
        The two parts, the running text in the last columns of the text; ``None`` if no row has a token to spare.
    """
    length = input_ids.shape[1]
    if length <= window:
        return None
    place = torch.arange(length, device=input_ids.device)
    ends = torch.where(input_ids != 0, place + 1, 0).amax(1)
    # nothing but zeros is no padding
    ends = torch.where(ends == 0, length, ends)
    starts = (ends - window).clamp(min=0)
    earliest, latest = (int(bound) for bound in torch.stack(torch.aminmax(starts)).tolist())
    if latest == 0:
        return None
    if earliest == length - window:
        return split_rows(window, input_ids, None)
    own, is_padding = place >= starts[:, None], place >= ends[:, None]
    ragged = earliest < latest
    return Split(
        context_ids=input_ids[:, :latest],
        context_mask=~own[:, :latest] if ragged else None,
        input_ids=input_ids[:, earliest:],
        attention_mask=own[:, earliest:].long() if ragged else None,
        query_mask=(own & ~is_padding)[:, earliest:].long(),
        columns=None,
        first=earliest,
        length=length,
    )


def refuse_packed(names: Iterable[str], position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """Refuse several texts packed into one row: they cannot be split.

    Raises:
        ValueError: keywords of packed texts, or positions that start again inside a row.
    """
    packed = sorted({"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"} & set(names))
    if packed:
        raise ValueError(
            f"{packed[0]}: expected texts within config.window, or one text a row, got a longer row of packed texts"
        )
    if position_ids is None or position_ids.dim() != 2:
        return
    falls = position_ids[:, 1:] < position_ids[:, :-1]
    if attention_mask is not None:
        own = attention_mask.bool()
        falls = falls & own[:, 1:] & own[:, :-1]
    if bool(falls.any()):
        raise ValueError(
            "position_ids: expected rising positions in a row longer than config.window, which is split, got a row of "
            "packed texts"
        )

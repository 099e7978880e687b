"""Plain texts longer than the window: rows of a batch equal rows alone, and columns keep their meaning."""

import pytest
import torch
from torch import Tensor

from sharedllm_ext.model.split import split_open_end, split_rows

from . import builders

WINDOW = builders.TREE["window"]
LENGTHS = (60, 20, 41, 24, 25, 1)


@pytest.fixture(scope="module", params=[True, False], ids=["query", "fixed"])
def model(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    return builders.model(query_aware=request.param)


def _padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    width = max(row.numel() for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        free = width - row.numel()
        at = {"left": free, "right": 0, "both": free // 2}[side]
        ids[i, at : at + row.numel()], mask[i, at : at + row.numel()] = row, 1
    return ids, mask


def _rows() -> list[Tensor]:
    return [builders.ids(length) for length in LENGTHS]


def _assert_rows(logits: Tensor, mask: Tensor, alone: list[Tensor]) -> None:
    """Each row's own columns hold the logits of the row alone, and NaN where they are its context."""
    width, length = logits.shape[1], mask.shape[1]
    for i, want in enumerate(alone):
        columns = mask[i].nonzero().flatten() - (length - width)
        running, context = columns[-want.shape[1] :], columns[: -want.shape[1]]
        torch.testing.assert_close(logits[i, running], want[0], atol=3e-5, rtol=1e-5)
        assert logits[i, context[context >= 0]].isnan().all()


@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_rows_of_a_masked_batch_equal_rows_alone(model, side: str) -> None:
    rows = _rows()
    ids, mask = _padded(rows, side)
    alone = [model(row[None]) for row in rows]
    together = model(ids, attention_mask=mask)
    assert together.memory.num_tokens == [max(length - WINDOW, 0) for length in LENGTHS]
    _assert_rows(together.logits, mask, [output.logits for output in alone])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
@torch.no_grad()
def test_masks_of_any_dtype(model, dtype: torch.dtype) -> None:
    ids, mask = _padded(_rows(), "right")
    labels = ids.masked_fill(mask == 0, -100)
    want = model(ids, attention_mask=mask, labels=labels)
    got = model(ids, attention_mask=mask.to(dtype), labels=labels)
    torch.testing.assert_close(got.logits, want.logits, equal_nan=True)
    assert torch.equal(got.loss, want.loss)


@torch.no_grad()
def test_rows_padded_with_zeros_and_no_mask_equal_rows_alone(model) -> None:
    rows = _rows()
    ids, mask = _padded(rows, "right")
    _assert_rows(model(ids).logits, mask, [model(row[None]).logits for row in rows])


@torch.no_grad()
def test_log_likelihoods_of_an_evaluator_that_gives_no_mask(model) -> None:
    """As evaluators do it: rows padded on the right with 0, the continuation found by counting from the row's end."""
    rows = [builders.ids(length) for length in (60, 50)]
    ids, _ = _padded(rows, "right")

    def score(logits: Tensor, row: Tensor, padded: int) -> float:
        end = row.numel() + logits.shape[0] - padded
        return logits[end - 8 : end].log_softmax(-1).gather(1, (row[-8:, None] + 1) % 128).sum().item()

    together = model(ids).logits
    for i, row in enumerate(rows):
        alone = score(model(row[None]).logits[0], row, row.numel())
        assert score(together[i], row, ids.shape[1]) == pytest.approx(alone, abs=1e-4)


@torch.no_grad()
def test_zeros_that_are_tokens_are_not_lost(model) -> None:
    text = torch.cat((builders.ids(1, 50), torch.zeros(1, 3, dtype=torch.int64)), 1)
    output = model(text)
    assert output.logits.shape[1] == WINDOW + 3 and output.memory.num_tokens == [50 - WINDOW]
    zeros = torch.zeros(1, 60, dtype=torch.int64)
    assert model(zeros).logits.shape[1] == WINDOW


@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_loss_counts_every_label_of_the_running_texts(model, masked: bool) -> None:
    rows = _rows()
    ids, mask = _padded(rows, "right")
    labels = ids.masked_fill(mask == 0, -100)
    together = model(ids, attention_mask=mask if masked else None, labels=labels).loss
    counts = [min(length, WINDOW) - 1 for length in LENGTHS]
    losses = [model(row[None], labels=row[None]).loss * n for row, n in zip(rows, counts, strict=True) if n]
    assert together.item() == pytest.approx(sum(losses).item() / sum(counts), abs=1e-4)
    # a first token has nothing in front of it that predicts it
    left, left_mask = _padded(rows, "left")
    left_loss = model(left, attention_mask=left_mask, labels=left.masked_fill(left_mask == 0, -100)).loss
    torch.testing.assert_close(left_loss, together, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shifted", [False, True])
@torch.no_grad()
def test_number_of_items_counts_what_is_left(model, shifted: bool) -> None:
    rows = _rows()
    ids, mask = _padded(rows, "right")
    labels = ids.masked_fill(mask == 0, -100)
    extra = {"shift_labels": torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]} if shifted else {}
    mean = model(ids, attention_mask=mask, labels=labels).loss
    count = (labels[:, 1:] != -100).sum()
    for items in (count, int(count)):
        loss = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=items, **extra).loss
        torch.testing.assert_close(loss, mean, atol=1e-5, rtol=0)
    # two micro-batches of such a step
    half = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=2 * count, **extra).loss
    torch.testing.assert_close(2 * half, mean, atol=1e-5, rtol=0)


@torch.no_grad()
def test_shifted_labels_of_rows_of_one_length(model) -> None:
    text = builders.ids(2, 60)
    shifted = torch.nn.functional.pad(text[:, 1:], (0, 1), value=-100)
    want = model(
        text[:, -WINDOW:],
        context_ids=text[:, :-WINDOW],
        labels=text[:, -WINDOW:],
        shift_labels=shifted[:, -WINDOW:].contiguous(),
    )
    torch.testing.assert_close(model(text, labels=text, shift_labels=shifted).loss, want.loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (torch.tensor([59.0]), "integer positions of one dimension"),
        (torch.tensor([[59]]), "integer positions of one dimension"),
        (torch.ones(24, dtype=torch.bool), r"a mask of shape \(60,\)"),
    ],
    ids=["floats", "two dimensions", "short mask"],
)
def test_what_are_no_positions(model, kept: Tensor, expected: str) -> None:
    with pytest.raises(ValueError, match=f"logits_to_keep: expected {expected}, got dtype"):
        model(builders.ids(1, 60), logits_to_keep=kept)


def test_labels_of_context_alone_are_no_mean_of_none(model) -> None:
    text = builders.ids(1, 60)
    labels = text.clone()
    labels[:, 20:] = -100
    with pytest.raises(ValueError, match=r"labels: expected at least one among the last config.window tokens"):
        model(text, labels=labels)
    # a micro-batch without labels adds nothing to those of a step
    assert model(text, labels=labels, num_items_in_batch=7).loss == 0
    labels[:] = -100
    assert model(text, labels=labels).loss.isnan()  # as for any text


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_positions_are_the_callers(model, side: str) -> None:
    rows = [builders.ids(length) for length in (60, 45)]
    ids, mask = _padded(rows, side)
    every = model(ids, attention_mask=mask).logits
    first = 60 - every.shape[1]
    for keep in (torch.tensor([50, 40, 59]), torch.tensor([-1, -20]), torch.arange(60) > 44):
        got = model(ids, attention_mask=mask, logits_to_keep=keep).logits
        columns = keep.nonzero().flatten() if keep.dtype == torch.bool else keep % 60
        torch.testing.assert_close(got, every[:, columns - first], equal_nan=True)
    for count in (1, 7, 100):
        got = model(ids, attention_mask=mask, logits_to_keep=count).logits
        torch.testing.assert_close(got, every[:, -count:], equal_nan=True)
    with pytest.raises(ValueError, match=rf"logits_to_keep: expected positions {first} to 59 .*, got 5"):
        model(ids, attention_mask=mask, logits_to_keep=torch.tensor([50, 5]))


@torch.no_grad()
def test_labels_and_kept_logits_together(model) -> None:
    for text in (builders.ids(1, 20), builders.ids(1, 60)):
        whole, last = model(text, labels=text), model(text, labels=text, logits_to_keep=3)
        assert torch.equal(whole.loss, last.loss) and torch.equal(whole.logits[:, -3:], last.logits)


@torch.no_grad()
def test_positions_go_with_their_tokens(model) -> None:
    rows = [builders.ids(60), builders.ids(30)]
    ids, mask = _padded(rows, "right")
    positions = torch.arange(60)[None]
    got = model(ids, attention_mask=mask, position_ids=positions).logits
    _assert_rows(got, mask, [model(row[None]).logits for row in rows])


def test_gradients_of_a_padded_batch_are_those_of_its_rows(model) -> None:
    rows = [builders.ids(60), builders.ids(20)]
    ids, mask = _padded(rows, "right")
    model.train()
    try:
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        for row, count in zip(rows, (WINDOW - 1, 19), strict=True):
            (model(row[None], labels=row[None]).loss * count / (WINDOW + 18)).backward()
    finally:
        model.eval()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3)
            assert found[name].isfinite().all()
    model.zero_grad()


def test_labels_kept_from_a_split_text_are_asked_for(model) -> None:
    text = builders.ids(1, 60)
    with pytest.raises(ValueError, match=r"labels: expected them in training with an input_ids longer"):
        model(text, num_items_in_batch=3)
    model.train()
    try:
        with pytest.raises(ValueError, match=r"labels: expected them in training with an input_ids longer"):
            model(text)
        model(text, logits_to_keep=4).logits.sum().backward()
        model(builders.ids(1, 20)).logits.sum().backward()
    finally:
        model.eval()
        model.zero_grad()


@pytest.mark.parametrize("packed", [{"cu_seq_lens_q": torch.tensor([0, 30, 60])}, {"position_ids": None}])
def test_packed_texts_are_not_split(model, packed: dict) -> None:
    text = builders.ids(1, 60)
    if "position_ids" in packed:
        packed = {"position_ids": torch.cat((torch.arange(30), torch.arange(30)))[None]}
    with pytest.raises(ValueError, match=f"{next(iter(packed))}: expected .* packed texts"):
        model(text, **packed)


def test_split_by_hand() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5, 0, 0], [0, 6, 7, 8, 9, 10, 11], [0, 0, 0, 12, 13, 0, 0]])
    split = split_rows(3, ids, (ids != 0).long())
    assert split is not None and split.first == 2
    assert (split.input_ids * split.attention_mask).tolist() == [[3, 4, 5], [9, 10, 11], [0, 12, 13]]
    assert split.context_mask is not None
    assert (split.context_ids * split.context_mask).tolist() == [[1, 2, 0, 0], [0, 6, 7, 8], [0, 0, 0, 0]]
    assert split_rows(7, ids, None) is None and split_rows(6, ids, (ids != 0).long()) is None
    plain = split_rows(3, ids, None)
    assert plain is not None and plain.attention_mask is None and plain.input_ids.tolist() == ids[:, -3:].tolist()
    open_end = split_open_end(3, ids)
    assert open_end is not None and open_end.context_mask is not None and open_end.query_mask is not None
    assert open_end.first == 2
    assert (open_end.context_ids * open_end.context_mask).tolist() == [[1, 2, 0, 0], [0, 6, 7, 8], [0, 0, 0, 0]]
    assert (open_end.input_ids * open_end.attention_mask)[1].tolist() == [0, 0, 9, 10, 11]
    assert open_end.query_mask[0].tolist() == [1, 1, 1, 0, 0]

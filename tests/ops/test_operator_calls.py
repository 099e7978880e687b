"""Operators called through ``torch.ops.sharedllm`` with numbers at the ends of their types: values, or a clear line."""

import math
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sharedllm_ext import ops, reference

CALL = torch.ops.sharedllm
LARGEST = 2**63 - 1


def spans(*pairs: tuple[int, int]) -> Tensor:
    """``[n, 2]`` int64."""
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def nodes_of(count: int) -> Tensor:
    """One chunk of ``count`` nodes of a token each, the last node first."""
    start = torch.arange(count).flip(0)
    return torch.stack((start, torch.ones_like(start)), 1).unsqueeze(0)


def attention(**changed: object) -> tuple[object, ...]:
    """Arguments of injected_attention."""
    given = {
        "q": torch.ones(1, 2, 8),
        "k": torch.ones(3, 1, 8),
        "v": torch.ones(3, 1, 8),
        "cu_q": torch.tensor([0, 1]),
        "slot_range": spans((0, 3)),
        "q_position": torch.tensor([0]),
        "cos": torch.ones(4, 4),
        "sin": torch.zeros(4, 4),
        "scale": 1.0,
    }
    return tuple({**given, **changed}.values())


def node_arguments(**changed: object) -> tuple[object, ...]:
    """Arguments of node_vectors."""
    given = {
        "q": torch.ones(1, 2, 8),
        "k": torch.ones(3, 1, 8),
        "v": torch.ones(3, 1, 8),
        "spans": spans((0, 3)),
        "cos": torch.ones(4, 4),
        "sin": torch.zeros(4, 4),
        "scale": 1.0,
    }
    return tuple({**given, **changed}.values())


def backward_arguments(**changed: object) -> tuple[object, ...]:
    """Arguments of node_vectors_backward."""
    grad_out = changed.pop("grad_out", torch.ones(1, 2, 8))
    return (grad_out, *node_arguments(**changed))


def test_spans_of_the_largest_numbers() -> None:
    given = spans((0, LARGEST), (LARGEST, 0), (LARGEST - 7, 7), (2**62, 2**62 - 1))
    children = CALL.context_tree_split(given, None)
    assert children.tolist() == reference.context_tree_split(given).tolist()
    for (start, length), ((left, first), (right, second)) in zip(given.tolist(), children.tolist(), strict=True):
        assert (left, right, first + second) == (start, start + first, length)
        assert first == length // 2
    noisy = CALL.context_tree_split(given, torch.tensor([2.0**53, -5.0, 1e9, -(2.0**53)], dtype=torch.float64))
    assert (noisy[..., 1].sum(1) == given[:, 1]).all() and (noisy[:, :, 1] >= 0).all()


def test_nodes_beyond_half_of_the_largest_number_keep_their_order() -> None:
    # empty nodes may stand anywhere: twice their start is no int64
    nodes = torch.tensor([[[LARGEST, 0], [0, 2], [2**62, 0], [2, 1]]])
    positions, cu_nodes, *_ = CALL.context_tree_layout(nodes, torch.tensor([0]), 4, 3, 3)
    assert positions.tolist() == [0, 1, 0] and cu_nodes.tolist() == [0, 2, 3, 3, 3]


def test_many_nodes_of_a_chunk_take_no_quadratic_time() -> None:
    count = 60_000
    begin = time.process_time()
    positions, cu_nodes, keep_index, *_ = CALL.context_tree_layout(nodes_of(count), torch.tensor([0]), 1, count, count)
    # sorting by insertion took 8.4 s
    assert time.process_time() - begin < 2
    assert not positions.any() and torch.equal(cu_nodes, torch.arange(count + 1))
    assert torch.equal(keep_index, torch.arange(count).flip(0))


def test_any_byte_but_zero_is_true() -> None:
    valid = torch.tensor([0, 2, 255, 1], dtype=torch.uint8).view(torch.bool)
    indices, _ = CALL.topk_nodes(
        torch.ones(1, 3), torch.ones(4, 3), torch.tensor([0, 4]), torch.tensor([0]), 4, valid, 1e-6
    )
    assert indices.tolist() == [[1, 2, 3, -1]]


def test_memory_at_an_odd_address() -> None:
    memory = bytearray(1) + bytearray(torch.ones(24).numpy().tobytes())
    odd = torch.frombuffer(memory, dtype=torch.float32, offset=1).view(3, 1, 8)
    out, _ = CALL.injected_attention(*attention(k=odd, v=odd * 1))
    assert torch.equal(out, torch.ones(1, 2, 8))


CASES: list[tuple[str, Callable[[], object], str]] = [
    (
        "spans that end beyond int64",
        lambda: CALL.context_tree_split(spans((1, LARGEST)), None),
        r"spans\[0\]: expected start \+ length of at most 9223372036854775807, got 1 \+ 9223372036854775807",
    ),
    (
        "complex offsets",
        lambda: CALL.context_tree_split(spans((0, 4)), torch.ones(1, dtype=torch.complex64)),
        "offset: expected dtype Float, BFloat16, Half or Double, got ComplexFloat",
    ),
    (
        "whole offsets",
        lambda: CALL.context_tree_split(spans((0, 4)), torch.ones(1, dtype=torch.int64)),
        "offset: expected dtype Float, BFloat16, Half or Double, got Long",
    ),
    (
        "offset nan",
        lambda: CALL.context_tree_split(spans((0, 4)), torch.tensor([math.nan])),
        r"offset\[0\]: expected a finite number of tokens, got nan",
    ),
    (
        "chunk index whose positions overflow",
        lambda: CALL.context_tree_layout(nodes_of(2), torch.tensor([LARGEST - 1]), 1, 2, 2),
        r"chunk_index\[0\]: expected 0 <= value < 9223372036854775805, got 9223372036854775806",
    ),
    (
        "huge num_tokens",
        lambda: CALL.context_tree_layout(nodes_of(2), torch.tensor([0]), 1, 2**45, 2),
        "nodes: expected to cover num_tokens = 35184372088832, got 2",
    ),
    (
        "nodes of a huge num_tokens",
        lambda: CALL.context_tree_layout(torch.tensor([[[0, 2**62]]]), torch.tensor([0]), 1, 2**62, 2),
        "out of memory: expected room for a tensor of shape .4611686018427387904.",
    ),
    (
        "huge num_tokens of a gradient",
        lambda: CALL.chunk_compression_backward(
            None,
            None,
            torch.ones(1, 0, 8),
            torch.ones(1, 0, 8),
            torch.ones(2, 4),
            torch.ones(2, 4),
            None,
            None,
            torch.tensor([0]),
            torch.tensor([0]),
            2**62,
        ),
        "out of memory: expected room for a tensor of shape .4611686018427387904.",
    ),
    ("scale nan", lambda: CALL.injected_attention(*attention(scale=math.nan)), "scale: expected a finite .*, got nan"),
    ("scale inf", lambda: CALL.node_vectors(*node_arguments(scale=math.inf)), "scale: expected a finite .*, got inf"),
    ("scale 1e300", lambda: CALL.node_vectors(*node_arguments(scale=1e300)), "scale: expected a finite .*, got 1e"),
    (
        "scale of the public function",
        lambda: ops.injected_attention(*attention()[:-1], scale=-math.inf),
        "scale: expected a finite .*, got -inf",
    ),
    (
        "eps nan",
        lambda: CALL.topk_nodes(
            torch.ones(1, 3), torch.ones(2, 3), torch.tensor([0, 2]), torch.tensor([0]), 1, None, math.nan
        ),
        "eps: expected a finite number above 0 .*, got nan",
    ),
    (
        "eps that float32 rounds to 0",
        lambda: CALL.topk_nodes(
            torch.ones(1, 3), torch.ones(2, 3), torch.tensor([0, 2]), torch.tensor([0]), 1, None, 1e-300
        ),
        "eps: expected a finite number above 0 .*, got 1e-300",
    ),
    (
        "eps of a norm",
        lambda: CALL.rms_norm(torch.ones(2, 3), torch.ones(3), -1.0),
        "eps: expected a finite number of at least 0, got -1",
    ),
    (
        "tables wider than any head",
        lambda: CALL.node_vectors(*node_arguments(cos=torch.ones(0, 2**62), sin=torch.ones(0, 2**62))),
        "cos: expected at most D/2 = 4 columns, got 4611686018427387904",
    ),
    (
        "gradient of another shape",
        lambda: CALL.node_vectors_backward(*backward_arguments(grad_out=torch.ones(1, 1, 8))),
        r"grad_out: expected shape \[1, 2, 8\], got \[1, 1, 8\]",
    ),
    (
        "gradient of spans outside",
        lambda: CALL.node_vectors_backward(*backward_arguments(spans=spans((1, LARGEST)))),
        r"spans\[0\]: expected start >= 0, 0 <= length <= 4 .*, got \(1, 9223372036854775807\)",
    ),
    (
        "gradient of keys of another dtype",
        lambda: CALL.node_vectors_backward(*backward_arguments(k=torch.ones(3, 1, 8).double())),
        "k: expected dtype torch.float32, got torch.float64",
    ),
    (
        "plain operator, spans outside",
        lambda: CALL.node_vectors_plain(*node_arguments(spans=spans((-1, 2)))),
        r"spans\[0\]: expected start >= 0",
    ),
    ("codes", lambda: CALL.quantize_memory(torch.ones(2, 2)), r"x: expected shape \[S, Hkv, D\], got \[2, 2\]"),
    (
        "rows of integers",
        lambda: CALL.quantize_rows_fp8(torch.ones(2, 2, dtype=torch.int64)),
        "x: expected dtype .*, got torch.int64",
    ),
    (
        "product of two widths",
        lambda: CALL.silu_product(torch.ones(2, 3), torch.ones(2, 1)),
        r"up: expected shape \[2, 3\], got \[2, 1\]",
    ),
    (
        "a third matrix without a second",
        lambda: CALL.decode_linear(
            torch.ones(1, 2), torch.ones(1, 2), None, torch.ones(1, 2), *[None] * 4, 0.0, None, False, False, None, 0
        ),
        "weight3: expected none without weight2, got one",
    ),
    (
        "a bias without its matrix",
        lambda: CALL.decode_linear(
            torch.ones(1, 2),
            torch.ones(1, 2),
            None,
            None,
            None,
            torch.ones(1),
            None,
            None,
            0.0,
            None,
            False,
            False,
            None,
            0,
        ),
        "bias2: expected none without weight2, got one",
    ),
]


@pytest.mark.parametrize(("call", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_clear_lines(call: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_window_of_a_decoding_step() -> None:
    cache = torch.zeros(1, 2, 1, 4)
    at = torch.tensor([0])
    with pytest.raises(ValueError, match="window: expected at least 0 tokens, got -1"):
        CALL.decode_append(
            torch.ones(1, 12), cache, cache.clone(), at, at, torch.ones(2, 2), torch.ones(2, 2), None, None, 0.0, -1,
            False, None, 0,
        )  # fmt: skip

"""Injected attention for head sizes without a tensor core kernel of their own: the next larger one's, over less."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_injected_attention import Spec, attend, backward_op, build, compare
from torch import Tensor

from sharedllm_ext import reference
from sharedllm_ext._library import cuda_kernels
from sharedllm_ext.ops.injected_attention import TENSOR_CORE_HEAD_SIZES, _plain, injected_attention_path
from tests.support import needs_cuda
from tests.tolerance import check_error, oracle

# 100 is no multiple of 8, 40 and 112 none of the 16 columns of a matmul
SIZES = (8, 32, 40, 48, 80, 100, 112, 160, 192)
HALVES = (torch.bfloat16, torch.float16)
HEADS = ((2, 2), (8, 2), (7, 1), (8, 1))


def rotary_of(size: int, turn: int) -> int:
    """All columns rotated, some, or none."""
    return (size, size // 4 * 2, 0)[turn % 3]


def batch(size: int, turn: int, few: bool) -> tuple[Spec, Tensor]:
    """A ragged batch: rows that share slots, one without slots, one without queries; and the slots that rows own."""
    lengths = [1, 3, 0, 2, 4, 1] if few else [130, 1, 0, 65, 200, 17]
    ranges = [(3, 300), (5, 70), (3, 90), (299, 299), (340, 711), (710, 711)]
    owned = torch.zeros(715, dtype=torch.bool)
    for begin, end in ranges:
        owned[begin:end] = True
    return (lengths, ranges, 715, *HEADS[turn % 4], size, rotary_of(size, turn)), owned


def poison_outside(arguments: list[Any], owned: Tensor) -> None:
    """NaN and infinity in every slot that no row reads."""
    outside = (~owned).nonzero().flatten().to(arguments[0].device)
    for x, values in ((arguments[1], (torch.nan, torch.inf)), (arguments[2], (-torch.inf, torch.nan))):
        x[outside[::2]], x[outside[1::2]] = values


def amid_nan(x: Tensor) -> Tensor:
    """The same tensor as a part of a larger one of NaN, whose heads end in 8 more elements."""
    wide = x.new_full((x.shape[0] + 2, x.shape[1], x.shape[2] + 8), torch.nan)
    part = wide[1:-1, :, : x.shape[2]]
    part.copy_(x)
    return part


@pytest.mark.parametrize("few", [False, True], ids=["many queries", "few queries"])
@pytest.mark.parametrize("size", SIZES)
def test_error_against_float64(size: int, few: bool, device: torch.device, generator: torch.Generator) -> None:
    turn = SIZES.index(size) + few
    spec, owned = batch(size, turn, few)
    for dtype in HALVES if device.type == "cuda" else (torch.float32, torch.bfloat16):
        arguments = build(spec, dtype, device, generator)
        poison_outside(arguments, owned)
        compare(arguments, generator)


@pytest.mark.parametrize("few", [False, True], ids=["many queries", "few queries"])
@pytest.mark.parametrize("size", SIZES)
def test_heads_do_not_see_what_follows_them(
    size: int, few: bool, device: torch.device, generator: torch.Generator
) -> None:
    spec, _ = batch(size, 1, few)
    q, k, v, *rest = build(spec, torch.bfloat16, device, generator)
    out, lse = attend(q, k, v, *rest)
    grad = torch.randn(out.shape, generator=generator).to(out)
    grads = backward_op(grad, lse, q, k, v, out, lse, *rest, True)
    parts = [amid_nan(x) for x in (q, k, v)]
    again, again_lse = attend(*parts, *rest)
    assert torch.equal(again, out) and torch.equal(again_lse, lse)
    for name, got, want in zip(
        "qkv", backward_op(amid_nan(grad), lse, *parts, out, lse, *rest, True), grads, strict=True
    ):
        # atomic sums on CUDA arrive in any order
        torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-7 * want.abs().max().item(), msg=name)

    # the second key/value head is NaN: its neighbours before and after it in memory are not
    k[:, 1], v[:, 1] = torch.nan, torch.nan
    own = q.shape[1] // k.shape[1]
    again, again_lse = attend(q, k, v, *rest)
    assert torch.equal(again[:, :own], out[:, :own]) and torch.equal(again_lse[:, :own], lse[:, :own])


@pytest.mark.parametrize("size", [40, 100, 112])
def test_scale_and_rotation_are_those_of_the_head(size: int, device: torch.device, generator: torch.Generator) -> None:
    spec, _ = batch(size, 0, True)
    arguments = build(spec, torch.bfloat16, device, generator)
    assert arguments[-1] == size**-0.5 and arguments[6].shape[1] == size // 2
    out, lse = attend(*arguments)
    for changed in (
        [*arguments[:-1], max(x for x in TENSOR_CORE_HEAD_SIZES if x <= 128) ** -0.5],
        [*arguments[:6], *(x[:, : size // 2 - 1] for x in arguments[6:8]), arguments[8]],
    ):
        other, other_lse = attend(*changed)
        assert not torch.allclose(other_lse, lse, rtol=1e-4, atol=1e-4) and not torch.equal(other, out)


# --- on CUDA: every path ----------------------------------------------------------------------------------------------

needs_paths = pytest.mark.skipif(
    "injected_attention" not in cuda_kernels(), reason="the CUDA library has no kernel of this operator"
)


@needs_cuda
@needs_paths
@pytest.mark.parametrize("path", ["sm90", "portable", "decode"])
@pytest.mark.parametrize("size", SIZES)
def test_paths(path: str, size: int, generator: torch.Generator) -> None:
    turn = SIZES.index(size) + len(path)
    spec, owned = batch(size, turn, path == "decode")
    arguments = build(spec, HALVES[turn % 2], "cuda", generator)
    poison_outside(arguments, owned)
    with injected_attention_path(path):
        compare(arguments, generator)


@needs_cuda
@pytest.mark.parametrize("path", ["auto", "portable"])
@pytest.mark.parametrize(
    ("queries", "slots", "heads"),
    [
        (1, 9000, (32, 8)),  # decoding, merged as parts come
        (4, 4097, (8, 1)),
        (257, 4100, (4, 2)),  # the last wave of tiles is cut
        (2107, 1300, (32, 8)),  # four waves of tiles, which are chained where the kernel is for 128 columns
        (2107, 200, (32, 8)),  # and so few slots that heads of the kernel's own size would be moved by TMA
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [48, 80, 100, 112, 192])
def test_one_row(
    size: int, queries: int, slots: int, heads: tuple[int, int], path: str, generator: torch.Generator
) -> None:
    if path != "auto" and "injected_attention" not in cuda_kernels():
        pytest.skip("the CUDA library has no kernel of this operator: there is no path to choose")
    q, k, v, *rest = build(([queries], [(1, slots)], slots + 1, *heads, size, size), torch.bfloat16, "cuda", generator)
    for x in (k, v):
        x[0], x[slots:] = torch.nan, torch.inf
    with nullcontext() if path == "auto" else injected_attention_path(path):
        out, lse = attend(q, k, v, *rest)
    # some queries are enough, and float64 on the GPU is slow
    picked = torch.arange(queries, device="cuda")[:: max(queries // 48, 1)]
    small = [q[picked], k, v, torch.tensor([0, len(picked)], device="cuda"), *rest[1:]]
    exact_out, exact_lse = reference.injected_attention(*oracle(small))
    same_out, same_lse = _plain(*small)
    check_error("out", out[picked], same_out, exact_out)
    check_error("lse", lse[picked], same_lse, exact_lse)
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())

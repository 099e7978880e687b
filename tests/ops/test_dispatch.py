"""The short way into a kernel: who takes it, that it changes nothing but the time, and that it loses no check."""

import importlib
from typing import Any

import pytest
import torch
from test_injected_attention import NAMES, attend, check_same_gradient, forward_op, problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sharedllm_ext._library import cuda_kernels
from sharedllm_ext.ops import injected_attention
from sharedllm_ext.ops._dispatch import goes_directly, kernel_inputs, needs_gradient

# ops.injected_attention is the function
module = importlib.import_module("sharedllm_ext.ops.injected_attention")
INPUTS = kernel_inputs("injected_attention")


class Subclass(Tensor):
    """A tensor that may run anything."""


class Taken(Exception):
    """Raised by what replaces the long way."""


@pytest.fixture
def no_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function without the long way."""

    def taken(*arguments: Any) -> Any:
        raise Taken

    monkeypatch.setattr(module, "_checked", taken)


@pytest.fixture
def arguments(device: torch.device, generator: torch.Generator) -> list[Any]:
    """Arguments that the kernel takes."""
    if device.type == "cuda" and "injected_attention" not in cuda_kernels():
        pytest.skip("the CUDA library has no kernel of this operator: every call takes the long way")
    return problem("ragged batch", torch.float32, device, generator)


@pytest.mark.usefixtures("no_long_way")
@pytest.mark.parametrize("gradients", ["no_grad", "inference_mode", "none needed", "needed"])
def test_the_short_way_gives_the_same(arguments: list[Any], gradients: str) -> None:
    q, *rest = arguments
    if gradients == "needed":
        q.requires_grad_()
    grad = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(gradients, torch.enable_grad)
    with grad():
        got, want = attend(q, *rest), forward_op(q, *rest)
    assert all(map(torch.equal, got, want))
    assert [x.requires_grad for x in got] == [x.requires_grad for x in want] == [gradients == "needed"] * 2
    if gradients == "needed":
        pair = [torch.autograd.grad(out.square().sum() + lse.sum(), q)[0] for out, lse in (got, want)]
        check_same_gradient("grad_q", *pair)


@pytest.mark.usefixtures("no_long_way")
@pytest.mark.parametrize("wanted", ["k", "v"])
def test_gradients_of_the_memory_on_the_short_way(arguments: list[Any], wanted: str) -> None:
    leaf = arguments[NAMES.index(wanted)].requires_grad_()
    grads = []
    for function in (attend, forward_op):
        out, lse = function(*arguments)
        grads.append(torch.autograd.grad(out.square().sum() + lse[lse.isfinite()].sum(), leaf)[0])
    check_same_gradient(wanted, *grads)


@pytest.mark.usefixtures("no_long_way")
def test_autocast_leaves_the_short_way_alone(arguments: list[Any]) -> None:
    want = attend(*arguments)
    with torch.autocast(arguments[0].device.type, torch.bfloat16):
        assert all(map(torch.equal, attend(*arguments), want))


@pytest.mark.usefixtures("no_long_way")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes_without_a_kernel_take_the_long_way(dtype: torch.dtype, generator: torch.Generator) -> None:
    with pytest.raises(Taken):
        attend(*problem("one element", dtype, "cpu", generator))


@pytest.mark.usefixtures("no_long_way")
@pytest.mark.parametrize("index", range(8), ids=NAMES[:8])
@pytest.mark.parametrize("kind", ["meta", "subclass", "fake", "list"])
def test_tensors_of_another_kind_take_the_long_way(arguments: list[Any], kind: str, index: int) -> None:
    x = arguments[index]
    arguments[index] = {
        "meta": lambda: x.to("meta"),
        "subclass": lambda: x.as_subclass(Subclass),
        "fake": lambda: FakeTensorMode().from_tensor(x),
        "list": x.tolist,
    }[kind]()
    with pytest.raises(Taken):
        attend(*arguments)


@pytest.mark.parametrize("name", NAMES[:8])
def test_a_meta_tensor_among_others_is_refused(arguments: list[Any], name: str) -> None:
    # the dispatcher would take the operator that computes nothing, and the result would be fresh memory
    given = dict(zip(NAMES, arguments, strict=True))
    given[name] = given[name].to("meta")
    with pytest.raises(ValueError, match=f"{'k' if name == 'q' else name}: expected device .*, got "):
        injected_attention(**given)


def test_transformed_and_traced_calls_take_the_long_way(arguments: list[Any]) -> None:
    tensors = arguments[:8]
    seen = []
    assert goes_directly(INPUTS, *tensors)
    torch.func.vmap(lambda x: seen.append(goes_directly(INPUTS, *tensors)) or x)(torch.ones(2))

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x: Tensor) -> Tensor:
        return x + goes_directly(INPUTS, *tensors)

    assert seen == [False] and compiled(torch.zeros(())).item() == 0


def test_who_needs_a_gradient() -> None:
    plain, leaf = torch.ones(1), torch.ones(1, requires_grad=True)
    assert needs_gradient(plain, leaf) and not needs_gradient(plain, plain)
    with torch.no_grad():
        assert not needs_gradient(leaf)


def test_a_mistake_is_told_once(arguments: list[Any]) -> None:
    # by the checks in Python, not as an error that came while another was handled
    arguments[2] = arguments[2][1:]
    with pytest.raises(ValueError, match=r"v: expected shape \[301, 2, 64\], got \[300, 2, 64\]") as caught:
        attend(*arguments)
    assert caught.value.__context__ is None and caught.value.__cause__ is None


def test_scale_goes_by_its_name(arguments: list[Any]) -> None:
    with pytest.raises(TypeError, match="takes 8 positional arguments but 9 were given"):
        injected_attention(*arguments)

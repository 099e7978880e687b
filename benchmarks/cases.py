"""Every case of the GPU benchmarks: its problem, its floor, its peers and the check that its result is right.

``run_gpu.py`` and ``bench_gpu.py`` both take :data:`CASES`. Nothing here touches a GPU before a case is built.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import eager
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sharedllm_ext import ops, reference
from sharedllm_ext._library import cuda_kernels
from sharedllm_ext.ops.chunk_compression import chunk_compression, chunk_compression_backward
from sharedllm_ext.ops.injected_attention import _plain as plain_attention
from sharedllm_ext.ops.injected_attention import _plain_backward as plain_attention_backward
from sharedllm_ext.ops.injected_attention import injected_attention
from sharedllm_ext.ops.node_vectors import _attend as attend_nodes
from sharedllm_ext.ops.node_vectors import _plain as plain_node_vectors
from sharedllm_ext.ops.node_vectors import node_vectors
from sharedllm_ext.reference.rotary import rotate

# a script's own folder is all that Python looks into, and the tests are no installed package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.tolerance import oracle, too_far

Call = Callable[[], object]

DEVICE = "cuda"
CHUNK = 1024
#: Queries of a row, and nodes, that a check computes in float64.
SAMPLES = 192
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Unavailable(Exception):
    """A case or a peer that cannot run here; the text says why."""


@dataclasses.dataclass
class Built:
    """A case with its tensors on the GPU.

    Attributes:
        prepare: for ``ours`` and each peer, a function that returns the call to be timed.
        check: what is wrong with the result of ours; ``None`` if nothing is.
    """

    prepare: dict[str, Callable[[], Call]]
    check: Callable[[], str | None]


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of a table.

    Attributes:
        operator: what a red check blames: no case of a red operator gets a time.
        table, shape: heading and line.
        flops, bytes: what must be computed and moved at least.
        peers: other formulations of the same, fastest one is the best peer.
        graph: small enough that the time of a CUDA graph's replay is worth knowing.
    """

    operator: str
    table: str
    shape: str
    flops: float
    bytes: float
    peers: tuple[str, ...]
    build: Callable[[], Built]
    graph: bool = False

    @property
    def name(self) -> str:
        """Key in baselines and group of pytest-benchmark."""
        return f"{self.table}: {self.shape}"

    def floor_us(self, ceilings: dict[str, float]) -> float:
        """Time that the slower of arithmetic and memory takes at the measured ceilings."""
        return max(self.flops / ceilings["gemm"], self.bytes / max(ceilings["copy"], ceilings["read"])) * 1e6


def path(name: str) -> AbstractContextManager[Any]:
    """Context in which injected attention takes the named path.

    Raises:
        Unavailable: this build cannot choose the path.
    """
    if "injected_attention" not in cuda_kernels():
        raise Unavailable("the CUDA library has no kernel of injected_attention")
    return ops.injected_attention_path(name)


def first_wrong(*messages: str | None) -> str | None:
    """The first message, if there is one."""
    return next((message for message in messages if message), None)


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal noise on the GPU."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE, dtype=dtype)


def tables(rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Rotary half tables ``[rows, size / 2]``."""
    angle = torch.arange(rows, device=DEVICE).unsqueeze(1) * torch.logspace(0, -4, size // 2, device=DEVICE)
    return angle.cos(), angle.sin()


def dtype_text(dtype: torch.dtype) -> str:
    """What a line says about the dtype: nothing for the usual one."""
    return "" if dtype == torch.bfloat16 else f", {str(dtype).removeprefix('torch.')}"


# --- injected attention ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Attention:
    """A batch: queries and slots of each row; every row has slots of its own."""

    queries: tuple[int, ...]
    slots: tuple[int, ...]
    q_heads: int = 32
    kv_heads: int = 8
    size: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def pairs(self) -> int:
        """Products of a query and a slot, for one head."""
        return sum(q * s for q, s in zip(self.queries, self.slots, strict=True))

    def elements(self) -> tuple[int, int]:
        """Elements of q and of k."""
        return sum(self.queries) * self.q_heads * self.size, sum(self.slots) * self.kv_heads * self.size

    def flops(self, products: int) -> float:
        """Of so many matrix products over all pairs."""
        return 2.0 * products * self.q_heads * self.size * self.pairs

    def forward_bytes(self) -> float:
        """q, k and v read once, out and lse written once."""
        q, k = self.elements()
        return self.dtype.itemsize * (2 * q + 2 * k) + 4 * sum(self.queries) * self.q_heads

    def backward_bytes(self, need_grad_kv: bool) -> float:
        """q, k, v, out, grad_out and lse read, the gradients written."""
        q, k = self.elements()
        return self.dtype.itemsize * (4 * q + (4 if need_grad_kv else 2) * k) + 4 * sum(self.queries) * self.q_heads

    def arguments(self) -> list[Any]:
        """Arguments of the operator."""
        ends = list(itertools.accumulate(self.slots))
        ranges = [[end - slots, end] for end, slots in zip(ends, self.slots, strict=True)]
        return [
            random(sum(self.queries), self.q_heads, self.size, dtype=self.dtype, seed=1),
            random(ends[-1], self.kv_heads, self.size, dtype=self.dtype, seed=2),
            random(ends[-1], self.kv_heads, self.size, dtype=self.dtype, seed=3),
            torch.tensor([0, *itertools.accumulate(self.queries)], device=DEVICE),
            torch.tensor(ranges, device=DEVICE),
            torch.tensor([128 + i for i in range(len(ends))], device=DEVICE),
            *tables(129 + len(ends), self.size),
            self.size**-0.5,
        ]

    def heads_first(self, arguments: list[Any], rotated: bool = True) -> list[tuple[Tensor, Tensor, Tensor]]:
        """q, k and v as torch's attention takes them: one batch if all rows are alike, otherwise row by row."""
        q, k, v, cu_q, _, position, cos, sin, _ = arguments
        if rotated:
            row = position.repeat_interleave(cu_q.diff())
            q = rotate(q.float(), cos[row], sin[row]).to(q.dtype)
        if len(set(self.queries)) == len(set(self.slots)) == 1:
            rows = len(self.queries)
            return [tuple(x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v))]  # type: ignore[list-item]
        parts = [x.split(sizes) for x, sizes in ((q, self.queries), (k, self.slots), (v, self.slots))]
        return [tuple(x.unsqueeze(0).transpose(1, 2) for x in row) for row in zip(*parts, strict=True)]  # type: ignore[misc]


def fused(backend: str, problem: Attention, arguments: list[Any]) -> Call:
    """PyTorch's fused attention on rotated queries; it returns no log-sum-exp."""
    rows = problem.heads_first(arguments)

    def run() -> None:
        with sdpa_kernel(BACKENDS[backend]):
            for q, k, v in rows:
                torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return run


def fused_padded(problem: Attention, arguments: list[Any]) -> Call:
    """cuDNN's attention on rows padded to the longest one, with a mask."""
    rows = problem.heads_first(arguments)
    longest = max(problem.slots)
    q = torch.cat([row[0] for row in rows])
    k, v = (
        torch.cat([torch.nn.functional.pad(row[i], (0, 0, 0, longest - row[i].shape[2])) for row in rows])
        for i in (1, 2)
    )
    slots = torch.tensor(problem.slots, device=DEVICE)
    mask = (torch.arange(longest, device=DEVICE) < slots[:, None])[:, None, None].expand(-1, 1, q.shape[2], -1)

    def run() -> None:
        with sdpa_kernel(BACKENDS["cudnn"]):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    return run


def fused_backward(backend: str, problem: Attention, arguments: list[Any]) -> Call:
    """All three gradients of PyTorch's fused attention."""
    ((q, k, v),) = problem.heads_first(arguments)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(BACKENDS[backend]):
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, enable_gqa=True)
    grad_out = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)


def sampled(problem: Attention, arguments: list[Any]) -> tuple[Tensor, list[Any]]:
    """Some queries of every row, its first and last among them, and the problem that holds only these."""
    q, k, v, _, *rest = arguments
    chosen, first = [], 0
    for count in problem.queries:
        step = max(math.ceil(count / SAMPLES), 1)
        # not a multiple of any tile: an odd step visits all places in a tile
        places = sorted({*range(0, count, step | 1), count - 1})
        chosen.append([first + place for place in places])
        first += count
    index = torch.tensor([place for row in chosen for place in row], device=DEVICE)
    fewer = torch.tensor([0, *itertools.accumulate(len(row) for row in chosen)], device=DEVICE)
    return index, [q[index], k, v, fewer, *rest]


def check_attention(problem: Attention, arguments: list[Any], call: Callable[[], Any]) -> str | None:
    """Out and log-sum-exp of sampled queries against float64; every other element must be a number."""
    out, lse = call()
    if not (out.isfinite().all() and lse.isfinite().all()):
        return "out, lse: expected numbers, got NaN or infinity"
    index, part = sampled(problem, arguments)
    exact, same = plain_attention(*oracle(part)), plain_attention(*part)
    got = (out[index], lse[index])
    return first_wrong(*map(too_far, ("out", "lse"), got, same, exact))


def check_attention_backward(arguments: list[Any], need_grad_kv: bool, call: Callable[[], Any], grad: Tensor) -> Any:
    """All gradients against float64."""
    wide = oracle(arguments)
    exact = plain_attention_backward(
        grad.double(), None, *wide[:3], *plain_attention(*wide), *wide[3:], need_grad_kv=need_grad_kv
    )
    del wide
    same = plain_attention_backward(
        grad, None, *arguments[:3], *plain_attention(*arguments), *arguments[3:], need_grad_kv=need_grad_kv
    )
    got = call()
    return first_wrong(*map(too_far, ("grad_q", "grad_k", "grad_v")[: len(got)], got, same, exact))


def on_path(name: str | None, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, on a named path of injected attention."""
    if name is None:
        return call
    path(name)

    def run() -> Any:
        with path(name):
            return call()

    return run


def build_attention(problem: Attention, forced: str | None) -> Built:
    arguments = problem.arguments()
    call = on_path(forced, lambda: injected_attention(*arguments[:-1], scale=arguments[-1]))
    prepare: dict[str, Callable[[], Call]] = {"ours": lambda: call}
    prepare |= {backend: partial(fused, backend, problem, arguments) for backend in BACKENDS}
    prepare["padded"] = partial(fused_padded, problem, arguments)
    prepare["eager"] = lambda: lambda: plain_attention(*arguments)
    return Built(prepare, lambda: check_attention(problem, arguments, call))


def build_shared(rows: int, slots: int, bits: int) -> Built:
    """Rows of one query that share a memory, as the model gives them: one row. Peer: a row each."""
    built = (build_attention(one_row(rows, slots), None), build_attention_8bit(one_row(rows, slots)))[bits == 8]
    q, k, v, *_, cos, sin, scale = one_row(rows, slots).arguments()
    described = (
        torch.arange(rows + 1, device=DEVICE),
        torch.tensor([[0, slots]] * rows, device=DEVICE),
        torch.full((rows,), 128, device=DEVICE),
        cos,
        sin,
    )
    if bits == 8:
        (keys, key_scale), (values, value_scale) = ops.quantize_memory(k), ops.quantize_memory(v)
        stored = (keys, values, key_scale, value_scale)
        built.prepare["rows"] = lambda: lambda: ops.injected_attention_8bit(q, *stored, *described, scale=scale)
    else:
        built.prepare["rows"] = lambda: lambda: injected_attention(q, k, v, *described, scale=scale)
    return built


def build_attention_8bit(problem: Attention) -> Built:
    q, k, v, *rest = problem.arguments()
    (keys, key_scale), (values, value_scale) = ops.quantize_memory(k), ops.quantize_memory(v)
    stored = (keys, values, key_scale, value_scale)

    def ours() -> tuple[Tensor, Tensor]:
        return ops.injected_attention_8bit(q, *stored, *rest[:-1], scale=rest[-1])

    def check() -> str | None:
        out, lse = ours()
        pairs = ((keys, key_scale), (values, value_scale))
        wide = [q, *(ops.dequantize_memory(*pair, torch.float64) for pair in pairs), *rest]
        narrow = [q, *(ops.dequantize_memory(*pair, q.dtype) for pair in pairs), *rest]
        exact, same = plain_attention(*oracle(wide)), plain_attention(*narrow)
        return first_wrong(*map(too_far, ("out", "lse"), (out, lse), same, exact))

    prepare: dict[str, Callable[[], Call]] = {"ours": lambda: ours}
    prepare["bfloat16"] = lambda: lambda: injected_attention(q, k, v, *rest[:-1], scale=rest[-1])
    return Built(prepare, check)


def build_attention_backward(problem: Attention, need_grad_kv: bool) -> Built:
    q, k, v, *rest = arguments = problem.arguments()
    leaves = [x.detach().requires_grad_() for x in ((q, k, v) if need_grad_kv else (q,))]
    out, lse = injected_attention(*leaves, *(() if need_grad_kv else (k, v)), *rest[:-1], scale=rest[-1])
    grad = random(*out.shape, dtype=out.dtype, seed=4)

    def ours() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    def plain() -> object:
        return plain_attention_backward(grad, None, q, k, v, out.detach(), lse.detach(), *rest, need_grad_kv)

    prepare: dict[str, Callable[[], Call]] = {"ours": lambda: ours}
    prepare |= {backend: partial(fused_backward, backend, problem, arguments) for backend in BACKENDS}
    prepare["eager"] = lambda: plain
    return Built(prepare, lambda: check_attention_backward(arguments, need_grad_kv, ours, grad))


def one_row(queries: int, slots: int, **options: Any) -> Attention:
    return Attention((queries,), (slots,), **options)


def attention_cases() -> Iterator[Case]:
    def forward(
        table: str, shape: str, problem: Attention, peers: tuple[str, ...], graph: bool = False, forced: str = ""
    ) -> Case:
        operator = f"injected_attention, {forced} path" if forced else "injected_attention"
        work = (problem.flops(2), problem.forward_bytes())
        return Case(operator, table, shape, *work, peers, partial(build_attention, problem, forced or None), graph)

    usual = ("cudnn", "flash", "eager")
    for queries, slots, options in (
        (4096, 16384, {}),
        (1024, 16384, {}),
        (4096, 512, {}),
        (4096, 16384, {"size": 64}),
        (4096, 16384, {"kv_heads": 32}),
        (4096, 16384, {"q_heads": 28, "kv_heads": 4}),
        (4096, 16384, {"dtype": torch.float16}),
        (4096, 16384, {"size": 96}),
        (4096, 16384, {"size": 256}),
        # by the kernel of the next larger head size
        *((4096, 16384, {"size": size}) for size in (48, 80, 100, 112, 192)),
        (4096, 131072, {}),
    ):
        problem = one_row(queries, slots, **options)  # type: ignore[arg-type]
        shape = f"{problem.q_heads}/{problem.kv_heads}, {queries} x {slots}, {problem.size}{dtype_text(problem.dtype)}"
        # eager takes seconds at the longest memory
        yield forward("Injected attention, prefill", shape, problem, usual if slots < 100000 else usual[:2])
    table = "Injected attention, decoding"
    for queries, slots, batch in (
        (1, 16384, 1),
        (1, 131072, 1),
        (1, 16384, 8),
        (1, 16384, 32),
        (4, 16384, 1),
        (16, 16384, 1),
    ):
        problem = Attention((queries,) * batch, (slots,) * batch)
        yield forward(table, f"32/8, {queries} x {slots}, 128, batch {batch}", problem, usual, graph=True)
    for size in (48, 80, 96, 100, 112, 192, 256):
        yield forward(table, f"32/8, 1 x 16384, {size}, batch 1", one_row(1, 16384, size=size), usual, graph=True)
    slots_of_rows = tuple(round(512 * 128 ** (i / 15)) for i in range(16))
    problem = Attention((1,) * 16, slots_of_rows)
    yield forward(table, "32/8, 1 x 512 to 65536, 128, batch 16", problem, (*usual, "padded"), graph=True)
    for slots, batch in ((16384, 1), (131072, 1), (16384, 8)):
        problem = Attention((1,) * batch, (slots,) * batch)
        q_elements, k_elements = problem.elements()
        yield Case(
            "injected_attention_8bit",
            "Injected attention, decoding from an 8-bit memory (peer: our bfloat16 kernel)",
            f"32/8, 1 x {slots}, 128, batch {batch}",
            problem.flops(2),
            4 * q_elements + 2 * k_elements * (1 + 4 / problem.size),
            ("bfloat16",),
            partial(build_attention_8bit, problem),
            True,
        )
    for bits, rows in itertools.product((16, 8), (8, 64, 256)):
        problem = one_row(rows, 16384)
        q_elements, k_elements = problem.elements()
        yield Case(
            "injected_attention" if bits == 16 else "injected_attention_8bit",
            "Injected attention, rows of one memory as one row (peer: a row each)",
            f"32/8, {rows} rows of 1 x 16384, 128" + (", 8-bit memory" if bits == 8 else ""),
            problem.flops(2),
            problem.forward_bytes() if bits == 16 else 4 * q_elements + 2 * k_elements * (1 + 4 / problem.size),
            ("rows", "cudnn", "flash") if bits == 16 else ("rows", "bfloat16"),
            partial(build_shared, rows, 16384, bits),
            True,
        )
    for queries, slots in ((4096, 16384), (4096, 512)):
        for need_grad_kv in (True, False):
            problem = one_row(queries, slots)
            what = "dq, dk, dv" if need_grad_kv else "dq only (peers: all three)"
            yield Case(
                "injected_attention_backward",
                "Injected attention, backward",
                f"32/8, {queries} x {slots}, 128, {what}",
                problem.flops(5 if need_grad_kv else 3),
                problem.backward_bytes(need_grad_kv),
                usual,
                partial(build_attention_backward, problem, need_grad_kv),
            )
    for size in (80, 96, 112):
        problem = one_row(4096, 16384, size=size)
        yield Case(
            "injected_attention_backward",
            "Injected attention, backward",
            f"32/8, 4096 x 16384, {size}, dq, dk, dv",
            problem.flops(5),
            problem.backward_bytes(True),
            usual,
            partial(build_attention_backward, problem, True),
        )
    for queries, slots, batch in ((4096, 16384, 1), (1, 16384, 1), (1, 16384, 8)):
        problem = Attention((queries,) * batch, (slots,) * batch)
        shape = f"32/8, {queries} x {slots}, 128, batch {batch}"
        yield forward("Injected attention, portable path", shape, problem, ("flash",), queries == 1, "portable")


# --- chunk compression ----------------------------------------------------------------------------------------------

TOKENS, Q_HEADS, KV_HEADS, SIZE, KEEP_EVERY = 128 * CHUNK, 32, 8, 128, 8


def compression_arguments() -> dict[str, Any]:
    """Arguments of the operator, as the compressor gives them: 128 chunks, every eighth token kept."""
    positions = torch.arange(TOKENS, device=DEVICE) % CHUNK
    keep = torch.arange(0, TOKENS, KEEP_EVERY, device=DEVICE)
    cos, sin = tables(2 * CHUNK, SIZE)
    return {
        "q": random(TOKENS, Q_HEADS, SIZE, dtype=torch.bfloat16, seed=1),
        "k": random(TOKENS, KV_HEADS, SIZE, dtype=torch.bfloat16, seed=2),
        "v": random(TOKENS, KV_HEADS, SIZE, dtype=torch.bfloat16, seed=3),
        "cos": cos,
        "sin": sin,
        "q_positions": positions,
        "positions": positions,
        "keep_index": keep,
        "keep_position": positions[keep] + keep // CHUNK,
    }


def blocks_of_tokens(arguments: dict[str, Any], per_token: tuple[str, ...], per_slot: tuple[str, ...]) -> Iterator[Any]:
    """The arguments of some tokens at a time: the whole in float64 would not fit. Yields tokens, slots, arguments."""
    step = 16 * CHUNK
    for i in range(0, TOKENS, step):
        token, slot = slice(i, i + step), slice(i // KEEP_EVERY, (i + step) // KEEP_EVERY)
        part = {
            name: x if x is None else x[token] if name in per_token else x[slot] if name in per_slot else x
            for name, x in arguments.items()
        }
        part["keep_index"] = part["keep_index"] - i
        yield token, slot, part


def wide_items(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in float64."""
    return dict(zip(arguments, oracle(list(arguments.values())), strict=True))


def check_compression(arguments: dict[str, Any]) -> str | None:
    got = chunk_compression(**arguments)
    per_token, per_slot = ("q", "k", "v", "q_positions", "positions"), ("keep_index", "keep_position")
    for token, slot, part in blocks_of_tokens(arguments, per_token, per_slot):
        exact, same = reference.chunk_compression(**wide_items(part)), reference.chunk_compression(**part)
        mine = [x if x.numel() == 0 else x[where] for x, where in zip(got, (token, token, slot, slot), strict=True)]
        wrong = first_wrong(*map(too_far, ("q_rotated", "k_rotated", "memory_k", "memory_v"), mine, same, exact))
        if wrong:
            return wrong
    return None


def check_compression_backward(arguments: dict[str, Any]) -> str | None:
    got = chunk_compression_backward(**arguments, num_tokens=TOKENS)
    per_token = ("grad_q_rotated", "grad_k_rotated", "q_positions", "positions")
    per_slot = ("grad_memory_k", "grad_memory_v", "keep_index", "keep_position")
    for token, _, part in blocks_of_tokens(arguments, per_token, per_slot):
        count = token.stop - token.start
        exact = reference.chunk_compression_backward(**wide_items(part), num_tokens=count)
        same = reference.chunk_compression_backward(**part, num_tokens=count)
        mine = [x[token] for x in got]
        wrong = first_wrong(*map(too_far, ("grad_q", "grad_k", "grad_v"), mine, same, exact))
        if wrong:
            return wrong
    return None


def compiled(function: Callable[..., object], *arguments: Any) -> Call:
    """The same expression through torch.compile."""
    fast = torch.compile(function, fullgraph=True, dynamic=False)
    return lambda: fast(*arguments)


def build_compression(memory_alone: bool) -> Built:
    arguments = compression_arguments()
    if memory_alone:
        arguments |= {"q": None, "q_positions": None, "positions": None}
    a = SimpleNamespace(**arguments)
    full = eager.full_tables(a.cos, a.sin, torch.bfloat16)
    expression = (a.q, a.k, a.v, full, a.q_positions, a.positions, a.keep_index, a.keep_position)
    return Built(
        {
            "ours": lambda: lambda: chunk_compression(**arguments),
            "eager": lambda: lambda: eager.compression(*expression),
            "compile": lambda: compiled(eager.compression, *expression),
        },
        lambda: check_compression(arguments),
    )


def build_compression_backward() -> Built:
    forward = compression_arguments()
    q, k, v, keep = (forward.pop(name) for name in ("q", "k", "v", "keep_index"))
    arguments = {
        "grad_q_rotated": q,
        "grad_k_rotated": k,
        "grad_memory_k": v[keep],
        "grad_memory_v": k[keep],
        **forward,
        "keep_index": keep,
    }
    a = SimpleNamespace(**arguments)
    full = eager.full_tables(a.cos, a.sin, torch.bfloat16)
    expression = (q, k, a.grad_memory_k, a.grad_memory_v, full, a.positions, keep, a.keep_position)
    return Built(
        {
            "ours": lambda: lambda: chunk_compression_backward(**arguments, num_tokens=TOKENS),
            "eager": lambda: lambda: eager.compression_backward(*expression),
            "compile": lambda: compiled(eager.compression_backward, *expression),
        },
        lambda: check_compression_backward(arguments),
    )


def compression_cases() -> Iterator[Case]:
    q, kv, kept = (2 * SIZE * count for count in (TOKENS * Q_HEADS, TOKENS * KV_HEADS, TOKENS // KEEP_EVERY * KV_HEADS))
    index = 8 * (TOKENS + 2 * (TOKENS // KEEP_EVERY))
    shape = f"{TOKENS} tokens, {Q_HEADS}/{KV_HEADS}, {SIZE}"
    peers = ("eager", "compile")
    table = "Chunk compression"
    everything = 2 * q + 2 * kv + 3 * kept + index
    yield Case("chunk_compression", table, shape, 0, everything, peers, partial(build_compression, False))
    alone = 4 * kept + 2 * index - 2 * 8 * TOKENS
    yield Case("chunk_compression", table, f"{shape}, memory alone", 0, alone, peers, partial(build_compression, True))
    backward = 2 * q + 3 * kv + 2 * kept + index
    build = build_compression_backward
    yield Case("chunk_compression_backward", table, f"{shape}, backward", 0, backward, peers, build)


# --- retrieval: node vectors, top-k, tree ---------------------------------------------------------------------------


def node_spans(chunks: int, level: int) -> Tensor:
    """Two nodes of each chunk at a level, if the right one was always picked: ``[2 * chunks, 2]``."""
    length = CHUNK >> level
    start = torch.arange(chunks, device=DEVICE) * CHUNK + CHUNK - 2 * length
    starts = torch.stack((start, start + length), 1).flatten()
    return torch.stack((starts, torch.full_like(starts, length)), 1)


def node_bytes(chunks: int, level: int) -> float:
    """Keys and values of the nodes' tokens, queries and outputs."""
    return 2 * SIZE * (2 * (chunks * CHUNK >> (level - 1)) * KV_HEADS + 2 * 2 * chunks * Q_HEADS)


def node_flops(chunks: int, level: int) -> float:
    return 4.0 * SIZE * Q_HEADS * (chunks * CHUNK >> (level - 1))


def keys_and_values(chunks: int) -> list[Tensor]:
    return [random(chunks * CHUNK, KV_HEADS, SIZE, dtype=torch.bfloat16, seed=seed) for seed in (2, 3)]


def check_node_vectors(arguments: list[Any]) -> str | None:
    q, k, v, spans, *rest = arguments
    got = node_vectors(*arguments[:-1], scale=arguments[-1])
    if not got.isfinite().all():
        return "out: expected numbers, got NaN or infinity"
    step = max(len(q) // SAMPLES, 1) | 1
    part = (q[::step], spans[::step])
    # the tokens' dtype is widened block by block: k and v as a whole in float64 are too large
    exact = attend_nodes(part[0].double(), k, v, part[1], *rest)
    return too_far("out", got[::step], plain_node_vectors(part[0], k, v, part[1], *rest), exact)


def build_node_vectors(chunks: int, level: int) -> Built:
    spans = node_spans(chunks, level)
    q = random(len(spans), Q_HEADS, SIZE, dtype=torch.bfloat16, seed=1)
    arguments = [q, *keys_and_values(chunks), spans, *tables(CHUNK >> level, SIZE), SIZE**-0.5]
    *tensors, scale = arguments
    prepare: dict[str, Callable[[], Call]] = {"ours": lambda: lambda: node_vectors(*tensors, scale=scale)}
    prepare["eager"] = lambda: lambda: plain_node_vectors(*arguments)
    return Built(prepare, lambda: check_node_vectors(arguments))


def check_topk(query: Tensor, nodes: Tensor, k: int, call: Callable[[], Any]) -> str | None:
    """Similarities rank by rank against float64, and the similarity of each returned node."""
    groups, size, d = nodes.shape
    indices, similarity = call()

    def scores(dtype: torch.dtype) -> Tensor:
        # in parts: the nodes in float64 may take 6 GB
        wide = query.to(dtype).flatten()
        parts = (x.to(dtype) for x in nodes.view(-1, d).split(8192))
        return torch.cat([x @ wide / (x.norm(dim=-1) * wide.norm()) for x in parts])

    wide = scores(torch.float64)
    exact, same = (x.view(groups, size).topk(k).values for x in (wide, scores(torch.float32)))
    wrong = too_far("similarity", similarity, same, exact)
    if wrong or not ((indices >= 0) & (indices < groups * size)).all():
        return wrong or "indices: expected rows of the nodes, got others"
    return too_far("similarity of the returned nodes", wide[indices], similarity, exact)


def build_topk(groups: int, size: int, k: int, d: int) -> Built:
    nodes = random(groups, size, d, dtype=torch.bfloat16, seed=1)
    query = random(1, 1, d, dtype=torch.bfloat16, seed=2)
    cu_groups = torch.arange(groups + 1, device=DEVICE) * size
    group_query = torch.zeros(groups, dtype=torch.int64, device=DEVICE)
    arguments = (query[0], nodes.view(-1, d), cu_groups, group_query, k)

    def ours() -> tuple[Tensor, Tensor]:
        return ops.topk_nodes(*arguments)

    return Built(
        {
            "ours": lambda: ours,
            "cosine": lambda: lambda: eager.cosine(query, nodes, k),
            "products": lambda: lambda: eager.products(query, nodes, k),
        },
        lambda: check_topk(query, nodes, k, ours),
    )


OURS = SimpleNamespace(split=ops.context_tree_split, select=ops.context_tree_select, layout=ops.context_tree_layout)
EAGER = SimpleNamespace(
    split=reference.context_tree_split, select=reference.context_tree_select, layout=reference.context_tree_layout
)
DEPTH, NODE_SLOTS = 3, 32


def build_tree(chunks: int, step: str) -> Built:
    spans = torch.stack((torch.arange(chunks) * CHUNK, torch.full((chunks,), CHUNK)), 1).to(DEVICE)
    chunk_index = torch.arange(chunks, device=DEVICE)
    children = reference.context_tree_split(spans, None)
    sizes = (NODE_SLOTS, chunks * CHUNK, chunks * (DEPTH + 1) * NODE_SLOTS)
    nodes = retained_nodes(EAGER, spans)

    def run(functions: SimpleNamespace) -> Any:
        if step == "split":
            return functions.split(spans, None)
        if step == "select":
            return functions.select(children, None)
        if step == "layout":
            return functions.layout(nodes, chunk_index, *sizes)
        return eager.tree(functions, spans, chunk_index, DEPTH, NODE_SLOTS, chunks * CHUNK)

    def check() -> str | None:
        got, want = run(OURS), run(EAGER)
        got, want = ((got,), (want,)) if isinstance(got, Tensor) else (got, want)
        return None if all(map(torch.equal, got, want)) else f"{step}: expected the reference's integers, got others"

    return Built({"ours": lambda: lambda: run(OURS), "eager": lambda: lambda: run(EAGER)}, check)


def retained_nodes(functions: SimpleNamespace, spans: Tensor) -> Tensor:
    """Retained nodes ``[chunks, depth + 1, 2]`` when the right child is always picked."""
    retained = []
    for _ in range(DEPTH - 1):
        spans, other = functions.select(functions.split(spans, None), None)
        retained.append(other)
    leaves = functions.split(spans, None)
    return torch.stack((leaves[:, 0], leaves[:, 1], *reversed(retained)), 1)


def build_retrieval(chunks: int) -> Built:
    """Two levels of node vectors, top-k and selection, the last split and the layout; without layer 0's products."""
    k, v = keys_and_values(chunks)
    spans = torch.stack((torch.arange(chunks) * CHUNK, torch.full((chunks,), CHUNK)), 1).to(DEVICE)
    chunk_index = torch.arange(chunks, device=DEVICE)
    # of the last token of each quarter; a half ends where its second quarter does
    query = random(chunks, 4, Q_HEADS, SIZE, dtype=torch.bfloat16, seed=4)
    text = random(1, Q_HEADS * SIZE, dtype=torch.bfloat16, seed=6)
    siblings = torch.arange(chunks + 1, device=DEVICE) * 2
    group_query = torch.zeros(chunks, dtype=torch.int64, device=DEVICE)
    sizes = (NODE_SLOTS, chunks * CHUNK, chunks * (DEPTH + 1) * NODE_SLOTS)
    halves = tables(CHUNK // 2, SIZE)
    pair = torch.arange(2, device=DEVICE)
    every = chunk_index.unsqueeze(1)

    def run(
        functions: SimpleNamespace, topk: Callable[..., Any], vectors: Callable[[int, Tensor, Tensor], Tensor]
    ) -> Any:
        """``vectors(level, children, first)``: those of two siblings of each chunk, the first of them numbered so."""
        node, retained = spans, []
        first = torch.zeros(chunks, 1, dtype=torch.int64, device=DEVICE)
        for level in (1, 2):
            children = functions.split(node, None)
            best, _ = topk(text, vectors(level, children, first).flatten(0, 1), siblings, group_query, 1)
            choice = best[:, 0] - siblings[:-1]
            node, other = functions.select(children, choice)
            first = 2 * (first + choice.unsqueeze(1))
            retained.append(other)
        leaves = functions.split(node, None)
        nodes = torch.stack((leaves[:, 0], leaves[:, 1], *reversed(retained)), 1)
        return nodes, functions.layout(nodes, chunk_index, *sizes)

    def by_level(attend: Callable[..., Tensor]) -> Callable[[int, Tensor, Tensor], Tensor]:
        def vectors(level: int, children: Tensor, first: Tensor) -> Tensor:
            leaf = (first + pair + 1) * (4 >> level) - 1
            attended = attend(query[every, leaf].flatten(0, 1), k, v, children.flatten(0, 1), *halves, scale=SIZE**-0.5)
            return attended.view(chunks, 2, -1)

        return vectors

    def ours() -> Any:
        attended = ops.tree_node_vectors(query, k, v, spans, *halves, 2, scale=SIZE**-0.5).flatten(2)
        return run(OURS, ops.topk_nodes, lambda level, _, first: attended[every, first + pair + 2 * (level - 1)])

    def levels() -> Any:
        return run(OURS, ops.topk_nodes, by_level(node_vectors))

    def plain() -> Any:
        return run(EAGER, reference.topk_nodes, by_level(plain_node_vectors))

    def check() -> str | None:
        (nodes, layout), (other, _) = ours(), plain()
        if not all(map(torch.equal, layout, reference.context_tree_layout(nodes, chunk_index, *sizes))):
            return "layout: expected the reference's of the same nodes, got another"
        # similarities of two random nodes may differ by less than bfloat16 resolves
        share = (nodes == other).flatten(1).all(1).double().mean().item()
        return None if share > 0.8 else f"nodes: expected those of eager PyTorch, got {share:.0%} of them"

    return Built({"ours": lambda: ours, "levels": lambda: levels, "eager": lambda: plain}, check)


def retrieval_cases() -> Iterator[Case]:
    for chunks in (128, 1024):
        for level in (1, 2):
            shape = (
                f"{chunks} chunks, level {level}: {2 * chunks} nodes of {CHUNK >> level}, {Q_HEADS}/{KV_HEADS}, {SIZE}"
            )
            work = (node_flops(chunks, level), node_bytes(chunks, level))
            build = partial(build_node_vectors, chunks, level)
            yield Case("node_vectors", "Node vectors", shape, *work, ("eager",), build, chunks == 128)
    d = Q_HEADS * SIZE
    for groups, size, k in ((128, 2, 2), (1024, 2, 2), (1, 200000, 32)):
        work = (2.0 * groups * size * d, 2.0 * groups * size * d + 12.0 * groups * k)
        build = partial(build_topk, groups, size, k, d)
        shape = f"{k} of {size} in {groups} groups, d {d}"
        yield Case("topk_nodes", "Top-k nodes", shape, *work, ("cosine", "products"), build, size == 2)
    for chunks in (128, 1024):
        slots = chunks * (DEPTH + 1) * NODE_SLOTS
        layout = 8.0 * (chunks * CHUNK + 2 * slots + 3 * (DEPTH + 1) * chunks + 2 * chunks)
        for step, moved in (
            ("split", 48.0 * chunks),
            ("select", 64.0 * chunks),
            ("layout", layout),
            ("split, select, layout", layout + DEPTH * 48 * chunks + (DEPTH - 1) * 64 * chunks),
        ):
            build = partial(build_tree, chunks, step)
            yield Case("context_tree", "Context tree", f"{chunks} chunks, {step}", 0, moved, ("eager",), build, True)
    for chunks in (128, 1024):
        slots = chunks * (DEPTH + 1) * NODE_SLOTS
        # keys and values are read once for both levels
        moved = node_bytes(chunks, 1) + 2 * 6 * chunks * d + 8.0 * (chunks * CHUNK + 2 * slots)
        flops = sum(node_flops(chunks, level) for level in (1, 2))
        build = partial(build_retrieval, chunks)
        shape = f"{chunks} chunks, {DEPTH - 1} levels, layout"
        yield Case("retrieval", "Whole retrieval", shape, flops, moved, ("levels", "eager"), build, True)


# --- element-wise work of a layer ------------------------------------------------------------------------------------


def fused_arguments(operator: str, rows: int, width: int) -> list[Any]:
    x, y = (random(rows, width, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    if "silu" in operator:
        return [x, y]
    if "quantize" in operator:
        return [x]
    return [x, *([y] if "add" in operator else []), random(width, dtype=torch.bfloat16, seed=3), 1e-5]


def fused_eager(operator: str, values: list[Any]) -> Any:
    """What a model without these operators runs, in the dtype of its arguments."""
    if operator == "quantize_rows_fp8":
        return reference.quantize_rows_fp8(*values)
    if operator.endswith("_fp8"):
        *total, normed = as_tuple(fused_eager(operator.removesuffix("_fp8"), values))
        return *total, *reference.quantize_rows_fp8(normed)
    if operator == "silu_product":
        return torch.nn.functional.silu(values[0]) * values[1]
    *terms, weight, eps = values
    total = terms[0] + terms[1] if operator == "add_rms_norm" else terms[0]
    normed = torch.nn.functional.rms_norm(total, weight.shape, weight, eps)
    return (total, normed) if operator == "add_rms_norm" else normed


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def build_fused(operator: str, rows: int, width: int) -> Built:
    values = fused_arguments(operator, rows, width)

    def ours() -> Any:
        return getattr(ops, operator)(*values)

    def check() -> str | None:
        first = [x[:SAMPLES] if isinstance(x, Tensor) and x.dim() == 2 else x for x in values]
        results = [as_tuple(getattr(ops, operator)(*first)), as_tuple(fused_eager(operator, first))]
        if operator.endswith("_fp8"):
            results = [(*total, codes.double() * scale.double()) for *total, codes, scale in results]
        plain = operator.removesuffix("_fp8")
        exact = as_tuple(first[0].double() if plain == "quantize_rows" else fused_eager(plain, oracle(first)))
        if plain == "add_rms_norm":
            # the norm is that of the rounded sum
            total = (first[0] + first[1]).double()
            exact = exact[0], fused_eager("rms_norm", [total, *oracle(first[2:])])
        names = [f"result {i}" for i in range(len(exact))]
        return first_wrong(*map(too_far, names, *results, exact))

    return Built({"ours": lambda: ours, "eager": lambda: lambda: fused_eager(operator, values)}, check)


def fused_cases() -> Iterator[Case]:
    # operator, bytes of an element that are read and written
    for operator, rows, width, moved in (
        ("silu_product", 32768, 14336, 6),
        ("silu_product_fp8", 32768, 14336, 5),
        ("rms_norm", 131072, 4096, 4),
        ("rms_norm_fp8", 131072, 4096, 3),
        ("add_rms_norm", 131072, 4096, 8),
        ("add_rms_norm_fp8", 131072, 4096, 7),
        ("quantize_rows_fp8", 131072, 4096, 3),
    ):
        build = partial(build_fused, operator, rows, width)
        yield Case(
            operator, "Around the products", f"{operator}, {rows} x {width}", 0, moved * rows * width, ("eager",), build
        )


#: In the order of the tables; what matters most comes first, so that it is measured before the time is over.
CASES = (*attention_cases(), *compression_cases(), *retrieval_cases(), *fused_cases())

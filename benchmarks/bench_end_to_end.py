"""Time and memory of whole models: a long context read, a question answered, beside full attention.

python benchmarks/bench_end_to_end.py                                   # both shapes, 8K to 1M tokens, M = 4 and 16
python benchmarks/bench_end_to_end.py --shapes llama-3.1-8b --layers 4 --contexts 131072 10485760
python benchmarks/bench_end_to_end.py --index --no-peers                # a second question, from an index, as well
python benchmarks/bench_end_to_end.py --write                           # tables into RESULTS.md, plots into plots/
python benchmarks/bench_end_to_end.py --merge a.json b.json --write     # the same from stored runs of one machine

Random weights (times and memory do not depend on their values) in bfloat16, batch 1, a running text of 4096 tokens.
Every figure is the median of wall-clock times with the device synchronised; see docs/benchmarks.md.
--cpu runs the package alone on the CPU, in float32: to try the script, or for small shapes.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from line_plot import line_plot
from run_gpu import header, write_section
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from sharedllm_ext import SharedLLMConfig, SharedLLMForCausalLM
from sharedllm_ext.reference import model as reference

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "llama-2-7b": {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": 32},
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}
DEFAULT_SHAPES = ["llama-3.1-8b", "llama-2-7b"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
CONTEXTS = [8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576]
FULL, FULL_CUDNN, EAGER = "full attention", "full attention, cuDNN", "eager reference"
GB = 1e9
COLUMNS = (
    "first token, s",
    "retrieve, ms",
    "compress, s",
    "prefill, s",
    "per token, ms",
    "graph, ms",
    "state, GB",
    "peak, GB",
    "rest, GB",
)


@dataclasses.dataclass
class Row:
    """One system at one context length; seconds and bytes."""

    shape: str
    system: str
    context: int
    first_token: float = math.nan
    retrieve: float = math.nan
    compress: float = math.nan
    prefill: float = math.nan
    per_token: float = math.nan
    graph: float = math.nan
    weights: int = 0
    state: int = 0
    peak: int = 0
    note: str = ""
    # with an index: seconds to make it, to choose a second question's memory, and from there to its first token
    index: float = math.nan
    choose: float = math.nan
    second: float = math.nan
    index_bytes: int = 0


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.merge:
        documents = [json.loads(path.read_text()) for path in arguments.merge]
        about, rows = documents[0]["header"], [Row(**row) for document in documents for row in document["rows"]]
        different = [name for document in documents for name in about if document["header"][name] != about[name]]
        if set(different) - {"date"}:
            print(f"bench_end_to_end: expected runs of one machine and commit, got other {different}", file=sys.stderr)
            return 2
    elif lacks_device("bench_end_to_end", arguments.cpu and not arguments.write):
        return 2
    else:
        about = header()
        print(", ".join(about.values()))
        rows = measure(arguments)
    report = tables(rows, about, arguments.running)
    print(report)
    if arguments.json:
        document = {"header": about, "rows": [dataclasses.asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    if arguments.write:
        results = ROOT / "benchmarks" / "RESULTS.md"
        write_section(results, f"bench_end_to_end.py: {about['gpu']}", report, "Whole models")
        plots(rows, about)
    return 0


def lacks_device(name: str, cpu: bool) -> bool:
    """Whether a benchmark has no CUDA device and may not run on the CPU; says so."""
    lacks = DEVICE != "cuda" and not cpu
    if lacks:
        print(f"{name}: expected a CUDA device, got none that torch sees", file=sys.stderr)
    return lacks


def measure(arguments: argparse.Namespace) -> list[Row]:
    """All systems at all context lengths."""
    deadline = time.monotonic() + arguments.seconds
    rows: list[Row] = []
    for shape in arguments.shapes:
        for layers in arguments.layers:
            with built(shape, layers, arguments) as model:
                rows += measure_shared(model, shape, layers, arguments, deadline)
                if layers == arguments.layers[-1] and not arguments.no_peers and DEVICE == "cuda":
                    rows += measure_peers(model, shape, arguments, deadline)
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=DEFAULT_SHAPES)
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 16], metavar="M", help="injection layers")
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS, metavar="TOKENS")
    parser.add_argument("--running", type=int, default=4096, help="tokens of the running text (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="decoded tokens that are timed (default %(default)s)")
    parser.add_argument("--micro-batch", type=int, metavar="TOKENS", help="context tokens compressed at a time")
    parser.add_argument("--precision", choices=["model", "fp8"], nargs="+", default=["model"])
    parser.add_argument(
        "--decoder-precision",
        choices=["model", "fp8"],
        nargs="+",
        default=["model"],
        help='of the decoder\'s weights; "fp8" comes last and leaves no peers',
    )
    parser.add_argument(
        "--seconds", type=float, default=600, help="start nothing after this long (default %(default)s)"
    )
    parser.add_argument("--full-most", type=int, default=131072, help="longest context of full attention")
    parser.add_argument("--no-peers", action="store_true", help="this package alone")
    parser.add_argument("--index", action="store_true", help="also make an index, and ask a second question from it")
    parser.add_argument("--question", type=int, default=64, help="tokens of the second question (default %(default)s)")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU where torch sees no CUDA device")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="kernel tables of one 131072-token run go there")
    parser.add_argument("--write", action="store_true", help="put tables and plots into benchmarks/")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="measure nothing, take stored numbers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    arguments = parser.parse_args(argv)
    if "fp8" in arguments.decoder_precision and not arguments.no_peers:
        parser.error("argument --decoder-precision: expected --no-peers with fp8, whose peers lack weights")
    return arguments


@contextlib.contextmanager
def built(
    shape: str, layers: int, arguments: argparse.Namespace, pick: dict[str, str] | None = None
) -> Iterator[SharedLLMForCausalLM]:
    """A model with random weights on the device, whose memory is given back at the end; ``pick``: passage prompt."""
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 131072}
    text_config = LlamaConfig(**{**sizes, **SHAPES[shape]})
    config = SharedLLMConfig(
        text_config=text_config,
        injection_layers=layers,
        window=arguments.running,
        micro_batch_tokens=arguments.micro_batch,
        **({} if pick is None else {"query_aware": False, "pick_layers": [0, layers - 1], "passage_prompt": pick}),
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        # parameters first without storage: the families' own initialisation would take longer than the benchmark
        with torch.device("meta"):
            model = SharedLLMForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model = model.to_empty(device=DEVICE).eval()
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(text_config).to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, 0.02, generator=generator)
    if model.pick is not None:
        model.pick.token_class.copy_(torch.arange(model.config.vocab_size))
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    try:
        yield model
    finally:
        del model
        gc.collect()
        torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock time of a call and of all device work it started."""
    synchronize()
    begin = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - begin


def random_ids(count: int, vocabulary: int, seed: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randint(3, vocabulary, (1, count), generator=generator, device=DEVICE)


def weight_bytes(model: Any) -> int:
    """Bytes of all different parameters, and of weights in 8 bits."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(p.nbytes for p in {p.data_ptr(): p for p in tensors}.values())


@torch.no_grad()
def measure_shared(
    model: SharedLLMForCausalLM, shape: str, layers: int, arguments: argparse.Namespace, deadline: float
) -> list[Row]:
    """This package: compression, choice of nodes, prefill, decoding."""
    text = random_ids(arguments.running, model.config.vocab_size, 1)
    rows = []
    pairs = [(decoder, precision) for decoder in ("model", "fp8") for precision in arguments.precision]
    for decoder, precision in pairs:
        if decoder not in arguments.decoder_precision:
            continue
        # a decoder in 8 bits shares its weights with a compressor that is so from the start
        model.config.compressor_precision = precision
        if decoder == "fp8":
            model.quantize_decoder()
        system = f"M = {layers}" + (", fp8 compressor" if precision == "fp8" else "")
        system += ", fp8 decoder" if decoder == "fp8" else ""
        warm = random_ids(8192, model.config.vocab_size, 2)
        for _ in range(2):
            model.generate(text, context_ids=warm, max_new_tokens=4, do_sample=False)
        # half precision alone at the lengths that show the scaling
        most = arguments.full_most if precision == "fp8" else math.inf
        for context in arguments.contexts:
            if context > most or time.monotonic() > deadline:
                continue
            row = Row(shape, system, context, weights=weight_bytes(model))
            rows.append(row)
            try:
                measure_row(model, row, text, arguments)
            except torch.OutOfMemoryError as error:
                row.note = f"out of memory: {str(error)[:300]}"
            gc.collect()
            torch.cuda.empty_cache()
            print(json.dumps(dataclasses.asdict(row)), flush=True)
        if arguments.profile:
            name = f"{shape}_{layers}_{precision}" + ("_fp8_decoder" if decoder == "fp8" else "")
            profile(model, text, arguments.profile / f"{name}.txt")
    return rows


def measure_row(model: SharedLLMForCausalLM, row: Row, text: Tensor, arguments: argparse.Namespace) -> None:
    """Fill in the times and bytes of one context length."""
    context = random_ids(row.context, model.config.vocab_size, row.context)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    repeats = 3 if row.context <= 131072 else 1
    whole, retrieve, compress, prefill = [], [], [], []
    memory = None

    def read() -> None:
        nonlocal memory
        memory = model.compress(context, query_ids=text)

    def answer() -> None:
        output = model(input_ids=text, memory=memory, use_cache=True, logits_to_keep=1)
        output.logits[:, -1].argmax(-1).item()

    for _ in range(repeats):
        memory = None
        whole.append(seconds(lambda: (read(), answer())))
        timings = model.last_timings
        retrieve.append(timings["retrieve"])
        compress.append(timings["compress"])
        prefill.append(seconds(answer))
    assert memory is not None
    row.state = memory.nbytes
    row.first_token, row.retrieve, row.compress, row.prefill = map(
        statistics.median, (whole, retrieve, compress, prefill)
    )
    times: dict[int, list[float]] = {}
    for tokens in (1, 1 + arguments.tokens):
        generate = partial(model.generate, text, memory=memory, max_new_tokens=tokens, do_sample=False)
        times[tokens] = [seconds(generate) for _ in range(3)]
    # the first call over a memory makes the graph of a step, which the others use again
    row.per_token = (min(times[1 + arguments.tokens]) - min(times[1])) / arguments.tokens
    row.graph = max(times[1 + arguments.tokens][0] - min(times[1 + arguments.tokens]), 0.0)
    row.peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    if arguments.index:
        memory = None
        measure_index(model, row, context, arguments)


def measure_index(model: SharedLLMForCausalLM, row: Row, context: Tensor, arguments: argparse.Namespace) -> None:
    """Fill in the times of an index and of questions asked from it; they stay open where memory runs out."""
    index = memory = None

    def make() -> None:
        nonlocal index
        index = model.index(context)

    def choose(question: Tensor) -> None:
        nonlocal memory
        memory = None
        memory = model.memory_for(index, question)

    def answer(question: Tensor) -> None:
        output = model(input_ids=question, memory=memory, use_cache=True, logits_to_keep=1)
        output.logits[:, -1].argmax(-1).item()

    questions = [random_ids(arguments.question, model.config.vocab_size, 10 + seed) for seed in range(6)]
    try:
        row.index = seconds(make)
        row.index_bytes = index.nbytes
        # the first question warms up what compressing did not
        times = [(seconds(partial(choose, one)), seconds(partial(answer, one))) for one in questions][1:]
    except torch.OutOfMemoryError as error:
        print(f"index at {row.context} tokens: out of memory: {str(error)[:300]}", file=sys.stderr)
        return
    row.choose = statistics.median(chosen for chosen, _ in times)
    row.second = statistics.median(chosen + answered for chosen, answered in times)


def measure_peers(model: SharedLLMForCausalLM, shape: str, arguments: argparse.Namespace, deadline: float) -> list[Row]:
    """The base checkpoint reading everything through its own attention, and the method in plain PyTorch."""
    with torch.device("meta"):
        full = LlamaForCausalLM(model.config.text_config)
    full.model.rotary_emb = model.model.rotary_emb
    full.load_state_dict(model.state_dict(keep_vars=True), strict=False, assign=True)
    full.eval()
    cudnn = partial(sdpa_kernel, [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH], set_priority=True)
    lengths = [context for context in arguments.contexts if context <= arguments.full_most]
    peers: list[tuple[str, list[int], Callable[[Row], None]]] = [
        (FULL, lengths, partial(measure_full, full, arguments.running, contextlib.nullcontext)),
        (FULL_CUDNN, lengths[-1:], partial(measure_full, full, arguments.running, cudnn)),
        (EAGER, lengths[:1], partial(measure_eager, model, arguments.running)),
    ]
    rows = []
    for context in arguments.contexts:
        for system, chosen, measure in peers:
            if context not in chosen or time.monotonic() > deadline:
                continue
            name = f"M = {model.config.injection_layers}, {system}" if system == EAGER else system
            row = Row(shape, name, context, weights=weight_bytes(full))
            rows.append(row)
            torch.cuda.reset_peak_memory_stats()
            try:
                measure(row)
            except torch.OutOfMemoryError:
                row.note = "out of memory"
            row.peak = torch.cuda.max_memory_allocated()
            gc.collect()
            torch.cuda.empty_cache()
            print(json.dumps(dataclasses.asdict(row)), flush=True)
    return rows


@torch.no_grad()
def measure_full(full: LlamaForCausalLM, running: int, backend: Callable[[], Any], row: Row) -> None:
    """Transformers' own model over context and running text."""
    ids = random_ids(row.context + running, full.config.vocab_size, row.context)
    with backend():
        for _ in range(2):
            cache = None
            begin = time.perf_counter()
            output = full(input_ids=ids, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1:].argmax(-1)
            token.item()
            row.first_token = row.prefill = time.perf_counter() - begin
            cache = output.past_key_values
            del output

    def step(count: int) -> None:
        nonlocal token
        for _ in range(count):
            token = full(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)

    row.state = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    step(2)
    row.per_token = seconds(lambda: step(8)) / 8


@torch.no_grad()
def measure_eager(model: SharedLLMForCausalLM, running: int, row: Row) -> None:
    """The oracle of this package: the method written out in plain PyTorch."""
    text = random_ids(running, model.config.vocab_size, 1)[0]
    context = random_ids(row.context, model.config.vocab_size, row.context)[0]
    with torch.device("cuda"):
        reference.compress(model, context[:1024], text)
        memory = None

        def compress() -> None:
            nonlocal memory
            memory = reference.compress(model, context, text)

        row.compress = seconds(compress)
        row.prefill = seconds(lambda: reference.logits(model, text, memory))
    row.first_token = row.compress + row.prefill


@torch.no_grad()
def profile(model: SharedLLMForCausalLM, text: Tensor, path: Path, context: int = 131072) -> None:
    """Kernel tables of compression, prefill and decoding, and their shares."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = random_ids(context, model.config.vocab_size, 3)
    memory = model.compress(ids, query_ids=text)
    parts: dict[str, Callable[[], object]] = {
        "compress": lambda: model.compress(ids, query_ids=text),
        "prefill": lambda: model(input_ids=text, memory=memory, use_cache=True, logits_to_keep=1),
        "generate 17 tokens": lambda: model.generate(text, memory=memory, max_new_tokens=17, do_sample=False),
    }
    pages = []
    for name, part in parts.items():
        part()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            elapsed = seconds(part)
        pages.append(f"== {name}: {elapsed * 1e3:.1f} ms with the profiler\n{kernel_table(recorded, elapsed)}")
    path.write_text("\n\n".join(pages) + "\n")
    print("\n\n".join(pages), flush=True)


def kernel_table(recorded: Any, elapsed: float) -> str:
    """Kernels by time, and the shares of matrix products, attention and the rest."""
    events = [e for e in recorded.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events)
    shares: dict[str, float] = {}
    for event in events:
        shares[kind(event.key)] = shares.get(kind(event.key), 0.0) + event.self_device_time_total
    lines = [f"device busy {total / 1e3:.1f} ms, {100 * total / 1e6 / elapsed:.1f}% of the time"]
    lines += [f"{name}: {us / 1e3:.1f} ms, {100 * us / total:.1f}%" for name, us in sorted(shares.items())]
    lines += [f"{e.self_device_time_total / 1e3:10.2f} ms {e.count:6d} x  {e.key[:110]}" for e in events[:24]]
    return "\n".join(lines)


def kind(kernel: str) -> str:
    """What a kernel is for, by its name."""
    name = kernel.lower()
    if "sharedllm" in name:
        return "this package's kernels"
    # before the matmuls: attention kernels have their libraries' names in theirs
    if any(word in name for word in ("flash", "fmha", "attention", "sdpa")):
        return "attention of PyTorch"
    if any(word in name for word in ("gemm", "nvjet", "cutlass", "gemv", "cublas", "splitk")):
        return "matrix products"
    return "others"


def tables(rows: list[Row], about: dict[str, str], running: int) -> str:
    """Markdown tables, one for each shape, and one of second questions."""
    dtype = "float32" if about["gpu"] == "CPU" else "bfloat16"
    text = [
        f"{about['gpu']}, driver {about['driver']}, CUDA {about['cuda']}, torch {about['torch']}, commit "
        f"{about['commit']}, {about['date']}. Context + {running} running tokens, {dtype}, batch 1, random "
        "weights. Compress includes everything of the compressor but the choice of nodes (retrieve). Graph: what "
        "the first decoding over a memory costs once. State: context memory, or key/value cache. Rest: peak without "
        "weights and state."
    ]
    for shape in dict.fromkeys(row.shape for row in rows):
        text += ["", f"### {shape}", ""]
        text += [f"| context | system | {' | '.join(COLUMNS)} |", f"| ---: | --- |{' ---: |' * len(COLUMNS)}"]
        for row in sorted((row for row in rows if row.shape == shape), key=lambda row: (row.context, row.system)):
            if row.note:
                text.append(f"| {row.context} | {row.system} | {row.note} |{' |' * (len(COLUMNS) - 1)}")
                continue
            cells = (
                digits(row.first_token, 3),
                digits(row.retrieve * 1e3, 1),
                digits(row.compress, 3),
                digits(row.prefill, 3),
                digits(row.per_token * 1e3, 2),
                digits(row.graph * 1e3, 0),
                digits(row.state / GB if row.state else math.nan, 2),
                digits(row.peak / GB, 1),
                digits((row.peak - row.weights - row.state) / GB, 2),
            )
            text.append(f"| {row.context} | {row.system} | {' | '.join(cells)} |")
    return "\n".join([*text, *second_questions([row for row in rows if not math.isnan(row.second)])])


def second_questions(rows: list[Row]) -> list[str]:
    """A Markdown table of the rows with an index."""
    if not rows:
        return []
    heads = ("first token, s", "index, s", "choose, ms", "of the first token, %", "second question, s", "index, GB")
    text = [
        "",
        "### A second question, from an index",
        "",
        f"| shape | context | system | {' | '.join(heads)} | memories |",
    ]
    text.append(f"| --- | ---: | --- |{' ---: |' * (len(heads) + 1)}")
    for row in rows:
        cells = (
            digits(row.first_token, 3),
            digits(row.index, 3),
            digits(row.choose * 1e3, 2),
            digits(100 * row.choose / row.first_token, 2),
            digits(row.second, 4),
            digits(row.index_bytes / GB, 3),
            digits(row.index_bytes / row.state, 2),
        )
        text.append(f"| {row.shape} | {row.context} | {row.system} | {' | '.join(cells)} |")
    return text


def digits(value: float, places: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{places}f}"


def plots(rows: list[Row], about: dict[str, str]) -> None:
    """Time to the first token and peak memory against the context, both axes logarithmic."""
    folder = ROOT / "benchmarks" / "plots"
    folder.mkdir(exist_ok=True)
    for shape in dict.fromkeys(row.shape for row in rows):
        title = f"{shape}, {about['gpu']}, {about['commit']}, {about['date'][:10]}"
        for field, label, scale in (("first_token", "time to first token, s", 1.0), ("peak", "peak memory, GB", GB)):
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                value = getattr(row, field) / scale
                if row.shape == shape and not row.note and value > 0:
                    lines.setdefault(row.system, []).append((row.context, value))
            (folder / f"{shape}_{field}.svg").write_text(line_plot(lines, title, "context, tokens", label))


if __name__ == "__main__":
    sys.exit(main())

"""The GPU benchmarks' own logic, without a GPU: comparison with a baseline, checks, tables."""

import dataclasses
import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))
(
    baseline,
    cases,
    run_gpu,
    bench_append,
    bench_end_to_end,
    bench_documents,
    bench_memory_file,
    bench_questions,
    bench_tiers,
    bench_training,
) = (
    importlib.import_module(name)
    for name in (
        "baseline",
        "cases",
        "run_gpu",
        "bench_append",
        "bench_end_to_end",
        "bench_documents",
        "bench_memory_file",
        "bench_questions",
        "bench_tiers",
        "bench_training",
    )
)
sys.path.remove(str(FOLDER))


def test_every_benchmark_of_ours_runs_on_the_cpu() -> None:
    # once each, without measuring; bench_gpu.py has its cases below
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    command += ["--ignore", str(FOLDER / "bench_gpu.py"), "-k", "cpu and not eager and not fused or ours and not cuda"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent)
    passed = re.search(r"(\d+) passed", result.stdout)
    assert result.returncode == 0 and passed and int(passed[1]) > 25, result.stdout[-2000:] + result.stderr[-2000:]


def never(case: str) -> float:
    raise AssertionError(f"{case} was measured again")


@pytest.mark.parametrize(
    ("before", "now", "slower"),
    [
        (1000.0, 1050.0, False),
        (1000.0, 1050.1, True),
        (1000.0, 10.0, False),
        (4.0, 5.0, False),
        (4.0, 5.1, True),
        (20.0, 21.0, False),
        (1000.0, math.nan, True),
        (1000.0, math.inf, True),
    ],
)
def test_slower_by_more_than_five_per_cent_and_a_microsecond(before: float, now: float, slower: bool) -> None:
    assert baseline.is_slower(before, now) is slower


def test_nothing_is_measured_again_without_a_suspicion() -> None:
    assert baseline.compare({"a": 100.0, "b": 3.0}, {"a": 104.0, "b": 2.0, "new": 7.0}, never) == []


def test_a_suspicion_is_measured_again_and_the_fastest_counts() -> None:
    asked = []

    def again(case: str) -> float:
        asked.append(case)
        return {"noise": 101.0, "real": 119.0}[case]

    found = baseline.compare({"noise": 100.0, "real": 100.0}, {"noise": 200.0, "real": 120.0}, again)
    assert found == [baseline.Finding("real", 100.0, 119.0)]
    assert asked == ["noise"] + ["real"] * baseline.REPEATS
    assert str(found[0]) == "real: 119.0 us, baseline 100.0 us (+19.0%)"


def test_a_time_that_cannot_be_measured_again_stays() -> None:
    found = baseline.compare({"a": 100.0}, {"a": 200.0}, lambda case: math.nan)
    assert found == [baseline.Finding("a", 100.0, 200.0)]


def test_a_missing_case_is_a_finding() -> None:
    (found,) = baseline.compare({"a": 100.0}, {}, never)
    assert found.case == "a" and math.isnan(found.now)
    assert str(found) == "a: expected a time (baseline 100.0 us), got none"


def test_a_baseline_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "gpu.json"
    baseline.save(path, {"gpu": "GPU", "date": "today"}, {"copy": 3.123456e12}, {"a": 1.236, "b": math.nan})
    content = baseline.load(path)
    assert content == {"gpu": "GPU", "date": "today", "ceilings": {"copy": 3.123e12}, "microseconds": {"a": 1.24}}
    assert baseline.ceiling_changes(content["ceilings"], {"copy": 3.2e12}) == []
    (change,) = baseline.ceiling_changes(content["ceilings"], {"copy": 2.5e12})
    assert change == "copy: 2.5e+12, baseline 3.123e+12 (-19.9%)"


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"microseconds": {}}', '{"microseconds": {"a": 0}}'])
def test_what_is_no_baseline_is_an_error(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"gpu\.json: expected"):
        baseline.load(path)


def test_stored_baselines_name_existing_cases() -> None:
    names = {case.name for case in cases.CASES}
    for path in baseline.FOLDER.glob("*.json"):
        content = baseline.load(path)
        assert baseline.path_of(content["gpu"]) == path
        assert set(content["microseconds"]) <= names


def test_file_of_a_gpu() -> None:
    assert baseline.path_of("NVIDIA H100 80GB HBM3").name == "NVIDIA-H100-80GB-HBM3.json"


def test_names_are_unique_and_floors_positive() -> None:
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    ceilings = {"copy": 3e12, "read": 3e12, "gemm": 7e14}
    assert all(case.floor_us(ceilings) > 0 and case.bytes > 0 for case in cases.CASES)
    (case,) = (case for case in cases.CASES if case.shape == "32/8, 4096 x 16384, 128")
    assert case.flops == 4 * 32 * 128 * 4096 * 16384


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "DEVICE", "cpu")
    for name, value in {"CHUNK": 64, "TOKENS": 2048, "Q_HEADS": 4, "KV_HEADS": 2, "SIZE": 16}.items():
        monkeypatch.setattr(cases, name, value)


FUSED = (
    "silu_product",
    "silu_product_fp8",
    "rms_norm",
    "rms_norm_fp8",
    "add_rms_norm",
    "add_rms_norm_fp8",
    "quantize_rows_fp8",
)


def built() -> dict[str, Any]:
    """One case of each kind, at the size of the fixture."""
    ragged = cases.Attention((5, 1, 300), (70, 513, 40), 4, 2, 16)
    return {
        "attention": cases.build_attention(ragged, None),
        "attention_backward": cases.build_attention_backward(
            cases.one_row(9, 70, q_heads=4, kv_heads=2, size=16), True
        ),
        "attention_grad_q": cases.build_attention_backward(cases.one_row(9, 70, q_heads=4, kv_heads=2, size=16), False),
        "compression": cases.build_compression(False),
        "memory_alone": cases.build_compression(True),
        "compression_backward": cases.build_compression_backward(),
        "node_vectors": cases.build_node_vectors(9, 2),
        "topk": cases.build_topk(1, 400, 32, 64),
        "siblings": cases.build_topk(30, 2, 2, 64),
        "retrieval": cases.build_retrieval(9),
        **{name: cases.build_fused(name, 5, 64) for name in FUSED},
        **{step: cases.build_tree(9, step) for step in ("split", "select", "layout", "all")},
    }


@pytest.mark.usefixtures("small")
def test_checks_accept_right_results_and_peers_compute_the_same() -> None:
    for name, case in built().items():
        assert case.check() is None, name
        for peer in case.prepare.keys() - {"flash", "cudnn", "padded", "compile"}:
            case.prepare[peer]()()


@pytest.mark.usefixtures("small")
def test_checks_refuse_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(function: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            first, *rest = (result,) if isinstance(result, torch.Tensor) else result
            first = first.clone()
            if first.numel():
                first.view(-1)[-1] += 1
            return first if isinstance(result, torch.Tensor) else (first, *rest)

        return run

    for name in ("injected_attention", "chunk_compression", "chunk_compression_backward", "node_vectors"):
        monkeypatch.setattr(cases, name, spoiled(getattr(cases, name)))
    for name in ("split", "select", "layout"):
        monkeypatch.setattr(cases.OURS, name, spoiled(getattr(cases.OURS, name)))
    monkeypatch.setattr(cases.ops, "topk_nodes", spoiled(cases.ops.topk_nodes))
    for name in ("silu_product", "rms_norm", "add_rms_norm"):
        monkeypatch.setattr(cases.ops, name, spoiled(getattr(cases.ops, name)))
    for name, case in built().items():
        # what the spoiling does not reach, or what fails before the check can see it
        if name not in (
            "memory_alone",
            "attention_backward",
            "attention_grad_q",
            "retrieval",
            "all",
        ) and not name.endswith("_fp8"):
            assert case.check(), name


def test_nan_never_passes() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    for bad in (torch.nan, torch.inf):
        assert cases.too_far("x", torch.tensor([1, 1, bad]), torch.ones(3), exact)
    assert cases.too_far("x", torch.ones(2), torch.ones(3), exact)
    assert cases.too_far("x", torch.ones(3), torch.ones(3), exact) is None


def test_a_section_is_replaced_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n\nCPU\n")
    run_gpu.write_section(path, "one", "first")
    run_gpu.write_section(path, "two", "other")
    run_gpu.write_section(path, "one", "second")
    text = path.read_text()
    assert text.startswith("# Results\n\nCPU\n") and "first" not in text
    assert text.index("second") < text.index("other")
    assert text.count("begin") == text.count("end -->") == 2


class FakeSession(run_gpu.Session):  # type: ignore[name-defined, misc]
    def __init__(self, chosen: Any) -> None:
        self.chosen, self.peers, self.failures = chosen, True, 0
        self.header = dict.fromkeys(("gpu", "driver", "cuda", "torch", "commit", "date"), "?")
        self.ceilings = {"copy": 3e12, "read": 2e12, "gemm": 7e14}
        self.results: dict[str, dict[str, float]] = {case.name: {} for case in chosen}
        self.notes: dict[str, str] = {}
        self.red: dict[str, str] = {}
        self.end = math.inf


def case_of(operator: str, message: str | None, flops: float = 7e9) -> Any:
    call = {"ours": lambda: lambda: None, "peer": lambda: lambda: None}
    built = cases.Built(call, lambda: message)
    return cases.Case(operator, "Table", f"shape of {operator}", flops, 3e6, ("peer",), lambda: built)


def test_a_red_operator_gets_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run_gpu, "median_us", lambda call, seconds=0: 20.0)
    session = FakeSession([case_of("good", None), case_of("bad", "out: wrong")])
    session.check()
    session.time()
    assert session.failures == 1 and session.times() == {"Table: shape of good": 20.0}
    good, bad = session.report().splitlines()[-2:]
    # 7e9 operations take 10 us at the ceiling
    assert good == "| shape of good | 20.0 | 350.0 | 150 | 50% | 1.00 | - | peer 20.0 |"
    assert bad == "| shape of bad | red | - | - | - | - | - | - |"
    assert "red: bad" in session.verdict(0)
    assert "bad: red: Table: shape of bad: out: wrong" in capsys.readouterr().err
    json.dumps(session.document())


def test_a_failure_is_named_and_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_gpu, "median_us", lambda call, seconds=0: call() or 20.0)

    def fail() -> None:
        raise RuntimeError("no such kernel\nstack")

    def not_here() -> Any:
        raise cases.Unavailable("no switch")

    good, peerless, failing, missing = (case_of(name, None) for name in ("good", "peerless", "failing", "missing"))
    peerless.build().prepare["peer"] = fail
    failing.build().prepare["ours"] = lambda: fail
    missing = run_gpu.Case("missing", "Table", "shape of missing", 0, 1, (), not_here)
    session = FakeSession([good, failing, peerless, missing])
    session.check()
    session.time()
    lines = session.report().splitlines()[-4:]
    assert [line.split(" | ")[1] for line in lines] == [
        "20.0",
        "RuntimeError: no such kernel",
        "20.0",
        "not here: no switch",
    ]
    assert lines[2].endswith("| - | - | peer - |")
    assert session.failures == 1 and "failing (RuntimeError: no such kernel)" in session.verdict(0)


def test_a_slowdown_is_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run_gpu, "median_us", lambda call, seconds=0: 20.0)
    known = [case_of("a", None), case_of("b", None)]
    monkeypatch.setattr(cases, "CASES", known)
    session = FakeSession(known)
    session.time()
    names = [case.name for case in known]
    content = {"microseconds": {names[0]: 20.0, names[1]: 10.0, "gone": 5.0}, "ceilings": {"gemm": 8e14}}
    assert session.compare(content) == 2
    printed = capsys.readouterr().out
    assert f"slower: {names[1]}: 20.0 us, baseline 10.0 us (+100.0%)" in printed
    assert "slower: gone: expected a case of this name" in printed
    assert "the machine differs from the baseline's: gemm" in printed
    assert session.compare({"microseconds": {names[0]: 19.9}}) == 0


def test_end_to_end_tables_and_plots_from_stored_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    header = {"gpu": "G", "driver": "1", "cuda": "2", "torch": "3", "commit": "abc", "date": "2026-01-02 03:04 UTC"}
    rows = [
        bench_end_to_end.Row("llama-2-7b", "M = 4", 8192, 0.1, 0.01, 0.05, 0.02, 0.005, 0.1, 13, 10**9, 16 * 10**9),
        bench_end_to_end.Row("llama-2-7b", "M = 4", 16384, 0.2, peak=17 * 10**9),
        bench_end_to_end.Row("llama-2-7b", "full attention", 8192, note="out of memory"),
    ]
    files = []
    for index, row in enumerate(rows):
        files.append(tmp_path / f"{index}.json")
        files[-1].write_text(json.dumps({"header": header, "rows": [dataclasses.asdict(row)]}))
    (tmp_path / "benchmarks").mkdir()
    results = tmp_path / "benchmarks" / "RESULTS.md"
    results.write_text("# Results\n")
    monkeypatch.setattr(bench_end_to_end, "ROOT", tmp_path)
    for _ in range(2):
        assert bench_end_to_end.main(["--write", "--merge", *map(str, files)]) == 0
    table = results.read_text()
    cells = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert len(cells) == 1, "header, rule and rows of one width"
    assert table.count("### llama-2-7b") == 1 and "| 8192 | full attention | out of memory |" in table
    assert "| 8192 | M = 4 | 0.100 | 10.0 | 0.050 | 0.020 | 5.00 |" in table
    plot = (tmp_path / "benchmarks" / "plots" / "llama-2-7b_first_token.svg").read_text()
    assert "M = 4" in plot and "16K" in plot and "full attention" not in plot
    files[0].write_text(json.dumps({"header": {**header, "gpu": "H"}, "rows": []}))
    assert bench_end_to_end.main(["--merge", *map(str, files)]) == 2
    assert "expected runs of one machine and commit, got other ['gpu'" in capsys.readouterr().err


def test_end_to_end_asks_a_second_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    tiny = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    monkeypatch.setitem(bench_end_to_end.SHAPES, "tiny", {**tiny, **heads})
    options = ["--cpu", "--index", "--no-peers", "--shapes", "tiny", "--layers", "2", "--contexts", "2048"]
    options += ["--running", "16", "--question", "8", "--tokens", "1", "--json", str(tmp_path / "run.json")]
    assert bench_end_to_end.main(options) == 0
    (row,) = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert 0 < row["choose"] < row["second"] and row["index"] > 0
    # 14 nodes instead of 4, and 6 vectors of 64 beside 4 * 32 slots of 2 keys and values of 64
    assert row["index_bytes"] / row["state"] == 3.5 + 6 * 64 / (128 * 2 * 2 * 64)
    table = capsys.readouterr().out.split("### A second question, from an index\n\n")[1]
    assert len({line.count("|") for line in table.splitlines()}) == 1, "header, rule and rows of one width"
    assert table.splitlines()[2].startswith("| tiny | 2048 | M = 2 |") and table.splitlines()[2].endswith("| 3.51 |")


def test_questions_over_one_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    tiny = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3}
    monkeypatch.setitem(bench_end_to_end.SHAPES, "tiny", {**tiny, "num_attention_heads": 2, "num_key_value_heads": 2})
    options = ["--cpu", "--shape", "tiny", "--layers", "2", "--context", "2048", "--rows", "1", "3", "--question", "8"]
    assert bench_questions.main([*options, "--tokens", "2", "--json", str(tmp_path / "run.json")]) == 0
    written = json.loads((tmp_path / "run.json").read_text())
    assert [row["rows"] for row in written["rows"]] == [1, 3] and min(written["first token"].values()) > 0
    assert all(row["batch"] > 0 and row["join"] > 0 for row in written["rows"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("over one memory of 2048 tokens, random weights.")
    assert len({line.count("|") for line in lines[4:]}) == 1 and lines[-1].startswith("| 3 |")
    # the same from what was stored, and a plot of it
    stored = ["--stored", str(tmp_path / "run.json"), "--plot", str(tmp_path / "plot.svg")]
    assert bench_questions.main(stored) == 0 and capsys.readouterr().out.splitlines() == lines
    drawn = (tmp_path / "plot.svg").read_text()
    assert drawn.startswith("<svg") and "tiny, M = 2, one memory of 2048 tokens" in drawn and "ContinuousBatch" in drawn
    if not torch.cuda.is_available():
        assert bench_questions.main(["--rows", "1"]) == 2


def test_training_steps_beside_full_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    tiny = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3}
    monkeypatch.setitem(bench_end_to_end.SHAPES, "tiny", {**tiny, "num_attention_heads": 2, "num_key_value_heads": 2})
    size = bench_training.Size(layers=2, rows=2, context=1024, running=16, trained="paper", peer=True)
    monkeypatch.setitem(bench_training.CASES, "tiny", size)
    before, steps = {}, []

    def watched(loss: Any, model: Any, arguments: Any, profiled: bool = True) -> Any:
        before.update({name: x.clone() for name, x in model.named_parameters()})
        found = timed(loss, model, arguments, profiled)
        steps.append({name for name, x in model.named_parameters() if not x.equal(before[name])})
        return found

    timed = bench_training.timed
    monkeypatch.setattr(bench_training, "timed", watched)
    options = ["--cpu", "--cases", "tiny", "--steps", "1", "--json", str(tmp_path / "run.json")]
    assert bench_training.main(options) == 0
    ours, full = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert ours["tokens"] == full["tokens"] == 2 * 1040 and 0 < ours["host"] <= ours["step"]
    assert ours["system"] == "M = 2, 2 x (1024 + 16)" and full["system"] == "full attention, 2 x 1040"
    attention = {f"model.layers.2.self_attn.{name}_proj.weight" for name in "qkvo"}
    assert steps[1] == attention
    assert steps[0] > attention and all(".injection." in name for name in steps[0] - attention)
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines[2:]}) == 1 and len(lines) == 6
    if not torch.cuda.is_available():
        assert bench_training.main([]) == 2


def test_appending_by_the_length_of_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    tiny = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3}
    monkeypatch.setitem(bench_end_to_end.SHAPES, "tiny", {**tiny, "num_attention_heads": 2, "num_key_value_heads": 2})
    options = ["--cpu", "--shape", "tiny", "--layers", "2", "--tokens", "2048", "8192", "--repeats", "2"]
    assert bench_append.main([*options, "--json", str(tmp_path / "run.json")]) == 0
    written = json.loads((tmp_path / "run.json").read_text())
    assert [row["tokens"] for row in written["rows"]] == [2048, 8192] and written["layers"] == 2
    assert all(min(row["append"], row["alone"], row["room"]) > 0 for row in written["rows"])
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines[2:]}) == 1 and lines[-1].startswith("| 8192 |")
    stored = ["--stored", str(tmp_path / "run.json"), "--plot", str(tmp_path / "plot.svg")]
    assert bench_append.main(stored) == 0 and capsys.readouterr().out.splitlines() == lines
    assert "append 1024 tokens" in (tmp_path / "plot.svg").read_text()
    if not torch.cuda.is_available():
        assert bench_append.main([]) == 2


def test_kernels_are_sorted_by_what_they_are_for() -> None:
    kind = bench_end_to_end.kind
    assert kind("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>") == kind(
        "fmha"
    )
    assert kind("nvjet_sm90_tst_192x192_64x4_1x2_h_bz_coopB_TNN") == "matrix products"
    assert kind("void sharedllm::sm90::injected_attention<__nv_bfloat16, 128>") == "this package's kernels"
    assert kind("Memcpy DtoD (Device -> Device)") == "others"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a tiny shape that the GPU's kernels do not take")
def test_several_documents_on_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(bench_end_to_end.SHAPES, "tiny", {**tiny, **heads})
    assert bench_documents.main(["--shape", "tiny"]) == 2
    few = ["--layers", "2", "--context", "8192", "--documents", "1", "4", "--tokens", "2", "--repeats", "1"]
    assert bench_documents.main(["--cpu", "--shape", "tiny", *few]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\n\| 4 \| [\d.]+ \| [+-][\d.]+ % \|", printed)
    found = json.loads(printed.splitlines()[-1])["found"]
    assert [row["documents"] for row in found] == [1, 4] and found[1]["first"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a tiny shape that the GPU's kernels do not take")
def test_memories_in_tiers_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(bench_end_to_end.SHAPES, "tiny", {**tiny, **heads})
    assert bench_tiers.main(["--shape", "tiny"]) == 2
    sizes = ["--tokens", "300000", "--resident", "4096", "--chunks", "3", "--question", "5", "--answer", "2"]
    few = ["--layers", "2", "--repeats", "1", "--fill-seconds", "0", "--folder", str(tmp_path)]
    assert bench_tiers.main(["--cpu", "--shape", "tiny", *sizes, *few]) == 0
    printed = capsys.readouterr().out
    # as many pages as one waits for at least
    assert "tiered memory: 262,144 tokens" in printed
    found = json.loads(printed.splitlines()[-1])
    assert found["tokens_held"] == 262144 and found["pick and bring"] > 0 and found["disk_gb_s"] > 0


def test_files_of_memories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_memory_file.main(["--tokens", "1000"]) == 2
    threads = torch.get_num_threads()
    few = ["--layers", "1", "--tokens", "2048", "--repeats", "2", "--folder", str(tmp_path)]
    try:
        assert bench_memory_file.main(few) == 0
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found["bytes"] == 2 * 256 * 8 * 128 * 2 and not list(tmp_path.iterdir())
    assert all(len(times["cpu"]) == len(times["wall"]) == 2 for times in found["found"].values())
    ratios = {line.split(" | ")[0].strip("| "): line.rsplit("| ", 1)[1] for line in lines if line.startswith("| ")}
    assert ratios["load"] != "- |" and ratios["save, torch.save"] != "- |" and ratios["checksum, ours"] == "- |"

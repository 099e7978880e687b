"""The demo model's scripts: licence decisions, split, windows, evaluation points; a small run of the preparation."""

import itertools
import json
import math
import subprocess
import sys
from email.message import Message
from pathlib import Path

import numpy as np
import pytest
import torch

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo_model"
sys.path.insert(0, str(DEMO))

import common  # noqa: E402
import evaluate  # noqa: E402
import files  # noqa: E402
import pick_model  # noqa: E402
import prepare_data  # noqa: E402


def fields(*pairs: tuple[str, str]) -> Message:
    message = Message()
    for name, value in pairs:
        message[name] = value
    return message


@pytest.mark.parametrize(
    ("expression", "permissive"),
    [
        ("MIT", True),
        ("BSD-3-Clause AND Apache-2.0", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("(MIT OR GPL-3.0-only) AND ISC", True),
        ("mit", True),
        ("GPL-3.0-or-later WITH GCC-exception-3.1", False),
        ("MIT AND GPL-2.0-only", False),
        ("MPL-2.0 AND MIT", False),
        ("LicenseRef-Proprietary", False),
        ("MIT AND", False),
        ("(MIT", False),
        ("MIT MIT", False),
        ("MIT WITH", False),
        ("", False),
    ],
)
def test_spdx_expressions(expression: str, permissive: bool) -> None:
    assert prepare_data.spdx_permissive(expression) is permissive


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ((("License-Expression", "MIT"),), "MIT"),
        ((("License-Expression", "GPL-3.0"), ("License", "MIT")), None),
        ((("Classifier", "License :: OSI Approved :: BSD License"),), "BSD"),
        ((("Classifier", "License :: OSI Approved"), ("License", "Apache License, Version 2.0")), "Apache-2.0"),
        ((("Classifier", "License :: OSI Approved :: MIT License"), ("License", "GPLv3 or MIT: GNU GPL")), None),
        ((("Classifier", "License :: Other/Proprietary License"), ("License", "MIT")), None),
        ((("License", "BSD 3-Clause License"),), "BSD"),
        ((("License", "3-Clause BSD License"),), "BSD"),
        ((("License", "Apache 2.0"),), "Apache-2.0"),
        ((("License", "BSD-3-Clause"),), "BSD-3-Clause"),
        ((("License", "NVIDIA Proprietary Software"),), None),
        ((("License", "see LICENSE.txt"),), None),
        ((), None),
    ],
)
def test_licence_metadata(metadata: tuple[tuple[str, str], ...], licence: str | None) -> None:
    decision = prepare_data.permissive_licence(fields(*metadata))
    assert (decision and decision[0]) == licence


def test_split_is_stable_and_by_package() -> None:
    assert prepare_data.split_of(prepare_data.STDLIB, 0.0) == "heldout"
    assert prepare_data.split_of("sympy", 0.0) == "heldout"
    assert prepare_data.split_of("torch", 1.0) == "train"
    names = [f"package-{i}" for i in range(2000)]
    share = sum(prepare_data.split_of(name, 0.05) == "heldout" for name in names) / len(names)
    assert 0.03 < share < 0.07


def test_held_out_copy_of_a_file_wins() -> None:
    train = prepare_data.Package(
        "a", "1", "MIT", "License", "train", [], ["# a/x.py\nx = 1\n\n", "# a/y.py\ny = 1\n\n"]
    )
    held = prepare_data.Package("b", "1", "MIT", "License", "heldout", [], ["# b/x.py\nx = 1  \n\n"])
    prepare_data.drop_duplicates([train, held])
    assert held.texts == ["# b/x.py\nx = 1  \n\n"]
    assert train.texts == ["# a/y.py\ny = 1\n\n"]
    assert train.dropped == {"duplicate": 1}


def test_windows_stay_inside_a_package() -> None:
    documents = [common.Document(str(i), np.full(size, i, dtype=np.uint16)) for i, size in enumerate((5, 3, 9, 4))]
    windows = common.Windows(documents, 4, torch.device("cpu"), seed=0)
    assert windows.total == 2 + 6 + 1
    batch = windows.sample(500)
    assert batch.shape == (500, 4)
    assert (batch == batch[:, :1]).all()
    assert set(batch[:, 0].tolist()) == {0, 2, 3}
    with pytest.raises(SystemExit, match="no package has 10 tokens: the longest has 9"):
        common.Windows(documents, 10, torch.device("cpu"), seed=0)


def test_evaluation_points_share_fairly_and_do_not_overlap() -> None:
    sizes = [1000, 5000, 90, 100_000]
    points = evaluate.choose_points(sizes, window=50, context=800, count=40)
    assert len(points) == 40
    counts = [sum(p.document == i for p in points) for i in range(4)]
    assert counts == [4, 18, 0, 18]
    for i, size in enumerate(sizes):
        starts = sorted(p.start for p in points if p.document == i)
        assert all(800 <= s <= size - 50 for s in starts)
        assert all(b - a >= 50 for a, b in itertools.pairwise(starts))


def test_paired_interval_covers_the_difference() -> None:
    generator = np.random.default_rng(0)
    window_only = generator.normal(1.7, 0.3, 120)
    change = evaluate.compare(window_only - 0.06 + generator.normal(0, 0.02, 120), window_only)
    assert change["low"] < change["percent"] < change["high"] < -5
    assert change["percent"] == pytest.approx(100 * math.expm1(-0.06), abs=0.5)


def test_schedule_warms_up_and_decays() -> None:
    values = [common.learning_rate_factor(p) for p in np.linspace(0, 1, 101)]
    assert values[0] < 0.01 and max(values) == pytest.approx(1.0, abs=0.01)
    assert values[-1] == pytest.approx(0.02)
    assert all(a >= b for a, b in itertools.pairwise(values[5:]))


def test_prepare_data_from_installed_packages(tmp_path: Path) -> None:
    """The script on a folder with one permissive and one copyleft package."""
    site = tmp_path / "site"
    source = "\n".join(f"def function_{i}(value):\n    return value + {i}\n" for i in range(200))
    for name, licence in (("alpha", "MIT"), ("omega", "GPL-3.0-only")):
        package, info = site / name, site / f"{name}-1.0.dist-info"
        package.mkdir(parents=True)
        info.mkdir()
        (package / "__init__.py").write_text(source.replace("value", name))
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\nLicense-Expression: {licence}\n"
        )
        (info / "RECORD").write_text(f"{name}/__init__.py,,\n{name}-1.0.dist-info/METADATA,,\n")
    out = tmp_path / "data"
    command = [sys.executable, str(DEMO / "prepare_data.py"), "--out", str(out), "--path", str(site)]
    subprocess.run([*command, "--vocab-size", "512", "--workers", "2"], check=True, capture_output=True, timeout=240)
    listing = json.loads((out / "packages.json").read_text())
    rows = {row["name"]: row for row in listing["packages"]}
    assert set(rows) == {"alpha", prepare_data.STDLIB}
    assert listing["left_out"] == [{"name": "omega", "version": "1.0", "licence": "GPL-3.0-only"}]
    assert rows["alpha"]["split"] == "train" and rows[prepare_data.STDLIB]["split"] == "heldout"
    document = common.load_documents(out, "train")[0]
    assert len(document) == rows["alpha"]["tokens"] and document.tokens.dtype == np.uint16

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    text = tokenizer.decode(document.tokens.tolist())
    assert text == f"# alpha/__init__.py\n{source.replace('value', 'alpha').rstrip()}\n\n{files.EOS}"


def test_better_model_within_the_size_limit_is_picked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, perplexity in (("injected+upper-attention", 5.5), ("everything", 5.4)):
        rows = [{"context": 0, "perplexity": 1.0}, {"context": 8192, "perplexity": perplexity}]
        files.write_json(tmp_path / "results" / f"{name}.json", {"rows": rows})
        files.write_json(tmp_path / name / "config.json", {"model": name})
        files.write_json(tmp_path / name / "training.json", {})
    out = tmp_path / "model"
    monkeypatch.setattr(sys, "argv", ["pick_model.py", "--work", str(tmp_path), "--out", str(out)])
    pick_model.main()
    assert json.loads((out / "config.json").read_text()) == {"model": "everything"}
    assert [f.name for f in out.iterdir()] == ["config.json"]
    (tmp_path / "everything" / "model.safetensors").write_bytes(bytes(pick_model.LIMIT))
    with pytest.raises(SystemExit, match=r"everything has \d+ bytes, more than the 16777216"):
        pick_model.main()


def test_unknown_stage_is_refused(tmp_path: Path) -> None:
    command = ["bash", str(DEMO / "run_all.sh"), "data", "inject"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown stage 'inject': expected one of data base inject-paper" in done.stderr

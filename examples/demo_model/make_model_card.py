"""Write MODEL_CARD.md from the measured results; every figure in it is read from a JSON file.

python make_model_card.py --work work --out work/model
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from evaluate import markdown
from files import log, read_json
from pick_model import MODELS

LABELS = {
    "injected+upper-attention": "the injected blocks and the self-attention of the layers above them",
    "everything": "everything",
}


def millions(count: float) -> str:
    return f"{count / 1e6:.2f}M"


def package_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| package | version | licence | bytes | tokens |", "| --- | --- | --- | --- | --- |"]
    for row in sorted(rows, key=lambda r: -r["tokens"]):
        licence = row["licence"].replace("|", "/")
        lines.append(f"| {row['name']} | {row['version']} | {licence} | {row['bytes']} | {row['tokens']} |")
    return "\n".join(lines)


def sizes(config: dict[str, Any]) -> str:
    text = config["text_config"]
    return (
        f"{text['num_hidden_layers']} layers, hidden size {text['hidden_size']}, MLP {text['intermediate_size']}, "
        f"{text['num_attention_heads']} query and {text['num_key_value_heads']} key/value heads of {text['head_dim']}, "
        f"vocabulary {text['vocab_size']} (byte-level BPE), tied embeddings; {config['injection_layers']} injected "
        f"layers, chunks of {config['chunk_size']} tokens, tree depth {config['tree_depth']}, "
        f"{config['slots_per_node']} slots a node, window {config['window']}"
    )


def training_row(name: str, training: dict[str, Any]) -> str:
    machine = training["machine"]
    return (
        f"| {name} | {training['seconds']:.0f} s | {training['steps']} | {millions(training['tokens'])} "
        f"| {training['arguments']['batch']} | {machine['device']} | {machine['torch']} |"
    )


def stage_table(path: Path) -> str:
    """Seconds of each stage of run_all.sh; of a repeated stage the last time."""
    seconds = {row["stage"]: row["seconds"] for row in map(json.loads, path.read_text().splitlines())}
    lines = ["| stage of run_all.sh | seconds |", "| --- | --- |"]
    lines += [f"| {stage} | {value} |" for stage, value in seconds.items() if stage != "card"]
    return "\n".join([*lines, f"| together | {sum(v for s, v in seconds.items() if s != 'card')} |"])


def render(work: Path, model: Path) -> str:
    listing = read_json(work / "data" / "packages.json")
    pick = read_json(work / "results" / "pick.json")
    config = read_json(model / "config.json")
    results = {
        n: read_json(work / "results" / f"{n}.json") for n in MODELS if (work / "results" / f"{n}.json").is_file()
    }
    base_result = read_json(work / "results" / "base.json")
    base = read_json(work / "base" / "training.json")
    trained = {name: read_json(work / name / "training.json") for name in results}
    chosen = trained[pick["model"]]
    split = {s: [r for r in listing["packages"] if r["split"] == s] for s in ("train", "heldout")}
    totals = listing["totals"]
    points = results[pick["model"]]["points"]
    times = work / "results" / "times.jsonl"

    parts = [
        "# SharedLLM demo model: Python source",
        (
            f"A small SharedLLM of {millions(chosen['parameters'])} parameters that predicts Python source code. "
            "It shows on any machine, within minutes, that text far beyond the window lowers perplexity. "
            "It is too small to write useful code."
        ),
        "## What it is",
        (
            f"- Sizes: {sizes(config)}.\n"
            f"- Trained in self-injection: {LABELS[pick['model']]}; the compressor shares the decoder's weights.\n"
            f"- Files: {pick['bytes'] / 2**20:.2f} MiB in all, weights in bfloat16."
        ),
        "## Measured",
        (
            f"Perplexity of the same {base_result['scored_tokens']} tokens with growing context, "
            f"over {len(points)} points of {len({name for name, _ in points})} held-out documents; "
            "the context is the text right before the running text. "
            "95% intervals from a paired bootstrap over points. "
            f"The base model alone, {base_result['window']}-token window: {base_result['rows'][0]['perplexity']:.3f}."
        ),
    ]
    for name, result in results.items():
        machine = result["machine"]
        mark = " (this model)" if name == pick["model"] else ""
        parts.append(
            f"Trained: {LABELS[name]}{mark}. {machine['device']}, torch {machine['torch']}, {result['dtype']}."
        )
        parts.append(markdown(result))
    lengths = [str(row["context"]) for row in results[pick["model"]]["rows"]]
    parts += [
        "By document:",
        "\n".join(
            ["| document | points | " + " | ".join(lengths) + " |", "| --- " * (len(lengths) + 2) + "|"]
            + [
                f"| {name} | {results[pick['model']]['documents'][name]} | "
                + " | ".join(f"{values[length]:.3f}" for length in lengths)
                + " |"
                for name, values in results[pick["model"]]["by_document"].items()
            ]
        ),
        "## Training",
        "\n".join(
            [
                "| stage | time | steps | tokens | batch | device | torch |",
                "| --- | --- | --- | --- | --- | --- | --- |",
            ]
            + [training_row("base, windows of 2048", base)]
            + [training_row(f"self-injection: {name}", training) for name, training in trained.items()]
        ),
        (
            "Self-injection reads 2048 running tokens after 0 to 6 chunks of 1024 context tokens; the loss is on "
            "the running text. The clock drives the learning-rate schedule, so a slower GPU reads less text."
        ),
        *([stage_table(times)] if times.is_file() else []),
        "## Data",
        (
            f"Python source of the packages installed on the training machine, permissive licences only: "
            f"{len(split['train'])} packages, {millions(totals['train']['tokens'])} tokens "
            f"({totals['train']['bytes'] / 1e6:.1f} MB). Held out by package: {len(split['heldout'])} packages, "
            f"{millions(totals['heldout']['tokens'])} tokens, among them the whole Python standard library. "
            "Identical files are kept once, and never in training if a held-out package has them. "
            "A package is one document: its files in path order, each under a line `# path`. "
            "Licences as the packages' own metadata state them."
        ),
        "### Training packages",
        package_table(split["train"]),
        "### Held-out packages",
        package_table(split["heldout"]),
        "## Limits",
        (
            "Trained on English-commented Python only. It repeats names and style from the context; its output "
            "is not checked for correctness. It may reproduce short passages of the packages listed above."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of data/, the checkpoints and results/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the chosen model; the card goes there")
    args = parser.parse_args()
    card = args.out / "MODEL_CARD.md"
    card.write_text(render(args.work, args.out), encoding="utf-8")
    log(f"wrote {card}")


if __name__ == "__main__":
    main()

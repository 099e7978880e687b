"""What ``sharedllm eval`` gives: a table, a JSON document, a plot."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from sharedllm_ext.cli._common import seconds
from sharedllm_ext.cli._output import Table
from sharedllm_ext.cli._progress import Progress
from sharedllm_ext.evaluation.generators import DEFAULT_DEPTHS
from sharedllm_ext.evaluation.harness import Evaluation, Prediction, Share, shares
from sharedllm_ext.evaluation.systems import System


def per_cent(value: float) -> str:
    """A share for people."""
    return f"{100 * value:.1f}"


def _interval(share: Share) -> str:
    return "" if share.interval is None else f"{per_cent(share.interval[0])} … {per_cent(share.interval[1])}"


class EvaluationTable:
    """Task by length by system; the rows of a task and length are printed when they are complete."""

    def __init__(
        self, rows: Sequence[tuple[str, int | str]], systems: Sequence[str], progress: Progress | None
    ) -> None:
        self.progress = progress
        self.group: tuple[str, int | str] | None = None
        self.waiting: list[Prediction] = []
        names = [task for task, _ in rows] + ["mean of tasks"]
        lengths = [_length(length) for _, length in rows]
        header = ["task", "length", "system", "questions", "score", "95% interval", "time/answer"]
        widths = [max(map(len, names)), max(map(len, lengths)), max(map(len, systems)), 9, 5, 13, 11]
        self.table = Table(header, widths)

    def take(self, prediction: Prediction) -> None:
        """Note a prediction."""
        group = prediction.task, prediction.length
        if self.group is not None and group != self.group:
            self._print()
        self.group = group
        self.waiting.append(prediction)

    def _print(self) -> None:
        for (task, length, system), share in shares(self.waiting, lambda p: (p.task, p.length, p.system)).items():
            spent = [p.seconds for p in self.waiting if p.system == system]
            cells = [task, _length(length), system, str(share.count), per_cent(share.mean), _interval(share)]
            self._write([*cells, seconds(sum(spent) / len(spent))])
        self.waiting = []

    def _write(self, cells: Sequence[str]) -> None:
        if self.progress is not None:
            self.progress.write(self.table.row(cells))

    def finish(self, result: Evaluation) -> None:
        """Print what is left, labels, and the means over several tasks."""
        self._print()
        for (name, value, system), share in result.by_label().items():
            if name != "length":
                cells = [f"{name} {value}", "", system, str(share.count), per_cent(share.mean), _interval(share), ""]
                self._write(cells)
        if len({prediction.task for prediction in result.predictions}) > 1:
            for (length, system), mean in result.means().items():
                self._write(["mean of tasks", _length(length), system, "", per_cent(mean), "", ""])


def _length(length: int | str) -> str:
    return f"{length:,}" if isinstance(length, int) else length


def _share(share: Share) -> dict[str, Any]:
    return {"questions": share.count, "score": share.mean, "interval_95": share.interval}


def document_of(
    args: argparse.Namespace, result: Evaluation, systems: Sequence[System], device: str, model: Any, spent: float
) -> dict[str, Any]:
    """The JSON document of a run that took ``spent`` seconds."""
    made = args.suite is None
    return {
        "model": args.model,
        "adapter": args.adapter,
        "base": args.base,
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "suite": args.suite,
        "data": args.data,
        "haystack": args.haystack,
        "seed": args.seed or 0 if made else None,
        "depths": list(args.depths or DEFAULT_DEPTHS) if made else None,
        "systems": {system.name: system.settings for system in systems},
        "results": [
            {"task": task, "length": length, "system": system, **_share(share)}
            for (task, length, system), share in result.by_length().items()
        ],
        "by_depth": [
            {"system": system.name, "depth": depth, "length": length, **_share(share)}
            for system in systems
            for (depth, length), share in result.by_depth(system.name).items()
        ],
        "by_label": [
            {"label": name, "value": value, "system": system, **_share(share)}
            for (name, value, system), share in result.by_label().items()
        ],
        "means": [
            {"length": length, "system": system, "score": mean} for (length, system), mean in result.means().items()
        ],
        "predictions": args.predictions,
        "answers": len(result.predictions),
        "answers_kept": sum(prediction.kept for prediction in result.predictions),
        "seconds": spent,
    }


def plot(result: Evaluation, systems: Sequence[str], path: str) -> None:
    """A heat map of depth by length for every system, over all tasks whose answer is in one place."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {system: result.by_depth(system) for system in systems}
    places = [group for groups in found.values() for group in groups]
    depths = sorted({depth for depth, _ in places})
    lengths = sorted({length for _, length in places})
    width = 1.6 + len(systems) * (1.2 + 0.8 * len(lengths))
    figure, panels = pyplot.subplots(
        1, len(systems), figsize=(width, 1.6 + 0.5 * len(depths)), squeeze=False, layout="constrained"
    )
    for axes, (system, groups) in zip(panels[0], found.items(), strict=True):
        values = [
            [100 * groups[depth, length].mean if (depth, length) in groups else math.nan for length in lengths]
            for depth in depths
        ]
        image: Any = axes.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if not math.isnan(value):
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center")
        axes.set_xticks(range(len(lengths)), [_length(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes.set_xlabel("tokens")
        axes.set_ylabel("depth, %")
        axes.set_title(system)
    figure.colorbar(image, ax=panels[0].tolist(), label="score, %")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)

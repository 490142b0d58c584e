"""`drn compare`: compare model files by size, latency, throughput and recall, in one table."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from runtime.backends.base import Device
from runtime.benchmarking import system_info
from runtime.benchmarking.model_opening import model_files, model_labels
from runtime.benchmarking.timing import Latency, Ratio, speed_ratio, time_interleaved
from runtime.benchmarking.workload import BenchmarkedModel, dataset_workload, pairs_with_known_words
from runtime.core import cpu_info
from runtime.core.agreement import compare_answers
from runtime.core.cli import check_plots, command, report_written, suggest_next_command
from runtime.core.errors import ModelFileError, check_option, printable_line
from runtime.core.io.atomic_files import atomic_write, check_report, write_json, write_text
from runtime.core.io.input_files import check_file
from runtime.core.repeat_filter import logged_once
from runtime.core.terminal import command_line
from runtime.datasets.dataset import DataSet
from runtime.grounding.evaluation import Evaluation, evaluate
from runtime.grounding.grounder import Grounder

FORMAT = "drn-comparison/1"
# Seconds of timing full batches, per model.
BATCH_SECONDS = 5.0
SHOWN_METRICS = ("R@1 IoU=0.5", "R@1 IoU=0.7", "mIoU")


@dataclasses.dataclass(frozen=True)
class ComparedModel:
    """The measurements of one model.

    Attributes:
        name: file name, or path where names are equal.
        size: size of all its files in bytes.
        latency: latency of one query on a known video, from text to moments.
        speed_up: relative to the first model in the same rounds; None for the first.
        metrics: recall and mIoU on all queries, as fractions.
        lost, gained: queries that only the first model, or only this model, answers with IoU 0.7.
        agreement: mean temporal IoU of its best moments with those of the first model.
    """

    name: str
    precision: str
    size: int
    latency: Latency
    queries_per_s: float
    speed_up: Ratio | None
    metrics: dict[str, float]
    lost: int
    gained: int
    agreement: float

    def cells(self) -> dict[str, str]:
        """Return the values by the names of the columns."""
        p99 = self.latency.p99_ms
        recalls = {name: f"{100 * self.metrics[name]:.2f}" if name in self.metrics else "-" for name in SHOWN_METRICS}
        return {
            "model": printable_line(self.name),
            "precision": self.precision,
            "MB": f"{self.size / 1e6:.1f}",
            "p50 ms": f"{self.latency.p50_ms:.3g}",
            "p99 ms": "-" if p99 is None else f"{p99:.3g}",
            "queries/s": f"{self.queries_per_s:.4g}",
            "speed-up": "1" if self.speed_up is None else f"{self.speed_up.median:.2f}",
            **recalls,
            "lost, gained (IoU 0.7)": f"{self.lost}, {self.gained}",
            "agreement": f"{self.agreement:.4f}",
        }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Models that were measured in one run on one data set."""

    models: tuple[ComparedModel, ...]
    notes: tuple[str, ...]
    environment: dict[str, Any]
    command: str

    def _rows(self) -> list[list[str]]:
        """Return the table with its header."""
        rows = [model.cells() for model in self.models]
        return [list(rows[0]), *(list(row.values()) for row in rows)]

    def text(self) -> str:
        """Return the table and the notes for a terminal."""
        rows = self._rows()
        first, *widths = (max(map(len, column)) for column in zip(*rows))
        lines = []
        for name, *cells in rows:
            padded = (cell.rjust(width) for cell, width in zip(cells, widths))
            lines.append("  ".join([name.ljust(first), *padded]))
        return "\n".join([*lines, *self.notes])

    def markdown(self) -> str:
        """Return the table and the notes as Markdown."""
        header, *rows = self._rows()
        lines = [header, ["---"] * len(header), *rows]
        table = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines]
        return "\n".join([*table, "", *(f"- {note}" for note in self.notes), "", f"    {self.command}", ""])

    def to_dict(self) -> dict[str, Any]:
        """Return the values for a JSON file."""
        return {
            "format": FORMAT,
            "models": [dataclasses.asdict(model) for model in self.models],
            "notes": list(self.notes),
            **self.environment,
            "command": self.command,
        }


def compare(
    models: tyro.conf.Positional[tuple[Path, ...]],
    /,
    *,
    data: Path,
    split: str = "test",
    limit: int | None = None,
    samples: int = 200,
    batch: int = 32,
    device: Device = "auto",
    threads: int | None = None,
    output: Path | None = None,
    markdown: Path | None = None,
    plot: Path | None = None,
) -> Comparison:
    """Compare models by size, latency, throughput and recall, in one table.

    The models take turns, call by call, so that speed-ups are ratios from one run. The first model is the
    reference.

    Example:
        python -m runtime.benchmarking.compare drn.onnx drn.fp16.onnx drn.int8.onnx --data charades

    Args:
        models: .onnx, .engine or .pt files, the reference first. For a split model give the query part.
        data: directory of a data set. docs/formats.md lists the formats.
        split: split of the queries: train, val or test.
        limit: use only the first N queries for recall.
        samples: number of timed calls per model with one query.
        batch: number of queries per batch when measuring throughput.
        device: device that runs the models; auto selects cuda if it is available.
        threads: number of CPU threads per network. Default: set by the library that runs the model.
        output: JSON file to write all values to.
        markdown: Markdown file to write the table to.
        plot: PNG file to draw latency and recall in.

    Raises:
        GroundingError: an input is wrong. Inputs are checked before anything is measured.
    """
    data_set = DataSet(data)
    _check(models, data_set, (samples, batch, limit), (output, markdown, plot))
    # Timed calls would repeat the warnings of unknown words, and print them within the measured time.
    with logged_once():
        grounders = [Grounder.load(path, device, threads) for path in models]
        evaluations = _evaluate(grounders, models, data_set, split, limit)
        compared = _measure(models, grounders, evaluations, data_set, samples, batch)
    scored = evaluations[0].report
    notes = [f"{scored.queries} queries of {split}, protocol {scored.protocol}; recall in percent."]
    if data_set.simulated:
        notes.append("Features are simulated: recall is not comparable with published numbers.")
    gpu = system_info.conditions("after").gpu
    on_gpu = any(getattr(grounder.backend, "device", "cpu") == "cuda" for grounder in grounders)
    gpu_name = gpu.name if gpu and on_gpu else None
    versions, date = system_info.versions(), datetime.date.today().isoformat()
    count = "default threads" if threads is None else f"{threads} thread{'s' * (threads > 1)}"
    listed = (f"{name} {version}" for name, version in versions.items())
    notes.append(f"{', '.join([gpu_name or cpu_info.cpu_name(), count, *listed, date])}.")
    environment = {"date": date, "cpu": cpu_info.cpu(), "gpu": gpu_name, "versions": versions}
    options = {"data": data, "split": split, "limit": limit, "samples": samples, "batch": batch, "threads": threads}
    comparison = Comparison(
        compared, tuple(notes), environment, command_line("runtime.benchmarking.compare", options, *models)
    )
    if output:
        write_json(output, comparison.to_dict())
    if markdown:
        write_text(markdown, comparison.markdown())
    if plot:
        draw(comparison, plot)
    print(comparison.text())
    report_written(output, markdown, plot)
    suggest_next_command("runtime.serve", "--model", models[0], "--data", data)
    return comparison


def _check(
    models: tuple[Path, ...],
    data_set: DataSet,
    counts: tuple[int, int, int | None],
    outputs: tuple[Path | None, Path | None, Path | None],
) -> None:
    """Check the options before any model is opened.

    Args:
        counts: --samples, --batch and --limit.
        outputs: JSON, Markdown and PNG file to write.
    """
    if len(models) < 2:
        raise ModelFileError(
            f"Expected two models or more, got {len(models)}. Name their files.", code="missing_option"
        )
    for flag, count in zip(("--samples", "--batch", "--limit"), counts):
        check_option(flag, count, 1)
    for path in models:
        check_file(path, "The model file", ModelFileError)
    for index, written in enumerate(outputs):
        check_report(written, *models, *data_set.files, *outputs[:index])
    check_plots(outputs[2])


def _evaluate(
    grounders: list[Grounder], models: tuple[Path, ...], data_set: DataSet, split: str, limit: int | None
) -> list[Evaluation]:
    """Answer the queries of a split with each model."""
    annotations = data_set.annotations(split, invalid="drop")[:limit]
    evaluations = []
    for grounder, path in zip(grounders, models):
        data_set.check_clock(grounder.manifest.features.clock)
        with tqdm(
            total=len(annotations), desc=f"answering, {path.name}", unit="query", leave=False, disable=None
        ) as bar:
            evaluations.append(
                evaluate(
                    grounder,
                    data_set,
                    annotations,
                    protocol=grounders[0].manifest.decoding.protocol,
                    on_progress=bar.update,
                )
            )
    return evaluations


def _measure(
    models: tuple[Path, ...],
    grounders: list[Grounder],
    evaluations: list[Evaluation],
    data_set: DataSet,
    samples: int,
    batch: int,
) -> tuple[ComparedModel, ...]:
    """Time the models in turns, and join times and answers."""
    labels = model_labels(models)
    pairs = pairs_with_known_words(dataset_workload(data_set.root, None, ()).pairs, grounders)
    opened = [BenchmarkedModel.from_grounder(label, grounder, pairs) for label, grounder in zip(labels, grounders)]
    single = time_interleaved([model.ground_call(1) for model in opened], samples)
    batched = time_interleaved([model.ground_call(batch) for model in opened], samples, BATCH_SECONDS * len(models))
    reference = evaluations[0]
    compared = []
    for index, (path, grounder, evaluation) in enumerate(zip(models, grounders, evaluations)):
        # Only overlaps and hits are read, which do not depend on the durations.
        durations = np.ones(len(reference.truth))
        paired = compare_answers(
            reference.detections, evaluation.detections, reference.truth, durations, reference.report.protocol
        )
        compared.append(
            ComparedModel(
                labels[index],
                grounder.manifest.precision,
                sum(file.stat().st_size for file in model_files(path, grounder.manifest)),
                Latency.from_samples(single[index]),
                batch / float(np.mean(batched[index])),
                speed_ratio(single[index], single[0]) if index else None,
                dict(evaluation.report.values),
                int(paired.lost(0.7).sum()),
                int(paired.gained(0.7).sum()),
                float(paired.overlaps.mean()),
            )
        )
    return tuple(compared)


def draw(comparison: Comparison, path: Path) -> None:
    """Draw the latency of one query and R@1 IoU=0.7 of each model into a PNG file."""
    check_plots(path)
    from matplotlib.figure import Figure

    models = comparison.models
    names = [f"{printable_line(model.name)} ({model.precision})" for model in models]
    panels = (
        ("one query, p50, ms", [model.latency.p50_ms for model in models], "{:.3g}"),
        ("full batches, queries per second", [model.queries_per_s for model in models], "{:.4g}"),
        ("R@1 IoU=0.7, %", [100 * model.metrics.get("R@1 IoU=0.7", 0.0) for model in models], "{:.2f}"),
    )
    figure = Figure(figsize=(12, 1.6 + 0.4 * len(models)), layout="constrained")
    for axes, (title, values, form) in zip(figure.subplots(1, len(panels), sharey=True), panels):
        bars = axes.barh(range(len(models)), values, color="#1f5fa8")
        axes.bar_label(bars, [form.format(value) for value in values], padding=3)
        axes.set_title(title, loc="left", fontsize=10)
        axes.margins(x=0.2)
        axes.set_yticks(range(len(models)), names, parse_math=False)
    figure.axes[0].invert_yaxis()
    figure.supxlabel(comparison.notes[-1], fontsize=7, parse_math=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


if __name__ == "__main__":
    command(compare)

"""Compare two models on a data set: `python -m export.verify`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from export.parity.compare import check_comparable
from export.parity.compare_layers import LayerComparison, compare_layers, require_polygraphy
from export.parity.compare_shapes import check_shapes
from export.parity.html_report import render_html_report, require_jinja
from export.parity.model_file import ModelFile
from export.parity.parity_result import AccuracyBudget, ParityResult
from export.parity.parity_tables import Table
from export.parity.run_parity import (
    engine_precision,
    load_for_comparison,
    read_precision_stats,
    run_parity_check,
)
from runtime.artifacts.manifest import Manifest
from runtime.backends.base import Device
from runtime.benchmarking.report import latency_table, read_report
from runtime.core.cli import command, report_written, suggest_next_command
from runtime.core.decoding import Protocol
from runtime.core.errors import CheckFailed, GroundingError, ModelFileError, OutputError, check_option
from runtime.core.io.atomic_files import write_json, write_text
from runtime.core.io.digests import sha256
from runtime.core.io.input_files import check_file, is_same_file
from runtime.core.terminal import command_line
from runtime.datasets.dataset import Annotation, DataSet
from runtime.grounding.evaluation import askable_rows, batches_of
from runtime.grounding.grounder import BATCH_SIZE, Grounder

log = logging.getLogger("drn")

LAYER_QUERIES, LAYER_BATCH = 8, 4
"""Number of queries that --layers compares, and its batch size: the tensors of a query take about 10 MB."""


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """The options of `python -m export.verify`, which documents each."""

    reference: Path
    model: Path
    data: Path
    split: str = "test"
    limit: int | None = None
    max_drop: float = 0.2
    boundary_p99: float | None = None
    protocol: Protocol | None = None
    batch_size: int = BATCH_SIZE
    device: Device = "auto"
    threads: int | None = None
    output: Path | None = None
    html: Path | None = None
    layers: bool = False
    latency: Path | None = None
    exact: bool = False

    def check(self) -> None:
        """Check the options before any file is opened.

        Raises:
            GroundingError: an option has an invalid value, or a library that it needs is not installed.
        """
        check_option("--batch-size", self.batch_size, 1)
        check_option("--limit", self.limit, 1)
        check_option("--max-drop", self.max_drop, 0)
        check_option("--boundary-p99", self.boundary_p99, 0)
        used = [self.reference, self.model]
        for path in (self.output, self.html):
            if path is None:
                continue
            if is_same_file(path, *used):
                raise OutputError(
                    f"{path} is also another file of the command. Choose another --output or --html.",
                    code="output_is_input",
                )
            used.append(path)
            if path.is_dir():
                raise OutputError(f"{path} is a directory. Choose the name of a file.", code="output_is_directory")
        if self.html:
            require_jinja()
        if self.layers:
            for path in (self.reference, self.model):
                if path.suffix != ".onnx":
                    raise ModelFileError(
                        f"--layers compares .onnx files only, got {path.name}. Give the .onnx file of that model.",
                        code="wrong_suffix",
                    )
            require_polygraphy()

    def command(self) -> str:
        """Return the command line that repeats the check."""
        names = ("reference", "model", "data", "split", "max_drop", "limit", "boundary_p99", "protocol", "layers")
        return command_line("export.verify", {name: getattr(self, name) for name in (*names, "exact")})


def verify(
    reference: Path,
    model: Path,
    data: Path,
    *,
    split: str = "test",
    limit: int | None = None,
    max_drop: float = 0.2,
    boundary_p99: float | None = None,
    protocol: Protocol | None = None,
    batch_size: int = BATCH_SIZE,
    device: Device = "auto",
    threads: int | None = None,
    output: Path | None = None,
    html: Path | None = None,
    layers: bool = False,
    latency: Path | None = None,
    exact: bool = False,
) -> ParityResult:
    """Compare two models on every query of a split: heads, boundaries, ranking and recall.

    Also runs the model at the minimum, optimum and maximum shapes that it accepts, and compares its outputs with those
    of single queries. Exits with 0 if the accuracy drop is within the budget and the shapes agree, else with 1. The
    reports are written in both cases.

    Example:
        python -m export.verify --reference drn.onnx --model drn.int8.onnx --data charades

    Args:
        reference: .pt, .onnx or .engine file to compare with.
        model: .pt, .onnx or .engine file to check.
        data: directory of a data set (docs/formats.md).
        split: split of the queries: train, val or test.
        limit: use only the first N queries.
        max_drop: maximum drop of R@1 IoU=0.7 and of mIoU, in points.
        boundary_p99: maximum shift of the boundaries of the best moments, in seconds, for 99 % of the queries. Default:
            0.1 for FP32 and FP16 models; no limit for lower precisions.
        protocol: mmaction2 or drn, for both models. Default: set by the reference.
        batch_size: number of queries per batch; affects only the speed.
        device: device that runs the models; auto selects cuda if it is available.
        threads: number of CPU threads per network. Default: set by the library that runs the model.
        output: JSON file to write all results to.
        html: HTML report to write, as one self-contained page.
        layers: also compare every tensor that two .onnx files share, and name the first DRN module that differs.
        latency: report from `runtime.benchmark --output` for this model, to include in the HTML report.
        exact: compute INT8 .onnx files operator by operator, as an engine does, instead of with the fused kernels
            of ONNX Runtime.

    Returns:
        The parity report.

    Raises:
        GroundingError: a file cannot be read, or the models do not accept the same inputs.
        CheckFailed: the accuracy drop exceeds the budget, or the outputs depend on the shape.
    """
    return run(VerifyOptions(**locals()))


def run(options: VerifyOptions) -> ParityResult:
    """Compare two models, print and write the reports; see `verify`."""
    names = ("reference", "model", "data", "output", "html", "latency")
    given: dict[str, Any] = {name: Path(getattr(options, name)) for name in names if getattr(options, name) is not None}
    # Calls from Python may give paths as strings.
    options = dataclasses.replace(options, **given)
    options.check()
    reference, model = options.reference, options.model
    latency = _latency_table(options)
    data_set = DataSet(options.data)
    annotations = data_set.annotations(options.split)[: options.limit]
    sides = (
        load_for_comparison(reference, options.device, options.threads, options.exact),
        load_for_comparison(model, options.device, options.threads, options.exact),
    )
    # `compare` checks this too, but only after both files have been hashed.
    check_comparable(sides[0].manifest, sides[1].manifest)
    annotations = [annotations[row] for row in askable_rows(sides[0].manifest.vocabulary, annotations)]
    files = [ModelFile.of(path, side.manifest) for path, side in zip((reference, model), sides)]
    report = run_parity_check(
        sides,
        files,
        data_set,
        annotations,
        AccuracyBudget.of(files[1].manifest.precision, options.max_drop, options.boundary_p99),
        split=options.split,
        protocol=options.protocol,
        batch_size=options.batch_size,
        command=options.command(),
    )
    shapes = check_shapes(model, sides[1], data_set, annotations)
    exceeded = [check.violation() for check in shapes if check.violation()]
    report = dataclasses.replace(report, shapes=shapes, violations=[*report.violations, *exceeded])
    if options.layers:
        report = dataclasses.replace(report, layers=_compare_layers(reference, model, sides[0], data_set, annotations))
    if model.suffix == ".engine":
        report = dataclasses.replace(report, engine_precision=engine_precision(model))
    print(report.text())
    if options.output:
        write_json(options.output, report.to_dict())
    if options.html:
        evaluated = {"model": model, "data": options.data, "split": options.split}
        commands = (
            options.command(),
            command_line("runtime.evaluate", evaluated),
            command_line("runtime.describe", {}, model),
        )
        page = render_html_report(report, read_precision_stats(model), latency, commands=commands)
        write_text(options.html, page)
    report_written(options.output, options.html)
    if report.violations:
        both_onnx = {reference.suffix, model.suffix} == {".onnx"}
        hint = " Add --layers to find the first module that differs." if both_onnx and not options.layers else ""
        raise CheckFailed(f"{report.sentence()}{hint}", code="parity_failed")
    print(report.sentence())
    suggest_next_command(*_next_command(model, files[1].manifest, options.data))
    return report.parity


def _latency_table(options: VerifyOptions) -> Table | None:
    """Return the measured latency of the model; raise ModelFileError for a report of another model."""
    report = options.latency
    if report is None:
        return None
    if options.html is None:
        raise GroundingError(
            "--latency needs --html, the report that shows it. Add --html FILE.", code="missing_option"
        )
    if is_same_file(report, options.html, options.output):
        raise OutputError(
            f"{report} is the input of --latency. Choose another --output or --html.", code="output_is_input"
        )
    check_file(options.model, "The model file", ModelFileError)
    return Table("Latency", *latency_table(read_report(report), sha256(options.model)))


def _compare_layers(
    reference: Path, model: Path, grounder: Grounder, data_set: DataSet, annotations: Sequence[Annotation]
) -> LayerComparison:
    """Compare all tensors on some queries, spread over the split: adjacent queries are about the same video."""
    selected = annotations[:: max(1, len(annotations) // LAYER_QUERIES)][:LAYER_QUERIES]
    batches = [batch for _, batch in batches_of(grounder, data_set, selected, LAYER_BATCH)]
    with tqdm(total=len(batches), desc="comparing layers", unit="batch", leave=False, disable=None) as bar:
        return compare_layers(reference, model, batches, on_progress=bar.update)


def _next_command(model: Path, manifest: Manifest, data: Path) -> tuple[Any, ...]:
    is_source = manifest.part == "whole" and manifest.moments is None
    if model.suffix == ".onnx" and manifest.precision == "fp32" and is_source:
        return "export.build_engine", "--model", model, "--precision", "fp16", "--data", data
    if model.suffix == ".onnx" and manifest.precision == "bf16":
        # ONNX Runtime cannot run BF16; `doctor` lists what can.
        return ("runtime.doctor",)
    return "runtime.benchmark", "--model", model, "--data", data


if __name__ == "__main__":
    command(verify)

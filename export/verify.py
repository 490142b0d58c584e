"""`python -m export.verify`: does one model answer as another, in seconds and in recall?"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from export.parity.compare import check_comparable
from export.parity.compare_layers import LayerComparison, compare_layers, require_polygraphy
from export.parity.model_file import ModelFile
from export.parity.parity_result import AccuracyBudget, ParityResult
from export.parity.parity_tables import Table
from export.parity.run_parity import (
    engine_precision,
    load_for_comparison,
    read_precision_stats,
    run_parity_check,
    write_reports,
)
from runtime.backends.base import Device
from runtime.benchmarking.report import latency_table, read_report
from runtime.core.cli import command, suggest_next_command
from runtime.core.decoding import Protocol
from runtime.core.errors import CheckFailed, GroundingError, ModelFileError, OutputError
from runtime.core.io.digests import sha256
from runtime.core.io.input_files import check_file
from runtime.core.terminal import command_line
from runtime.datasets.dataset import Annotation, DataSet
from runtime.grounding.evaluation import askable_rows, batches_of
from runtime.grounding.grounder import BATCH_SIZE, Grounder

log = logging.getLogger("drn")

LAYER_QUERIES, LAYER_BATCH = 8, 4
"""Queries whose every tensor is compared by --layers, and how many at a time: a query has some 10 MB of tensors."""


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
        """Raise what can be known to be wrong before anything is opened."""
        if self.batch_size < 1 or (self.limit is not None and self.limit < 1):
            raise GroundingError(
                f"--limit and --batch-size must be at least 1, and {self.limit} and {self.batch_size} were given.",
                code="invalid_option",
            )
        # `not >=` also refuses NaN.
        if not self.max_drop >= 0 or not (self.boundary_p99 is None or self.boundary_p99 >= 0):
            raise GroundingError(
                f"--max-drop and --boundary-p99 cannot be negative; {self.max_drop} and {self.boundary_p99} were "
                "given.",
                code="invalid_option",
            )
        taken = {path.resolve() for path in (self.reference, self.model)}
        for path in (self.output, self.html):
            if path is None:
                continue
            if Path(path).resolve() in taken:
                raise OutputError(
                    f"{path} is named twice, and would be written over; choose another --output or --html.",
                    code="output_is_input",
                )
            taken.add(Path(path).resolve())
            if Path(path).is_dir():
                raise OutputError(f"{path} is a directory; name the file to write instead.", code="output_is_directory")
        if self.layers:
            for path in (self.reference, self.model):
                if path.suffix != ".onnx":
                    raise ModelFileError(
                        f"--layers compares .onnx files, and {path.name} is none; give the .onnx file it was made from "
                        "or into.",
                        code="wrong_suffix",
                    )
            require_polygraphy()

    def command(self) -> str:
        """Return the command that repeats the check."""
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

    Exits with 0 if the loss is within the budget, else with 1. The reports are written in both cases.

    Example:
        python -m export.verify --reference drn.onnx --model drn.int8.onnx --data charades

    Args:
        reference: .pt, .onnx or .engine file to compare with.
        model: .pt, .onnx or .engine file to check.
        data: directory of a data set (docs/formats.md).
        split: train, val or test.
        limit: use only the first N queries.
        max_drop: maximum loss of R@1 IoU=0.7 and of mIoU, in points.
        boundary_p99: maximum shift of the boundaries of the best moments, in seconds, for 99 % of the queries.
            Default: 0.1 for FP32 and FP16 models; no limit for lower precisions.
        protocol: mmaction2 or drn, for both models. Default: set by the reference.
        batch_size: number of queries per batch; affects only the speed.
        device: auto, cpu or cuda.
        threads: number of CPU threads per network.
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
        CheckFailed: the loss exceeds the budget.
    """
    return run(VerifyOptions(**locals()))


def run(options: VerifyOptions) -> ParityResult:
    """Compare two models, print and write the reports; see `verify`."""
    options = dataclasses.replace(
        options, reference=Path(options.reference), model=Path(options.model), data=Path(options.data)
    )
    options.check()
    reference, model = options.reference, options.model
    latency = _latency(options)
    data_set = DataSet(options.data)
    annotations = data_set.annotations(options.split)[: options.limit]
    sides = (
        load_for_comparison(reference, options.device, options.threads, options.exact),
        load_for_comparison(model, options.device, options.threads, options.exact),
    )
    # Before gigabytes are hashed, and again where it counts.
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
    if options.layers:
        report = dataclasses.replace(report, layers=_compare_layers(reference, model, sides[0], data_set, annotations))
    if model.suffix == ".engine":
        report = dataclasses.replace(report, engine_precision=engine_precision(model))
    print(report.text())
    precision = read_precision_stats(model) if options.html else None
    write_reports(report, options.output, options.html, precision, commands=_commands(options), latency=latency)
    if options.html:
        log.info("The HTML report is in %s.", options.html)
    if report.broken:
        both_onnx = {reference.suffix, model.suffix} == {".onnx"}
        hint = " Add --layers to see where." if both_onnx and not options.layers else ""
        raise CheckFailed(f"{report.sentence()}{hint}", code="parity_failed")
    print(report.sentence())
    suggest_next_command(*_next(model, files[1], options.data, annotations[0]))
    return report.parity


def _latency(options: VerifyOptions) -> Table | None:
    """Return what was measured of the model, for its HTML report; refuse what was measured of another."""
    report = options.latency
    if report is None:
        return None
    if options.html is None:
        raise GroundingError("--latency goes into the HTML report; pass --html FILE too.", code="missing_option")
    if Path(report).resolve() in {Path(path).resolve() for path in (options.html, options.output) if path is not None}:
        raise OutputError(
            f"{report} is read, and would be written over; choose another --output or --html.", code="output_is_input"
        )
    check_file(options.model, "The model file", ModelFileError)
    return Table("Latency", *latency_table(read_report(report), sha256(options.model)))


def _compare_layers(
    reference: Path, model: Path, grounder: Grounder, data_set: DataSet, annotations: Sequence[Annotation]
) -> LayerComparison:
    # Spread over the split, whose neighbours ask about one video.
    chosen = annotations[:: max(1, len(annotations) // LAYER_QUERIES)][:LAYER_QUERIES]
    batches = [batch for _, batch in batches_of(grounder, data_set, chosen, LAYER_BATCH)]
    with tqdm(total=len(batches), desc="comparing layers", unit="batch", leave=False, disable=None) as bar:
        return compare_layers(reference, model, batches, on_progress=bar.update)


def _commands(options: VerifyOptions) -> tuple[str, ...]:
    """Return the commands that reproduce a report and show more of its model."""
    evaluate = {name: getattr(options, name) for name in ("model", "data", "split")}
    return (
        options.command(),
        command_line("runtime.evaluate", evaluate),
        command_line("runtime.describe", {}, options.model),
    )


def _next(model: Path, file: ModelFile, data: Path, first: Annotation) -> tuple[Any, ...]:
    if model.suffix == ".onnx" and file.manifest.precision == "fp32":
        return "export.build_engine", "--model", model, "--precision", "fp16", "--data", data
    if model.suffix == ".onnx" and file.manifest.precision == "bf16":
        # ONNX Runtime cannot open it: what runs it is an engine.
        return ("runtime.doctor",)
    return "runtime.infer", "--model", model, "--data", data, "--video", first.video, "--query", first.sentence


if __name__ == "__main__":
    command(verify)

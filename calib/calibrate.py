"""`python -m calib.calibrate`: measure the ranges of a graph's tensors on training videos."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tqdm import tqdm

from calib.accuracy import AccuracyEvaluator, choose_method, format_deltas, table_of
from calib.calibration_set import (
    HELD_OUT,
    SAMPLES,
    CalibrationSet,
    check_held_out,
    coverage_table,
    sample_calibration_set,
)
from calib.calibration_table import SUFFIX, CalibrationTable
from calib.errors import CalibrationError
from calib.graph.channel_equalization import balanced_name, measure_channel_scales
from calib.graph.onnx_graph import load_fp32_graph, read_manifest
from calib.qdq_quantizer import QuantDtype, balanced, tensors_to_calibrate
from calib.range_estimation import Histogram, collect_histograms
from runtime.core.batch import Batch
from runtime.core.cli import command, suggest_next_command
from runtime.core.errors import OutputError
from runtime.core.io.atomic_files import atomic_write
from runtime.datasets.dataset import DataSet
from runtime.grounding.grounder import BATCH_SIZE

if TYPE_CHECKING:
    import onnx

log = logging.getLogger("drn")

GAIN_SAMPLES = 128
"""Enough to separate channels of large and small values; ranges are then measured on all samples."""


def calibrate(
    onnx: Path,
    data: Path,
    output: Path,
    *,
    method: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "auto",
    samples: int = SAMPLES,
    held_out: int = HELD_OUT,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    threads: int | None = None,
) -> CalibrationTable:
    """Measure activation ranges on training queries, and choose the method on held-out training videos.

    Args:
        onnx: FP32 graph from `python -m export.to_onnx`.
        data: directory of a data set (docs/formats.md). Only its training split is read.
        output: calibration table to write, named `*.calibration.json`.
        method: how to choose a range; auto takes the method whose INT8 graph agrees best with FP32 on held-out
            queries.
        samples: number of queries to calibrate on, at least 32.
        held_out: number of queries of other training videos to choose the method with.
        seed: random seed of both selections.
        batch_size: number of queries per batch; affects only speed and memory.
        threads: number of CPU threads.

    Returns:
        The calibration table.

    Raises:
        ModelFileError: `onnx` is not an FP32 graph of this toolkit.
        CalibrationError: there are too few samples, or they belong to test videos.
    """
    if batch_size < 1 or held_out < 1:
        raise CalibrationError(
            f"--batch-size and --held-out must be at least 1, and {batch_size} and {held_out} were given.",
            code="invalid_option",
        )
    if Path(output).resolve() == Path(onnx).resolve():
        raise OutputError(
            f"--output {output} is the graph itself; choose another, as drn{SUFFIX}.", code="output_is_input"
        )
    model = load_fp32_graph(onnx)
    data_set = DataSet(data)
    log.info("Drawing calibration samples ...")
    drawn = sample_calibration_set(data_set, read_manifest(model), samples, seed, held_out=held_out)
    # Entered before the work, so that an unwritable output is known at once.
    with atomic_write(output) as temporary:
        table = measure_table(model, drawn, method, batch_size, threads)
        table.save(temporary)
    print(coverage_table(drawn.coverage))
    print(f"{output}: ranges of {len(table.ranges)} tensors by {table.key['method']}, digest {table.digest[:12]}…")
    if data_set.simulated:
        print("Features are simulated: calibrate on real ones before using the model on them.")
    suggest_next_command("calib.quantize", "--onnx", onnx, "--table", output, "--output", unproven_name(onnx))
    return table


def unproven_name(onnx: Path, kind: QuantDtype = "int8") -> Path:
    """Return the file name for a graph of `calib.quantize`; `export.build_engine` gives checked graphs another one."""
    return Path(onnx).with_suffix(f".{kind}-unproven.onnx")


def measure_table(
    model: onnx.ModelProto,
    drawn: CalibrationSet,
    method: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "auto",
    batch_size: int = BATCH_SIZE,
    threads: int | None = None,
    judge: AccuracyEvaluator | None = None,
    kind: QuantDtype = "int8",
) -> CalibrationTable:
    """Return the table of a drawn calibration set; with `auto`, print what each method costs on the held-out part.

    Args:
        model: the FP32 graph.
        drawn: what to calibrate on, and what to choose by.
        method: how a range is found.
        batch_size, threads: of the passes over the samples.
        judge: over the held-out part, where the caller has one.
        kind: what the methods are compared as.
    """
    gains, histograms = observe_set(model, drawn, batch_size, threads)
    if method != "auto":
        return table_of(model, histograms, drawn, method, gains)
    check_held_out(len(drawn.held_out))
    judge = judge or AccuracyEvaluator(model, drawn.data_set, drawn.held_out, threads)
    best, costs = choose_method(model, histograms, drawn, judge, gains, kind=kind)
    print(format_deltas([(f"{name}{' *' * (name == best)}", cost) for name, cost in costs.items()]))
    print(f"* chosen: answers most like FP32 on {costs[best].queries} queries of held-out training videos.")
    choice = {
        "by": "agreement with FP32 on held-out training videos",
        "costs": {name: cost.to_dict() for name, cost in costs.items()},
    }
    return table_of(model, histograms, drawn, best, gains, choice)


def observe_set(
    model: onnx.ModelProto, drawn: CalibrationSet, batch_size: int = BATCH_SIZE, threads: int | None = None
) -> tuple[dict[str, list[int]], dict[str, Histogram]]:
    """Return how channels are balanced, and what is then seen of the default policy's tensors, with progress.

    Tensors keep the names that they have in `model`.
    """
    first = dataclasses.replace(drawn, annotations=drawn.annotations[:: -(-len(drawn.annotations) // GAIN_SAMPLES)])
    gains = measure_channel_scales(model, _with_bar(first, model, batch_size, "balancing channels"), threads)
    after, _ = balanced(model, CalibrationTable({}, {}, gains=gains))
    names = {balanced_name(model, name) if name in gains else name: name for name in tensors_to_calibrate(model)}
    histograms = collect_histograms(after, list(names), _with_bar(drawn, model, batch_size, "calibrating"), threads)
    return gains, {names[name]: histogram for name, histogram in histograms.items()}


def _with_bar(drawn: CalibrationSet, model: onnx.ModelProto, batch_size: int, what: str) -> Iterable[Batch]:
    batches = -(-len(drawn.annotations) // batch_size)
    return tqdm(
        drawn.batches(read_manifest(model), batch_size),
        total=batches,
        desc=what,
        unit="batch",
        leave=False,
        disable=None,
    )


if __name__ == "__main__":
    command(calibrate)

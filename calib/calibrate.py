"""`python -m calib.calibrate`: measure the activation ranges of a graph on training videos."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from calib.accuracy import AccuracyEvaluator, Candidate, choose_candidate, format_deltas, table_of
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
from calib.graph.channel_equalization import measure_channel_scales
from calib.graph.gate_normalization import normalize_gated_features
from calib.graph.onnx_graph import load_fp32_graph, read_manifest
from calib.qdq_quantizer import QuantDtype, QuantizationPolicy, channel_energies
from calib.range_estimation import ActivationStatistics, MethodOption, collect_statistics
from runtime.core.batch import Batch
from runtime.core.cli import command, report_written, suggest_next_command
from runtime.core.errors import OutputError, check_option
from runtime.core.io.atomic_files import atomic_write
from runtime.core.io.input_files import is_same_file
from runtime.datasets.dataset import DataSet
from runtime.grounding.grounder import BATCH_SIZE

if TYPE_CHECKING:
    import onnx

log = logging.getLogger("drn")

# Queries to measure channel equalization on; ranges are measured on all samples.
GAIN_SAMPLES = 128


def calibrate(
    onnx: Path,
    data: Path,
    output: Path,
    *,
    method: MethodOption = "auto",
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
        method: how to choose a range; output minimizes the error of the layers that read the tensor. auto takes the
            method, with or without channel equalization, whose INT8 graph agrees best with FP32 on held-out queries.
        samples: number of queries to calibrate on, at least 32.
        held_out: number of queries of other training videos to choose the method with.
        seed: random seed of the choice of the calibration queries and of the held-out queries.
        batch_size: number of queries per batch; affects only speed and memory.
        threads: number of CPU threads. Default: set by ONNX Runtime.

    Returns:
        The calibration table.

    Raises:
        ModelFileError: `onnx` is not an FP32 graph of this toolkit.
        CalibrationError: there are too few samples, or they belong to test videos.
    """
    check_option("--batch-size", batch_size, 1, error=CalibrationError)
    check_option("--held-out", held_out, 1, error=CalibrationError)
    if is_same_file(output, onnx):
        raise OutputError(
            f"--output {output} is also the input. Choose another file name, such as drn{SUFFIX}.",
            code="output_is_input",
        )
    model = load_fp32_graph(onnx)
    data_set = DataSet(data)
    log.info("Drawing calibration samples ...")
    drawn = sample_calibration_set(data_set, read_manifest(model), samples, seed, held_out=held_out)
    # An output that cannot be written is an error before the work.
    with atomic_write(output) as temporary:
        table = measure_table(model, drawn, method, batch_size, threads)
        table.save(temporary)
    print(coverage_table(drawn.coverage))
    print(f"{output}: ranges of {len(table.ranges)} tensors by {table.key['method']}, digest {table.digest[:12]}…")
    if data_set.simulated:
        print("Features are simulated: calibrate on real ones before using the model on them.")
    report_written(output)
    suggest_next_command("calib.quantize", "--model", onnx, "--table", output, "--output", unproven_name(onnx))
    return table


def unproven_name(onnx: Path, kind: QuantDtype = "int8") -> Path:
    """Return the file name for a graph of `calib.quantize`, which differs from that of a checked graph."""
    return Path(onnx).with_suffix(f".{kind}-unproven.onnx")


def measure_table(
    model: onnx.ModelProto,
    drawn: CalibrationSet,
    method: MethodOption = "auto",
    batch_size: int = BATCH_SIZE,
    threads: int | None = None,
    evaluator: AccuracyEvaluator | None = None,
    policy: QuantizationPolicy | None = None,
    kind: QuantDtype = "int8",
) -> CalibrationTable:
    """Measure a calibration table; with `auto`, also print the loss of each method on the held-out queries.

    Args:
        model: FP32 graph.
        drawn: queries to calibrate on, and held-out queries.
        method: how to choose a range. Methods other than auto apply channel equalization.
        evaluator: evaluator on the held-out queries; created when None and needed.
        policy: layers to quantize in the comparison of methods; the default policy when None.
        kind: precision in the comparison of methods.
    """
    statistics = measure_statistics(model, drawn, batch_size, threads)
    if method != "auto":
        return table_of(model, statistics, drawn, Candidate(method), policy)
    check_held_out(len(drawn.held_out))
    evaluator = evaluator or AccuracyEvaluator(model, drawn.data_set, drawn.held_out, threads)
    best, costs = choose_candidate(model, statistics, drawn, evaluator, policy, kind)
    print(format_deltas([(f"{candidate}{' *' * (candidate == best)}", cost) for candidate, cost in costs.items()]))
    print(f"* chosen by agreement with FP32 on {costs[best].queries} queries of held-out training videos.")
    choice = {
        "by": "agreement with FP32 on held-out training videos",
        "equalized": best.equalize,
        "costs": {str(candidate): cost.to_dict() for candidate, cost in costs.items()},
    }
    return table_of(model, statistics, drawn, best, policy, choice)


def measure_statistics(
    model: onnx.ModelProto, drawn: CalibrationSet, batch_size: int = BATCH_SIZE, threads: int | None = None
) -> ActivationStatistics:
    """Measure channel equalization and the histograms of the tensors that the default policy quantizes.

    Args:
        model: FP32 graph, measured with gated features normalized (`calib.graph.gate_normalization`).
        drawn: queries to measure on.
    """

    def batches(drawn: CalibrationSet, description: str) -> Iterable[Batch]:
        content = drawn.batches(read_manifest(model), batch_size)
        total = -(-len(drawn.annotations) // batch_size)
        return tqdm(content, total=total, desc=description, unit="batch", leave=False, disable=None)

    model = normalize_gated_features(model)
    gains = measure_channel_scales(model, batches(equalization_samples(drawn), "equalizing channels"), threads)
    return collect_statistics(model, channel_energies(model), batches(drawn, "calibrating"), threads, gains)


def equalization_samples(drawn: CalibrationSet) -> CalibrationSet:
    """Return at most `GAIN_SAMPLES` queries of a calibration set, evenly spaced, to measure channel equalization on."""
    step = -(-len(drawn.annotations) // GAIN_SAMPLES)
    return dataclasses.replace(drawn, annotations=drawn.annotations[::step])


if __name__ == "__main__":
    command(calibrate)

"""Compare INT8 graphs for a CPU whose gated features have one constant scale, or a scale for each query."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from statistics import median
from typing import Any

import onnx
from tqdm import tqdm

from benchmarks.measurement import environment
from benchmarks.quantization import SQNR_QUERIES, grounder_of, sqnr_db
from calib.calibrate import equalization_samples
from calib.calibration_set import CalibrationSet, sample_calibration_set
from calib.graph.channel_equalization import apply_channel_scales, measure_channel_scales
from calib.graph.conv_to_matmul import convs_to_matmul
from calib.graph.gate_normalization import normalize_gated_features
from calib.graph.graph_editing import copied
from calib.graph.onnx_graph import load_fp32_graph, read_manifest
from calib.graph.opset import opset_of
from calib.qdq_quantizer import QuantizationPolicy, channel_energies, write_qdq
from calib.range_estimation import Method, collect_statistics
from export.parity.compare import collect_outputs, compare
from runtime.core.batch import Batch
from runtime.core.cli import command
from runtime.datasets.dataset import DataSet
from runtime.grounding.grounder import Grounder

TURNS = 50
POLICY = QuantizationPolicy(stored=(), unsigned=True)


def query_scales(
    onnx_file: Path,
    data: Path,
    *,
    methods: tuple[Method, ...] = ("mse", "output"),
    split: str = "test",
    limit: int | None = None,
    samples: int = 512,
    threads: int = 1,
) -> dict[str, Any]:
    """Print the accuracy of both kinds of scales for each calibration method, and their relative time.

    Args:
        onnx_file: FP32 graph.
        data: directory of a data set (docs/formats.md); calibrated on its training split.
        methods: calibration methods.
        split: split of the queries to compare on.
        limit: maximum number of queries.
        samples: number of calibration samples.
        threads: number of CPU threads.

    Returns:
        One row for each method and kind of scale, and the versions of the libraries.
    """
    source, data_set = load_fp32_graph(onnx_file), DataSet(data)
    annotations = data_set.annotations(split)[:limit]
    reference = grounder_of(source, threads, optimized=True)
    with tqdm(total=len(annotations), desc="fp32", unit="query", leave=False, disable=None) as bar:
        known = collect_outputs(reference, data_set, annotations, on_progress=bar.update)
    drawn = sample_calibration_set(data_set, read_manifest(source), samples)
    held_out = dataclasses.replace(drawn, annotations=drawn.held_out[:SQNR_QUERIES], held_out=())
    batches = list(held_out.batches(read_manifest(source)))
    expected = [reference.backend.run(batch) for batch in batches]
    rows, last = [], {}
    for scale, graph in (("constant", source), ("per query", normalize_gated_features(source))):
        for method, quantized in _quantized(graph, drawn, methods, threads):
            other = grounder_of(quantized, threads, optimized=True)
            parity = compare(reference, other, data_set, annotations, known=known)
            flips = parity.flips["R@1 IoU=0.7"]
            noise = sqnr_db(expected, [other.backend.run(batch) for batch in batches])
            row = {
                "method": method,
                "scale": scale,
                "agreement": round(parity.overlap.mean, 4),
                "shift p50, p99, s": [round(value, 3) for value in (parity.boundaries.p50, parity.boundaries.p99)],
                "gained, lost at 0.7": [len(flips.gained), len(flips.lost)],
                "points of R@1 0.7": round(100 * parity.differences["R@1 IoU=0.7"].mean, 2),
                "points of mIoU": round(100 * parity.differences["mIoU"].mean, 2),
                "SQNR, dB": {name: round(value, 1) for name, value in noise.items()},
            }
            rows.append(row)
            print(row, flush=True)
            last[scale] = other
    ratio = _time_ratio(last["per query"], last["constant"], next(held_out.batches(read_manifest(source), 1)))
    print(f"time of one query with scales per query, relative to constant ones: {ratio:.3f}")
    return {
        "rows": rows,
        "time ratio": ratio,
        "queries": len(annotations),
        **environment(threads, ("onnxruntime", "numpy")),
    }


def _time_ratio(first: Grounder, second: Grounder, batch: Batch) -> float:
    """Return the median ratio of the times of two models, which take turns."""
    ratios = []
    for _ in range(TURNS):
        seconds = []
        for model in (first, second):
            start = time.perf_counter()
            model.backend.run(batch)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return median(ratios)


def _quantized(
    graph: onnx.ModelProto, drawn: CalibrationSet, methods: tuple[Method, ...], threads: int
) -> list[tuple[Method, onnx.ModelProto]]:
    """Return the INT8 graph of each method."""
    manifest = read_manifest(graph)
    equalized = copied(graph)
    samples = equalization_samples(drawn).batches(manifest)
    apply_channel_scales(equalized, measure_channel_scales(graph, samples, threads))
    statistics = collect_statistics(equalized, channel_energies(equalized, POLICY), drawn.batches(manifest), threads)
    return [
        (
            method,
            convs_to_matmul(
                write_qdq(equalized, statistics.ranges(method, unsigned=True), POLICY, "int8", opset_of(equalized))
            ),
        )
        for method in methods
    ]


if __name__ == "__main__":
    command(query_scales)

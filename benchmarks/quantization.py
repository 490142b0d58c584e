"""Measure the accuracy of each precision and calibration candidate on the queries of a split.

The tables of docs/quantization.md. Graphs of engines are computed operator by operator. Graphs for a CPU are computed
as ONNX Runtime optimizes them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from tqdm import tqdm

from benchmarks.measurement import environment
from calib.accuracy import Candidate, table_of
from calib.calibrate import measure_statistics
from calib.calibration_set import CalibrationSet, coverage_table, sample_calibration_set
from calib.graph.conv_to_matmul import convs_to_matmul
from calib.graph.half_precision import convert_to_half, emulate_bf16
from calib.graph.onnx_graph import load_fp32_graph, read_manifest
from calib.graph.onnx_session import InMemorySplitBackend
from calib.graph.opset import raise_opset
from calib.graph.precision_audit import audit_graph
from calib.graph.split_model import split_graph
from calib.qdq_quantizer import QuantizationPolicy, insert_qdq
from calib.range_estimation import METHODS, ActivationStatistics
from export.build.reduced_precision import OPSETS
from export.parity.compare import collect_outputs, compare
from export.parity.parity_result import ParityResult, format_points
from runtime.core.batch import HEAD_NAMES, Heads
from runtime.core.cli import command
from runtime.core.io.atomic_files import write_json
from runtime.datasets.dataset import DataSet
from runtime.grounding.grounder import Grounder

# Held-out training queries to measure the SQNR of the heads on.
SQNR_QUERIES = 128
ROW = ("R@1 IoU=0.5", "R@1 IoU=0.7", "mIoU")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One graph and its accuracy.

    Attributes:
        precision: precision of the graph.
        method: label of the calibration candidate.
        share: share of the multiply-adds in the precision, 0 to 1.
        size: size as a fraction of FP32.
        sqnr_db: signal to quantization noise of each head in decibel, on `SQNR_QUERIES` held-out training queries.
        parity: comparison with FP32.
    """

    precision: str
    method: str
    share: float
    size: float
    sqnr_db: Mapping[str, float]
    parity: ParityResult


def tabulate(
    onnx_file: Path,
    data: Path,
    *,
    split: str = "test",
    limit: int | None = None,
    samples: int = 512,
    threads: int = 1,
    precisions: tuple[str, ...] = ("fp16", "bf16", "int8", "fp8"),
    cpu: bool = False,
    output: Path | None = None,
) -> list[Entry]:
    """Compare a graph in each precision, and in 8 bits by each calibration candidate, with FP32.

    Args:
        onnx_file: FP32 graph.
        data: directory of a data set (docs/formats.md); calibrated on its training split.
        split: split of the queries to compare on.
        limit: maximum number of queries.
        samples: number of calibration samples.
        threads: number of CPU threads.
        precisions: precisions to measure.
        cpu: write int8 graphs for ONNX Runtime on a CPU, with and without unsigned activations.
        output: JSON file for the table.
    """
    source, data_set = load_fp32_graph(onnx_file), DataSet(data)
    annotations = data_set.annotations(split)[:limit]
    reference = grounder_of(source, threads, cpu)
    with tqdm(total=len(annotations), desc="fp32", unit="query", leave=False, disable=None) as bar:
        known = collect_outputs(reference, data_set, annotations, on_progress=bar.update)
    drawn = sample_calibration_set(data_set, read_manifest(source), samples)
    started = time.perf_counter()
    statistics = measure_statistics(source, drawn, threads=threads)
    calibrated_in = time.perf_counter() - started
    held_out = dataclasses.replace(drawn, annotations=drawn.held_out[:SQNR_QUERIES], held_out=())
    batches = list(held_out.batches(read_manifest(source)))
    expected = [reference.backend.run(batch) for batch in batches]
    fp32_bytes = len(source.SerializeToString())
    entries = []
    for precision, method, graph in _graphs(source, precisions, statistics, drawn, cpu):
        counted = audit_graph(graph)
        with tqdm(total=len(annotations), desc=f"{precision} {method}", unit="query", leave=False, disable=None) as bar:
            other = grounder_of(emulate_bf16(graph), threads, cpu)
            parity = compare(reference, other, data_set, annotations, known=known, on_progress=bar.update)
        size = len(graph.SerializeToString()) / fp32_bytes
        noise = sqnr_db(expected, [other.backend.run(batch) for batch in batches])
        entries.append(Entry(precision, method, counted.share(precision), size, noise, parity))
        print(_line(entries[-1]), flush=True)
    print(_markdown(entries))
    print(coverage_table(drawn.coverage))
    if output:
        write_json(
            output,
            {
                **environment(threads, ("onnx", "onnxruntime", "numpy")),
                "split": split,
                "queries": len(annotations),
                "simulated_features": data_set.simulated,
                "coverage": drawn.coverage,
                "seconds of one calibration pass": calibrated_in,
                "rows": [
                    {
                        "precision": entry.precision,
                        "method": entry.method,
                        "share of the multiply-adds": entry.share,
                        "size of FP32": entry.size,
                        "SQNR of held-out training queries, dB": entry.sqnr_db,
                        # The sentences of a data set are not ours to publish.
                        **{name: value for name, value in entry.parity.to_dict().items() if name != "worst"},
                    }
                    for entry in entries
                ],
            },
        )
    return entries


def _graphs(
    source: onnx.ModelProto,
    precisions: tuple[str, ...],
    statistics: ActivationStatistics,
    drawn: CalibrationSet,
    cpu: bool,
) -> Iterator[tuple[str, str, onnx.ModelProto]]:
    """Yield precision, label and graph of all rows."""
    candidates = [*map(Candidate, METHODS), Candidate("mse", equalize=False), Candidate("output", equalize=False)]
    for precision in precisions:
        if precision in ("fp16", "bf16"):
            yield precision, "", convert_to_half(raise_opset(source, OPSETS[precision]), precision)  # type: ignore[arg-type]
            continue
        for unsigned in (False, True) if cpu else (False,):
            policy = QuantizationPolicy(stored=() if cpu else QuantizationPolicy.stored, unsigned=unsigned)
            for candidate in candidates:
                table = table_of(source, statistics, drawn, candidate, policy)
                graph = insert_qdq(source, table, policy, precision, None if cpu else OPSETS[precision])  # type: ignore[arg-type]
                label = f"{candidate}{', unsigned' * unsigned}"
                yield precision, label, convs_to_matmul(graph) if cpu else convert_to_half(graph, "fp16")


def grounder_of(graph: onnx.ModelProto, threads: int, optimized: bool) -> Grounder:
    """Return a grounder that runs a graph in memory; it is split, so that the queries of a video share its part."""
    return Grounder(InMemorySplitBackend(*split_graph(graph), threads, optimized))


def sqnr_db(expected: Sequence[Heads], actual: Sequence[Heads]) -> dict[str, float]:
    """Return the signal to quantization noise ratio of each head over batches, in decibel."""
    result = {}
    for name in HEAD_NAMES:
        pairs = [(getattr(first, name), getattr(second, name)) for first, second in zip(expected, actual, strict=True)]
        noise = sum(float(np.square(first - second, dtype=np.float64).sum()) for first, second in pairs)
        signal = sum(float(np.square(first, dtype=np.float64).sum()) for first, _ in pairs)
        result[name] = 10 * math.log10(signal / noise)
    return result


def _line(entry: Entry) -> str:
    parity = entry.parity
    flips = parity.flips["R@1 IoU=0.7"]
    recall = " | ".join(f"{100 * parity.other.values[name]:.2f}" for name in ROW)
    change = " | ".join(format_points(parity.differences[name].mean) for name in ("R@1 IoU=0.7", "mIoU"))
    return (
        f"| {entry.precision.upper()} | {entry.method} | {recall} | {change} | {len(flips.gained)}, {len(flips.lost)} "
        f"({flips.p_value:.2f}) | {parity.boundaries.p50:.4f}, {parity.boundaries.p99:.3f} | {parity.overlap.mean:.4f} "
        f"| {', '.join(f'{value:.1f}' for value in entry.sqnr_db.values())} | {100 * entry.share:.1f} % "
        f"| {entry.size:.2f} |"
    )


def _markdown(entries: list[Entry]) -> str:
    reference = entries[0].parity.reference
    recall = " | ".join(f"{100 * reference.values[name]:.2f}" for name in ROW)
    return "\n".join(
        [
            "| precision | method | R@1 IoU=0.5 | R@1 IoU=0.7 | mIoU | change of R@1 0.7 | of mIoU | gained, lost at "
            "0.7 (McNemar p) | boundary shift p50, p99, s | mean IoU with FP32 | SQNR of matching, boundaries, IoU, dB "
            "| multiply-adds in it | size |",
            "|" + " --- |" * 13,
            f"| FP32 | | {recall} | | | | | | | 100 % | 1 |",
            *map(_line, entries),
        ]
    )


if __name__ == "__main__":
    command(tabulate)

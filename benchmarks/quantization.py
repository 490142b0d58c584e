"""Measure the accuracy of each precision and calibration method on every query of a split.

The table of docs/quantization.md. All graphs are computed operator by operator as they stand, as an engine would.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import onnx
from tqdm import tqdm

from benchmarks.cpu import _cpu_name
from calib.accuracy import table_of
from calib.calibrate import observe_set
from calib.calibration_set import coverage_table, sample_calibration_set
from calib.graph.half_precision import convert_to_half, emulate_bf16
from calib.graph.onnx_graph import load_fp32_graph, read_manifest
from calib.graph.onnx_session import InMemorySplitBackend
from calib.graph.opset import raise_opset
from calib.graph.precision_audit import audit_graph
from calib.graph.split_model import split_graph
from calib.qdq_quantizer import insert_qdq
from calib.range_estimation import METHODS
from export.build.reduced_precision import OPSETS
from export.parity.compare import collect_outputs, compare
from export.parity.parity_result import ParityResult, format_points
from runtime.core.cli import command
from runtime.core.io.atomic_files import write_json
from runtime.datasets.dataset import DataSet
from runtime.grounding.grounder import Grounder

ROW = ("R@1 IoU=0.5", "R@1 IoU=0.7", "mIoU")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One graph and what it costs."""

    precision: str
    method: str
    share: float
    size: float
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
    output: Path | None = None,
) -> list[Entry]:
    """Judge a graph in every precision, and in 8 bits by every method, against FP32.

    Args:
        onnx_file: the FP32 graph.
        data: directory of a data set (docs/formats.md); calibrated on its training split.
        split: whose queries judge.
        limit: only the first so many.
        samples: calibration samples.
        threads: CPU threads.
        precisions: which.
        output: JSON file for the table.
    """
    source, data_set = load_fp32_graph(onnx_file), DataSet(data)
    annotations = data_set.annotations(split)[:limit]
    reference = _grounder(source, threads)
    with tqdm(total=len(annotations), desc="fp32", unit="query", leave=False, disable=None) as bar:
        known = collect_outputs(reference, data_set, annotations, on_progress=bar.update)
    drawn = sample_calibration_set(data_set, read_manifest(source), samples)
    started = time.perf_counter()
    gains, histograms = observe_set(source, drawn, threads=threads)
    calibrated_in = time.perf_counter() - started
    tables = {method: table_of(source, histograms, drawn, method, gains) for method in METHODS}
    fp32_bytes = len(source.SerializeToString())
    entries = []
    for precision, method, graph in _graphs(source, precisions, tables):
        counted = audit_graph(graph)
        with tqdm(total=len(annotations), desc=f"{precision} {method}", unit="query", leave=False, disable=None) as bar:
            judged = _grounder(emulate_bf16(graph), threads)
            parity = compare(reference, judged, data_set, annotations, known=known, on_progress=bar.update)
        size = len(graph.SerializeToString()) / fp32_bytes
        entries.append(Entry(precision, method, counted.share(precision), size, parity))
        print(_line(entries[-1]), flush=True)
    print(_markdown(entries))
    print(coverage_table(drawn.coverage))
    if output:
        versions = {name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime", "numpy")}
        write_json(
            output,
            {
                "date": date.today().isoformat(),
                "machine": _cpu_name(),
                "threads": threads,
                "versions": versions,
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
                        # The sentences of a data set are not ours to publish.
                        **{name: value for name, value in entry.parity.to_dict().items() if name != "worst"},
                    }
                    for entry in entries
                ],
            },
        )
    return entries


def _graphs(source: onnx.ModelProto, precisions: tuple[str, ...], tables: Any) -> Iterator[tuple[str, str, Any]]:
    for precision in precisions:
        if precision in ("fp16", "bf16"):
            yield precision, "", convert_to_half(raise_opset(source, OPSETS[precision]), precision)  # type: ignore[arg-type]
            continue
        for method, table in tables.items():
            yield (
                precision,
                method,
                convert_to_half(insert_qdq(source, table, None, precision, OPSETS[precision]), "fp16"),
            )


def _grounder(graph: onnx.ModelProto, threads: int) -> Grounder:
    # Cut in two, so that the queries of one video share its part: the same numbers in less time.
    return Grounder(InMemorySplitBackend(*split_graph(graph), threads))


def _line(entry: Entry) -> str:
    parity = entry.parity
    flips = parity.flips["R@1 IoU=0.7"]
    recall = " | ".join(f"{100 * parity.other.values[name]:.2f}" for name in ROW)
    change = " | ".join(format_points(parity.differences[name].mean) for name in ("R@1 IoU=0.7", "mIoU"))
    return (
        f"| {entry.precision.upper()} | {entry.method} | {recall} | {change} | {len(flips.gained)}, {len(flips.lost)} "
        f"({flips.p_value:.2f}) | {parity.boundaries.p50:.4f}, {parity.boundaries.p99:.3f} | {parity.overlap.mean:.4f} "
        f"| {100 * entry.share:.1f} % | {entry.size:.2f} |"
    )


def _markdown(entries: list[Entry]) -> str:
    reference = entries[0].parity.reference
    recall = " | ".join(f"{100 * reference.values[name]:.2f}" for name in ROW)
    return "\n".join(
        [
            "| precision | method | R@1 IoU=0.5 | R@1 IoU=0.7 | mIoU | change of R@1 0.7 | of mIoU | gained, lost at "
            "0.7 (McNemar p) | boundary shift p50, p99, s | mean IoU with FP32 | multiply-adds in it | size |",
            "|" + " --- |" * 12,
            f"| FP32 | | {recall} | | | | | | 100 % | 1 |",
            *map(_line, entries),
        ]
    )


if __name__ == "__main__":
    command(tabulate)

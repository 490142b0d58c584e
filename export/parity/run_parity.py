"""Run a parity check: open two models, compare them, check the result against a budget, write the reports."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from calib.graph.onnx_graph import load_onnx, manifest_of
from export.parity.compare import compare
from export.parity.html_report import render_html_report
from export.parity.model_file import ModelFile
from export.parity.parity_report import ParityReport
from export.parity.parity_result import AccuracyBudget, violations
from export.parity.parity_tables import Table, engine_precision_table, precision_table
from runtime.artifacts.engine_layers import CONTRADICTED, NOT_PROVEN, PROVEN
from runtime.artifacts.engine_metadata import read_sidecar
from runtime.backends.base import Device
from runtime.core.decoding import Protocol
from runtime.core.io.atomic_files import write_json, write_text
from runtime.datasets.dataset import Annotation, DataSet
from runtime.grounding.grounder import BATCH_SIZE, Grounder

if TYPE_CHECKING:
    import onnx

log = logging.getLogger("drn")


def run_parity_check(
    sides: tuple[Grounder, Grounder],
    files: Sequence[ModelFile],
    data_set: DataSet,
    annotations: Sequence[Annotation],
    budget: AccuracyBudget,
    *,
    split: str,
    command: str,
    protocol: Protocol | None = None,
    batch_size: int = BATCH_SIZE,
    concurrent: bool = False,
) -> ParityReport:
    """Ask both models every query, with progress, and hold the second to its budget.

    Args:
        sides: the reference and the model to judge.
        files: what they were opened from.
        data_set, annotations: the queries.
        budget: the accepted loss.
        split, command: for the report.
        protocol, batch_size: see `verify`.
        concurrent: see `export.parity.compare.compare`.
    """
    with tqdm(total=2 * len(annotations), desc="asking both", unit="query", leave=False, disable=None) as bar:
        parity = compare(
            *sides,
            data_set,
            annotations,
            protocol=protocol,
            batch_size=batch_size,
            concurrent=concurrent,
            on_progress=bar.update,
        )
    for check in parity.plans:
        result, reason = check.verdict(parity.queries, budget)
        if result == NOT_PROVEN:
            log.warning(
                "%s is %s to answer as %s: %s. Choose more queries of the data set.",
                *(check.name, result, files[0].path.name, reason),
            )
    return ParityReport(parity, files[0], files[1], budget, violations(parity, budget), split, command)


def write_reports(
    report: ParityReport,
    output: Path | None,
    html: Path | None,
    precision: Table | None = None,
    engine: ModelFile | None = None,
    commands: Sequence[str] = (),
    latency: Table | None = None,
) -> None:
    """Write the JSON and the HTML report, those of the two that are named.

    Args:
        report: what to write.
        output, html: the files.
        precision: of the model; see `read_precision_stats`.
        engine: that was built of the model, if the report is about one.
        commands: that reproduce the report.
        latency: of the model.
    """
    if output:
        write_json(output, report.to_dict())
    if html:
        write_text(html, render_html_report(report, precision, latency, engine, commands))


def read_precision_stats(model: Path) -> Table | None:
    """Return the precision of an .onnx file by DRN module, or of an engine from its metadata; None of other files."""
    if model.suffix == ".engine":
        return engine_precision_table(read_sidecar(model).content.get("census", {}))
    if model.suffix != ".onnx":
        return None
    if importlib.util.find_spec("onnx") is None:
        log.warning("The HTML report has no precision by module, because onnx is not installed.")
        return None
    from calib.graph.precision_audit import audit_graph

    return precision_table(audit_graph(load_onnx(model)))


def engine_precision(*engines: Path) -> dict[str, str] | None:
    """Return `verdict` and `reason` of the precision of engines that belong together: the worst of what their metadata
    holds. None where one was built before verdicts were recorded."""
    results = [(engine.name, read_sidecar(engine).content.get("census", {})) for engine in engines]
    if not all("verdict" in stats for _, stats in results):
        return None
    worst = max((stats["verdict"] for _, stats in results), key=(PROVEN, NOT_PROVEN, CONTRADICTED).index)
    reasons = [(name, stats["reason"]) for name, stats in results if stats["verdict"] == worst]
    reasons_by_engine = [f"{name}: {reason}" if len(results) > 1 else reason for name, reason in reasons]
    return {"verdict": worst, "reason": "; ".join(reasons_by_engine)}


def load_for_comparison(path: Path, device: Device, threads: int | None, exact: bool = False) -> Grounder:
    """Open a model as it is to be judged: as it runs, and on a CPU BF16 by rounding every result.

    ONNX Runtime has no BF16 kernels there. Its fusions of Q/DQ add errors of up to 2.7e-2 that no engine has: with
    `exact`, 8-bit graphs are computed on the CPU without them.
    """
    if path.suffix == ".onnx" and path.is_file() and device != "cuda" and importlib.util.find_spec("onnx"):
        graph = load_onnx(path)
        precision = manifest_of(graph, str(path)).precision
        if precision == "bf16" or (exact and precision in ("int8", "fp8")):
            how = "rounding every result" if precision == "bf16" else "as it stands, without ONNX Runtime's fusions"
            code = "rounded_to_bf16" if precision == "bf16" else "without_fusions"
            log.info("%s is %s: computed on the CPU %s.", path, precision, how, extra={"code": code})
            return _computed(path, graph, threads, optimized=precision == "bf16")
    return Grounder.load(path, device, threads)


def _computed(path: Path, graph: onnx.ModelProto, threads: int | None, optimized: bool) -> Grounder:
    from calib.graph.half_precision import emulate_bf16
    from calib.graph.onnx_graph import manifest_in
    from calib.graph.onnx_session import InMemoryBackend, InMemorySplitBackend
    from runtime.backends.onnxruntime_backend import locate_part

    manifest = manifest_in(path)
    if manifest.part != "query":
        return Grounder(InMemoryBackend(emulate_bf16(graph), threads, optimized))
    ((name, digest),) = manifest.video_part.items()
    video = load_onnx(locate_part(path, name, digest))
    return Grounder(InMemorySplitBackend(emulate_bf16(video), emulate_bf16(graph), threads, optimized))

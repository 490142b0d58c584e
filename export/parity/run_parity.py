"""Open two models, compare them, check the result against an accuracy budget, and write the reports."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from calib.graph.onnx_graph import load_onnx, manifest_of
from export.parity.compare import compare
from export.parity.model_file import ModelFile
from export.parity.parity_report import ParityReport
from export.parity.parity_result import AccuracyBudget, violations
from export.parity.parity_tables import Table, engine_precision_table, precision_table
from runtime.artifacts.engine_layers import CONTRADICTED, NOT_PROVEN, PROVEN
from runtime.artifacts.engine_metadata import read_sidecar
from runtime.backends.base import Device
from runtime.core.decoding import Protocol
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
    """Run both models on every query, with progress, and check the second against the budget.

    Args:
        sides: the reference and the model.
        files: files of these two models.
        command: command that reproduces the comparison, for the report.
        protocol: protocol of NMS and hit rule, `mmaction2` or `drn`; that of the reference when None.
        batch_size: maximum number of queries in a batch; affects speed only.
        concurrent: whether to run both models at the same time, one thread each; for models on the CPU.

    Raises:
        GroundingError: see `export.parity.compare.compare`.
    """
    with tqdm(total=2 * len(annotations), desc="comparing", unit="query", leave=False, disable=None) as bar:
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
                "The accuracy of %s is %s: %s. Compare more queries with another split or a larger --limit.",
                *(check.name, result, reason),
            )
    return ParityReport(parity, files[0], files[1], budget, violations(parity, budget), split, command)


def read_precision_stats(model: Path) -> Table | None:
    """Return the data types of an .onnx file by DRN module, or of an engine from its metadata; None for other files."""
    if model.suffix == ".engine":
        return engine_precision_table(read_sidecar(model).content.get("census", {}))
    if model.suffix != ".onnx":
        return None
    if importlib.util.find_spec("onnx") is None:
        log.warning("The HTML report has no precision by module: onnx is not installed. Run `pip install onnx`.")
        return None
    from calib.graph.precision_audit import audit_graph

    return precision_table(audit_graph(load_onnx(model)))


def engine_precision(*engines: Path) -> dict[str, str] | None:
    """Return the worst precision verdict in the metadata of the engines of one model, as `verdict` and `reason`.

    None if an engine was built by a version that did not record verdicts.
    """
    results = [(engine.name, read_sidecar(engine).content.get("census", {})) for engine in engines]
    if not all("verdict" in stats for _, stats in results):
        return None
    worst = max((stats["verdict"] for _, stats in results), key=(PROVEN, NOT_PROVEN, CONTRADICTED).index)
    reasons = [(name, stats["reason"]) for name, stats in results if stats["verdict"] == worst]
    reasons_by_engine = [f"{name}: {reason}" if len(results) > 1 else reason for name, reason in reasons]
    return {"verdict": worst, "reason": "; ".join(reasons_by_engine)}


def load_for_comparison(path: Path, device: Device, threads: int | None, exact: bool = False) -> Grounder:
    """Open a model for a comparison.

    On a CPU, where ONNX Runtime has no BF16 kernels, a BF16 graph is emulated by rounding every result.

    Args:
        device: `auto`, `cpu` or `cuda`; `auto` selects a GPU if the library supports one.
        exact: compute 8-bit graphs on the CPU without ONNX Runtime's fusions of Q/DQ, which add errors of up to 2.7e-2
            that engines do not have.

    Raises:
        GroundingError: the model cannot be opened.
    """
    if path.suffix == ".onnx" and path.is_file() and device != "cuda" and importlib.util.find_spec("onnx"):
        graph = load_onnx(path)
        precision = manifest_of(graph, str(path)).precision
        if precision == "bf16" or (exact and precision in ("int8", "fp8")):
            is_bf16 = precision == "bf16"
            how = "by rounding every result to BF16" if is_bf16 else "without the fusions of ONNX Runtime"
            code = "rounded_to_bf16" if is_bf16 else "without_fusions"
            log.info("%s (%s) runs on the CPU %s.", path, precision, how, extra={"code": code})
            return _open_in_memory(path, graph, threads, optimized=is_bf16)
    return Grounder.load(path, device, threads)


def _open_in_memory(path: Path, graph: onnx.ModelProto, threads: int | None, optimized: bool) -> Grounder:
    from calib.graph.half_precision import emulate_bf16
    from calib.graph.onnx_graph import manifest_in
    from calib.graph.onnx_session import InMemoryBackend, InMemorySplitBackend
    from runtime.backends.onnx_backend import locate_part

    manifest = manifest_in(path)
    if manifest.part != "query":
        return Grounder(InMemoryBackend(emulate_bf16(graph), threads, optimized))
    ((name, digest),) = manifest.video_part.items()
    video = load_onnx(locate_part(path, name, digest))
    return Grounder(InMemorySplitBackend(emulate_bf16(video), emulate_bf16(graph), threads, optimized))

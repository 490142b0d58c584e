"""Compare a model with its reference, check the result against a budget, and collect the tables of the report."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from calib.graph.onnx_graph import load_onnx, manifest_of
from export.parity.compare import compare
from export.parity.compare_layers import LayerComparison
from export.parity.compare_layers import table as layer_table
from export.parity.compare_plans import plan_table
from export.parity.html_report import VISIBLE_S, Table, render_html_report
from export.parity.model_file import ModelFile, provenance
from export.parity.parity_result import CONFIDENCE, AccuracyBudget, ParityResult, format_points, violations
from runtime.artifacts.engine_layers import CONTRADICTED, NOT_PROVEN, PROVEN
from runtime.artifacts.engine_metadata import read_sidecar
from runtime.backends.base import Device
from runtime.core.cpu_info import cpu
from runtime.core.decoding import Protocol
from runtime.core.io.atomic_files import write_json, write_text
from runtime.core.metrics import format_table as recall_table
from runtime.datasets.dataset import Annotation, DataSet
from runtime.grounding.grounder import BATCH_SIZE, Grounder

if TYPE_CHECKING:
    import onnx

    from calib.graph.precision_audit import PrecisionStats

log = logging.getLogger("drn")


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """What the answers of two models to the queries of a split come to.

    Attributes:
        parity: what was found between the two.
        reference, model: the files.
        budget: what the second is held to.
        broken: the promises that do not hold, a clause each.
        split: where the queries come from.
        again: the command that finds the same again.
        layers: where the two part, if that was looked at.
        engine_precision: of an engine: `verdict` over its precision, and `reason`.
        precision: name of the check of the model's precision, with the real share, where one was made.
        cpu: the CPU of the machine that judged, of `runtime.core.cpu_info.cpu`.
    """

    parity: ParityResult
    reference: ModelFile
    model: ModelFile
    budget: AccuracyBudget
    broken: Sequence[str]
    split: str
    again: str
    layers: LayerComparison | None = None
    engine_precision: Mapping[str, str] | None = None
    precision: str = ""
    cpu: Mapping[str, Any] = dataclasses.field(default_factory=cpu)

    def sentence(self) -> str:
        """Return the verdict."""
        names = self.model.path.name, self.reference.path.name
        if self.broken:
            return f"{names[0]} does not answer as {names[1]}: {'; '.join(self.broken)}."
        return f"{names[0]} answers as {names[1]}: every promise is kept."

    def text(self) -> str:
        """Return all but the verdict, for a terminal."""
        parts = [
            summary(self.parity, (self.reference.path.name, self.model.path.name), self.split),
            provenance(self.reference, self.model)[1],
        ]
        if self.parity.plans:
            parts.append(f"\n{plan_table(self.parity.plans, self.parity.queries, self.budget)}\n")
        if self.engine_precision:
            parts.append("Precision of the engine: {verdict} ({reason}).".format_map(self.engine_precision))
        if self.layers:
            parts.append(f"\n{layer_table(self.layers)}\n{self.layers.sentence()}")
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.parity.to_dict(),
            "plans": [
                {**check.to_dict(), **dict(zip(("verdict", "reason"), check.verdict(self.parity.queries, self.budget)))}
                for check in self.parity.plans
            ],
            "reference": self.reference.to_dict(),
            "model": self.model.to_dict(),
            "lineage": provenance(self.reference, self.model)[1],
            "split": self.split,
            "budget": dataclasses.asdict(self.budget),
            "broken": list(self.broken),
            "layers": self.layers.to_dict() if self.layers else None,
            "engine_precision": dict(self.engine_precision) if self.engine_precision else None,
            "precision": self.precision,
            "cpu": dict(self.cpu),
            "command": self.again,
        }

    def write(
        self,
        output: Path | None,
        html: Path | None,
        census: tuple[str, Table] | None = None,
        engine: ModelFile | None = None,
        commands: Sequence[str] = (),
        latency: Table | None = None,
    ) -> None:
        """Write the JSON report and the passport, those of the two that are named.

        Args:
            output, html: the files.
            census: what the model is computed in; see `read_precision_stats`.
            engine: built of the model, where the model is its twin.
            commands: what to type to see the same again.
            latency: of the model, with its conditions.
        """
        if output:
            write_json(output, self.to_dict())
        if html:
            page = render_html_report(
                self.parity,
                self.reference,
                self.model,
                self.broken,
                budget=self.budget,
                split=self.split,
                census=census,
                layers=self.layers,
                latency=latency,
                engine=engine,
                commands=commands,
                cpu=self.cpu,
                precision=self.precision,
            )
            write_text(html, page)


def run_parity_check(
    sides: Sequence[Grounder],
    files: Sequence[ModelFile],
    data_set: DataSet,
    annotations: Sequence[Annotation],
    budget: AccuracyBudget,
    *,
    split: str,
    again: str,
    protocol: Protocol | None = None,
    batch_size: int = BATCH_SIZE,
    at_once: bool = False,
) -> ParityReport:
    """Ask both models every query, with progress, and hold the second to its budget.

    Args:
        sides: the reference and the model to judge.
        files: what they were opened from.
        data_set, annotations: the queries.
        budget: what may be lost.
        split, again: for the report.
        protocol, batch_size: see `verify`.
        at_once: see `export.parity.compare.compare`.
    """
    with tqdm(total=2 * len(annotations), desc="asking both", unit="query", leave=False, disable=None) as bar:
        parity = compare(
            *sides,
            data_set,
            annotations,
            protocol=protocol,
            batch_size=batch_size,
            at_once=at_once,
            on_progress=bar.update,
        )
    for check in parity.plans:
        result, reason = check.verdict(parity.queries, budget)
        if result == NOT_PROVEN:
            log.warning(
                "%s is %s to answer as %s: %s. Choose more queries of the data set.",
                *(check.name, result, files[0].path.name, reason),
            )
    return ParityReport(parity, files[0], files[1], budget, violations(parity, budget), split, again)


def summary(parity: ParityResult, names: Sequence[str], split: str) -> str:
    """Return what was found, for a terminal."""
    rows = [(f"{names[0]} (reference)", parity.reference), (names[1], parity.other)]
    if parity.prior:
        rows.append(("prior (constant moments)", parity.prior))
    lines = [
        recall_table(rows),
        f"{parity.queries} queries of {split}, protocol {parity.protocol}, percent.",
    ]
    if parity.whole:
        lines.append(f"{parity.whole} of them have no likely location in either: that these agree proves nothing.")
    if parity.simulated:
        lines.append("Features are simulated: not comparable with published numbers.")
    lines += ["", f"{'head':<20} {'largest error':>13} {'99 % within':>12} {'largest value':>13}"]
    for name, error in parity.heads.items():
        bad = f"  {error.not_finite} values not finite" if error.not_finite else ""
        lines.append(f"{name:<20} {error.max:>13.1e} {error.p99:>12.1e} {error.largest:>13.3g}{bad}")
    lines += ["", f"{'boundaries':<20} {'half within':>13} {'99 % within':>12} {'largest':>13}"]
    for label, shift in (("of best moments", parity.boundaries), ("at each location", parity.locations)):
        lines.append(f"{label:<20} {shift.p50:>11.2g} s {shift.p99:>10.2g} s {shift.max:>11.2g} s")
    overlap, order = parity.overlap, parity.order
    lines += [
        "",
        f"Best moments overlap by {overlap.mean:.4f} on average, 1 % by less than {overlap.p1:.4f}, one by "
        f"{overlap.min:.4f}.",
        f"The same moment comes first for {100 * order.first:.2f} % of the queries, the same five in the same order "
        f"for {100 * order.five:.2f} %.",
        "",
        f"{'':<12} {'gained':>7} {'lost':>7} {'McNemar p':>10} {'points':>8}  {100 * CONFIDENCE:g} % interval",
    ]
    for name, interval in parity.differences.items():
        flips = parity.flips.get(name)
        counts = f"{len(flips.gained):>7} {len(flips.lost):>7} {flips.p_value:>10.3g}" if flips else " " * 26
        spread = f"{format_points(interval.low)} to {format_points(interval.high)}"
        lines.append(f"{name:<12} {counts} {format_points(interval.mean):>8}  {spread}")
    shown = [row for row in parity.worst if row.shift >= VISIBLE_S]
    if shown:
        lines += [
            "",
            "Worst queries, in seconds:",
            f"{'line':>6}  {'truth':>13}  {'reference':>13}  {'model':>13}  query",
        ]
    for row in shown:
        spans = [row.truth, *((m.start, m.end) if m else None for m in (row.reference, row.other))]
        cells = (f"{f'{span[0]:.1f} - {span[1]:.1f}' if span else 'none':>13}" for span in spans)
        lines.append(f"{row.line:>6}  {'  '.join(cells)}  {row.query}")
    return "\n".join(lines)


def read_precision_stats(model: Path) -> tuple[str, Table] | None:
    """Return what a model is computed in, in a sentence and as a table: an .onnx file by DRN module, an engine by what
    its sidecar counted; None for other files."""
    if model.suffix == ".engine":
        return engine_precision_table(read_sidecar(model).content.get("census", {}))
    if model.suffix != ".onnx":
        return None
    if importlib.util.find_spec("onnx") is None:
        log.warning("The passport holds no precision census: onnx is not installed.")
        return None
    from calib.graph.precision_audit import audit_graph

    return precision_table(audit_graph(load_onnx(model)))


def precision_table(stats: PrecisionStats) -> tuple[str, Table]:
    """Return the census of a graph as a sentence, and the table behind it by DRN module."""
    total = stats.total()
    kinds = sorted(total, key=total.__getitem__, reverse=True)
    shares = ", ".join(f"{100 * stats.share(kind):.1f} % in {kind}" for kind in kinds)
    weights = ", ".join(f"{size / 2**20:.1f} MiB in {kind}" for kind, size in stats.weight_bytes.items())
    counts = {**stats.macs, "all": total}
    rows = [
        [module, *(f"{by_kind[kind] / 1e6:.2f}" if by_kind.get(kind) else "" for kind in kinds)]
        for module, by_kind in counts.items()
    ]
    sentence = f"Of its multiply-adds {shares}; of its weights {weights}."
    return sentence, (("million multiply-adds of one query", *kinds), rows)


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


def engine_precision_table(counted: Mapping[str, Any]) -> tuple[str, Table] | None:
    """Return what a sidecar's `census` says: the verdict, and the layers of the engine by type; those of its twin where
    no GPU counted them."""
    engine = counted.get("engine")
    verdict = "The precision of the engine is {verdict}: {reason}.".format_map(counted) if "verdict" in counted else ""
    if engine:
        keys = (("multiply in it", "arithmetic"), ("write it", "layers"), ("read it", "quantised_inputs"))
        results = [(name, engine[key]) for name, key in keys if key in engine]
        kinds = sorted({kind for _, counts in results for kind in counts})
        rows = [(name, *(str(counts.get(kind, "")) for kind in kinds)) for name, counts in results]
        message = ", ".join(f"{count} in {kind}" for kind, count in engine["layers"].items()) or "no type shown"
        sentence = f"Layers of the engine by what they write, as its inspector shows them: {message}."
        return " ".join(filter(None, (verdict, sentence))), (("layers that", *kinds), rows)
    shares = counted.get("twin", {}).get("shares", {})
    if not shares:
        return None
    message = ", ".join(f"{100 * share:.1f} % in {kind}" for kind, share in shares.items())
    rows = [(kind, f"{100 * share:.1f}") for kind, share in shares.items()]
    sentence = f"Of its twin's multiply-adds {message}; its own layers can be counted on the GPU only."
    return " ".join(filter(None, (verdict, sentence))), (("type", "percent of the multiply-adds"), rows)


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
            return _computed(path, graph, threads, optimised=precision == "bf16")
    return Grounder.load(path, device, threads)


def _computed(path: Path, graph: onnx.ModelProto, threads: int | None, optimised: bool) -> Grounder:
    from calib.graph.half_precision import emulate_bf16
    from calib.graph.onnx_graph import manifest_in
    from calib.graph.onnx_session import InMemoryBackend, InMemorySplitBackend
    from runtime.backends.onnxruntime_backend import locate_part

    manifest = manifest_in(path)
    if manifest.part != "query":
        return Grounder(InMemoryBackend(emulate_bf16(graph), threads, optimised))
    ((name, digest),) = manifest.video_part.items()
    video = load_onnx(locate_part(path, name, digest))
    return Grounder(InMemorySplitBackend(emulate_bf16(video), emulate_bf16(graph), threads, optimised))

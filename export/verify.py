"""`python -m export.verify`: does one model answer as another, in seconds and in recall?"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from export.parity.compare import CONFIDENCE, Budget, Parity, check_comparable, compare, points, verdict
from export.parity.compare_layers import Layers, compare_layers, load_graph, precision_of, require_polygraphy
from export.parity.compare_layers import table as layer_table
from export.parity.html_report import VISIBLE_S, ModelFile, Table, lineage, passport
from export.plan_parity import plan_table
from runtime.artifacts.engine_layers import CONTRADICTED, NOT_PROVEN, PROVEN
from runtime.artifacts.engine_metadata import read_sidecar
from runtime.backends import Device
from runtime.benchmarking.report import latency_table, read_report
from runtime.benchmarking.system_info import cpu
from runtime.core.cli import command, next_command
from runtime.core.decoding import Protocol
from runtime.core.errors import GroundingError, ModelFileError, OutputError, PromiseBroken
from runtime.core.io.files import check_file, sha256, write_json, write_text
from runtime.core.metrics import table as recall_table
from runtime.datasets.dataset import Annotation, DataSet
from runtime.grounding.evaluation import askable_rows, batches_of
from runtime.grounding.grounder import BATCH_SIZE, Grounder

if TYPE_CHECKING:
    import onnx

    from calib.graph.precision_audit import Census

log = logging.getLogger("drn")

LAYER_QUERIES, LAYER_BATCH = 8, 4
"""Queries whose every tensor is compared by --layers, and how many at a time: a query has some 10 MB of tensors."""


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
) -> Parity:
    """Ask two models every query of a split and judge what changed: heads, seconds, order, each answer gained or lost.

    Exit code 0 says that the budget holds, 1 that it does not. Reports are written either way.

    Args:
        reference: .pt, .onnx or .engine whose answers are to be kept.
        model: .pt, .onnx or .engine to judge.
        data: directory of a data set (docs/formats.md).
        split: train, val or test.
        limit: ask only the first so many queries.
        max_drop: points of R@1 IoU=0.7, and of mIoU, that may be lost.
        boundary_p99: seconds that 99 % of the boundaries of best moments must stay within; 0.1 for an FP32 or FP16
            model when not given, and not judged for a narrower one.
        protocol: mmaction2 or drn, for both; the reference's own when not given.
        batch_size: queries that go through the networks together; changes nothing but speed.
        device: auto, cpu or cuda.
        threads: CPU threads for each network.
        output: JSON file for everything that was found.
        html: the model's passport: one HTML page, complete in itself.
        layers: also compare every tensor that two .onnx files share, and name the DRN module that goes wrong first.
        latency: report that `runtime.benchmark --output` wrote of this very model, for the passport.
        exact: compute 8-bit .onnx files operator by operator, as an engine would, and not with ONNX Runtime's own
            fusions, which is how they run otherwise.

    Returns:
        What was found.

    Raises:
        GroundingError: a file cannot be read, or the two models cannot be asked the same questions.
        PromiseBroken: more is lost than the budget allows.
    """
    reference, model, data = Path(reference), Path(model), Path(data)
    _check(reference, model, batch_size, limit, max_drop, boundary_p99, output, html, layers)
    measured = _latency(latency, model, html, output)
    data_set = DataSet(data)
    annotations = data_set.annotations(split)[:limit]
    sides = [open_model(path, device, threads, exact) for path in (reference, model)]
    # Before gigabytes are hashed, and again where it counts.
    check_comparable(sides[0].manifest, sides[1].manifest)
    annotations = [annotations[row] for row in askable_rows(sides[0].manifest.vocabulary, annotations)]
    files = [ModelFile.of(path, side.manifest) for path, side in zip((reference, model), sides)]
    budget = Budget.of(files[1].manifest.precision, max_drop, boundary_p99)
    again = _again(reference, model, data, split, limit, max_drop, boundary_p99, protocol, layers, exact)
    proof = prove(
        sides, files, data_set, annotations, budget, split=split, protocol=protocol, batch_size=batch_size, again=again
    )
    if layers:
        proof = dataclasses.replace(proof, layers=_compare_layers(reference, model, sides[0], data_set, annotations))
    if model.suffix == ".engine":
        proof = dataclasses.replace(proof, engine_precision=engine_precision(model))
    print(proof.text())
    census = census_of(model) if html else None
    proof.write(output, html, census, commands=_commands(again, model, data, split), latency=measured)
    if html:
        log.info("The passport is in %s.", html)
    if proof.broken:
        where = "" if layers or {reference.suffix, model.suffix} != {".onnx"} else " Add --layers to see where."
        raise PromiseBroken(f"{proof.sentence()}{where}")
    print(proof.sentence())
    next_command(*_next(model, files[1], data, annotations[0]))
    return proof.parity


@dataclasses.dataclass(frozen=True)
class Proof:
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
        cpu: the CPU of the machine that judged, of `runtime.benchmarking.system_info.cpu`.
    """

    parity: Parity
    reference: ModelFile
    model: ModelFile
    budget: Budget
    broken: Sequence[str]
    split: str
    again: str
    layers: Layers | None = None
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
            lineage(self.reference, self.model)[1],
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
            "lineage": lineage(self.reference, self.model)[1],
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
            census: what the model is computed in; see `census_of`.
            engine: built of the model, where the model is its twin.
            commands: what to type to see the same again.
            latency: of the model, with its conditions.
        """
        if output:
            write_json(output, self.to_dict())
        if html:
            page = passport(
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


def prove(
    sides: Sequence[Grounder],
    files: Sequence[ModelFile],
    data_set: DataSet,
    annotations: Sequence[Annotation],
    budget: Budget,
    *,
    split: str,
    again: str,
    protocol: Protocol | None = None,
    batch_size: int = BATCH_SIZE,
    at_once: bool = False,
) -> Proof:
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
        found, reason = check.verdict(parity.queries, budget)
        if found == NOT_PROVEN:
            log.warning(
                "%s is %s to answer as %s: %s. Choose more queries of the data set.",
                *(check.name, found, files[0].path.name, reason),
            )
    return Proof(parity, files[0], files[1], budget, verdict(parity, budget), split, again)


def summary(parity: Parity, names: Sequence[str], split: str) -> str:
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
        spread = f"{points(interval.low)} to {points(interval.high)}"
        lines.append(f"{name:<12} {counts} {points(interval.mean):>8}  {spread}")
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


def census_of(model: Path) -> tuple[str, Table] | None:
    """Return what a model is computed in, in a sentence and as a table: an .onnx file by DRN module, an engine by what
    its sidecar counted; None for other files."""
    if model.suffix == ".engine":
        return engine_census_table(read_sidecar(model).content.get("census", {}))
    if model.suffix != ".onnx":
        return None
    if importlib.util.find_spec("onnx") is None:
        log.warning("The passport holds no precision census: onnx is not installed.")
        return None
    from calib.graph.precision_audit import census

    return census_table(census(load_graph(model)))


def census_table(found: Census) -> tuple[str, Table]:
    """Return the census of a graph as a sentence, and the table behind it by DRN module."""
    total = found.total()
    kinds = sorted(total, key=total.__getitem__, reverse=True)
    shares = ", ".join(f"{100 * found.share(kind):.1f} % in {kind}" for kind in kinds)
    weights = ", ".join(f"{size / 2**20:.1f} MiB in {kind}" for kind, size in found.weight_bytes.items())
    counts = {**found.macs, "all": total}
    rows = [
        [module, *(f"{by_kind[kind] / 1e6:.2f}" if by_kind.get(kind) else "" for kind in kinds)]
        for module, by_kind in counts.items()
    ]
    sentence = f"Of its multiply-adds {shares}; of its weights {weights}."
    return sentence, (("million multiply-adds of one query", *kinds), rows)


def engine_precision(*engines: Path) -> dict[str, str] | None:
    """Return `verdict` and `reason` of the precision of engines that belong together: the worst of what their metadata
    holds. None where one was built before verdicts were recorded."""
    found = [(engine.name, read_sidecar(engine).content.get("census", {})) for engine in engines]
    if not all("verdict" in census for _, census in found):
        return None
    worst = max((census["verdict"] for _, census in found), key=(PROVEN, NOT_PROVEN, CONTRADICTED).index)
    reasons = [(name, census["reason"]) for name, census in found if census["verdict"] == worst]
    told = [f"{name}: {reason}" if len(found) > 1 else reason for name, reason in reasons]
    return {"verdict": worst, "reason": "; ".join(told)}


def engine_census_table(counted: Mapping[str, Any]) -> tuple[str, Table] | None:
    """Return what a sidecar's `census` says: the verdict, and the layers of the engine by type; those of its twin where
    no GPU counted them."""
    engine = counted.get("engine")
    verdict = "The precision of the engine is {verdict}: {reason}.".format_map(counted) if "verdict" in counted else ""
    if engine:
        keys = (("multiply in it", "arithmetic"), ("write it", "layers"), ("read it", "quantised_inputs"))
        found = [(name, engine[key]) for name, key in keys if key in engine]
        kinds = sorted({kind for _, counts in found for kind in counts})
        rows = [(name, *(str(counts.get(kind, "")) for kind in kinds)) for name, counts in found]
        told = ", ".join(f"{count} in {kind}" for kind, count in engine["layers"].items()) or "no type shown"
        sentence = f"Layers of the engine by what they write, as its inspector shows them: {told}."
        return " ".join(filter(None, (verdict, sentence))), (("layers that", *kinds), rows)
    shares = counted.get("twin", {}).get("shares", {})
    if not shares:
        return None
    told = ", ".join(f"{100 * share:.1f} % in {kind}" for kind, share in shares.items())
    rows = [(kind, f"{100 * share:.1f}") for kind, share in shares.items()]
    sentence = f"Of its twin's multiply-adds {told}; its own layers can be counted on the GPU only."
    return " ".join(filter(None, (verdict, sentence))), (("type", "percent of the multiply-adds"), rows)


def _check(
    reference: Path,
    model: Path,
    batch_size: int,
    limit: int | None,
    max_drop: float,
    boundary_p99: float | None,
    output: Path | None,
    html: Path | None,
    layers: bool,
) -> None:
    """Refuse what cannot work before anything is opened."""
    if batch_size < 1 or (limit is not None and limit < 1):
        raise GroundingError(f"--limit and --batch-size must be at least 1, and {limit} and {batch_size} were given.")
    # `not >=` also refuses NaN.
    if not max_drop >= 0 or not (boundary_p99 is None or boundary_p99 >= 0):
        raise GroundingError(
            f"--max-drop and --boundary-p99 cannot be negative; {max_drop} and {boundary_p99} were given."
        )
    taken = {path.resolve() for path in (reference, model)}
    for path in (output, html):
        if path is None:
            continue
        if Path(path).resolve() in taken:
            raise OutputError(f"{path} is named twice, and would be written over; choose another --output or --html.")
        taken.add(Path(path).resolve())
        if Path(path).is_dir():
            raise OutputError(f"{path} is a directory; name the file to write instead.")
    if layers:
        for path in (reference, model):
            if path.suffix != ".onnx":
                raise ModelFileError(
                    f"--layers looks into .onnx files and {path.name} is none; compare with the .onnx file it was made "
                    "from or into."
                )
        require_polygraphy()


def _latency(report: Path | None, model: Path, html: Path | None, output: Path | None) -> Table | None:
    """Return what was measured of the model, for its passport; refuse what was measured of another."""
    if report is None:
        return None
    if html is None:
        raise GroundingError("--latency goes into the passport; pass --html FILE too.")
    if Path(report).resolve() in {Path(path).resolve() for path in (html, output) if path is not None}:
        raise OutputError(f"{report} is read, and would be written over; choose another --output or --html.")
    check_file(model, "The model file", ModelFileError)
    return latency_table(read_report(report), sha256(model))


def open_model(path: Path, device: Device, threads: int | None, exact: bool = False) -> Grounder:
    """Open a model as it is to be judged: as it runs, and on a CPU BF16 by rounding every result.

    ONNX Runtime has no BF16 kernels there. Its fusions of Q/DQ add errors of up to 2.7e-2 that no engine has: with
    `exact`, 8-bit graphs are computed on the CPU without them.
    """
    if path.suffix == ".onnx" and path.is_file() and device != "cuda" and importlib.util.find_spec("onnx"):
        graph = load_graph(path)
        precision = precision_of(graph, path)
        if precision == "bf16" or (exact and precision in ("int8", "fp8")):
            how = "rounding every result" if precision == "bf16" else "as it stands, without ONNX Runtime's fusions"
            log.info("%s is %s: computed on the CPU %s.", path, precision, how)
            return _computed(path, graph, threads, optimised=precision == "bf16")
    return Grounder.load(path, device, threads)


def _computed(path: Path, graph: onnx.ModelProto, threads: int | None, optimised: bool) -> Grounder:
    from calib.graph.half_precision import emulated
    from calib.graph.onnx_graph import GraphBackend, GraphPair
    from export.build.artifacts import manifest_in
    from runtime.backends.onnxruntime_backend import part_beside

    manifest = manifest_in(path)
    if manifest.part != "query":
        return Grounder(GraphBackend(emulated(graph), threads, optimised))
    ((name, digest),) = manifest.video_part.items()
    video = load_graph(part_beside(path, name, digest))
    return Grounder(GraphPair(emulated(video), emulated(graph), threads, optimised))


def _compare_layers(
    reference: Path, model: Path, grounder: Grounder, data_set: DataSet, annotations: Sequence[Annotation]
) -> Layers:
    # Spread over the split, whose neighbours ask about one video.
    chosen = annotations[:: max(1, len(annotations) // LAYER_QUERIES)][:LAYER_QUERIES]
    batches = [batch for _, batch in batches_of(grounder, data_set, chosen, LAYER_BATCH)]
    with tqdm(total=len(batches), desc="comparing layers", unit="batch", leave=False, disable=None) as bar:
        return compare_layers(reference, model, batches, on_progress=bar.update)


def _again(
    reference: Path,
    model: Path,
    data: Path,
    split: str,
    limit: int | None,
    max_drop: float,
    boundary_p99: float | None,
    protocol: Protocol | None,
    layers: bool,
    exact: bool,
) -> str:
    """Return the command that finds the same again."""
    parts: list[Any] = ["python", "-m", "export.verify", "--reference", reference, "--model", model, "--data", data]
    parts += ["--split", split, "--max-drop", max_drop]
    for option, value in (("--limit", limit), ("--boundary-p99", boundary_p99), ("--protocol", protocol)):
        if value is not None:
            parts += [option, value]
    parts += ["--layers"] if layers else []
    return shlex.join(map(str, parts + (["--exact"] if exact else [])))


def _commands(again: str, model: Path, data: Path, split: str) -> tuple[str, ...]:
    """Return what a passport's reader may type."""
    told = ("python", "-m", "runtime.evaluate", "--model", model, "--data", data, "--split", split)
    return again, shlex.join(map(str, told)), shlex.join(("python", "-m", "runtime.describe", str(model)))


def _next(model: Path, file: ModelFile, data: Path, first: Annotation) -> tuple[Any, ...]:
    if model.suffix == ".onnx" and file.manifest.precision == "fp32":
        return "export.build_engine", "--model", model, "--precision", "fp16", "--data", data
    if model.suffix == ".onnx" and file.manifest.precision == "bf16":
        # ONNX Runtime cannot open it: what runs it is an engine.
        return ("runtime.doctor",)
    return "runtime.infer", "--model", model, "--data", data, "--video", first.video, "--query", first.sentence


if __name__ == "__main__":
    command(verify)

"""The graph in the precision asked for: what ranges, a scan and held-out queries decide, in one place.

Every engine has such a graph, which ONNX Runtime runs on a CPU.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calib.accuracy import AccuracyDelta, AccuracyEvaluator, format_deltas
from calib.calibration_set import HELD_OUT, sample_calibration_set, sample_held_out
from calib.calibration_table import CalibrationTable
from calib.graph.conv_to_matmul import convs_to_matmul
from calib.graph.half_precision import (
    Half,
    convert_to_half,
    emulate_bf16,
    measure_magnitudes,
    modules,
    overflow_prone_modules,
)
from calib.graph.onnx_graph import read_manifest
from calib.graph.opset import raise_opset
from calib.qdq_quantizer import QuantDtype, QuantizationPolicy, insert_qdq
from calib.quantization_plan import QuantizationPlan
from calib.range_estimation import MethodOption
from calib.restore import find_layers_to_restore, minimal_keep_set
from runtime.artifacts.manifest import Manifest
from runtime.core.errors import CheckFailed
from runtime.datasets.dataset import DataSet

if TYPE_CHECKING:
    import onnx

log = logging.getLogger("drn")

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]

# FP16 around Q/DQ needs opset 19, BF16 convolutions 22; older TensorRTs read less, so no more than is needed.
OPSETS = {"fp32": 17, "fp16": 17, "bf16": 22, "int8": 19, "fp8": 19}
SCAN_QUERIES = 128
MOST_HELD_OUT = 4096
"""Queries that decide on restoring modules, where the first look says that some must be: one flip of 512 is as much as
the whole default budget."""

BOUNDARY_P99 = 0.1
"""Seconds that 99 % of FP16's boundaries stay within on the scanned queries; else modules are held back."""


@dataclasses.dataclass(frozen=True)
class ConversionOptions:
    """The options of a conversion to another precision.

    Attributes:
        keep: DRN modules that stay in higher precision.
        table: calibration table measured on this graph, in place of calibrating.
        plan: of `calib.restore`: more modules to keep.
        samples, method: of the calibration.
        max_drop: accepted loss of R@1 IoU=0.7 and of mIoU, in points.
        threads: CPU threads.
        table_output, plan_output: where a new table, and a new plan that keeps something, are written.
        for_cpu: INT8 is for ONNX Runtime on a CPU, with FP32 around it, and not to build an engine of.
    """

    keep: tuple[str, ...] = ()
    table: Path | None = None
    plan: Path | None = None
    samples: int = 512
    method: MethodOption = "auto"
    max_drop: float = 0.2
    threads: int | None = None
    table_output: Path | None = None
    plan_output: Path | None = None
    for_cpu: bool = False


@dataclasses.dataclass(frozen=True)
class ConvertedGraph:
    """A graph in some precision.

    Attributes:
        graph: strongly typed: its own types say what is computed in what.
        facts: what was decided on the way, for the manifest.
    """

    graph: onnx.ModelProto
    facts: dict[str, Any]


def convert_precision(
    source: onnx.ModelProto,
    precision: Precision,
    options: ConversionOptions,
    data_set: DataSet | None,
    name: str = "the graph",
) -> ConvertedGraph:
    """Return an FP32 graph of ours in the precision asked for.

    With a data set, a scan of training queries finds what would overflow in FP16, and held-out training queries find
    what loses more than the budget; both stay in higher precision, and are named.

    Args:
        source: the FP32 graph.
        precision: asked for.
        options: how.
        data_set: its training split is looked at, never test.
        name: of the graph, for messages.

    Raises:
        CalibrationError: table or plan are of another graph, or there are too few samples.
        CheckFailed: the budget holds in no way.
    """
    raised = raise_opset(source, OPSETS[precision])
    if precision == "fp32":
        return ConvertedGraph(raised, {})
    held: tuple[str, ...] = ()
    if data_set and precision in ("fp16", "bf16") and not data_set.annotations_path("train").is_file():
        log.warning("%s has no training split, so nothing is scanned: only parity says what is lost.", data_set.root)
        data_set = None
    # Around INT8 for a CPU there is FP32.
    if data_set and not (precision == "int8" and options.for_cpu):
        held = _overflowing(raised, data_set, "bf16" if precision == "bf16" else "fp16")
    if precision == "fp16" or precision == "bf16":
        retained = (*options.keep, *held)
        graph = convert_to_half(raised, precision, retained)
        facts = {"held back in FP32": list(held), "kept by request": list(options.keep)}
        if data_set:
            graph, restored = _accurate(raised, graph, precision, retained, data_set, options)
            facts["restored to FP32"] = restored
        return ConvertedGraph(graph, facts)
    return _quantised(source, precision, options, held, data_set, name)


def _overflowing(graph: onnx.ModelProto, data_set: DataSet, kind: Half) -> tuple[str, ...]:
    """Return the modules that come too near the largest FP16 number on training queries, and say so."""
    if kind == "bf16":
        return ()
    manifest = read_manifest(graph)
    drawn = sample_calibration_set(data_set, manifest, SCAN_QUERIES, at_most=True)
    log.info("Scanning ranges on %d training queries ...", len(drawn.annotations))
    return held_in_fp32(measure_magnitudes(graph, drawn.batches(manifest)), kind)


def held_in_fp32(scanned: Mapping[str, float], kind: Half = "fp16") -> tuple[str, ...]:
    """Return the modules whose magnitudes come too near the largest number of the type, and report them."""
    held = overflow_prone_modules(scanned, kind)
    for module in held:
        log.warning(
            "%s reaches %.3g, too near the largest FP16 number (65504), and stays in FP32.", module, scanned[module]
        )
    largest = max(scanned, key=lambda module: scanned[module])
    log.info("Largest magnitude: %.3g in %s; %d modules held back.", scanned[largest], largest, len(held))
    return held


def _accurate(
    graph: onnx.ModelProto,
    half: onnx.ModelProto,
    kind: Half,
    keep: Sequence[str],
    data_set: DataSet,
    options: ConversionOptions,
) -> tuple[onnx.ModelProto, list[str]]:
    """Return a half-precision graph that answers held-out training queries within the budget, and what it restored."""
    queries = sample_held_out(data_set, read_manifest(graph), SCAN_QUERIES)
    log.info("Asking %d held-out training queries in %s ...", len(queries), kind)
    evaluator = AccuracyEvaluator(graph, data_set, queries, options.threads)

    def cost_of(retained: Sequence[str], label: str) -> AccuracyDelta:
        requested = convert_to_half(graph, kind, (*keep, *retained)) if retained else half
        return evaluator.cost(emulate_bf16(requested), label)

    def holds(cost: AccuracyDelta) -> bool:
        # One flip among so few queries is 0.8 points: luck, unless the budget says that two are allowed.
        drop = max(options.max_drop, 100 / len(evaluator.annotations))
        return cost.worst_drop <= drop and (kind == "bf16" or cost.shift_p99 <= BOUNDARY_P99)

    def ranked() -> list[str]:
        names = sorted(modules(graph) - set(keep))
        alone = {name: cost_of([other for other in names if other != name], name) for name in names}
        return sorted(names, key=lambda name: alone[name].agreement)

    restored, steps = minimal_keep_set(ranked, cost_of, holds)
    if restored is None:
        least = min((cost for _, cost in steps), key=lambda cost: cost.shift_p99)
        raise CheckFailed(
            f"{kind} moves boundaries by {least.shift_p99:.2f} s and loses {least.worst_drop:.2f} points even with all "
            "but one module in FP32; build fp32, or bf16 where the numbers are too large for fp16.",
            code="budget_exceeded",
        )
    if not restored:
        return half, []
    print(format_deltas(steps))
    log.warning("%s stay in FP32: in %s they move answers by more than is allowed.", ", ".join(restored), kind)
    return convert_to_half(graph, kind, (*keep, *restored)), restored


def _quantised(
    source: onnx.ModelProto,
    kind: QuantDtype,
    options: ConversionOptions,
    held: Sequence[str],
    data_set: DataSet | None,
    name: str,
) -> ConvertedGraph:
    manifest = read_manifest(source)
    table, evaluator = _table(source, manifest, kind, options, data_set, name)
    keep = tuple(dict.fromkeys(options.keep))
    if options.plan:
        keep = tuple(
            dict.fromkeys((*keep, *QuantizationPlan.load(options.plan).checked(source, table, kind, name).keep))
        )
    elif data_set:
        keep = _within_budget(source, kind, table, keep, data_set, manifest, evaluator, options)
    log.info("Writing %s into the graph ...", kind.upper())
    policy = QuantizationPolicy(keep=keep, unsigned=options.for_cpu)
    facts = {
        "calibration": table.digest,
        "method": table.key["method"],
        "kept out of 8 bits": list(keep),
        "held back in FP32": list(held),
    }
    if kind == "int8" and options.for_cpu:
        # On a CPU, weights that are only stored in 8 bits would be made wide again for every query.
        return ConvertedGraph(
            convs_to_matmul(insert_qdq(source, table, dataclasses.replace(policy, stored=()), kind)), facts
        )
    narrow = insert_qdq(source, table, policy, kind, OPSETS[kind])
    return ConvertedGraph(convert_to_half(narrow, "fp16", held), facts)


def _table(
    source: onnx.ModelProto,
    manifest: Manifest,
    kind: QuantDtype,
    options: ConversionOptions,
    data_set: DataSet | None,
    name: str,
) -> tuple[CalibrationTable, AccuracyEvaluator | None]:
    """Return the table given or a new one, and the judge that chose its method."""
    if options.table:
        table = CalibrationTable.load(options.table)
        table.check(source, name)
        if data_set:
            table.check_videos(data_set)
        return table, None
    # Only ranges that were measured make an 8-bit graph: without a table there is a data set.
    assert data_set is not None
    from calib.calibrate import measure_table
    from calib.calibration_set import coverage_table

    log.info("Drawing %d calibration samples ...", options.samples)
    drawn = sample_calibration_set(data_set, manifest, options.samples)
    print(coverage_table(drawn.coverage))
    evaluator = AccuracyEvaluator(source, data_set, drawn.held_out, options.threads) if len(drawn.held_out) else None
    table = measure_table(
        source,
        drawn,
        options.method,
        threads=options.threads,
        evaluator=evaluator,
        policy=QuantizationPolicy(unsigned=options.for_cpu),
        kind=kind,
    )
    if options.table_output:
        table.save(options.table_output)
    return table, evaluator


def _within_budget(
    source: onnx.ModelProto,
    kind: QuantDtype,
    table: CalibrationTable,
    keep: tuple[str, ...],
    data_set: DataSet,
    manifest: Manifest,
    evaluator: AccuracyEvaluator | None,
    options: ConversionOptions,
) -> tuple[str, ...]:
    """Return the modules to keep for the recall budget to hold on held-out training videos; a plan is written if
    there are more than were asked for."""
    policy = QuantizationPolicy(keep=keep, unsigned=options.for_cpu)
    evaluator = evaluator or AccuracyEvaluator(
        source, data_set, sample_held_out(data_set, manifest, HELD_OUT, exclude=table.videos), options.threads
    )
    first = evaluator.cost(insert_qdq(source, table, policy, kind), "all narrow")
    if first.within(options.max_drop):
        log.info(
            "On %d held-out training queries %s changes recall by %+.2f points at worst; nothing is restored.",
            first.queries,
            kind.upper(),
            0.0 - first.worst_drop,
        )
        return keep
    more = sample_held_out(data_set, manifest, MOST_HELD_OUT, exclude=table.videos)
    log.info(
        "On %d held-out training queries %s loses %.2f points and %g are allowed; asking %d ...",
        first.queries,
        kind.upper(),
        first.worst_drop,
        options.max_drop,
        len(more),
    )
    larger = AccuracyEvaluator(source, data_set, more, options.threads) if len(more) > first.queries else evaluator
    plan, steps = find_layers_to_restore(
        source, table, larger, options.max_drop, policy=policy, kind=kind, ranker=evaluator
    )
    print(format_deltas(steps))
    everything = tuple(dict.fromkeys((*keep, *plan.keep)))
    if plan.keep:
        rest = "FP32" if options.for_cpu else "FP16"
        print(f"Restored to {rest} for the budget of {options.max_drop:g} points: {', '.join(plan.keep)}.")
        if options.plan_output:
            dataclasses.replace(plan, keep=everything).save(options.plan_output)
            print(f"{options.plan_output.name}: the plan; with --plan and --table it makes the same graph again.")
    return everything

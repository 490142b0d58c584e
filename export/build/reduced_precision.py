"""Convert an FP32 graph to another precision, with calibration, a scan for overflow, and an accuracy budget."""

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
    check_modules,
    convert_to_half,
    emulate_bf16,
    measure_magnitudes,
    modules,
    overflow_prone_modules,
)
from calib.graph.onnx_graph import read_manifest
from calib.graph.opset import raise_opset
from calib.qdq_quantizer import (
    LARGEST,
    MAX_EXACT_WEIGHT,
    QuantDtype,
    QuantizationPolicy,
    find_quantizable_ops,
    insert_qdq,
)
from calib.quantization_plan import QuantizationPlan
from calib.range_estimation import MethodOption
from calib.restore import find_layers_to_restore, minimal_keep_set
from runtime.artifacts.manifest import Library, Manifest
from runtime.core.errors import CheckFailed
from runtime.datasets.dataset import DataSet

if TYPE_CHECKING:
    import onnx

log = logging.getLogger("drn")

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]

# FP16 around Q/DQ needs opset 19, BF16 convolutions opset 22. Older versions of TensorRT need the lowest one possible.
OPSETS = {"fp32": 17, "fp16": 17, "bf16": 22, "int8": 19, "fp8": 19}
SCAN_QUERIES = 128
MAX_HELD_OUT = 4096
"""Number of held-out queries that decide which modules to restore: one flip of 512 equals the default budget."""

BOUNDARY_P99 = 0.1
"""Maximum of the 99th percentile of the boundary shift in FP16, in seconds, on the scanned queries."""


@dataclasses.dataclass(frozen=True)
class ConversionOptions:
    """The options of a conversion to another precision.

    Attributes:
        keep: DRN modules that stay in higher precision.
        table: calibration table of this graph; None calibrates.
        plan: quantization plan from `calib.restore`, with more modules to keep.
        max_drop: maximum drop of R@1 IoU=0.7 and of mIoU, in points.
        threads: number of CPU threads.
        table_output: file for a new calibration table.
        plan_output: file for a new quantization plan, written if modules were restored.
        library: library that runs INT8 on a CPU, with FP32 instead of FP16 around it; None for an engine.
        samples: number of calibration queries.
        method: calibration method, or auto.
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
    library: Library | None = None

    def policy(self, keep: tuple[str, ...] = ()) -> QuantizationPolicy:
        """Return the policy of INT8 and FP8 with modules to keep in higher precision."""
        # On x86 CPUs without VNNI, OpenVINO adds two products in 16 bits.
        max_weight = MAX_EXACT_WEIGHT if self.library == "openvino" else LARGEST["int8"]
        return QuantizationPolicy(keep=keep, unsigned=self.library is not None, max_weight=max_weight)


@dataclasses.dataclass(frozen=True)
class ConvertedGraph:
    """A graph in another precision.

    Attributes:
        graph: strongly typed graph.
        facts: calibration and modules in higher precision, for the manifest.
        calibration: calibration table of the graph; None for floating point.
    """

    graph: onnx.ModelProto
    facts: dict[str, Any]
    calibration: CalibrationTable | None = None


def convert_precision(
    source: onnx.ModelProto,
    precision: Precision,
    options: ConversionOptions,
    data_set: DataSet | None,
    name: str = "the graph",
) -> ConvertedGraph:
    """Convert an FP32 graph to another precision.

    With a data set, modules that would overflow in FP16 on training queries, and the smallest set of modules that meets
    the accuracy budget on held-out training queries, stay in higher precision.

    Args:
        data_set: data set of which only the training split is used; None without one.
        name: name of the graph in messages.

    Raises:
        CalibrationError: the table or the plan is of another graph, or there are too few samples.
        CheckFailed: no set of modules meets the accuracy budget.
    """
    raised = raise_opset(source, OPSETS[precision])
    if precision == "fp32":
        return ConvertedGraph(raised, {})
    held: tuple[str, ...] = ()
    if data_set and precision in ("fp16", "bf16") and not data_set.annotations_path("train").is_file():
        log.warning("%s has no training split, so ranges are not scanned. Check the parity report.", data_set.root)
        data_set = None
    # INT8 for a CPU has no FP16 layers.
    if data_set and not (precision == "int8" and options.library):
        held = _scan_for_overflow(raised, data_set, "bf16" if precision == "bf16" else "fp16")
    if precision == "fp16" or precision == "bf16":
        keep = (*options.keep, *held)
        graph = convert_to_half(raised, precision, keep)
        facts = {"held back in FP32": list(held), "kept by request": list(options.keep)}
        if data_set:
            graph, restored = _restore_half(raised, graph, precision, keep, data_set, options)
            facts["restored to FP32"] = restored
        return ConvertedGraph(graph, facts)
    return _quantize(source, precision, options, held, data_set, name)


def _scan_for_overflow(graph: onnx.ModelProto, data_set: DataSet, kind: Half) -> tuple[str, ...]:
    """Return the modules that could overflow in FP16 on training queries; see `held_in_fp32`."""
    if kind == "bf16":
        return ()
    manifest = read_manifest(graph)
    drawn = sample_calibration_set(data_set, manifest, SCAN_QUERIES, at_most=True)
    log.info("Scanning ranges on %d training queries ...", len(drawn.annotations))
    return held_in_fp32(measure_magnitudes(graph, drawn.batches(manifest)), kind)


def held_in_fp32(scanned: Mapping[str, float], kind: Half = "fp16") -> tuple[str, ...]:
    """Return the modules whose scanned magnitudes are too close to the maximum of the type, and log them."""
    held = overflow_prone_modules(scanned, kind)
    for module in held:
        log.warning(
            "%s reaches %.3g, too close to the FP16 maximum of 65504. It stays in FP32.", module, scanned[module]
        )
    # A graph without convolutions and matrix products has no magnitudes.
    if scanned:
        largest = max(scanned, key=lambda module: scanned[module])
        log.info("Largest magnitude: %.3g in %s; %d modules stay in FP32.", scanned[largest], largest, len(held))
    return held


def _restore_half(
    graph: onnx.ModelProto,
    half: onnx.ModelProto,
    kind: Half,
    keep: Sequence[str],
    data_set: DataSet,
    options: ConversionOptions,
) -> tuple[onnx.ModelProto, list[str]]:
    """Return a half-precision graph within the budget on held-out training queries, and its modules in FP32."""
    queries = sample_held_out(data_set, read_manifest(graph), SCAN_QUERIES)
    log.info("Checking %s on %d held-out training queries ...", kind, len(queries))
    evaluator = AccuracyEvaluator(graph, data_set, queries, options.threads)

    def cost_of(restored: Sequence[str], label: str) -> AccuracyDelta:
        candidate = convert_to_half(graph, kind, (*keep, *restored)) if restored else half
        return evaluator.cost(emulate_bf16(candidate), label)

    def is_within_budget(cost: AccuracyDelta) -> bool:
        # One flip of 128 queries is 0.8 points, which is noise: a single flip is always accepted.
        drop = max(options.max_drop, 100 / len(evaluator.annotations))
        return cost.worst_drop <= drop and (kind == "bf16" or cost.shift_p99 <= BOUNDARY_P99)

    def ranked() -> list[str]:
        names = sorted(modules(graph) - set(keep))
        alone = {name: cost_of([other for other in names if other != name], name) for name in names}
        return sorted(names, key=lambda name: alone[name].agreement)

    restored, steps = minimal_keep_set(ranked, cost_of, is_within_budget)
    if restored is None:
        best = min((cost for _, cost in steps), key=lambda cost: cost.shift_p99)
        raise CheckFailed(
            f"With all but one module in FP32, {kind} shifts boundaries by {best.shift_p99:.2f} s and drops accuracy "
            f"by {best.worst_drop:.2f} points, over the budget. Choose --precision fp32 or bf16, or raise --max-drop.",
            code="budget_exceeded",
        )
    if not restored:
        return half, []
    print(format_deltas(steps))
    log.warning("%s stay in FP32: in %s the accuracy drop exceeds the budget.", ", ".join(restored), kind)
    return convert_to_half(graph, kind, (*keep, *restored)), restored


def _quantize(
    source: onnx.ModelProto,
    kind: QuantDtype,
    options: ConversionOptions,
    held: Sequence[str],
    data_set: DataSet | None,
    name: str,
) -> ConvertedGraph:
    manifest = read_manifest(source)
    table, evaluator = _calibration_table(source, manifest, kind, options, data_set, name)
    keep = tuple(dict.fromkeys(options.keep))
    if options.plan:
        keep = tuple(
            dict.fromkeys((*keep, *QuantizationPlan.load(options.plan).checked(source, table, kind, name).keep))
        )
    elif data_set:
        keep = _restore_quantized(source, kind, table, keep, data_set, evaluator, options)
    log.info("Quantizing to %s ...", kind.upper())
    policy = options.policy(keep)
    facts = {
        "calibration": table.digest,
        "method": table.key["method"],
        "kept out of 8 bits": list(keep),
        "held back in FP32": list(held),
    }
    if kind == "int8" and options.library:
        # OpenVINO multiplies convolutions in 8 bits, and dequantizes weights in its matrix products.
        if options.library == "openvino":
            return ConvertedGraph(insert_qdq(source, table, policy, kind), facts, table)
        # ONNX Runtime would dequantize weights that are only stored in 8 bits for every query.
        policy = dataclasses.replace(policy, stored=())
        return ConvertedGraph(convs_to_matmul(insert_qdq(source, table, policy, kind)), facts, table)
    quantized = insert_qdq(source, table, policy, kind, OPSETS[kind])
    return ConvertedGraph(convert_to_half(quantized, "fp16", held), facts, table)


def _calibration_table(
    source: onnx.ModelProto,
    manifest: Manifest,
    kind: QuantDtype,
    options: ConversionOptions,
    data_set: DataSet | None,
    name: str,
) -> tuple[CalibrationTable, AccuracyEvaluator | None]:
    """Return the calibration table of the options or a new one, and the evaluator that chose its method."""
    if options.table:
        table = CalibrationTable.load(options.table)
        table.check(source, name)
        if data_set:
            table.check_videos(data_set)
        return table, None
    # `BuildRequest.check` requires a table or a data set.
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
        policy=options.policy(),
        kind=kind,
    )
    if options.table_output:
        table.save(options.table_output)
    return table, evaluator


def _restore_quantized(
    source: onnx.ModelProto,
    kind: QuantDtype,
    table: CalibrationTable,
    keep: tuple[str, ...],
    data_set: DataSet,
    evaluator: AccuracyEvaluator | None,
    options: ConversionOptions,
) -> tuple[str, ...]:
    """Return the modules to keep out of 8 bits to meet the budget on held-out training videos.

    Writes a quantization plan if these are more than `keep`.
    """
    policy, manifest = options.policy(keep), read_manifest(source)
    evaluator = evaluator or AccuracyEvaluator(
        source, data_set, sample_held_out(data_set, manifest, HELD_OUT, exclude=table.videos), options.threads
    )
    first = evaluator.cost(insert_qdq(source, table, policy, kind), "all quantized")
    summary = (
        f"The accuracy drop of {kind.upper()} on {first.queries} held-out training queries is {first.worst_drop:.2f} "
        f"points; the budget is {options.max_drop:g}."
    )
    if first.within(options.max_drop):
        log.info("%s No module is restored.", summary)
        return keep
    more = sample_held_out(data_set, manifest, MAX_HELD_OUT, exclude=table.videos)
    log.info("%s Restoring modules, on %d queries ...", summary, len(more))
    larger = AccuracyEvaluator(source, data_set, more, options.threads) if len(more) > first.queries else evaluator
    plan, steps = find_layers_to_restore(
        source, table, larger, options.max_drop, policy=policy, kind=kind, ranker=evaluator
    )
    print(format_deltas(steps))
    kept_modules = tuple(dict.fromkeys((*keep, *plan.keep)))
    if plan.keep:
        precision = "FP32" if options.library else "FP16"
        print(f"Restored to {precision} for the budget of {options.max_drop:g} points: {', '.join(plan.keep)}.")
        if options.plan_output:
            dataclasses.replace(plan, keep=kept_modules).save(options.plan_output)
            print(f"{options.plan_output.name}: quantization plan; --plan and --table reproduce the graph.")
    return kept_modules


def validate_keep_modules(graph: onnx.ModelProto, precision: str, keep: Sequence[str]) -> None:
    """Raise ShapeError if a module does not exist in the graph or cannot be kept in the precision.

    Args:
        graph: FP32 graph.
        precision: fp32, fp16, bf16, int8 or fp8.
        keep: modules of --keep.
    """
    if not keep:
        return
    if precision in ("int8", "fp8"):
        find_quantizable_ops(graph, QuantizationPolicy(keep=tuple(keep)), "fp8" if precision == "fp8" else "int8")
    else:
        check_modules(graph, keep)

"""`python -m calib.restore`: find a small set of modules to keep in higher precision for a recall budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.accuracy import AccuracyDelta, AccuracyEvaluator, format_deltas
from calib.calibrate import unproven_name
from calib.calibration_set import SAMPLES, sample_held_out
from calib.calibration_table import CalibrationTable
from calib.errors import CalibrationError
from calib.graph.onnx_graph import load_fp32_graph, read_manifest
from calib.qdq_quantizer import QuantDtype, QuantizationPolicy, insert_qdq, modules
from calib.quantization_plan import QuantizationPlan
from calib.rank_layers import given_table, measure_sensitivity, ranked_names
from runtime.core.cli import command, report_written, suggest_next_command
from runtime.core.errors import CheckFailed, check_option
from runtime.core.io.atomic_files import atomic_write
from runtime.datasets.dataset import DataSet

if TYPE_CHECKING:
    import onnx

log = logging.getLogger("drn")


def restore(
    onnx: Path,
    data: Path,
    table: Path,
    output: Path,
    *,
    max_drop: float = 0.2,
    ranking: Path | None = None,
    held_out: int = SAMPLES,
    seed: int = 0,
    kind: QuantDtype = "int8",
    threads: int | None = None,
) -> QuantizationPlan:
    """Restore the precision of the most sensitive modules until recall holds on held-out training videos.

    Args:
        onnx: FP32 graph from `python -m export.to_onnx`.
        data: directory of a data set (docs/formats.md). Only its training split is read.
        table: calibration table from `python -m calib.calibrate`, measured on this graph.
        output: quantization plan to write, for `python -m calib.quantize --plan`.
        max_drop: maximum loss of R@1 IoU=0.7 and of mIoU, in points.
        ranking: ranking from `python -m calib.rank_layers`. Default: measured here if quantizing all modules exceeds
            --max-drop.
        held_out: number of held-out queries to measure the loss on. One query is 100 / held_out points.
        seed: random seed of the choice of queries.
        kind: 8-bit data type to quantize to.
        threads: number of CPU threads. Default: set by ONNX Runtime.

    Returns:
        The quantization plan.

    Raises:
        CalibrationError: the table or the ranking belongs to another graph.
        CheckFailed: no quantized graph meets the budget.
    """
    check_option("--max-drop", max_drop, 0, error=CalibrationError)
    model = load_fp32_graph(onnx)
    data_set = DataSet(data)
    calibration = given_table(model, data_set, table, seed, threads, str(onnx))
    order = ranked_names(ranking, calibration, kind) if ranking else None
    with atomic_write(output) as temporary:
        queries = sample_held_out(data_set, read_manifest(model), held_out, seed, exclude=calibration.videos)
        evaluator = AccuracyEvaluator(model, data_set, queries, threads)
        plan, steps = find_layers_to_restore(model, calibration, evaluator, max_drop, order, kind=kind)
        plan.save(temporary)
    print(format_deltas(steps))
    retained = ", ".join(plan.keep) or "nothing"
    print(
        f"Restored: {retained}; {len(evaluator.annotations)} queries of held-out training videos, "
        f"budget {max_drop:g} points."
    )
    report_written(output)
    options = ("--model", onnx, "--table", table, "--plan", output, "--output", unproven_name(onnx, kind))
    suggest_next_command("calib.quantize", *options, *(() if kind == "int8" else ("--kind", kind)))
    return plan


def find_layers_to_restore(
    model: onnx.ModelProto,
    table: CalibrationTable,
    evaluator: AccuracyEvaluator,
    max_drop: float,
    order: Sequence[str] | None = None,
    policy: QuantizationPolicy | None = None,
    kind: QuantDtype = "int8",
    ranker: AccuracyEvaluator | None = None,
) -> tuple[QuantizationPlan, list[tuple[str, AccuracyDelta]]]:
    """Search a small set of modules to keep in higher precision (see `minimal_keep_set`).

    Args:
        model: FP32 graph.
        max_drop: maximum loss of R@1 IoU=0.7 and of mIoU, in points.
        order: modules, most sensitive first; measured when None, if quantizing all modules exceeds the budget.
        policy: modules to quantize at the start; the default policy when None.
        ranker: evaluator that measures the order; agreement with FP32 needs fewer queries than recall. `evaluator`
            when None.

    Returns:
        The plan, and the label and accuracy loss of each step of the search.

    Raises:
        CheckFailed: no quantized graph is within the budget.
    """
    policy = policy or QuantizationPolicy()

    def ranked() -> list[str]:
        names = order
        if names is None:
            names = [entry.module for entry in measure_sensitivity(model, table, ranker or evaluator, policy, kind)]
        quantized = modules(model, policy, kind)
        return [name for name in names if name in quantized]

    if 0 < max_drop < 100 / len(evaluator.annotations):
        log.info(
            "One of %d queries is %.2f points, above the budget of %g, so modules are restored only for a loss beyond "
            "chance (95 %%).",
            len(evaluator.annotations),
            100 / len(evaluator.annotations),
            max_drop,
        )
    keep, steps = minimal_keep_set(
        ranked,
        lambda keep, label: evaluator.cost(insert_qdq(model, table, policy.keeping(*keep), kind), label),
        lambda cost: cost.within(max_drop),
    )
    if keep is None:
        min_drop = min(cost.worst_drop for _, cost in steps)
        raise CheckFailed(
            f"With all but one module restored, {kind.upper()} loses {min_drop:.2f} points, expected at most "
            f"{max_drop:g}. Build FP16, or raise --max-drop.",
            code="budget_exceeded",
        )
    final = next(cost for label, cost in reversed(steps) if cost.within(max_drop))
    measured: dict[str, Any] = {
        "max_drop": max_drop,
        "cost": final.to_dict(),
        "steps": [{"step": label, **cost.to_dict()} for label, cost in steps],
    }
    return QuantizationPlan(tuple(keep), kind, table.digest, dict(table.key), measured), steps


def minimal_keep_set(
    ranked: Callable[[], Sequence[str]],
    cost_of: Callable[[Sequence[str], str], AccuracyDelta],
    holds: Callable[[AccuracyDelta], bool],
) -> tuple[list[str] | None, list[tuple[str, AccuracyDelta]]]:
    """Search a small set of modules to keep in higher precision so that a budget holds.

    1. Modules are added, most sensitive first, until the budget holds. If it does not hold with all but the last one,
       each other module in turn is the only quantized one.
    2. Each module of the set is removed if the budget holds without it.
    3. If several remain, each module is tried as the only one.

    The result was measured to hold. It is a single module if a single one suffices; a larger set may not be minimal,
    but none of its modules could be removed in step 2. Of n modules at most 4 n sets are measured, each once, and only
    one if the budget holds for the empty set.

    Args:
        ranked: returns the modules that may be kept, most sensitive first; called only if the empty set fails.
        cost_of: returns the loss of the graph that keeps the given modules; its second argument labels the step.
        holds: whether a loss is within the budget.

    Returns:
        The modules, or None if the budget fails for every set of all modules but one; and (label, loss) of each step.
        The last step that holds belongs to the returned set.
    """
    steps: list[tuple[str, AccuracyDelta]] = []
    failed: set[frozenset[str]] = set()

    def suffices(keep: Sequence[str], label: str) -> bool:
        if frozenset(keep) in failed:
            return False
        cost = cost_of(keep, label)
        steps.append((label, cost))
        if holds(cost):
            return True
        failed.add(frozenset(keep))
        return False

    if suffices([], "all narrow"):
        return [], steps
    names = list(ranked())
    keep = _sufficient(names, suffices)
    if keep is None:
        return None, steps
    for module in list(keep):
        fewer = [name for name in keep if name != module]
        if suffices(fewer, f"- {module}"):
            keep = fewer
    if len(keep) > 1:
        keep = next(([name] for name in names if suffices([name], f"only {name}")), keep)
    return keep, steps


def _sufficient(names: Sequence[str], suffices: Callable[[Sequence[str], str], bool]) -> list[str] | None:
    """Return modules that suffice (step 1 of `minimal_keep_set`); None if every set of all but one fails."""
    for count in range(1, len(names)):
        if suffices(names[:count], f"+ {names[count - 1]}"):
            return list(names[:count])
    # The least sensitive module first; the last one was quantized alone in the loop above.
    for quantized in reversed(names[:-1]):
        others = [name for name in names if name != quantized]
        if suffices(others, f"all but {quantized}"):
            return others
    return None


if __name__ == "__main__":
    command(restore)

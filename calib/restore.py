"""`python -m calib.restore`: few modules that must not be INT8 for the recall budget to hold, one if one is enough."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.accuracy import AccuracyDelta, AccuracyEvaluator, format_deltas
from calib.calibrate import unproven_name
from calib.calibration_set import SAMPLES
from calib.calibration_table import CalibrationTable
from calib.errors import CalibrationError
from calib.graph.onnx_graph import load_fp32_graph
from calib.qdq_quantizer import QuantDtype, QuantizationPolicy, insert_qdq, modules
from calib.quantization_plan import QuantizationPlan
from calib.rank_layers import evaluator_for, given_table, measure_sensitivity, ranked_names
from runtime.core.cli import command, suggest_next_command
from runtime.core.errors import CheckFailed
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
        onnx: FP32 graph.
        data: directory of a data set (docs/formats.md). Only its training split is read.
        table: calibration table from `python -m calib.calibrate`, measured on this graph.
        output: quantization plan to write, for `python -m calib.quantize --plan`.
        max_drop: maximum loss of R@1 IoU=0.7 and of mIoU, in points.
        ranking: ranking from `python -m calib.rank_layers`. Default: measured here if needed.
        held_out: number of queries to measure the loss on. One query is 100 / held_out points.
        seed: random seed of their selection.
        kind: int8 or fp8.
        threads: number of CPU threads.

    Returns:
        The quantization plan.

    Raises:
        CalibrationError: the table or the ranking belongs to another graph.
        CheckFailed: no quantized graph meets the budget.
    """
    if not max_drop >= 0:
        raise CalibrationError(f"Expected --max-drop of at least 0 points, got {max_drop}. Correct the option.")
    model = load_fp32_graph(onnx)
    data_set = DataSet(data)
    calibration = given_table(model, data_set, table, seed, threads, str(onnx))
    order = ranked_names(ranking, calibration, kind) if ranking else None
    with atomic_write(output) as temporary:
        evaluator = evaluator_for(model, data_set, calibration, held_out, seed, threads)
        plan, steps = find_layers_to_restore(model, calibration, evaluator, max_drop, order, kind=kind)
        plan.save(temporary)
    print(format_deltas(steps))
    retained = ", ".join(plan.keep) or "nothing"
    print(
        f"Restored: {retained}; {len(evaluator.annotations)} queries of held-out training videos, "
        f"budget {max_drop:g} points."
    )
    words = ("--onnx", onnx, "--table", table, "--plan", output, "--output", unproven_name(onnx, kind))
    suggest_next_command("calib.quantize", *words, *(() if kind == "int8" else ("--kind", kind)))
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
    """Return a plan that keeps few modules, one if one is enough, and what each step of the search cost.

    See `minimal_keep_set` for how they are looked for, and for what is promised of them.

    Args:
        model, table: the FP32 graph and its ranges.
        evaluator: over held-out training queries.
        max_drop: points of R@1 IoU=0.7 and of mIoU.
        order: modules, costliest first; ranked when None and needed.
        policy: what is narrowed to begin with.
        kind: int8 or fp8.
        ranker: ranks in place of `judge`: agreement with FP32 needs fewer queries than recall.

    Raises:
        CheckFailed: the budget holds for no narrow graph.
    """
    policy = policy or QuantizationPolicy()

    def ranked() -> list[str]:
        names = order
        if names is None:
            names = [entry.module for entry in measure_sensitivity(model, table, ranker or evaluator, policy, kind)]
        narrow = modules(model, policy, kind)
        return [name for name in names if name in narrow]

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
        least = min(cost.worst_drop for _, cost in steps)
        raise CheckFailed(
            f"Even with all but one module restored, {kind.upper()} loses at least {least:.2f} points and "
            f"{max_drop:g} are allowed; build FP16, or allow more with --max-drop.",
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
    """Return few modules to keep in higher precision for a promise to hold, and what each step cost.

    Modules are kept, costliest first, until the promise holds; where it does not hold even with all but the last one
    kept, each other one in turn is left narrow alone. From what then holds each module is dropped that can be. If
    several remain, each module is tried as the only one.

    Promised of what is returned: the promise was seen to hold for it. One module is returned if there is one that is
    enough; several may be more than the fewest, but none of them could be dropped when it was tried. Of n modules, no
    more than 4 n sets are judged, one where the promise holds from the start, and none twice.

    Args:
        ranked: returns the modules that may be kept, costliest first; asked only when something must be kept.
        cost_of: returns what the graph that keeps these modules costs; its second argument names the step.
        holds: whether a cost is within the budget.

    Returns:
        The modules, or None where the promise does not hold even with all modules but one kept, whichever that one
        is; and (label, cost) of each step. The last step that holds is what the modules returned cost.
    """
    steps: list[tuple[str, AccuracyDelta]] = []
    failed: set[frozenset[str]] = set()

    def good(keep: Sequence[str], label: str) -> bool:
        if frozenset(keep) in failed:
            return False
        cost = cost_of(keep, label)
        steps.append((label, cost))
        if holds(cost):
            return True
        failed.add(frozenset(keep))
        return False

    if good([], "all narrow"):
        return [], steps
    names = list(ranked())
    keep = _enough(names, good)
    if keep is None:
        return None, steps
    for module in list(keep):
        fewer = [name for name in keep if name != module]
        if good(fewer, f"- {module}"):
            keep = fewer
    if len(keep) > 1:
        keep = next(([name] for name in names if good([name], f"only {name}")), keep)
    return keep, steps


def _enough(names: Sequence[str], good: Callable[[Sequence[str], str], bool]) -> list[str] | None:
    """Return modules to keep that are enough, though perhaps too many; None if all but one never are.

    Never all of them: a graph without anything narrow is not what was asked for.
    """
    for count in range(1, len(names)):
        if good(names[:count], f"+ {names[count - 1]}"):
            return list(names[:count])
    # Most likely to hold first: what costs least alone is narrow. The last one was, just now.
    for narrow in reversed(names[:-1]):
        others = [name for name in names if name != narrow]
        if good(others, f"all but {narrow}"):
            return others
    return None


if __name__ == "__main__":
    command(restore)

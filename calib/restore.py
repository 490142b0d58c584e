"""`python -m calib.restore`: the fewest modules that must not be INT8 for the recall budget to hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.batches import SAMPLES
from calib.errors import CalibrationError
from calib.graphs import read_graph
from calib.judge import Cost, Judge, cost_table
from calib.plan import Plan
from calib.qdq import Kind, Policy, modules, quantize
from calib.rank_layers import given_table, judge_for, rank, ranked_names
from calib.table import CalibrationTable
from runtime.annotations import DataSet
from runtime.command import command, next_command
from runtime.errors import PromiseBroken
from runtime.files import replace_when_whole

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
    kind: Kind = "int8",
    threads: int | None = None,
) -> Plan:
    """Give modules their precision back, costliest first, until recall holds on held-out training videos.

    Args:
        onnx: the FP32 graph.
        data: directory in the Charades-STA layout. Only its training split is looked at.
        table: of `python -m calib.calibrate`, measured on this graph.
        output: the plan to write, for `python -m calib.quantize --plan`.
        max_drop: points of R@1 IoU=0.7 and of mIoU that may be lost.
        ranking: of `python -m calib.rank_layers --table`; ranked here when not given and needed.
        held_out: queries to judge by. One flip is 100 / held_out points.
        seed: of the draw.
        kind: int8 or fp8.
        threads: CPU threads.

    Returns:
        The plan.

    Raises:
        CalibrationError: the table or the ranking was made for another graph.
        PromiseBroken: the budget holds for no narrow graph at all.
    """
    if not max_drop >= 0:
        raise CalibrationError(
            f"--max-drop is points of recall that may be lost, at least 0, and {max_drop} was given."
        )
    model = read_graph(onnx)
    data_set = DataSet(data)
    calibration = given_table(model, data_set, table, seed, threads, str(onnx))
    order = ranked_names(ranking, calibration, kind) if ranking else None
    with replace_when_whole(output) as temporary:
        judge = judge_for(model, data_set, calibration, held_out, seed, threads)
        plan, steps = search(model, calibration, judge, max_drop, order, kind=kind)
        plan.save(temporary)
    print(cost_table(steps))
    kept = ", ".join(plan.keep) or "nothing"
    print(
        f"Restored: {kept}; {len(judge.annotations)} queries of held-out training videos, budget {max_drop:g} points."
    )
    words = ("--onnx", onnx, "--table", table, "--plan", output, "--output", f"drn.{kind}.onnx")
    next_command("calib.quantize", *words)
    return plan


def search(
    model: onnx.ModelProto,
    table: CalibrationTable,
    judge: Judge,
    max_drop: float,
    order: Sequence[str] | None = None,
    policy: Policy | None = None,
    kind: Kind = "int8",
    ranker: Judge | None = None,
) -> tuple[Plan, list[tuple[str, Cost]]]:
    """Return the plan that keeps fewest modules within the budget, and what each step of the search cost.

    Greedy: modules are restored in the order of what they cost alone until the budget holds, then each of them is
    narrowed again if the budget holds without it.

    Args:
        model, table: the FP32 graph and its ranges.
        judge: over held-out training queries.
        max_drop: points of R@1 IoU=0.7 and of mIoU.
        order: modules, costliest first; ranked when None and needed.
        policy: what is narrowed to begin with.
        kind: int8 or fp8.
        ranker: ranks in place of `judge`: agreement with FP32 needs fewer queries than recall.

    Raises:
        PromiseBroken: the budget holds for no narrow graph.
    """
    policy = policy or Policy()

    def ranked() -> list[str]:
        names = order
        if names is None:
            names = [entry.module for entry in rank(model, table, ranker or judge, policy, kind)]
        narrow = modules(model, policy, kind)
        return [name for name in names if name in narrow]

    if 100 / len(judge.annotations) > max_drop:
        log.info(
            "One flip among %d queries is %.2f points, above the budget of %g: no query may be lost on balance.",
            len(judge.annotations),
            100 / len(judge.annotations),
            max_drop,
        )
    keep, steps = fewest(
        ranked,
        lambda keep, label: judge.cost(quantize(model, table, policy.keeping(*keep), kind), label),
        lambda cost: cost.worst_drop <= max_drop,
    )
    if keep is None:
        raise PromiseBroken(
            f"Even with all but one module restored, {kind.upper()} loses {steps[-1][1].worst_drop:.2f} points and "
            f"{max_drop:g} are allowed; build FP16, or allow more with --max-drop."
        )
    final = next(cost for label, cost in reversed(steps) if cost.worst_drop <= max_drop)
    measured: dict[str, Any] = {
        "max_drop": max_drop,
        "cost": final.to_dict(),
        "steps": [{"step": label, **cost.to_dict()} for label, cost in steps],
    }
    return Plan(tuple(keep), kind, table.digest, dict(table.key), measured), steps


def fewest(
    ranked: Callable[[], Sequence[str]],
    cost_of: Callable[[Sequence[str], str], Cost],
    holds: Callable[[Cost], bool],
) -> tuple[list[str] | None, list[tuple[str, Cost]]]:
    """Return the fewest modules to keep in higher precision for a promise to hold, and what each step cost.

    Args:
        ranked: returns the modules that may be kept, costliest first; asked only when something must be kept.
        cost_of: returns what the graph that keeps these modules costs; its second argument names the step.
        holds: whether a cost is within the budget.

    Returns:
        The modules, or None where the promise holds for no graph that narrows anything; and (label, cost) of each step.
    """
    steps: list[tuple[str, Cost]] = []

    def good(keep: Sequence[str], label: str) -> bool:
        cost = cost_of(keep, label)
        steps.append((label, cost))
        return holds(cost)

    keep: list[str] = []
    if good(keep, "all narrow"):
        return keep, steps
    # The last one is not kept: a graph without anything narrow is not what was asked for.
    for module in list(ranked())[:-1]:
        keep.append(module)
        if good(keep, f"+ {module}"):
            break
    else:
        return None, steps
    for module in keep[:-1]:
        fewer = [name for name in keep if name != module]
        if good(fewer, f"- {module}"):
            keep = fewer
    return keep, steps


if __name__ == "__main__":
    command(restore)

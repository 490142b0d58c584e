"""Hold the result of a comparison of two models, and check it against a budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from runtime.artifacts.engine_layers import CONTRADICTED, NOT_PROVEN, PROVEN
from runtime.core.decoding import Protocol
from runtime.core.metrics import Report, recall_name
from runtime.core.moments import Moment

FORMAT = "drn-parity/1"
GATED_METRICS = (recall_name(1, 0.7), "mIoU")
"""What the budget is held against; R@5 IoU=0.5 says next to nothing on Charades-STA."""

FLOAT_TOLERANCE_POINTS = 1e-4
"""Points by which mIoU may differ between any two orders of float32 sums."""

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class OutputDeviation:
    """The deviation of one output of the network, over all queries and locations.

    Attributes:
        max, p99: absolute error, in the unit of the output.
        largest: the reference's largest absolute value, to judge them by.
        not_finite: values that are NaN or infinite in the other model alone; they are left out of the errors.
    """

    max: float
    p99: float
    largest: float
    not_finite: int


@dataclasses.dataclass(frozen=True)
class BoundaryShift:
    """The shift of starts and ends, in seconds."""

    p50: float
    p99: float
    max: float


@dataclasses.dataclass(frozen=True)
class MomentIoU:
    """Temporal IoU between the two models' best moments."""

    mean: float
    p1: float
    min: float


@dataclasses.dataclass(frozen=True)
class RankAgreement:
    """The share of queries whose best moment is the same in both, and whose best five come in the same order.

    A moment is the same when no other of the five overlaps it more: precision may move its borders a little.
    """

    first: float
    five: float


@dataclasses.dataclass(frozen=True)
class Flips:
    """Queries that one model answers and the other does not.

    Attributes:
        gained, lost: the lines of the annotation file where only the other, or only the reference, is right.
        p_value: McNemar's exact test, two-sided: how often chance alone would split the flips so unevenly.
    """

    gained: tuple[int, ...]
    lost: tuple[int, ...]
    p_value: float


@dataclasses.dataclass(frozen=True)
class MetricDelta:
    """Other less reference, a fraction, and its bootstrap interval over queries."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """One query that the two models answer differently; times in seconds, None where a model gave no moment.

    Attributes:
        line: where the query stands in the annotation file.
        overlap: temporal IoU between the two moments.
        reference_iou, other_iou: of each with the truth.
        shift: how far the farther of the two borders moved.
    """

    line: int
    video: str
    query: str
    duration: float
    truth: tuple[float, float]
    reference: Moment | None
    other: Moment | None
    overlap: float
    reference_iou: float
    other_iou: float
    shift: float


@dataclasses.dataclass(frozen=True)
class ParityResult:
    """The results of comparing two models on N queries.

    Attributes:
        queries: N.
        protocol: whose NMS and hit rule, for both.
        simulated: whether the features are simulated.
        heads: by output.
        locations: shift of what each location proposes, before any ranking: the error of the regression alone.
        boundaries: shift of the best moments: a changed order shows here as a leap.
        overlap, order: of the best moments.
        flips: by metric, R@1 IoU=0.5 and 0.7.
        differences: by metric, as `flips` and mIoU.
        whole: queries without a likely location in both models, whose agreement proves nothing.
        reference, other, prior: scores; the prior is None without a training split.
        worst: the queries whose best moments agree least, worst first.
        plans: of an engine how each of its plans answers.
    """

    queries: int
    protocol: Protocol
    simulated: bool
    heads: Mapping[str, OutputDeviation]
    locations: BoundaryShift
    boundaries: BoundaryShift
    overlap: MomentIoU
    order: RankAgreement
    flips: Mapping[str, Flips]
    differences: Mapping[str, MetricDelta]
    whole: int
    reference: Report
    other: Report
    prior: Report | None
    worst: tuple[Disagreement, ...]
    plans: tuple[PlanCheck, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "queries": self.queries,
            "protocol": self.protocol,
            "simulated_features": self.simulated,
            "answered_whole": self.whole,
            "recall": {
                "reference": self.reference.to_dict(),
                "other": self.other.to_dict(),
                "prior": self.prior.to_dict() if self.prior else None,
            },
            "heads": {name: dataclasses.asdict(error) for name, error in self.heads.items()},
            "locations_s": dataclasses.asdict(self.locations),
            "boundaries_s": dataclasses.asdict(self.boundaries),
            "overlap": dataclasses.asdict(self.overlap),
            "order": dataclasses.asdict(self.order),
            "flips": {name: dataclasses.asdict(flips) for name, flips in self.flips.items()},
            "differences": {name: dataclasses.asdict(value) for name, value in self.differences.items()},
            "confidence": CONFIDENCE,
            "worst": [dataclasses.asdict(row) for row in self.worst],
            "plans": [check.to_dict() for check in self.plans],
        }


@dataclasses.dataclass(frozen=True)
class AccuracyBudget:
    """Limit how much accuracy a converted model may lose.

    Attributes:
        max_drop: points (percent of all queries) of R@1 IoU=0.7 and of mIoU.
        boundary_p99: seconds that 99 % of the borders of best moments stay within; None judges none.
    """

    max_drop: float = 0.2
    boundary_p99: float | None = 0.1

    @classmethod
    def of(cls, precision: str, max_drop: float = 0.2, boundary_p99: float | None = None) -> AccuracyBudget:
        """Return the budget for a model of this precision: borders are held to 0.1 s in FP32 and FP16.

        Narrower numbers move borders by more, and are judged by recall unless `boundary_p99` says otherwise.
        """
        if boundary_p99 is None and precision in ("fp32", "fp16"):
            boundary_p99 = cls.boundary_p99
        return cls(max_drop, boundary_p99)


def violations(parity: ParityResult, budget: AccuracyBudget) -> list[str]:
    """Return the promises that do not hold, of the model and of each of its plans, a clause each; none if all hold."""
    of_plans = (check.broken(parity.queries, budget) for check in parity.plans)
    return [*exceeded_limits(parity, budget), *(clause for clauses in of_plans for clause in clauses)]


def exceeded_limits(parity: ParityResult, budget: AccuracyBudget, share: float = 1.0) -> list[str]:
    """Return the promises that some answers break, a clause each.

    Args:
        parity: of these answers.
        budget: the accepted loss.
        share: of all queries, 0 to 1: points are percent of all.
    """
    broken = []
    for name, error in parity.heads.items():
        if error.not_finite:
            broken.append(f"{name} holds {error.not_finite} values that are not finite and are in the reference")
    for name in GATED_METRICS:
        drop, evidence = _drop(parity, budget, name, share)
        # A budget that is used up to the last query is kept, and float32's rounding is no loss: one query of 3,720 is
        # 0.03 points.
        if evidence > budget.max_drop + FLOAT_TOLERANCE_POINTS:
            before, after = (100 * side.values[name] for side in (parity.reference, parity.other))
            broken.append(
                f"{name} falls by {drop:.2f} points ({before:.2f} to {after:.2f}) where {budget.max_drop:g} may be lost"
            )
    limit, moved = budget.boundary_p99, parity.boundaries.p99
    if limit is not None and moved > limit:
        broken.append(f"1 % of the boundaries move by {moved:.3f} s or more where {limit:g} s is allowed")
    return broken


def unresolved_drops(parity: ParityResult, budget: AccuracyBudget) -> list[str]:
    """Return the drops above the budget that so few queries do not prove, one clause each.

    One query of N is 100 / N points. If that is more than the budget, a single changed answer exceeds it, and
    `exceeded_limits` rejects only what the 95 % interval of the drop proves.
    """
    clauses = []
    for name in GATED_METRICS:
        drop, evidence = _drop(parity, budget, name)
        if evidence <= budget.max_drop + FLOAT_TOLERANCE_POINTS < drop:
            enough, one = math.ceil(100 / budget.max_drop), 100 / parity.queries
            clauses.append(
                f"{name} falls by {drop:.2f} points on {parity.queries} queries. One query is {one:.2f} points, so a "
                f"budget of {budget.max_drop:g} cannot be judged; use {enough} queries or more, or "
                f"--max-drop {math.ceil(drop)}"
            )
    return clauses


def _drop(parity: ParityResult, budget: AccuracyBudget, name: str, share: float = 1.0) -> tuple[float, float]:
    """Return the drop of a metric in points, and the drop that counts against the budget.

    They differ if one query is more than a budget above 0: then the lower end of the interval counts.
    """
    delta, queries = parity.differences[name], parity.queries / share
    drop = -100 * share * delta.mean
    if 0 < budget.max_drop < 100 / queries:
        return drop, -100 * share * delta.high
    return drop, drop


def format_points(fraction: float) -> str:
    """Return a difference of two fractions in points, with its sign; nothing is never below zero."""
    return f"{round(100 * fraction, 2) + 0.0:+.2f}"


@dataclasses.dataclass(frozen=True)
class PlanCheck:
    """The accuracy of one of an engine's plans.

    Attributes:
        name: file name of the plan.
        max_query_length: tokens of the longest query that it takes.
        answered: number of queries that it answered when the engine was asked all.
        checked: number of queries for which its own answers were compared with the reference.
        parity: of these queries; None if there is none, or if this is the only plan, whose parity is the engine's.
    """

    name: str
    max_query_length: int
    answered: int
    checked: int
    parity: ParityResult | None = None

    def broken(self, queries: int, budget: AccuracyBudget) -> list[str]:
        """Return the promises that the plan breaks by itself, a clause each.

        Args:
            queries: number of all queries, of which points are percent.
            budget: the accepted loss.
        """
        if self.parity is None:
            return []
        return [
            f"{self.name} alone: {clause}"
            for clause in exceeded_limits(self.parity, budget, self.parity.queries / queries)
        ]

    def verdict(self, queries: int, budget: AccuracyBudget) -> tuple[str, str]:
        """Return proven, not proven or contradicted, and the reason, as a clause; arguments as of `broken`."""
        if not self.checked:
            return NOT_PROVEN, f"no query has at most {self.max_query_length} tokens"
        broken = self.broken(queries, budget)
        if broken:
            return CONTRADICTED, "; ".join(broken)
        return PROVEN, f"compared on {self.checked} queries"

    def to_dict(self) -> dict[str, Any]:
        result = self.parity.to_dict() if self.parity else {}
        retained = {key: result.get(key) for key in ("heads", "boundaries_s", "differences")}
        fields = ("name", "max_query_length", "answered", "checked")
        return {**{name: getattr(self, name) for name in fields}, **retained}

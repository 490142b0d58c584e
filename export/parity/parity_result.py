"""Define the result of comparing two models, and check it against an accuracy budget."""

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
"""Metrics that the budget limits. R@5 IoU=0.5 is not among them: five constant moments reach 85 % on Charades-STA."""

FLOAT_TOLERANCE_POINTS = 1e-4
"""Difference of mIoU, in points, that the order of float32 sums alone can cause."""

CONFIDENCE = 0.95
"""Confidence level of the bootstrap intervals."""


@dataclasses.dataclass(frozen=True)
class OutputDeviation:
    """The deviation of one output of the network, over all queries and locations.

    Attributes:
        max, p99: absolute error, in the unit of the output.
        largest: largest absolute value of the reference, to compare the errors with.
        not_finite: number of values that are NaN or infinite in the other model only; the errors leave them out.
    """

    max: float
    p99: float
    largest: float
    not_finite: int


@dataclasses.dataclass(frozen=True)
class BoundaryShift:
    """Quantiles of the shift of starts and ends, in seconds."""

    p50: float
    p99: float
    max: float


@dataclasses.dataclass(frozen=True)
class MomentIoU:
    """Mean, first percentile and minimum of the temporal IoU between the best moments of the two models."""

    mean: float
    p1: float
    min: float


@dataclasses.dataclass(frozen=True)
class RankAgreement:
    """Shares of queries with the same best moment, and with the same best five moments in the same order.

    Two moments are the same if none of the other four overlaps more: lower precision shifts boundaries a little.
    """

    first: float
    five: float


@dataclasses.dataclass(frozen=True)
class ScoreShift:
    """The difference between the scores of the best moments, which the no-match threshold is compared with.

    Attributes:
        ks: Kolmogorov-Smirnov statistic: largest difference between the cumulative distributions of the two models'
            scores, 0 to 1.
        p50, p99: quantiles of the absolute change of a query's score.
        threshold: no-match threshold of the reference; None if it has none.
        refused, answered: number of queries whose score is below the threshold, or not below it, in the other model
            only.
    """

    ks: float
    p50: float
    p99: float
    threshold: float | None
    refused: int
    answered: int


@dataclasses.dataclass(frozen=True)
class Flips:
    """Queries that only one of the two models answers correctly.

    Attributes:
        gained, lost: line numbers in the annotation file of the queries that only the other model, or only the
            reference, answers correctly.
        p_value: two-sided p value of McNemar's exact test.
    """

    gained: tuple[int, ...]
    lost: tuple[int, ...]
    p_value: float


@dataclasses.dataclass(frozen=True)
class MetricDelta:
    """Metric of the other model minus that of the reference, as a fraction, with its bootstrap confidence interval."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """A query that the two models answer differently. Times are in seconds.

    Attributes:
        line: line number in the annotation file.
        truth: start and end of the ground truth.
        reference, other: best moment of each model; None if it returned none.
        overlap: temporal IoU of the two moments.
        reference_iou, other_iou: temporal IoU of each moment with the ground truth.
        shift: shift of the start or the end, whichever is larger.
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
        queries: number of queries N.
        protocol: NMS and hit rule, used for both models.
        simulated: whether the features are simulated.
        heads: deviation of each output.
        locations: boundary shift of the proposal at each location, before ranking: the error of the regression alone.
        boundaries: boundary shift of the best moments, which also includes changes of the ranking.
        flips: metric to the queries that only one model answers correctly, for R@1 IoU=0.5 and 0.7.
        differences: metric to its difference, for the metrics of `flips` and mIoU.
        fallbacks: number of queries that both models answer with the full video because no location is likely. Their
            agreement is no evidence.
        reference, other, prior: metrics; the prior is None without a training split.
        worst: queries whose best moments overlap least, worst first.
        scores: difference between the scores of the best moments.
        plans: accuracy of each plan of an engine; empty for other models.
        overlap: temporal IoU of the best moments of the two models.
        order: agreement of the order of the best moments.
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
    fallbacks: int
    reference: Report
    other: Report
    prior: Report | None
    worst: tuple[Disagreement, ...]
    scores: ScoreShift
    plans: tuple[PlanCheck, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "queries": self.queries,
            "protocol": self.protocol,
            "simulated_features": self.simulated,
            "answered_whole": self.fallbacks,
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
            "scores": dataclasses.asdict(self.scores),
            "flips": {name: dataclasses.asdict(flips) for name, flips in self.flips.items()},
            "differences": {name: dataclasses.asdict(value) for name, value in self.differences.items()},
            "confidence": CONFIDENCE,
            "worst": [dataclasses.asdict(row) for row in self.worst],
            "plans": [check.to_dict() for check in self.plans],
        }


@dataclasses.dataclass(frozen=True)
class AccuracyBudget:
    """Limits of the accuracy drop of a converted model.

    Attributes:
        max_drop: maximum drop of R@1 IoU=0.7 and of mIoU, in points (percent of all queries).
        boundary_p99: maximum of the 99th percentile of the boundary shift of best moments, in seconds; None for no
            limit.
    """

    max_drop: float = 0.2
    boundary_p99: float | None = 0.1

    @classmethod
    def of(cls, precision: str, max_drop: float = 0.2, boundary_p99: float | None = None) -> AccuracyBudget:
        """Return the budget for a model of this precision.

        The default of `boundary_p99` is 0.1 s for FP32 and FP16. Lower precisions have no default limit, because they
        shift boundaries by more without a drop of recall.

        Args:
            precision: precision of the model: fp32, fp16, bf16, int8 or fp8.
            max_drop: maximum drop of R@1 IoU=0.7 and of mIoU, in points.
            boundary_p99: maximum of the 99th percentile of the boundary shift, in seconds; None for the default.
        """
        if boundary_p99 is None and precision in ("fp32", "fp16"):
            boundary_p99 = cls.boundary_p99
        return cls(max_drop, boundary_p99)


def violations(parity: ParityResult, budget: AccuracyBudget) -> list[str]:
    """Return each limit that the model or one of its plans exceeds, as a clause."""
    of_plans = (check.violations(parity.queries, budget) for check in parity.plans)
    return [*exceeded_limits(parity, budget), *(clause for clauses in of_plans for clause in clauses)]


def exceeded_limits(parity: ParityResult, budget: AccuracyBudget, share: float = 1.0) -> list[str]:
    """Return each limit that a comparison exceeds, as a clause.

    Args:
        parity: comparison on some or all queries.
        share: fraction of all queries that was compared, 0 to 1; a point is a percent of all queries.
    """
    exceeded = [
        f"{name} has {error.not_finite} non-finite values where the reference is finite"
        for name, error in parity.heads.items()
        if error.not_finite
    ]
    for name in GATED_METRICS:
        drop, evidence = _drop(parity, budget, name, share)
        if evidence > budget.max_drop + FLOAT_TOLERANCE_POINTS:
            before, after = (100 * side.values[name] for side in (parity.reference, parity.other))
            exceeded.append(
                f"the accuracy drop of {name} is {drop:.2f} points ({before:.2f} to {after:.2f}), over the budget of "
                f"{budget.max_drop:g}"
            )
    shift, limit = parity.boundaries.p99, budget.boundary_p99
    if limit is not None and shift > limit:
        exceeded.append(f"the 99th percentile of the boundary shift is {shift:.3f} s, over the budget of {limit:g} s")
    return exceeded


def unresolved_drops(parity: ParityResult, budget: AccuracyBudget) -> list[str]:
    """Return each drop over the budget that may be due to chance, as two sentences without the last full stop.

    One query of N is 100 / N points. If that is more than the budget, a single changed answer exceeds the budget, so
    `exceeded_limits` rejects only drops whose 95 % confidence interval is above it.
    """
    clauses = []
    for name in GATED_METRICS:
        drop, evidence = _drop(parity, budget, name)
        if evidence <= budget.max_drop + FLOAT_TOLERANCE_POINTS < drop:
            enough, one = math.ceil(100 / budget.max_drop), 100 / parity.queries
            clauses.append(
                f"{name} drops by {drop:.2f} points on {parity.queries} queries. One query is {one:.2f} points, over "
                f"the budget of {budget.max_drop:g}; use {enough} queries or more, or --max-drop {math.ceil(drop)}"
            )
    return clauses


def _drop(parity: ParityResult, budget: AccuracyBudget, name: str, share: float = 1.0) -> tuple[float, float]:
    """Return the drop of a metric, and the drop to compare with the budget, both in points.

    If a single query is more than a budget above 0, the second is the lower end of the confidence interval.
    """
    delta, queries = parity.differences[name], parity.queries / share
    drop = -100 * share * delta.mean
    if 0 < budget.max_drop < 100 / queries:
        return drop, -100 * share * delta.high
    return drop, drop


def format_points(fraction: float) -> str:
    """Return a difference of two fractions in points, with its sign; zero gets a plus."""
    return f"{round(100 * fraction, 2) + 0.0:+.2f}"


def format_interval(change: MetricDelta) -> str:
    """Return the confidence interval of a change, in points."""
    return f"{format_points(change.low)} to {format_points(change.high)}"


@dataclasses.dataclass(frozen=True)
class PlanCheck:
    """The accuracy of one plan of an engine.

    Attributes:
        name: file name of the plan.
        max_query_length: maximum number of tokens of a query.
        answered: number of queries that the plan answered when the engine ran on all queries.
        checked: number of queries whose answers by this plan alone were compared with the reference.
        parity: comparison on these queries; None if there are none, or for the only plan of an engine.
    """

    name: str
    max_query_length: int
    answered: int
    checked: int
    parity: ParityResult | None = None

    def violations(self, queries: int, budget: AccuracyBudget) -> list[str]:
        """Return each limit that the plan alone exceeds, as a clause; a point is a percent of all `queries`."""
        if self.parity is None:
            return []
        return [
            f"{self.name} alone: {clause}"
            for clause in exceeded_limits(self.parity, budget, self.parity.queries / queries)
        ]

    def verdict(self, queries: int, budget: AccuracyBudget) -> tuple[str, str]:
        """Return `proven`, `not proven` or `contradicted`, and the reason as a clause; see `violations`."""
        if not self.checked:
            return NOT_PROVEN, f"no query has at most {self.max_query_length} tokens"
        exceeded = self.violations(queries, budget)
        if exceeded:
            return CONTRADICTED, "; ".join(exceeded)
        return PROVEN, f"compared on {self.checked} queries"

    def to_dict(self) -> dict[str, Any]:
        result = self.parity.to_dict() if self.parity else {}
        fields = ("name", "max_query_length", "answered", "checked")
        compared = ("heads", "boundaries_s", "differences")
        return {name: getattr(self, name) for name in fields} | {key: result.get(key) for key in compared}

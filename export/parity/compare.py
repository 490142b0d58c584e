"""Compare two models on the same batches: heads, boundaries in seconds, ranking, and recall per query.

Differences are other minus reference. Recall is compared in pairs, because an unpaired R@1 of 3,720 queries has a
standard error of 0.8 points, far above the effect of ten changed answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from export.parity.compare_plans import PlanAnswers, plan_checks, plan_uses
from export.parity.parity_result import (
    CONFIDENCE,
    BoundaryShift,
    Disagreement,
    Flips,
    MetricDelta,
    MomentIoU,
    OutputDeviation,
    ParityResult,
    RankAgreement,
    ScoreShift,
)
from runtime.artifacts.manifest import Manifest
from runtime.core.agreement import boundary_shifts, compare_answers
from runtime.core.batch import Heads
from runtime.core.decoding import Protocol, score_proposals_with_fallback
from runtime.core.errors import AnnotationError, ModelFileError
from runtime.core.metrics import prior_report, recall_name, report
from runtime.core.moments import Moment, temporal_iou, to_moments
from runtime.core.prefetch import prefetch
from runtime.core.presence import Presence
from runtime.datasets.dataset import Annotation, DataSet, one_per_moment
from runtime.grounding.evaluation import (
    Chunk,
    cause_of,
    chunks,
    encode_queries,
    nms_per_threshold,
    run_chunk,
    used_fallback,
)
from runtime.grounding.grounder import BATCH_SIZE, Grounder

TOP_K = 5
"""Number of moments per query whose order is compared."""
NUM_WORST = 12
"""Number of queries that a report lists."""
RESAMPLES = 10_000
"""Number of bootstrap samples."""


def compare(
    reference: Grounder,
    other: Grounder,
    data_set: DataSet,
    annotations: Sequence[Annotation],
    *,
    protocol: Protocol | None = None,
    batch_size: int = BATCH_SIZE,
    known: Heads | None = None,
    concurrent: bool = False,
    on_progress: Callable[[int], Any] = lambda queries: None,
) -> ParityResult:
    """Run two models on the same queries, in one pass over the videos, and compare their answers.

    Args:
        reference: the model to compare with.
        other: the model to check.
        data_set: durations, features, and the training split for the prior.
        annotations: the N queries.
        protocol: NMS and hit rule for both models; None selects that of the reference.
        known: heads of the reference from `collect_outputs`, for callers that compare several models with it.
        concurrent: run both models at the same time, one thread each; for models on the CPU.
        on_progress: called with the number of queries that one of the models has answered since the last call.

    Raises:
        ModelFileError: the models differ in vocabulary, features or segments, or the reference returns non-finite
            heads.
        AnnotationError: there are no queries.
        QueryError: a model does not accept a sentence.
    """
    if not annotations:
        raise AnnotationError(
            "There are no queries to compare the models on. Choose another split or a larger --limit.",
            code="too_few_queries",
        )
    check_comparable(reference.manifest, other.manifest)
    # A query that the second model rejects is reported before the first model runs.
    encode_queries(other, annotations)
    models = (reference, other) if known is None else (other,)
    plans = plan_uses(other)
    # The parity of a single plan is that of the engine.
    alone = [PlanAnswers(other, plan, _empty_heads(other, len(annotations))) for plan in plans if len(plans) > 1]
    result, answered = _run_models(models, data_set, annotations, batch_size, concurrent, on_progress, alone)
    heads = result if known is None else [known, *result]
    prior_truth = None
    if "train" in data_set.splits:
        prior_truth = data_set.spans(one_per_moment(data_set.annotations("train", invalid="drop")))

    def measure_rows(plan_heads: Heads, rows: np.ndarray) -> ParityResult:
        sides = [
            Heads(**{name: values[rows] for name, values in vars(side).items()}) for side in (heads[0], plan_heads)
        ]
        selected = [annotations[row] for row in rows]
        return _measure(reference.manifest, other.manifest, sides, data_set, selected, protocol, None)

    try:
        parity = _measure(reference.manifest, other.manifest, heads, data_set, annotations, protocol, prior_truth)
        return dataclasses.replace(parity, plans=plan_checks(plans, answered, alone, measure_rows))
    except ModelFileError as error:
        overflowed = [annotations[row] for row in np.flatnonzero(~_finite_rows(heads[0]))[:BATCH_SIZE]]
        raise cause_of(error, reference, data_set, overflowed) from error


def check_comparable(reference: Manifest, other: Manifest) -> None:
    """Raise ModelFileError if two models do not accept the same inputs."""
    fields: dict[str, tuple[Any, Any]] = {
        "vocabulary": (reference.vocabulary.words, other.vocabulary.words),
        "rule for unknown words": (reference.vocabulary.unknown, other.vocabulary.unknown),
        "number of segments": (reference.decoding.num_segments, other.decoding.num_segments),
        "strides": (reference.decoding.strides, other.decoding.strides),
        "feature dimension": (reference.features.dim, other.features.dim),
        "clip timing": (reference.features.clock, other.features.clock),
        "pooling": (reference.features.pooling, other.features.pooling),
    }
    for field, (expected, actual) in fields.items():
        if expected == actual:
            continue
        values = f"{expected} and {actual}"
        if field == "vocabulary":
            changed = sum(expected.get(word) != actual.get(word) for word in {*expected, *actual})
            values = f"{len(expected)} and {len(actual)} words, {changed} of them different"
        raise ModelFileError(
            f"The models differ in their {field} ({values}). Compare models from the same checkpoint.",
            code="models_differ",
        )


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p value of McNemar's exact test, from a binomial distribution with probability 1/2."""
    flips = gained + lost
    tail = term = 1
    for k in range(1, min(gained, lost) + 1):
        term = term * (flips - k + 1) // k
        tail += term
    return min(1.0, 2 * tail / 2**flips)


def bootstrap(differences: np.ndarray, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper ends of percentile bootstrap intervals for the means of M paired differences.

    Args:
        differences: (N, M) float, one row per query; a sample uses the same queries for all M.

    Returns:
        Two arrays of (M,) float64.
    """
    rng = np.random.default_rng(seed)
    count = len(differences)
    means = np.empty((RESAMPLES, differences.shape[1]))
    # About 16 MB of indices at a time.
    step = max(1, (1 << 22) // count)
    for start in range(0, RESAMPLES, step):
        end = min(start + step, RESAMPLES)
        drawn = rng.integers(count, size=(end - start, count), dtype=np.uint32)
        for column, values in enumerate(differences.T):
            means[start:end, column] = values[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high


def collect_outputs(
    model: Grounder,
    data_set: DataSet,
    annotations: Sequence[Annotation],
    on_progress: Callable[[int], Any] = lambda queries: None,
) -> Heads:
    """Return the heads of all N queries in order, under 2 kB per query; see `compare` for the arguments."""
    return _run_models((model,), data_set, annotations, BATCH_SIZE, False, on_progress)[0][0]


def _run_models(
    models: Sequence[Grounder],
    data_set: DataSet,
    annotations: Sequence[Annotation],
    batch_size: int,
    concurrent: bool,
    on_progress: Callable[[int], Any],
    alone: Sequence[PlanAnswers] = (),
) -> tuple[list[Heads], dict[str, int]]:
    """Return the heads of all N queries for each model, and the number of queries each plan of the last model answered.

    Each video is read once for all models and for the plans that run alone.
    """
    gathered = [_empty_heads(model, len(annotations)) for model in models]
    answered: Counter[str] = Counter()
    # The videos of the next chunk are read while the models run on this one.
    prefetched = contextlib.closing(prefetch(chunks(models[0], data_set, annotations)))
    with ThreadPoolExecutor(len(models)) as pool, prefetched as ready:
        for chunk in ready:

            def run(model: Grounder, chunk: Chunk = chunk) -> list[tuple[np.ndarray, Heads]]:
                return list(run_chunk(model, chunk, batch_size))

            before = {plan.name: plan.queries for plan in plan_uses(models[-1])}
            results = pool.map(run, models) if concurrent else map(run, models)
            for heads, batches in zip(gathered, results):
                for rows, part in batches:
                    for name, values in vars(part).items():
                        getattr(heads, name)[rows] = values
                    on_progress(len(rows))
            answered.update({plan.name: plan.queries - before[plan.name] for plan in plan_uses(models[-1])})
            for plan in alone:
                plan.run(chunk, batch_size)
    return gathered, answered


def _empty_heads(model: Grounder, queries: int) -> Heads:
    """Return uninitialized heads of N queries."""
    locations = model.manifest.decoding.num_locations
    shapes = {"matching_logits": (locations,), "boundary_distances": (locations, 2), "iou_logits": (locations,)}
    return Heads(**{name: np.empty((queries, *shape), np.float32) for name, shape in shapes.items()})


def _measure(
    reference: Manifest,
    other: Manifest,
    heads: Sequence[Heads],
    data_set: DataSet,
    annotations: Sequence[Annotation],
    protocol: Protocol | None,
    prior_truth: np.ndarray | None,
) -> ParityResult:
    """Compare the heads of both models; `prior_truth` are the ground-truth spans that the prior is fitted on."""
    protocol = protocol or reference.decoding.protocol
    decodings = [dataclasses.replace(manifest.decoding, protocol=protocol) for manifest in (reference, other)]
    durations = np.array([data_set.durations[annotation.video] for annotation in annotations], np.float64)
    truth, thresholds = data_set.truths(annotations), data_set.preset.iou_thresholds
    # Decoding rejects non-finite heads; a query whose heads overflow in the checked model counts as unanswered.
    overflowed = ~_finite_rows(heads[1])
    finite = Heads(**{name: np.where(_along(overflowed, values), 0, values) for name, values in vars(heads[1]).items()})
    proposals = [
        score_proposals_with_fallback(result, decoding) for result, decoding in zip((heads[0], finite), decodings)
    ]
    picks = [dict(nms_per_threshold(result, decoding, thresholds)) for result, decoding in zip(proposals, decodings)]
    for answers in (proposals[1].spans, *picks[1].values()):
        answers[overflowed] = np.nan
    likely = (proposals[0].scores > -np.inf) & (proposals[1].scores > -np.inf)
    by_location = boundary_shifts(proposals[0].spans, proposals[1].spans, durations[:, None])[likely]
    lines = np.array([annotation.line for annotation in annotations])
    tops = [result[0.5][:, :TOP_K] for result in picks]
    paired = compare_answers(picks[0], picks[1], truth, durations, protocol)
    overlap, ious = paired.overlaps, paired.ious
    flips, columns = {}, {}
    for threshold, (before, after) in paired.hits.items():
        gained, lost = lines[paired.gained(threshold)], lines[paired.lost(threshold)]
        name = recall_name(1, threshold)
        flips[name] = Flips(tuple(gained.tolist()), tuple(lost.tolist()), mcnemar(len(gained), len(lost)))
        columns[name] = after.astype(np.float64) - before
    columns["mIoU"] = ious[1] - ious[0]
    scored = [report(result, truth, protocol) for result in picks]
    first, five = _same_order(*tops)
    low, high = bootstrap(np.stack(list(columns.values()), axis=1))
    return ParityResult(
        queries=len(annotations),
        protocol=protocol,
        simulated=data_set.simulated,
        heads=dict(_head_errors(*heads)),
        locations=_shift(by_location),
        boundaries=_shift(paired.shifts),
        overlap=MomentIoU(float(overlap.mean()), float(np.quantile(overlap, 0.01)), float(overlap.min())),
        order=RankAgreement(float(first.mean()), float(five.mean())),
        flips=flips,
        differences={
            name: MetricDelta(float(values.mean()), float(low[index]), float(high[index]))
            for index, (name, values) in enumerate(columns.items())
        },
        fallbacks=int((used_fallback(tops[0]) & used_fallback(tops[1])).sum()),
        reference=scored[0],
        other=scored[1],
        prior=None if prior_truth is None else prior_report(prior_truth, truth, protocol, thresholds),
        worst=tuple(_worst(annotations, durations, truth, tops, overlap, ious, paired.shifts.max(axis=-1))),
        scores=score_shift(_best_scores(tops[0]), _best_scores(tops[1]), reference.presence),
    )


def _best_scores(tops: np.ndarray) -> np.ndarray:
    """Return the scores of the best of (N, K, 3) moments, (N,); -inf for queries without a likely location."""
    scores = tops[:, 0, 2].astype(np.float64)
    return np.where(np.isnan(scores) | used_fallback(tops), -np.inf, scores)


def score_shift(reference: np.ndarray, other: np.ndarray, presence: Presence | None) -> ScoreShift:
    """Compare the scores of the best moments of two models.

    Args:
        reference, other: (N,) scores, -inf for queries without a likely location.
        presence: no-match threshold of the reference; None if it has none.
    """
    points = np.concatenate([reference, other])
    shares = [np.searchsorted(np.sort(scores), points, "right") / len(scores) for scores in (reference, other)]
    both = np.isfinite(reference) & np.isfinite(other)
    changes = np.abs(other[both] - reference[both]) if both.any() else np.zeros(1)
    # Scores are float32, and `MomentDecoder` compares them with the threshold in float32.
    threshold = float(np.float32(presence.threshold)) if presence else None
    below = [scores < (-np.inf if threshold is None else threshold) for scores in (reference, other)]
    return ScoreShift(
        float(np.abs(shares[0] - shares[1]).max()),
        float(np.quantile(changes, 0.5)),
        float(np.quantile(changes, 0.99)),
        threshold,
        int((~below[0] & below[1]).sum()),
        int((below[0] & ~below[1]).sum()),
    )


def _finite_rows(heads: Heads) -> np.ndarray:
    """Return which queries have finite values in all heads, (N,) bool."""
    rows = [np.isfinite(values).reshape(len(values), -1).all(axis=1) for values in vars(heads).values()]
    return np.logical_and.reduce(rows)


def _along(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return (N,) flags reshaped to broadcast against (N, ...) values."""
    return rows.reshape(-1, *[1] * (values.ndim - 1))


def _head_errors(reference: Heads, other: Heads) -> Iterator[tuple[str, OutputDeviation]]:
    for name, values in vars(reference).items():
        result = getattr(other, name)
        finite = np.isfinite(values)
        both = finite & np.isfinite(result)
        errors = np.abs(result[both].astype(np.float64) - values[both])
        p99 = float(np.quantile(errors, 0.99)) if errors.size else 0.0
        largest = float(np.abs(values[finite]).max(initial=0))
        yield name, OutputDeviation(float(errors.max(initial=0)), p99, largest, int((finite & ~both).sum()))


def _shift(seconds: np.ndarray) -> BoundaryShift:
    if not seconds.size:
        return BoundaryShift(0.0, 0.0, 0.0)
    return BoundaryShift(*(float(np.quantile(seconds, q)) for q in (0.5, 0.99, 1)))


def _same_order(reference: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which queries have the same best moment and the same order of all moments, (N,) bool, from (N, K, 3)."""
    overlap = temporal_iou(reference[..., :2], other[..., :2])
    # Not `argmax`: two moments of one model may be identical, for example if both span the full video.
    same = np.diagonal(overlap, axis1=1, axis2=2) >= overlap.max(axis=2)
    same &= np.isnan(reference[..., 0]) == np.isnan(other[..., 0])
    return same[:, 0], same.all(axis=1)


def _worst(
    annotations: Sequence[Annotation],
    durations: np.ndarray,
    truth: np.ndarray,
    tops: Sequence[np.ndarray],
    overlap: np.ndarray,
    ious: np.ndarray,
    shift: np.ndarray,
) -> Iterator[Disagreement]:
    """Yield the queries whose best moments overlap least; for equal overlap, those with the larger shift first."""
    for index in np.lexsort((-shift, overlap))[:NUM_WORST].tolist():
        if not shift[index] > 0:
            continue
        annotation, duration = annotations[index], float(durations[index])
        first = truth[index].reshape(-1, 2)[0].tolist()
        moments = [next(iter(to_moments(result[index, :1], duration)), None) for result in tops]
        yield Disagreement(
            line=annotation.line,
            video=annotation.video,
            query=annotation.sentence,
            duration=duration,
            truth=(first[0] * duration, first[1] * duration),
            reference=_finite(moments[0]),
            other=_finite(moments[1]),
            overlap=float(overlap[index]),
            reference_iou=float(ious[0][index]),
            other_iou=float(ious[1][index]),
            shift=float(shift[index]),
        )


def _finite(moment: Moment | None) -> Moment | None:
    """Return the moment, or None if it has non-finite values, because JSON has no NaN."""
    return moment if moment and all(map(math.isfinite, dataclasses.astuple(moment))) else None

"""Do two models answer alike? First in their heads, then in seconds, then query by query in recall.

Both see the very same batches, so whatever differs is the models' doing. Differences are other less reference
throughout, and recall is compared in pairs: of 3,720 queries an unpaired R@1 has a standard error of 0.8 points, while
two models that differ in ten answers differ by those ten.
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
)
from runtime.artifacts.manifest import Manifest
from runtime.core.agreement import boundary_shifts, compare_answers
from runtime.core.batch import Heads
from runtime.core.decoding import Protocol, score_proposals_with_fallback
from runtime.core.errors import AnnotationError, ModelFileError
from runtime.core.metrics import prior_report, recall_name, report
from runtime.core.moments import Moment, temporal_iou, to_moments
from runtime.core.prefetch import prefetch
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

RANKED = 5
WORST = 12
RESAMPLES = 10_000


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
    """Ask two models the same questions, in one pass over the videos, and say how their answers differ.

    Args:
        reference: the model whose answers are to be kept.
        other: the model made from it.
        data_set: where durations, features and the prior's training split come from.
        annotations: the N queries.
        protocol: whose NMS and hit rule, for both; the reference's own when None.
        batch_size: queries that go through the networks together.
        known: what `collect_outputs` gave for the reference, for callers that compare several models with it.
        concurrent: ask both at the same time, in a thread each; for models on the CPU.
        on_progress: called with the number of queries that one of the two has answered since the last call.

    Raises:
        ModelFileError: the two do not take the same words, features or segments.
        AnnotationError: there are no queries.
        QueryError: one of the two does not take a sentence.
    """
    if not annotations:
        raise AnnotationError(
            "There are no queries to compare the two models on; choose another split or --limit.",
            code="too_few_queries",
        )
    check_comparable(reference.manifest, other.manifest)
    # Before the first of the two is asked them all.
    encode_queries(other, annotations)
    models = (reference, other) if known is None else (other,)
    before = plan_uses(other)
    # One plan is all that answers, so that its parity is the engine's.
    alone = [PlanAnswers(other, plan, _empty_heads(other, len(annotations))) for plan in before if len(before) > 1]
    result, answered = _answers(models, data_set, annotations, batch_size, concurrent, on_progress, alone)
    heads = result if known is None else [known, *result]
    prior_truth = None
    if "train" in data_set.splits:
        prior_truth = data_set.spans(one_per_moment(data_set.annotations("train", invalid="drop")))

    def judge(others: Heads, rows: np.ndarray) -> ParityResult:
        some = [Heads(**{name: values[rows] for name, values in vars(side).items()}) for side in (heads[0], others)]
        chosen = [annotations[row] for row in rows]
        return _measure(reference.manifest, other.manifest, some, data_set, chosen, protocol, None)

    try:
        whole = _measure(reference.manifest, other.manifest, heads, data_set, annotations, protocol, prior_truth)
        return dataclasses.replace(whole, plans=plan_checks(before, answered, alone, judge))
    except ModelFileError as error:
        requested = [annotations[row] for row in np.flatnonzero(~_finite_rows(heads[0]))[:BATCH_SIZE]]
        raise cause_of(error, reference, data_set, requested) from error


def check_comparable(reference: Manifest, other: Manifest) -> None:
    """Raise ModelFileError where two models cannot be asked the same question."""
    kinds: dict[str, tuple[Any, Any]] = {
        "words": (reference.vocabulary.words, other.vocabulary.words),
        "rule for unknown words": (reference.vocabulary.unknown, other.vocabulary.unknown),
        "number of segments T": (reference.decoding.num_segments, other.decoding.num_segments),
        "strides": (reference.decoding.strides, other.decoding.strides),
        "feature width": (reference.features.dim, other.features.dim),
        "clip clock": (reference.features.clock, other.features.clock),
        "pooling": (reference.features.pooling, other.features.pooling),
    }
    for kind, (ours, theirs) in kinds.items():
        if ours != theirs:
            if kind == "words":
                changed = sum(ours.get(word) != theirs.get(word) for word in {*ours, *theirs})
                message = f"{len(ours)} words and {len(theirs)}, {changed} of them different"
            else:
                message = f"{ours} and {theirs}"
            raise ModelFileError(
                f"The two models differ in their {kind} ({message}), so they cannot answer the same questions; "
                "compare models that come from one checkpoint.",
                code="models_differ",
            )


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p value of McNemar's exact test: a fair coin's for this many heads and tails."""
    flips = gained + lost
    tail = term = 1
    for k in range(1, min(gained, lost) + 1):
        term = term * (flips - k + 1) // k
        tail += term
    return min(1.0, 2 * tail / 2**flips)


def bootstrap(
    differences: np.ndarray, *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the percentile intervals of the means of M paired differences, (M,) each.

    Args:
        differences: (N, M), a row per query; all M are drawn together.
        resamples: how often N queries are drawn with replacement.
        confidence: share of the resampled means that an interval holds.
        seed: the same seed gives the same interval.
    """
    rng = np.random.default_rng(seed)
    count = len(differences)
    means = np.empty((resamples, differences.shape[1]))
    # About 16 MB of indices at a time.
    step = max(1, (1 << 22) // count)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        drawn = rng.integers(count, size=(stop - start, count), dtype=np.uint32)
        for column, values in enumerate(differences.T):
            means[start:stop, column] = values[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def collect_outputs(
    model: Grounder,
    data_set: DataSet,
    annotations: Sequence[Annotation],
    batch_size: int = BATCH_SIZE,
    on_progress: Callable[[int], Any] = lambda queries: None,
) -> Heads:
    """Return the heads of all N queries, in their order: under 2 kB a query, the videos are let go of."""
    return _answers((model,), data_set, annotations, batch_size, False, on_progress)[0][0]


def _answers(
    models: Sequence[Grounder],
    data_set: DataSet,
    annotations: Sequence[Annotation],
    batch_size: int,
    concurrent: bool,
    on_progress: Callable[[int], Any],
    alone: Sequence[PlanAnswers] = (),
) -> tuple[list[Heads], dict[str, int]]:
    """Return the heads of all N queries for each model, and how many of them each plan of the last model answered.

    Every video is read once for all models, and for the plans that are asked alone.
    """
    gathered = [_empty_heads(model, len(annotations)) for model in models]
    answered: Counter[str] = Counter()
    # The videos of the next chunk are read while the models run on this one.
    waiting = contextlib.closing(prefetch(chunks(models[0], data_set, annotations)))
    with ThreadPoolExecutor(len(models)) as pool, waiting as ready:
        for chunk in ready:

            def ask(model: Grounder, chunk: Chunk = chunk) -> list[tuple[np.ndarray, Heads]]:
                return list(run_chunk(model, chunk, batch_size))

            before = {plan.name: plan.queries for plan in plan_uses(models[-1])}
            every = pool.map(ask, models) if concurrent else map(ask, models)
            for heads, result in zip(gathered, every):
                for rows, part in result:
                    for name, values in vars(part).items():
                        getattr(heads, name)[rows] = values
                    on_progress(len(rows))
            answered.update({plan.name: plan.queries - before[plan.name] for plan in plan_uses(models[-1])})
            for plan in alone:
                plan.ask(chunk, batch_size)
    return gathered, answered


def _empty_heads(model: Grounder, queries: int) -> Heads:
    """Return heads of so many queries, to be filled."""
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
    """Return all that follows from the heads of both models."""
    protocol = protocol or reference.decoding.protocol
    decodings = [dataclasses.replace(manifest.decoding, protocol=protocol) for manifest in (reference, other)]
    durations = np.array([data_set.durations[annotation.video] for annotation in annotations], np.float64)
    truth, thresholds = data_set.truths(annotations), data_set.preset.iou_thresholds
    # Decoding refuses what is not finite; a query that a model overflowed on counts as one without an answer.
    silent = ~_finite_rows(heads[1])
    answerable = Heads(**{name: np.where(_along(silent, values), 0, values) for name, values in vars(heads[1]).items()})
    proposals = [
        score_proposals_with_fallback(result, decoding) for result, decoding in zip((heads[0], answerable), decodings)
    ]
    picks = [dict(nms_per_threshold(result, decoding, thresholds)) for result, decoding in zip(proposals, decodings)]
    for silenced in (proposals[1].spans, *picks[1].values()):
        silenced[silent] = np.nan
    retained = (proposals[0].scores > -np.inf) & (proposals[1].scores > -np.inf)
    by_location = boundary_shifts(proposals[0].spans, proposals[1].spans, durations[:, None])[retained]
    lines = np.array([annotation.line for annotation in annotations])
    tops = [result[0.5][:, :RANKED] for result in picks]
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
        whole=int((used_fallback(tops[0]) & used_fallback(tops[1])).sum()),
        reference=scored[0],
        other=scored[1],
        prior=None if prior_truth is None else prior_report(prior_truth, truth, protocol, thresholds),
        worst=tuple(_worst(annotations, durations, truth, tops, overlap, ious, paired.shifts.max(axis=-1))),
    )


def _finite_rows(heads: Heads) -> np.ndarray:
    """Return which queries have no NaN and no infinity in any head, (N,)."""
    rows = [np.isfinite(values).reshape(len(values), -1).all(axis=1) for values in vars(heads).values()]
    return np.logical_and.reduce(rows)


def _along(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return (N,) flags in a shape that broadcasts against (N, ...) values."""
    return rows.reshape(-1, *[1] * (values.ndim - 1))


def _head_errors(reference: Heads, other: Heads) -> Iterator[tuple[str, OutputDeviation]]:
    for name, values in vars(reference).items():
        result = getattr(other, name)
        finite = np.isfinite(values)
        bad = finite & ~np.isfinite(result)
        errors = np.abs(result[finite & ~bad].astype(np.float64) - values[finite & ~bad])
        largest = float(np.abs(values[finite]).max(initial=0))
        if not errors.size:
            yield name, OutputDeviation(0.0, 0.0, largest, int(bad.sum()))
            continue
        yield name, OutputDeviation(float(errors.max()), float(np.quantile(errors, 0.99)), largest, int(bad.sum()))


def _shift(seconds: np.ndarray) -> BoundaryShift:
    if not seconds.size:
        return BoundaryShift(0.0, 0.0, 0.0)
    return BoundaryShift(*(float(np.quantile(seconds, q)) for q in (0.5, 0.99, 1)))


def _same_order(reference: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which queries have the same first moment, and the same order of all; (N,) each, from (N, K, 3)."""
    overlap = temporal_iou(reference[..., :2], other[..., :2])
    # Not `argmax`: two of a model's own moments may coincide, as when both fill the video.
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
    """Yield the queries whose best moments overlap least; of those alike, the farther apart in seconds."""
    for index in np.lexsort((-shift, overlap))[:WORST].tolist():
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
    """Return the moment, or None where NaN stands in it, which no JSON can hold."""
    return moment if moment and all(map(math.isfinite, dataclasses.astuple(moment))) else None

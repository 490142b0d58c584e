"""From raw heads to ranked moments: boxes, scores, and non-maximum suppression, for a whole batch at once.

Source: FCOS post-processing and soft-NMS in mmaction2's DRN (drn.py, drn_utils/fcos.py), and the hard NMS in the
authors' evaluate_utils.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from runtime.core.batch import Heads
from runtime.core.errors import ModelFileError, excerpt
from runtime.core.moments import temporal_iou

Protocol = Literal["mmaction2", "drn"]

# Soft-NMS of mmaction2's DRN: an overlap above low + (high - low) * duration decays by exp(-IoU^2 / ALPHA).
ALPHA = 0.4
LOW_THRESHOLD = 0.5
HIGH_THRESHOLD = 0.9
# The published loop runs while at most top_k = 5 were taken, so it returns six.
PUBLISHED_COUNT = 6
# The authors suppress what overlaps by more than the metric's threshold less this; the threshold is 0.5 unless a
# metric says otherwise.
HARD_NMS_MARGIN = 0.05
# Queries up to which each is decoded by itself, and proposals up to which all their pairs at once pay.
FEW, FEW_PROPOSALS = 2, 128
SMALL_BATCH = 4096
# Queries decoded at a time: more would leave the cache.
BLOCK = 256
MAX_SEGMENTS = 1 << 20
# Code of the error about heads that hold NaN or infinities.
NON_FINITE = "non_finite_output"


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The parameters of decoding heads into moments; stored in the manifest of every model.

    Attributes:
        num_segments: T, which also scales spans to [0, 1].
        strides: segments per location, of each level, finest first.
        score_threshold: a location counts when its matching probability alone is above this.
        pre_nms_top_n: most proposals that a level keeps.
        use_iou_scores: whether the IoU probability joins the score. False after training stage 1.
        protocol: `mmaction2` soft-NMS, or the authors' (`drn`) hard NMS.
    """

    num_segments: int = 32
    strides: tuple[int, ...] = (1, 2, 4)
    score_threshold: float = 0.05
    pre_nms_top_n: int = 32
    use_iou_scores: bool = True
    protocol: Protocol = "mmaction2"

    def __post_init__(self) -> None:
        object.__setattr__(self, "strides", tuple(self.strides))
        counts = (self.num_segments, self.pre_nms_top_n, *self.strides)
        if not all(isinstance(count, int) and 1 <= count <= MAX_SEGMENTS for count in counts) or not self.strides:
            raise ModelFileError(
                f"Segments, strides and proposals per level are from 1 to {MAX_SEGMENTS}, and {counts} was given.",
                code="invalid_setting",
            )
        if not isinstance(self.score_threshold, (int, float)) or not 0 <= self.score_threshold < 1:
            raise ModelFileError(
                f"The score threshold lies in [0, 1), and {excerpt(self.score_threshold)} was given.",
                code="invalid_setting",
            )
        if not isinstance(self.use_iou_scores, bool):
            raise ModelFileError(
                "Expected true or false for use_iou_scores, got "
                f"{excerpt(self.use_iou_scores)}. Export the model again.",
                code="invalid_setting",
            )
        if any(self.num_segments % stride for stride in self.strides):
            raise ModelFileError(
                f"{self.num_segments} segments cannot be divided by the strides {self.strides}.", code="invalid_setting"
            )
        if self.protocol not in ("mmaction2", "drn"):
            raise ModelFileError(
                f"The protocol is mmaction2 or drn, and {excerpt(self.protocol)} was asked for.", code="invalid_setting"
            )

    @property
    def num_locations(self) -> int:
        """P: 56 for 32 segments and strides 1, 2, 4."""
        return sum(self.num_segments // stride for stride in self.strides)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "strides": list(self.strides)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Decoding:
        return cls(**value)


@dataclasses.dataclass(frozen=True)
class Proposals:
    """Candidate spans before suppression.

    Attributes:
        spans: (B, P, 2) float32 fractions of the video.
        scores: (B, P) float32 in [0, 1]; -inf where a location was not kept.
    """

    spans: np.ndarray
    scores: np.ndarray


@functools.cache
def locations(num_segments: int, strides: tuple[int, ...]) -> np.ndarray:
    """Return the centre of each location in segments, (P,) float32: stride * k + stride / 2, levels finest first."""
    return np.concatenate(
        [np.arange(0, num_segments, stride, dtype=np.float32) + np.float32(stride / 2) for stride in strides]
    )


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)) without overflow, in the dtype of `logits`."""
    below = np.copysign(logits, -1)
    np.exp(below, out=below)
    below += 1
    result = np.minimum(logits, 0)
    np.exp(result, out=result)
    result /= below
    return result


def score_proposals_with_fallback(heads: Heads, decoding: Decoding) -> Proposals:
    """Return what `score_proposals` does, but for a query without any likely location: it proposes the whole video with
    score 1, in the place of location 0, as published."""
    proposals = score_proposals(heads, decoding)
    without = proposals.scores.max(axis=1) == -np.inf
    if without.any():
        proposals.spans[without, 0] = (0, 1)
        proposals.scores[without, 0] = 1
    return proposals


def score_proposals(heads: Heads, decoding: Decoding) -> Proposals:
    """Turn heads at P locations into as many scored spans, of which those too unlikely score -inf.

    Raises:
        ModelFileError: a head holds NaN or an infinity, as a model does whose precision overflows.
    """
    if heads.matching_logits.shape[1:] != (decoding.num_locations,):
        raise ModelFileError(
            f"The model gave {heads.matching_logits.shape[1]} locations where its manifest has "
            f"{decoding.num_locations}; export it again.",
            code="output_shape_mismatch",
        )
    for name, values in vars(heads).items():
        if not _is_finite(values):
            queries = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
            raise ModelFileError(
                f"The model gave {name} that are not finite for {len(queries)} of {len(values)} queries: its weights "
                "are damaged, or a module overflows in FP16 or INT8; verify it against the file it was made of.",
                code=NON_FINITE,
            )
    # Of one query every call costs more than its numbers, so both heads go through them together.
    probabilities = sigmoid(np.concatenate((heads.matching_logits, heads.iou_logits), dtype=np.float32))
    matching, overlap = probabilities[: len(heads)], probabilities[len(heads) :]
    scores = matching * overlap if decoding.use_iou_scores else matching.copy()
    retained = matching > np.float32(decoding.score_threshold)
    if decoding.num_segments // decoding.strides[0] > decoding.pre_nms_top_n:
        retained &= _best_of_each_level(np.where(retained, scores, -np.inf), decoding)
    np.sqrt(scores, out=scores)
    scores[~retained] = -np.inf

    centre = locations(decoding.num_segments, decoding.strides)
    # In memory all starts of a query are adjacent, and all ends: so they are compared, again and again.
    spans = np.empty((len(heads), 2, len(centre)), np.float32).transpose(0, 2, 1)
    np.subtract(centre, heads.boundary_distances[..., 0], out=spans[..., 0])
    np.add(centre, heads.boundary_distances[..., 1], out=spans[..., 1])
    spans /= np.float32(decoding.num_segments)
    np.maximum(spans, 0, out=spans)
    np.minimum(spans, 1, out=spans)
    return Proposals(spans, scores)


def _is_finite(values: np.ndarray) -> bool:
    # A dot product with itself needs one call, but may overflow; of many numbers BLAS would ask other threads.
    if values.size <= SMALL_BATCH and float(np.vdot(values, values)) < np.inf:
        return True
    return bool(np.isfinite(values).all())


def _best_of_each_level(scores: np.ndarray, decoding: Decoding) -> np.ndarray:
    """Return (B, P) flags: among the `pre_nms_top_n` best of its level. With 32 segments all are."""
    best = np.ones(scores.shape, bool)
    start = 0
    for stride in decoding.strides:
        size = decoding.num_segments // stride
        if size > decoding.pre_nms_top_n:
            level = slice(start, start + size)
            order = np.argsort(-scores[:, level], axis=1, kind="stable")
            np.put_along_axis(best[:, level], order[:, decoding.pre_nms_top_n :], False, axis=1)
        start += size
    return best


def soft_nms(proposals: Proposals, count: int = PUBLISHED_COUNT) -> np.ndarray:
    """Pick the best proposal again and again, lowering the scores of what overlaps it.

    A pick of duration w lowers every remaining proposal whose temporal IoU with it is above 0.5 + 0.4 w, by the
    factor exp(-IoU^2 / 0.4); decays accumulate. Among equal scores the earlier one is picked, where the published
    code leaves the order to the NumPy build.

    Args:
        proposals: B times P.
        count: K, most picks per query.

    Returns:
        (B, K, 3) float32 starts, ends and scores at the time of the pick, scores never rising; NaN after the last.
    """
    if len(proposals.scores) <= FEW:
        picks = np.full((len(proposals.scores), count, 3), np.nan, np.float32)
        for one in zip(proposals.spans, proposals.scores, picks):
            _soft_nms_of_one(*one)
        return picks
    scores, spans = proposals.scores.copy(), proposals.spans

    def lower(span: np.ndarray) -> None:
        taken = span[:, None]
        np.multiply(scores, _decay(taken, temporal_iou(taken, spans))[:, 0], out=scores)

    return _pick(scores, spans, count, lambda: scores.argmax(axis=1), lower)


def _soft_nms_of_one(spans: np.ndarray, scores: np.ndarray, picks: np.ndarray) -> None:
    """Write the picks of one query, from (P, 2) and (P,), into (K, 3).

    A few small arrays cost calls, not arithmetic: all factors that could be needed are one round of calls.
    """
    (retained,) = (scores > -np.inf).nonzero()
    spans, scores = spans.T.take(retained, axis=1).T, scores[retained]
    count = min(len(picks), len(retained))
    factors = None
    if 1 < len(retained) <= FEW_PROPOSALS:
        factors = _decay(spans, temporal_iou(spans, spans))
    chosen: list[int] = []
    chosen_scores: list[np.float32] = []
    while len(chosen) < count:
        best = int(scores.argmax())
        chosen.append(best)
        chosen_scores.append(scores[best])
        if len(chosen) == count:
            break
        if factors is not None:
            scores *= factors[best]
        else:
            taken = spans[best : best + 1]
            scores *= _decay(taken, temporal_iou(taken, spans))[0]
        scores[best] = -np.inf
    picks[:count, :2] = spans[chosen]
    picks[:count, 2] = chosen_scores


def _decay(taken: np.ndarray, overlap: np.ndarray) -> np.ndarray:
    """Return the factors, (..., N, P), by which N spans taken, (..., N, 2), lower proposals of that temporal IoU."""
    threshold = (taken[..., 1:] - taken[..., :1]) * np.float32(HIGH_THRESHOLD - LOW_THRESHOLD)
    threshold += np.float32(LOW_THRESHOLD)
    # exp(-0) = 1 leaves the others as they are, and -inf stays -inf.
    decay = overlap * (overlap > threshold)
    decay *= decay
    decay *= np.float32(-1 / ALPHA)
    return np.exp(decay, out=decay)


def hard_nms(proposals: Proposals, count: int, threshold: float) -> np.ndarray:
    """Pick the best proposal again and again, dropping what overlaps it by more than `threshold`.

    Float64, as in the authors' evaluation; among equal scores the later location is picked, as there.

    Args:
        proposals: B times P.
        count: K, most picks per query.
        threshold: temporal IoU.

    Returns:
        (B, K, 3) float32 starts, ends and scores, scores never rising; NaN after the last.
    """
    scores = proposals.scores.astype(np.float64)
    last = scores.shape[1] - 1

    spans = proposals.spans.astype(np.float64)

    def drop(span: np.ndarray) -> None:
        scores[temporal_iou(span[:, None], spans)[:, 0] > threshold] = -np.inf

    return _pick(scores, spans, count, lambda: last - scores[:, ::-1].argmax(axis=1), drop)


def _pick(
    scores: np.ndarray,
    spans: np.ndarray,
    count: int,
    best: Callable[[], np.ndarray],
    suppress_overlapping: Callable[[np.ndarray], None],
) -> np.ndarray:
    """Take the best proposal of every query `count` times, and change the scores of the others after each.

    Args:
        scores: (B, P), changed in place; -inf where there is nothing to take.
        spans: (B, P, 2).
        count: K.
        best: returns the position of the best, (B,).
        suppress_overlapping: changes `scores`, given the spans just taken, (B, 2).

    Returns:
        (B, K, 3) float32 starts, ends and scores at the time of the pick; NaN after the last.
    """
    rows = np.arange(len(scores))
    ranks = min(count, scores.shape[1])
    taken = np.zeros((len(scores), ranks), np.intp)
    taken_scores = np.full((len(scores), ranks), -np.inf, np.float32)
    for rank in range(ranks):
        chosen = best()
        score = scores[rows, chosen]
        if score.max(initial=-np.inf) == -np.inf:
            break
        taken[:, rank] = chosen
        taken_scores[:, rank] = score
        if rank + 1 < ranks:
            suppress_overlapping(spans[rows, chosen])
            scores[rows, chosen] = -np.inf
    picks = np.full((len(scores), count, 3), np.nan, np.float32)
    picks[:, :ranks, :2] = spans[rows[:, None], taken]
    picks[:, :ranks, 2] = taken_scores
    picks[picks[..., 2] == -np.inf] = np.nan
    return picks


def apply_nms(
    proposals: Proposals, decoding: Decoding, count: int = PUBLISHED_COUNT, iou_threshold: float = 0.5
) -> np.ndarray:
    """Return the (B, count, 3) picks of the protocol's suppression; see `soft_nms` and `hard_nms`.

    `iou_threshold` is the metric's: the authors' protocol suppresses at 0.05 below it, mmaction2's ignores it.
    """
    if decoding.protocol == "mmaction2":
        return soft_nms(proposals, count)
    return hard_nms(proposals, count, iou_threshold - HARD_NMS_MARGIN)


def decode(heads: Heads, decoding: Decoding, count: int = PUBLISHED_COUNT) -> np.ndarray:
    """Return the best moments of B queries: (B, count, 3) float32 start, end (fractions of the video) and score.

    Best first; rows after the last moment are NaN.
    """
    if len(heads) <= BLOCK:
        return apply_nms(score_proposals_with_fallback(heads, decoding), decoding, count)
    parts = [apply_nms(score_proposals_with_fallback(part, decoding), decoding, count) for _, part in blocks(heads)]
    return np.concatenate(parts)


def blocks(heads: Heads) -> Iterator[tuple[slice, Heads]]:
    """Yield the rows of a batch, with their heads, as many as are decoded at a time; at least one block."""
    if len(heads) <= BLOCK:
        yield slice(0, len(heads)), heads
        return
    for start in range(0, len(heads), BLOCK):
        rows = slice(start, start + BLOCK)
        yield rows, Heads(*(value[rows] for value in vars(heads).values()))

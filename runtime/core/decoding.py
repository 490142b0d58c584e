"""Decode raw heads into ranked moments: spans, scores and non-maximum suppression (NMS) for a batch.

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
from runtime.core.errors import ModelFileError, invalid_setting
from runtime.core.moments import temporal_iou

Protocol = Literal["mmaction2", "drn"]

# Soft-NMS of mmaction2's DRN: an IoU above low + (high - low) * duration decays the score by exp(-IoU^2 / ALPHA).
ALPHA = 0.4
LOW_THRESHOLD = 0.5
HIGH_THRESHOLD = 0.9
# The published loop runs while at most top_k = 5 proposals are selected, so it returns six.
PUBLISHED_COUNT = 6
# The hard NMS of the authors uses the IoU threshold of the metric minus this margin.
HARD_NMS_MARGIN = 0.05
# Maximum number of queries that are decoded one by one, and of proposals whose IoUs are computed for all pairs at once.
FEW, FEW_PROPOSALS = 2, 128
SMALL_BATCH = 4096
# Number of queries that are decoded at a time and fit into the CPU cache.
BLOCK = 256
MAX_SEGMENTS = 1 << 20
ADVICE = "export the model again"
# Error code of heads that contain NaN or infinities.
NON_FINITE = "non_finite_output"


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The parameters of decoding heads into moments; stored in the manifest of every model.

    Attributes:
        num_segments: T, which also scales spans to [0, 1].
        strides: segments per location of each level, finest first.
        score_threshold: minimum matching probability of a location, exclusive.
        pre_nms_top_n: maximum number of proposals of a level.
        use_iou_scores: whether the score includes the IoU probability. False after training stage 1.
        protocol: soft-NMS of mmaction2 (`mmaction2`), or hard NMS of the authors (`drn`).
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
            raise invalid_setting(f"segments, strides and pre_nms_top_n from 1 to {MAX_SEGMENTS}", counts, ADVICE)
        if not isinstance(self.score_threshold, (int, float)) or not 0 <= self.score_threshold < 1:
            raise invalid_setting("a score_threshold in [0, 1)", self.score_threshold, ADVICE)
        if not isinstance(self.use_iou_scores, bool):
            raise invalid_setting("true or false for use_iou_scores", self.use_iou_scores, ADVICE)
        if any(self.num_segments % stride for stride in self.strides):
            raise invalid_setting(f"strides that divide {self.num_segments} segments", self.strides, ADVICE)
        if self.protocol not in ("mmaction2", "drn"):
            raise invalid_setting("the protocol 'mmaction2' or 'drn'", self.protocol, ADVICE)

    @property
    def num_locations(self) -> int:
        """Return P: 56 for 32 segments and strides 1, 2, 4."""
        return sum(self.num_segments // stride for stride in self.strides)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "strides": list(self.strides)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Decoding:
        """Return the parameters in the result of `to_dict`; TypeError if a key is unknown or missing."""
        return cls(**value)


@dataclasses.dataclass(frozen=True)
class Proposals:
    """Candidate spans before NMS.

    Attributes:
        spans: (B, P, 2) float32 fractions of the video.
        scores: (B, P) float32 in [0, 1]; -inf for locations without a proposal.
    """

    spans: np.ndarray
    scores: np.ndarray


@functools.cache
def locations(num_segments: int, strides: tuple[int, ...]) -> np.ndarray:
    """Return the center of each location in segments, (P,) float32: stride * k + stride / 2, levels finest first.

    Args:
        num_segments: number of segments T.
        strides: segments per location of each level, finest first.
    """
    return np.concatenate(
        [np.arange(0, num_segments, stride, dtype=np.float32) + np.float32(stride / 2) for stride in strides]
    )


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)) without overflow, in the dtype of `logits`."""
    denominator = np.copysign(logits, -1)
    np.exp(denominator, out=denominator)
    denominator += 1
    result = np.minimum(logits, 0)
    np.exp(result, out=result)
    result /= denominator
    return result


def score_proposals_with_fallback(heads: Heads, decoding: Decoding) -> Proposals:
    """Return a scored span for each location; a query without a likely location gets the complete video.

    That span has score 1 and is at location 0.

    Args:
        heads: raw outputs for B queries.
        decoding: parameters of the model.
    """
    proposals = score_proposals(heads, decoding)
    is_empty = proposals.scores.max(axis=1) == -np.inf
    if is_empty.any():
        proposals.spans[is_empty, 0] = (0, 1)
        proposals.scores[is_empty, 0] = 1
    return proposals


def score_proposals(heads: Heads, decoding: Decoding) -> Proposals:
    """Return a scored span for each of P locations; the score of unlikely locations is -inf.

    Args:
        heads: raw outputs for B queries.
        decoding: parameters of the model.

    Returns:
        Spans (B, P, 2) as fractions of the video, and scores (B, P).

    Raises:
        ModelFileError: the number of locations is wrong, or a head contains NaN or an infinity, for example because a
            module overflows in FP16.
    """
    if heads.matching_logits.shape[1:] != (decoding.num_locations,):
        raise ModelFileError(
            f"Expected {decoding.num_locations} locations, as in the manifest of the model, got "
            f"{heads.matching_logits.shape[1]}. Export the model again.",
            code="output_shape_mismatch",
        )
    for name, values in vars(heads).items():
        if not _is_finite(values):
            queries = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
            raise ModelFileError(
                f"{name} of {len(queries)} of {len(values)} queries are not finite, because weights are damaged or a "
                "module overflows in FP16 or INT8. Compare the model with its source by `python -m export.verify`.",
                code=NON_FINITE,
            )
    # For a single query a NumPy call takes longer than its arithmetic, so both heads share the calls.
    probabilities = sigmoid(np.concatenate((heads.matching_logits, heads.iou_logits), dtype=np.float32))
    matching, overlap = probabilities[: len(heads)], probabilities[len(heads) :]
    scores = matching * overlap if decoding.use_iou_scores else matching.copy()
    retained = matching > np.float32(decoding.score_threshold)
    if decoding.num_segments // decoding.strides[0] > decoding.pre_nms_top_n:
        retained &= _best_of_each_level(np.where(retained, scores, -np.inf), decoding)
    np.sqrt(scores, out=scores)
    scores[~retained] = -np.inf

    centers = locations(decoding.num_segments, decoding.strides)
    # NMS reads all starts or all ends of a query at a time, so each of them is contiguous.
    spans = np.empty((len(heads), 2, len(centers)), np.float32).transpose(0, 2, 1)
    np.subtract(centers, heads.boundary_distances[..., 0], out=spans[..., 0])
    np.add(centers, heads.boundary_distances[..., 1], out=spans[..., 1])
    spans /= np.float32(decoding.num_segments)
    np.maximum(spans, 0, out=spans)
    np.minimum(spans, 1, out=spans)
    return Proposals(spans, scores)


def _is_finite(values: np.ndarray) -> bool:
    # A dot product is one call, but may overflow, and BLAS would start threads for large arrays.
    if values.size <= SMALL_BATCH and float(np.vdot(values, values)) < np.inf:
        return True
    return bool(np.isfinite(values).all())


def _best_of_each_level(scores: np.ndarray, decoding: Decoding) -> np.ndarray:
    """Return (B, P) bool: whether a location is among the `pre_nms_top_n` best of its level."""
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
    """Select the best proposals by soft-NMS.

    A selected proposal of duration w multiplies the scores of all others whose temporal IoU with it is above
    0.5 + 0.4 w by exp(-IoU^2 / 0.4). Of equal scores the first is selected; the published code leaves this to the NumPy
    build.

    Args:
        proposals: B times P proposals.
        count: K, maximum number of proposals per query.

    Returns:
        (B, K, 3) float32 starts, ends and decayed scores, best first; NaN after the last.
    """
    if len(proposals.scores) <= FEW:
        picks = np.full((len(proposals.scores), count, 3), np.nan, np.float32)
        for one in zip(proposals.spans, proposals.scores, picks):
            _soft_nms_of_one(*one)
        return picks
    scores, spans = proposals.scores.copy(), proposals.spans

    def decay_overlapping(span: np.ndarray) -> None:
        selected = span[:, None]
        np.multiply(scores, _decay(selected, temporal_iou(selected, spans))[:, 0], out=scores)

    return _select(scores, spans, count, lambda: scores.argmax(axis=1), decay_overlapping)


def _soft_nms_of_one(spans: np.ndarray, scores: np.ndarray, picks: np.ndarray) -> None:
    """Write the result of soft-NMS of one query, with (P, 2) spans and (P,) scores, to `picks`, (K, 3).

    For small arrays the number of NumPy calls matters, so the decay factors of all pairs are computed at once.
    """
    (retained,) = (scores > -np.inf).nonzero()
    spans, scores = spans.T.take(retained, axis=1).T, scores[retained]
    count = min(len(picks), len(retained))
    factors = None
    if 1 < len(retained) <= FEW_PROPOSALS:
        factors = _decay(spans, temporal_iou(spans, spans))
    indices: list[int] = []
    selected_scores: list[np.float32] = []
    while len(indices) < count:
        best = int(scores.argmax())
        indices.append(best)
        selected_scores.append(scores[best])
        if len(indices) == count:
            break
        if factors is not None:
            scores *= factors[best]
        else:
            selected = spans[best : best + 1]
            scores *= _decay(selected, temporal_iou(selected, spans))[0]
        scores[best] = -np.inf
    picks[:count, :2] = spans[indices]
    picks[:count, 2] = selected_scores


def _decay(selected: np.ndarray, iou: np.ndarray) -> np.ndarray:
    """Return the (..., N, P) factors of soft-NMS for N selected spans, (..., N, 2), and their (..., N, P) IoUs."""
    threshold = (selected[..., 1:] - selected[..., :1]) * np.float32(HIGH_THRESHOLD - LOW_THRESHOLD)
    threshold += np.float32(LOW_THRESHOLD)
    # The factor of the others is exp(-0) = 1.
    decay = iou * (iou > threshold)
    decay *= decay
    decay *= np.float32(-1 / ALPHA)
    return np.exp(decay, out=decay)


def hard_nms(proposals: Proposals, count: int, threshold: float) -> np.ndarray:
    """Select the best proposals, each without the others whose temporal IoU with it is above `threshold`.

    Computes in float64 and selects the last location of equal scores, as the evaluation of the authors does.

    Args:
        proposals: B times P proposals.
        count: K, maximum number of proposals per query.
        threshold: temporal IoU with a selected proposal above which another one is removed.

    Returns:
        (B, K, 3) float32 starts, ends and scores, best first; NaN after the last.
    """
    scores = proposals.scores.astype(np.float64)
    spans = proposals.spans.astype(np.float64)
    last = scores.shape[1] - 1

    def drop_overlapping(span: np.ndarray) -> None:
        scores[temporal_iou(span[:, None], spans)[:, 0] > threshold] = -np.inf

    return _select(scores, spans, count, lambda: last - scores[:, ::-1].argmax(axis=1), drop_overlapping)


def _select(
    scores: np.ndarray,
    spans: np.ndarray,
    count: int,
    best: Callable[[], np.ndarray],
    suppress: Callable[[np.ndarray], None],
) -> np.ndarray:
    """Select the best proposal of every query `count` times, and change the scores of the others after each.

    Args:
        scores: (B, P), changed in place; -inf for locations without a proposal.
        spans: (B, P, 2).
        count: maximum number of proposals K per query.
        best: returns the (B,) indices of the best proposals.
        suppress: changes `scores`, given the (B, 2) spans selected last.

    Returns:
        (B, K, 3) float32 starts, ends and scores; NaN after the last.
    """
    rows = np.arange(len(scores))
    ranks = min(count, scores.shape[1])
    selected = np.zeros((len(scores), ranks), np.intp)
    selected_scores = np.full((len(scores), ranks), -np.inf, np.float32)
    for rank in range(ranks):
        indices = best()
        score = scores[rows, indices]
        if score.max(initial=-np.inf) == -np.inf:
            break
        selected[:, rank] = indices
        selected_scores[:, rank] = score
        if rank + 1 < ranks:
            suppress(spans[rows, indices])
            scores[rows, indices] = -np.inf
    picks = np.full((len(scores), count, 3), np.nan, np.float32)
    picks[:, :ranks, :2] = spans[rows[:, None], selected]
    picks[:, :ranks, 2] = selected_scores
    picks[picks[..., 2] == -np.inf] = np.nan
    return picks


def apply_nms(
    proposals: Proposals, decoding: Decoding, count: int = PUBLISHED_COUNT, iou_threshold: float = 0.5
) -> np.ndarray:
    """Return the best proposals by the NMS of the protocol: `soft_nms` for `mmaction2`, `hard_nms` for `drn`.

    Args:
        proposals: B times P proposals.
        decoding: parameters of the model, of which only `protocol` is used.
        count: maximum number of proposals per query.
        iou_threshold: IoU threshold of the metric; the protocol `drn` uses 0.05 less, `mmaction2` ignores it.

    Returns:
        (B, count, 3) float32 starts and ends (fractions of the video) and scores, best first; NaN after the last.
    """
    if decoding.protocol == "mmaction2":
        return soft_nms(proposals, count)
    return hard_nms(proposals, count, iou_threshold - HARD_NMS_MARGIN)


def decode(heads: Heads, decoding: Decoding, count: int = PUBLISHED_COUNT) -> np.ndarray:
    """Return the best moments of B queries.

    Args:
        heads: raw outputs for B queries.
        decoding: parameters of the model.
        count: maximum number of moments per query.

    Returns:
        (B, count, 3) float32 starts and ends (fractions of the video) and scores, best first; NaN after the last.
    """
    if len(heads) <= BLOCK:
        return apply_nms(score_proposals_with_fallback(heads, decoding), decoding, count)
    parts = [apply_nms(score_proposals_with_fallback(part, decoding), decoding, count) for _, part in blocks(heads)]
    return np.concatenate(parts)


def blocks(heads: Heads) -> Iterator[tuple[slice, Heads]]:
    """Yield the rows and heads of a batch in blocks of at most `BLOCK` queries, at least one block."""
    if len(heads) <= BLOCK:
        yield slice(0, len(heads)), heads
        return
    for start in range(0, len(heads), BLOCK):
        rows = slice(start, start + BLOCK)
        yield rows, Heads(*(value[rows] for value in vars(heads).values()))

"""Test `runtime.core.decoding`: proposals from heads, and both kinds of NMS."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runtime.core.batch import Heads
from runtime.core.decoding import (
    BLOCK,
    FEW_PROPOSALS,
    Decoding,
    Proposals,
    Protocol,
    apply_nms,
    decode,
    hard_nms,
    locations,
    score_proposals_with_fallback,
    sigmoid,
    soft_nms,
)
from runtime.core.errors import ModelFileError
from tests.raising import raises
from tests.tolerances import DETECTIONS

SMALL = Decoding(num_segments=4, strides=(1, 2))


def heads(rows: int = 1, decoding: Decoding = SMALL, logit: float = -20.0) -> Heads:
    """Return heads without a likely location."""
    locations = decoding.num_locations
    return Heads(
        np.full((rows, locations), logit, np.float32),
        np.ones((rows, locations, 2), np.float32),
        np.zeros((rows, locations), np.float32),
    )


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


@st.composite
def proposal_batches(draw: st.DrawFn, max_rows: int = 4, max_locations: int = 12) -> Proposals:
    """Return a strategy of proposals with empty and reversed spans, equal and missing scores, and empty rows."""
    rows, count = draw(st.integers(1, max_rows)), draw(st.integers(1, max_locations))
    unit = st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.25, 0.5, 1.0])
    spans = draw(st.lists(unit, min_size=rows * count * 2, max_size=rows * count * 2))
    scores = draw(st.lists(unit | st.just(-math.inf), min_size=rows * count, max_size=rows * count))
    return Proposals(
        np.array(spans, np.float32).reshape(rows, count, 2), np.array(scores, np.float32).reshape(rows, count)
    )


SUPPRESSIONS = {"soft": soft_nms, "hard": lambda proposals, count=6: hard_nms(proposals, count, 0.45)}
both = pytest.mark.parametrize("name", SUPPRESSIONS)


def test_locations_match_hand_computed_values() -> None:
    assert locations(4, (1, 2)).tolist() == [0.5, 1.5, 2.5, 3.5, 1, 3]


def test_sigmoid_does_not_overflow_and_keeps_dtype() -> None:
    with np.errstate(all="raise", under="ignore"):
        values = sigmoid(np.array([-1e4, -1, 0, 1, 1e4], np.float32))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, [0, 1 / (1 + math.e), 0.5, math.e / (1 + math.e), 1], rtol=1e-6)


def test_score_proposals_matches_hand_computed_span() -> None:
    raw = heads()
    raw.matching_logits[0, 1] = logit(0.81)
    raw.boundary_distances[0, 1] = 0.5, 2
    raw.iou_logits[0, 1] = logit(0.64)
    proposals = score_proposals_with_fallback(raw, SMALL)
    assert proposals.spans[0, 1].tolist() == [0.25, 0.875]
    assert proposals.scores[0, 1] == pytest.approx(0.9 * 0.8, abs=1e-6)
    assert np.isneginf(np.delete(proposals.scores[0], 1)).all()


def scored(raw: Heads, decoding: Decoding) -> list[int]:
    """Return the indices of the locations with a proposal, of the first query."""
    return np.flatnonzero(np.isfinite(score_proposals_with_fallback(raw, decoding).scores[0])).tolist()


def test_location_at_score_threshold_is_excluded() -> None:
    raw = heads()
    raw.matching_logits[0, 2:4] = 0, 1e-3
    assert scored(raw, dataclasses.replace(SMALL, score_threshold=0.5)) == [3]


def test_pre_nms_limit_keeps_best_locations_per_level() -> None:
    raw = heads(logit=2)
    raw.iou_logits[0] = 1, 4, 3, 2, 0, 1
    for limit, expected in ((1, [1, 5]), (2, [1, 2, 4, 5]), (32, list(range(6)))):
        assert scored(raw, dataclasses.replace(SMALL, pre_nms_top_n=limit)) == expected


def test_pre_nms_limit_counts_only_locations_over_threshold() -> None:
    raw = heads()
    raw.matching_logits[0, :4] = 1, 2, -4, -4
    # Unlikely locations have higher scores, but must not replace likely ones.
    raw.iou_logits[0, :4] = -9, -9, 9, 9
    assert scored(raw, dataclasses.replace(SMALL, pre_nms_top_n=2)) == [0, 1]


def one(*rows: tuple[float, float, float]) -> Proposals:
    array = np.array([rows], np.float32)
    return Proposals(array[..., :2], array[..., 2])


def picked(picks: np.ndarray) -> list[list[float]]:
    """Return the moments of one row without padding."""
    assert (np.isnan(picks).all(-1) == np.isnan(picks[..., 0])).all()
    return picks[0][~np.isnan(picks[0, :, 0])].tolist()


def test_soft_nms_overlap_at_threshold_does_not_decay() -> None:
    # A selected span of duration 0.625 has the threshold 0.5 + 0.4 * 0.625 = 0.75, and 0.46875 / 0.625 is 0.75 in
    # float32.
    assert picked(soft_nms(one((0, 0.625, 0.9), (0, 0.46875, 0.8))))[1][2] == np.float32(0.8)
    assert picked(soft_nms(one((0, 0.625, 0.9), (0, 0.47, 0.8))))[1][2] < 0.3


def test_published_nms_returns_six_picks() -> None:
    spans = [(index / 10, index / 10 + 0.05, 0.9 - index / 100) for index in range(10)]
    assert len(picked(apply_nms(one(*spans), Decoding()))) == 6
    assert len(picked(soft_nms(one(*spans), 8))) == 8
    assert len(picked(soft_nms(one(*spans), 40))) == 10


def test_hard_nms_drops_overlap_above_threshold_only() -> None:
    # The IoU with the first is 0.5, then just above it, then that of two empty spans.
    for end, other, count in ((1, 0.5, 2), (1, 0.515625, 1), (0, 0, 2)):
        rows = one((0, end, 0.9), (0, other, 0.8))
        assert len(picked(hard_nms(rows, 6, 0.5))) == count


def test_nms_ties_soft_picks_first_hard_picks_last() -> None:
    rows = one((0, 0.1, 0.5), (0.5, 0.6, 0.5))
    assert picked(soft_nms(rows))[0][0] == 0
    assert picked(hard_nms(rows, 6, 0.45))[0][0] == 0.5


def test_authors_nms_threshold_is_below_metric_threshold() -> None:
    # IoU 0.48.
    rows = one((0, 0.5, 0.9), (0, 0.24, 0.8))
    drn = Decoding(protocol="drn")
    assert len(picked(apply_nms(rows, drn))) == 1
    assert len(picked(apply_nms(rows, drn, iou_threshold=0.5))) == 1
    assert len(picked(apply_nms(rows, drn, iou_threshold=0.7))) == 2
    assert len(picked(apply_nms(rows, Decoding(), iou_threshold=0.3))) == 2


@both
@given(proposal_batches())
def test_picks_are_proposals_in_order_of_score(name: str, proposals: Proposals) -> None:
    before = proposals.spans.copy(), proposals.scores.copy()
    actual = SUPPRESSIONS[name](proposals, 20)
    best = proposals.scores.max(axis=1)
    present = best > -np.inf
    np.testing.assert_array_equal(actual[present, 0, 2], best[present])
    assert np.isnan(actual[~present]).all()
    for picks, spans, scores in zip(actual, proposals.spans, proposals.scores, strict=True):
        left = [tuple(span) for span in spans[scores > -np.inf].tolist()]
        chosen = picks[~np.isnan(picks[:, 0])]
        for start, end, _ in chosen.tolist():
            left.remove((start, end))
        # Soft-NMS returns all proposals.
        assert not left or name == "hard"
        assert np.isnan(picks[len(chosen) :]).all()
        assert (np.diff(chosen[:, 2]) <= 0).all()
        assert (chosen[:, 2] >= 0).all()
    np.testing.assert_array_equal(proposals.spans, before[0])
    np.testing.assert_array_equal(proposals.scores, before[1])


@both
@given(proposal_batches())
def test_nms_of_a_batch_row_equals_nms_of_single_row(name: str, proposals: Proposals) -> None:
    batch = SUPPRESSIONS[name](proposals)
    for row in range(len(batch)):
        alone = Proposals(proposals.spans[[row]], proposals.scores[[row]])
        np.testing.assert_array_equal(SUPPRESSIONS[name](alone)[0], batch[row])


@both
@given(proposal_batches(), st.integers(1, 5), st.booleans())
def test_nms_ignores_absent_proposals(name: str, proposals: Proposals, more: int, before: bool) -> None:
    rows = len(proposals.scores)
    absent = np.full((rows, more), -np.inf, np.float32)
    anything = np.tile(np.float32([0, 1]), (rows, more, 1))
    parts = [(anything, absent), (proposals.spans, proposals.scores)]
    parts = parts if before else parts[::-1]
    padded = Proposals(*(np.concatenate(arrays, 1) for arrays in zip(*parts, strict=True)))
    np.testing.assert_array_equal(SUPPRESSIONS[name](padded), SUPPRESSIONS[name](proposals))


@both
@given(proposal_batches(), st.integers(1, 8))
def test_nms_smaller_count_returns_prefix(name: str, proposals: Proposals, count: int) -> None:
    np.testing.assert_array_equal(SUPPRESSIONS[name](proposals, count), SUPPRESSIONS[name](proposals, 20)[:, :count])


@st.composite
def separate_proposals(draw: st.DrawFn) -> list[list[float]]:
    """Return a strategy of spans of positive length with distinct scores, on a grid."""
    count = draw(st.integers(1, 10))
    ticks = st.integers(0, 40)
    spans = draw(st.lists(st.tuples(ticks, ticks).filter(lambda x: x[0] < x[1]), min_size=count, max_size=count))
    scores = draw(st.permutations(range(1, count + 1)))
    return [[start / 40, end / 40, score / (count + 1)] for (start, end), score in zip(spans, scores, strict=True)]


def naive_iou(a: list[float], b: list[float]) -> float:
    inter = max(min(a[1], b[1]) - max(a[0], b[0]), 0.0)
    return inter / ((a[1] - a[0]) - inter + (b[1] - b[0]))


def published_picks(rows: list[list[float]]) -> list[list[float]]:
    """Run the published loop; discard examples whose result depends on rounding."""
    left = [list(row) for row in rows]
    picks: list[list[float]] = []
    while left and len(picks) <= 5:
        best = max(left, key=lambda row: row[2])
        assume(all(row is best or best[2] - row[2] > 1e-5 for row in left))
        left.remove(best)
        picks.append(best)
        for row in left:
            overlap, threshold = naive_iou(best, row), 0.5 + 0.4 * (best[1] - best[0])
            assume(abs(overlap - threshold) > 1e-5)
            if overlap > threshold:
                row[2] *= math.exp(-(overlap**2) / 0.4)
    return picks


@settings(max_examples=100)
@given(separate_proposals())
def test_soft_nms_equals_naive_published_loop(rows: list[list[float]]) -> None:
    np.testing.assert_allclose(picked(soft_nms(one(*map(tuple, rows)))), published_picks(rows), atol=1e-6)


def random_heads(seed: int, rows: int, decoding: Decoding) -> Heads:
    """Return heads with likely locations only and spans of up to half of the video on each side."""
    random = np.random.default_rng(seed)
    shape = (rows, decoding.num_locations)
    return Heads(
        random.uniform(-2, 4, shape).astype(np.float32),
        random.uniform(0.5, decoding.num_segments / 2, (*shape, 2)).astype(np.float32),
        random.uniform(-2, 4, shape).astype(np.float32),
    )


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from([96, 128, 256]))
def test_decode_one_query_many_proposals_equals_published(seed: int, num_segments: int) -> None:
    decoding = Decoding(num_segments, pre_nms_top_n=num_segments)
    raw = random_heads(seed, 1, decoding)
    proposals = score_proposals_with_fallback(raw, decoding)
    rows = np.concatenate((proposals.spans[0], proposals.scores[0][:, None]), axis=1)
    assert len(rows) > FEW_PROPOSALS
    np.testing.assert_allclose(picked(decode(raw, decoding)), published_picks(rows.tolist()), atol=1e-6)


@settings(max_examples=20)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1]) | st.integers(1, 3 * BLOCK),
    st.sampled_from(["mmaction2", "drn"]),
)
def test_decode_of_many_queries_equals_decode_of_each(seed: int, rows: int, protocol: Protocol) -> None:
    decoding = dataclasses.replace(SMALL if seed % 2 else Decoding(), protocol=protocol)
    raw = random_heads(seed, rows, decoding)
    raw.matching_logits[np.random.default_rng(seed).random(rows) < 0.3] = -9
    each = [decode(Heads(*(value[row : row + 1] for value in vars(raw).values())), decoding) for row in range(rows)]
    picks = decode(raw, decoding)
    assert (picks.shape, picks.dtype) == ((rows, 6, 3), np.float32)
    np.testing.assert_array_equal(picks, np.concatenate(each))


@settings(max_examples=100)
@given(separate_proposals(), st.sampled_from([0.25, 0.45, 0.65]))
def test_hard_nms_equals_naive_loop(rows: list[list[float]], threshold: float) -> None:
    expected: list[list[float]] = []
    for row in sorted(rows, key=lambda row: -row[2]):
        overlaps = [naive_iou(pick, row) for pick in expected]
        assume(all(abs(overlap - threshold) > 1e-5 for overlap in overlaps))
        if all(overlap <= threshold for overlap in overlaps):
            expected.append(row)
    np.testing.assert_allclose(picked(hard_nms(one(*map(tuple, rows)), 6, threshold)), expected[:6], atol=1e-6)


def recorded_heads(reference: np.lib.npyio.NpzFile, batch: str) -> Heads:
    """Return the heads of a golden batch, whose rows are sorted by length."""

    def levels(name: str) -> np.ndarray:
        return np.concatenate([reference[f"{batch}_{name}_{level}"] for level in range(3)], axis=2)

    return Heads(levels("cls")[:, 0], np.ascontiguousarray(levels("box").transpose(0, 2, 1)), levels("iou")[:, 0])


@pytest.mark.parametrize("batch", ["a", "b", "c"])
@pytest.mark.parametrize(("tag", "use_iou_scores"), [("", True), ("1", False)])
def test_decoding_equals_published_code(golden: Path, batch: str, tag: str, use_iou_scores: bool) -> None:
    reference = np.load(golden / "small_seed0.npz")
    raw, decoding = recorded_heads(reference, batch), Decoding(use_iou_scores=use_iou_scores)
    before = [value.copy() for value in vars(raw).values()]
    proposals = score_proposals_with_fallback(raw, decoding)
    rows, indices = np.nonzero(proposals.scores > -np.inf)
    np.testing.assert_array_equal(rows, reference[f"{batch}_det{tag}_sample"])
    np.testing.assert_array_equal(locations(32, (1, 2, 4))[indices] / 32, reference[f"{batch}_det{tag}_location"])
    np.testing.assert_array_equal(proposals.spans[rows, indices], reference[f"{batch}_det{tag}_segment"])
    scores = proposals.scores[rows, indices]
    np.testing.assert_allclose(scores, reference[f"{batch}_det{tag}_score"], rtol=0, atol=DETECTIONS)
    picks = decode(raw, decoding)
    for row, sample in enumerate(reference[f"{batch}_sort_index"]):
        expected = reference[f"{batch}_predict{tag}_{sample}"]
        np.testing.assert_allclose(picks[row, : len(expected)], expected, rtol=0, atol=DETECTIONS)
        assert np.isnan(picks[row, len(expected) :]).all()
    for value, copy in zip(vars(raw).values(), before, strict=True):
        np.testing.assert_array_equal(value, copy)
    if use_iou_scores:
        # The longest query of the batch.
        np.testing.assert_allclose(picks[0], reference[f"{batch}_batch_predict"], rtol=0, atol=DETECTIONS)


def test_query_without_proposals_falls_back_as_published(golden: Path) -> None:
    raw = heads(rows=2, decoding=Decoding())
    raw.matching_logits[1, 3] = 3
    picks = decode(raw, Decoding())
    np.testing.assert_array_equal(picked(picks), np.load(golden / "small_seed0.npz")["none_predict"])
    assert picks[1, 0].tolist() != [0, 1, 1]
    assert np.isnan(picks[1, 1:]).all()


def test_soft_nms_matches_published_code_on_40_lists(golden: Path) -> None:
    reference = np.load(golden / "metric.npz")
    for index in range(40):
        rows = reference[f"snms_in_{index}"]
        picks = picked(soft_nms(Proposals(rows[None, :, :2], rows[None, :, 2])))
        np.testing.assert_allclose(picks, reference[f"snms_out_{index}"], rtol=0, atol=DETECTIONS)


@pytest.mark.parametrize("name", ["matching_logits", "boundary_distances", "iou_logits"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_heads_are_rejected(name: str, value: float) -> None:
    raw = heads(2, logit=0.0)
    score_proposals_with_fallback(raw, SMALL)
    getattr(raw, name)[1].flat[3] = value
    with raises(ModelFileError, "non_finite_output", name, 1, 2):
        score_proposals_with_fallback(raw, SMALL)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [1, 8], ids=["one by one", "batch"])
@pytest.mark.parametrize("name", ["matching_logits", "boundary_distances", "iou_logits"])
def test_huge_head_values_are_decoded(name: str, rows: int) -> None:
    raw = heads(rows, logit=1.0)
    getattr(raw, name)[...] = 1e30
    picks = decode(raw, SMALL)
    assert ((picks[:, 0, :2] >= 0) & (picks[:, 0, :2] <= 1)).all()
    # Sums of squares overflow although every value is finite.
    getattr(raw, name)[...] = np.finfo(np.float32).max
    np.testing.assert_array_equal(decode(raw, SMALL)[:, 0], picks[:, 0])


@pytest.mark.parametrize(
    ("wrong", "quoted"),
    [
        ({"num_segments": 30}, 30),
        ({"use_iou_scores": "no"}, "'no'"),
        ({"protocol": "soft"}, "'soft'"),
        ({"strides": (0,)}, 0),
        ({"strides": ()}, "(32, 32)"),
        ({"num_segments": 1 << 32, "strides": (1,)}, 1 << 32),
        ({"score_threshold": "x"}, "'x'"),
        ({"pre_nms_top_n": 0}, 0),
    ],
)
def test_invalid_decoding_settings_are_rejected(wrong: dict[str, object], quoted: object) -> None:
    with raises(ModelFileError, "invalid_setting", quoted):
        Decoding(**wrong)  # type: ignore[arg-type]


def test_heads_with_wrong_location_count_are_rejected() -> None:
    with raises(ModelFileError, "output_shape_mismatch", 56, 48):
        score_proposals_with_fallback(heads(2, Decoding()), Decoding(strides=(1, 2)))

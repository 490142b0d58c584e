"""Test `export.parity.compare` against values worked by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.parity.compare import RESAMPLES, bootstrap, collect_outputs, compare, mcnemar, score_shift
from export.parity.parity_result import AccuracyBudget, MetricDelta, ParityResult, unresolved_drops, violations
from export.parity.parity_tables import parity_tables
from runtime import Grounder, Vocabulary
from runtime.artifacts.manifest import Features, Manifest
from runtime.core.batch import Batch, Heads
from runtime.core.decoding import Decoding
from runtime.core.errors import AnnotationError, FeatureError, ModelFileError, QueryError
from runtime.core.presence import Presence
from runtime.datasets.dataset import DataSet
from runtime.grounding.evaluation import evaluate
from tests.raising import quotes, raises

# Every query is one distinct word: video, duration, ground truth as fractions.
QUERIES = [("VIDEO", 10.0, 0.2, 0.6), ("VIDEO", 10.0, 0.0, 0.5), ("OTHER", 40.0, 0.25, 0.75), ("OTHER", 40.0, 0.5, 1.0)]
TRUTHS = [(start, end) for *_, start, end in QUERIES]
FEATURES = "C3D_unit16_overlap0.5_merged"

Spans = Sequence[tuple[float, float]]


class Scripted:
    """Answers the query of word k with the spans of row k, best first, for any video.

    Args:
        change: changes the heads of a batch.
        manifest: fields of the manifest that differ from the defaults.
    """

    def __init__(
        self, answers: Sequence[Spans], change: Callable[[Batch, Heads], object] | None = None, **manifest: object
    ) -> None:
        words = {f"word{index}": index for index in range(1, len(QUERIES) + 1)}
        fields = {"vocabulary": Vocabulary(words), "decoding": Decoding(), "features": Features(dim=4)}
        self.manifest = Manifest(**{**fields, **manifest})
        self.answers, self.change = answers, change
        self.batches: list[Batch] = []

    def run(self, batch: Batch) -> Heads:
        self.batches.append(batch)
        locations = self.manifest.decoding.num_locations
        matching = np.full((len(batch), locations), -9, np.float32)
        distances = np.zeros((len(batch), locations, 2), np.float32)
        iou = np.full((len(batch), locations), 2, np.float32)
        for row, (word,) in enumerate(batch.query_tokens):
            for index, (start, end) in enumerate(self.answers[word - 1]):
                matching[row, index] = 4 - index
                distances[row, index] = index + 0.5 - 32 * start, 32 * end - index - 0.5
        heads = Heads(matching, distances, iou)
        if self.change:
            self.change(batch, heads)
        return heads


@pytest.fixture
def data_set(tmp_path: Path) -> DataSet:
    (tmp_path / FEATURES).mkdir()
    for name in ("VIDEO", "OTHER"):
        np.save(tmp_path / FEATURES / f"{name}.npy", np.eye(16, 4, dtype=np.float32))
    lines = [
        f"{video} {start * duration} {end * duration}##word{index}.\n"
        for index, (video, duration, start, end) in enumerate(QUERIES, 1)
    ]
    (tmp_path / "Charades_sta_test.txt").write_text("".join(lines))
    (tmp_path / "Charades_sta_train.txt").write_text("VIDEO 0 5##word1.\nOTHER 0 20##word2.\n")
    tables = {
        "Charades_duration.json": {video: duration for video, duration, *_ in QUERIES},
        "Charades_frames_info.json": dict.fromkeys(("VIDEO", "OTHER"), 144),
        "Charades_word2id.json": {f"word{index}": index for index in range(1, len(QUERIES) + 1)},
    }
    for name, table in tables.items():
        (tmp_path / name).write_text(json.dumps(table))
    return DataSet(tmp_path)


def alone(*spans: tuple[float, float]) -> list[Spans]:
    """Return answers with one span each."""
    return [[span] for span in spans]


# Answers with the ground truth.
RIGHT = alone(*TRUTHS)
Side = Sequence[Spans] | Scripted


def parity(data_set: DataSet, reference: Side, other: Side, **options: object) -> ParityResult:
    sides = (Grounder(side if isinstance(side, Scripted) else Scripted(side)) for side in (reference, other))
    return compare(*sides, data_set, data_set.annotations("test"), **options)


def test_compare_model_with_itself_finds_no_difference(data_set: DataSet) -> None:
    result = parity(data_set, RIGHT, RIGHT)
    assert result.queries == 4
    assert {(error.max, error.p99, error.not_finite) for error in result.heads.values()} == {(0, 0, 0)}
    assert (result.boundaries.max, result.locations.max) == (0, 0)
    assert (result.overlap.mean, result.overlap.min) == (1, 1)
    assert (result.order.first, result.order.five) == (1, 1)
    assert all(flips.gained == flips.lost == () and flips.p_value == 1 for flips in result.flips.values())
    assert set(result.differences.values()) == {MetricDelta(0, 0, 0)}
    assert result.worst == ()
    assert violations(result, AccuracyBudget(0, 0)) == []


def test_agreement_on_no_moment_is_counted_and_reported(data_set: DataSet) -> None:
    result = parity(data_set, [[], [], *alone(*TRUTHS[2:])], [[], *alone(*TRUTHS[1:])])
    assert result.fallbacks == result.to_dict()["answered_whole"] == 1
    # The report has one more line.
    lines, without = (
        [
            line
            for table in parity_tables(
                dataclasses.replace(result, fallbacks=is_full), ("a", "b"), "test", AccuracyBudget()
            )
            for line in table.text().splitlines()
        ]
        for is_full in (1, 0)
    )
    (line,) = [line for line in lines if line not in without]
    assert quotes(line, 1)
    assert len(lines) == len(without) + 1


def test_boundary_errors_are_in_seconds_of_the_video(data_set: DataSet) -> None:
    moved = [(0.2, 0.6), (0.0, 0.6), (0.25, 0.75), (0.45, 1.0)]
    result = parity(data_set, RIGHT, alone(*moved))
    # The end of the second shifts by 1 s, the start of the last by 2 s; the other six boundaries do not.
    assert result.boundaries.max == pytest.approx(2)
    assert result.boundaries.p50 == pytest.approx(0)
    assert result.boundaries.p99 == pytest.approx(np.quantile([0] * 6 + [1, 2], 0.99), rel=1e-5)
    assert result.locations.max == pytest.approx(2)
    assert result.overlap.mean == pytest.approx((1 + 5 / 6 + 1 + 10 / 11) / 4)
    assert result.overlap.min == pytest.approx(5 / 6)


def test_head_errors_match_hand_computed_values(data_set: DataSet) -> None:
    def lower(batch: Batch, heads: Heads) -> None:
        heads.iou_logits[:] -= np.arange(56, dtype=np.float32) / 100

    result = parity(data_set, RIGHT, Scripted(RIGHT, lower)).heads
    assert result["matching_logits"].max == 0
    assert result["matching_logits"].largest == 9
    iou = result["iou_logits"]
    assert (iou.max, iou.largest) == pytest.approx((0.55, 2), rel=1e-5)
    assert iou.p99 == pytest.approx(np.quantile(np.tile(np.arange(56) / 100, 4), 0.99), rel=1e-5)


def test_gained_and_lost_are_annotation_line_numbers(data_set: DataSet) -> None:
    # IoU with the ground truth: reference 1, 0.6, 0.2, 1; other 1, 1, 0.6, 0.4.
    reference = [(0.2, 0.6), (0.0, 0.3), (0.65, 0.75), (0.5, 1.0)]
    other = [(0.2, 0.6), (0.0, 0.5), (0.45, 0.75), (0.5, 0.7)]
    result = parity(data_set, alone(*reference), alone(*other))
    half, strict = result.flips["R@1 IoU=0.5"], result.flips["R@1 IoU=0.7"]
    assert (half.gained, half.lost) == ((3,), (4,))
    assert (strict.gained, strict.lost) == ((2,), (4,))
    assert half.p_value == strict.p_value == 1
    assert result.differences["R@1 IoU=0.5"].mean == 0
    assert result.differences["mIoU"].mean == pytest.approx((0 + 0.4 + 0.4 - 0.6) / 4, abs=1e-6)
    assert [row.line for row in result.worst] == [3, 4, 2]


@pytest.mark.parametrize("protocol", ["mmaction2", "drn", None])
def test_recall_equals_evaluate_for_each_model(data_set: DataSet, protocol: str | None) -> None:
    rng = np.random.default_rng(0)
    answers = [[[tuple(np.sort(rng.random(2))) for _ in range(6)] for _ in QUERIES] for _ in range(2)]
    result = parity(data_set, *answers, protocol=protocol)
    for side, said in zip(answers, (result.reference, result.other), strict=True):
        alone = evaluate(Grounder(Scripted(side)), data_set, data_set.annotations("test"), protocol=protocol)
        assert said == alone.report
    for name, difference in result.differences.items():
        assert difference.mean == pytest.approx(result.other.values[name] - result.reference.values[name])


def test_requested_protocol_decodes_both_models(data_set: DataSet) -> None:
    # The second overlaps the first by half: the authors' NMS removes it, mmaction2's does not.
    pair, first = [(0.0, 0.3), (0.1, 0.4)], [(0.0, 0.3)]
    for sides in ((pair, first), (first, pair)):
        answers = [[side] * 4 for side in sides]
        assert parity(data_set, *answers, protocol="mmaction2").order.five == 0
        assert parity(data_set, *answers, protocol="drn").order.five == 1


def test_order_change_below_rank_one_is_counted_separately(data_set: DataSet) -> None:
    spans = [(0.0, 0.1), (0.2, 0.3), (0.4, 0.5), (0.6, 0.7), (0.8, 0.9)]
    swapped = [spans[0], spans[2], spans[1], *spans[3:]]
    result = parity(data_set, [spans] * 4, [spans, swapped, spans, spans])
    assert (result.order.first, result.order.five) == (1, 0.75)
    assert result.boundaries.max == 0
    result = parity(data_set, [spans] * 4, [spans, spans, spans[::-1], spans[::-1]])
    assert (result.order.first, result.order.five) == (0.5, 0.5)
    result = parity(data_set, [spans[:3]] * 4, [spans[:2], *[spans[:3]] * 3])
    assert (result.order.first, result.order.five) == (1, 0.75), "a missing moment is a change"
    equal = [(0.0, 1.0), (0.0, 1.0), (0.3, 0.3)]
    assert parity(data_set, [equal] * 4, [equal] * 4).order.five == 1


def test_both_models_get_identical_batches_once(data_set: DataSet) -> None:
    sides = [Scripted(RIGHT) for _ in range(2)]
    seen: list[int] = []
    parity(data_set, *sides, batch_size=3, on_progress=seen.append)
    assert [len(batch) for batch in sides[0].batches] == [3, 1]
    assert seen == [3, 1, 3, 1], "each model tells of its own"
    for ours, theirs in zip(sides[0].batches, sides[1].batches, strict=True):
        assert all(np.array_equal(value, vars(theirs)[name]) for name, value in vars(ours).items())


MOVED = ((0.2, 0.5), (0.0, 0.6), (0.25, 0.7), (0.45, 1.0))


@pytest.mark.parametrize("options", [{"concurrent": True}, {"batch_size": 1}])
def test_result_does_not_depend_on_threads_or_batch_size(
    data_set: DataSet, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = parity(data_set, RIGHT, alone(*MOVED))
    read: list[str] = []
    original = DataSet.video
    monkeypatch.setattr(DataSet, "video", lambda self, name: read.append(name) or original(self, name))
    assert parity(data_set, RIGHT, alone(*MOVED), **options) == expected
    assert sorted(read) == ["OTHER", "VIDEO"], "each video is read once"


def test_known_reference_outputs_are_not_recomputed(data_set: DataSet) -> None:
    known = collect_outputs(Grounder(Scripted(RIGHT)), data_set, data_set.annotations("test"))
    silent = Scripted(RIGHT)
    assert parity(data_set, silent, alone(*MOVED), known=known) == parity(data_set, RIGHT, alone(*MOVED))
    assert silent.batches == []


def test_prior_is_fitted_on_training_split(data_set: DataSet) -> None:
    result = parity(data_set, RIGHT, RIGHT)
    # The training moments are the first half of their videos, which is correct for the second query only.
    assert result.prior.values["R@1 IoU=0.7"] == 0.25
    data_set.annotations_path("train").unlink()
    assert parity(data_set, RIGHT, RIGHT).prior is None


def test_worst_queries_are_sorted_with_moments_and_truth(data_set: DataSet) -> None:
    moved = [(0.2, 0.6), (0.0, 0.6), (0.85, 0.95), (0.45, 1.0)]
    result = parity(data_set, RIGHT, alone(*moved))
    assert [row.line for row in result.worst] == [3, 2, 4]
    worst = result.worst[0]
    assert (worst.video, worst.query, worst.duration, worst.overlap) == ("OTHER", "word3.", 40, 0)
    assert worst.truth == (10, 30)
    assert (worst.reference.start, worst.reference.end) == pytest.approx((10, 30))
    assert (worst.other.start, worst.other.end) == pytest.approx((34, 38))
    assert (worst.reference_iou, worst.other_iou) == pytest.approx((1, 0))
    assert worst.shift == pytest.approx(24)


@pytest.mark.parametrize(
    ("head", "value"), [("matching_logits", np.nan), ("boundary_distances", np.inf), ("iou_logits", np.nan)]
)
def test_non_finite_values_fail_but_produce_a_report(data_set: DataSet, head: str, value: float) -> None:
    def overflow(batch: Batch, heads: Heads) -> None:
        getattr(heads, head)[batch.query_tokens[:, 0] == 2] = value

    result = parity(data_set, RIGHT, Scripted(RIGHT, overflow))
    assert result.heads[head].not_finite == (112 if head == "boundary_distances" else 56)
    assert math.isfinite(result.heads[head].max)
    assert {name for name, error in result.heads.items() if error.not_finite} == {head}
    assert result.other.values["R@1 IoU=0.5"] == 0.75
    assert result.flips["R@1 IoU=0.5"].lost == (2,)
    assert result.boundaries.max == 10
    broken = violations(result, AccuracyBudget(100, 100))
    assert len(broken) == 1
    assert head in broken[0]
    json.dumps(result.to_dict(), allow_nan=False)


def test_model_returning_only_nan_has_zero_miou(data_set: DataSet) -> None:
    def fail(batch: Batch, heads: Heads) -> None:
        heads.boundary_distances[:] = heads.iou_logits[:] = np.nan

    result = parity(data_set, RIGHT, Scripted(RIGHT, fail))
    assert result.other.values["mIoU"] == 0
    assert result.boundaries.max == 40
    assert {row.other for row in result.worst} == {None}
    json.dumps(result.to_dict(), allow_nan=False)


def test_compare_reference_not_finite_names_features(data_set: DataSet) -> None:
    def overflow(batch: Batch, heads: Heads) -> None:
        heads.boundary_distances[batch.segment_features.any(axis=(1, 2))] = np.inf

    with raises(FeatureError, "features_out_of_scale"):
        parity(data_set, Scripted(RIGHT, overflow), RIGHT)


def test_models_with_different_queries_are_rejected(data_set: DataSet) -> None:
    fewer = Vocabulary({"word1": 1, "word2": 2, "word3": 4, "word4": 3})
    others = {
        ("4 words", 4, 2): {"vocabulary": fewer},
        ("skip", "error"): {"vocabulary": Vocabulary({f"word{i}": i for i in range(1, 5)}, unknown="error")},
        (32, 64): {"decoding": Decoding(num_segments=64)},
        (4, 500): {"features": Features(dim=500)},
        ("mmaction2", "drn"): {"features": Features(dim=4, pooling="drn")},
        (8, 16): {"features": Features(dim=4, stride=16)},
    }
    for values, fields in others.items():
        reference, other = (Scripted(RIGHT, **f) for f in ({}, fields))
        with raises(ModelFileError, "models_differ", *values):
            parity(data_set, reference, other)
        assert reference.batches == []


def test_empty_set_and_too_long_queries_are_rejected(data_set: DataSet) -> None:
    annotations = data_set.annotations("test")
    sides = Grounder(Scripted(RIGHT)), Grounder(Scripted(RIGHT))
    with raises(AnnotationError, "too_few_queries", "--limit"):
        compare(*sides, data_set, [])
    longer = [annotations[0], dataclasses.replace(annotations[1], sentence="word1 word2")]
    sides = Grounder(Scripted(RIGHT)), Grounder(Scripted(RIGHT, max_query_length=1))
    with raises(QueryError, "query_too_long", "Sentence 2", longer[1].video, "got 2", "1 to 1"):
        compare(*sides, data_set, longer)


def test_reference_protocol_is_used_for_both_models(data_set: DataSet) -> None:
    authors = Scripted(RIGHT, decoding=Decoding(protocol="drn"))
    assert parity(data_set, authors, RIGHT).other.protocol == "drn"
    assert parity(data_set, RIGHT, authors).other.protocol == "mmaction2"


def test_budget_allows_a_drop_equal_to_its_limit(data_set: DataSet) -> None:
    lost = [(0.2, 0.6), (0.0, 0.5), (0.25, 0.75), (0.0, 0.1)]
    result = parity(data_set, RIGHT, alone(*lost))
    assert violations(result, AccuracyBudget(max_drop=25, boundary_p99=None)) == []
    strict, mean = violations(result, AccuracyBudget(max_drop=0, boundary_p99=None))
    assert quotes(strict, "R@1 IoU=0.7", "25.00", "100.00", "75.00", 0)
    assert quotes(mean, "mIoU", "25.00")
    # A gain is never a violation.
    assert violations(parity(data_set, alone(*lost), RIGHT), AccuracyBudget(0, None)) == []


def test_budget_below_one_query_rejects_only_drops_beyond_chance(data_set: DataSet) -> None:
    one_lost = [(0.2, 0.6), (0.0, 0.5), (0.25, 0.75), (0.0, 0.1)]
    result, budget = parity(data_set, RIGHT, alone(*one_lost)), AccuracyBudget(24.9, None)
    assert violations(result, budget) == []
    recall, mean = unresolved_drops(result, budget)
    assert quotes(recall, "R@1 IoU=0.7", "25.00", 4, 24.9, "5 queries", "--max-drop 25")
    assert mean.startswith("mIoU")
    # Which drop counts is not asked of a budget that the queries resolve, nor of one of 0.
    assert unresolved_drops(result, AccuracyBudget(25, None)) == unresolved_drops(result, AccuracyBudget(0, None)) == []
    all_lost = parity(data_set, RIGHT, alone(*[(0.9, 0.95)] * 3, (0.0, 0.1)))
    assert len(violations(all_lost, budget)) == 2
    assert unresolved_drops(all_lost, budget) == []


def test_fp32_boundaries_must_agree_within_a_tenth_of_a_second(data_set: DataSet) -> None:
    moved = [(0.2, 0.6), (0.0, 0.5), (0.25, 0.75), (0.495, 1.0)]
    result = parity(data_set, RIGHT, alone(*moved))
    assert result.boundaries.p99 == pytest.approx(0.186, abs=1e-3)
    for precision, broken in (("fp32", 1), ("fp16", 1), ("bf16", 0), ("int8", 0), ("fp8", 0)):
        assert len(violations(result, AccuracyBudget.of(precision, max_drop=5))) == broken, precision
    assert len(violations(result, AccuracyBudget.of("int8", max_drop=5, boundary_p99=0.1))) == 1
    assert violations(result, AccuracyBudget.of("fp16", max_drop=5, boundary_p99=0.2)) == []
    assert AccuracyBudget.of("fp16").max_drop == AccuracyBudget().max_drop == 0.2


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(0, 0, 1), (0, 5, 2 / 32), (1, 9, 22 / 1024), (4, 4, 1), (3, 1, 10 / 16)]
)
def test_mcnemar_matches_hand_computed_values(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p, rel=1e-12)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_symmetric_binomial_probability(gained: int, lost: int) -> None:
    flips = gained + lost
    tail = sum(math.comb(flips, k) for k in range(min(gained, lost) + 1))
    assert mcnemar(gained, lost) == mcnemar(lost, gained) == min(1, 2 * tail / 2**flips)


def test_mcnemar_supports_thousands_of_flips() -> None:
    assert mcnemar(0, 3720) == 0
    assert 0.05 < mcnemar(1800, 1920) < 0.06


def test_bootstrap_interval_has_theoretical_width() -> None:
    rng = np.random.default_rng(3)
    values = np.stack((rng.choice([-1.0, 0, 1], 3720, p=[0.02, 0.95, 0.03]), rng.normal(1, 2, 3720)), axis=1)
    low, high = bootstrap(values)
    half_width = 1.96 * values.std(axis=0) / len(values) ** 0.5
    np.testing.assert_allclose((high - low) / 2, half_width, rtol=0.05)
    np.testing.assert_allclose((high + low) / 2, values.mean(axis=0), atol=0.1 * half_width.max())


def test_bootstrap_interval_depends_on_the_seed() -> None:
    values = np.random.default_rng(0).normal(size=(50, 1))
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values) != bootstrap(values, seed=1)
    low, high = bootstrap(np.full((7, 1), 0.25))
    assert low[0] == high[0] == 0.25
    assert RESAMPLES >= 2000


@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0.05, 1))
def test_score_shift_equals_a_count_by_hand(count: int, seed: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    reference, other = (np.where(rng.random(count) < 0.2, -np.inf, rng.integers(0, 9, count) / 8) for _ in range(2))
    shift = score_shift(reference, other, Presence(threshold, 1.0, 1.0, 1, 1))
    steps = [float(point) for point in (*reference, *other)]
    by_hand = max(abs(sum(a <= step for a in reference) - sum(b <= step for b in other)) / count for step in steps)
    assert shift.ks == pytest.approx(by_hand)
    limit = float(np.float32(threshold))
    assert shift.refused == sum(a >= limit > b for a, b in zip(reference, other, strict=True))
    assert shift.answered == sum(b >= limit > a for a, b in zip(reference, other, strict=True))


def test_score_shift_without_threshold_counts_no_crossings() -> None:
    shift = score_shift(np.array([0.2, 0.4]), np.array([0.3, -np.inf]), None)
    assert (shift.threshold, shift.refused, shift.answered) == (None, 0, 0)
    assert (shift.p50, shift.p99) == (pytest.approx(0.1), pytest.approx(0.1))

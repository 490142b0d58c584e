"""Test `runtime.core.metrics`: recall, mean IoU, and the prior."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.decoding import Proposals, hard_nms
from runtime.core.metrics import (
    IOU_THRESHOLDS,
    Report,
    best_constant_moments,
    best_iou,
    format_table,
    is_hit,
    metric_names,
    prior_report,
    report,
)
from runtime.datasets.dataset import DataSet

METRICS = metric_names(IOU_THRESHOLDS)
PROTOCOLS = pytest.mark.parametrize("protocol", ["mmaction2", "drn"])
LISTS = pytest.mark.parametrize("name", ["random", "edge", "random_softnms", "random_sorted"])
THRESHOLDS = pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])


@pytest.fixture(scope="module")
def recorded(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "metric.json").read_text())


@pytest.fixture(scope="module")
def lists(golden: Path) -> np.lib.npyio.NpzFile:
    return np.load(golden / "metric.npz")


def padded(lists: np.lib.npyio.NpzFile, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the recorded (N, K, 3) predictions of N queries, NaN after the last, and their (N, 2) ground truth."""
    counts = lists[f"{name}_count"]
    picks = np.full((len(counts), counts.max(), 3), np.nan, np.float32)
    picks[np.arange(counts.max()) < counts[:, None]] = lists[f"{name}_pred"]
    return picks, lists[f"{name}_gt"]


def proposals(picks: np.ndarray) -> Proposals:
    return Proposals(np.nan_to_num(picks[..., :2]), np.where(np.isnan(picks[..., 2]), -np.inf, picks[..., 2]))


def recalls(picks: np.ndarray, truth: np.ndarray, threshold: float, protocol: Any) -> list[float]:
    return [float(is_hit(picks, truth, rank, threshold, protocol).mean()) for rank in (1, 5)]


@LISTS
@THRESHOLDS
def test_recall_matches_the_published_metric(
    name: str, threshold: float, lists: np.lib.npyio.NpzFile, recorded: dict[str, Any]
) -> None:
    expected = recorded["recall"][f"{name}@{threshold}"]
    assert recalls(*padded(lists, name), threshold, "mmaction2") == list(expected.values())


@LISTS
@THRESHOLDS
@pytest.mark.parametrize("nms", [True, False])
def test_recall_matches_authors_evaluation(
    name: str, threshold: float, nms: bool, lists: np.lib.npyio.NpzFile, recorded: dict[str, Any]
) -> None:
    picks, truth = padded(lists, name)
    if nms:
        picks = hard_nms(proposals(picks), 6, threshold - 0.05)
    else:
        picks = np.take_along_axis(picks, np.argsort(-picks[..., 2], axis=1, kind="stable")[..., None], 1)
    assert recalls(picks, truth, threshold, "drn") == recorded["official"][f"{name}@{threshold} nms={nms}"]


# Cases in which the published metric counts a hit, but this one does not: moments that end before they start, and NaN.
ANSWERED_OTHERWISE = ("reversed both", "nan prediction")


def test_odd_predictions_match_all_but_two_published(lists: np.lib.npyio.NpzFile, recorded: dict[str, Any]) -> None:
    differing = []
    for name, expected in recorded["odd"].items():
        ours = recalls(lists[f"odd_pred_{name}"][None], lists[f"odd_gt_{name}"][None], 0.5, "mmaction2")
        if ours != list(expected["recall"].values()):
            differing.append(name)
            assert ours == [0, 0]
    assert tuple(differing) == ANSWERED_OTHERWISE
    assert len(recorded["odd"]) >= 15


def test_empty_ground_truth_is_a_miss(lists: np.lib.npyio.NpzFile, recorded: dict[str, Any]) -> None:
    name = "zero-length both, same place"
    assert "ZeroDivisionError" in recorded["odd"][name]["official_plain"]
    for protocol in ("mmaction2", "drn"):
        ours = recalls(lists[f"odd_pred_{name}"][None], lists[f"odd_gt_{name}"][None], 0.5, protocol)
        assert ours == [0, 0]


# 0.3 is less than float32(0.3), which mmaction2 compares: an IoU of float32(0.3) is above the former only.
@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_iou_equal_to_threshold_is_a_hit_for_authors_only(threshold: float) -> None:
    picks, truth = np.array([[[0, threshold, 0.9]]], np.float32), np.array([[0.0, 1.0]])
    assert not is_hit(picks, truth, 1, threshold, "mmaction2")[0]
    assert is_hit(picks, truth, 1, threshold, "drn")[0]


@PROTOCOLS
def test_is_hit_uses_first_n_picks_in_given_order(protocol: Any) -> None:
    miss, hit = [0.9, 1, 0.1], [0, 0.5, 0.9]
    picks = np.array([[miss, hit, miss, miss, miss, miss], [miss] * 5 + [hit]], np.float32)
    truth = np.array([[0.0, 0.5]] * 2)
    assert is_hit(picks, truth, 1, 0.5, protocol).tolist() == [False, False]
    assert is_hit(picks, truth, 2, 0.5, protocol).tolist() == [True, False]
    assert is_hit(picks, truth, 5, 0.5, protocol).tolist() == [True, False]
    assert is_hit(picks, truth, 6, 0.5, protocol).tolist() == [True, True]


@PROTOCOLS
def test_no_picks_are_a_miss(protocol: Any) -> None:
    assert not is_hit(np.empty((2, 0, 3), np.float32), np.array([[0.0, 1.0]] * 2), 5, 0.5, protocol).any()
    assert not is_hit(np.full((2, 6, 3), np.nan, np.float32), np.array([[0.0, 1.0]] * 2), 5, 0.5, protocol).any()


def test_report_matches_hand_computed_values() -> None:
    nothing = [np.nan] * 3
    picks = np.array(
        [[[0, 1, 0.9], [0, 0.5, 0.8]], [[0, 0.4, 0.9], nothing], [nothing, nothing], [[0.5, 1, 1], nothing]], np.float32
    )
    truth = np.array([[0, 0.5], [0, 1], [0, 1], [0.5, 1]])
    actual = report(dict.fromkeys((0.3, 0.5, 0.7), picks), truth, "mmaction2").to_dict()
    # IoUs of the first moments: 0.5, 0.4, 0, 1; the second moment of the first query is a hit.
    assert actual.pop("mIoU") == pytest.approx((0.5 + 0.4 + 0 + 1) / 4)
    assert actual == {
        "R@1 IoU=0.3": 0.75,
        "R@1 IoU=0.5": 0.25,
        "R@1 IoU=0.7": 0.25,
        "R@5 IoU=0.3": 0.75,
        "R@5 IoU=0.5": 0.5,
        "R@5 IoU=0.7": 0.5,
        "queries": 4,
        "protocol": "mmaction2",
    }


def test_each_threshold_uses_its_own_picks() -> None:
    right, wrong = np.array([[[0, 1, 1]]], np.float32), np.array([[[0, 0.1, 1]]], np.float32)
    values = report({0.3: wrong, 0.5: right, 0.7: wrong}, np.array([[0.0, 1.0]]), "drn").values
    assert [values[f"R@1 IoU={threshold}"] for threshold in (0.3, 0.5, 0.7)] == [0, 1, 0]


def test_report_lists_main_metrics_first() -> None:
    assert METRICS[:3] == ("R@1 IoU=0.5", "R@1 IoU=0.7", "mIoU")
    names = (*METRICS[:3], "R@1 IoU=0.3", "R@1 IoU=0.1")
    assert metric_names((0.1, 0.3, 0.5, 0.7)) == names + tuple(f"R@5 IoU={m:g}" for m in (0.1, 0.3, 0.5, 0.7))
    picks = np.zeros((1, 1, 3), np.float32)
    values = report(dict.fromkeys((0.3, 0.5, 0.7), picks), np.array([[0.0, 1.0]]), "drn").values
    assert tuple(values) == METRICS


@PROTOCOLS
def test_several_moments_any_hit_and_best_iou_count(protocol: Any) -> None:
    picks = np.array([[[0, 0.2, 1]], [[0.5, 1, 1]], [[0.5, 1, 1]]], np.float32)
    nothing = [np.nan, np.nan]
    truth = np.array([[[0.5, 0.9], [0, 0.2]], [[0, 0.1], nothing], [[0.6, 1], nothing]])
    values = report(dict.fromkeys((0.5, 0.7), picks), truth, protocol).values
    assert values["R@1 IoU=0.7"] == pytest.approx(2 / 3)
    assert values["mIoU"] == pytest.approx((1 + 0 + 0.8) / 3)
    first = report(dict.fromkeys((0.5, 0.7), picks), truth[:, 0], protocol).values
    assert first["R@1 IoU=0.7"] == pytest.approx(1 / 3)


SPAN = st.tuples(*[st.floats(0, 1, width=32)] * 2)


@given(st.lists(st.tuples(SPAN, SPAN), min_size=1, max_size=6))
def test_best_iou_equals_naive_loop(pairs: list) -> None:
    truth, picks = (np.array(side, np.float64) for side in zip(*pairs, strict=True))
    for got, (a, b), (c, d) in zip(best_iou(picks[:, None], truth, 1), truth, picks, strict=True):
        proper = a < b and c < d
        union = (b - a) + (d - c) - max(min(b, d) - max(a, c), 0)
        assert got == pytest.approx(max(min(b, d) - max(a, c), 0) / union if proper else 0)


def test_best_constant_moments_match_hand_computed_values() -> None:
    truth = np.array([[0, 0.5]] * 5 + [[0.5, 1]] * 3 + [[0.2, 0.3]])
    moments = best_constant_moments(truth, 3, 0.95)
    np.testing.assert_allclose(moments, [[0, 0.5], [0.5, 1], [0.2, 0.3]], atol=0.03)


def test_best_constant_moment_for_mean_iou_equals_the_truth() -> None:
    np.testing.assert_allclose(best_constant_moments(np.array([[0.2, 0.6]]), 1, None), [[0.2, 0.6]], atol=1e-6)


def test_prior_is_fitted_on_training_truth_only() -> None:
    training, truth = np.array([[0.0, 0.5]] * 4), np.array([[0.0, 0.5], [0.9, 1.0]])
    actual = prior_report(training, truth, "mmaction2")
    assert actual.values["R@1 IoU=0.7"] == 0.5
    assert actual.values["R@5 IoU=0.7"] == 0.5
    assert actual.values["mIoU"] == pytest.approx(0.5, abs=1e-6)
    assert actual.queries == 2
    assert tuple(actual.values) == METRICS


def test_prior_on_real_annotations_matches_recorded_values(real_data: Path) -> None:
    data_set = DataSet(real_data / "charades_sta")
    training = data_set.spans(data_set.annotations("train", invalid="drop"))
    values = prior_report(training, data_set.spans(data_set.annotations("test")), "mmaction2").values
    floor = {"R@1 IoU=0.5": 0.3056, "R@1 IoU=0.7": 0.1745, "R@5 IoU=0.5": 0.8565, "R@5 IoU=0.7": 0.4866}
    # Other greedy choices among nearly equal spans change it by less than a point.
    assert {name: values[name] for name in floor} == pytest.approx(floor, abs=0.01)


def test_format_table_has_percent_row_per_report() -> None:
    rows = [
        ("model", Report({"R@1 IoU=0.5": 0.4704, "mIoU": 1}, 10, "drn")),
        ("prior", Report({"R@1 IoU=0.5": 0.3056, "mIoU": 0}, 10, "drn")),
    ]
    head, model, prior = format_table(rows).splitlines()
    assert head.split() == ["R@1", "IoU=0.5", "mIoU"]
    assert model.split() == ["model", "47.04", "100.00"]
    assert prior.split() == ["prior", "30.56", "0.00"]
    assert len(head) == len(model) == len(prior)

"""Test `runtime.core.presence`: a threshold that separates pairs, and models that return no moment below it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime import Grounder, Presence, Windows
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.core.decoding import Decoding
from runtime.core.errors import GroundingError, ModelFileError
from runtime.core.presence import fit_threshold
from runtime.datasets.dataset import DataSet
from runtime.grounding.evaluation import evaluate
from runtime.infer import infer
from tests.raising import quotes, raises
from tests.runtime.planted import PAIRS, QUARTER, WINDOWS, Finder, PlantedBackend, PlantedPair, long_video, video

HALF = Presence(0.5, 0.9, 0.8, 100, 500)
SCORES = st.lists(st.floats(0.0625, 1, width=32) | st.just(-np.inf), min_size=1, max_size=30)


def test_fit_threshold_matches_hand_computed_values() -> None:
    matching, mismatched = np.array([0.9, 0.8, 0.3, -np.inf]), np.array([0.7, 0.35, 0.2, 0.1])
    # Of the candidates 0.9, 0.8 and 0.3, 0.8 has the best mean of shares: 1/2 and 4/4.
    actual = fit_threshold(matching, mismatched)
    assert dataclasses.astuple(actual) == (pytest.approx(0.75), 0.5, 1.0, 4, 4, "balanced accuracy")
    kept = fit_threshold(matching, mismatched, keep=0.6)
    assert dataclasses.astuple(kept)[:3] == (pytest.approx(0.25), 0.75, 0.5)
    assert kept.rule == "at least 60 % kept"


def test_keep_hint_appears_only_when_a_lower_value_suffices() -> None:
    unlikely, some = np.full(3, -np.inf), np.array([0.5, -np.inf])
    with raises(GroundingError, "no_threshold") as without_keep:
        fit_threshold(unlikely, np.array([0.5]))
    with raises(GroundingError, "no_threshold", "90 %", "--keep"):
        fit_threshold(some, np.array([0.5]), keep=0.9)
    with raises(GroundingError, "no_threshold", "90 %") as hopeless:
        fit_threshold(unlikely, np.array([0.5]), keep=0.9)
    for raised in (without_keep, hopeless):
        assert not quotes(str(raised.value), "--keep")


@given(st.floats(0.0625, 1, width=32), st.floats(0, 1, width=32) | st.just(-np.inf))
def test_exist_score_reaches_half_at_the_threshold(threshold: float, score: float) -> None:
    presence = Presence(threshold, 0.9, 0.8, 100, 500)
    assert 0 <= presence.exist_score(score) <= 1
    assert (presence.exist_score(score) >= 0.5) == (score >= threshold)
    assert presence.exist_score(threshold) <= presence.exist_score(1) == 1


def test_exist_score_of_a_rounded_threshold_passes() -> None:
    assert Presence(0.3, 0.9, 0.8, 100, 500).exist_score(float(np.float32(0.3))) == 0.5
    assert Presence(0.5, 0.9, 0.8, 100, 500).exist_score(0.25) == 0.25


@given(SCORES, SCORES, st.none() | st.floats(0.01, 1))
@settings(max_examples=200)
@example([0.5, -np.inf, -np.inf, -np.inf, -np.inf], [0.4], 0.2)
def test_fit_threshold_is_optimal_by_shares(matching: list[float], mismatched: list[float], keep: float | None) -> None:
    own, other = np.array(matching), np.array(mismatched)
    max_share = (own > -np.inf).mean()
    if max_share == 0 or (keep or 0) > max_share:
        with raises(GroundingError, "no_threshold"):
            fit_threshold(own, other, keep)
        return
    actual = fit_threshold(own, other, keep)
    assert actual.kept == pytest.approx((own >= actual.threshold).mean())
    assert actual.refused == pytest.approx((other < actual.threshold).mean())
    # A threshold must keep at least one matching pair.
    for threshold in np.linspace(0.01, own.max(), 50):
        kept, refused = (own >= threshold).mean(), (other < threshold).mean()
        if keep is None:
            assert actual.kept + actual.refused >= kept + refused - 1e-9
        elif kept >= keep:
            assert actual.refused >= refused - 1e-9
    if keep is not None:
        assert actual.kept >= keep - 1e-9


def test_invalid_shares_and_thresholds_are_rejected() -> None:
    for keep in (0, -1, 1.5, float("nan")):
        with raises(GroundingError, "invalid_option", "--keep"):
            fit_threshold(np.array([0.5]), np.array([0.4]), keep)
    threshold: Any
    for threshold in (0, -0.1, 1.1, float("nan"), "0.5"):
        with raises(ModelFileError, "invalid_setting", repr(threshold)):
            Presence(threshold, 0.9, 0.8, 100, 500)


def carrying(backend: Any, threshold: float) -> Any:
    """Return a model with a threshold."""
    presence = dataclasses.replace(HALF, threshold=threshold)
    backend.manifest = dataclasses.replace(backend.manifest, presence=presence)
    return backend


def test_presence_threshold_removes_moments_unless_disabled() -> None:
    grounder = Grounder(carrying(PlantedBackend(), 0.9))
    without = Grounder(PlantedBackend()).ground_batch(PAIRS)
    answers = grounder.ground_batch(PAIRS)
    # The score of the second half of a video is at most 0.8.
    assert answers == [moments if moments[0].score >= 0.9 else [] for moments in without]
    assert grounder.ground(video(10.0, cat=(0, 3)), "dog") == []
    assert grounder.ground(QUARTER, "dog") == without[0]
    assert grounder.ground_batch(PAIRS, presence=False) == without


def test_full_video_fallback_is_not_a_match() -> None:
    strict = Grounder(carrying(PlantedBackend(Decoding(score_threshold=0.9)), 0.01))
    nothing = (video(60.0), "person runs dog opens door cat")
    assert strict.ground(*nothing) == []
    assert strict.ground(*nothing, presence=False)[0].score == 1


def test_long_video_without_window_above_threshold_has_no_match() -> None:
    model = carrying(Finder(PlantedBackend(), WINDOWS), 0.5)
    pair = PlantedPair(model)
    subject = long_video(300, dog=(200, 210))
    for grounder in (Grounder(model), Grounder(pair)):
        actual, nothing = grounder.ground_batch([(subject, "dog"), (subject, "cat")])
        assert round(actual[0].start / 10) == 20
        assert nothing == []
        assert grounder.ground(subject, "cat", presence=False)[0].score == 1
    # The score of the moment is below the threshold.
    assert Grounder(carrying(model, 0.99)).ground(subject, "dog") == []
    assert Grounder(carrying(model, 0.9)).ground(subject, "dog")


def test_evaluation_ignores_presence(tiny_manifest: Manifest, write_graph: Any, mini: Path, tmp_path: Path) -> None:
    reports = []
    for name, presence in (("plain", None), ("strict", dataclasses.replace(HALF, threshold=1.0))):
        manifest = dataclasses.replace(tiny_manifest, presence=presence)
        model = write_graph(tmp_path / f"{name}.onnx", {METADATA_KEY: manifest.to_json()})
        data_set = DataSet(mini)
        reports.append(evaluate(Grounder.load(model), data_set, data_set.annotations("test")).report)
    assert reports[0] == reports[1]


def test_infer_prints_no_moment_found(
    tiny_manifest: Manifest, write_graph: Any, mini: Path, tmp_path: Path, run_command: Any
) -> None:
    strict = dataclasses.replace(tiny_manifest, presence=dataclasses.replace(HALF, threshold=1.0))
    model = write_graph(tmp_path / "strict.onnx", {METADATA_KEY: strict.to_json()})
    arguments = ("--model", model, "--data", mini, "--video", "AAAA1", "--query", "dog sits")
    assert run_command(infer, *arguments).out.endswith("“dog sits”\n  no moment found\n")
    (answer,) = json.loads(run_command(infer, *arguments, "--format", "json").out)
    assert answer["moments"] == []
    assert answer["pred_exist_score"] < 0.5
    (same,) = json.loads(run_command(infer, *arguments, "--always-answer", "--format", "json").out)
    assert (same["pred_exist_score"], bool(same["moments"])) == (answer["pred_exist_score"], True)
    plain = write_graph(tmp_path / "plain.onnx", {METADATA_KEY: tiny_manifest.to_json()})
    (unaware,) = json.loads(run_command(infer, "--model", plain, *arguments[2:], "--format", "json").out)
    assert unaware == {"query": "dog sits", "video": "AAAA1", "moments": same["moments"]}
    assert "no moment found" not in run_command(infer, *arguments, "--always-answer").out


def test_manifest_keeps_presence_threshold_and_windows(tiny_manifest: Manifest) -> None:
    full = dataclasses.replace(tiny_manifest, presence=HALF, windows=Windows(194.42, 43.0, 14.5))
    assert Manifest.from_json(full.to_json()) == full
    assert str(HALF) == (
        "below a score of 0.500, which answers 90.0 % of 100 matching and refuses 80.0 % of 500 mismatched pairs "
        "(balanced accuracy)"
    )

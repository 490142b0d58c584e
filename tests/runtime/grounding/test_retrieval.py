"""Test `runtime.grounding.retrieval` and `runtime.rank`: the rank of a sentence's own video among others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import Grounder
from runtime.core.batch import collate
from runtime.core.decoding import score_proposals
from runtime.core.errors import FeatureError, GroundingError
from runtime.datasets.dataset import DataSet
from runtime.grounding import retrieval as ranking_module
from runtime.grounding.retrieval import best_scores, draw_videos, rank
from runtime.rank import rank as rank_command
from tests.raising import check_error, raises


def test_rank_matches_hand_computed_values() -> None:
    scores = np.array([[0.9, 0.1, 0.2, 0.3], [0.2, 0.1, 0.3, 0.4], [0.2, 0.2, 0.1, 0.5], [-np.inf] * 4], np.float32)
    actual = rank(scores)
    # The second is third; of equal scores each gets the mean of their places.
    assert actual.ranks.tolist() == [1, 3, 2.5, 2.5]
    assert actual.values == {"R@1": 0.25, "R@10": 1.0, "median rank": 2.5}
    assert actual.chance == {"R@1": 0.25, "R@10": 1.0, "median rank": 2.5}


def test_random_scores_rank_as_chance() -> None:
    actual = rank(np.random.default_rng(0).random((4000, 100)))
    assert actual.values["R@1"] == pytest.approx(actual.chance["R@1"], abs=0.01)
    assert actual.values["R@10"] == pytest.approx(actual.chance["R@10"], abs=0.02)
    assert actual.values["median rank"] == pytest.approx(actual.chance["median rank"], abs=2)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(1, 9), st.integers(0, 5))
def test_draw_videos_returns_own_video_and_distinct_others(own: list[int], count: int, seed: int) -> None:
    drawn = draw_videos(np.array(own), 10, count, seed)
    assert drawn.shape == (len(own), count + 1)
    assert drawn[:, 0].tolist() == own
    assert all(len(set(row)) == count + 1 and set(row) <= set(range(10)) for row in drawn.tolist())
    np.testing.assert_array_equal(drawn, draw_videos(np.array(own), 10, count, seed))


def test_too_many_videos_are_rejected() -> None:
    with raises(GroundingError, "too_few_videos", 10, 9):
        draw_videos(np.array([0]), 10, 10, 0)


@pytest.mark.parametrize("chunk", [1, 512])
def test_retrieval_scores_equal_single_pairs_reading_once(
    tiny_model: Path, mini: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(ranking_module, "CHUNK_SIZE", chunk)
    grounder, data_set = Grounder.load(tiny_model), DataSet(mini)
    annotations = data_set.annotations("test")
    names = sorted({annotation.video for annotation in annotations})
    sentences = [annotation.sentence for annotation in annotations]
    drawn = draw_videos(np.array([names.index(a.video) for a in annotations]), len(names), len(names) - 1, 0)
    read: list[str] = []
    monkeypatch.setattr(data_set, "video", lambda name: read.append(name) or DataSet.video(data_set, name))
    progress: list[int] = []
    scores = best_scores(grounder, data_set, sentences, names, drawn, batch_size=3, on_progress=progress.append)
    assert sorted(read) == names
    assert sum(progress) == drawn.size
    for row, sentence in enumerate(sentences):
        for column, number in enumerate(drawn[row]):
            segments = grounder.segments(DataSet(mini).video(names[number]))
            heads = grounder.backend.run(collate([grounder.encode_query(sentence)], [segments]))
            alone = score_proposals(heads, grounder.manifest.decoding).scores.max()
            assert scores[row, column] == pytest.approx(alone, abs=1e-6)


def test_rank_command_reports_chance_values(
    tiny_model: Path, mini: Path, tmp_path: Path, run_command: Any, refused: Any
) -> None:
    arguments = ("--model", tiny_model, "--data", mini)
    outcome = run_command(rank_command, *arguments, "--videos", 2, "--output", tmp_path / "ranking.json")
    assert "chance           50.00       100.00         1.50" in outcome.out
    assert "5 queries of test, each with 2 " in outcome.out
    written = json.loads((tmp_path / "ranking.json").read_text())
    assert written["chance"]["R@1"] == 0.5
    assert len(written["ranks"]) == written["sentences"] == 5
    assert written["median rank"] == np.median(written["ranks"])
    check_error(refused(rank_command, *arguments), "too_few_videos", "--videos")
    check_error(refused(rank_command, *arguments, "--videos", 1), "invalid_option", "--videos", 1)


def test_best_scores_output_not_finite_names_features(overflowing: Grounder, mini: Path) -> None:
    data_set = DataSet(mini)
    names = sorted(data_set.durations)
    with raises(FeatureError, "features_out_of_scale"):
        best_scores(overflowing, data_set, ["person opens the door"], names, np.arange(3)[None])

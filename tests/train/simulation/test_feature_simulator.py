"""Test `train.simulation.feature_simulator`: what the features depend on, and how much."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.simulation.feature_simulator import DIFFICULTIES, Difficulty, Simulator
from train.simulation.scenario import Scenario
from train.simulation.synthetic_videos import SCENES, synthetic_plan


@given(st.integers(1, 5000), st.floats(1, 300))
def test_features_are_finite_for_any_frame_rate(num_frames: int, duration: float) -> None:
    scenario = Scenario("V", num_frames, duration, "kitchen", ("door",), (("open door", 0.0, duration / 2),))
    rows = SIMULATOR.features(scenario)
    assert rows.shape == (scenario.num_clips, 8)
    assert np.isfinite(rows).all()


def simulator(**changes: float) -> Simulator:
    """Return a simulator of actions alone, except for `changes`."""
    quiet = {"identity": 0.0, "noise": 0.0, "jitter": 0.0, "drop": 0.0, "confuse": 0.0}
    return Simulator(synthetic_plan(2, 0), Difficulty(**{**quiet, **changes}), 8, 0)


SIMULATOR = Simulator(synthetic_plan(2, 0), DIFFICULTIES["medium"], 8, 0)
# 30 frames a second: clip k sees the frames 8k to 8k + 15. The action starts with frame 120 and ends before frame 240.
SCENARIO = Scenario("V", 480, 16.0, "kitchen", (), (("open door", 4.0, 8.0),))


def test_action_is_weighted_by_its_share_of_the_clip() -> None:
    quiet = simulator()
    latents = quiet.latents(SCENARIO) - quiet.embedding("scene", "kitchen")
    action = quiet.embedding("action", "open door")
    weights = latents @ action / (action @ action)
    expected = np.zeros(59)
    expected[14] = expected[29] = 0.5  # frames 112 to 127, of which 120 on; and 232 to 247, of which up to 239
    expected[15:29] = 1
    np.testing.assert_allclose(weights, expected, atol=1e-5)


def test_dropped_action_does_not_change_features() -> None:
    latents = simulator(drop=1.0).latents(SCENARIO)
    np.testing.assert_allclose(latents, np.broadcast_to(latents[0], latents.shape), atol=1e-6)


def test_confused_action_has_embedding_of_similar_action() -> None:
    confused = simulator(confuse=1.0)
    plan = synthetic_plan(2, 0)
    trace = confused.latents(SCENARIO)[20] - confused.embedding("scene", "kitchen")
    confusable = plan.confusable_actions("open door")
    assert "close door" in confusable
    assert "open window" in confusable
    assert "open door" not in confusable
    assert any(np.allclose(trace, confused.embedding("action", name), atol=1e-5) for name in confusable)


def test_jitter_shifts_boundaries_by_given_seconds() -> None:
    jittered = simulator(jitter=0.9)
    action = jittered.embedding("action", "open door")
    onsets = []
    for index in range(400):
        scenario = Scenario(f"V{index}", 1800, 60.0, "kitchen", (), (("open door", 20.0, 40.0),))
        weights = (jittered.latents(scenario) - jittered.embedding("scene", "kitchen")) @ action / (action @ action)
        onsets.append(float(np.argmax(weights > 0.5)) * 8 / 30)
    assert np.std(onsets) == pytest.approx(0.9, rel=0.15)


def test_noise_is_correlated_over_about_a_second() -> None:
    noisy = Simulator(synthetic_plan(2, 0), Difficulty(0.0, 1.0, 0.0, 0.0, 0.0), 256, 0)
    # 8 frames a second, so that neighboring clips are one second apart.
    scenario = Scenario("V", 8 * 2000, 2000.0, "kitchen", (), ())
    noise = noisy.latents(scenario) - noisy.embedding("scene", "kitchen")
    assert noise.std() == pytest.approx(1, rel=0.05)
    assert (noise[1:] * noise[:-1]).mean() == pytest.approx(np.exp(-1), abs=0.05)


@pytest.mark.parametrize("difficulty", ["easy", "medium", "hard"])
def test_linear_probe_accuracy_follows_difficulty(difficulty: str) -> None:
    """Classify two actions of other videos by the nearest class mean."""
    expected = {"easy": (0.93, 1.0), "medium": (0.72, 0.97), "hard": (0.6, 0.93)}[difficulty]
    plan = synthetic_plan(2, 0)
    tool = Simulator(plan, DIFFICULTIES[difficulty], 512, 0)
    rows, truth = [], []
    for index in range(200):
        action = ("open door", "wash cup")[index % 2]
        scenario = Scenario(f"V{index}", 480, 16.0, SCENES[index % 6], (), ((action, 3.0, 13.0),))
        rows.append(tool.features(scenario)[30:34].max(axis=0))
        truth.append(index % 2)
    rows, truth = np.stack(rows), np.array(truth)
    means = [rows[:100][truth[:100] == which].mean(axis=0) for which in (0, 1)]
    distance = np.stack([((rows[100:] - mean) ** 2).sum(axis=1) for mean in means])
    accuracy = (distance.argmin(axis=0) == truth[100:]).mean()
    assert expected[0] <= accuracy <= expected[1]

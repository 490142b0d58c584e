"""Test `train.simulation.charades_actions`: action classes and the real annotations."""

from __future__ import annotations

from pathlib import Path

from train.simulation.charades_actions import _confusable_classes, charades_plan


def test_confusable_classes_have_adjacent_numbers() -> None:
    classes = ["c001", "c002", "c003", "c005", "c100"]
    assert _confusable_classes(classes, "c003") == ["c001", "c002", "c005"]
    assert _confusable_classes(classes, "c100") == []


def test_every_valid_charades_sta_moment_is_an_action_interval(real_data: Path) -> None:
    plan = charades_plan(real_data / "charades_sta", None, 0)
    assert len(plan.scenarios) == 6672
    assert plan.contents["moments"] == {"train": 12408, "test": 3720}
    # Four training lines end before they start, and so do the actions they equal.
    assert plan.contents["moments_equal_to_an_action"] == {"train": 12404, "test": 3720}

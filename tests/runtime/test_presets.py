"""`runtime.presets`: what is usual for each data set."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runtime.decoding import Decoding
from runtime.errors import AnnotationError
from runtime.manifest import Features
from runtime.presets import PRESETS, Preset, query_length_of


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_json_and_can_be_decoded(name: str) -> None:
    preset = PRESETS[name]
    assert Preset.from_dict(json.loads(json.dumps(preset.to_dict()))) == preset
    assert Decoding(num_segments=preset.num_segments).num_locations == preset.num_segments * 7 // 4


def test_charades_is_the_published_model() -> None:
    preset = PRESETS["charades-sta"]
    assert (preset.num_segments, preset.features, preset.iou_thresholds) == (32, Features(), (0.3, 0.5, 0.7))


@pytest.mark.parametrize(
    "change",
    [
        {"num_segments": 30},
        {"num_segments": 0},
        {"iou_thresholds": (0.3,)},
        {"iou_thresholds": (0.5, 0.7, 1.0)},
        {"query_length": (1, 8)},
        {"query_length": (1, 8, 4)},
        {"query_length": (0, 8, 12)},
    ],
)
def test_a_preset_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(AnnotationError):
        Preset("Mine", **change)


@pytest.mark.parametrize("told", [None, [1, 2], [1, 2, "3"], "1 2 3"])
def test_a_model_that_says_nothing_usable_of_its_queries_takes_the_usual(told: Any) -> None:
    assert query_length_of({"query_length": told}) == query_length_of({}) == (1, 8, 32)

"""Test `runtime.datasets.presets`: default options of each data set."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from runtime.artifacts.manifest import Features
from runtime.core.decoding import Decoding
from runtime.core.errors import AnnotationError
from runtime.core.tokenizer import tokenize
from runtime.datasets.dataset import DataSet
from runtime.datasets.presets import (
    LENGTH_QUANTILES,
    PRESETS,
    Preset,
    length_quantiles,
    length_quantiles_of,
    query_length_of,
)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_json_and_gives_valid_decoding(name: str) -> None:
    preset = PRESETS[name]
    assert Preset.from_dict(json.loads(json.dumps(preset.to_dict()))) == preset
    assert Decoding(num_segments=preset.num_segments).num_locations == preset.num_segments * 7 // 4


def test_charades_preset_matches_published_model() -> None:
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
def test_invalid_preset_is_rejected(change: dict[str, Any]) -> None:
    with pytest.raises(AnnotationError):
        Preset("Mine", **change)


@pytest.mark.parametrize("recorded", [None, [1, 2], [1, 2, "3"], "1 2 3"])
def test_unusable_query_lengths_fall_back_to_defaults(recorded: Any) -> None:
    assert query_length_of({"query_length": recorded}) == query_length_of({}) == (1, 8, 32)


def test_length_quantile_covers_its_share_of_queries() -> None:
    assert length_quantiles([4] * 90 + [7] * 9 + [30]) == (4, 7)
    assert length_quantiles([4] * 89 + [7] * 9 + [30] * 2) == (7, 30)
    assert length_quantiles([3]) == (3, 3)


def test_length_quantiles_come_from_model_or_data_set() -> None:
    recorded = length_quantiles_of({"data_set": "TACoS", "query_length_quantiles": [5, 8]})
    assert recorded is not None
    assert recorded[0] == (5, 8)
    for title in (preset.title for preset in PRESETS.values()):
        published = length_quantiles_of({"data_set": title})
        assert published is not None
        assert published[0] == LENGTH_QUANTILES[title]
        assert title in published[1]
    converted = length_quantiles_of({})
    assert converted is not None
    assert converted[0] == LENGTH_QUANTILES["Charades-STA"]
    assert length_quantiles_of({"data_set": "Mine"}) is None
    assert length_quantiles_of({"data_set": ["Mine"], "query_length_quantiles": [5.0, 8]}) is None


@pytest.mark.parametrize(("directory", "title"), [("charades_sta", "Charades-STA"), ("tacos", "TACoS")])
def test_published_quantiles_match_annotation_files(directory: str, title: str) -> None:
    if "DRN_REAL_DATA" not in os.environ:
        pytest.skip("DRN_REAL_DATA does not name the published annotations")
    data_set = DataSet(Path(os.environ["DRN_REAL_DATA"]) / directory)
    training = data_set.annotations("train", invalid="keep", quiet=True)
    assert length_quantiles(len(tokenize(one.sentence)) for one in training) == LENGTH_QUANTILES[title]

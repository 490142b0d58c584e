"""Test `runtime.benchmarking.workload`: synthetic queries, queries of a data set, and cached videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from runtime import Grounder
from runtime.benchmarking.workload import BenchmarkedModel, dataset_workload, synthetic_workload
from runtime.core.errors import GroundingError
from tests.raising import raises
from tests.runtime.planted import PlantedBackend, PlantedPair


def test_synthetic_workload_matches_model_sizes_and_words() -> None:
    manifest = PlantedBackend().manifest
    workload = synthetic_workload([manifest], 70)
    assert len(workload.pairs) == 70
    assert len({id(video) for video, _ in workload.pairs}) == 64
    grounder = Grounder(PlantedBackend())
    lengths = {len(grounder.encode_query(query)) for _, query in workload.pairs}
    assert lengths == {3, 4, 5, 6}
    assert all(video.features.shape[1] == manifest.features.dim for video, _ in workload.pairs)
    again = synthetic_workload([manifest], 70)
    assert [query for _, query in again.pairs] == [query for _, query in workload.pairs]
    assert np.array_equal(again.pairs[0][0].features, workload.pairs[0][0].features)


def test_dataset_workload_returns_videos_and_queries(mini: Path) -> None:
    lines = [line.split("##") for line in (mini / "Charades_sta_test.txt").read_text().splitlines()]
    result = dataset_workload(mini, None, ())
    assert [(video.name, query) for video, query in result.pairs] == [(head.split()[0], query) for head, query in lines]
    name = lines[0][0].split()[0]
    of_one = dataset_workload(mini, name, ())
    assert {video.name for video, _ in of_one.pairs} == {name}
    assert lines[0][1] in {query for _, query in of_one.pairs}
    workload = dataset_workload(mini, name, ("person opens", "person sits"))
    assert [(video.name, query) for video, query in workload.pairs] == [(name, "person opens"), (name, "person sits")]
    with raises(GroundingError, "unlisted_video", "'none'"):
        dataset_workload(mini, "none", ())


def test_cached_pairs_reuse_and_unseen_pairs_need_encodings() -> None:
    pair = PlantedPair(PlantedBackend())
    grounder = Grounder(pair)
    model = BenchmarkedModel.from_grounder("pair", grounder, synthetic_workload([pair.manifest]).pairs)
    ready = pair.encoded
    grounder.ground_batch(model.cached_pairs(3, 8))
    assert pair.encoded == ready
    for number in range(3):
        grounder.ground_batch(model.unseen_pairs(0, 8))
        assert pair.encoded == ready + 8 * (number + 1)
    # The same question in both, and a video that stands in a batch twice is one.
    assert [query for _, query in model.unseen_pairs(3, 8)] == [query for _, query in model.cached_pairs(3, 8)]
    assert len({id(video) for video, _ in model.unseen_pairs(0, 16)}) == 8
